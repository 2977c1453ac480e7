//! What does the jail's own process do from birth to the end of the run?
//!
//! In:     the first message says what it is for: a run of its own, or a call in one that lives ([`super::call`]).
//! States: root in fresh namespaces -> walls built, child forked -> confined (the agent's uid, no capability, no file
//!         to open, a dozen system calls) -> waits.
//! Always: it dies with the launcher (parent death signal, and the end of the control socket), and the run dies with
//!         it, because it is pid 1 of the run's pid namespace.
//! Never:  reads from the agent. The pipes' read ends go to agentd.

use super::call::{self, DOORS};
use super::child::{self, AgentChild};
use super::spec::{FromJail, JailSpec, ToJail};
use super::{Failure, step};
use super::{listeners, mounts};
use crate::lower::{Lowered, Wall};
use crate::seccomp::{self, Ioctl};
use crate::sys::{self, Forked, SignalFd};
use crate::{landlock, wire};
use agentd_domain::plan::SandboxPlan;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    DumpableBehavior, Pid, Signal, WaitOptions, set_dumpable_behavior, set_parent_process_death_signal, wait,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A failure report of the child is one short JSON object.
const FAILURE_MAX_BYTES: usize = 4_096;

/// Calls of the confined jail: wait, reap, relay. Memory and signal calls are what an allocation or abort may need.
const OWN_CALLS: &[&str] = &[
    "brk",
    "close",
    "exit",
    "exit_group",
    "futex",
    "getpid",
    "gettid",
    "kill",
    "madvise",
    "mmap",
    "mremap",
    "munmap",
    "ppoll",
    "read",
    "recvmsg",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sendmsg",
    "tgkill",
    "wait4",
    "write",
    #[cfg(target_arch = "x86_64")]
    "poll",
];

/// Runs a whole life as pid 1 of a run; gives the process's exit status.
///
/// `control` is the socket at [`super::CONTROL_FD`].
pub fn run(control: &OwnedFd) -> i32 {
    match begin(control) {
        Ok(run) => reap(control, &run),
        Err(failure) => {
            // The launcher may be gone; then nobody is left to be told.
            let _ = wire::send(control.as_fd(), &FromJail::Failed { failure }, &[]);
            1
        }
    }
}

struct Running {
    agent: Pid,
    signals: SignalFd,
    /// Namespaces of a run, for the calls that are to enter it; a call has none.
    doors: Vec<OwnedFd>,
    /// Held for the life of the run, so that connections wait while agentd is restarted.
    _kept: Vec<OwnedFd>,
}

/// The agent's program, running behind all its walls, while this process is confined itself.
pub(super) struct Launched {
    pub agent: Pid,
    pub signals: SignalFd,
    /// Write end of its standard input; dropped, the program reads the end of a file.
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

fn begin(control: &OwnedFd) -> Result<Running, Failure> {
    step("die with the launcher", set_parent_process_death_signal(Some(Signal::KILL)))?;
    step("control socket", fcntl_setfd(control, FdFlags::CLOEXEC))?;
    match step("read the plan", wire::receive(control.as_fd()))? {
        (ToJail::Spec(spec), _) => raise(control, &lowered_spec(*spec)?),
        (ToJail::Call(plan), doors) => {
            let Launched { agent, signals, .. } = call::enter(control, &plan, doors)?;
            Ok(Running { agent, signals, doors: Vec::new(), _kept: Vec::new() })
        }
        (ToJail::Terminate | ToJail::Knock | ToJail::Go, _) => {
            step("read the plan", Err("stopped before the start"))
        }
    }
}

fn raise(control: &OwnedFd, spec: &JailSpec) -> Result<Running, Failure> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let root = mounts::build(spec)?;
    if !Lowered::of(&spec.plan).lacks(Wall::UtsNamespace) {
        step("host name", rustix::system::sethostname(b"agent"))?;
    }
    step("network: lo", sys::loopback_up())?;
    let tcp = listeners::api_tcp()?;
    let unix = listeners::api_unix()?;
    let egress = listeners::egress(&spec.plan.network)?;
    root.seal()?;
    let doors = step("namespaces", open_doors())?;
    let Launched { agent, signals, stdin, stdout, stderr } =
        launch(&spec.plan, root.absent(), || ready(control))?;
    // At once: the agent reads the end of a file.
    drop((stdin, root));
    let mut kept = vec![tcp, unix, stdout, stderr];
    kept.extend(egress);
    step("tell the launcher", wire::send(control.as_fd(), &FromJail::Up, &wire::borrowed(&kept)))?;
    Ok(Running { agent, signals, doors, _kept: kept })
}

/// Nobody can open them later: this process will be undumpable, and the launcher may not trace (proc(5)).
fn open_doors() -> Result<Vec<OwnedFd>, Errno> {
    let open = |name: &&str| {
        openat(CWD, format!("/proc/self/ns/{name}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    };
    DOORS.iter().map(open).collect()
}

/// Tells the launcher that what was the appliance's own work is done, and waits until the rest is limited as the agent is.
fn ready(control: &OwnedFd) -> Result<(), Failure> {
    step("tell the launcher", wire::send(control.as_fd(), &FromJail::Ready, &[]))?;
    match step("wait for the launcher", wire::receive(control.as_fd()))? {
        (ToJail::Go, _) => Ok(()),
        _ => step("wait for the launcher", Err("it said something else")),
    }
}

/// Starts the program of a plan behind its walls, and confines the caller. `ready` comes last before the program's
/// process may go on.
pub(super) fn launch(
    plan: &SandboxPlan,
    absent: &[String],
    ready: impl FnOnce() -> Result<(), Failure>,
) -> Result<Launched, Failure> {
    let (stdout, agent_stdout) = step("pipes", pipe_with(PipeFlags::CLOEXEC))?;
    let (stderr, agent_stderr) = step("pipes", pipe_with(PipeFlags::CLOEXEC))?;
    let (agent_stdin, stdin) = step("pipes", pipe_with(PipeFlags::CLOEXEC))?;
    let (report, agent_report) = step("pipes", pipe_with(PipeFlags::CLOEXEC))?;
    let (agent_go, go) = step("pipes", pipe_with(PipeFlags::CLOEXEC))?;
    for fd in [&stdin, &stdout, &stderr] {
        step("pipes", rustix::fs::fcntl_setfl(fd, OFlags::NONBLOCK))?;
    }
    let signals = step("signals", SignalFd::new(&[libc::SIGCHLD]))?;
    let lowered = Lowered::of(plan);
    let child = AgentChild {
        plan,
        lowered: &lowered,
        absent,
        stdin: agent_stdin.as_fd(),
        stdout: agent_stdout.as_fd(),
        stderr: agent_stderr.as_fd(),
        report: agent_report.as_fd(),
        go: agent_go.as_fd(),
    };
    // Before the fork: one drops for both. The child makes sure.
    if !lowered.lacks(Wall::Capabilities) {
        step("jail: capability bounding set", sys::drop_bounding_set(0))?;
    }
    let agent = match step("fork", sys::fork())? {
        Forked::Child => sys::exit_now(child::run(&child)),
        Forked::Parent { child } => child,
    };
    drop((agent_stdin, agent_stdout, agent_stderr, agent_report, agent_go));
    confine(plan.uid, &lowered)?;
    ready()?;
    let told = rustix::io::write(&go, b"1");
    drop(go);
    // First what the agent's process says: one that has failed already no longer hears.
    wait_for_exec(&report)?;
    step("tell the agent's process to go on", told)?;
    Ok(Launched { agent, signals, stdin: Some(stdin), stdout, stderr })
}

#[cfg(not(feature = "walls-can-be-lowered"))]
fn lowered_spec(spec: JailSpec) -> Result<JailSpec, Failure> {
    Ok(spec)
}

/// What must be changed while the host's tree is still seen.
#[cfg(feature = "walls-can-be-lowered")]
fn lowered_spec(mut spec: JailSpec) -> Result<JailSpec, Failure> {
    use crate::lower;
    use agentd_domain::paths::inside;
    use std::path::Path;
    let lowered = Lowered::of(&spec.plan);
    if lowered.lacks(Wall::Uid) {
        let work = lower::outside(&spec.plan, &spec.data_dir, inside::WORK);
        spec.plan.uid = lowered.uid(&spec.plan, &spec.data_dir);
        let owner = Some(spec.plan.uid);
        step("lowered: uid", std::os::unix::fs::chown(Path::new(&work), owner, owner))?;
    }
    if lowered.lacks(Wall::Descriptors) {
        step("lowered: descriptors", lower::leave_open(&spec.data_dir))?;
    }
    if lowered.lacks(Wall::Root) {
        step("lowered: root", lower::open_data(&spec.data_dir))?;
        step("lowered: root", lower::open_way(&spec.plan, &spec.data_dir))?;
        spec.plan = lower::plan_outside(&spec.plan, &spec.data_dir);
        let _ = std::fs::remove_file(inside::API_SOCKET);
    }
    Ok(spec)
}

/// From here on this process can do nothing but wait for its child. It shares the agent's uid, so it is made
/// undumpable (it never execs again, so that lasts): the agent can neither look into it nor see it in /proc.
fn confine(uid: u32, lowered: &Lowered) -> Result<(), Failure> {
    // Of an agent that stays root, another user could not be the end: neither its signal nor its own death would reach
    // it (`check_kill_permission` in the kernel's `kernel/signal.c` is asked for both).
    if !(lowered.lacks(Wall::Uid) && lowered.lacks(Wall::Capabilities)) {
        child::change_user(uid)?;
        child::drop_capabilities()?;
    }
    step("jail: undumpable", set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    // The change of uid has cleared it.
    step("jail: die with the launcher", set_parent_process_death_signal(Some(Signal::KILL)))?;
    step("jail: no_new_privs", rustix::thread::set_no_new_privs(true))?;
    step("jail: landlock", landlock::restrict_to_nothing())?;
    let filters = step("jail: seccomp", seccomp::compile_own(OWN_CALLS, &[], Ioctl::None))?;
    step("jail: seccomp", filters.install())
}

/// The pipe's end means that the child has exec'd or is dead; what it wrote tells which ([`child::ABOUT_TO_EXEC`]).
fn wait_for_exec(report: &OwnedFd) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    let mut buffer = [0_u8; 512];
    loop {
        match rustix::io::read(report, &mut buffer) {
            Err(Errno::INTR) => {}
            Err(error) => return step("wait for the agent's start", Err(error)),
            Ok(0) => break,
            Ok(read) => bytes.extend(buffer.iter().take(read)),
        }
        if bytes.len() > FAILURE_MAX_BYTES {
            break;
        }
    }
    if bytes == child::ABOUT_TO_EXEC {
        return Ok(());
    }
    let report = bytes.strip_prefix(child::ABOUT_TO_EXEC).unwrap_or(&bytes);
    Err(serde_json::from_slice(report).unwrap_or_else(|_| Failure {
        step: "wait for the agent's start".to_owned(),
        why: "the process ended before all walls were up".to_owned(),
    }))
}

fn reap(control: &OwnedFd, run: &Running) -> i32 {
    loop {
        let mut waiting = [
            PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN),
            PollFd::new(&run.signals, PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return 1,
        }
        let [control_event, _] = &waiting;
        if !control_event.revents().is_empty() && !obey(control.as_fd(), run) {
            return 1;
        }
        while run.signals.next().is_some() {}
        if let Some(status) = reap_all(run.agent) {
            let _ = wire::send(control.as_fd(), &FromJail::Ended { status }, &[]);
            return 0;
        }
    }
}

/// False when the launcher is gone.
fn obey(control: BorrowedFd<'_>, run: &Running) -> bool {
    match wire::receive(control) {
        Ok((ToJail::Terminate, _)) => {
            // It may have ended by itself this moment.
            let _ = rustix::process::kill_process(run.agent, Signal::TERM);
            true
        }
        Ok((ToJail::Knock, _)) => wire::send(control, &FromJail::Doors, &wire::borrowed(&run.doors)).is_ok(),
        Ok((ToJail::Spec(_) | ToJail::Call(_) | ToJail::Go, _)) => true,
        Err(error) => error.would_block(),
    }
}

/// Buries every process that has ended; gives the raw status of the agent's first one.
fn reap_all(agent: Pid) -> Option<i32> {
    let mut ended = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == agent {
            ended = Some(status.as_raw());
        }
    }
    ended
}
