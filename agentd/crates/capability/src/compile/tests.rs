use super::*;
use crate::parse_manifest;
use agentd_domain::manifest::{Limits, Restart};
use agentd_domain::plan::ceiling;
use proptest::prelude::*;
use std::path::Path;
use uuid::Uuid;

fn subject(package: Package) -> Subject {
    Subject {
        agent_id: AgentId(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001)),
        uid: 1_000_007,
        package,
    }
}

/// The whole plan as a file, so that a change of the policy is a change that a reviewer reads. To renew a file on
/// purpose: `AGENTD_RENEW_SNAPSHOTS=1 cargo test -p agentd-capability`.
fn assert_snapshot(name: &str, plan: &SandboxPlan) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots").join(name);
    let text = serde_json::to_string_pretty(plan).unwrap() + "\n";
    if std::env::var_os("AGENTD_RENEW_SNAPSHOTS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap();
    assert!(text == expected, "the plan is not that of {}:\n{text}", file.display());
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_smallest_manifest_gives_the_default_deny_plan() {
    let manifest = parse_manifest("[agent]\nname = \"hello\"\nexec = [\"/agent/run\"]\n").unwrap();
    assert_snapshot("smallest.json", &compile(&manifest, &subject(Package::Installed)));
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_manifest_with_every_section_gives_exactly_what_it_asks_for() {
    let manifest = parse_manifest(
        r#"
        [agent]
        name = "triage"
        version = "1.4.0"
        exec = ["/usr/bin/python3", "-I", "/agent/main.py"]
        workdir = "mail"
        [model]
        use = "default"
        [limits]
        memory_high = "96M"
        memory_max = "128M"
        cpu = "150%"
        pids = 32
        open_files = 128
        tmp = "8M"
        io = "20M/s"
        [fs]
        read = ["/usr/bin", "/usr/lib/python3", "/usr/share/dict"]
        [memory]
        working = "rw"
        spirit = "r"
        [messages]
        accept = true
        "#,
    )
    .unwrap();
    assert_snapshot(
        "full.json",
        &compile(&manifest, &subject(Package::Builtin { folder: "triage".to_owned() })),
    );
}

#[test]
fn dangerous_calls_are_in_no_group() {
    let manifest = parse_manifest("[agent]\nname = \"hello\"\nexec = [\"/agent/run\"]\n").unwrap();
    let seccomp = seccomp(&asked(&manifest), &NetworkPlan::LoopbackOnly);
    for call in [
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "ptrace",
        "bpf",
        "keyctl",
        "add_key",
        "request_key",
        "unshare",
        "setns",
        "pidfd_open",
        "pidfd_getfd",
        "perf_event_open",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "userfaultfd",
        "process_vm_readv",
        "process_vm_writev",
        "process_madvise",
        "kcmp",
        "kexec_load",
        "init_module",
        "finit_module",
        "open_by_handle_at",
        "name_to_handle_at",
        "memfd_secret",
        "memfd_create",
        "execveat",
        "seccomp",
        "setuid",
        "setresuid",
        "setgroups",
        "capset",
        "chown",
        "fchownat",
        "setxattr",
        "mknod",
        "mknodat",
        "fsopen",
        "fsmount",
        "open_tree",
        "move_mount",
        "mount_setattr",
        "syslog",
        "bind",
        "listen",
        "accept4",
        "sched_setscheduler",
        "landlock_restrict_self",
        "modify_ldt",
    ] {
        assert!(!seccomp.allow.iter().any(|allowed| allowed == call), "{call} is allowed");
    }
    for call in &seccomp.kill {
        assert!(!seccomp.allow.contains(call), "{call} is both allowed and deadly");
    }
    let mut sorted = seccomp.allow.clone();
    sorted.dedup();
    assert_eq!(sorted, seccomp.allow, "a call stands in two groups");
}

#[test]
fn what_an_agent_can_write_it_cannot_run() {
    let manifest = parse_manifest("[agent]\nname = \"hello\"\nexec = [\"/agent/run\"]\n").unwrap();
    let plan = compile(&manifest, &subject(Package::Installed));
    let writable: Vec<&str> = plan
        .landlock
        .rules
        .iter()
        .filter(|rule| rule.access == FsAccess::ReadWrite)
        .map(|rule| rule.path.as_str())
        .collect();
    assert_eq!(writable, ["/work", "/tmp", "/dev"]);
    for mount in &plan.mounts {
        if let Mount::ReadOnly { target, .. } = mount {
            assert!(!writable.iter().any(|folder| is_beneath(target, folder)), "{target}");
        }
    }
}

#[test]
fn rights_follow_the_manifest_and_nothing_else() {
    let rights = |rest: &str| {
        let text = format!("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n{rest}");
        compile(&parse_manifest(&text).unwrap(), &subject(Package::Installed)).api
    };
    assert!(rights("").is_empty());
    assert_eq!(rights("[memory]\nspirit = \"r\"\n"), ["memory.recall", "memory.recall.spirit"]);
    assert_eq!(
        rights(
            "[model]\nuse = \"default\"\n[messages]\naccept = true\n[memory]\nactive = \"rw\"\nspirit = \"r\"\n"
        ),
        [
            "memory.correct.active",
            "memory.forget.active",
            "memory.recall",
            "memory.recall.active",
            "memory.recall.spirit",
            "memory.remember",
            "memory.remember.active",
            "messages",
            "models"
        ]
    );
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (any::<[u64; 5]>(), any::<[u32; 3]>(), any::<Option<u64>>()).prop_map(|(sizes, counts, io)| Limits {
        memory_high_bytes: sizes[0],
        memory_max_bytes: sizes[1],
        cpu_percent: counts[0],
        pids: counts[1],
        disk_bytes: sizes[2],
        inodes: sizes[3],
        open_files: counts[2],
        tmp_bytes: sizes[4],
        io_bytes_per_second: io,
        net_bytes_per_day: io,
    })
}

proptest! {
    #[test]
    fn no_manifest_compiles_beyond_the_ceilings(limits in any_limits()) {
        let mut manifest = parse_manifest("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n").unwrap();
        manifest.limits = limits;
        manifest.restart = Restart::Never;
        let plan = compile(&manifest, &subject(Package::Installed));
        let cgroup = &plan.cgroup;
        prop_assert!((ceiling::MEMORY_MIN_BYTES..=ceiling::MEMORY_MAX_BYTES).contains(&cgroup.memory_max_bytes));
        prop_assert!(cgroup.memory_high_bytes <= cgroup.memory_max_bytes);
        prop_assert!((ceiling::PIDS_MIN..=ceiling::PIDS_MAX).contains(&cgroup.pids_max));
        prop_assert!(cgroup.cpu_quota_us >= 1_000);
        prop_assert!(cgroup.cpu_quota_us * 100 <= u64::from(ceiling::CPU_PERCENT_MAX) * cgroup.cpu_period_us);
        prop_assert!(quota(&manifest).bytes <= ceiling::DISK_MAX_BYTES);
        for mount in &plan.mounts {
            if let Mount::Tmpfs { size_bytes, .. } = mount {
                prop_assert!(*size_bytes <= ceiling::TMP_MAX_BYTES);
            }
        }
        for limit in &plan.rlimits {
            prop_assert!(limit.hard <= u64::from(ceiling::OPEN_FILES_MAX));
        }
    }
}
