//! `scripts/bench`: measures and prints; keeps results and has README say them.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::Parser;
use image::source::Checkout;
use std::path::PathBuf;
use tests_bench::{bombs, boot, idle, memory, plan, report, rights, serve, size, spawn};
use tests_models::Layout;

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
    /// Many agents on one model, beside llama-server (building it takes some minutes; needs root)
    Serve {
        /// 0 is parity, 1 to 9 are the workloads, 18 is the idle engine; may be given several times. All without it
        #[arg(long, value_name = "N")]
        workload: Vec<u8>,
        /// A small model and short prompts
        #[arg(long)]
        quick: bool,
        /// Q8_0 instead of Q4_K_M
        #[arg(long)]
        q8: bool,
        /// Runs of each, in turn
        #[arg(long, default_value_t = 5)]
        pairs: usize,
        /// With ggml compiled for this machine alone, instead of the variant that agentd chooses
        #[arg(long)]
        native: bool,
    },
    /// What a model takes, beside what was planned for it
    Plan,
    /// What recall finds on LoCoMo, and what each of its signals costs and brings
    Memory {
        /// LoCoMo's `data/locomo10.json`, which its licence keeps out of this repository
        #[arg(long, value_name = "FILE")]
        locomo: PathBuf,
        /// Fits the weights of `rank/weights.rs` anew, prints them, and measures nothing else
        #[arg(long)]
        fit: bool,
    },
    /// How long recall takes with 10,000 to a million records, and whether it is exact
    MemoryScale {
        /// Records of one agent; may be given several times. 10,000, 100,000 and a million without it
        #[arg(long, value_name = "N")]
        records: Vec<usize>,
        /// Agents that a million records are shared out to; 0 leaves that out
        #[arg(long, default_value_t = 1000)]
        agents: usize,
    },
    /// What remembering costs: time to be on disk, import, disk and memory for each record, embedding
    MemoryDisk {
        /// Of the large store
        #[arg(long, default_value_t = 100_000)]
        records: usize,
        /// Without the embedder (it needs the appliance's engine)
        #[arg(long)]
        no_embedder: bool,
    },
    /// Finding an agent's nearest vectors and writing one more, beside usearch, sqlite-vec, lancedb and chromadb
    MemoryPeers {
        #[arg(long, default_value_t = 20_000)]
        records: usize,
        /// Whose the records are, in equal parts
        #[arg(long, default_value_t = 20)]
        agents: usize,
    },
    /// Copies results of earlier runs to tests/results/bench and writes README's table
    Keep {
        /// boot, size, rights, spawn, idle, bombs, plan, memory, memory-scale, memory-disk, memory-peers, serve-0 to
        /// serve-9, serve-18
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
        Arguments::Serve { workload, quick, q8, pairs, native } => {
            let layout = if q8 { Layout::Q8_0 } else { Layout::Q4KM };
            let options = serve::Options { workloads: workload, quick, layout, pairs: pairs.max(1), native };
            serve::measure(options)?.iter().try_for_each(|bench| report::publish(bench, &checkout))
        }
        Arguments::Memory { locomo, fit } => match memory::measure(&memory::Options { locomo, fit })? {
            Some(bench) => report::publish(&bench, &checkout),
            None => Ok(()),
        },
        Arguments::MemoryScale { records, agents } => {
            let records = if records.is_empty() { vec![10_000, 100_000, 1_000_000] } else { records };
            report::publish(&memory::scale::measure(&memory::scale::Sizes { records, agents })?, &checkout)
        }
        Arguments::MemoryDisk { records, no_embedder } => {
            let options = memory::disk::Options { records, embedder: !no_embedder };
            report::publish(&memory::disk::measure(&options)?, &checkout)
        }
        Arguments::MemoryPeers { records, agents } => {
            let options = memory::peers::Options { records, agents: agents.max(1) };
            report::publish(&memory::peers::measure(&options)?, &checkout)
        }
        Arguments::Plan => report::publish(&plan::measure()?, &checkout),
        Arguments::Keep { names } => report::keep(&checkout, &names),
        Arguments::Readme => report::readme(&checkout),
    }
}
