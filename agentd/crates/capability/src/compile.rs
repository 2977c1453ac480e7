//! Which plan follows from rights?
//!
//! In:     a checked [`Manifest`], which says what is run; [`Rights`], which say what it may do; the [`Subject`] it is
//!         for. Out: the whole [`SandboxPlan`].
//! Always: no path, variable or limit comes from anywhere but these checked values and the constants here; every
//!         number is cut to its ceiling once more, so rights built by hand cannot exceed it either.

use crate::syscalls;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::manifest::Manifest;
use agentd_domain::net::{Rule, rule};
use agentd_domain::nodes::DevicePlan;
use agentd_domain::paths::{self, inside};
use agentd_domain::plan::{
    CgroupLimits, DiskQuota, FsAccess, LandlockPlan, LandlockRule, Mount, NetworkPlan, PLAN_VERSION, Rlimit,
    SandboxPlan, SeccompPlan,
};
use agentd_domain::rights::{Limit, Rights, UNLIMITED, is_beneath};

/// Landlock's scopes for signals and abstract sockets came with this ABI (Linux 6.12).
const LANDLOCK_ABI_MIN: u32 = 6;
/// The period the kernel itself uses by default; the quota is a share of it.
const CPU_PERIOD_US: u64 = 100_000;
/// POSIX shared memory of small programs; it counts as memory like `/tmp`.
const SHM_MAX_BYTES: u64 = 16 << 20;
/// AF_INET: the name server of a run is at 127.0.0.1.
const DATAGRAM_FAMILIES: [u32; 1] = [2];
/// Two questions, and no time lost: the name server answers at once or not at all. `ndots` keeps programs from asking
/// for a name with every suffix first.
const RESOLV_CONF: &str = "nameserver 127.0.0.1\noptions ndots:0 timeout:2 attempts:2\n";

#[cfg(target_arch = "x86_64")]
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
#[cfg(target_arch = "x86_64")]
const LOADER_FOLDER: &str = "/usr/lib64";
#[cfg(target_arch = "aarch64")]
const LIBRARIES: &str = "/usr/lib/aarch64-linux-gnu";
/// On this architecture the loader lies directly in /usr/lib.
#[cfg(target_arch = "aarch64")]
const LOADER_FOLDER: &str = "/usr/lib/ld-linux-aarch64.so.1";

/// Whom a plan is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub agent_id: AgentId,
    /// From [`paths::UID_AGENTS_FIRST`] up; the launcher refuses another agent's.
    pub uid: u32,
    pub package: Package,
}

/// Where the agent's files are, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Package {
    /// Part of the image: the folder of this name below [`paths::BUILTIN_AGENTS`].
    Builtin { folder: String },
    /// Installed by the owner: `/data/agents/<id>/package`.
    Installed,
}

impl Subject {
    /// For a plan that is only looked at: an agent gets an id and a user id of its own when it is installed.
    pub fn nobody() -> Self {
        let agent_id = AgentId(uuid::Uuid::nil());
        Self { agent_id, uid: paths::UID_AGENTS_FIRST, package: Package::Installed }
    }

    fn package_folder(&self) -> String {
        match &self.package {
            Package::Builtin { folder } => format!("{}/{folder}", paths::BUILTIN_AGENTS),
            Package::Installed => format!("{}/{}/package", paths::DATA_AGENTS, self.agent_id),
        }
    }
}

/// What this manifest asks for.
pub fn asked(manifest: &Manifest) -> Rights {
    let groups: Vec<&str> = syscalls::GROUPS.iter().map(|group| group.name).collect();
    Rights::asked_by(manifest, &groups)
}

/// The plan that holds for a run of this agent with all that its manifest asks for.
pub fn compile(manifest: &Manifest, subject: &Subject) -> SandboxPlan {
    plan(manifest, &asked(manifest), subject)
}

/// The plan that holds for a run with these rights, which are a token's: the manifest gives nothing.
pub fn compile_with(manifest: &Manifest, rights: &Rights, subject: &Subject) -> Result<SandboxPlan, Report> {
    let refused = |why: String, fix: &str| Report::caller("rights_too_narrow", "no run is started", why, fix);
    if let Some(limit) = Limit::ALL.into_iter().find(|limit| rights.limit(*limit) < limit.floor()) {
        let why = format!("`{limit}` is {}, and no run keeps below {}", rights.limit(limit), limit.floor());
        return Err(refused(why, "use a token with a larger limit"));
    }
    if let Err(why) = rights.network() {
        return Err(refused(why, "use a token that this version has minted"));
    }
    let program = manifest.exec.first().map_or("", String::as_str);
    if asked(manifest).read.iter().any(|folder| is_beneath(program, folder))
        && !rights.read.iter().any(|folder| is_beneath(program, folder))
    {
        let why = format!("the program {program} lies in no folder that the token allows to read");
        return Err(refused(why, "keep the program's folder in the token's `read`"));
    }
    Ok(plan(manifest, rights, subject))
}

fn plan(manifest: &Manifest, rights: &Rights, subject: &Subject) -> SandboxPlan {
    let network = network(rights);
    SandboxPlan {
        version: PLAN_VERSION,
        agent_id: subject.agent_id,
        name: manifest.name.clone(),
        uid: subject.uid,
        exec: manifest.exec.clone(),
        workdir: manifest.workdir.clone(),
        env: environment(&network),
        mounts: mounts(manifest, rights, subject, &network),
        landlock: landlock(manifest, rights, &network),
        seccomp: seccomp(rights, &network),
        cgroup: cgroup(rights),
        rlimits: rlimits(rights),
        network,
        api: rights.api.iter().cloned().collect(),
        device: device(rights),
    }
}

/// What is wanted; which device it is, if any, is known when the run is to start ([`crate::give`]).
fn device(rights: &Rights) -> Option<DevicePlan> {
    let bytes = kept(rights, Limit::GpuBytes);
    let memory_bytes = (bytes < UNLIMITED).then_some(bytes);
    (bytes > 0).then_some(DevicePlan { memory_bytes, given: None })
}

/// The user quota of the agent's volume.
pub fn quota(manifest: &Manifest) -> DiskQuota {
    quota_with(&asked(manifest))
}

/// The same for rights.
pub fn quota_with(rights: &Rights) -> DiskQuota {
    DiskQuota { bytes: kept(rights, Limit::DiskBytes), inodes: kept(rights, Limit::DiskInodes) }
}

/// The value of a limit in a plan.
fn kept(rights: &Rights, limit: Limit) -> u64 {
    rights.limit(limit).clamp(limit.floor(), limit.ceiling())
}

/// The same for a limit whose ceiling fits.
fn kept_count(rights: &Rights, limit: Limit) -> u32 {
    u32::try_from(kept(rights, limit)).unwrap_or(u32::MAX)
}

/// What is no rule or contradicts another one gives nothing: [`compile_with`] has refused it, a manifest's are checked.
fn network(rights: &Rights) -> NetworkPlan {
    let rules = rights.network().map(Vec::from).unwrap_or_default();
    if rules.is_empty() {
        return NetworkPlan::LoopbackOnly;
    }
    let own = [inside::API_PORT, inside::EGRESS_PROXY, inside::EGRESS_DNS];
    let capture_tcp = rule::ports(&rules).into_iter().filter(|port| !own.contains(port)).collect();
    let bytes = kept(rights, Limit::NetBytes);
    NetworkPlan::Egress {
        rules: rules.iter().map(Rule::to_string).collect(),
        capture_tcp,
        bytes_per_day: (bytes < UNLIMITED).then_some(bytes),
    }
}

/// Fixed for every agent, so that nothing leaks in and every HTTP and model library finds agentd by itself. The
/// keys are placeholders: identity comes from the socket. Proxy variables, in both cases because programs differ, are
/// there where a proxy is.
fn environment(network: &NetworkPlan) -> Vec<(String, String)> {
    let local = "127.0.0.1,localhost,::1".to_owned();
    let mut variables = vec![
        ("AGENTD_SOCKET", inside::API_SOCKET.to_owned()),
        ("AGENTD_URL", inside::API_URL.to_owned()),
        ("ANTHROPIC_API_KEY", "agentd".to_owned()),
        ("ANTHROPIC_BASE_URL", inside::API_URL.to_owned()),
        ("CURL_CA_BUNDLE", inside::CA_BUNDLE.to_owned()),
        ("HOME", inside::WORK.to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        ("NODE_EXTRA_CA_CERTS", inside::CA_BUNDLE.to_owned()),
        ("NO_PROXY", local.clone()),
        ("OPENAI_API_KEY", "agentd".to_owned()),
        ("OPENAI_BASE_URL", format!("{}/v1", inside::API_URL)),
        ("PATH", format!("{}/bin:/usr/bin", inside::PACKAGE)),
        ("REQUESTS_CA_BUNDLE", inside::CA_BUNDLE.to_owned()),
        ("SSL_CERT_FILE", inside::CA_BUNDLE.to_owned()),
        ("TMPDIR", "/tmp".to_owned()),
        ("no_proxy", local),
    ];
    if let NetworkPlan::Egress { .. } = network {
        let (http, socks) = ("http://127.0.0.1:7071".to_owned(), "socks5h://127.0.0.1:7071".to_owned());
        variables.extend([
            ("ALL_PROXY", socks.clone()),
            ("HTTPS_PROXY", http.clone()),
            ("HTTP_PROXY", http.clone()),
            ("all_proxy", socks),
            ("http_proxy", http.clone()),
            ("https_proxy", http),
        ]);
    }
    variables.sort_unstable();
    variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn mounts(manifest: &Manifest, rights: &Rights, subject: &Subject, network: &NetworkPlan) -> Vec<Mount> {
    let tmp_bytes = kept(rights, Limit::TmpBytes);
    let mut mounts: Vec<Mount> = runtime(manifest, rights)
        .into_iter()
        .map(|(path, exec)| Mount::ReadOnly {
            source: seen_from_outside(&path, network),
            target: path,
            exec,
            optional: true,
        })
        .collect();
    mounts.extend([
        Mount::Symlink { target: "/lib".to_owned(), points_to: "usr/lib".to_owned() },
        Mount::Symlink { target: "/lib64".to_owned(), points_to: "usr/lib64".to_owned() },
        Mount::ReadOnly {
            source: subject.package_folder(),
            target: inside::PACKAGE.to_owned(),
            exec: true,
            optional: false,
        },
        Mount::Work { target: inside::WORK.to_owned() },
        Mount::Tmpfs { target: "/tmp".to_owned(), size_bytes: tmp_bytes },
        Mount::Proc { target: "/proc".to_owned() },
        Mount::Dev { target: "/dev".to_owned() },
        Mount::Tmpfs { target: "/dev/shm".to_owned(), size_bytes: tmp_bytes.min(SHM_MAX_BYTES) },
    ]);
    if let NetworkPlan::Egress { .. } = network {
        let text = RESOLV_CONF.to_owned();
        mounts.push(Mount::Text { target: inside::RESOLV_CONF.to_owned(), text });
    }
    mounts
}

/// Where the egress ends TLS, programs must trust its authority besides those of the image.
fn seen_from_outside(path: &str, network: &NetworkPlan) -> String {
    match network {
        NetworkPlan::Egress { .. } if path == inside::CA_BUNDLE => paths::EGRESS_CA_BUNDLE.to_owned(),
        _ => path.to_owned(),
    }
}

/// Files of the image that a program needs before its first own instruction, and what the rights add. The
/// flag tells whether programs in there may be started: the loader must be, as the kernel starts it.
fn runtime(manifest: &Manifest, rights: &Rights) -> Vec<(String, bool)> {
    let fixed = [
        (LIBRARIES, true),
        (LOADER_FOLDER, true),
        ("/usr/share/zoneinfo", false),
        ("/etc/hosts", false),
        ("/etc/ld.so.cache", false),
        (inside::CA_BUNDLE, false),
    ];
    let mut paths: Vec<(String, bool)> = Vec::new();
    for (path, exec) in fixed {
        if !rights.read.iter().any(|asked| is_beneath(path, asked)) {
            paths.push((path.to_owned(), exec));
        }
    }
    for asked in &rights.read {
        // A folder inside one that is already there brings nothing new.
        if paths.iter().any(|(path, _)| is_beneath(asked, path)) {
            continue;
        }
        let holds_program = manifest.exec.first().is_some_and(|program| is_beneath(program, asked));
        let holds_loader = is_beneath(LIBRARIES, asked) || is_beneath(LOADER_FOLDER, asked);
        paths.push((asked.clone(), holds_program || holds_loader));
    }
    paths
}

fn landlock(manifest: &Manifest, rights: &Rights, network: &NetworkPlan) -> LandlockPlan {
    let mut rules: Vec<LandlockRule> = runtime(manifest, rights)
        .into_iter()
        .map(|(path, exec)| LandlockRule {
            path,
            access: if exec { FsAccess::ReadExecute } else { FsAccess::Read },
        })
        .collect();
    let own = [
        (inside::PACKAGE, FsAccess::ReadExecute),
        (inside::WORK, FsAccess::ReadWrite),
        ("/tmp", FsAccess::ReadWrite),
        ("/dev", FsAccess::ReadWrite),
        ("/proc", FsAccess::Read),
    ];
    rules.extend(own.map(|(path, access)| LandlockRule { path: path.to_owned(), access }));
    let mut connect_tcp = vec![inside::API_PORT];
    if let NetworkPlan::Egress { capture_tcp, .. } = network {
        rules.push(LandlockRule { path: inside::RESOLV_CONF.to_owned(), access: FsAccess::Read });
        connect_tcp.extend([inside::EGRESS_PROXY, inside::EGRESS_DNS]);
        connect_tcp.extend(capture_tcp);
        connect_tcp.sort_unstable();
    }
    LandlockPlan { abi_min: LANDLOCK_ABI_MIN, rules, connect_tcp }
}

fn seccomp(rights: &Rights, network: &NetworkPlan) -> SeccompPlan {
    let owned = |names: &[&str]| {
        let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort_unstable();
        names
    };
    let groups: Vec<&syscalls::Group> =
        syscalls::GROUPS.iter().filter(|group| rights.calls.contains(group.name)).collect();
    let allow: Vec<&str> = groups.iter().flat_map(|group| group.calls).copied().collect();
    SeccompPlan {
        groups: groups.iter().map(|group| group.name.to_owned()).collect(),
        allow: owned(&allow),
        enosys: owned(syscalls::ENOSYS),
        kill: owned(syscalls::KILL),
        ioctls: syscalls::IOCTLS.to_vec(),
        ioctl_types: Vec::new(),
        socket_families: syscalls::SOCKET_FAMILIES.to_vec(),
        datagram_families: match network {
            NetworkPlan::LoopbackOnly => Vec::new(),
            NetworkPlan::Egress { .. } => DATAGRAM_FAMILIES.to_vec(),
        },
        prctls: syscalls::PRCTLS.to_vec(),
    }
}

fn cgroup(rights: &Rights) -> CgroupLimits {
    let memory_max_bytes = kept(rights, Limit::MemoryMax);
    let io = kept(rights, Limit::IoBytes);
    CgroupLimits {
        memory_high_bytes: kept(rights, Limit::MemoryHigh).min(memory_max_bytes),
        memory_max_bytes,
        pids_max: kept_count(rights, Limit::Pids),
        cpu_quota_us: kept(rights, Limit::CpuPercent) * (CPU_PERIOD_US / 100),
        cpu_period_us: CPU_PERIOD_US,
        io_bytes_per_second: (io < UNLIMITED).then_some(io),
    }
}

/// What cgroups do not count. `NPROC` is missing on purpose: it counts per uid over the whole machine, `pids.max`
/// does it right.
fn rlimits(rights: &Rights) -> Vec<Rlimit> {
    let open_files = kept(rights, Limit::OpenFiles);
    [("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0), ("NICE", 0), ("NOFILE", open_files), ("RTPRIO", 0)]
        .into_iter()
        .map(|(name, value)| Rlimit { name: name.to_owned(), soft: value, hard: value })
        .collect()
}

/// Rights as `agentd_domain::agent_api` names them; those of memory once more per tier (`memory.recall.spirit`).
#[cfg(test)]
mod tests;
