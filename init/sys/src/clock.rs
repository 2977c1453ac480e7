//! What time is it, by which clock?
//!
//! The boot clock counts from the start of the kernel, also while the machine sleeps, and never jumps:
//! back-off, deadlines and milestones use it. The wall clock may be set at any time.
//! Source: clock_gettime(2).

use rustix::time::{ClockId, Timespec};
use std::io;

/// Milliseconds since the kernel started its clock.
pub fn boot_ms() -> u64 {
    to_ms(rustix::time::clock_gettime(ClockId::Boottime))
}

/// Milliseconds since 1970 as the machine believes now.
pub fn wall_ms() -> u64 {
    to_ms(rustix::time::clock_gettime(ClockId::Realtime))
}

/// Sets the wall clock. Needs CAP_SYS_TIME.
pub fn set_wall_ms(unix_ms: u64) -> io::Result<()> {
    let tv_sec = i64::try_from(unix_ms / 1000).map_err(|_| io::ErrorKind::InvalidInput)?;
    let tv_nsec = i64::try_from(unix_ms % 1000).map_err(|_| io::ErrorKind::InvalidInput)? * 1_000_000;
    rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?;
    Ok(())
}

fn to_ms(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_clock_does_not_go_back() {
        let first = boot_ms();
        assert!(first > 0);
        assert!(boot_ms() >= first);
    }
}
