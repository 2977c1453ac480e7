//! Limits of disk use per user, on an ext4 with the quota feature.
//!
//! quotactl_fd names the file system by an open file in it, so no device path has to be known.
//! Source: quotactl(2), linux/quota.h; quotactl_fd since Linux 5.14.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const USRQUOTA: libc::c_int = 0;
const Q_GETQUOTA: libc::c_int = 0x0080_0007;
const Q_SETQUOTA: libc::c_int = 0x0080_0008;
/// `QIF_BLIMITS | QIF_ILIMITS`: only the limits of the struct are to be applied.
const QIF_LIMITS: u32 = 1 | 4;
/// Block limits are counted in units of 1 KiB (QIF_DQBLKSIZE).
const BLOCK_BYTES: u64 = 1024;

/// What a user may hold; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes: Option<u64>,
    pub inodes: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// Sets a user's hard limits. Needs CAP_SYS_ADMIN. Bytes are rounded up to whole KiB.
pub fn set_user_limits(file_system: impl AsFd, uid: u32, limits: Limits) -> io::Result<()> {
    // Zero means "no limit" to the kernel; a limit of nothing at all becomes the smallest there is.
    let blocks = limits.bytes.map_or(0, |bytes| bytes.div_ceil(BLOCK_BYTES).max(1));
    let inodes = limits.inodes.map_or(0, |inodes| inodes.max(1));
    let mut quota = DqBlk {
        block_hard_limit: blocks,
        block_soft_limit: blocks,
        inode_hard_limit: inodes,
        inode_soft_limit: inodes,
        valid: QIF_LIMITS,
        ..DqBlk::default()
    };
    call(file_system, Q_SETQUOTA, uid, &mut quota)
}

/// What a user holds now. Needs CAP_SYS_ADMIN for others' uids.
pub fn user_usage(file_system: impl AsFd, uid: u32) -> io::Result<Usage> {
    let mut quota = DqBlk::default();
    call(file_system, Q_GETQUOTA, uid, &mut quota)?;
    Ok(Usage { bytes: quota.current_space, inodes: quota.current_inodes })
}

/// `struct if_dqblk`
#[repr(C)]
#[derive(Default)]
struct DqBlk {
    block_hard_limit: u64,
    block_soft_limit: u64,
    current_space: u64,
    inode_hard_limit: u64,
    inode_soft_limit: u64,
    current_inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}

fn call(file_system: impl AsFd, command: libc::c_int, uid: u32, quota: &mut DqBlk) -> io::Result<()> {
    // QCMD(cmd, type)
    let command = (command << 8) | USRQUOTA;
    // SAFETY: the system call reads or writes one if_dqblk through the pointer. `DqBlk` has that struct's
    // layout (repr(C), the same fields), is initialised, and is borrowed exclusively for the whole call; the
    // descriptor is open because it is borrowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            file_system.as_fd().as_raw_fd(),
            command,
            uid,
            std::ptr::from_mut(quota),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_has_the_kernels_layout() {
        // sizeof(struct if_dqblk) in linux/quota.h on x86_64.
        assert_eq!(size_of::<DqBlk>(), 72);
    }
}
