//! What does root's only program do?
//!
//! In:     requests from agentd's uid, ends of children, deadlines. Out: answers, processes, cgroups, exit records.
//! Owns:   every jail and engine as its child, the cgroups `/agents` and `/engines`, the folders of `/data/agents`,
//!         copies of each run's sockets, so that a new agentd gets them.
//! Always: one thread, one loop ([`serve`]); nothing in it waits for a child of a run, so one that hangs delays nobody.
//!         What agentd sends is checked again ([`crate::check`]). Its own death ends every run and engine.
//! Never:  a network, a name to resolve, a file of an agent's opened without `openat2` and without following links.

mod calls;
mod cgroups;
mod confine;
mod device_limits;
mod engines;
mod kernel_log;
mod options;
mod records;
mod requests;
mod runs;
mod server;
mod swap_room;
mod volumes;

pub use options::{Options, Without};
pub use server::serve;

use agentd_domain::fault::Report;
use rustix::time::{ClockId, clock_gettime};

/// Milliseconds of the boot clock: it goes on in suspend and never jumps.
fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Something outside is missing or broken, and the request was not carried out.
fn broken(code: &str, why: impl std::fmt::Display, fix: &str) -> Report {
    Report::environment(code, "the launcher did not do it", why.to_string(), fix)
}

fn refused(code: &str, why: impl std::fmt::Display, fix: &str) -> Report {
    Report::caller(code, "the launcher did not do it", why.to_string(), fix)
}
