//! What is one run to the launcher?
//!
//! ```text
//!   Raising (client waits, deadline) ── Up ──► Up (sockets) ── process reaped ──► record, cgroup removed
//!        └── Failed, deadline, death ─────────────────────────► record WallFailed, client refused
//! ```
//!
//! Owns:  the jail's process, its control socket, copies of the run's sockets, its cgroup.
//! Never: waits. Everything here returns at once; [`super::server`] calls when something has happened.

use super::cgroups::{Counted, Hierarchy, RunGroup};
use super::kernel_log::KernelLog;
use super::{Options, boot_ms, broken, device_limits};
use crate::jail::{CONTROL_FD, Failure, FromJail, JailSpec, ToJail};
use crate::lower::Lowered;
use crate::sys::{self, CloneRequest};
use crate::wire;
use agentd_domain::enforcement::DeviceLimit;
use agentd_domain::fault::Report;
use agentd_domain::ids::RunId;
use agentd_domain::launcher::{ExitCause, ExitRecord, Forbidden, KillReason, RunInfo};
use agentd_domain::nodes::Given;
use agentd_domain::plan::SandboxPlan;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, set_parent_process_death_signal};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Raising all walls takes milliseconds; a minute of memory pressure on a small machine is still covered.
pub(super) const RAISE_LIMIT_MS: u64 = 10_000;
/// Higher than anything of the system, so that the machine's memory killer takes agents first.
pub(super) const OOM_SCORE_ADJ: &str = "500";
/// The descriptors that every jail sends with `Up`; those of the egress follow.
const JAIL_FDS: usize = 4;

const NAMESPACES: i32 = libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

#[derive(Debug)]
pub(super) struct Run {
    pub run_id: RunId,
    pub plan: SandboxPlan,
    pub pid: Pid,
    pub pidfd: OwnedFd,
    pub control: OwnedFd,
    pub group: RunGroup,
    pub phase: Phase,
    pub started_boot_ms: u64,
    pub frozen: bool,
    /// Asked to stop: when the rest is killed.
    pub kill_at_boot_ms: Option<u64>,
    /// Why it was asked to stop, first.
    pub stop_asked: Option<KillReason>,
    /// Calls that wait for the doors, in the order in which the jail was asked.
    pub knocking: VecDeque<u64>,
    /// Processes that the memory killer took in calls that are over: their groups count for the run's too.
    pub killed_in_calls: u64,
    failure: Option<Failure>,
    status: Option<i32>,
}

#[derive(Debug)]
pub(super) enum Phase {
    Raising {
        deadline_boot_ms: u64,
    },
    /// In the order of `FromJail::Up`: those of every run, then those of the egress.
    Up {
        sockets: [OwnedFd; JAIL_FDS],
        egress: Vec<OwnedFd>,
    },
}

/// What a message of the jail means for whoever waits for it.
#[derive(Debug)]
pub(super) enum Progress {
    Nothing,
    /// The jail waits for the last limits.
    Ready,
    /// All walls are up.
    Started,
    /// The run's namespaces, for the call that has waited longest.
    Doors(Vec<OwnedFd>),
    /// The jail has no more to say.
    Silent,
}

/// What holds the run's processes to its share of a device.
fn device_limits_of(plan: &SandboxPlan) -> Vec<DeviceLimit> {
    let given = plan.device.as_ref().and_then(|wish| wish.given.as_ref());
    given.and_then(|given| given.limit()).cloned().into_iter().collect()
}

/// Where a run is born: in namespaces and a group of its own.
#[cfg(not(feature = "walls-can-be-lowered"))]
fn birth<'g>(_: &Lowered, _: &Options, _: &SandboxPlan, group: BorrowedFd<'g>) -> CloneRequest<'g> {
    CloneRequest { namespaces: NAMESPACES, cgroup: Some(group) }
}

#[cfg(feature = "walls-can-be-lowered")]
fn birth<'g>(
    lowered: &Lowered,
    options: &Options,
    plan: &SandboxPlan,
    group: BorrowedFd<'g>,
) -> CloneRequest<'g> {
    use crate::lower::{self, Wall};
    if lowered.lacks(Wall::Quota)
        && let Err(error) = lower::lift_quota(&options.data_dir, plan.uid)
    {
        eprintln!("agent-launcher: the quota could not be lifted: {error}");
    }
    let cgroup = (!lowered.lacks(Wall::Cgroup)).then_some(group);
    CloneRequest { namespaces: lowered.namespaces(NAMESPACES), cgroup }
}

impl Run {
    pub(super) fn start(
        options: &Options,
        hierarchy: &Hierarchy,
        run_id: RunId,
        plan: SandboxPlan,
    ) -> Result<Self, Report> {
        let failed = |what: &'static str| {
            move |error: rustix::io::Errno| {
                broken(
                    "start_failed",
                    format!("{what}: {error}"),
                    "try again; if it stays, restart the appliance",
                )
            }
        };
        let lowered = Lowered::of(&plan);
        let (group, group_fd) = hierarchy.create_run(plan.agent_id, run_id, &plan.cgroup)?;
        if let Err(report) = device_limits::set_all(options, &device_limits_of(&plan), group.folder()) {
            group.remove();
            return Err(report);
        }
        let flags = SocketFlags::CLOEXEC;
        let started = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(failed("no socket for the jail"))
            .and_then(|(control, theirs)| {
                let request = birth(&lowered, options, &plan, group_fd.as_fd());
                let born = sys::spawn(request, || become_jail(&options.jail, theirs.as_fd()));
                born.map(|(pid, pidfd)| (control, pid, pidfd))
                    .map_err(failed("no process in fresh namespaces"))
            });
        let (control, pid, pidfd) = match started {
            Ok(started) => started,
            Err(report) => {
                device_limits::clear_all(options, &device_limits_of(&plan), group.folder());
                group.remove();
                return Err(report);
            }
        };
        let run = Self {
            run_id,
            plan,
            pid,
            pidfd,
            control,
            group,
            phase: Phase::Raising { deadline_boot_ms: boot_ms() + RAISE_LIMIT_MS },
            started_boot_ms: boot_ms(),
            frozen: false,
            kill_at_boot_ms: None,
            stop_asked: None,
            knocking: VecDeque::new(),
            killed_in_calls: 0,
            failure: None,
            status: None,
        };
        Ok(run.instructed(options))
    }

    /// The plan goes to the jail. What fails here ends the run in the ordinary way, through its exit record.
    fn instructed(mut self, options: &Options) -> Self {
        let spec = JailSpec {
            plan: self.plan.clone(),
            data_dir: Options::text(&options.data_dir),
            root_mountpoint: Options::text(&options.run_dir.join("newroot")),
        };
        let sent =
            std::fs::write(format!("/proc/{}/oom_score_adj", self.pid.as_raw_nonzero()), OOM_SCORE_ADJ)
                .map_err(|error| format!("oom_score_adj: {error}"))
                .and_then(|()| {
                    wire::send(self.control.as_fd(), &ToJail::Spec(Box::new(spec)), &[])
                        .map_err(|error| error.to_string())
                })
                .and_then(|()| {
                    rustix::fs::fcntl_setfl(&self.control, rustix::fs::OFlags::NONBLOCK)
                        .map_err(|error| error.to_string())
                });
        if let Err(why) = sent {
            self.fail("instruct the jail", why);
        }
        self
    }

    /// Takes what the jail has said. Call when its socket is readable and once more after its end.
    pub(super) fn listen(&mut self) -> Progress {
        match wire::receive::<FromJail>(self.control.as_fd()) {
            Ok((FromJail::Up, fds)) => match self.sockets(fds) {
                Some(phase) => {
                    self.phase = phase;
                    Progress::Started
                }
                None => {
                    self.fail(
                        "take the run's sockets",
                        "the jail sent another number of descriptors".to_owned(),
                    );
                    Progress::Nothing
                }
            },
            Ok((FromJail::Ready, _)) => Progress::Ready,
            Ok((FromJail::Doors, doors)) => Progress::Doors(doors),
            Ok((FromJail::Failed { failure }, _)) => {
                self.failure.get_or_insert(failure);
                Progress::Nothing
            }
            Ok((FromJail::Ended { status }, _)) => {
                self.status = Some(status);
                Progress::Nothing
            }
            Err(error) if error.would_block() => Progress::Silent,
            Err(_) => {
                // Without its jail a run has no reaper; it is about to end, or must.
                self.kill_now();
                Progress::Silent
            }
        }
    }

    /// The last limit, and the word that the agent's process waits for.
    pub(super) fn go(&mut self, hierarchy: &Hierarchy) {
        let told =
            hierarchy.set_cpu(&self.group, &self.plan.cgroup).map_err(|report| report.to_string()).and_then(
                |()| wire::send(self.control.as_fd(), &ToJail::Go, &[]).map_err(|error| error.to_string()),
            );
        if let Err(why) = told {
            self.fail("limit the processor", why);
        }
    }

    /// Nothing unless there are as many as the plan says.
    fn sockets(&self, mut fds: Vec<OwnedFd>) -> Option<Phase> {
        let egress = fds.split_off(JAIL_FDS.min(fds.len()));
        let sockets = fds.try_into().ok()?;
        (egress.len() == self.plan.network.egress_sockets()).then_some(Phase::Up { sockets, egress })
    }

    /// Its process is gone: nobody is held by the limits any more, and some drivers keep a group that has one.
    pub(super) fn free_device(&self, options: &Options) {
        device_limits::clear_all(options, &device_limits_of(&self.plan), self.group.folder());
    }

    fn fail(&mut self, step: &str, why: String) {
        self.failure.get_or_insert(Failure { step: step.to_owned(), why });
        self.kill_now();
    }

    /// SIGTERM to the agent now, SIGKILL to everything later. A frozen agent could not act on the first.
    pub(super) fn stop(&mut self, grace_ms: u64, why: KillReason) {
        self.stop_asked.get_or_insert(why);
        let told = grace_ms > 0
            && !self.frozen
            && matches!(self.phase, Phase::Up { .. })
            && wire::send(self.control.as_fd(), &ToJail::Terminate, &[]).is_ok();
        if told {
            let at = boot_ms() + grace_ms;
            // A second request may shorten the time and never lengthens it.
            self.kill_at_boot_ms = Some(self.kill_at_boot_ms.map_or(at, |earlier| earlier.min(at)));
        } else {
            self.kill_now();
        }
    }

    pub(super) fn kill_now(&mut self) {
        self.kill_at_boot_ms = None;
        // Both, because either alone may be impossible: the group's file without cgroup v2's kill, the pidfd never.
        let _ = self.group.kill();
        let _ = sys::send_sigkill(self.pidfd.as_fd());
    }

    /// When something must be done about this run even if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<u64> {
        match self.phase {
            Phase::Raising { deadline_boot_ms } => Some(deadline_boot_ms),
            Phase::Up { .. } => self.kill_at_boot_ms,
        }
    }

    pub(super) fn deadline_passed(&mut self) {
        if let Phase::Raising { .. } = self.phase {
            // Reported once: the phase ends with the process, and until then only this deadline is looked at again.
            self.phase = Phase::Raising { deadline_boot_ms: u64::MAX };
            self.fail("raise the walls", format!("the jail did not finish within {RAISE_LIMIT_MS} ms"));
        } else {
            self.kill_now();
        }
    }

    fn given(&self) -> Option<&Given> {
        self.plan.device.as_ref()?.given.as_ref()
    }

    pub(super) fn has_node(&self, path: &str) -> bool {
        self.given().is_some_and(|given| given.nodes.iter().any(|node| node == path))
    }

    /// Nodes that nobody else may open while it lives.
    pub(super) fn exclusive_nodes(&self) -> impl Iterator<Item = &String> {
        self.given().into_iter().flat_map(Given::exclusive)
    }

    pub(super) fn has_exclusive(&self, path: &str) -> bool {
        self.exclusive_nodes().any(|node| node == path)
    }

    /// The descriptors of `HANDOVER_FDS` and the egress's; `None` while the walls are not up.
    pub(super) fn handover(&self) -> Option<Vec<BorrowedFd<'_>>> {
        match &self.phase {
            Phase::Raising { .. } => None,
            Phase::Up { sockets, egress } => {
                let own = sockets.iter().chain([&self.pidfd]).chain(egress);
                Some(own.map(AsFd::as_fd).collect())
            }
        }
    }

    pub(super) fn info(&self, log: &KernelLog) -> RunInfo {
        RunInfo {
            run_id: self.run_id,
            agent_id: self.plan.agent_id,
            uid: self.plan.uid,
            pid: self.pid.as_raw_nonzero().get(),
            frozen: self.frozen,
            api: self.plan.api.clone(),
            cgroup: Some(self.plan.cgroup.clone()),
            started_boot_ms: self.started_boot_ms,
            forbidden: log.deaths_of(self.plan.uid),
        }
    }

    /// The record of a run whose jail has been reaped.
    pub(super) fn record(&self, log: &mut KernelLog) -> ExitRecord {
        let mut counted = self.group.counted();
        counted.killed_for_memory = counted.killed_for_memory.saturating_sub(self.killed_in_calls);
        let mut cause = self.cause(counted);
        let own = u64::from(matches!(cause, ExitCause::Seccomp { .. }));
        if let ExitCause::Seccomp { syscall } = &mut cause {
            *syscall = log.call_of(self.plan.uid);
        } else {
            log.read_on();
        }
        // Its own death is the last of them.
        let forbidden = log.deaths_of(self.plan.uid).and_then(|all| {
            let processes = all.processes.saturating_sub(own);
            (processes > 0).then_some(Forbidden { processes, ..all })
        });
        ExitRecord {
            run_id: self.run_id,
            agent_id: self.plan.agent_id,
            cause,
            started_boot_ms: self.started_boot_ms,
            ended_boot_ms: boot_ms(),
            memory_peak_bytes: counted.memory_peak_bytes,
            forbidden,
        }
    }

    fn cause(&self, counted: Counted) -> ExitCause {
        if let Some(failure) = &self.failure {
            return ExitCause::WallFailed { why: failure.to_string() };
        }
        if let Phase::Raising { .. } = self.phase {
            return if counted.killed_for_memory > 0 {
                ExitCause::OutOfMemory
            } else {
                ExitCause::WallFailed { why: "the jail ended before the walls were up".to_owned() }
            };
        }
        classify(self.status, self.stop_asked, counted.killed_for_memory > 0)
    }
}

/// What the end of a run that had started means. `status` is absent when the jail was killed with its agent.
pub(super) fn classify(
    status: Option<i32>,
    stop_asked: Option<KillReason>,
    killed_for_memory: bool,
) -> ExitCause {
    let signal = match status {
        Some(status) if libc::WIFEXITED(status) => {
            return match stop_asked {
                Some(why) => asked(why),
                None => ExitCause::Exited { code: libc::WEXITSTATUS(status) },
            };
        }
        Some(status) if libc::WIFSIGNALED(status) => libc::WTERMSIG(status),
        _ => libc::SIGKILL,
    };
    match (signal, stop_asked) {
        (libc::SIGKILL, _) if killed_for_memory => ExitCause::OutOfMemory,
        (_, Some(why)) => asked(why),
        (libc::SIGSYS, None) => ExitCause::Seccomp { syscall: None },
        (signal, None) => ExitCause::Signalled { signal },
    }
}

fn asked(why: KillReason) -> ExitCause {
    match why {
        KillReason::Order => ExitCause::Stopped,
        KillReason::Pressure => ExitCause::Pressure,
        KillReason::Stuck => ExitCause::Stuck,
    }
}

/// In the new process, which is pid 1 of its namespace: becomes the jail's program or exits.
pub(super) fn become_jail(program: &Path, control: BorrowedFd<'_>) -> i32 {
    let ready = set_parent_process_death_signal(Some(Signal::KILL))
        .and_then(|()| silence())
        .and_then(|()| sys::place_fd(control, CONTROL_FD))
        .and_then(|()| sys::close_from(CONTROL_FD + 1))
        .and_then(|()| sys::unblock_all());
    if ready.is_ok() {
        // Only returns on failure; the launcher sees the control socket's end.
        let _ = Command::new(program).env_clear().exec();
    }
    127
}

/// A jail says everything over its control socket; the launcher's log is not for it.
fn silence() -> Result<(), rustix::io::Errno> {
    let nothing = openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    (0..3).try_for_each(|number| sys::place_fd(nothing.as_fd(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNALLED_SYS: i32 = libc::SIGSYS;
    const SIGNALLED_KILL: i32 = libc::SIGKILL;
    const EXITED_3: i32 = 3 << 8;

    #[test]
    fn the_end_of_a_run_is_told_by_status_request_and_counters() {
        assert_eq!(classify(Some(EXITED_3), None, false), ExitCause::Exited { code: 3 });
        assert_eq!(classify(Some(EXITED_3), Some(KillReason::Order), false), ExitCause::Stopped);
        assert_eq!(classify(Some(SIGNALLED_SYS), None, false), ExitCause::Seccomp { syscall: None });
        assert_eq!(
            classify(Some(libc::SIGSEGV), None, false),
            ExitCause::Signalled { signal: libc::SIGSEGV }
        );
        assert_eq!(classify(Some(SIGNALLED_KILL), None, true), ExitCause::OutOfMemory);
        assert_eq!(classify(None, None, true), ExitCause::OutOfMemory);
        assert_eq!(classify(None, Some(KillReason::Order), false), ExitCause::Stopped);
        assert_eq!(classify(None, None, false), ExitCause::Signalled { signal: libc::SIGKILL });
        assert_eq!(classify(None, Some(KillReason::Pressure), false), ExitCause::Pressure);
        assert_eq!(classify(Some(libc::SIGTERM), Some(KillReason::Stuck), false), ExitCause::Stuck);
        // One child of the agent was killed for memory earlier; the agent itself ended well.
        assert_eq!(classify(Some(0), None, true), ExitCause::Exited { code: 0 });
    }
}
