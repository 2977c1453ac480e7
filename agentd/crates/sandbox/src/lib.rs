//! How does a sandbox plan become walls that the kernel keeps up?
//!
//! Owns:  the launcher's socket protocol, the checks of a plan against the host, the making of namespaces, mounts,
//!        cgroups, Landlock rules and seccomp filters.
//! Never: a decision about what an agent may do (that is `agentd-capability`), tokio, a thread, a network.
//!
//! Two programs are built from here. `agent-launcher` is root's only program and the parent of every run; it clones
//! `agent-jail` into fresh namespaces, which raises the walls and becomes pid 1 of the run. agentd links [`client`]
//! alone.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

pub mod check;
pub mod client;
pub mod jail;
pub mod landlock;
pub mod launcher;
pub mod lower;
pub mod narrow;
pub mod seccomp;
pub mod sys;
pub mod syscalls;
pub mod wire;
