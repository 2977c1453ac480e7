//! How long and how much? Measured, never asserted: machines are noisy, so what is compared is measured side by
//! side in one run and told as medians and ratios.
//!
//! Each benchmark prints a table and writes `target/bench/<name>.json`. `scripts/bench keep` copies that to
//! `tests/results/bench/`, which is committed, and from there README's table is made.
#![forbid(unsafe_code)]

pub mod bombs;
pub mod boot;
pub mod debian;
pub mod idle;
pub mod memory;
pub mod plan;
pub mod report;
pub mod rights;
pub mod serve;
pub mod size;
pub mod spawn;
