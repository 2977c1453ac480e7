//! Which system calls does the appliance need that std does not offer, as safe functions?
//!
//! Owns:  nothing; every function is a thin wrapper of one kernel interface, plus [`twofile`], the way in
//!        which small state files survive a power cut.
//! Who:   init and console-tty; agentd and the launcher for `twofile`, `packet` and `quota`.
//! Never: a decision, a retry, a log line. That is the caller's.
//! Unsafe: only here, in `spawn`, `signals` and the modules of ioctls, each block with its argument.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod block;
pub mod clock;
pub mod lower;
pub mod mounts;
pub mod packet;
#[allow(unsafe_code)]
pub mod quota;
#[allow(unsafe_code)]
pub mod rtc;
#[allow(unsafe_code)]
pub mod signals;
#[allow(unsafe_code)]
pub mod spawn;
pub mod twofile;
#[allow(unsafe_code)]
pub mod watchdog;

pub use rustix::process::{Pid, Signal};
