//! Starting a child as somebody else: uid, capabilities, cgroup, descriptors.
//!
//! In:     a [`Program`]. Out: its pid; the caller reaps it (see `signals::reap`).
//! Always: the child has no new privileges, its own session, an empty signal mask, no supplementary group,
//!         no capability but those named, and of our descriptors only 0, 1, 2 and those named.
//! Source: capabilities(7), prctl(2), credentials(7).

use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::process::Pid;
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// The highest capability number that the kernel may know (`CAP_LAST_CAP` is 40 in 6.12).
const CAPABILITY_NUMBERS: std::ops::Range<u32> = 0..64;

/// As whom a child runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity<'c> {
    /// With all capabilities.
    Root,
    /// Uid and gid are the same number. The capabilities, by number, are ambient: they survive exec.
    User { uid: u32, capabilities: &'c [u32] },
}

#[derive(Debug)]
pub struct Program<'p> {
    pub path: &'p Path,
    pub arguments: &'p [String],
    pub environment: &'p [(String, String)],
    pub identity: Identity<'p>,
    /// Where the child's output goes, both streams.
    pub output: OwnedFd,
    /// Standard input: nothing, or this.
    pub input: Option<OwnedFd>,
    /// An open `cgroup.procs` that the child enters before it becomes the program.
    pub cgroup_procs: Option<BorrowedFd<'p>>,
    /// Open in the child under the same numbers as here.
    pub passed: &'p [BorrowedFd<'p>],
}

/// Starts the program. An error of exec itself (a missing file) is returned here, not as an exit code.
pub fn spawn(program: Program<'_>) -> io::Result<Pid> {
    let error_output = program.output.try_clone()?;
    let mut command = Command::new(program.path);
    command
        .args(program.arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin")
        .envs(program.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(program.input.map_or_else(Stdio::null, Stdio::from))
        .stdout(program.output)
        .stderr(error_output);
    let setup = Setup::new(&program.identity, program.cgroup_procs, program.passed)?;
    // SAFETY: the closure runs in the forked child. It makes system calls only: rustix's raw ones, which
    // neither allocate nor take a lock, on data that was allocated before the fork and that the closure owns.
    // So nothing can deadlock on a lock that a thread of the parent held at the fork.
    unsafe { command.pre_exec(move || setup.apply()) };
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Everything that the child does between fork and exec, prepared so that it need not allocate.
struct Setup {
    user: Option<User>,
    cgroup_procs: Option<OwnedFd>,
    passed: Vec<i32>,
    passed_owners: Vec<OwnedFd>,
    /// True but for the escape suite's control.
    no_new_privs: bool,
}

struct User {
    uid: rustix::process::Uid,
    gid: rustix::process::Gid,
    capabilities: CapabilitySet,
}

impl Setup {
    fn new(
        identity: &Identity<'_>,
        cgroup_procs: Option<BorrowedFd<'_>>,
        passed: &[BorrowedFd<'_>],
    ) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let user = match *identity {
            Identity::Root => None,
            Identity::User { uid, capabilities } => Some(User {
                uid: rustix::process::Uid::from_raw(uid),
                gid: rustix::process::Gid::from_raw(uid),
                capabilities: capabilities
                    .iter()
                    .filter(|number| CAPABILITY_NUMBERS.contains(number))
                    .map(|number| CapabilitySet::from_bits_retain(1 << number))
                    .collect(),
            }),
        };
        let cgroup_procs = cgroup_procs.map(|fd| fd.try_clone_to_owned()).transpose()?;
        Ok(Self {
            user,
            cgroup_procs,
            passed: passed.iter().map(AsRawFd::as_raw_fd).collect(),
            passed_owners: Vec::new(),
            no_new_privs: !crate::lower::is_lowered(),
        })
    }

    fn apply(&self) -> io::Result<()> {
        debug_assert!(self.passed_owners.is_empty());
        self.unblock_signals()?;
        // "0" means the writer itself. First of all, because entering needs root.
        if let Some(procs) = &self.cgroup_procs {
            rustix::io::write(procs, b"0")?;
        }
        rustix::process::setsid()?;
        for descriptor in &self.passed {
            // SAFETY: the parent borrowed this open descriptor when it made the list and has not run since
            // the fork, so the number refers to the same open file in this copy of the descriptor table.
            let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        if let Some(user) = &self.user {
            user.become_it()?;
        }
        if self.no_new_privs {
            rustix::thread::set_no_new_privs(true)?;
        }
        Ok(())
    }

    fn unblock_signals(&self) -> io::Result<()> {
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before sigprocmask reads it; the old mask is not asked for.
        // Both are async-signal-safe (signal-safety(7)), as code after a fork must be.
        let result = unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl User {
    /// The order is the whole point: the bounding set while there is CAP_SETPCAP, groups and gid while there
    /// is CAP_SETGID, then the uid with the permitted capabilities kept, then only the named ones, ambient.
    fn become_it(&self) -> io::Result<()> {
        for number in CAPABILITY_NUMBERS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if !self.capabilities.contains(capability) {
                match rustix::thread::remove_capability_from_bounding_set(capability) {
                    // A number that this kernel does not know.
                    Err(rustix::io::Errno::INVAL) => break,
                    other => other?,
                }
            }
        }
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(self.gid, self.gid, self.gid)?;
        rustix::thread::set_keep_capabilities(!self.capabilities.is_empty())?;
        rustix::thread::set_thread_res_uid(self.uid, self.uid, self.uid)?;
        let sets = CapabilitySets {
            effective: self.capabilities,
            permitted: self.capabilities,
            inheritable: self.capabilities,
        };
        rustix::thread::set_capabilities(None, sets)?;
        for number in CAPABILITY_NUMBERS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.capabilities.contains(capability) {
                rustix::thread::configure_capability_in_ambient_set(capability, true)?;
            }
        }
        Ok(())
    }
}

/// Descriptors that the parent passed and named in arguments of the form `5=ttyS0`. Each is given once: a second
/// call gives nothing. Arguments of another form, and numbers that are not open, are left out.
pub fn take_passed(arguments: impl Iterator<Item = String>) -> Vec<(OwnedFd, String)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Vec::new();
    }
    let mut numbers = Vec::new();
    let mut passed = Vec::new();
    for argument in arguments {
        let Some((number, name)) = argument.split_once('=') else { continue };
        let Some(number) = number.parse::<i32>().ok().filter(|number| *number > 2) else { continue };
        // SAFETY: fcntl with F_GETFD touches no memory of ours and fails cleanly on a number that is not open.
        let is_open = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
        if is_open && !numbers.contains(&number) {
            numbers.push(number);
            // SAFETY: the descriptor is open (just asked), was passed by the parent for this program to own, is
            // not one of the standard three, and is taken once: `numbers` holds each only once and `TAKEN` lets
            // no second call come here.
            passed.push((unsafe { OwnedFd::from_raw_fd(number) }, name.to_owned()));
        }
    }
    passed
}

/// A pipe for a child's output: the reading end does not block.
pub fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let flags = rustix::fs::fcntl_getfl(reader.as_fd())?;
    rustix::fs::fcntl_setfl(reader.as_fd(), flags | OFlags::NONBLOCK)?;
    Ok((reader, writer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signals::Ended;
    use std::fs::File;
    use std::io::Read;

    /// Runs a shell line and gives its output and its end.
    fn run(line: &str, identity: Identity<'_>) -> (String, Ended) {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let pid = spawn(Program {
            path: Path::new("/bin/sh"),
            arguments: &["-c".to_owned(), line.to_owned()],
            environment: &[],
            identity,
            output: writer,
            input: None,
            cgroup_procs: None,
            passed: &[],
        })
        .unwrap();
        let mut output = String::new();
        File::from(reader).read_to_string(&mut output).unwrap();
        let (_, status) =
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap().unwrap();
        let ended = status.exit_status().map_or(Ended::Signal(-1), Ended::Exit);
        (output, ended)
    }

    fn is_root() -> bool {
        rustix::process::getuid().is_root()
    }

    #[test]
    fn output_and_exit_code_come_back() {
        let (output, ended) = run("echo hello; exit 3", Identity::Root);
        assert_eq!((output.as_str(), ended), ("hello\n", Ended::Exit(3)));
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let (_reader, writer) = output_pipe().unwrap();
        let result = spawn(Program {
            path: Path::new("/nowhere/program"),
            arguments: &[],
            environment: &[],
            identity: Identity::Root,
            output: writer,
            input: None,
            cgroup_procs: None,
            passed: &[],
        });
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_user_has_only_the_named_capabilities() {
        if !is_root() {
            eprintln!("skipped: changing uid needs root");
            return;
        }
        let line = "grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):' /proc/self/status";
        let (output, _) = run(line, Identity::User { uid: 201, capabilities: &[12, 25] });
        let field = |name: &str| {
            let line = output.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        let expected = format!("{:016x}", (1_u64 << 12) | (1 << 25));
        assert_eq!(field("Uid"), "201 201 201 201");
        assert_eq!(field("Gid"), "201 201 201 201");
        assert_eq!(field("Groups"), "");
        for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), expected, "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
    }

    #[test]
    fn a_user_without_capabilities_has_none() {
        if !is_root() {
            eprintln!("skipped: changing uid needs root");
            return;
        }
        let (output, _) = run(
            "grep -E '^Cap(Prm|Eff|Bnd|Amb)' /proc/self/status",
            Identity::User { uid: 200, capabilities: &[] },
        );
        assert_eq!(output.lines().filter(|line| line.ends_with("0000000000000000")).count(), 4, "{output}");
    }
}
