//! `scripts/bench`: measures and prints.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::Parser;
use tests_bench::{boot, size};
use tests_qemu::setup;

/// Measures promises with numbers. Run it on an otherwise idle machine.
#[derive(Parser)]
enum Arguments {
    /// Boot times, beside a minimal Debian
    Boot {
        /// Boots of each kind
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Without the Debian peer (building it needs root and mmdebstrap)
        #[arg(long)]
        no_peer: bool,
    },
    /// Sizes on disk and in memory
    Size,
}

fn main() -> Result<()> {
    let bench = match Arguments::parse() {
        Arguments::Boot { runs, no_peer } => boot::measure(runs.max(1), !no_peer)?,
        Arguments::Size => size::measure()?,
    };
    let file = bench.publish(&setup().built.checkout.root)?;
    println!("written to {}", file.display());
    Ok(())
}
