//! Making processes, and what a new one must do before it runs a program.
//!
//! Invariant: the callers are single-threaded, so a child is an exact copy in which locks are free and allocation
//! works. Source: clone(2), clone3; fork(2); close_range(2); capabilities(7).

use super::{check, last_errno};
use rustix::io::Errno;
use rustix::process::Pid;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What a clone shares and where it is born.
#[derive(Debug, Clone, Copy)]
pub struct CloneRequest<'a> {
    /// `CLONE_NEW*` only.
    pub namespaces: i32,
    /// Directory of the cgroup v2 that the child belongs to from its first instruction; `None`: the caller's.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Who returns from [`fork`].
#[derive(Debug, Clone, Copy)]
pub enum Forked {
    Parent { child: Pid },
    Child,
}

/// Starts a process that runs `child` and nothing else: when `child` returns, it exits with that status.
pub fn spawn(request: CloneRequest<'_>, child: impl FnOnce() -> i32) -> Result<(Pid, OwnedFd), Errno> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_PIDFD as u64 | request.namespaces as u64;
    let mut arguments = CloneArgs {
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = request.cgroup {
        flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    arguments.flags = flags;
    // SAFETY: the arguments are a complete `struct clone_args` of the size given, and live over the call. Without
    // CLONE_VM and with a stack of 0 the child gets a copy of this process and its stack, as with fork, so no memory
    // is shared and returning in the child is sound; the process has one thread (module invariant), so no lock of
    // the allocator is held by a thread that the child lacks. `pidfd` is written before the call returns.
    let returned = unsafe { libc::syscall(libc::SYS_clone3, (&raw const arguments), size_of::<CloneArgs>()) };
    if check(returned)? == 0 {
        exit_now(child());
    }
    let pid = i32::try_from(returned).ok().and_then(Pid::from_raw).ok_or(Errno::IO)?;
    // SAFETY: the kernel has just made this descriptor for us (CLONE_PIDFD), and nobody else knows its number.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((pid, pidfd))
}

/// linux/sched.h; not in libc for every target.
#[repr(C)]
#[derive(Debug, Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Two processes return from this.
pub fn fork() -> Result<Forked, Errno> {
    // SAFETY: fork has no memory preconditions; the process has one thread (module invariant), so the child may
    // allocate and use every library call.
    let pid = check(libc::c_long::from(unsafe { libc::fork() }))?;
    match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        None => Ok(Forked::Child),
        Some(child) => Ok(Forked::Parent { child }),
    }
}

/// Ends the process without running destructors or exit handlers, which belong to the parent's copy.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any status and does not return; nothing of this process is used afterwards.
    unsafe { libc::_exit(status) }
}

/// Makes `source` also known as `target`, without close-on-exec. What `target` was before is closed.
pub fn place_fd(source: BorrowedFd<'_>, target: RawFd) -> Result<(), Errno> {
    if source.as_raw_fd() == target {
        // dup2 onto itself would leave close-on-exec set.
        return rustix::io::fcntl_setfd(source, rustix::io::FdFlags::empty());
    }
    // SAFETY: `source` is open while borrowed. `target` may belong to an `OwnedFd` of the parent's copy, which the
    // child never drops: every caller execs or exits right after.
    check(libc::c_long::from(unsafe { libc::dup2(source.as_raw_fd(), target) })).map(|_| ())
}

/// Marks a descriptor that this process owns by number only.
pub fn close_on_exec(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: F_SETFD takes a number and touches no memory; a closed descriptor makes it fail.
    check(libc::c_long::from(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })).map(|_| ())
}

/// Writes to a descriptor that this process owns by number only; what does not arrive is lost.
pub fn write_all(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the pointer and length are those of a live slice; a closed descriptor makes the call fail. Short writes
    // do not happen: the bytes are fewer than PIPE_BUF, which a pipe takes in one piece (pipe(7)).
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Waits for one byte on a pipe that this process owns by number only; the pipe's end is an error.
pub fn await_byte(fd: RawFd) -> Result<(), Errno> {
    let mut byte = 0_u8;
    // SAFETY: one byte is written at most, into a variable that lives over the call.
    match check(unsafe { libc::read(fd, (&raw mut byte).cast(), 1) } as libc::c_long)? {
        1 => Ok(()),
        _ => Err(Errno::PIPE),
    }
}

/// Closes every descriptor from `first` up.
pub fn close_from(first: RawFd) -> Result<(), Errno> {
    // SAFETY: the callers are processes about to exec or to exit, which never use an `OwnedFd` above `first` again;
    // the kernel call itself has no memory preconditions.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) }).map(|_| ())
}

/// Empties the capability bounding set, so that no program started from here ever holds one.
pub fn drop_bounding_set(keep: u64) -> Result<(), Errno> {
    for capability in 0..64 {
        if keep & (1 << capability) != 0 {
            continue;
        }
        // Asking is cheap; dropping copies the process's credentials even when there is nothing to drop.
        // SAFETY: PR_CAPBSET_READ takes a number and touches no memory.
        let held = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability as libc::c_ulong, 0, 0, 0) };
        if held == 0 {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        let returned = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
        match check(libc::c_long::from(returned)) {
            Ok(_) => {}
            // The first number that this kernel does not know: all it knows are dropped.
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Leaves the machine's network: the caller keeps its open sockets and sees an empty namespace from now on.
pub fn unshare_network() -> Result<(), Errno> {
    // SAFETY: CLONE_NEWNET changes which network namespace the calling thread uses and touches no memory.
    check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_NEWNET) })).map(|_| ())
}

/// SIGKILL to the process behind a pidfd; a process that is already gone is no error.
pub fn send_sigkill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the descriptor is open while borrowed; a null siginfo pointer is allowed (pidfd_send_signal(2)).
    let returned = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<u8>(),
            0,
        )
    };
    match returned {
        -1 if last_errno() == Errno::SRCH => Ok(()),
        other => check(other).map(|_| ()),
    }
}
