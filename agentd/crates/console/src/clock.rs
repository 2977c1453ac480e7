//! Which time do claim codes and sessions live by?
//!
//! The boot clock: it never goes back, goes on while the machine sleeps, and does not depend on a network or on
//! what an owner types. Tests put a clock of their own in its place, so nothing here ever sleeps.
//!
//! Source: clock_gettime(2), `CLOCK_BOOTTIME`.

use std::sync::Arc;
use std::time::Duration;

/// Time since the machine started.
pub type BootClock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The machine's own.
pub fn boot_clock() -> BootClock {
    Arc::new(|| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    })
}
