//! Does this kernel have what the walls around agents are made of?
//!
//! The launcher raises the walls and refuses to start an agent when one is missing; this step is why the
//! health is red and the console says so before anybody tries.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use agentd_domain::fault::Report;
use std::path::Path;

const NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];

pub fn check(_: &mut Machine) -> Outcome {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let missing = missing(&Found {
        security_modules: &read("/sys/kernel/security/lsm"),
        controllers: &read("/sys/fs/cgroup/cgroup.controllers"),
        seccomp_actions: &read("/proc/sys/kernel/seccomp/actions_avail"),
        namespaces: &NAMESPACES.map(|name| (name, Path::new("/proc/self/ns").join(name).exists())),
    });
    if missing.is_empty() {
        return Ok(Done::Well);
    }
    Err(Report::environment(
        "walls_missing",
        "no agent is started, because not every wall around it can be raised",
        format!("this kernel runs without {}", missing.join(", ")),
        "remove `lsm=`, `cgroup_disable=` and `security=` from the kernel's command line, or start the version \
         before this one",
    ))
}

struct Found<'f> {
    security_modules: &'f str,
    controllers: &'f str,
    seccomp_actions: &'f str,
    namespaces: &'f [(&'f str, bool)],
}

fn missing(found: &Found<'_>) -> Vec<String> {
    let mut missing = Vec::new();
    if !found.security_modules.trim().split(',').any(|name| name == "landlock") {
        missing.push("Landlock".to_owned());
    }
    for controller in ["memory", "pids", "cpu"] {
        if !found.controllers.split_whitespace().any(|name| name == controller) {
            missing.push(format!("the control group controller `{controller}`"));
        }
    }
    for action in ["kill_process", "errno", "allow"] {
        if !found.seccomp_actions.split_whitespace().any(|name| name == action) {
            missing.push(format!("system-call filters (seccomp `{action}`)"));
            break;
        }
    }
    let absent = found.namespaces.iter().filter(|(_, exists)| !exists);
    missing.extend(absent.map(|(name, _)| format!("namespaces of the kind `{name}`")));
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Found<'static> = Found {
        security_modules: "lockdown,capability,landlock,yama\n",
        controllers: "cpuset cpu io memory pids\n",
        seccomp_actions: "kill_process kill_thread trap errno user_notif trace log allow\n",
        namespaces: &[("pid", true)],
    };

    #[test]
    fn a_whole_kernel_lacks_nothing() {
        assert_eq!(missing(&ALL), Vec::<String>::new());
    }

    #[test]
    fn each_missing_wall_is_named() {
        assert_eq!(missing(&Found { security_modules: "capability,yama\n", ..ALL }), ["Landlock"]);
        let without_memory = Found { controllers: "cpuset cpu io pids\n", ..ALL };
        assert_eq!(missing(&without_memory), ["the control group controller `memory`"]);
        assert_eq!(missing(&Found { seccomp_actions: "", ..ALL }).len(), 1);
        assert_eq!(
            missing(&Found { namespaces: &[("net", false)], ..ALL }),
            ["namespaces of the kind `net`"]
        );
    }
}
