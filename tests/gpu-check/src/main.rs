//! `scripts/gpu-check`: what of our promises about GPUs holds on the card of this machine?
//!
//! In:     a machine with an NVIDIA card, its driver and `nvcc`, or with a GPU that Vulkan sees and `glslc`, or with back
//!         ends that were built elsewhere; a model. A software device of Vulkan for a rehearsal: all steps' machinery, no
//!         GPU's numbers, and a report of its own that says so.
//! Out:    one line for each step as it ends, and a row of `tests/results/gpu-check.md` with all of them.
//! Steps:  each takes less than eight minutes and is kept when it is done, so that a session that is cut short goes on
//!         where it was; the most telling first.
//! Exit:   0 all steps passed or were skipped with a reason; 1 one failed; 75 time was up, run it again; 77 there is no
//!         GPU here, so that nothing was measured and nothing was written.
//! Also:   `--compile` builds the CUDA back end for an architecture on a machine without a card, for `--cuda` elsewhere.
//! Never:  a number that was not measured here, a setting of the card, a GPU that somebody else computes on.
#![forbid(unsafe_code)]

mod build;
mod card;
mod engine;
mod progress;
mod steps;
mod toolkit;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use engine::Engine;
use progress::{Outcome, Progress};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

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
    #[arg(long, value_enum, default_value_t = Backend::Cuda)]
    backend: Backend,
    /// The back end, if it is built already (libggml-cuda.so or libggml-vulkan.so of the same llama.cpp).
    #[arg(long, value_name = "FILE")]
    given: Option<PathBuf>,
    /// Take a software device of Vulkan: nothing that is measured is a GPU's.
    #[arg(long)]
    rehearse: bool,
    /// Compile the CUDA back end for this architecture (90), and end.
    #[arg(long, value_name = "ARCHITECTURE")]
    compile: Option<String>,
    /// Do all steps again.
    #[arg(long)]
    again: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Backend {
    Cuda,
    Vulkan,
}

impl Backend {
    fn file(self) -> &'static str {
        match self {
            Self::Cuda => "libggml-cuda.so",
            Self::Vulkan => "libggml-vulkan.so",
        }
    }

    /// Of llama.cpp's names of its devices.
    fn prefix(self) -> &'static str {
        match self {
            Self::Cuda => "CUDA",
            Self::Vulkan => "Vulkan",
        }
    }
}

/// Of a step, with its engines' starts and ends.
const STEP_LIMIT: Duration = Duration::from_secs(450);

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
    if let Some(architecture) = &arguments.compile {
        return match build::compile_cuda(arguments, architecture)? {
            Ok(built) => {
                println!("compiled: {}", built.display());
                Ok(0)
            }
            Err(not) => Ok(unbuilt(arguments, not)),
        };
    }
    // NVIDIA's card says what is to be compiled; Vulkan's back end says which card there is.
    let nvidia = match arguments.backend {
        Backend::Cuda => match card::find() {
            Ok(card) => Some(card),
            Err(why) => return Ok(no_gpu(&why)),
        },
        Backend::Vulkan => None,
    };
    let compute = nvidia.as_ref().map(|card| card.compute.clone()).unwrap_or_default();
    let backends = match build::backends(arguments, &compute)? {
        build::Built::Ready(backends) => backends,
        not => return Ok(unbuilt(arguments, not)),
    };
    let card = match nvidia {
        Some(card) => card,
        None => {
            let engine = Engine::start(&arguments.engine, &backends, Instant::now() + STEP_LIMIT)?;
            match card::of_vulkan(&engine.devices, arguments.rehearse) {
                Ok(card) => card,
                Err(why) => return Ok(no_gpu(&why)),
            }
        }
    };
    println!("card: {card}");
    let commit = progress::commit(&arguments.source)?;
    let mut progress = Progress::open(&arguments.cache, &commit, &card, &arguments.model, arguments.again)?;
    let sizes = if card.software { steps::REHEARSED } else { steps::REAL };
    let (engine, model) = (arguments.engine.clone(), arguments.model.clone());
    let mut scene = steps::Scene { card, engine, backends, model, sizes, until: Instant::now() };
    for step in steps::ALL {
        if let Some(done) = progress.of(step.name) {
            println!("{}: {done} (kept)", step.name);
            continue;
        }
        let begun = Instant::now();
        scene.until = begun + STEP_LIMIT;
        let outcome = (step.run)(&scene).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        println!("{}: {outcome} ({} s)", step.name, begun.elapsed().as_secs());
        progress.keep(step.name, outcome, begun.elapsed()).context("keeping what was done")?;
    }
    let report = progress.report(&arguments.source)?;
    println!("written: {}", report.display());
    Ok(u8::from(progress.failed()))
}

fn no_gpu(why: &str) -> u8 {
    println!("no GPU here: {why}");
    println!("skipped: {}", steps::ALL.map(|step| step.name).join(", "));
    println!("nothing was measured, and no report was written");
    NO_GPU
}

fn unbuilt(arguments: &Arguments, not: build::Built) -> u8 {
    let name = arguments.backend.file();
    match not {
        build::Built::Cannot(why) => {
            println!("no {name}: {why}");
            println!("skipped: {}", steps::ALL.map(|step| step.name).join(", "));
            NO_GPU
        }
        build::Built::NotYet | build::Built::Ready(_) => {
            println!("{name} is not built yet; run this again, it goes on where it was");
            AGAIN
        }
    }
}
