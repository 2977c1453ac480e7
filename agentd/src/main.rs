//! agentd: decides, keeps and serves; holds no privilege.
//!
//! Owns:  the wiring of everything below `agentd/`, the agents' lifecycle, the agents' API, the stores.
//! In:    HTTPS from people, HTTP from agents' jails, frames from the engine, answers of launcher and init.
//! Never: root, a capability, a program started (`confine`); a connection to the network that no agent's rule allows
//!        (`egress`).
//!
//! Two runtimes: the control plane serves people and supervises; the data plane carries agents' requests and
//! tokens. So a flood of tokens does not delay a stop.
//!
//! ```text
//! agentd [--root DIR] [--port N] [--unconfined]
//! ```
//! `--root` puts all files and sockets below a folder, for tests; `--unconfined` leaves agentd's own walls down, for
//! kernels of developers' machines that lack them, and is shown as a problem.
#![forbid(unsafe_code)]

mod agent_api;
mod agents;
mod appliance;
mod audit;
mod bundled;
mod children;
mod clock;
mod confine;
mod egress;
mod engine;
mod gpu;
mod health;
mod inbox;
mod initlink;
mod install;
mod launcher;
mod logs;
mod memory;
mod models;
mod options;
mod places;
mod readings;
mod seed_file;
#[cfg(test)]
mod snapshots;
mod state_files;
mod store;
mod tokens;
mod wiring;

use options::Options;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("agentd: {why}\nusage: {}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    // init carries standard error to the kernel's log: one JSON object per line.
    let filter = EnvFilter::try_from_env("AGENTD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(std::io::stderr).init();
    match wiring::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(report) => {
            tracing::error!(problem = %report, "agentd ends");
            ExitCode::from(report.exit_code())
        }
    }
}
