//! How does a checkout become a kernel, a verified root, a boot item and a disk, and how is it started in QEMU?
//!
//! Owns:   the stages (kernel, programs, models, root, uki, disk), their cache, and the QEMU driver that
//!         `scripts/run`, `tests/qemu` and `tests/bench` share.
//! In:     this checkout, Debian's tools and libraries, Debian's kernel source.
//! Out:    `${AGENTD_CACHE:-~/.cache/agentd-os}/{kernel,root,disk}/<hash>/`, each with `inputs.json`.
//! Always: a stage's folder appears by rename when it is complete; its name is the hash of its inputs, so a
//!         second run finds it. No stage needs root privileges.
//! Never:  anything that runs on the appliance; what both sides must agree on is in `agentd-domain`.
#![forbid(unsafe_code)]

pub mod build;
pub mod cache;
pub mod cmdline;
pub mod command;
pub mod disk;
pub mod elf;
pub mod esp;
pub mod flash;
pub mod kernel;
pub mod layout;
pub mod media;
pub mod models;
pub mod programs;
pub mod qemu;
pub mod release;
pub mod root;
pub mod run;
pub mod source;
pub mod uki;
pub mod variant;
pub mod verity;
