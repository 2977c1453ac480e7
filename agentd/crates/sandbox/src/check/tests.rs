use super::*;
use agentd_domain::ids::AgentId;
use std::str::FromStr;

/// What the compiler of the capability crate makes of a small manifest, written out: this crate sits beside that one.
pub(crate) fn good() -> SandboxPlan {
    serde_json::from_str(include_str!("../../tests/fixtures/plan.json")).unwrap()
}

fn refused(change: impl FnOnce(&mut SandboxPlan)) -> String {
    let mut plan = good();
    change(&mut plan);
    check(&plan).expect_err("the plan was accepted").why
}

#[test]
fn the_compiler_s_plan_is_good() {
    check(&good()).unwrap();
}

#[test]
fn a_uid_outside_the_agents_range_is_refused() {
    for uid in [0, 200, 202, 999_999, 2_000_000, u32::MAX] {
        assert!(refused(|plan| plan.uid = uid).contains("`uid`"), "{uid}");
    }
}

#[test]
fn sources_outside_the_image_and_the_agent_s_own_package_are_refused() {
    for source in [
        "/state",
        "/data",
        "/data/system.redb",
        "/etc",
        "/etc/shadow",
        "/",
        "/usr",
        "/usr/lib",
        "/usr/lib/agentd",
        "/usr/share/agentd",
        "/usr/share/agentd/models",
        "/usr/share/agentd/agents",
        "/usr/share/../../state",
        "/usr/share/agentd/agents/a/../../../../../state",
        "/proc",
        "/run",
        "/dev",
        "/sys",
        "/data/agents/01900000-0000-7000-8000-000000000002/package",
        "/data/agents/01900000-0000-7000-8000-000000000001/work",
        "/data/agents/01900000-0000-7000-8000-000000000001/package/../../../system.redb",
    ] {
        let why = refused(|plan| {
            plan.mounts.push(Mount::ReadOnly {
                source: source.to_owned(),
                target: "/usr/share/x".to_owned(),
                exec: false,
                optional: false,
            });
        });
        assert!(why.contains("`mounts`"), "{source}: {why}");
    }
}

#[test]
fn another_agent_s_package_is_not_a_source() {
    let other = AgentId::from_str("01900000-0000-7000-8000-000000000002").unwrap();
    assert!(refused(|plan| plan.agent_id = other).contains("/package"));
}

#[test]
fn nothing_is_mounted_where_the_agent_can_put_links() {
    for target in [
        "/",
        "/work/x",
        "/agent/x",
        "/run",
        "/run/agentd.sock",
        "/proc/x",
        "/tmp/x",
        "/dev/x",
        "/sys",
        "/usr/../work/x",
    ] {
        let why = refused(|plan| {
            plan.mounts.push(Mount::Tmpfs { target: target.to_owned(), size_bytes: 4096 });
        });
        assert!(why.contains("`mounts`"), "{target}: {why}");
    }
    assert!(refused(|plan| plan.mounts.push(plan.mounts[0].clone())).contains("twice"));
    assert!(
        refused(|plan| plan.mounts.retain(|mount| !matches!(mount, Mount::Proc { .. }))).contains("one each")
    );
    let outwards = Mount::Symlink { target: "/etc/x".to_owned(), points_to: "../../state".to_owned() };
    assert!(refused(|plan| plan.mounts.push(outwards)).contains("link"));
}

#[test]
fn no_forbidden_call_passes_the_launcher() {
    for name in FORBIDDEN_CALLS {
        assert!(syscalls::number(name).is_some() || cfg!(not(target_arch = "x86_64")), "{name} is misspelt");
        let why = refused(|plan| plan.seccomp.allow.push((*name).to_owned()));
        assert!(why.contains("`seccomp`"), "{name}: {why}");
    }
    assert!(refused(|plan| plan.seccomp.enosys.clear()).contains("clone3"));
    assert!(refused(|plan| plan.seccomp.ioctls.push(0x5412)).contains("ioctl"));
    assert!(refused(|plan| plan.seccomp.prctls.push(22)).contains("prctl"));
    assert!(refused(|plan| plan.seccomp.socket_families.push(16)).contains("family"));
    assert!(refused(|plan| plan.seccomp.allow.push("no_such_call".to_owned())).contains("known"));
}

#[test]
fn landlock_cannot_be_weakened() {
    assert!(refused(|plan| plan.landlock.abi_min = 5).contains("ABI 5"));
    assert!(refused(|plan| plan.landlock.connect_tcp.push(22)).contains("port"));
    let rule = |path: &str, access| agentd_domain::plan::LandlockRule { path: path.to_owned(), access };
    assert!(refused(|plan| plan.landlock.rules.push(rule("/usr", FsAccess::ReadWrite))).contains("too much"));
    assert!(
        refused(|plan| plan.landlock.rules.push(rule("/work", FsAccess::ReadExecute))).contains("executable")
    );
}

#[test]
fn limits_stay_below_the_ceilings() {
    let cgroup = |change: fn(&mut CgroupLimits)| refused(|plan| change(&mut plan.cgroup));
    assert!(cgroup(|limits| limits.memory_max_bytes = u64::MAX).contains("`cgroup`"));
    assert!(cgroup(|limits| limits.memory_high_bytes = limits.memory_max_bytes + 1).contains("`cgroup`"));
    assert!(cgroup(|limits| limits.pids_max = 100_000).contains("`cgroup`"));
    assert!(cgroup(|limits| limits.cpu_quota_us = u64::MAX).contains("`cgroup`"));
    assert!(cgroup(|limits| limits.cpu_period_us = 0).contains("`cgroup`"));
    assert!(refused(|plan| plan.rlimits[0].hard = u64::MAX).contains("`rlimits`"));
    assert!(refused(|plan| plan.rlimits.clear()).contains("missing"));
    check_quota(DiskQuota { bytes: 0, inodes: 1 }).unwrap_err();
    check_quota(DiskQuota { bytes: 1 << 30, inodes: 1_000 }).unwrap();
}

#[test]
fn a_living_run_is_never_widened() {
    let plan = good().cgroup;
    let mut lower = plan.clone();
    lower.memory_high_bytes /= 2;
    lower.cpu_quota_us /= 2;
    check_within(&lower, &plan).unwrap();
    check_within(&plan, &lower).unwrap_err();
    let mut shorter_period = plan.clone();
    shorter_period.cpu_period_us /= 2;
    check_within(&shorter_period, &plan).unwrap_err();
}

#[test]
fn programs_and_variables_are_sane() {
    assert!(refused(|plan| plan.exec.clear()).contains("`exec`"));
    assert!(refused(|plan| plan.exec[0] = "agent/run".to_owned()).contains("`exec`"));
    assert!(refused(|plan| plan.workdir = "/etc".to_owned()).contains("`workdir`"));
    assert!(refused(|plan| plan.workdir = "/work/../etc".to_owned()).contains("`workdir`"));
    for name in ["LD_PRELOAD", "A=B", ""] {
        assert!(refused(|plan| plan.env.push((name.to_owned(), String::new()))).contains("`env`"), "{name}");
    }
    for set in ["", "../x", "a/b", "A", "-x", "x".repeat(33).as_str()] {
        check_engine_set(set).unwrap_err();
    }
    check_engine_set("host").unwrap();
}

fn with_network(plan: &mut SandboxPlan) {
    plan.network = NetworkPlan::Egress {
        rules: vec!["https://api.example.org:443".to_owned()],
        capture_tcp: vec![443],
        bytes_per_day: None,
    };
    plan.landlock.connect_tcp = vec![53, 443, 7070, 7071];
    plan.seccomp.datagram_families = vec![2];
    let text = "nameserver 127.0.0.1\n".to_owned();
    plan.mounts.push(Mount::Text { target: inside::RESOLV_CONF.to_owned(), text });
}

#[test]
fn a_plan_with_rules_for_the_network_opens_the_egress_s_ports_and_no_other() {
    let mut plan = good();
    with_network(&mut plan);
    check(&plan).unwrap();
    let refused = |change: fn(&mut SandboxPlan)| {
        refused(|plan| {
            with_network(plan);
            change(plan);
        })
    };
    assert!(refused(|plan| plan.network = NetworkPlan::LoopbackOnly).contains("landlock"));
    assert!(refused(|plan| plan.landlock.connect_tcp.push(8443)).contains("landlock"));
    assert!(refused(|plan| plan.seccomp.datagram_families.push(10)).contains("datagrams"));
    assert!(refused(|plan| plan.seccomp.datagram_families.push(1)).contains("datagrams"));
    for ports in [vec![0], vec![443, 443], vec![53], vec![7070], vec![7071], (1..18).collect()] {
        let why = super::check(&{
            let mut plan = good();
            with_network(&mut plan);
            plan.network =
                NetworkPlan::Egress { rules: vec!["x".to_owned()], capture_tcp: ports, bytes_per_day: None };
            plan
        });
        assert!(why.unwrap_err().why.contains("`network`"));
    }
    assert!(
        refused(|plan| plan.network =
            NetworkPlan::Egress { rules: vec![], capture_tcp: vec![443], bytes_per_day: None })
        .contains("`network`")
    );
    assert!(
        refused(|plan| {
            plan.mounts
                .push(Mount::Text { target: "/etc/ld.so.preload".to_owned(), text: "/work/x.so".to_owned() });
        })
        .contains("resolv.conf")
    );
}

#[test]
fn datagrams_are_for_plans_with_a_network_alone() {
    assert!(refused(|plan| plan.seccomp.datagram_families.push(2)).contains("datagrams"));
    assert!(refused(|plan| plan.landlock.connect_tcp.push(7071)).contains("landlock"));
}

/// What agentd itself would never ask for: nodes without a wish, without a limit that holds, or of something else.
#[test]
fn a_device_is_given_with_what_holds_it_and_with_its_own_nodes_alone() {
    use agentd_domain::enforcement::{DeviceLimit, LimitBy};
    use agentd_domain::nodes::{DevicePlan, Given, Hold, IOCTL_TYPES};
    use agentd_domain::plan::{FsAccess, LandlockRule};
    let card = ["/dev/nvidia0", "/dev/nvidiactl"].map(str::to_owned).to_vec();
    let share = |by| Hold::Share { limit: DeviceLimit { by, bytes: 1 << 30 } };
    let with = |memory_bytes, given: Option<Given>| {
        let mut plan = good();
        let nodes = given.iter().flat_map(|given| given.nodes.clone());
        let rule = |path| LandlockRule { path, access: FsAccess::Device };
        plan.landlock.rules.extend(nodes.map(rule));
        plan.device = Some(DevicePlan { memory_bytes, given });
        plan
    };
    let of = |hold, nodes: &[String]| Some(Given { device: "CUDA0".to_owned(), hold, nodes: nodes.to_vec() });
    let nvml = || share(LimitBy::Nvml { uuid: "GPU-1".to_owned() });
    let mut all = with(Some(1 << 30), of(nvml(), &card));
    all.seccomp.ioctl_types = IOCTL_TYPES.to_vec();
    check(&all).unwrap();
    check(&with(None, of(Hold::Whole, &card))).unwrap();
    for (why, bad) in [
        ("nothing chosen", with(Some(1 << 30), None)),
        (
            "a wish that the program could undo",
            with(Some(1 << 30), of(share(LimitBy::Mps { device: 0 }), &card)),
        ),
        ("less was asked for", with(Some(1 << 20), of(nvml(), &card))),
        ("a whole device in place of a share", with(Some(1 << 30), of(Hold::Whole, &card))),
        ("another node", with(None, of(Hold::Whole, &["/dev/vda".to_owned(), "/dev/nvidia0".to_owned()]))),
        ("a way around", with(None, of(Hold::Whole, &["/dev/nvidia0/../mem".to_owned()]))),
    ] {
        assert!(check(&bad).is_err(), "{why}");
    }
    let mut rule_alone = good();
    let rule = LandlockRule { path: "/dev/nvidia0".to_owned(), access: FsAccess::Device };
    rule_alone.landlock.rules.push(rule);
    assert!(check(&rule_alone).is_err(), "a rule without the wish");
    let mut requests_alone = good();
    requests_alone.seccomp.ioctl_types = vec![b'F'];
    assert!(check(&requests_alone).is_err());
    let mut terminal = all;
    terminal.seccomp.ioctl_types.push(0x54);
    assert!(check(&terminal).is_err(), "requests of terminals");
    assert!(check_hidden(&["/dev/nvidia0".to_owned(), "/dev/dri/card1".to_owned()]).is_ok());
    assert!(check_hidden(&["/dev/null".to_owned()]).is_err());
}
