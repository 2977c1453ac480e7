//! `scripts/bench`: measures and prints; keeps results and has README say them.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::Parser;
use image::source::Checkout;
use tests_bench::{bombs, boot, idle, report, rights, size, spawn};

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
    /// Deciding a call of an agent, and how fast a revocation holds
    Rights,
    /// Starts of a program, beside bubblewrap and crun (building them needs root and mmdebstrap)
    Spawn {
        /// By each contender
        #[arg(long, default_value_t = 100)]
        starts: usize,
    },
    /// Memory of agents that wait, and how fast they freeze (building the guest needs root and mmdebstrap)
    Idle {
        #[arg(long, default_value_t = 1000)]
        agents: usize,
    },
    /// What a neighbour notices of an agent that takes all it can get
    Bombs {
        /// Quiet and loud, in turn
        #[arg(long, default_value_t = 7)]
        pairs: usize,
    },
    /// Copies results of earlier runs to tests/results/bench and writes README's table
    Keep {
        /// boot, size, rights, spawn, idle, bombs
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Writes README's table from tests/results/bench
    Readme,
}

fn main() -> Result<()> {
    let checkout = Checkout::find()?.root;
    match Arguments::parse() {
        Arguments::Boot { runs, no_peer } => {
            report::publish(&boot::measure(runs.max(1), !no_peer)?, &checkout)
        }
        Arguments::Size => report::publish(&size::measure()?, &checkout),
        Arguments::Rights => report::publish(&rights::measure(&checkout)?, &checkout),
        Arguments::Spawn { starts } => report::publish(&spawn::measure(starts.max(1))?, &checkout),
        Arguments::Idle { agents } => report::publish(&idle::measure(agents.max(1))?, &checkout),
        Arguments::Bombs { pairs } => report::publish(&bombs::measure(pairs.max(1))?, &checkout),
        Arguments::Keep { names } => report::keep(&checkout, &names),
        Arguments::Readme => report::readme(&checkout),
    }
}
