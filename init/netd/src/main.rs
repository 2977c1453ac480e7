//! netd: addresses and time, for a machine that nobody logs in to.
//!
//! What does it do?  Brings up every wired interface, asks DHCPv4 where a carrier is, or sets the owner's
//!        static addresses; leaves IPv6 to the kernel's autoconfiguration; writes name servers; sets the
//!        clock by SNTP. It never exits for lack of a network.
//! In:    `domain::netd::Settings` as a JSON file (`--settings`), read again at SIGHUP.
//! Out:   `status.json` and `resolv.conf` in `--run-dir`, replaced by rename; the kernel's addresses and routes.
//! Never: anything on the network besides DHCP, what IPv6 autoconfiguration needs, SNTP, and the DNS question
//!        for the time server's name. No connectivity check, no mDNS, no LLMNR. The capture test of the
//!        uplink in tests/qemu holds us to it.
//! Rights: uid 201 and the ambient capabilities of `domain::netd::CAPABILITIES`, given by init.
//! Threads: one tokio runtime on one thread; the SNTP question waits on a blocking thread, because the
//!        system's resolver does.
#![forbid(unsafe_code)]

mod clock;
mod error;
mod files;
mod kernel;
mod lease;
mod plan;
mod rdnss;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: netd [--settings FILE] [--run-dir FOLDER]";

fn main() -> ExitCode {
    let (mut settings, mut run_dir) =
        (PathBuf::from(agentd_domain::netd::SETTINGS), PathBuf::from("/run/netd"));
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.to_str(), arguments.next()) {
            (Some("--settings"), Some(file)) => settings = file.into(),
            (Some("--run-dir"), Some(folder)) => run_dir = folder.into(),
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    tracing_subscriber::fmt().json().with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(why) => {
            tracing::error!(error = %why, "no runtime");
            return ExitCode::from(70);
        }
    };
    let outcome = runtime.block_on(run::run(settings, run_dir));
    // A name server that does not answer may hold the blocking thread for a minute; nobody waits for it.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!(error = %why, "netd cannot work");
            ExitCode::from(3)
        }
    }
}
