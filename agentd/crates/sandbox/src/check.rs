//! Does a plan keep what must be true on this host, whatever agentd says?
//!
//! In:     a [`SandboxPlan`] from agentd's socket. Out: nothing, or the first invariant that it breaks.
//! Always: what passes here can be applied by root without giving the run more than an agent may ever have: an agent's
//!         uid, sources beneath fixed folders, targets that nobody but root can have prepared, no call that leaves the
//!         sandbox, limits below [`ceiling`].
//! Why twice: agentd talks to strangers. Should it be taken over, this is what it still cannot ask for.
//! Never:  looks at the file system. That the volume belongs to this agent is checked by [`crate::launcher`].

use crate::{landlock, syscalls};
use agentd_domain::fault::Report;
use agentd_domain::nodes;
use agentd_domain::paths::{self, inside};
use agentd_domain::plan::{
    CgroupLimits, DiskQuota, FsAccess, Mount, NetworkPlan, PLAN_VERSION, Rlimit, SandboxPlan, ceiling,
};
use std::collections::BTreeSet;

/// What the run's own name server is: without it a program would look for one elsewhere, and find none.
const TEXT_MAX_BYTES: usize = 512;
/// AF_UNIX, AF_INET, AF_INET6.
const FAMILIES: [u32; 3] = [1, 2, 10];
/// AF_INET: questions to the run's own name server.
const DATAGRAM_FAMILIES: [u32; 1] = [2];
/// Requests that put characters into a terminal or change its line discipline: TIOCSTI, TIOCLINUX, TIOCSETD.
const FORBIDDEN_IOCTLS: [u32; 3] = [0x5412, 0x541c, 0x5423];
/// SET_SECCOMP, SET_SECUREBITS, SET_MM, CAP_AMBIENT, CAPBSET_DROP, SET_PTRACER, TASK_PERF_EVENTS_*.
const FORBIDDEN_PRCTLS: [u32; 8] = [22, 28, 35, 47, 24, 0x5961_6d61, 31, 32];
/// Calls that no plan may allow: each is a way out of a namespace, into another process, or into the kernel.
const FORBIDDEN_CALLS: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "capset",
    "chroot",
    "clock_settime",
    "delete_module",
    "execveat",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "memfd_create",
    "memfd_secret",
    "mknod",
    "mknodat",
    "modify_ldt",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pidfd_getfd",
    "pidfd_open",
    "pivot_root",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "seccomp",
    "setdomainname",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "sethostname",
    "setns",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "settimeofday",
    "setuid",
    "swapoff",
    "swapon",
    "syslog",
    "umount2",
    "unshare",
    "userfaultfd",
    "vhangup",
];

/// Every invariant of a plan.
pub fn check(plan: &SandboxPlan) -> Result<(), Report> {
    if plan.version != PLAN_VERSION {
        return refuse(
            "version",
            format!("it is of version {}, this launcher reads {PLAN_VERSION}", plan.version),
        );
    }
    check_uid(plan.uid)?;
    check_program(plan)?;
    check_mounts(plan)?;
    check_network(&plan.network)?;
    check_device(plan)?;
    check_landlock(plan)?;
    check_seccomp(plan)?;
    check_cgroup(&plan.cgroup)?;
    check_rlimits(&plan.rlimits)?;
    if plan.api.len() > 64 || plan.api.iter().any(|right| right.len() > 100) {
        return refuse("api", "it holds more rights than exist");
    }
    Ok(())
}

pub fn check_uid(uid: u32) -> Result<(), Report> {
    if (paths::UID_AGENTS_FIRST..paths::UID_AGENTS_END).contains(&uid) {
        return Ok(());
    }
    refuse(
        "uid",
        format!("{uid} is not an agent's: {} to {}", paths::UID_AGENTS_FIRST, paths::UID_AGENTS_END - 1),
    )
}

pub fn check_quota(quota: DiskQuota) -> Result<(), Report> {
    // 0 would mean no limit at all to the kernel.
    if !(1..=ceiling::DISK_MAX_BYTES).contains(&quota.bytes)
        || !(1..=ceiling::INODES_MAX).contains(&quota.inodes)
    {
        return refuse(
            "quota",
            format!("{} bytes and {} inodes are outside the limits", quota.bytes, quota.inodes),
        );
    }
    Ok(())
}

pub fn check_cgroup(limits: &CgroupLimits) -> Result<(), Report> {
    let memory = ceiling::MEMORY_MIN_BYTES..=ceiling::MEMORY_MAX_BYTES;
    let cpu_max = limits.cpu_period_us.saturating_mul(u64::from(ceiling::CPU_PERCENT_MAX)) / 100;
    let good = memory.contains(&limits.memory_max_bytes)
        && memory.contains(&limits.memory_high_bytes)
        && limits.memory_high_bytes <= limits.memory_max_bytes
        && (ceiling::PIDS_MIN..=ceiling::PIDS_MAX).contains(&limits.pids_max)
        // The kernel's own range of periods (Documentation/scheduler/sched-bwc.rst).
        && (1_000..=1_000_000).contains(&limits.cpu_period_us)
        && (1_000..=cpu_max).contains(&limits.cpu_quota_us)
        && limits.io_bytes_per_second.is_none_or(|rate| rate >= ceiling::IO_MIN_BYTES_PER_SECOND);
    if good { Ok(()) } else { refuse("cgroup", format!("a value is outside of the limits: {limits:?}")) }
}

/// A limit may be lowered for a living run and raised again, but never above what the run was started with.
pub fn check_within(new: &CgroupLimits, started_with: &CgroupLimits) -> Result<(), Report> {
    check_cgroup(new)?;
    let share = |limits: &CgroupLimits| {
        u128::from(limits.cpu_quota_us) * 1_000_000 / u128::from(limits.cpu_period_us.max(1))
    };
    let rate = |limits: &CgroupLimits| limits.io_bytes_per_second.unwrap_or(u64::MAX);
    let within = new.memory_max_bytes <= started_with.memory_max_bytes
        && new.memory_high_bytes <= started_with.memory_high_bytes
        && new.pids_max <= started_with.pids_max
        && share(new) <= share(started_with)
        && rate(new) <= rate(started_with);
    if within { Ok(()) } else { refuse("cgroup", "the new limits are wider than the run's plan") }
}

/// Nodes that an engine is to leave alone become rules for files.
pub fn check_hidden(hidden: &[String]) -> Result<(), Report> {
    const HIDDEN_MOST: usize = 512;
    match hidden.iter().find(|path| nodes::node(path).is_none()) {
        Some(path) => refuse("hidden", format!("`{}` is no accelerator's node", path.escape_debug())),
        None if hidden.len() > HIDDEN_MOST => refuse("hidden", "there are too many"),
        None => Ok(()),
    }
}

/// Names of device sets become file and cgroup names.
pub fn check_engine_set(set: &str) -> Result<(), Report> {
    let good = (1..=32).contains(&set.len())
        && set.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !set.starts_with('-');
    if good {
        Ok(())
    } else {
        refuse("engine", format!("`{}` is not the name of a device set", set.escape_debug()))
    }
}

fn check_program(plan: &SandboxPlan) -> Result<(), Report> {
    let Some(program) = plan.exec.first() else { return refuse("exec", "it is empty") };
    let bytes: usize = plan.exec.iter().map(String::len).sum();
    if !is_clean_absolute(program)
        || plan.exec.iter().any(|argument| argument.contains('\0'))
        || plan.exec.len() > ceiling::ARGS_MAX
        || bytes > 2 * ceiling::TEXT_MAX_BYTES
    {
        return refuse("exec", "it is no absolute program with arguments of a sane size");
    }
    if !is_clean_absolute(&plan.workdir) || !is_beneath(&plan.workdir, inside::WORK) {
        return refuse(
            "workdir",
            format!("`{}` is not beneath {}", plan.workdir.escape_debug(), inside::WORK),
        );
    }
    let mut names = BTreeSet::new();
    for (name, value) in &plan.env {
        let good = !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && !value.contains('\0')
            && value.len() <= ceiling::TEXT_MAX_BYTES
            // The loader's own variables change which code a program consists of.
            && !name.starts_with("LD_");
        if !good || !names.insert(name) {
            return refuse("env", format!("`{}` may not be set, or is set twice", name.escape_debug()));
        }
    }
    if plan.env.len() > ceiling::ENV_MAX {
        return refuse("env", "it holds too many variables");
    }
    Ok(())
}

fn check_mounts(plan: &SandboxPlan) -> Result<(), Report> {
    if plan.mounts.len() > ceiling::MOUNTS_MAX {
        return refuse("mounts", "there are too many");
    }
    let mut targets = BTreeSet::new();
    for mount in &plan.mounts {
        let target = target_of(mount);
        if !is_clean_absolute(target) || !may_be_target(target) {
            return refuse(
                "mounts",
                format!("`{}` is not a place where something may be mounted", target.escape_debug()),
            );
        }
        if !targets.insert(target) {
            return refuse("mounts", format!("{target} is mounted twice"));
        }
        check_mount(plan, mount)?;
    }
    let count = |wanted: fn(&Mount) -> bool| plan.mounts.iter().filter(|mount| wanted(mount)).count();
    let fixed = [
        count(|mount| matches!(mount, Mount::Work { .. })),
        count(|mount| matches!(mount, Mount::Proc { .. })),
        count(|mount| matches!(mount, Mount::Dev { .. })),
    ];
    if fixed != [1, 1, 1] {
        return refuse("mounts", "there must be one each of work, proc and dev");
    }
    Ok(())
}

fn check_mount(plan: &SandboxPlan, mount: &Mount) -> Result<(), Report> {
    match mount {
        Mount::ReadOnly { source, .. } if is_clean_absolute(source) && may_be_source(plan, source) => Ok(()),
        Mount::ReadOnly { source, .. } => {
            refuse("mounts", format!("`{}` is not a folder that agents may see", source.escape_debug()))
        }
        Mount::Symlink { points_to, .. } => {
            let good = !points_to.is_empty()
                && points_to.len() <= 255
                && !points_to.chars().any(char::is_control)
                && points_to.split('/').all(|part| !matches!(part, "" | "." | ".."));
            if good { Ok(()) } else { refuse("mounts", "a link does not point to a place beneath the root") }
        }
        Mount::Tmpfs { size_bytes, .. } if (4096..=ceiling::TMP_MAX_BYTES).contains(size_bytes) => Ok(()),
        Mount::Tmpfs { .. } => refuse("mounts", "a memory file system has no sane size"),
        Mount::Work { target } if target == inside::WORK => Ok(()),
        Mount::Proc { target } if target == "/proc" => Ok(()),
        Mount::Dev { target } if target == "/dev" => Ok(()),
        Mount::Text { target, text } => {
            let good = target == inside::RESOLV_CONF && text.len() <= TEXT_MAX_BYTES && !text.contains('\0');
            if good { Ok(()) } else { refuse("mounts", "the only text of a root is its resolv.conf") }
        }
        Mount::Work { .. } | Mount::Proc { .. } | Mount::Dev { .. } => {
            refuse("mounts", "work, proc and dev have fixed places")
        }
    }
}

fn target_of(mount: &Mount) -> &str {
    match mount {
        Mount::ReadOnly { target, .. }
        | Mount::Symlink { target, .. }
        | Mount::Work { target }
        | Mount::Tmpfs { target, .. }
        | Mount::Proc { target }
        | Mount::Dev { target }
        | Mount::Text { target, .. } => target,
    }
}

/// Places are made by root before anything of the agent is visible. Beneath the agent's own folders a place could be a
/// link that the agent has put there in an earlier run.
fn may_be_target(target: &str) -> bool {
    let exact = ["/lib", "/lib64", "/tmp", "/proc", "/dev", "/dev/shm", inside::WORK, inside::PACKAGE];
    let trees = ["/usr", "/etc", "/lib", "/lib64"];
    exact.contains(&target) || trees.iter().any(|tree| target != *tree && is_beneath(target, tree))
}

/// The read-only image without the appliance's own programs, models and other agents' packages; and this agent's own
/// package on the data disk.
fn may_be_source(plan: &SandboxPlan, source: &str) -> bool {
    // The bundle is written by agentd, for agents to read: what a plan shows with it, agentd could tell them anyway.
    let files = ["/etc/hosts", "/etc/ld.so.cache", paths::EGRESS_CA_BUNDLE];
    let trees = ["/usr/lib", "/usr/lib64", "/usr/share", "/usr/bin", "/etc/ssl/certs"];
    let own = ["/usr/lib/agentd", "/usr/share/agentd"];
    let package = format!("{}/{}/package", paths::DATA_AGENTS, plan.agent_id);
    let builtin = source
        .strip_prefix(paths::BUILTIN_AGENTS)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(|name| !name.contains('/'));
    let image = trees.iter().any(|tree| is_beneath(source, tree))
        && !own.iter().any(|folder| is_beneath(source, folder) || is_beneath(folder, source));
    source == package || builtin || image || files.contains(&source)
}

/// Names, addresses and rules are agentd's business: nothing leaves the namespace but through its sockets. What the
/// launcher must know is how many there are, and that none is in the way of another.
fn check_network(network: &NetworkPlan) -> Result<(), Report> {
    let NetworkPlan::Egress { rules, capture_tcp, .. } = network else { return Ok(()) };
    let own = [inside::API_PORT, inside::EGRESS_PROXY, inside::EGRESS_DNS];
    let bytes: usize = rules.iter().map(String::len).sum();
    let ports: BTreeSet<u16> = capture_tcp.iter().copied().collect();
    let good = (1..=ceiling::NET_RULES_MAX).contains(&rules.len())
        && bytes <= ceiling::NET_RULES_MAX_BYTES
        && capture_tcp.len() <= ceiling::NET_PORTS_MAX
        && ports.len() == capture_tcp.len()
        && !ports.contains(&0)
        && !own.iter().any(|port| ports.contains(port));
    if good { Ok(()) } else { refuse("network", "it has no rules, too many, or ports that cannot be caught") }
}

/// Every port on which something of agentd's listens in the namespace.
fn may_connect(network: &NetworkPlan, port: u16) -> bool {
    match network {
        NetworkPlan::LoopbackOnly => port == inside::API_PORT,
        NetworkPlan::Egress { capture_tcp, .. } => {
            [inside::API_PORT, inside::EGRESS_PROXY, inside::EGRESS_DNS].contains(&port)
                || capture_tcp.contains(&port)
        }
    }
}

/// A run that wants a device has one, with nodes of accelerators and no others, held by what holds strangers.
fn check_device(plan: &SandboxPlan) -> Result<(), Report> {
    let Some(wish) = &plan.device else { return Ok(()) };
    let Some(given) = &wish.given else { return refuse("device", "none was chosen for it") };
    match given.problem(wish.memory_bytes) {
        None => Ok(()),
        Some(why) => refuse("device", why),
    }
}

fn given_nodes(plan: &SandboxPlan) -> &[String] {
    let given = plan.device.as_ref().and_then(|wish| wish.given.as_ref());
    given.map_or(&[], |given| given.nodes.as_slice())
}

fn check_landlock(whole: &SandboxPlan) -> Result<(), Report> {
    let (plan, network) = (&whole.landlock, &whole.network);
    if plan.abi_min < landlock::ABI_MIN {
        return refuse("landlock", format!("it would accept ABI {}, which has no scopes", plan.abi_min));
    }
    let writable = [inside::WORK, "/tmp", "/dev"];
    for rule in &plan.rules {
        let may_write = writable.iter().any(|folder| is_beneath(&rule.path, folder));
        if rule.access == FsAccess::Device && !given_nodes(whole).contains(&rule.path) {
            return refuse("landlock", format!("`{}` is not the run's device", rule.path.escape_debug()));
        }
        if !is_clean_absolute(&rule.path) || (rule.access == FsAccess::ReadWrite && !may_write) {
            return refuse("landlock", format!("the rule for `{}` gives too much", rule.path.escape_debug()));
        }
        // What an agent can write it must not run, or `exec` in the manifest would mean nothing.
        if rule.access == FsAccess::ReadExecute && may_write {
            return refuse("landlock", format!("{} is writable and would be executable", rule.path));
        }
    }
    if plan.rules.len() > ceiling::MOUNTS_MAX
        || plan.connect_tcp.iter().any(|port| !may_connect(network, *port))
    {
        return refuse("landlock", "it names a port that is not agentd's, or too many rules");
    }
    Ok(())
}

fn check_seccomp(whole: &SandboxPlan) -> Result<(), Report> {
    let (plan, network) = (&whole.seccomp, &whole.network);
    for name in plan.allow.iter().chain(&plan.enosys).chain(&plan.kill) {
        if syscalls::number(name).is_none() {
            return refuse("seccomp", format!("`{}` is not a known system call", name.escape_debug()));
        }
    }
    if let Some(name) = plan.allow.iter().find(|name| FORBIDDEN_CALLS.contains(&name.as_str())) {
        return refuse("seccomp", format!("`{name}` leads out of the sandbox"));
    }
    // Its flags lie in memory, where the filter cannot see a new namespace.
    if plan.allow.iter().any(|name| name == "clone3") && !plan.enosys.iter().any(|name| name == "clone3") {
        return refuse("seccomp", "`clone3` must answer ENOSYS");
    }
    let mut numbers = plan.ioctls.iter().filter(|number| FORBIDDEN_IOCTLS.contains(number));
    if numbers.next().is_some() || plan.prctls.iter().any(|number| FORBIDDEN_PRCTLS.contains(number)) {
        return refuse("seccomp", "it allows an `ioctl` or `prctl` that leads out of the sandbox");
    }
    let kinds = plan.ioctl_types.as_slice();
    if !kinds.is_empty()
        && (given_nodes(whole).is_empty() || kinds.iter().any(|kind| !nodes::IOCTL_TYPES.contains(kind)))
    {
        return refuse("seccomp", "it allows kinds of `ioctl` that no device of the run has");
    }
    if plan.socket_families.iter().any(|family| !FAMILIES.contains(family)) {
        return refuse("seccomp", "it allows a socket family besides AF_UNIX, AF_INET and AF_INET6");
    }
    let datagrams = &plan.datagram_families;
    if datagrams.iter().any(|family| !DATAGRAM_FAMILIES.contains(family))
        || (*network == NetworkPlan::LoopbackOnly && !datagrams.is_empty())
    {
        return refuse("seccomp", "it allows datagrams besides those to the run's own name server");
    }
    Ok(())
}

fn check_rlimits(limits: &[Rlimit]) -> Result<(), Report> {
    let highest = |name: &str| match name {
        "NOFILE" => Some(u64::from(ceiling::OPEN_FILES_MAX)),
        "CORE" | "MEMLOCK" | "MSGQUEUE" | "RTPRIO" | "NICE" => Some(0),
        _ => None,
    };
    let mut names = BTreeSet::new();
    for limit in limits {
        let fits =
            highest(&limit.name).is_some_and(|highest| limit.soft <= limit.hard && limit.hard <= highest);
        if !fits || !names.insert(limit.name.as_str()) {
            return refuse(
                "rlimits",
                format!("{} is unknown, doubled or too high", limit.name.escape_debug()),
            );
        }
    }
    if names.len() != 6 {
        return refuse("rlimits", "one of CORE, MEMLOCK, MSGQUEUE, NICE, NOFILE, RTPRIO is missing");
    }
    Ok(())
}

pub(crate) fn is_clean_absolute(path: &str) -> bool {
    path.len() <= 1_024
        && !path.chars().any(char::is_control)
        && path
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

pub(crate) fn is_beneath(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn refuse<T>(part: &str, why: impl std::fmt::Display) -> Result<T, Report> {
    Err(Report::caller(
        "plan_refused",
        "the launcher did not do it",
        format!("`{part}` of the request breaks a rule of this host: {why}"),
        "agentd never asks for this by itself: install the agent again, and if it stays, report the manifest",
    ))
}

#[cfg(test)]
mod tests;
