//! What may an agent do, and which kernel policy follows from that?
//!
//! In:     the text of `agent.toml`; then the checked [`Manifest`] and who it is for ([`Subject`]).
//! Out:    all problems at once, or one [`SandboxPlan`] that says everything the kernel will enforce.
//! Always: what the manifest does not ask for is denied; a plan never exceeds
//!         [`agentd_domain::plan::ceiling`]; the same input gives the same plan.
//! Never:  a file, a clock, a process. Plans are applied by `agentd-sandbox`, which checks them again.
//!
//! [`Manifest`]: agentd_domain::manifest::Manifest
//! [`SandboxPlan`]: agentd_domain::plan::SandboxPlan
#![forbid(unsafe_code)]

mod compile;
mod device;
mod diff;
mod manifest;
mod net;
mod reader;
mod syscalls;
pub mod token;
mod units;

pub use compile::{Package, Subject, asked, compile, compile_with, quota, quota_with};
pub use device::give;
pub use diff::{Difference, difference};
pub use manifest::parse_manifest;
