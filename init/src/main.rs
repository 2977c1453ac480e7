//! PID 1 of the appliance.
//!
//! Question: what has to be true before agents may run, and who keeps it true?
//! Owns:   mounts, sysctls, the cgroup tree, the disk's partitions, the clock's floor, the watchdogs, the four
//!         children (netd, agent-launcher, agentd, console-tty), the control socket, the end of the machine.
//! Reads:  top to bottom: [`boot::STEPS`] is the boot, [`machine::Machine::pump`] is the life after it,
//!         [`shutdown`] is the end.
//! Always: one thread, no unsafe, no panic in our own code (see the lints); what a library could panic on
//!         (the partition table) happens in a child process. Should it panic after all, [`last_words`]
//!         records why and restarts the machine in order.
//! Never:  network, HTTP, names, agents. Those belong to netd, agentd and the launcher.
//!
//! `init disk-setup <job>` is that child: see [`disk::table`]. `init load-drivers <names>` is one whose work may never end:
//! see [`steps::drivers`].
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)
)]

mod boot;
mod buttons;
mod children;
mod control;
mod disk;
mod last_words;
mod log;
mod machine;
mod output;
mod plan;
mod shutdown;
mod status;
mod steps;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("disk-setup") => disk::table::main(arguments.next()),
        Some("load-drivers") => steps::drivers::main(arguments.next()),
        _ if std::process::id() == 1 => {
            let mut machine = machine::Machine::start();
            boot::run(&mut machine);
            shutdown::finish(machine.run_until_end())
        }
        _ => {
            eprintln!("init is the first process of the appliance; there is nothing to do for it here");
            ExitCode::from(2)
        }
    }
}
