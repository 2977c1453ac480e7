//! Signals as something to read: signalfd(2).

use super::{check, last_errno};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Readable when one of its signals waits.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks these signals and gives a non-blocking descriptor that reads them.
    pub fn new(signals: &[i32]) -> Result<Self, Errno> {
        let set = block(signals)?;
        // SAFETY: `set` is an initialised set that lives over the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        check(libc::c_long::from(fd))?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next waiting signal's number, or `None`.
    pub fn next(&self) -> Option<u32> {
        // The size of `struct signalfd_siginfo` is fixed at 128 bytes; its first field is the number.
        let mut record = [0_u8; size_of::<libc::signalfd_siginfo>()];
        let read = rustix::io::read(&self.0, &mut record).ok()?;
        let number = record.get(..4).filter(|_| read == record.len())?;
        Some(u32::from_ne_bytes(number.try_into().ok()?))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Blocks no signal any more. A program inherits the mask of whoever execs it, and would never see SIGTERM.
pub fn unblock_all() -> Result<(), Errno> {
    let none = block(&[])?;
    // SAFETY: `none` is an initialised, empty set, and a null pointer for the old set is allowed (sigprocmask(2)).
    check(libc::c_long::from(unsafe {
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    }))
    .map(|_| ())
}

/// Blocks these signals for the calling thread and gives the set.
pub fn block(signals: &[i32]) -> Result<libc::sigset_t, Errno> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set that the pointer refers to.
    let mut set = unsafe {
        if libc::sigemptyset(set.as_mut_ptr()) == -1 {
            return Err(last_errno());
        }
        set.assume_init()
    };
    for &signal in signals {
        // SAFETY: `set` is initialised; a number that is no signal makes the call fail and changes nothing.
        check(libc::c_long::from(unsafe { libc::sigaddset(&raw mut set, signal) }))?;
    }
    // SAFETY: `set` is initialised, and a null pointer for the old set is allowed (sigprocmask(2)).
    check(libc::c_long::from(unsafe {
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    }))?;
    Ok(set)
}
