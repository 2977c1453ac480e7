//! What exactly will the kernel enforce for a run?
//!
//! A [`SandboxPlan`] is one immutable value: `agentctl plan` prints it, tests compare it whole, the launcher
//! checks it and the jail applies it. It holds names and numbers only, nothing that would have to be looked up.

use crate::ids::{AgentId, AgentName};
use crate::nodes::DevicePlan;
use serde::{Deserialize, Serialize};

/// Raised when a launcher of an older version would misread the plan.
pub const PLAN_VERSION: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxPlan {
    pub version: u32,
    pub agent_id: AgentId,
    pub name: AgentName,
    /// User and group id of the agent's processes, from [`crate::paths::UID_AGENTS_FIRST`] up.
    pub uid: u32,
    /// Program and arguments; the program is a path inside the jail.
    pub exec: Vec<String>,
    pub workdir: String,
    /// The whole environment, sorted by name.
    pub env: Vec<(String, String)>,
    /// In the order in which they are made.
    pub mounts: Vec<Mount>,
    pub landlock: LandlockPlan,
    pub seccomp: SeccompPlan,
    pub cgroup: CgroupLimits,
    pub rlimits: Vec<Rlimit>,
    pub network: NetworkPlan,
    /// Rights on agentd's own API, `memory.remember` for example; checked by agentd at every request.
    pub api: Vec<String>,
    /// An accelerator that the agent's own program drives. Most have none: they use models through agentd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DevicePlan>,
}

/// One entry of the new root. Paths outside are resolved beneath fixed folders by the launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mount {
    /// A folder or file of the image or of the agent's package, seen read-only. An optional one that the
    /// image does not have is left out: that gives less, never more.
    ReadOnly { source: String, target: String, exec: bool, optional: bool },
    /// A symbolic link of the new root, such as `/lib64`, which every dynamic program names.
    Symlink { target: String, points_to: String },
    /// The agent's own volume `/data/agents/<id>/work`, limited by user quota.
    Work { target: String },
    /// Private memory file system.
    Tmpfs { target: String, size_bytes: u64 },
    /// `/proc` of the run's own pid namespace: `hidepid=invisible,subset=pid`.
    Proc { target: String },
    /// `null zero full random urandom tty` and nothing else.
    Dev { target: String },
    /// A small file of the new root itself, read-only: the one that says where the run's name server is.
    Text { target: String, text: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LandlockPlan {
    /// The kernel must offer at least this ABI, or the run does not start. 6 brought the scopes (Linux 6.12).
    pub abi_min: u32,
    pub rules: Vec<LandlockRule>,
    /// TCP ports the agent may connect to; everything else is denied.
    pub connect_tcp: Vec<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LandlockRule {
    pub path: String,
    pub access: FsAccess,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsAccess {
    Read,
    ReadExecute,
    ReadWrite,
    /// Read, write and `ioctl` on one device node.
    Device,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompPlan {
    /// Names of the groups the list was made of, for people.
    pub groups: Vec<String>,
    /// Every allowed system call by name, sorted; all others fail with EPERM.
    pub allow: Vec<String>,
    /// Calls that fail with ENOSYS so that libc falls back (`clone3`, whose flags a filter cannot see).
    pub enosys: Vec<String>,
    /// Calls whose use ends the run: nothing honest makes them.
    pub kill: Vec<String>,
    /// `ioctl` request numbers that are allowed; compared as 32 bits, as the kernel reads them.
    pub ioctls: Vec<u32>,
    /// Kinds of them (`_IOC_TYPE`) of which all are allowed: those of an accelerator's driver, where the run has one.
    /// On which nodes is Landlock's to say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ioctl_types: Vec<u8>,
    /// `socket` address families that are allowed with `SOCK_STREAM`.
    pub socket_families: Vec<u32>,
    /// The same with `SOCK_DGRAM`: for questions to the run's own name server, where it has one.
    pub datagram_families: Vec<u32>,
    /// `prctl` operations that are allowed.
    pub prctls: Vec<u32>,
}

/// Values for cgroup v2 files (Documentation/admin-guide/cgroup-v2.rst).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupLimits {
    pub memory_high_bytes: u64,
    pub memory_max_bytes: u64,
    pub pids_max: u32,
    /// Microseconds of CPU time per [`Self::cpu_period_us`].
    pub cpu_quota_us: u64,
    pub cpu_period_us: u64,
    /// Bytes per second on the data disk, each way; `None` is no limit of its own.
    pub io_bytes_per_second: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// `NOFILE`, `CORE`, `MEMLOCK`, `MSGQUEUE`, `RTPRIO`, `NICE`.
    pub name: String,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkPlan {
    /// An empty namespace whose only interface is `lo`; agentd listens on 127.0.0.1:7070 in it.
    LoopbackOnly,
    /// The same, and agentd's egress listens in it too ([`crate::paths::inside::EGRESS_PROXY`] and what follows it).
    /// Nothing else leads out.
    Egress {
        /// Each as [`crate::net::Rule`] is written; the number of a rule in audits is its place here.
        rules: Vec<String>,
        /// Where connections to synthetic addresses are caught: every port that a rule names, but for those on which
        /// the run's own services listen.
        capture_tcp: Vec<u16>,
        /// Of a day of UTC, by all rules together and both ways; absent is no limit. Counted by agentd's egress.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_per_day: Option<u64>,
    },
}

impl NetworkPlan {
    /// How many sockets of the egress the run has: proxy, name server twice, and one for each caught port.
    pub fn egress_sockets(&self) -> usize {
        match self {
            Self::LoopbackOnly => 0,
            Self::Egress { capture_tcp, .. } => EGRESS_FIXED_SOCKETS + capture_tcp.len(),
        }
    }
}

/// The proxy's, and the name server's for UDP and TCP.
pub const EGRESS_FIXED_SOCKETS: usize = 3;

/// The most that any plan may ask for. The compiler keeps within these, and the launcher checks them again, so
/// that agentd's word alone never takes the machine. What a machine really has is decided at admission.
pub mod ceiling {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// Less than this does not hold the jail's own pages and a static program.
    pub const MEMORY_MIN_BYTES: u64 = 4 * MIB;
    pub const MEMORY_MAX_BYTES: u64 = 256 * GIB;
    /// 64 CPUs.
    pub const CPU_PERCENT_MAX: u32 = 6_400;
    /// The jail's process and the agent's own.
    pub const PIDS_MIN: u32 = 2;
    pub const PIDS_MAX: u32 = 4_096;
    pub const DISK_MAX_BYTES: u64 = 16 * 1024 * GIB;
    pub const INODES_MAX: u64 = 100_000_000;
    pub const OPEN_FILES_MIN: u32 = 16;
    /// Times [`PIDS_MAX`] this stays below the kernel's usual `fs.file-max`.
    pub const OPEN_FILES_MAX: u32 = 65_536;
    pub const TMP_MAX_BYTES: u64 = 64 * GIB;
    /// An agent's own memories: at about 1.5 KB a record on the disk.
    pub const STORE_MAX_BYTES: u64 = 64 * GIB;
    pub const STORE_MAX_RECORDS: u64 = 10_000_000;
    pub const IO_MIN_BYTES_PER_SECOND: u64 = 64 * 1024;
    /// Children of one agent at a time, and generations: a token has at most 16 blocks.
    pub const CHILDREN_MAX: u32 = 64;
    pub const DEPTH_MAX: u32 = 8;
    /// Lists and texts of a plan: a launcher message holds them all.
    pub const MOUNTS_MAX: usize = 64;
    pub const ENV_MAX: usize = 128;
    pub const ARGS_MAX: usize = 64;
    pub const TEXT_MAX_BYTES: usize = 4_096;
    pub const NET_RULES_MAX: usize = crate::net::rule::RULES_MAX;
    pub const NET_PORTS_MAX: usize = crate::net::rule::PORTS_MAX;
    /// Of all rules together.
    pub const NET_RULES_MAX_BYTES: usize = 48 * 1024;
}

/// User quota of the agent's volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskQuota {
    pub bytes: u64,
    pub inodes: u64,
}
