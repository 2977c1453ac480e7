//! `agent-jail`: pid 1 of one run. Started by `agent-launcher` only, with the plan coming on descriptor 3.
#![allow(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

use agentd_sandbox::jail;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: the launcher places the control socket at this number before exec and closes all others but stdio, so
    // it is open and nothing else in this process owns it. Started by hand without it, the first read fails.
    let control = unsafe { OwnedFd::from_raw_fd(jail::CONTROL_FD) };
    ExitCode::from(u8::try_from(jail::run(&control)).unwrap_or(1))
}
