//! Sizes of block devices, and telling the kernel that a partition has grown.
//!
//! A table that carries the running root cannot be read again as a whole (`BLKRRPART` fails while a
//! partition is in use); `BLKPG` changes one partition. Source: linux/fs.h, linux/blkpg.h, ioctl(2).

use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

const BLKSSZGET: libc::Ioctl = 0x1268;
/// `_IOR(0x12, 114, size_t)`
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKPG: libc::Ioctl = 0x1269;
const BLKFLSBUF: libc::Ioctl = 0x1261;
const BLKPG_RESIZE_PARTITION: libc::c_int = 3;

/// The device's size. Works for block devices only.
pub fn size_bytes(device: impl AsFd) -> io::Result<u64> {
    let mut size: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer; `size` is a live, aligned u64 that nothing
    // else refers to, and the descriptor is open for the whole call because it is borrowed.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    check(result)?;
    Ok(size)
}

/// The size of a logical sector, in which the partition table counts.
pub fn sector_bytes(device: impl AsFd) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int through the pointer; `size` is a live, aligned c_int that nothing
    // else refers to, and the descriptor is open for the whole call because it is borrowed.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKSSZGET, &raw mut size) };
    check(result)?;
    u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Writes and forgets what is cached of this device, so that the next reading is from the disk.
///
/// A disk and its partitions are cached apart: what was written through a partition is not seen through the
/// disk while an older copy is cached there.
pub fn forget_cached(device: impl AsFd) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument and touches no memory of ours; the descriptor is open for the whole
    // call because it is borrowed.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKFLSBUF, 0) };
    check(result)
}

/// Where a partition lies now. It must begin where it began before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub number: u32,
    pub start_bytes: u64,
    pub length_bytes: u64,
}

/// Tells the kernel the new size of a partition of `disk`. Works while other partitions are in use.
pub fn tell_kernel_of_new_size(disk: impl AsFd, extent: Extent) -> io::Result<()> {
    let number = libc::c_int::try_from(extent.number).map_err(|_| io::ErrorKind::InvalidInput)?;
    let signed = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let mut partition = BlkpgPartition {
        start: signed(extent.start_bytes)?,
        length: signed(extent.length_bytes)?,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let mut argument = BlkpgIoctlArg {
        operation: BLKPG_RESIZE_PARTITION,
        flags: 0,
        data_length: size_of::<BlkpgPartition>() as libc::c_int,
        data: &raw mut partition,
    };
    // SAFETY: BLKPG reads a blkpg_ioctl_arg and, through its `data`, a blkpg_partition. Both structs below
    // have the kernel's layout (repr(C), the same fields and widths), both live until the call returns, and
    // the kernel writes to neither for this operation.
    let result = unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLKPG, &raw mut argument) };
    check(result)
}

/// `struct blkpg_partition`
#[repr(C)]
struct BlkpgPartition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`
#[repr(C)]
struct BlkpgIoctlArg {
    operation: libc::c_int,
    flags: libc::c_int,
    data_length: libc::c_int,
    data: *mut BlkpgPartition,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Is this the error of an ioctl that the file's kind does not know?
pub fn is_no_block_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOTTY.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        assert!(is_no_block_device(&size_bytes(&file).unwrap_err()));
        assert!(is_no_block_device(&sector_bytes(&file).unwrap_err()));
    }

    #[test]
    fn the_structs_have_the_kernels_layout() {
        // sizeof() of the same structs in linux/blkpg.h on x86_64.
        assert_eq!(size_of::<BlkpgPartition>(), 152);
        assert_eq!(size_of::<BlkpgIoctlArg>(), 24);
    }
}
