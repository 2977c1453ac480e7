//! What time may be believed?
//!
//! The floor is the later of the build and the last time that a server or the owner confirmed. A clock before
//! the floor is late; one ten years past the build was never set. Unconfirmed time is never stored, so one
//! wrong clock does not spoil the next boot's floor.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use crate::status;
use crate::steps::config::tell_netd;
use agentd_domain::fault::Report;
use agentd_domain::netd::CLOCK_HORIZON_MS;
use agentd_domain::paths;
use init_sys::twofile::TwoFile;
use init_sys::{clock, rtc};
use std::path::Path;

/// A floor that is an hour old is as good; state is not written for less.
const KEEP_EVERY_MS: u64 = 3_600_000;
const BOARD_CLOCK: &str = "/dev/rtc0";

fn file() -> TwoFile {
    TwoFile::new(format!("{}/clock", paths::STATE_INIT))
}

/// Sets a clock that cannot be right to the floor.
pub fn raise_to_floor(machine: &mut Machine) -> Outcome {
    let stored = if machine.facts.state_is_mounted { file().read().ok().flatten() } else { None };
    let stored = stored.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse::<u64>().ok());
    let verdict = judge(clock::wall_ms(), machine.facts.build_ms, stored.unwrap_or(0));
    machine.facts.floor_ms = verdict.floor_ms;
    machine.facts.confirmed_ms = stored.unwrap_or(0);
    // The settings were written before the floor was known.
    tell_netd(machine)?;
    let Some(why) = verdict.why_wrong else { return Ok(Done::Well) };
    machine
        .log
        .warn(&format!("the clock was {why}; it is set to the latest time that is known to have been"));
    clock::set_wall_ms(verdict.floor_ms).map_err(|error| {
        Report::bug(
            "clock_not_set",
            "the clock could not be set",
            error.to_string(),
            "set the clock in the firmware's menu",
        )
    })?;
    Ok(Done::Well)
}

#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    floor_ms: u64,
    /// Why the clock is set to the floor; nothing if it may be right.
    why_wrong: Option<&'static str>,
}

fn judge(now_ms: u64, build_ms: u64, confirmed_ms: u64) -> Verdict {
    let horizon_ms = build_ms.saturating_add(CLOCK_HORIZON_MS);
    // A stored time behind the horizon was written by mistake or by hand.
    let floor_ms = if confirmed_ms <= horizon_ms { build_ms.max(confirmed_ms) } else { build_ms };
    let why_wrong = if now_ms < floor_ms {
        Some("before the floor")
    } else if now_ms > horizon_ms {
        Some("more than ten years past the build, so unset")
    } else {
        None
    };
    Verdict { floor_ms, why_wrong }
}

/// Stores a confirmed time when it is enough later than the stored one, or the end has come, and sets the
/// clock on the board with it.
pub fn keep_confirmed(machine: &mut Machine) {
    let Some(confirmed_ms) = status::confirmed_ms(&status::netd_status()) else { return };
    let patience_ms = if machine.is_ending() { 0 } else { KEEP_EVERY_MS };
    if confirmed_ms <= machine.facts.confirmed_ms.saturating_add(patience_ms) {
        return;
    }
    // A machine without a clock on its board is common; the floor is what counts.
    if let Err(error) = rtc::set(Path::new(BOARD_CLOCK), clock::wall_ms() / 1000) {
        machine.log.info(&format!("{BOARD_CLOCK} was not set: {error}"));
    }
    machine.facts.confirmed_ms = confirmed_ms;
    if machine.facts.state_is_mounted
        && let Err(error) = file().write(confirmed_ms.to_string().as_bytes())
    {
        machine.log.warn(&format!("the confirmed time was not stored: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 1 January 2026 and 2099.
    const BUILD_MS: u64 = 1_767_225_600_000;
    const YEAR_2099_MS: u64 = 4_070_908_800_000;
    const DAY_MS: u64 = 86_400_000;

    #[test]
    fn a_clock_at_1970_is_set_to_the_build() {
        let verdict = judge(0, BUILD_MS, 0);
        assert_eq!(verdict.floor_ms, BUILD_MS);
        assert!(verdict.why_wrong.is_some());
    }

    #[test]
    fn a_clock_at_2099_counts_as_unset() {
        let confirmed_ms = BUILD_MS + DAY_MS;
        let verdict = judge(YEAR_2099_MS, BUILD_MS, confirmed_ms);
        assert_eq!(verdict.floor_ms, confirmed_ms);
        assert!(verdict.why_wrong.is_some());
    }

    #[test]
    fn a_clock_behind_the_last_confirmed_time_is_late() {
        let confirmed_ms = BUILD_MS + 10 * DAY_MS;
        assert!(judge(confirmed_ms - 1, BUILD_MS, confirmed_ms).why_wrong.is_some());
        assert_eq!(judge(confirmed_ms, BUILD_MS, confirmed_ms).why_wrong, None);
    }

    #[test]
    fn a_stored_time_that_cannot_be_is_not_believed() {
        assert_eq!(
            judge(BUILD_MS + DAY_MS, BUILD_MS, YEAR_2099_MS),
            Verdict { floor_ms: BUILD_MS, why_wrong: None }
        );
    }

    proptest! {
        #[test]
        fn the_floor_is_never_before_the_build_nor_behind_the_horizon(
            now_ms: u64, build_ms in 0..YEAR_2099_MS, confirmed_ms: u64,
        ) {
            let verdict = judge(now_ms, build_ms, confirmed_ms);
            prop_assert!(verdict.floor_ms >= build_ms);
            prop_assert!(verdict.floor_ms <= build_ms + CLOCK_HORIZON_MS);
            let after_ms = if verdict.why_wrong.is_some() { verdict.floor_ms } else { now_ms };
            prop_assert!(after_ms >= verdict.floor_ms && after_ms <= build_ms + CLOCK_HORIZON_MS);
        }
    }
}
