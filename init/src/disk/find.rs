//! Which disk carries the running root?
//!
//! `/` lies on a device; a device-mapper device has slaves in sysfs; a slave is a partition whose folder in
//! sysfs lies in its disk's. Source: Documentation/ABI/testing/sysfs-block, sysfs(5).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A disk by its kernel name (`vda`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// Kernel names of the partitions that the root is made of.
    pub root_partitions: Vec<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FindError {
    #[error("the root is not on a block device (device {major}:{minor})")]
    NotOnADevice { major: u32, minor: u32 },
    #[error("the root's device {0} has no disk below it")]
    NoDisk(String),
    #[error("the root is spread over several disks: {0}")]
    SeveralDisks(String),
}

/// The disk of the running root.
pub fn of_root() -> Result<Disk, FindError> {
    let device = fs::metadata("/").map_or(0, |meta| meta.dev());
    of_device(Path::new("/sys"), rustix::fs::major(device), rustix::fs::minor(device))
}

fn of_device(sys: &Path, major: u32, minor: u32) -> Result<Disk, FindError> {
    let block = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}")))
        .map_err(|_| FindError::NotOnADevice { major, minor })?;
    let mut leaves = Vec::new();
    descend(sys, &block, 0, &mut leaves);
    let mut disks: Vec<String> = leaves.iter().filter_map(|leaf| disk_of(leaf)).collect();
    disks.sort();
    disks.dedup();
    let name = match disks.as_slice() {
        [] => return Err(FindError::NoDisk(name_of(&block))),
        [one] => one.clone(),
        several => return Err(FindError::SeveralDisks(several.join(", "))),
    };
    let root_partitions =
        leaves.iter().filter(|leaf| leaf.join("partition").exists()).map(|leaf| name_of(leaf)).collect();
    Ok(Disk { name, root_partitions })
}

/// The devices at the bottom, below any layers of device mapper. Four layers are more than there ever are;
/// the limit ends a loop that the kernel should not make.
fn descend(sys: &Path, block: &Path, depth: u32, leaves: &mut Vec<PathBuf>) {
    let slaves = names(&block.join("slaves")).unwrap_or_default();
    if slaves.is_empty() || depth >= 4 {
        leaves.push(block.to_owned());
        return;
    }
    for slave in slaves {
        if let Ok(block) = fs::canonicalize(sys.join("class/block").join(slave)) {
            descend(sys, &block, depth + 1, leaves);
        }
    }
}

/// A partition's folder lies in its disk's; any other device is its own disk.
fn disk_of(block: &Path) -> Option<String> {
    if block.join("partition").exists() { block.parent().map(name_of) } else { Some(name_of(block)) }
}

/// The kernel's name of a disk's partition by its number in the table.
pub fn partition_name(disk: &str, number: u32) -> Option<String> {
    let folder = Path::new("/sys/block").join(disk);
    names(&folder).ok()?.into_iter().find(|name| {
        fs::read_to_string(folder.join(name).join("partition")).is_ok_and(|n| n.trim().parse() == Ok(number))
    })
}

/// The size that the kernel believes a partition to have.
pub fn kernel_size_bytes(disk: &str, partition: &str) -> Option<u64> {
    let text = fs::read_to_string(Path::new("/sys/block").join(disk).join(partition).join("size")).ok()?;
    // Always in units of 512 bytes, whatever the sector size.
    text.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Kernel names of all block devices whose serial number, as the device tells it, is this one.
pub fn by_serial(serial: &str) -> Option<String> {
    names(Path::new("/sys/block")).ok()?.into_iter().find(|name| {
        let path = Path::new("/sys/block").join(name).join("serial");
        fs::read_to_string(path).is_ok_and(|text| text.trim_matches(['\0', '\n', ' ']) == serial)
    })
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names: Vec<String> =
        fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs with a disk of two partitions below a device-mapper root.
    fn sysfs(disks: [&str; 2]) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let path = |text: &str| sys.path().join(text);
        fs::create_dir_all(path("dev/block")).unwrap();
        fs::create_dir_all(path("class/block")).unwrap();
        fs::create_dir_all(path("devices/virtual/block/dm-0/slaves")).unwrap();
        for (disk, partition, number) in [(disks[0], "p3", "3"), (disks[1], "p4", "4")] {
            let name = format!("{disk}{partition}");
            let folder = path(&format!("devices/pci/{disk}/{name}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("partition"), number).unwrap();
            symlink(&folder, path(&format!("class/block/{name}"))).unwrap();
            symlink(&folder, path(&format!("devices/virtual/block/dm-0/slaves/{name}"))).unwrap();
        }
        symlink(path("devices/virtual/block/dm-0"), path("dev/block/254:0")).unwrap();
        symlink(path(&format!("devices/pci/{0}/{0}p3", disks[0])), path("dev/block/259:3")).unwrap();
        sys
    }

    #[test]
    fn a_verified_root_leads_to_its_disk() {
        let sys = sysfs(["nvme0n1", "nvme0n1"]);
        let disk = of_device(sys.path(), 254, 0).unwrap();
        assert_eq!(disk.name, "nvme0n1");
        assert_eq!(disk.root_partitions, ["nvme0n1p3", "nvme0n1p4"]);
    }

    #[test]
    fn a_plain_partition_leads_to_its_disk() {
        let sys = sysfs(["sda", "sda"]);
        assert_eq!(of_device(sys.path(), 259, 3).unwrap().name, "sda");
    }

    #[test]
    fn a_root_on_two_disks_or_on_none_is_an_error() {
        let sys = sysfs(["sda", "sdb"]);
        assert_eq!(of_device(sys.path(), 254, 0), Err(FindError::SeveralDisks("sda, sdb".to_owned())));
        assert_eq!(of_device(sys.path(), 0, 2), Err(FindError::NotOnADevice { major: 0, minor: 2 }));
    }
}
