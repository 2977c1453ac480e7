//! In which order does the launcher do what?
//!
//! One loop over epoll: the listening socket, the clients' sockets, the jails' control sockets, and signals. After
//! each round it looks at deadlines. Nothing in the loop waits for a child but
//! the bounded waits for an engine's exec and for a driver's answer about a limit.
//!
//! Always: a client has at most one open request; while it waits for a start, nothing is read from it.
//! Always: a peer that is not agentd's uid gets one refusal and is closed; what it says is not looked at.

use super::calls::Call;
use super::cgroups::{self, CallGroup, Hierarchy, RunGroup};
use super::confine::{ConfineError, confine};
use super::engines::Engine;
use super::kernel_log::KernelLog;
use super::records::Records;
use super::runs::{Progress, Run};
use super::volumes::{self, Removal};
use super::{Options, boot_ms, broken, refused};
use crate::landlock;
use crate::sys::SignalFd;
use crate::wire::{self, WireError};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{ExitCause, KillReason, Request, Response};
use rustix::event::{Timespec, epoll};
use rustix::fs::{Gid, Mode, Uid, chmod, chown};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with, sockopt,
};
use rustix::process::{Pid, WaitOptions, wait};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// agentd opens a few at once; more are a mistake, and each holds a descriptor of ours.
pub(super) const CLIENTS_MAX: usize = 32;
/// Thousands of agents on a large machine; each costs the launcher eight descriptors.
pub(super) const RUNS_MAX: usize = 4_096;
pub(super) const ENGINES_MAX: usize = 64;
pub(super) const GRACE_MAX_MS: u32 = 60_000;
/// When init stops the launcher, agentd has already stopped what wanted more time.
const SHUTDOWN_GRACE_MS: u64 = 1_000;
/// A listing's part stays well below one packet.
pub(super) const LISTING_BYTES: usize = agentd_domain::launcher::MAX_MESSAGE_BYTES / 2;
/// Groups whose last process is still dying are tried again after this.
const GRAVEYARD_MS: u64 = 20;

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const FIRST_FREE: u64 = 2;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{path}: {source}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("the launcher's socket {path}: {source}")]
    Socket { path: PathBuf, source: Errno },
    #[error("waiting for events: {source}")]
    Poll { source: Errno },
    #[error(transparent)]
    Confine(#[from] ConfineError),
}

pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) waits: Waits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// Nothing: its next request may be read.
    No,
    /// For the refusal that a stranger gets: it comes after its first packet, because closing a socket with unread
    /// data would throw the refusal away.
    Stranger,
    ForRun(RunId),
    ForRemoval(AgentId),
    ForCall(u64),
}

pub(super) enum Source {
    Client,
    Jail(RunId),
    /// The control socket of a call.
    Call(u64),
    /// The pipe that tells of a call's end; what it says is that nobody listens any more.
    Asker(u64),
}

pub(super) struct Server {
    pub(super) options: Options,
    pub(super) hierarchy: Hierarchy,
    pub(super) problems: Vec<Report>,
    pub(super) epoll: OwnedFd,
    pub(super) listener: OwnedFd,
    pub(super) signals: SignalFd,
    pub(super) next_token: u64,
    pub(super) sources: BTreeMap<u64, Source>,
    pub(super) clients: BTreeMap<u64, Client>,
    pub(super) runs: BTreeMap<RunId, Run>,
    /// By numbers that are never used again.
    pub(super) calls: BTreeMap<u64, Call>,
    pub(super) engines: BTreeMap<String, Engine>,
    pub(super) records: Records,
    pub(super) removals: VecDeque<Removal>,
    pub(super) buried_runs: Vec<RunGroup>,
    pub(super) buried_calls: Vec<CallGroup>,
    pub(super) buried_engines: Vec<PathBuf>,
    pub(super) stopping: bool,
    pub(super) kernel_log: KernelLog,
}

/// Serves until SIGTERM, which ends every run and engine first.
pub fn serve(options: Options) -> Result<(), ServeError> {
    let mut server = Server::open(options)?;
    confine_unless_lowered()?;
    loop {
        server.round()?;
        if server.stopping
            && server.runs.is_empty()
            && server.engines.values().all(|engine| engine.pid().is_none())
        {
            return Ok(());
        }
    }
}

#[cfg(not(feature = "walls-can-be-lowered"))]
fn confine_unless_lowered() -> Result<(), ConfineError> {
    confine()
}

#[cfg(feature = "walls-can-be-lowered")]
fn confine_unless_lowered() -> Result<(), ConfineError> {
    if crate::lower::launcher_is_unconfined() {
        crate::lower::soften_kernel();
        return Ok(());
    }
    confine()
}

impl Server {
    fn open(options: Options) -> Result<Self, ServeError> {
        let folder = |path: &Path, source| ServeError::Folder { path: path.to_owned(), source };
        let records_folder = options.run_dir.join("runs");
        // The empty folder for new roots belongs to root alone; the others may be entered by agentd.
        let folders = [
            (options.run_dir.clone(), 0o750),
            (options.run_dir.join("engines"), 0o750),
            (records_folder.clone(), 0o750),
            (options.run_dir.join("newroot"), 0o700),
        ];
        for (path, mode) in folders {
            make_folder(&path, mode, options.agentd_uid).map_err(|source| folder(&path, source))?;
        }
        let records =
            Records::load(records_folder.clone()).map_err(|source| folder(&records_folder, source))?;
        let (hierarchy, mut problems) = Hierarchy::prepare(&options);
        problems.extend(missing_walls());
        for problem in &problems {
            eprintln!("agent-launcher: {problem}");
        }
        let removals = volumes::unfinished_removals(&options);
        let path = options.run_dir.join("launcher.sock");
        let socket = |source| ServeError::Socket { path: path.clone(), source };
        let listener = listen_at(&path, options.agentd_uid).map_err(socket)?;
        let poll = |source| ServeError::Poll { source };
        let signals = SignalFd::new(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT]).map_err(poll)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(poll)?;
        watch(&epoll, listener.as_fd(), LISTENER).map_err(poll)?;
        watch(&epoll, signals.as_fd(), SIGNALS).map_err(poll)?;
        Ok(Self {
            options,
            hierarchy,
            problems,
            epoll,
            listener,
            signals,
            next_token: FIRST_FREE,
            sources: BTreeMap::new(),
            clients: BTreeMap::new(),
            runs: BTreeMap::new(),
            calls: BTreeMap::new(),
            engines: BTreeMap::new(),
            records,
            removals,
            buried_runs: Vec::new(),
            buried_calls: Vec::new(),
            buried_engines: Vec::new(),
            stopping: false,
            kernel_log: KernelLog::open(),
        })
    }

    fn round(&mut self) -> Result<(), ServeError> {
        let timeout = self.timeout();
        let mut events = Vec::with_capacity(64);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(source) => return Err(ServeError::Poll { source }),
        }
        for event in &events {
            match event.data.u64() {
                LISTENER => self.accept(),
                SIGNALS => self.take_signals(),
                token => self.ready(token),
            }
        }
        self.pass_deadlines();
        self.remove_a_little();
        self.buried_calls.retain(|group| !group.remove());
        self.buried_runs.retain(|group| !group.remove());
        self.buried_engines.extend(self.engines.values_mut().flat_map(Engine::take_left));
        self.buried_engines.retain(|group| !cgroups::remove_engine(group));
        Ok(())
    }

    /// `None` waits for ever: nothing is due.
    fn timeout(&self) -> Option<Timespec> {
        if !self.removals.is_empty() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let now = boot_ms();
        let buried =
            !self.buried_runs.is_empty() || !self.buried_calls.is_empty() || !self.buried_engines.is_empty();
        let runs = self.runs.values().filter_map(Run::next_deadline);
        let runs = runs.chain(self.calls.values().filter_map(Call::deadline_boot_ms));
        let engines = self.engines.values().filter_map(|engine| engine.due_boot_ms);
        let due = runs.chain(engines).chain(buried.then_some(now + GRAVEYARD_MS)).min()?;
        // One millisecond more, so that the deadline has passed when the wait ends.
        let wait_ms = due.saturating_sub(now).saturating_add(1).min(3_600_000);
        Some(Timespec { tv_sec: (wait_ms / 1_000) as i64, tv_nsec: (wait_ms % 1_000 * 1_000_000) as i64 })
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = accept_with(&self.listener, flags) {
            let peer = sockopt::socket_peercred(&socket).map(|peer| peer.uid.as_raw());
            let known = peer == Ok(self.options.agentd_uid);
            let token = self.next_token;
            if self.clients.len() >= CLIENTS_MAX || watch(&self.epoll, socket.as_fd(), token).is_err() {
                continue;
            }
            self.next_token += 1;
            self.sources.insert(token, Source::Client);
            self.clients
                .insert(token, Client { socket, waits: if known { Waits::No } else { Waits::Stranger } });
        }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            if matches!(i32::try_from(signal), Ok(libc::SIGTERM | libc::SIGINT)) {
                self.stop_everything();
            }
        }
        while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
            self.reaped(pid);
        }
    }

    fn stop_everything(&mut self) {
        self.stopping = true;
        for run in self.runs.values_mut() {
            run.stop(SHUTDOWN_GRACE_MS, KillReason::Order);
        }
        for engine in self.engines.values_mut() {
            engine.stop();
        }
    }

    fn reaped(&mut self, pid: Pid) {
        if let Some(run_id) = self.runs.values().find(|run| run.pid == pid).map(|run| run.run_id) {
            self.finish_run(run_id);
            return;
        }
        if let Some(call) = self.calls.iter().find(|(_, call)| call.pid() == Some(pid)).map(|(call, _)| *call)
        {
            return self.finish_call(call);
        }
        let stopping = self.stopping;
        if let Some(engine) = self.engines.values_mut().find(|engine| engine.pid() == Some(pid)) {
            engine.ended(&self.options);
            if stopping {
                engine.due_boot_ms = None;
            }
        }
    }

    fn ready(&mut self, token: u64) {
        match self.sources.get(&token) {
            None => {}
            Some(Source::Client) => self.serve_client(token),
            Some(Source::Jail(run_id)) => {
                let run_id = *run_id;
                self.hear_jail(token, run_id);
            }
            Some(Source::Call(call)) => {
                let call = *call;
                self.hear_call(token, call);
            }
            Some(Source::Asker(call)) => {
                let call = *call;
                self.abandon_call(token, call);
            }
        }
    }

    fn hear_jail(&mut self, token: u64, run_id: RunId) {
        let Some(run) = self.runs.get_mut(&run_id) else { return };
        loop {
            match run.listen() {
                Progress::Nothing => {}
                Progress::Ready => run.go(&self.hierarchy),
                Progress::Started => break,
                Progress::Doors(doors) => {
                    let next = run.knocking.pop_front();
                    return self.enter_call(next, doors);
                }
                Progress::Silent => {
                    // A closed socket stays readable for ever; the end of the process comes as a signal.
                    if wire_closed(run.control.as_fd()) {
                        let _ = epoll::delete(&self.epoll, &run.control);
                        self.sources.remove(&token);
                    }
                    return;
                }
            }
        }
        self.answer_start(run_id);
    }

    /// The run is up: whoever waits for it gets its descriptors.
    fn answer_start(&mut self, run_id: RunId) {
        let Some(run) = self.runs.get(&run_id) else { return };
        let Some(fds) = run.handover() else { return };
        let response =
            Response::Started { pid: run.pid.as_raw_nonzero().get(), network: run.plan.network.clone() };
        let sent: Vec<(u64, bool)> = waiting_for(&self.clients, Waits::ForRun(run_id))
            .into_iter()
            .filter_map(|token| {
                let client = self.clients.get(&token)?;
                Some((token, wire::send(client.socket.as_fd(), &response, &fds).is_ok()))
            })
            .collect();
        for (token, sent) in sent {
            self.answered(token, sent);
        }
    }

    fn finish_run(&mut self, run_id: RunId) {
        // What the jail said last may still be in its socket, even that it has started: an agent may end at once.
        loop {
            match self.runs.get_mut(&run_id).map(Run::listen) {
                Some(Progress::Started) => self.answer_start(run_id),
                Some(Progress::Nothing | Progress::Ready | Progress::Doors(_)) => {}
                Some(Progress::Silent) | None => break,
            }
        }
        self.end_calls_of(run_id);
        let Some(run) = self.runs.remove(&run_id) else { return };
        run.free_device(&self.options);
        let record = run.record(&mut self.kernel_log);
        if let Err(error) = self.records.add(record.clone()) {
            eprintln!("agent-launcher: the exit record of run {run_id} could not be written: {error}");
        }
        let _ = epoll::delete(&self.epoll, &run.control);
        self.sources.retain(|_, source| !matches!(source, Source::Jail(of) if *of == run_id));
        let report = refused_start(&record.cause);
        for token in waiting_for(&self.clients, Waits::ForRun(run_id)) {
            self.respond(token, &Response::Refused(report.clone()));
        }
        self.buried_runs.push(run.group);
    }

    fn serve_client(&mut self, token: u64) {
        let Some(client) = self.clients.get(&token) else { return };
        if client.waits == Waits::Stranger {
            return self.refuse_stranger(token);
        }
        if client.waits != Waits::No {
            // Only an end of the connection wakes us now. What it waits for goes on; another agentd may adopt it.
            if let Waits::ForCall(call) = client.waits {
                self.kill_call(call);
            }
            self.drop_client(token);
            return;
        }
        match wire::receive::<Request>(client.socket.as_fd()) {
            Ok((request, _)) => self.obey(token, request),
            Err(error) if error.would_block() => {}
            Err(WireError::Closed | WireError::Socket { .. }) => self.drop_client(token),
            Err(error) => {
                let code = match error {
                    WireError::TooLarge { .. } | WireError::Truncated => "too_large",
                    _ => "message_malformed",
                };
                self.respond(
                    token,
                    &Response::Refused(refused(
                        code,
                        error,
                        "agentd and the launcher must be of one version",
                    )),
                );
                self.drop_client(token);
            }
        }
    }

    fn refuse_stranger(&mut self, token: u64) {
        if let Some(client) = self.clients.get(&token) {
            let flags = rustix::net::RecvFlags::DONTWAIT | rustix::net::RecvFlags::TRUNC;
            let _ = rustix::net::recv(&client.socket, &mut [0_u8; 1], flags);
            let report = refused(
                "forbidden",
                "the launcher takes messages from agentd alone",
                "ask agentd: `agentctl` or the console",
            );
            let _ = wire::send(client.socket.as_fd(), &Response::Refused(report), &[]);
        }
        self.drop_client(token);
    }

    fn remove_a_little(&mut self) {
        let Some(mut removal) = self.removals.pop_front() else { return };
        let response = match removal.step() {
            Ok(false) => {
                self.removals.push_back(removal);
                return;
            }
            Ok(true) => Response::Done,
            Err(report) => Response::Refused(report),
        };
        for token in waiting_for(&self.clients, Waits::ForRemoval(removal.agent_id)) {
            self.respond(token, &response);
        }
    }

    fn pass_deadlines(&mut self) {
        let now = boot_ms();
        for run in self.runs.values_mut() {
            if run.next_deadline().is_some_and(|due| due <= now) {
                run.deadline_passed();
            }
        }
        self.pass_deadlines_of_calls(now);
        for engine in self.engines.values_mut() {
            if engine.due_boot_ms.is_some_and(|due| due <= now) {
                engine.restart(&self.options, &self.hierarchy);
            }
        }
    }

    pub(super) fn wait(&mut self, token: u64, waits: Waits) {
        if let Some(client) = self.clients.get_mut(&token) {
            client.waits = waits;
            // Only errors and the other side's end are reported for an empty set.
            let _ = epoll::modify(
                &self.epoll,
                &client.socket,
                epoll::EventData::new_u64(token),
                epoll::EventFlags::empty(),
            );
        }
    }

    pub(super) fn respond(&mut self, token: u64, response: &Response) {
        let sent = self.clients.get(&token).map(|client| wire::send(client.socket.as_fd(), response, &[]));
        self.answered(token, matches!(sent, Some(Ok(()))));
    }

    pub(super) fn answered(&mut self, token: u64, sent: bool) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        if !sent {
            return self.drop_client(token);
        }
        if client.waits != Waits::No {
            client.waits = Waits::No;
            let _ = epoll::modify(
                &self.epoll,
                &client.socket,
                epoll::EventData::new_u64(token),
                epoll::EventFlags::IN,
            );
        }
    }

    fn drop_client(&mut self, token: u64) {
        self.sources.remove(&token);
        // Closing takes it out of epoll: the launcher holds no copy, and its children have closed theirs.
        self.clients.remove(&token);
    }
}

pub(super) fn waiting_for(clients: &BTreeMap<u64, Client>, waits: Waits) -> Vec<u64> {
    clients.iter().filter(|(_, client)| client.waits == waits).map(|(token, _)| *token).collect()
}

pub(super) fn wire_closed(socket: BorrowedFd<'_>) -> bool {
    let mut byte = [0_u8; 1];
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    !matches!(rustix::net::recv(socket, &mut byte, flags), Err(Errno::AGAIN))
}

pub(super) fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>, token: u64) -> Result<(), Errno> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
}

/// What a start that came to nothing means to the one who asked for it.
pub(super) fn refused_start(cause: &ExitCause) -> Report {
    let (why, fix) = match cause {
        ExitCause::WallFailed { why } if why.starts_with("exec: ") => {
            let fix = "check `agent.exec`: the program must be in the package, executable, and made for this machine";
            return Report::caller("exec_failed", "the agent was not started", why.clone(), fix);
        }
        ExitCause::WallFailed { why } => {
            (why.clone(), "no agent runs without all its walls: check the kernel and its command line")
        }
        ExitCause::OutOfMemory => {
            let why = "its memory limit does not even hold the walls".to_owned();
            return Report::caller(
                "out_of_memory",
                "the agent was not started",
                why,
                "raise `limits.memory_max`",
            );
        }
        _ => ("it was stopped before it had started".to_owned(), "start it again"),
    };
    Report::environment("wall_failed", "the agent was not started", why, fix)
}

/// Walls that this kernel cannot raise at all.
fn missing_walls() -> Vec<Report> {
    let fix = "use the appliance's own kernel, and `lsm=` with `landlock` in it";
    let mut problems = Vec::new();
    if let Err(error) = landlock::require(landlock::ABI_MIN) {
        problems.push(broken("wall_missing", error, fix));
    }
    if !crate::sys::seccomp_has_errno() {
        problems.push(broken("wall_missing", "this kernel has no seccomp filters", fix));
    }
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "uts"] {
        if !Path::new("/proc/self/ns").join(namespace).exists() {
            problems.push(broken("wall_missing", format!("this kernel has no {namespace} namespaces"), fix));
        }
    }
    problems
}

fn make_folder(path: &Path, mode: u32, agentd_gid: u32) -> std::io::Result<()> {
    std::fs::create_dir_all(path)?;
    chown(path, Some(Uid::ROOT), Some(Gid::from_raw(agentd_gid)))?;
    chmod(path, Mode::from_raw_mode(mode))?;
    Ok(())
}

fn listen_at(path: &Path, agentd_gid: u32) -> Result<OwnedFd, Errno> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    chown(path, Some(Uid::ROOT), Some(Gid::from_raw(agentd_gid)))?;
    chmod(path, Mode::from_raw_mode(0o660))?;
    listen(&socket, i32::try_from(CLIENTS_MAX).unwrap_or(32))?;
    Ok(socket)
}
