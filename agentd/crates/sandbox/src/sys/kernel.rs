//! Mount attributes, quotas, and which walls this kernel can raise.
//!
//! Source: mount_setattr(2), quotactl(2), landlock(7), seccomp(2).

use super::check;
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `MOUNT_ATTR_*` of linux/mount.h.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    /// `MS_PRIVATE` or 0.
    pub propagation: u64,
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes one mount: the one whose root `fd` refers to when `path` is empty.
pub fn mount_setattr(
    fd: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
    change: MountAttributes,
) -> Result<(), Errno> {
    let attr = MountAttr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` has the layout of `struct mount_attr` (version 0, 32 bytes) and, like the NUL-terminated path,
    // lives over the call, which only reads both; the descriptor is open while borrowed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(|_| ())
}

/// Hard limits of one user on one file system; 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub struct DiskLimits {
    pub bytes: u64,
    pub inodes: u64,
}

/// Sets a user's quota on the file system that holds `fd`. Fails with ESRCH or ENOSYS where quotas are off.
pub fn set_user_quota(fd: BorrowedFd<'_>, uid: u32, limits: DiskLimits) -> Result<(), Errno> {
    const Q_SETQUOTA: u32 = 0x80_0008;
    const USRQUOTA: u32 = 0;
    const QIF_BLIMITS: u32 = 1;
    const QIF_ILIMITS: u32 = 4;
    // SAFETY: `dqblk` is plain data for which all zeros is a valid value.
    let mut quota: libc::dqblk = unsafe { std::mem::zeroed() };
    // The kernel counts in blocks of 1024 bytes whatever the file system's own size is (QIF_DQBLKSIZE).
    quota.dqb_bhardlimit = limits.bytes.div_ceil(1024);
    quota.dqb_ihardlimit = limits.inodes;
    quota.dqb_valid = QIF_BLIMITS | QIF_ILIMITS;
    let command = (Q_SETQUOTA << 8) | USRQUOTA;
    // SAFETY: Q_SETQUOTA reads a `struct if_dqblk`, whose layout `libc::dqblk` has; it lives over the call.
    check(unsafe { libc::syscall(libc::SYS_quotactl_fd, fd.as_raw_fd(), command, uid, &raw const quota) })
        .map(|_| ())
}

/// The Landlock version of the running kernel; an error when Landlock is not built in or not switched on.
pub fn landlock_abi() -> Result<u32, Errno> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the call takes a null pointer and size 0 and only returns a number (landlock(7)).
    let version = check(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    })?;
    u32::try_from(version).map_err(|_| Errno::IO)
}

/// Whether seccomp filters exist here and can answer with an errno.
pub fn seccomp_has_errno() -> bool {
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32 that lives over the call (seccomp(2)).
    let returned =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    returned == 0
}
