//! `agentctl`: how is an appliance steered from a terminal?
//!
//! In:     a command line. Out: text for people or, with `--json`, what the appliance's API answered.
//! Always: an error says what, why and how to fix it, and ends with its class's exit code (2 the caller's, 3 the
//!         environment's, 70 ours). A server that does not hold the pinned authority's key gets no secret.
//! Threads: one; the runtime is tokio's single-threaded one.
#![forbid(unsafe_code)]

mod ask;
mod cli;
mod client;
mod commands;
mod config;
mod package;
mod pin;
mod show;

use agentd_domain::fault::Report;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let json = cli.json;
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(commands::Failed(reports)) => {
            for report in &reports {
                show::report(report, json);
            }
            // The first is the cause; what follows from it has the same class or a milder one.
            ExitCode::from(reports.first().map_or(70, Report::exit_code))
        }
    }
}
