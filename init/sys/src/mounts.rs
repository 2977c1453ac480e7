//! Mounting and unmounting, and what is mounted now.
//!
//! Source: mount(2), umount2(2), proc_pid_mountinfo(5).

use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

pub use rustix::mount::MountFlags as Flags;

/// Mounts a file system. `options` are its own ones, comma-separated; empty for none.
pub fn mount(source: &str, target: &Path, kind: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = CString::new(options).map_err(|_| io::ErrorKind::InvalidInput)?;
    rustix::mount::mount(source, target, kind, flags, Some(options.as_c_str()))?;
    Ok(())
}

/// Makes what is mounted at `target` read-only, keeping its other flags.
pub fn remount_read_only(target: &Path) -> io::Result<()> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount_remount(target, flags, c"")?;
    Ok(())
}

/// Unmounts; fails while something in it is in use.
pub fn unmount(target: &Path) -> io::Result<()> {
    rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?;
    Ok(())
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    pub target: PathBuf,
    pub kind: String,
    pub source: String,
}

/// What is mounted in this mount namespace, in the order of mounting.
pub fn mounted() -> io::Result<Vec<Mounted>> {
    Ok(parse_mountinfo(&std::fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse_mountinfo(text: &str) -> Vec<Mounted> {
    text.lines().filter_map(parse_line).collect()
}

/// Fields: id, parent, device, root, mount point, options, optional fields..., `-`, type, source, options.
fn parse_line(line: &str) -> Option<Mounted> {
    let (before, after) = line.split_once(" - ")?;
    let target = before.split(' ').nth(4)?;
    let mut after = after.split(' ');
    let kind = after.next()?.to_owned();
    let source = unescape(after.next()?);
    Some(Mounted { target: PathBuf::from(unescape(target)), kind, source })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_and_without_optional_fields() {
        let text = "22 1 254:0 / / ro,relatime shared:1 - erofs /dev/root ro\n\
                    30 22 254:8 / /data\\040x rw,nosuid - ext4 /dev/vda8 rw,quota\n\
                    nonsense\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].kind, "erofs");
        assert_eq!(mounts[1].target, Path::new("/data x"));
        assert_eq!(mounts[1].source, "/dev/vda8");
    }

    #[test]
    fn this_machine_has_a_root() {
        assert!(mounted().unwrap().iter().any(|m| m.target == Path::new("/")));
    }
}
