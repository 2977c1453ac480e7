//! Signals as readable events, and the ends of children.
//!
//! init blocks what it handles and reads it from a descriptor, so that one `poll` waits for everything and no
//! code runs in a signal handler. Source: signalfd(2), waitpid(2), signal(7).

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks these signals for this process and gives a descriptor from which they are read.
pub fn watch(signals: &[Signal]) -> io::Result<OwnedFd> {
    let set = set_of(signals);
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: `set` is an initialised sigset_t that lives during both calls; the old mask is not asked for
    // (null is allowed). sigprocmask is used and not pthread_sigmask because the caller has one thread.
    // signalfd with -1 makes a new descriptor, which is owned by nothing else yet.
    unsafe {
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let descriptor = libc::signalfd(-1, &raw const set, flags);
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

/// The signals that have come since the last call, each once.
pub fn pending(descriptor: &OwnedFd) -> io::Result<Vec<Signal>> {
    const RECORD_BYTES: usize = size_of::<libc::signalfd_siginfo>();
    let mut buffer = [0_u8; RECORD_BYTES * 8];
    let mut signals = Vec::new();
    loop {
        let read = match rustix::io::read(descriptor, &mut buffer) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN) => return Ok(signals),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for record in buffer.chunks_exact(RECORD_BYTES).take(read / RECORD_BYTES) {
            // `ssi_signo` is the record's first field, a u32.
            let number = record.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes));
            if let Some(signal) = number.and_then(|n| i32::try_from(n).ok()).and_then(Signal::from_named_raw)
            {
                signals.push(signal);
            }
        }
        if read < buffer.len() {
            return Ok(signals);
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exit(i32),
    Signal(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

/// One child that has ended, if there is one; call until `None`. Takes orphans of others too.
pub fn reap() -> Option<(Pid, Ended)> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                if let Some(ended) = ended(status) {
                    return Some((pid, ended));
                }
            }
            Ok(None) => return None,
            Err(rustix::io::Errno::INTR) => {}
            // ECHILD: there are no children at all.
            Err(_) => return None,
        }
    }
}

fn ended(status: WaitStatus) -> Option<Ended> {
    status.exit_status().map(Ended::Exit).or_else(|| status.terminating_signal().map(Ended::Signal))
}

/// Has this process no child left, running or ended?
pub fn no_child_is_left() -> bool {
    use rustix::process::{WaitId, WaitIdOptions};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(rustix::process::waitid(WaitId::All, options), Err(rustix::io::Errno::CHILD))
}

/// Sends a signal to every process that init may signal, itself excepted (kill(2) with pid -1 as PID 1).
pub fn signal_everybody(signal: Signal) {
    // SAFETY: kill takes two numbers and touches no memory of ours. Its only effect is the signal itself.
    // rustix has no name for "every process".
    unsafe { libc::kill(-1, signal.as_raw()) };
}

fn set_of(signals: &[Signal]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set through a valid pointer before it is assumed to be
    // initialised; sigaddset then gets that initialised set and numbers that `Signal` guarantees to be valid.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in signals {
            libc::sigaddset(&raw mut set, signal.as_raw());
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_words() {
        assert_eq!(Ended::Exit(3).to_string(), "exit code 3");
        assert_eq!(Ended::Signal(9).to_string(), "signal 9");
    }
}
