//! How does the machine end, so that nothing is lost?
//!
//! When the plan says that nobody is left: write everything, unmount in the reverse order of mounting, make
//! read-only what does not let go, say so on every console, and ask the kernel to power off or restart.

use crate::log::{self, Level};
use crate::machine::Machine;
use crate::plan::Goal;
use init_sys::{mounts, signals};
use rustix::system::RebootCommand;
use std::path::Path;
use std::process::ExitCode;

/// A mount can hang on another; each round may free the next one.
const ROUNDS: u32 = 4;
/// Kernel file systems hold nothing that could be lost.
const WITHOUT_DISK: [&str; 12] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "tmpfs",
    "cgroup2",
    "pstore",
    "securityfs",
    "efivarfs",
    "rootfs",
    "ramfs",
    "mqueue",
];

pub fn is_alone() -> bool {
    signals::no_child_is_left()
}

/// Never comes back unless the kernel refuses.
pub fn finish((mut machine, goal): (Machine, Goal)) -> ExitCode {
    crate::steps::clock::keep_confirmed(&mut machine);
    rustix::fs::sync();
    let left = unmount_all();
    for (target, why) in &left {
        machine.log.warn(&format!("{target} stays mounted: {why}"));
    }
    rustix::fs::sync();
    let (command, words) = match goal {
        Goal::PowerOff => (RebootCommand::PowerOff, "power off"),
        Goal::Restart => (RebootCommand::Restart, "restart"),
    };
    let unmounted = if left.is_empty() { "everything is unmounted" } else { "not everything is unmounted" };
    log::write_once(Level::Alarm, &format!("agentd-os: reached {words} ({unmounted})"));
    // With the watchdogs open and running: if the firmware hangs in the end, they restart it.
    let refused = rustix::system::reboot(command);
    log::write_once(Level::Alarm, &format!("init: the kernel refused to {words}: {refused:?}"));
    // PID 1 must not end before the machine does; the watchdogs are not fed any more.
    loop {
        std::thread::park();
    }
}

/// What could not be unmounted, and why.
fn unmount_all() -> Vec<(String, String)> {
    let mut left = Vec::new();
    for _ in 0..ROUNDS {
        left.clear();
        let mut mounted = mounts::mounted().unwrap_or_default();
        mounted
            .retain(|mount| mount.target != Path::new("/") && !WITHOUT_DISK.contains(&mount.kind.as_str()));
        if mounted.is_empty() {
            break;
        }
        for mount in mounted.iter().rev() {
            if let Err(error) = mounts::unmount(&mount.target) {
                // Read-only at least, so that its journal is empty.
                let _ = mounts::remount_read_only(&mount.target);
                left.push((mount.target.display().to_string(), error.to_string()));
            }
        }
    }
    left
}
