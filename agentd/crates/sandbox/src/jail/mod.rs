//! What does pid 1 of a run do?
//!
//! In:     one [`JailSpec`] on descriptor 3, from the launcher. Out: [`FromJail`] on the same socket.
//! Owns:   the run's listeners and pipes, which outlive every agentd.
//!
//! ```text
//!   born in fresh namespaces ── raise walls ──► fork ──► agent: drop, Landlock, seccomp, self-probe, exec
//!        │                          │             │
//!        └── a step fails ──────────┴── Failed ◄──┘ child wrote its failure
//!                                                 └─ exec closed the pipe ──► Up (with descriptors) ──► reap until
//!                                                                             the agent ends ──► Ended, exit
//! ```
//!
//! Always: nothing of the agent runs before every step has succeeded; the first failure ends the process, and with
//!         it the pid namespace. The order follows what the walls need of each other: mounts need root, Landlock must
//!         see the new root, seccomp forbids all of it and therefore comes last before the probe.
//! Never:  two threads.

mod call;
mod child;
mod listeners;
mod mounts;
mod parent;
mod probe;
mod spec;

pub(crate) use child::{change_user, drop_capabilities};
pub use parent::run;
pub use spec::{CONTROL_FD, FromJail, JailSpec, ToJail};

/// A wall that could not be raised, or that did not hold. The step's name reaches the owner.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[error("{step}: {why}")]
pub struct Failure {
    pub step: String,
    pub why: String,
}

/// Names the step that an operation belongs to.
pub(crate) fn step<T, E: std::fmt::Display>(name: &str, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|error| Failure { step: name.to_owned(), why: error.to_string() })
}
