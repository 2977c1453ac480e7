//! How does a device set get its one engine, and keep it?
//!
//! Owns:  the listening socket of each set, which lives as long as the set is wanted: connections queue while the
//!        engine is started again. The process, its cgroup, and when it is due again.
//! Always: an engine has a uid of its own, no capability, an empty network, a Landlock domain that reads models and
//!         libraries, writes to a folder of its own ([`super::swap_room`]) and nothing else, and a default-deny system call filter. It dies with the launcher.
//! Never:  an engine without one of these: its start fails and is tried again.

use super::cgroups::{self, Hierarchy};
use super::swap_room::{self, SwapRoom};
use super::{Options, boot_ms, broken, device_limits, refused};
use crate::jail::Failure;
use crate::landlock::{self, OwnAccess};
use crate::seccomp::{self, Ioctl};
use crate::sys::{self, CloneRequest};
use agentd_domain::enforcement::DeviceLimit;
use agentd_domain::fault::Report;
use agentd_domain::launcher::{EngineInfo, EngineSpec};
use agentd_domain::paths;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, chmod, chown};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const BACKLOG: i32 = 64;
const LISTEN_FD: i32 = 3;
const REPORT_FD: i32 = 4;
/// From clone to exec there are only a few dozen system calls.
const EXEC_LIMIT_S: i64 = 5;
const BACK_OFF_FIRST_MS: u64 = 500;
const BACK_OFF_MAX_MS: u64 = 30_000;
/// An engine that lived this long was healthy: the next restart is quick again.
const HEALTHY_MS: u64 = 60_000;
/// An engine that holds one small model needs more.
pub(super) const MEMORY_MIN_BYTES: u64 = 64 << 20;

/// Back ends, libraries and models; devices only where the machine has them.
const FILES: &[(&str, OwnAccess)] = &[
    ("/usr/lib", OwnAccess::ReadExecute),
    ("/usr/lib64", OwnAccess::ReadExecute),
    ("/etc/ld.so.cache", OwnAccess::Read),
    // Which drivers of Vulkan's there are, their settings for single cards, the cards' names.
    ("/usr/share/vulkan", OwnAccess::Read),
    ("/usr/share/drirc.d", OwnAccess::Read),
    ("/usr/share/libdrm", OwnAccess::Read),
    (paths::BUILTIN_MODELS, OwnAccess::Read),
    (paths::MEDIA_MODELS, OwnAccess::Read),
    ("/proc/self", OwnAccess::Read),
    ("/proc/cpuinfo", OwnAccess::Read),
    ("/proc/meminfo", OwnAccess::Read),
    ("/proc/driver", OwnAccess::Read),
    ("/sys/devices", OwnAccess::Read),
    ("/sys/bus/pci", OwnAccess::Read),
    ("/sys/class/drm", OwnAccess::Read),
    ("/dev/null", OwnAccess::Device),
    ("/dev/zero", OwnAccess::Device),
    ("/dev/urandom", OwnAccess::Read),
];

/// What an accelerator's driver is reached through.
const DEVICES: &[&str] = &[
    "/dev/dri",
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
    "/dev/nvidia-modeset",
    // Instances of a device that was cut up (MIG), a node for each.
    "/dev/nvidia-caps",
    "/dev/nvidia0",
    "/dev/nvidia1",
    "/dev/nvidia2",
    "/dev/nvidia3",
    "/dev/nvidia4",
    "/dev/nvidia5",
    "/dev/nvidia6",
    "/dev/nvidia7",
];

/// Threads, memory, files, one listening socket. No process but itself after its exec.
const CALLS: &[&str] = &[
    "accept4",
    "brk",
    "capget",
    "chdir",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_pwait2",
    "eventfd2",
    "execve",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fcntl",
    "flock",
    "fstat",
    "fstatfs",
    "futex",
    "futex_waitv",
    "get_mempolicy",
    "get_robust_list",
    "getcpu",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpeername",
    "getpid",
    "getppid",
    "getpriority",
    "getrandom",
    "getresgid",
    "getresuid",
    "getrusage",
    "getsockname",
    "getsockopt",
    "gettid",
    "gettimeofday",
    "getuid",
    "ioctl",
    "kill",
    "listen",
    "lseek",
    "madvise",
    "mbind",
    "membarrier",
    "memfd_create",
    "mincore",
    "mlock",
    "mlock2",
    "mmap",
    "mprotect",
    "mremap",
    "msync",
    "munlock",
    "munmap",
    "nanosleep",
    "newfstatat",
    "openat",
    "pipe2",
    "ppoll",
    "prctl",
    "pread64",
    "preadv",
    "prlimit64",
    "pselect6",
    "pwrite64",
    "read",
    "readlinkat",
    "readv",
    "recvfrom",
    "recvmsg",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_sigtimedwait",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "sched_getaffinity",
    "sched_getparam",
    "sched_getscheduler",
    "sched_setaffinity",
    "sched_yield",
    "sendmsg",
    "sendto",
    "set_mempolicy",
    "set_robust_list",
    "set_tid_address",
    "setsockopt",
    "shutdown",
    "sigaltstack",
    "socket",
    "socketpair",
    "statfs",
    "statx",
    "sysinfo",
    "tgkill",
    "timerfd_create",
    "timerfd_settime",
    "umask",
    "uname",
    "unlinkat",
    "write",
    "writev",
    #[cfg(target_arch = "x86_64")]
    "access",
    #[cfg(target_arch = "x86_64")]
    "arch_prctl",
    #[cfg(target_arch = "x86_64")]
    "dup2",
    #[cfg(target_arch = "x86_64")]
    "epoll_wait",
    #[cfg(target_arch = "x86_64")]
    "getrlimit",
    #[cfg(target_arch = "x86_64")]
    "lstat",
    #[cfg(target_arch = "x86_64")]
    "open",
    #[cfg(target_arch = "x86_64")]
    "pipe",
    #[cfg(target_arch = "x86_64")]
    "poll",
    #[cfg(target_arch = "x86_64")]
    "readlink",
    #[cfg(target_arch = "x86_64")]
    "select",
    #[cfg(target_arch = "x86_64")]
    "stat",
    #[cfg(target_arch = "x86_64")]
    "time",
    #[cfg(target_arch = "x86_64")]
    "unlink",
];

#[derive(Debug)]
pub(super) struct Engine {
    spec: EngineSpec,
    socket_path: PathBuf,
    listener: OwnedFd,
    process: Option<(Pid, OwnedFd)>,
    group: Option<PathBuf>,
    /// Groups of processes that were, to be removed once they are empty.
    left: Vec<PathBuf>,
    started_boot_ms: u64,
    restarts: u32,
    back_off_ms: u64,
    pub(super) due_boot_ms: Option<u64>,
}

impl Engine {
    /// Makes the socket and the first process. What a process that failed has left of groups goes to `left`.
    pub(super) fn start(
        options: &Options,
        hierarchy: &Hierarchy,
        spec: EngineSpec,
        left: &mut Vec<PathBuf>,
    ) -> Result<Self, Report> {
        let socket_path = options.run_dir.join("engines").join(format!("{}.sock", spec.set));
        let listener = listen_at(&socket_path, options.agentd_uid).map_err(|error| {
            broken(
                "engine_failed",
                format!("{} could not be made: {error}", socket_path.display()),
                "restart the appliance",
            )
        })?;
        let mut engine = Self {
            spec,
            socket_path,
            listener,
            process: None,
            group: None,
            left: Vec::new(),
            started_boot_ms: 0,
            restarts: 0,
            back_off_ms: BACK_OFF_FIRST_MS,
            due_boot_ms: None,
        };
        match engine.spawn(options, hierarchy) {
            Ok(()) => Ok(engine),
            Err(report) => {
                engine.stop();
                left.extend(engine.into_groups(options));
                Err(report)
            }
        }
    }

    /// Asked for again while it is wanted already: another amount of memory is taken over, and so are limits of
    /// devices that a group has. What a process sees of devices is settled at its start, so that needs another process.
    pub(super) fn again(
        &mut self,
        options: &Options,
        hierarchy: &Hierarchy,
        spec: EngineSpec,
    ) -> Result<(), Report> {
        let conflict = |why: &str| {
            refused("engine_conflict", format!("the engine {} runs {why}", spec.set), "stop it first")
        };
        let same = |a: &[String], b: &[String]| a.iter().all(|path| b.contains(path)) && a.len() == b.len();
        if !same(&spec.hidden, &self.spec.hidden) {
            return Err(conflict("with other devices in its sight"));
        }
        let seen = |limits: &[DeviceLimit]| -> Vec<_> {
            limits.iter().flat_map(|limit| limit.by.variables(limit.bytes)).collect()
        };
        if seen(&spec.device_limits) != seen(&self.spec.device_limits) {
            return Err(conflict("with other limits of its devices"));
        }
        hierarchy.limit_engine(&spec.set, spec.memory_max_bytes)?;
        if let Some(group) = &self.group {
            device_limits::change_all(options, &self.spec.device_limits, &spec.device_limits, group)?;
        }
        self.spec = spec;
        Ok(())
    }

    pub(super) fn set(&self) -> &str {
        &self.spec.set
    }

    /// Whether a process of it, now or after a restart, cannot open this.
    pub(super) fn hides(&self, path: &str) -> bool {
        self.spec.hidden.iter().any(|hidden| hidden == path)
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(|(pid, _)| *pid)
    }

    pub(super) fn info(&self) -> EngineInfo {
        EngineInfo {
            set: self.spec.set.clone(),
            pid: self.pid().map_or(0, |pid| pid.as_raw_nonzero().get()),
            started_boot_ms: self.started_boot_ms,
            restarts: self.restarts,
        }
    }

    /// Its process was reaped: due again, later each time.
    pub(super) fn ended(&mut self, options: &Options) {
        self.process = None;
        if let Some(group) = self.group.take() {
            device_limits::clear_all(options, &self.spec.device_limits, &group);
            self.left.push(group);
        }
        let now = boot_ms();
        if now.saturating_sub(self.started_boot_ms) >= HEALTHY_MS {
            self.back_off_ms = BACK_OFF_FIRST_MS;
        }
        self.due_boot_ms = Some(now + self.back_off_ms);
        self.back_off_ms = (self.back_off_ms * 2).min(BACK_OFF_MAX_MS);
    }

    pub(super) fn restart(&mut self, options: &Options, hierarchy: &Hierarchy) {
        self.due_boot_ms = None;
        self.restarts = self.restarts.saturating_add(1);
        if let Err(report) = self.spawn(options, hierarchy) {
            eprintln!("agent-launcher: engine {}: {report}", self.spec.set);
            self.ended(options);
        }
    }

    /// Kills the process and removes the socket. The reaping happens in the loop.
    pub(super) fn stop(&mut self) {
        if let Some((_, pidfd)) = &self.process {
            let _ = sys::send_sigkill(pidfd.as_fd());
        }
        if let Some(group) = &self.group {
            let _ = cgroups::kill(group);
        }
        let _ = std::fs::remove_file(&self.socket_path);
    }

    /// What is to be removed already.
    pub(super) fn take_left(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.left)
    }

    /// All of its groups, to be removed once the processes are gone.
    pub(super) fn into_groups(mut self, options: &Options) -> Vec<PathBuf> {
        if let Some(group) = self.group.take() {
            device_limits::clear_all(options, &self.spec.device_limits, &group);
            self.left.push(group);
        }
        self.left
    }

    fn spawn(&mut self, options: &Options, hierarchy: &Hierarchy) -> Result<(), Report> {
        let failed = |error: Errno| {
            broken("engine_failed", format!("the engine's process could not be made: {error}"), "try again")
        };
        hierarchy.limit_engine(&self.spec.set, self.spec.memory_max_bytes)?;
        let (group, group_fd) = hierarchy.create_engine(&self.spec.set)?;
        if let Err(report) = device_limits::set_all(options, &self.spec.device_limits, &group) {
            self.left.push(group);
            return Err(report);
        }
        self.left.extend(self.group.replace(group));
        let (report, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
        let request = CloneRequest {
            namespaces: libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS,
            cgroup: Some(group_fd.as_fd()),
        };
        let room = swap_room::prepare(options, &self.spec.set)
            .inspect_err(|why| eprintln!("agent-launcher: engine {}: {why}", self.spec.set))
            .ok();
        let (pid, pidfd) = sys::spawn(request, || {
            become_engine(options, &self.spec, room.as_ref(), self.listener.as_fd(), theirs.as_fd())
        })
        .map_err(failed)?;
        drop(theirs);
        self.started_boot_ms = boot_ms();
        let outcome = await_exec(&report);
        if outcome.is_err() {
            let _ = sys::send_sigkill(pidfd.as_fd());
        }
        self.process = Some((pid, pidfd));
        outcome.map_err(|failure| {
            broken(
                "engine_failed",
                format!("the engine did not start: {failure}"),
                "check that this image has an engine and that the kernel has Landlock and seccomp",
            )
        })
    }
}

/// The file is root's, the group is agentd's: agentd connects and cannot replace it.
fn listen_at(path: &Path, agentd_gid: u32) -> Result<OwnedFd, Errno> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    chown(path, Some(Uid::ROOT), Some(Gid::from_raw(agentd_gid)))?;
    chmod(path, Mode::from_raw_mode(0o660))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Waits, for a bounded time, until the child has exec'd or has said why not.
fn await_exec(report: &OwnedFd) -> Result<(), Failure> {
    let failure = |why: String| Failure { step: "engine".to_owned(), why };
    let limit = Timespec { tv_sec: EXEC_LIMIT_S, tv_nsec: 0 };
    let mut bytes = Vec::new();
    loop {
        let mut waiting = [PollFd::new(report, PollFlags::IN)];
        match poll(&mut waiting, Some(&limit)) {
            Ok(0) => return Err(failure(format!("no exec within {EXEC_LIMIT_S} s"))),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(failure(error.to_string())),
        }
        let mut buffer = [0_u8; 512];
        match rustix::io::read(report, &mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend(buffer.iter().take(read)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(failure(error.to_string())),
        }
    }
    if bytes == ABOUT_TO_EXEC {
        return Ok(());
    }
    let text = bytes.strip_prefix(ABOUT_TO_EXEC).unwrap_or(&bytes);
    Err(serde_json::from_slice(text)
        .unwrap_or_else(|_| failure("it ended before its program was reached".to_owned())))
}

const ABOUT_TO_EXEC: &[u8] = b"E";

fn become_engine(
    options: &Options,
    spec: &EngineSpec,
    room: Option<&SwapRoom>,
    listener: BorrowedFd<'_>,
    report: BorrowedFd<'_>,
) -> i32 {
    let failure = match place_descriptors(listener, report) {
        Ok(()) => {
            let Err(failure) = confine_and_exec(options, spec, room);
            failure
        }
        Err(error) => Failure { step: "engine: descriptors".to_owned(), why: error.to_string() },
    };
    sys::write_all(REPORT_FD, &serde_json::to_vec(&failure).unwrap_or_default());
    1
}

/// 0 is empty, 1 and 2 are the launcher's log, 3 the listener, 4 goes at exec.
fn place_descriptors(listener: BorrowedFd<'_>, report: BorrowedFd<'_>) -> Result<(), Errno> {
    let listener = rustix::io::fcntl_dupfd_cloexec(listener, 64)?;
    let report = rustix::io::fcntl_dupfd_cloexec(report, 64)?;
    let nothing = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::place_fd(nothing.as_fd(), 0)?;
    sys::place_fd(listener.as_fd(), LISTEN_FD)?;
    sys::place_fd(report.as_fd(), REPORT_FD)?;
    // Not dropped: the next call closes them by number, with everything that was the launcher's.
    std::mem::forget((listener, report, nothing));
    sys::close_from(REPORT_FD + 1)?;
    sys::close_on_exec(REPORT_FD)
}

fn confine_and_exec(
    options: &Options,
    spec: &EngineSpec,
    room: Option<&SwapRoom>,
) -> Result<std::convert::Infallible, Failure> {
    use crate::jail::{change_user, drop_capabilities, step};
    leave_the_launcher()?;
    step("engine: capability bounding set", sys::drop_bounding_set(0))?;
    change_user(paths::UID_ENGINE)?;
    drop_capabilities()?;
    let models = Options::text(&options.data_dir.join("models"));
    let mut files = vec![(models.as_str(), OwnAccess::Read)];
    files.extend(room.map(|room| (room.path.as_str(), OwnAccess::Scratch)));
    wall_in(options, &files, &spec.hidden)?;
    sys::write_all(REPORT_FD, ABOUT_TO_EXEC);
    let swap = room.map(|room| {
        ["--swap-dir".to_owned(), room.path.clone(), "--swap-disk-mib".to_owned(), room.mebibytes.to_string()]
    });
    let error = Command::new(&options.engine)
        .args(["--listen-fd", "3", "--backends", paths::BACKENDS])
        .args(swap.iter().flatten())
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        // llama.cpp leaves such a device out unless it is named (`ggml_vk_instance_init` in its ggml-vulkan.cpp).
        .envs(spec.software_devices.then_some(("GGML_VK_VISIBLE_DEVICES", "0")))
        .envs(spec.device_limits.iter().flat_map(|limit| limit.by.variables(limit.bytes)))
        .exec();
    step("exec", Err(format!("{}: {error}", options.engine.display())))
}

/// The one capability that NVIDIA's driver asks the kernel for when a caller sets limits (`NV_IS_SUSER` in its
/// kernel-open/common/inc/nv-linux.h). CAP_SYS_ADMIN, by its number in linux/capability.h.
const LIMITER_CAPABILITIES: u64 = 1 << 21;

/// The engine's program as the one that asks a driver for a limit: root with one capability, and all other walls.
pub(super) fn become_limiter(
    options: &Options,
    arguments: &[String],
    group: &Path,
    printed: BorrowedFd<'_>,
) -> i32 {
    let outcome = place_printed(printed)
        .map_err(|error| Failure { step: "limit: descriptors".to_owned(), why: error.to_string() })
        .and_then(|()| exec_limiter(options, arguments, group));
    let Err(failure) = outcome;
    sys::write_all(1, format!("{failure}").as_bytes());
    1
}

/// 0 is empty, 1 goes to the launcher, 2 is its log.
fn place_printed(printed: BorrowedFd<'_>) -> Result<(), Errno> {
    let printed = rustix::io::fcntl_dupfd_cloexec(printed, 64)?;
    let nothing = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::place_fd(nothing.as_fd(), 0)?;
    sys::place_fd(printed.as_fd(), 1)?;
    // Not dropped, as above.
    std::mem::forget((printed, nothing));
    sys::close_from(3)
}

fn exec_limiter(
    options: &Options,
    arguments: &[String],
    group: &Path,
) -> Result<std::convert::Infallible, Failure> {
    use crate::jail::step;
    leave_the_launcher()?;
    step("limit: capability bounding set", sys::drop_bounding_set(LIMITER_CAPABILITIES))?;
    wall_in(options, &[(Options::text(group).as_str(), OwnAccess::Read)], &[])?;
    let error = Command::new(&options.engine).args(arguments).env_clear().env("LC_ALL", "C.UTF-8").exec();
    step("exec", Err(format!("{}: {error}", options.engine.display())))
}

fn leave_the_launcher() -> Result<(), Failure> {
    use crate::jail::step;
    step("engine: session", rustix::process::setsid())?;
    step("engine: signal mask", sys::unblock_all())?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    step("engine: core limit", setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }))?;
    step("engine: folder", rustix::process::chdir("/"))
}

/// The nodes that there are, without the hidden ones. A folder with a hidden one in it is opened node by node: a rule for
/// the folder would be one for all of them.
fn devices(hidden: &[String]) -> std::io::Result<Vec<String>> {
    let mut open = Vec::new();
    for &path in DEVICES.iter().filter(|path| rustix::fs::access(**path, rustix::fs::Access::EXISTS).is_ok())
    {
        let within = format!("{path}/");
        if !hidden.iter().any(|node| node.starts_with(&within)) {
            open.push(path.to_owned());
            continue;
        }
        for entry in std::fs::read_dir(path)? {
            // Links in there (by-path) lead to nodes that have a rule or have none.
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                open.push(Options::text(&entry.path()));
            }
        }
    }
    open.retain(|path| !hidden.contains(path));
    Ok(open)
}

/// What every process of the engine's program has around it.
fn wall_in(options: &Options, more: &[(&str, OwnAccess)], hidden: &[String]) -> Result<(), Failure> {
    use crate::jail::step;
    step("engine: no_new_privs", rustix::thread::set_no_new_privs(true))?;
    step("engine: die with the launcher", set_parent_process_death_signal(Some(Signal::KILL)))?;
    let program = Options::text(&options.engine);
    let mut files = FILES.to_vec();
    files.push((program.as_str(), OwnAccess::ReadExecute));
    files.extend(more);
    let devices = step("engine: devices", devices(hidden))?;
    files.extend(devices.iter().map(|path| (path.as_str(), OwnAccess::Device)));
    step("engine: landlock", landlock::restrict_own(&files))?;
    let ioctl = if devices.is_empty() { Ioctl::Descriptors } else { Ioctl::Any };
    let filters = step("engine: seccomp", seccomp::compile_own(CALLS, &[], ioctl))?;
    step("engine: seccomp", filters.install())
}
