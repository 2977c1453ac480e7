//! Which plan follows from a manifest?
//!
//! In:     a checked [`Manifest`] and the [`Subject`] it is for. Out: the whole [`SandboxPlan`].
//! Always: no path, variable or limit comes from anywhere but the manifest's checked values and the constants here;
//!         every number is cut to [`ceiling`] once more, so a manifest built by hand cannot exceed it either.

use crate::manifest::is_beneath;
use crate::syscalls;
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::AgentId;
use agentd_domain::manifest::{Limits, Manifest, MemoryAccess};
use agentd_domain::paths::{self, inside};
use agentd_domain::plan::{
    CgroupLimits, DiskQuota, FsAccess, LandlockPlan, LandlockRule, Mount, NetworkPlan, PLAN_VERSION, Rlimit,
    SandboxPlan, SeccompPlan, ceiling,
};

/// Landlock's scopes for signals and abstract sockets came with this ABI (Linux 6.12).
const LANDLOCK_ABI_MIN: u32 = 6;
/// The period the kernel itself uses by default; the quota is a share of it.
const CPU_PERIOD_US: u64 = 100_000;
/// POSIX shared memory of small programs; it counts as memory like `/tmp`.
const SHM_MAX_BYTES: u64 = 16 << 20;
const API_PORT: u16 = 7070;
const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

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
    fn package_folder(&self) -> String {
        match &self.package {
            Package::Builtin { folder } => format!("{}/{folder}", paths::BUILTIN_AGENTS),
            Package::Installed => format!("{}/{}/package", paths::DATA_AGENTS, self.agent_id),
        }
    }
}

/// The plan that holds for a run of this agent.
pub fn compile(manifest: &Manifest, subject: &Subject) -> SandboxPlan {
    SandboxPlan {
        version: PLAN_VERSION,
        agent_id: subject.agent_id,
        name: manifest.name.clone(),
        uid: subject.uid,
        exec: manifest.exec.clone(),
        workdir: manifest.workdir.clone(),
        env: environment(),
        mounts: mounts(manifest, subject),
        landlock: landlock(manifest),
        seccomp: seccomp(),
        cgroup: cgroup(&manifest.limits),
        rlimits: rlimits(&manifest.limits),
        network: NetworkPlan::LoopbackOnly,
        api: api_rights(manifest),
    }
}

/// The user quota of the agent's volume.
pub fn quota(manifest: &Manifest) -> DiskQuota {
    DiskQuota {
        bytes: manifest.limits.disk_bytes.min(ceiling::DISK_MAX_BYTES),
        inodes: manifest.limits.inodes.min(ceiling::INODES_MAX),
    }
}

/// Fixed for every agent, so that nothing leaks in and every HTTP and model library finds agentd by itself. The
/// keys are placeholders: identity comes from the socket. Proxy variables follow when the egress exists.
fn environment() -> Vec<(String, String)> {
    let local = "127.0.0.1,localhost,::1".to_owned();
    let mut variables = vec![
        ("AGENTD_SOCKET", inside::API_SOCKET.to_owned()),
        ("AGENTD_URL", inside::API_URL.to_owned()),
        ("ANTHROPIC_API_KEY", "agentd".to_owned()),
        ("ANTHROPIC_BASE_URL", inside::API_URL.to_owned()),
        ("CURL_CA_BUNDLE", CA_BUNDLE.to_owned()),
        ("HOME", inside::WORK.to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        ("NODE_EXTRA_CA_CERTS", CA_BUNDLE.to_owned()),
        ("NO_PROXY", local.clone()),
        ("OPENAI_API_KEY", "agentd".to_owned()),
        ("OPENAI_BASE_URL", format!("{}/v1", inside::API_URL)),
        ("PATH", format!("{}/bin:/usr/bin", inside::PACKAGE)),
        ("REQUESTS_CA_BUNDLE", CA_BUNDLE.to_owned()),
        ("SSL_CERT_FILE", CA_BUNDLE.to_owned()),
        ("TMPDIR", "/tmp".to_owned()),
        ("no_proxy", local),
    ];
    variables.sort_unstable();
    variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn mounts(manifest: &Manifest, subject: &Subject) -> Vec<Mount> {
    let tmp_bytes = manifest.limits.tmp_bytes.min(ceiling::TMP_MAX_BYTES);
    let mut mounts: Vec<Mount> = runtime(manifest)
        .into_iter()
        .map(|(path, exec)| Mount::ReadOnly { source: path.clone(), target: path, exec, optional: true })
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
    mounts
}

/// Files of the image that a program needs before its first own instruction, and what the manifest asks for. The
/// flag tells whether programs in there may be started: the loader must be, as the kernel starts it.
fn runtime(manifest: &Manifest) -> Vec<(String, bool)> {
    let fixed = [
        (LIBRARIES, true),
        (LOADER_FOLDER, true),
        ("/usr/share/zoneinfo", false),
        ("/etc/hosts", false),
        ("/etc/ld.so.cache", false),
        (CA_BUNDLE, false),
    ];
    let mut paths: Vec<(String, bool)> = Vec::new();
    for (path, exec) in fixed {
        if !manifest.read.iter().any(|asked| is_beneath(path, asked)) {
            paths.push((path.to_owned(), exec));
        }
    }
    for asked in &manifest.read {
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

fn landlock(manifest: &Manifest) -> LandlockPlan {
    let mut rules: Vec<LandlockRule> = runtime(manifest)
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
    LandlockPlan { abi_min: LANDLOCK_ABI_MIN, rules, connect_tcp: vec![API_PORT] }
}

fn seccomp() -> SeccompPlan {
    let owned = |names: &[&str]| {
        let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort_unstable();
        names
    };
    let allow: Vec<&str> = syscalls::GROUPS.iter().flat_map(|group| group.calls).copied().collect();
    SeccompPlan {
        groups: syscalls::GROUPS.iter().map(|group| group.name.to_owned()).collect(),
        allow: owned(&allow),
        enosys: owned(syscalls::ENOSYS),
        kill: owned(syscalls::KILL),
        ioctls: syscalls::IOCTLS.to_vec(),
        socket_families: syscalls::SOCKET_FAMILIES.to_vec(),
        prctls: syscalls::PRCTLS.to_vec(),
    }
}

fn cgroup(limits: &Limits) -> CgroupLimits {
    let memory_max_bytes =
        limits.memory_max_bytes.clamp(ceiling::MEMORY_MIN_BYTES, ceiling::MEMORY_MAX_BYTES);
    CgroupLimits {
        memory_high_bytes: limits.memory_high_bytes.clamp(ceiling::MEMORY_MIN_BYTES, memory_max_bytes),
        memory_max_bytes,
        pids_max: limits.pids.clamp(ceiling::PIDS_MIN, ceiling::PIDS_MAX),
        cpu_quota_us: u64::from(limits.cpu_percent.clamp(1, ceiling::CPU_PERCENT_MAX))
            * (CPU_PERIOD_US / 100),
        cpu_period_us: CPU_PERIOD_US,
        io_bytes_per_second: limits
            .io_bytes_per_second
            .map(|rate| rate.max(ceiling::IO_MIN_BYTES_PER_SECOND)),
    }
}

/// What cgroups do not count. `NPROC` is missing on purpose: it counts per uid over the whole machine, `pids.max`
/// does it right.
fn rlimits(limits: &Limits) -> Vec<Rlimit> {
    let open_files = u64::from(limits.open_files.clamp(ceiling::OPEN_FILES_MIN, ceiling::OPEN_FILES_MAX));
    [("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0), ("NICE", 0), ("NOFILE", open_files), ("RTPRIO", 0)]
        .into_iter()
        .map(|(name, value)| Rlimit { name: name.to_owned(), soft: value, hard: value })
        .collect()
}

/// Rights as `agentd_domain::agent_api` names them; those of memory once more per tier (`memory.recall.spirit`).
fn api_rights(manifest: &Manifest) -> Vec<String> {
    let mut rights = Vec::new();
    for &(tier, access) in &manifest.memory {
        let tier = tier_name(tier);
        if access != MemoryAccess::None {
            rights.extend(["memory.recall".to_owned(), format!("memory.recall.{tier}")]);
        }
        if access == MemoryAccess::ReadWrite {
            rights.extend(["memory.remember".to_owned(), format!("memory.remember.{tier}")]);
        }
    }
    if manifest.messages {
        rights.push("messages".to_owned());
    }
    if manifest.model.is_some() {
        rights.push("models".to_owned());
    }
    rights.sort_unstable();
    rights.dedup();
    rights
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Working => "working",
        Tier::Active => "active",
        Tier::Spirit => "spirit",
        Tier::Codegraph => "codegraph",
        Tier::Knowledge => "knowledge",
    }
}

#[cfg(test)]
mod tests;
