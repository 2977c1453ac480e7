//! `scripts/gpu-check`: what of our promises about GPUs holds on the card of this machine?
//!
//! In:     a machine with an NVIDIA card, its driver and `nvcc`, or with back ends that were built elsewhere; a model.
//! Out:    one line for each step as it ends, and a row of `tests/results/gpu-check.md` with all of them.
//! Steps:  each takes less than eight minutes and is kept when it is done, so that a session that is cut short goes on
//!         where it was; the most telling first.
//! Exit:   0 all steps passed or were skipped with a reason; 1 one failed; 75 time was up, run it again; 77 there is no
//!         GPU here, so that nothing was measured and nothing was written.
//! Never:  a number that was not measured here, a setting of the card, a GPU that somebody else computes on.
#![forbid(unsafe_code)]

mod build;
mod card;
mod engine;
mod progress;
mod steps;

use anyhow::{Context, Result};
use clap::Parser;
use progress::{Outcome, Progress};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

const AGAIN: u8 = 75;
const NO_GPU: u8 = 77;

/// Checks promises about GPUs on this machine's card, step by step.
#[derive(Debug, Parser)]
struct Arguments {
    /// The repository.
    #[arg(long, value_name = "DIR")]
    source: PathBuf,
    /// Where what is built and what is done is kept.
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// The engine's program, with its libraries and `backends` beside it.
    #[arg(long, value_name = "FILE")]
    engine: PathBuf,
    /// A chat model (GGUF). Larger ones tell more.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// A CUDA back end that is built already (libggml-cuda.so of the same llama.cpp).
    #[arg(long, value_name = "FILE")]
    cuda: Option<PathBuf>,
    /// Do all steps again.
    #[arg(long)]
    again: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("gpu-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8> {
    let card = match card::find() {
        Ok(card) => card,
        Err(why) => {
            println!("no GPU here: {why}");
            println!("skipped: {}", steps::ALL.map(|step| step.name).join(", "));
            println!("nothing was measured, and no report was written");
            return Ok(NO_GPU);
        }
    };
    println!("card: {card}");
    let commit = progress::commit(&arguments.source)?;
    let mut progress = Progress::open(&arguments.cache, &commit, &card, &arguments.model, arguments.again)?;
    let backends = match build::backends(arguments, &card)? {
        build::Built::Ready(backends) => backends,
        build::Built::NotYet => {
            println!("the CUDA back end is not built yet; run this again, it goes on where it was");
            return Ok(AGAIN);
        }
        build::Built::Cannot(why) => {
            println!("no CUDA back end: {why}");
            println!("skipped: {}", steps::ALL.map(|step| step.name).join(", "));
            return Ok(NO_GPU);
        }
    };
    let scene =
        steps::Scene { card, engine: arguments.engine.clone(), backends, model: arguments.model.clone() };
    for step in steps::ALL {
        if let Some(done) = progress.of(step.name) {
            println!("{}: {done} (kept)", step.name);
            continue;
        }
        let begun = Instant::now();
        let outcome = (step.run)(&scene).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        println!("{}: {outcome} ({} s)", step.name, begun.elapsed().as_secs());
        progress.keep(step.name, outcome, begun.elapsed()).context("keeping what was done")?;
    }
    let report = progress.report(&arguments.source)?;
    println!("written: {}", report.display());
    Ok(u8::from(progress.failed()))
}
