//! Which system calls have no safe wrapper elsewhere?
//!
//! Owns:  every `unsafe` block of the crate except the self-probe's, which calls what a wrapper would never offer.
//! Always: each function takes and gives owned, checked types, so that its callers need no unsafe code.
//! Never:  a policy. Values come from the caller.
#![allow(unsafe_code)]

mod kernel;
mod network;
mod process;
mod signal;

pub use kernel::{
    DiskLimits, MountAttributes, landlock_abi, mount_setattr, seccomp_has_errno, set_user_quota,
};
pub use network::{add_local_network, loopback_up};
pub use process::{
    CloneRequest, Forked, await_byte, close_from, close_on_exec, drop_bounding_set, exit_now, fork, place_fd,
    send_sigkill, spawn, unshare_network, write_all,
};
pub use signal::{SignalFd, block, unblock_all};

use rustix::io::Errno;

/// The C convention: -1 and `errno`.
fn check(returned: libc::c_long) -> Result<libc::c_long, Errno> {
    if returned == -1 { Err(last_errno()) } else { Ok(returned) }
}

fn last_errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}
