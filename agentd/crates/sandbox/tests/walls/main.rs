//! Do the walls hold for real processes, judged from outside?
//!
//! Runs the real `agent-launcher` and `agent-jail` on this machine, as root, in folders and cgroups of their own. This
//! same program is also the agent inside (`--agent <what>`): see [`agent`]. An attempt is judged by its effect on a
//! victim, and each has a control: outside a jail it succeeds.
//!
//! What this machine lacks (root, Landlock, a cgroup controller that v1 holds, loop devices) makes tests skip; each skip
//! is printed with its reason and counted. In the appliance's kernel nothing is skipped.

mod agent;
mod calls;
mod cases;
mod devices;
mod engines;
mod scene;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// What a test came to.
pub(crate) enum Outcome {
    Passed,
    Skipped(String),
}

pub(crate) type Case = (&'static str, fn() -> Outcome);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if words.get(1).is_some_and(|word| word == "--agent") {
        return ExitCode::from(agent::run(&words[2..]));
    }
    if words.get(1).is_some_and(|word| word == "--listen-fd") {
        return agent::engine();
    }
    if words.get(1).is_some_and(|word| word == "limit") {
        return agent::limiter(&words[2..]);
    }
    if words.iter().any(|word| word == "--list") {
        cases::ALL.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = words[1..].iter().filter(|word| !word.starts_with('-')).collect();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, case) in cases::ALL
        .iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(*filter)))
    {
        match catch_unwind(AssertUnwindSafe(case)) {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("test {name} ... ok");
            }
            Ok(Outcome::Skipped(reason)) => {
                skipped += 1;
                println!("test {name} ... SKIP: {reason}");
            }
            Err(_) => {
                failed += 1;
                println!("test {name} ... FAILED");
            }
        }
    }
    println!("\ntest result: {passed} passed; {failed} failed; {skipped} skipped");
    ExitCode::from(u8::from(failed > 0))
}
