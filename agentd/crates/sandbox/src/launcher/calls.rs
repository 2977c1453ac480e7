//! What is one tool call to the launcher?
//!
//! ```text
//!   Knocking (at the run's jail) ── doors ──► Raising (jail's program, in call-<n>) ── Up ──► Up (asker has the pipes)
//!        └── run ends, deadline ─────────────────┴── Failed, deadline, death ──► refused          │
//!                                                    ended: CallEnd into the asker's pipe ◄───────┘
//! ```
//!
//! Owns:   the call's process, its control socket, its cgroup, the write end of the pipe that tells of its end.
//! Always: a call lives only as long as its run and as somebody who reads of its end. What it leaves behind in its
//!         group is killed. It counts within its run's limits, and against nobody else's.
//! Never:  waits, as with runs.

use super::cgroups::CallGroup;
use super::requests::unknown;
use super::runs::{OOM_SCORE_ADJ, Phase, RAISE_LIMIT_MS, become_jail, classify};
use super::server::{Server, Source, Waits, refused_start, waiting_for, watch, wire_closed};
use super::{boot_ms, broken, refused};
use crate::jail::{Failure, FromJail, ToJail};
use crate::narrow::narrowed;
use crate::sys::{self, CloneRequest};
use crate::wire;
use agentd_domain::fault::Report;
use agentd_domain::ids::RunId;
use agentd_domain::launcher::{CallEnd, CallSpec, ExitCause, Response};
use agentd_domain::plan::SandboxPlan;
use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use std::os::fd::{AsFd, OwnedFd};

/// At once, of one run. An agent that wants more waits for one to end.
const CALLS_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Call {
    run_id: RunId,
    plan: SandboxPlan,
    group: CallGroup,
    group_fd: OwnedFd,
    state: State,
    failure: Option<Failure>,
    status: Option<i32>,
}

#[derive(Debug)]
enum State {
    Knocking {
        deadline_boot_ms: u64,
    },
    Raising {
        process: Process,
        /// `None` when it has passed: the end of the process is on its way.
        deadline_boot_ms: Option<u64>,
    },
    Up {
        process: Process,
        ended: OwnedFd,
    },
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    control: OwnedFd,
}

impl Call {
    pub(super) fn pid(&self) -> Option<Pid> {
        self.process().map(|process| process.pid)
    }

    pub(super) fn deadline_boot_ms(&self) -> Option<u64> {
        match &self.state {
            State::Knocking { deadline_boot_ms } => Some(*deadline_boot_ms),
            State::Raising { deadline_boot_ms, .. } => *deadline_boot_ms,
            State::Up { .. } => None,
        }
    }

    fn process(&self) -> Option<&Process> {
        match &self.state {
            State::Knocking { .. } => None,
            State::Raising { process, .. } | State::Up { process, .. } => Some(process),
        }
    }

    fn kill(&self) {
        let _ = self.group.kill();
        if let Some(process) = self.process() {
            let _ = sys::send_sigkill(process.pidfd.as_fd());
        }
    }

    fn end(&self) -> CallEnd {
        let counted = self.group.counted();
        let killed_for_memory = counted.killed_for_memory > 0;
        let cause = match (&self.failure, &self.state) {
            (Some(failure), _) => ExitCause::WallFailed { why: failure.to_string() },
            (None, State::Up { .. }) => classify(self.status, None, killed_for_memory),
            (None, _) if killed_for_memory => ExitCause::OutOfMemory,
            (None, _) => ExitCause::WallFailed { why: "the call ended before its walls were up".to_owned() },
        };
        CallEnd { cause, memory_peak_bytes: counted.memory_peak_bytes }
    }
}

impl Server {
    pub(super) fn start_call(&mut self, token: u64, run_id: RunId, call: &CallSpec) {
        match self.knock(run_id, call) {
            Ok(number) => self.wait(token, Waits::ForCall(number)),
            Err(report) => self.respond(token, &Response::Refused(report)),
        }
    }

    fn knock(&mut self, run_id: RunId, call: &CallSpec) -> Result<u64, Report> {
        let run = self.runs.get_mut(&run_id).ok_or_else(|| unknown(run_id))?;
        if run.stop_asked.is_some() || !matches!(run.phase, Phase::Up { .. }) {
            return Err(refused("conflict", format!("run {run_id} has not started or ends"), "wait for it"));
        }
        if self.calls.values().filter(|call| call.run_id == run_id).count() >= CALLS_MAX {
            let why = format!("run {run_id} has {CALLS_MAX} calls already");
            return Err(refused("too_many_calls", why, "wait until one of them has ended"));
        }
        let plan = narrowed(&run.plan, call)?;
        let number = self.next_token;
        let (group, group_fd) = self.hierarchy.create_call(&run.group, number, &plan.cgroup)?;
        self.next_token += 1;
        if let Err(error) = wire::send(run.control.as_fd(), &ToJail::Knock, &[]) {
            group.remove();
            let why = format!("the jail of run {run_id} does not hear: {error}");
            return Err(broken("call_failed", why, "try again"));
        }
        run.knocking.push_back(number);
        let state = State::Knocking { deadline_boot_ms: boot_ms() + RAISE_LIMIT_MS };
        self.calls.insert(number, Call { run_id, plan, group, group_fd, state, failure: None, status: None });
        Ok(number)
    }

    /// The run's jail has opened: the call's own process goes in.
    pub(super) fn enter_call(&mut self, number: Option<u64>, doors: Vec<OwnedFd>) {
        let Some(number) = number else { return };
        let Some(call) = self.calls.get_mut(&number) else { return };
        match born(&self.options.jail, call, &doors) {
            Ok(process) => {
                let watched = watch(&self.epoll, process.control.as_fd(), number);
                self.sources.insert(number, Source::Call(number));
                let deadline_boot_ms = Some(boot_ms() + RAISE_LIMIT_MS);
                call.state = State::Raising { process, deadline_boot_ms };
                if watched.is_err() {
                    call.kill();
                }
            }
            Err(why) => {
                call.failure = Some(Failure { step: "call: a process".to_owned(), why });
                self.finish_call(number);
            }
        }
    }

    pub(super) fn hear_call(&mut self, token: u64, number: u64) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        let Some(control) = call.process().map(|process| process.control.as_fd()) else { return };
        match wire::receive::<FromJail>(control) {
            Ok((FromJail::Up, fds)) => self.call_is_up(number, fds),
            Ok((FromJail::Failed { failure }, _)) => {
                call.failure.get_or_insert(failure);
            }
            Ok((FromJail::Ended { status }, _)) => call.status = Some(status),
            Ok((FromJail::Ready | FromJail::Doors, _)) => {}
            Err(error) => {
                if !error.would_block() {
                    call.kill();
                }
                // A closed socket stays readable for ever; the end of the process comes as a signal.
                if let Some(process) = call.process().filter(|process| wire_closed(process.control.as_fd())) {
                    let _ = epoll::delete(&self.epoll, &process.control);
                    self.sources.remove(&token);
                }
            }
        }
    }

    fn call_is_up(&mut self, number: u64, fds: Vec<OwnedFd>) {
        let Some(mut call) = self.calls.remove(&number) else { return };
        let State::Raising { process, .. } = call.state else {
            self.calls.insert(number, call);
            return;
        };
        let pid = process.pid.as_raw_nonzero().get();
        let told = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
        let piped = told.map_err(|error| error.to_string()).and_then(|pipe| {
            let standard: [OwnedFd; 3] = wire::exactly(fds).map_err(|error| error.to_string())?;
            Ok((pipe, standard))
        });
        match piped {
            Ok(((reader, ended), [stdin, stdout, stderr])) => {
                // Errors are reported unasked: that nobody reads any more is one (epoll_ctl(2)).
                let token = self.next_token;
                self.next_token += 1;
                let data = epoll::EventData::new_u64(token);
                let watched = epoll::add(&self.epoll, &ended, data, epoll::EventFlags::empty());
                self.sources.insert(token, Source::Asker(number));
                call.state = State::Up { process, ended };
                if watched.is_err() {
                    call.kill();
                }
                self.calls.insert(number, call);
                let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd(), reader.as_fd()];
                for token in waiting_for(&self.clients, Waits::ForCall(number)) {
                    let response = Response::CallStarted { pid };
                    let socket = self.clients.get(&token).map(|client| client.socket.as_fd());
                    let sent = socket.map(|socket| wire::send(socket, &response, &fds));
                    self.answered(token, matches!(sent, Some(Ok(()))));
                }
            }
            Err(why) => {
                call.failure.get_or_insert(Failure { step: "call: its pipes".to_owned(), why });
                call.state = State::Raising { process, deadline_boot_ms: None };
                call.kill();
                self.calls.insert(number, call);
            }
        }
    }

    /// Nobody reads of its end any more.
    pub(super) fn abandon_call(&mut self, token: u64, number: u64) {
        self.sources.remove(&token);
        if let Some(Call { state: State::Up { ended, .. }, .. }) = self.calls.get(&number) {
            let _ = epoll::delete(&self.epoll, ended);
        }
        self.kill_call(number);
    }

    pub(super) fn kill_call(&mut self, number: u64) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        call.kill();
        if let State::Knocking { .. } = call.state {
            self.refuse_call(number, "nobody waits for it any more".to_owned());
        }
    }

    pub(super) fn pass_deadlines_of_calls(&mut self, now_boot_ms: u64) {
        let due = |call: &Call| call.deadline_boot_ms().is_some_and(|due| due <= now_boot_ms);
        let late: Vec<u64> =
            self.calls.iter().filter(|(_, call)| due(call)).map(|(number, _)| *number).collect();
        for number in late {
            self.refuse_call(number, format!("it did not start within {RAISE_LIMIT_MS} ms"));
        }
    }

    /// Before it is up. The doors that may still come for it find nobody.
    fn refuse_call(&mut self, number: u64, why: String) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        call.failure.get_or_insert(Failure { step: "call".to_owned(), why });
        match &mut call.state {
            State::Knocking { .. } => self.finish_call(number),
            State::Raising { deadline_boot_ms, .. } => {
                *deadline_boot_ms = None;
                call.kill();
            }
            State::Up { .. } => {}
        }
    }

    /// Its process was reaped, or never came to be.
    pub(super) fn finish_call(&mut self, number: u64) {
        self.hear_the_last(number);
        let Some(call) = self.calls.remove(&number) else { return };
        let mut end = call.end();
        if let Some(run) = self.runs.get_mut(&call.run_id) {
            if let ExitCause::Seccomp { syscall } = &mut end.cause {
                *syscall = self.kernel_log.call_of(run.plan.uid);
            }
            run.killed_in_calls += call.group.counted().killed_for_memory;
        }
        self.sources
            .retain(|_, source| !matches!(source, Source::Call(of) | Source::Asker(of) if *of == number));
        match &call.state {
            State::Up { ended, .. } => {
                // It fits: a pipe takes this much in one piece, and nothing was written before (pipe(7)).
                let _ = rustix::io::write(ended, &serde_json::to_vec(&end).unwrap_or_default());
            }
            State::Knocking { .. } | State::Raising { .. } => {
                let report = refused_start(&end.cause);
                for token in waiting_for(&self.clients, Waits::ForCall(number)) {
                    self.respond(token, &Response::Refused(report.clone()));
                }
            }
        }
        let _ = call.group.kill();
        self.buried_calls.push(call.group);
    }

    /// What was said last may still be in the socket: a call may end at once.
    fn hear_the_last(&mut self, number: u64) {
        // Up, Failed, Ended: there is no more that it could say.
        for _ in 0..3 {
            self.hear_call(number, number);
        }
    }

    /// The run is over: the kernel has killed what was in its pid namespace, and the rest goes here.
    pub(super) fn end_calls_of(&mut self, run_id: RunId) {
        let numbers: Vec<u64> =
            self.calls.iter().filter(|(_, call)| call.run_id == run_id).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(call) = self.calls.get_mut(&number) else { continue };
            call.kill();
            if let State::Knocking { .. } = call.state {
                self.refuse_call(number, "its run has ended".to_owned());
            } else if let Some(run) = self.runs.get_mut(&run_id) {
                run.killed_in_calls += call.group.counted().killed_for_memory;
            }
        }
    }
}

/// A process of the jail's program in the call's group, told what to do.
fn born(program: &std::path::Path, call: &Call, doors: &[OwnedFd]) -> Result<Process, String> {
    let (control, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| error.to_string())?;
    let request = CloneRequest { namespaces: 0, cgroup: Some(call.group_fd.as_fd()) };
    let (pid, pidfd) =
        sys::spawn(request, || become_jail(program, theirs.as_fd())).map_err(|error| error.to_string())?;
    let process = Process { pid, pidfd, control };
    let told = std::fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()), OOM_SCORE_ADJ)
        .map_err(|error| format!("oom_score_adj: {error}"))
        .and_then(|()| {
            let message = ToJail::Call(Box::new(call.plan.clone()));
            wire::send(process.control.as_fd(), &message, &wire::borrowed(doors))
                .map_err(|error| error.to_string())
        })
        .and_then(|()| {
            rustix::fs::fcntl_setfl(&process.control, rustix::fs::OFlags::NONBLOCK)
                .map_err(|error| error.to_string())
        });
    match told {
        Ok(()) => Ok(process),
        Err(why) => {
            let _ = sys::send_sigkill(process.pidfd.as_fd());
            Err(why)
        }
    }
}
