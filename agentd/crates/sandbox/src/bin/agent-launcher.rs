//! `agent-launcher`: the one program of the appliance that has root's powers while agents run. Started by init.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

use agentd_sandbox::launcher::{Options, serve};
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("agent-launcher: {why}");
            return ExitCode::from(2);
        }
    };
    if !options.without.is_empty() {
        eprintln!(
            "agent-launcher: NOT FOR AN APPLIANCE: limits are missing by --testing-without: {:?}",
            options.without
        );
    }
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent-launcher: {error}");
            ExitCode::from(3)
        }
    }
}
