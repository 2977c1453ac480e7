//! The escape suite's program: an attacker, the agent beside it, and what watches the host.
//!
//! In:     its arguments. `attack victim=<agent_id> outside=<port> [lower=<walls>] [only=<id>,...]`, `neighbour`,
//!         `bystander`, and what they start themselves (`decoy`, `hold`).
//! Out:    lines on standard output. An attacker's `try <id>: ...` is its own word and never counted as proof that a
//!         wall held; `harm <id>` comes from whoever was attacked, `secret <name> <text>` says what nobody else can
//!         know, so that an attacker that prints it has read it.
//! Always: each attempt runs in a process of its own, which is named `x-<id>` and lives on after a success, so that
//!         what it holds can be seen from outside.
//! Never:  harm that outlives a test's machine, or that keeps the others from being tried: bombs stop at some
//!         multiple of the agent's limits.
#![deny(unsafe_code)]

mod bystander;
mod files;
mod kernel;
mod neighbour;
mod network;
mod processes;
mod resources;
mod scene;
mod sys;

use scene::Scene;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let word = |at: usize| words.get(at).map_or("", String::as_str);
    match word(1) {
        "attack" => scene::attack(&Scene::from_arguments(&words)),
        "neighbour" => neighbour::run(),
        "bystander" => bystander::run(),
        "decoy" => neighbour::decoy(word(2)),
        // What an attempt becomes by exec.
        "hold" => scene::hold(word(2)),
        other => {
            eprintln!("unknown part: {other:?}");
            ExitCode::from(64)
        }
    }
}
