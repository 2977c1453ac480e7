//! How does a tool call get into the jail of a run that has already closed?
//!
//! In:     the call's plan and the doors of the run: descriptors of its namespaces, which pid 1 of the run has kept.
//! Always: this process enters while it is root and before it has touched anything of the agent's; the program's
//!         own process is born inside the run's pid namespace and takes the same steps as the agent itself
//!         ([`super::child`]), with the same self-probe. What stays outside is confined like pid 1 of a run.
//! Ends:   with its program, with the launcher, and with the run: the pid namespace's end kills everything in it.
//! Source: setns(2): a pid namespace is entered by the children of whoever calls it.

use super::parent::{Launched, launch};
use super::spec::FromJail;
use super::{Failure, step};
use crate::wire;
use agentd_domain::plan::{Mount, SandboxPlan};
use std::os::fd::{AsFd, OwnedFd};

/// The namespaces of a run, in the order in which they are entered. Files of these names lie in `/proc/self/ns`.
pub(super) const DOORS: [&str; 6] = ["uts", "ipc", "net", "cgroup", "pid", "mnt"];

pub(super) fn enter(control: &OwnedFd, plan: &SandboxPlan, doors: Vec<OwnedFd>) -> Result<Launched, Failure> {
    let doors: [OwnedFd; DOORS.len()] =
        step("call: namespaces", wire::exactly(doors).map_err(|error| error.to_string()))?;
    for (name, door) in DOORS.iter().zip(&doors) {
        let entered = rustix::thread::move_into_link_name_space(door.as_fd(), None);
        step(&format!("call: {name} namespace"), entered)?;
    }
    drop(doors);
    // The mount namespace's root has become ours; the folder we stood in has not.
    step("call: root", std::env::set_current_dir("/"))?;
    let mut launched = launch(plan, &absent(plan), || Ok(()))?;
    let stdin = step("call: standard input", launched.stdin.take().ok_or("it is closed"))?;
    let fds = [stdin.as_fd(), launched.stdout.as_fd(), launched.stderr.as_fd()];
    step("tell the launcher", wire::send(control.as_fd(), &FromJail::Up, &fds))?;
    Ok(launched)
}

/// Optional mounts that the run has done without. Its root is read-only, so their places are as they were made.
fn absent(plan: &SandboxPlan) -> Vec<String> {
    let optional = plan.mounts.iter().filter_map(|mount| match mount {
        Mount::ReadOnly { target, optional: true, .. } => Some(target),
        _ => None,
    });
    optional.filter(|target| std::fs::symlink_metadata(target).is_err()).cloned().collect()
}
