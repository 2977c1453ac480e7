//! What may a tool call do in the run that asked for it?
//!
//! In:     the plan of a living run, and a [`CallSpec`]. Out: the plan of the call.
//! Always: the call's plan is the run's own with something taken away. There is nothing to compare afterwards: what a
//!         [`CallSpec`] cannot say, it cannot widen. Limits are the one thing that is said as values, and are checked.
//! Why:    a tool that eats memory or forks without end takes its own group down, and the agent hears of it.
//!         The idea of a group per call is AgentCgroup's (<https://arxiv.org/abs/2602.09345>).

use crate::check;
use agentd_domain::fault::Report;
use agentd_domain::launcher::{CallLimits, CallSpec, SocketAccess, WorkAccess};
use agentd_domain::nodes;
use agentd_domain::paths::inside;
use agentd_domain::plan::{CgroupLimits, FsAccess, SandboxPlan};
use std::collections::BTreeMap;

pub fn narrowed(run: &SandboxPlan, call: &CallSpec) -> Result<SandboxPlan, Report> {
    let mut plan = run.clone();
    plan.exec.clone_from(&call.exec);
    plan.workdir.clone_from(&call.workdir);
    let variables: BTreeMap<_, _> = run.env.iter().chain(&call.env).cloned().collect();
    plan.env = variables.into_iter().collect();
    limit(&mut plan.cgroup, call.limits);
    if call.work == WorkAccess::Read {
        for rule in plan.landlock.rules.iter_mut().filter(|rule| check::is_beneath(&rule.path, inside::WORK))
        {
            rule.access = FsAccess::Read;
        }
    }
    if call.sockets == SocketAccess::None {
        plan.landlock.connect_tcp.clear();
        plan.seccomp.socket_families.clear();
        plan.seccomp.datagram_families.clear();
        plan.seccomp.allow.retain(|name| name != "socket");
    }
    // A device is the run's own program's: its share is counted for the run's processes in `main`.
    plan.device = None;
    plan.landlock.rules.retain(|rule| rule.access != FsAccess::Device);
    plan.seccomp.ioctl_types.clear();
    plan.seccomp.ioctls.retain(|number| !nodes::IOCTLS.contains(number));
    check::check_within(&plan.cgroup, &run.cgroup)?;
    check::check(&plan)?;
    Ok(plan)
}

fn limit(cgroup: &mut CgroupLimits, limits: CallLimits) {
    if let Some(most) = limits.memory_max_bytes {
        cgroup.memory_max_bytes = most;
        cgroup.memory_high_bytes = cgroup.memory_high_bytes.min(most);
    }
    if let Some(most) = limits.pids_max {
        cgroup.pids_max = most;
    }
    if let Some(percent) = limits.cpu_percent {
        cgroup.cpu_quota_us = cgroup.cpu_period_us.saturating_mul(u64::from(percent)) / 100;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::plan::LandlockRule;

    fn run() -> SandboxPlan {
        serde_json::from_str(include_str!("../tests/fixtures/plan.json")).unwrap()
    }

    fn call() -> CallSpec {
        CallSpec {
            exec: vec!["/agent/bin/tool".to_owned(), "now".to_owned()],
            workdir: "/work/here".to_owned(),
            env: Vec::new(),
            limits: CallLimits::default(),
            work: WorkAccess::ReadWrite,
            sockets: SocketAccess::AsRun,
        }
    }

    #[test]
    fn a_call_that_gives_up_nothing_has_its_run_s_plan_with_another_program() {
        let run = run();
        let plan = narrowed(&run, &call()).unwrap();
        let expected = SandboxPlan {
            exec: vec!["/agent/bin/tool".to_owned(), "now".to_owned()],
            workdir: "/work/here".to_owned(),
            ..run
        };
        assert_eq!(plan, expected);
    }

    #[test]
    fn what_a_call_gives_up_is_gone_and_nothing_else() {
        let run = run();
        let spec = CallSpec { work: WorkAccess::Read, sockets: SocketAccess::None, ..call() };
        let plan = narrowed(&run, &spec).unwrap();
        let work = |plan: &SandboxPlan| -> Vec<LandlockRule> {
            plan.landlock.rules.iter().filter(|rule| rule.path.starts_with("/work")).cloned().collect()
        };
        assert_eq!(work(&run)[0].access, FsAccess::ReadWrite);
        assert_eq!(work(&plan), [LandlockRule { path: "/work".to_owned(), access: FsAccess::Read }]);
        assert!(plan.landlock.connect_tcp.is_empty() && plan.seccomp.socket_families.is_empty());
        let lost: Vec<_> =
            run.seccomp.allow.iter().filter(|name| !plan.seccomp.allow.contains(name)).cloned().collect();
        assert_eq!(lost, ["socket"]);
        assert_eq!((&plan.mounts, plan.uid, &plan.rlimits), (&run.mounts, run.uid, &run.rlimits));
        let limits = CallLimits { memory_max_bytes: Some(8 << 20), pids_max: Some(4), cpu_percent: Some(1) };
        let plan = narrowed(&run, &CallSpec { limits, ..call() }).unwrap();
        let expected = CgroupLimits {
            memory_high_bytes: 8 << 20,
            memory_max_bytes: 8 << 20,
            pids_max: 4,
            cpu_quota_us: run.cgroup.cpu_period_us / 100,
            ..run.cgroup
        };
        assert_eq!(plan.cgroup, expected);
    }

    #[test]
    fn a_call_has_no_device() {
        use agentd_domain::nodes::{DevicePlan, Given, Hold};
        let mut run = run();
        let nodes = vec!["/dev/nvidia0".to_owned()];
        let given = Given { device: "CUDA0".to_owned(), hold: Hold::Whole, nodes };
        run.device = Some(DevicePlan { memory_bytes: None, given: Some(given) });
        run.landlock.rules.retain(|rule| rule.path != "/dev");
        run.landlock.rules.push(LandlockRule { path: "/dev/nvidia0".to_owned(), access: FsAccess::Device });
        run.seccomp.ioctl_types = nodes::IOCTL_TYPES.to_vec();
        let plan = narrowed(&run, &call()).unwrap();
        assert_eq!((plan.device, plan.seccomp.ioctl_types), (None, Vec::new()));
        assert!(!plan.landlock.rules.iter().any(|rule| rule.path.starts_with("/dev")));
    }

    #[test]
    fn a_call_s_variables_are_added_and_are_checked_like_a_plan_s() {
        let run = run();
        let with = |name: &str, value: &str| {
            let spec = CallSpec { env: vec![(name.to_owned(), value.to_owned())], ..call() };
            narrowed(&run, &spec)
        };
        let plan = with("HOME", "/tmp").unwrap();
        assert_eq!(plan.env.len(), run.env.len());
        assert!(plan.env.contains(&("HOME".to_owned(), "/tmp".to_owned())));
        for name in ["LD_PRELOAD", "", "A B"] {
            assert!(with(name, "x").is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_wider_or_leads_elsewhere_is_refused() {
        let run = run();
        let limited = |limits| CallSpec { limits, ..call() };
        let more_memory = limited(CallLimits {
            memory_max_bytes: Some(run.cgroup.memory_max_bytes + 1),
            ..CallLimits::default()
        });
        let more_processes =
            limited(CallLimits { pids_max: Some(run.cgroup.pids_max + 1), ..CallLimits::default() });
        let more_cpu = limited(CallLimits { cpu_percent: Some(6_400), ..CallLimits::default() });
        let elsewhere = CallSpec { workdir: "/etc".to_owned(), ..call() };
        let nothing = CallSpec { exec: Vec::new(), ..call() };
        let relative = CallSpec { exec: vec!["tool".to_owned()], ..call() };
        for spec in [more_memory, more_processes, more_cpu, elsewhere, nothing, relative] {
            assert!(narrowed(&run, &spec).is_err(), "{spec:?}");
        }
    }
}
