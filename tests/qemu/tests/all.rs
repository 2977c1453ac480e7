//! The real kernel and image, as an owner meets them. One machine at a time: `--test-threads=1`.
//!
//! Each test is a scene of its own disk. What a test needs of an earlier one stands in the same scene, because
//! a boot under emulation takes ten seconds.
#![forbid(unsafe_code)]

#[path = "suite/alone.rs"]
mod alone;
#[path = "suite/bad_input.rs"]
mod bad_input;
#[path = "suite/bad_machines.rs"]
mod bad_machines;
#[path = "suite/companion.rs"]
mod companion;
#[path = "suite/escape.rs"]
mod escape;
#[path = "suite/escape_ways.rs"]
mod escape_ways;
#[path = "suite/first_day.rs"]
mod first_day;
#[path = "suite/health.rs"]
mod health;
#[path = "suite/kselftest.rs"]
mod kselftest;
#[path = "suite/memory.rs"]
mod memory;
#[path = "suite/network.rs"]
mod network;
#[path = "suite/packages.rs"]
mod packages;
#[path = "suite/sharing.rs"]
mod sharing;
#[path = "suite/tokens.rs"]
mod tokens;
#[path = "suite/uefi.rs"]
mod uefi;
#[path = "suite/variants.rs"]
mod variants;
#[path = "suite/walls.rs"]
mod walls;
#[path = "suite/web.rs"]
mod web;
