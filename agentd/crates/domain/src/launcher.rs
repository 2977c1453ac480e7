//! What may agentd ask of the one process that has root?
//!
//! One JSON message per packet on a `SOCK_SEQPACKET` Unix socket, at most [`MAX_MESSAGE_BYTES`]; descriptors
//! travel as `SCM_RIGHTS`. The set is closed: whatever is not here cannot be asked for. The launcher takes
//! messages only from agentd's uid and checks every one again (uid range, paths, limits) before it acts.

use crate::enforcement::DeviceLimit;
use crate::fault::Report;
use crate::ids::{AgentId, RunId};
use crate::plan::{CgroupLimits, DiskQuota, NetworkPlan, SandboxPlan};
use serde::{Deserialize, Serialize};

/// Below the default send buffer of a Unix socket (208 KiB on Linux), so one packet always fits.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Start a run. Answered by `Started` with the descriptors of [`Handover`].
    Start {
        run_id: RunId,
        plan: Box<SandboxPlan>,
    },
    /// Start another program in a living run, in a group of its own. Answered by `CallStarted` with the descriptors
    /// of [`CALL_FDS`]. It ends with the run, and when nobody holds the read end of `ended` any more.
    StartCall {
        run_id: RunId,
        call: Box<CallSpec>,
    },
    StartEngine(EngineSpec),
    StopEngine {
        set: String,
    },
    /// New limits for a living run, within its plan.
    ChangeLimits {
        run_id: RunId,
        cgroup: CgroupLimits,
    },
    Freeze {
        run_id: RunId,
    },
    Thaw {
        run_id: RunId,
    },
    /// SIGTERM to the agent, then the whole cgroup is killed after the grace time. Answered at once; the end
    /// shows at the pidfd and as an exit record.
    Kill {
        run_id: RunId,
        grace_ms: u32,
        /// What its exit record will say.
        #[serde(default)]
        why: KillReason,
    },
    /// Make `/data/agents/<id>` with its `work` folder and user quota. Doing it twice changes nothing.
    PrepareAgent {
        agent_id: AgentId,
        uid: u32,
        quota: DiskQuota,
    },
    /// Remove `/data/agents/<id>` and its quota. Refused while a run of it lives.
    RemoveAgent {
        agent_id: AgentId,
        uid: u32,
    },
    /// The run's sockets and pipes again, for a new agentd.
    Handover {
        run_id: RunId,
    },
    /// What lives and what has ended, in the order of run ids, from the one after `after`: one packet holds a part.
    List {
        #[serde(default)]
        after: Option<RunId>,
    },
    /// agentd has stored this exit record; the launcher may drop it.
    ForgetExit {
        run_id: RunId,
    },
}

/// A tool call: what is started, and what it gets less than its run. There is no field that could give more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallSpec {
    /// Program and arguments; the program is a path inside the jail.
    pub exec: Vec<String>,
    pub workdir: String,
    /// Added to the run's own variables, or in place of those of the same name.
    pub env: Vec<(String, String)>,
    pub limits: CallLimits,
    pub work: WorkAccess,
    pub sockets: SocketAccess,
}

/// Limits of the call alone, each within the run's; what is absent is the run's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallLimits {
    pub memory_max_bytes: Option<u64>,
    pub pids_max: Option<u32>,
    /// Of one CPU.
    pub cpu_percent: Option<u32>,
}

/// What a call may do in the agent's own folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkAccess {
    Read,
    ReadWrite,
}

/// Whether a call may open sockets. With them it speaks to agentd as its agent; without it reaches nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SocketAccess {
    None,
    AsRun,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSpec {
    /// Name of the device set, `[a-z0-9-]{1,32}`: `host` for host memory.
    pub set: String,
    pub memory_max_bytes: u64,
    /// Of device memory, set before the process starts. One that cannot be set keeps it from starting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_limits: Vec<DeviceLimit>,
    /// Nodes of devices that it must not open: of those that take no work, and of agents' own programs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden: Vec<String>,
    /// Vulkan's first device is taken although it computes on the processor: what needs a GPU is tried without one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub software_devices: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Response {
    /// Descriptors attached, in the order of [`HANDOVER_FDS`].
    Started {
        pid: i32,
        /// Of the plan it was started with: says which descriptors follow the fixed ones.
        network: NetworkPlan,
    },
    HandedOver {
        pid: i32,
        network: NetworkPlan,
    },
    /// Descriptors attached, in the order of [`CALL_FDS`].
    CallStarted {
        pid: i32,
    },
    EngineStarted {
        pid: i32,
    },
    Done,
    Listing(Listing),
    Refused(Report),
}

/// The descriptors that travel with `Started` and `HandedOver`, in this order. Those of the egress follow
/// ([`NetworkPlan::egress_sockets`]): proxy, name server over UDP and over TCP, and the plan's caught ports.
pub const HANDOVER_FDS: [&str; 5] = ["api_tcp_listener", "api_unix_listener", "stdout", "stderr", "pidfd"];

/// The descriptors that travel with `CallStarted`, in this order. From `ended` one [`CallEnd`] is read as JSON, and
/// its end without one means that the launcher is gone, and the call with it.
pub const CALL_FDS: [&str; 4] = ["stdin", "stdout", "stderr", "ended"];

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallEnd {
    pub cause: ExitCause,
    pub memory_peak_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub runs: Vec<RunInfo>,
    pub engines: Vec<EngineInfo>,
    pub exits: Vec<ExitRecord>,
    /// Walls that this kernel cannot raise, found when the launcher started: with one of these no run starts.
    #[serde(default)]
    pub problems: Vec<Report>,
    /// There is more after this run id.
    #[serde(default)]
    pub next: Option<RunId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    pub run_id: RunId,
    pub agent_id: AgentId,
    pub uid: u32,
    pub pid: i32,
    pub frozen: bool,
    /// The API rights of the plan it was started with, so that an adopting agentd grants the same.
    pub api: Vec<String>,
    /// The limits of that plan: what a throttle is lifted to.
    #[serde(default)]
    pub cgroup: Option<CgroupLimits>,
    /// Boot-clock milliseconds at the start.
    pub started_boot_ms: u64,
    /// Processes of it that seccomp has killed while it lives on.
    #[serde(default)]
    pub forbidden: Option<Forbidden>,
}

/// Deaths for a system call that a run may not make, as far as the kernel's log has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forbidden {
    /// Since the run began.
    pub processes: u64,
    /// Of the last of them.
    pub syscall: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineInfo {
    pub set: String,
    /// 0 while the launcher waits before it starts the engine again.
    pub pid: i32,
    pub started_boot_ms: u64,
    /// How often the launcher has had to start it again.
    pub restarts: u32,
}

/// How a run ended. Kept in `/run/agentd/runs/<run_id>.json` until agentd has stored it. A start that was refused
/// after its process existed leaves one too (`WallFailed`), because the caller may have died meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub run_id: RunId,
    pub agent_id: AgentId,
    pub cause: ExitCause,
    pub started_boot_ms: u64,
    pub ended_boot_ms: u64,
    /// Peak of the cgroup's memory, from `memory.peak`.
    pub memory_peak_bytes: u64,
    /// Processes that seccomp killed before the run's own end.
    #[serde(default)]
    pub forbidden: Option<Forbidden>,
}

/// Why agentd ends a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KillReason {
    /// Its owner, or nobody wants it any more.
    #[default]
    Order,
    Pressure,
    Stuck,
}

impl KillReason {
    pub fn told(self) -> &'static str {
        match self {
            Self::Order => "on request",
            Self::Pressure => "memory pressure",
            Self::Stuck => "no progress",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ExitCause {
    Exited {
        code: i32,
    },
    Signalled {
        signal: i32,
    },
    /// The kernel killed it for going over `memory.max`.
    OutOfMemory,
    /// A forbidden system call that the filter answers with SIGSYS.
    /// The call, when the kernel has said which (`syscall` is its name, or its number where it has none here).
    Seccomp {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        syscall: Option<String>,
    },
    /// Killed by the pressure watchdog: it only waited for memory.
    Pressure,
    /// Killed because work waited for it and nothing came of it.
    Stuck,
    /// A wall could not be raised, or the self-probe broke through one: nothing of the agent ran.
    WallFailed {
        why: String,
    },
    /// Asked for through `Kill`.
    Stopped,
}
