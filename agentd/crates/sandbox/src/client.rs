//! How does agentd ask the launcher for something?
//!
//! Owns:  nothing but the socket's path. Every call makes a connection of its own, so calls from several threads
//!        do not wait for each other, and a launcher that was restarted is simply reached again.
//! In/out: typed methods; each blocks until the launcher has answered, at most [`ANSWER_LIMIT`].
//! From:  any thread that may block (`tokio::task::spawn_blocking`), never an async worker.
//! Never: root. The launcher checks every message again; a refusal comes back as [`LauncherError::Refused`].

use crate::wire::{self, WireError};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{CallSpec, EngineSpec, HANDOVER_FDS, KillReason, Listing, Request, Response};
use agentd_domain::paths;
use agentd_domain::plan::{CgroupLimits, DiskQuota, EGRESS_FIXED_SOCKETS, NetworkPlan, SandboxPlan};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// Longer than the launcher's own limit for raising the walls of a run (10 s), so that its answer, which names the
/// step that hangs, comes first.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// The launcher has looked at the request and says no, or could not do it.
    #[error("{0}")]
    Refused(Report),
    #[error("no connection to the launcher at {path}: {source}")]
    Unreachable { path: PathBuf, source: Errno },
    #[error("the launcher's answer did not arrive: {0}")]
    Broken(#[from] WireError),
    #[error("the launcher answered with {0}, which does not fit the question")]
    Unexpected(&'static str),
}

impl From<LauncherError> for Report {
    fn from(error: LauncherError) -> Self {
        match error {
            LauncherError::Refused(report) => report,
            LauncherError::Unexpected(_) => Self::bug(
                "launcher_protocol",
                "the launcher did not do it",
                error.to_string(),
                "agentd and the launcher are of different versions: restart the appliance",
            ),
            LauncherError::Unreachable { .. } | LauncherError::Broken(_) => Self::environment(
                "launcher_unreachable",
                "the launcher did not do it",
                error.to_string(),
                "init restarts the launcher by itself: try again; if it stays, the local console shows why",
            ),
        }
    }
}

/// What a running agent is to agentd. Dropping it ends nothing: the jail and the launcher keep their own copies.
#[derive(Debug)]
pub struct RunHandles {
    /// The jail's process in the launcher's pid namespace.
    pub pid: i32,
    pub sockets: RunSockets,
}

/// The descriptors of [`agentd_domain::launcher::HANDOVER_FDS`], in that order.
#[derive(Debug)]
pub struct RunSockets {
    /// Listens on 127.0.0.1:7070 inside the run's network namespace; non-blocking.
    pub api_tcp: OwnedFd,
    /// Listens on `/run/agentd.sock` inside the run's root; non-blocking.
    pub api_unix: OwnedFd,
    /// Read end of the agent's standard output; non-blocking, as are all copies of it.
    pub stdout: OwnedFd,
    /// Read end of its standard error; non-blocking, as are all copies of it.
    pub stderr: OwnedFd,
    /// Readable when the run has ended.
    pub pidfd: OwnedFd,
    /// Those of the egress, where the run has rules for the network.
    pub egress: Option<EgressSockets>,
}

/// What the egress serves inside a run's network namespace. All are non-blocking.
#[derive(Debug)]
pub struct EgressSockets {
    /// The plan's rules, each as [`agentd_domain::net::Rule`] is written.
    pub rules: Vec<String>,
    /// The plan's, for all rules together.
    pub bytes_per_day: Option<u64>,
    /// Listens on 127.0.0.1:7071.
    pub proxy: OwnedFd,
    /// Is bound to 127.0.0.1:53.
    pub dns_udp: OwnedFd,
    /// Listens on 127.0.0.1:53.
    pub dns_tcp: OwnedFd,
    /// Listens on the port, at every address of the namespace; synthetic addresses among them.
    pub captured: Vec<(u16, OwnedFd)>,
}

/// A call that runs. Dropping `ended` kills it, and all that it has started.
#[derive(Debug)]
pub struct CallHandles {
    /// In the launcher's pid namespace; of the process that waits for the call's program.
    pub pid: i32,
    /// Write end; non-blocking, as are the others.
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    /// One [`agentd_domain::launcher::CallEnd`] as JSON, when it is over.
    pub ended: OwnedFd,
}

/// The launcher, as agentd sees it.
#[derive(Debug, Clone)]
pub struct Launcher {
    path: PathBuf,
    /// Of every engine that is started from here.
    software_devices: bool,
}

impl Default for Launcher {
    fn default() -> Self {
        Self::at(paths::LAUNCHER_SOCKET)
    }
}

impl Launcher {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), software_devices: false }
    }

    /// What the owner wants of all engines (`[gpu] software`).
    pub fn with_software_devices(self, software_devices: bool) -> Self {
        Self { software_devices, ..self }
    }

    /// Starts a run. When this returns, all walls are up, the self-probe has broken through none of them, and the
    /// agent's program has replaced the jail's child.
    pub fn start(&self, run_id: RunId, plan: SandboxPlan) -> Result<RunHandles, LauncherError> {
        match self.call(&Request::Start { run_id, plan: Box::new(plan) })? {
            (Response::Started { pid, network }, fds) => handles(pid, network, fds),
            (other, _) => unexpected(&other),
        }
    }

    /// Starts a call in a living run. When this returns, its program is running behind all its walls.
    pub fn start_call(&self, run_id: RunId, call: CallSpec) -> Result<CallHandles, LauncherError> {
        match self.call(&Request::StartCall { run_id, call: Box::new(call) })? {
            (Response::CallStarted { pid }, fds) => {
                let [stdin, stdout, stderr, ended] = wire::exactly::<4>(fds)?;
                Ok(CallHandles { pid, stdin, stdout, stderr, ended })
            }
            (other, _) => unexpected(&other),
        }
    }

    /// The sockets of a living run again, for an agentd that was restarted.
    pub fn handover(&self, run_id: RunId) -> Result<RunHandles, LauncherError> {
        match self.call(&Request::Handover { run_id })? {
            (Response::HandedOver { pid, network }, fds) => handles(pid, network, fds),
            (other, _) => unexpected(&other),
        }
    }

    /// Everything that lives and everything that has ended and was not forgotten. Asks part by part.
    pub fn list(&self) -> Result<Listing, LauncherError> {
        let mut whole = self.list_part(None)?;
        while let Some(after) = whole.next.take() {
            let part = self.list_part(Some(after))?;
            whole.runs.extend(part.runs);
            whole.exits.extend(part.exits);
            whole.next = part.next;
        }
        Ok(whole)
    }

    fn list_part(&self, after: Option<RunId>) -> Result<Listing, LauncherError> {
        match self.call(&Request::List { after })? {
            (Response::Listing(listing), _) => Ok(listing),
            (other, _) => unexpected(&other),
        }
    }

    /// The engine's socket exists when this returns, and its process is started again whenever it ends.
    pub fn start_engine(&self, spec: EngineSpec) -> Result<i32, LauncherError> {
        let spec = EngineSpec { software_devices: self.software_devices, ..spec };
        match self.call(&Request::StartEngine(spec))? {
            (Response::EngineStarted { pid }, _) => Ok(pid),
            (other, _) => unexpected(&other),
        }
    }

    pub fn stop_engine(&self, set: &str) -> Result<(), LauncherError> {
        self.done(&Request::StopEngine { set: set.to_owned() })
    }

    pub fn change_limits(&self, run_id: RunId, cgroup: CgroupLimits) -> Result<(), LauncherError> {
        self.done(&Request::ChangeLimits { run_id, cgroup })
    }

    pub fn freeze(&self, run_id: RunId) -> Result<(), LauncherError> {
        self.done(&Request::Freeze { run_id })
    }

    pub fn thaw(&self, run_id: RunId) -> Result<(), LauncherError> {
        self.done(&Request::Thaw { run_id })
    }

    /// Returns when the launcher has taken the order; the end shows at [`RunSockets::pidfd`] and as an exit record.
    pub fn kill(&self, run_id: RunId, grace_ms: u32) -> Result<(), LauncherError> {
        self.kill_for(run_id, grace_ms, KillReason::Order)
    }

    /// The same with a reason, which its exit record will give.
    pub fn kill_for(&self, run_id: RunId, grace_ms: u32, why: KillReason) -> Result<(), LauncherError> {
        self.done(&Request::Kill { run_id, grace_ms, why })
    }

    pub fn prepare_agent(&self, agent_id: AgentId, uid: u32, quota: DiskQuota) -> Result<(), LauncherError> {
        self.done(&Request::PrepareAgent { agent_id, uid, quota })
    }

    pub fn remove_agent(&self, agent_id: AgentId, uid: u32) -> Result<(), LauncherError> {
        self.done(&Request::RemoveAgent { agent_id, uid })
    }

    pub fn forget_exit(&self, run_id: RunId) -> Result<(), LauncherError> {
        self.done(&Request::ForgetExit { run_id })
    }

    fn done(&self, request: &Request) -> Result<(), LauncherError> {
        match self.call(request)? {
            (Response::Done, _) => Ok(()),
            (other, _) => unexpected(&other),
        }
    }

    fn call(&self, request: &Request) -> Result<(Response, Vec<OwnedFd>), LauncherError> {
        let socket =
            self.open().map_err(|source| LauncherError::Unreachable { path: self.path.clone(), source })?;
        wire::send(socket.as_fd(), request, &[])?;
        match wire::receive(socket.as_fd())? {
            (Response::Refused(report), _) => Err(LauncherError::Refused(report)),
            answer => Ok(answer),
        }
    }

    fn open(&self) -> Result<OwnedFd, Errno> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
        set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_LIMIT))?;
        connect(&socket, &SocketAddrUnix::new(self.path.as_path())?)?;
        Ok(socket)
    }
}

fn handles(pid: i32, network: NetworkPlan, mut fds: Vec<OwnedFd>) -> Result<RunHandles, LauncherError> {
    let of_egress = fds.split_off(HANDOVER_FDS.len().min(fds.len()));
    let [api_tcp, api_unix, stdout, stderr, pidfd] = wire::exactly::<{ HANDOVER_FDS.len() }>(fds)?;
    let egress = egress_sockets(network, of_egress)?;
    Ok(RunHandles { pid, sockets: RunSockets { api_tcp, api_unix, stdout, stderr, pidfd, egress } })
}

fn egress_sockets(
    network: NetworkPlan,
    mut fds: Vec<OwnedFd>,
) -> Result<Option<EgressSockets>, LauncherError> {
    let count = fds.len();
    if count != network.egress_sockets() {
        return Err(WireError::TooManyFds { count }.into());
    }
    let NetworkPlan::Egress { rules, capture_tcp, bytes_per_day } = network else { return Ok(None) };
    let listeners = fds.split_off(EGRESS_FIXED_SOCKETS.min(count));
    let [proxy, dns_udp, dns_tcp] = wire::exactly::<EGRESS_FIXED_SOCKETS>(fds)?;
    let captured = capture_tcp.into_iter().zip(listeners).collect();
    Ok(Some(EgressSockets { rules, bytes_per_day, proxy, dns_udp, dns_tcp, captured }))
}

fn unexpected<T>(response: &Response) -> Result<T, LauncherError> {
    Err(LauncherError::Unexpected(match response {
        Response::Started { .. } => "started",
        Response::HandedOver { .. } => "handed_over",
        Response::CallStarted { .. } => "call_started",
        Response::EngineStarted { .. } => "engine_started",
        Response::Done => "done",
        Response::Listing(_) => "listing",
        Response::Refused(_) => "refused",
    }))
}
