//! How is the image written to a real disk?
//!
//! In:     a finished image with its list of extents, and a whole disk that nobody uses.
//! Always: the old partition table goes first and the new one comes last, so an interrupted flash never
//!         boots half an appliance. Disk, ESP, state and data get GUIDs of their own: a stick and the machine
//!         it was installed from must not be taken for each other. What was written is read back from the
//!         disk, not from memory.
//! Never:  a partition, a mounted disk, a disk that is too small, or one with sectors other than 512 bytes.

use crate::disk::{self, Extent, Guids};
use crate::layout::{self, DISK_BYTES, MIB};
use agentd_domain::marker;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, fadvise};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What decides whether a disk may be overwritten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    pub bytes: u64,
    pub sector_bytes: u64,
    pub is_partition: bool,
    /// Vendor and model, as the kernel tells.
    pub model: String,
    /// Mount points of it and of its partitions.
    pub mounted: Vec<String>,
    /// Mapped, swapped to or otherwise held by the kernel.
    pub held: bool,
}

impl Target {
    /// All reasons against, as sentences. Pure.
    pub fn objections(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.is_partition {
            reasons.push(format!("{} is a partition; name the whole disk", self.name));
        }
        if self.bytes < DISK_BYTES {
            reasons.push(format!("it holds {} MiB, less than {} MiB", self.bytes / MIB, DISK_BYTES / MIB));
        }
        if self.sector_bytes != layout::SECTOR_BYTES {
            reasons.push(format!("its sectors have {} bytes, not 512", self.sector_bytes));
        }
        for place in &self.mounted {
            reasons.push(format!("it is in use at {place}; unmount it first"));
        }
        if self.held {
            reasons.push("another device is built on it (RAID, LVM or encryption)".to_owned());
        }
        reasons
    }
}

/// Looks at a block device through sysfs.
pub fn inspect(device: &Path) -> Result<Target> {
    let device = device.canonicalize().with_context(|| format!("no device {}", device.display()))?;
    let kind = std::fs::metadata(&device)?.file_type();
    ensure!(kind.is_block_device(), "{} is not a block device", device.display());
    let name =
        device.file_name().and_then(|name| name.to_str()).context("a device without a name")?.to_owned();
    let about = PathBuf::from("/sys/class/block").join(&name);
    let read = |file: &str| std::fs::read_to_string(about.join(file)).map(|text| text.trim().to_owned());
    let sectors: u64 = read("size").with_context(|| format!("the kernel knows no {name}"))?.parse()?;
    let mut parts = vec![about.clone()];
    for entry in std::fs::read_dir(&about)? {
        let path = entry?.path();
        if path.join("partition").exists() {
            parts.push(path);
        }
    }
    let numbers: Vec<String> = parts
        .iter()
        .filter_map(|part| Some(std::fs::read_to_string(part.join("dev")).ok()?.trim().to_owned()))
        .collect();
    let held = parts.iter().any(|part| {
        std::fs::read_dir(part.join("holders")).is_ok_and(|mut holders| holders.next().is_some())
    });
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(Target {
        name,
        // sysfs counts in 512 bytes whatever the disk does.
        bytes: sectors * 512,
        sector_bytes: read("queue/logical_block_size").unwrap_or_default().parse().unwrap_or(512),
        is_partition: about.join("partition").exists(),
        model: format!(
            "{} {}",
            read("device/vendor").unwrap_or_default(),
            read("device/model").unwrap_or_else(|_| "unknown model".to_owned())
        ),
        mounted: mount_points(&mounts, &numbers),
        held,
    })
}

/// Where devices with these numbers are mounted. Source: proc_pid_mountinfo(5).
fn mount_points(mountinfo: &str, numbers: &[String]) -> Vec<String> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let number = words.nth(2)?;
            let place = words.nth(1)?;
            numbers.iter().any(|n| n == number).then(|| place.to_owned())
        })
        .collect()
}

/// Writes and reads back. `device` is a disk, or in tests a file of its size.
pub fn write(image: &Path, extents: &[Extent], device: &Path) -> Result<()> {
    let mut from = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    let mut to = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .with_context(|| format!("cannot write to {}", device.display()))?;
    let bytes = to.seek(SeekFrom::End(0))?;
    ensure!(bytes >= DISK_BYTES, "{} is too small", device.display());
    forget_tables(&mut to, bytes)?;
    for extent in extents {
        each_block(&mut from, extent, |at, block| {
            to.seek(SeekFrom::Start(at))?;
            Ok(to.write_all(block)?)
        })?;
    }
    to.sync_all()?;
    disk::write_table(&mut to, bytes, &OwnGuids::read(image)?)?;
    to.sync_all()?;
    // Without this the comparison would be with the page cache.
    fadvise(&to, 0, None, Advice::DontNeed)?;
    let mut there = Vec::new();
    for extent in extents {
        each_block(&mut from, extent, |at, block| {
            there.resize(block.len(), 0);
            to.seek(SeekFrom::Start(at))?;
            to.read_exact(&mut there)?;
            ensure!(there == block, "{} does not hold at byte {at} what was written", device.display());
            Ok(())
        })?;
    }
    Ok(())
}

/// Both tables, so that neither an old primary nor an old backup is found.
fn forget_tables(device: &mut File, bytes: u64) -> Result<()> {
    let zeros = vec![0; usize::try_from(MIB)?];
    for at in [0, bytes - MIB] {
        device.seek(SeekFrom::Start(at))?;
        device.write_all(&zeros)?;
    }
    Ok(device.sync_all()?)
}

fn each_block(from: &mut File, extent: &Extent, mut act: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let mut block = vec![0; usize::try_from(MIB)?];
    let mut done = 0;
    while done < extent.length_bytes {
        let length = usize::try_from((extent.length_bytes - done).min(MIB))?;
        from.seek(SeekFrom::Start(extent.start_bytes + done))?;
        from.read_exact(&mut block[..length])?;
        act(extent.start_bytes + done, &block[..length])?;
        done += length as u64;
    }
    Ok(())
}

/// Roots keep the names that their hash gives them; everything else gets a new one.
struct OwnGuids(BTreeMap<String, Uuid>);

impl OwnGuids {
    fn read(image: &Path) -> Result<Self> {
        let names = disk::partition_guids(image)?;
        for name in [marker::PARTITION_ROOT_A, marker::PARTITION_VERITY_A] {
            if !names.contains_key(name) {
                bail!("{} has no partition {name}", image.display());
            }
        }
        Ok(Self(names))
    }
}

impl Guids for OwnGuids {
    fn disk(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn partition(&self, name: &str) -> Uuid {
        match (name, self.0.get(name)) {
            (marker::PARTITION_ROOT_A | marker::PARTITION_VERITY_A, Some(guid)) => *guid,
            _ => Uuid::new_v4(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ImageGuids;
    use crate::verity::RootHash;

    fn good() -> Target {
        Target {
            name: "sdx".to_owned(),
            bytes: 32 * layout::GIB,
            sector_bytes: 512,
            is_partition: false,
            model: "a stick".to_owned(),
            mounted: Vec::new(),
            held: false,
        }
    }

    #[test]
    fn every_reason_against_a_disk_is_given_at_once() {
        assert_eq!(good().objections(), Vec::<String>::new());
        let bad = Target {
            bytes: layout::GIB,
            sector_bytes: 4096,
            is_partition: true,
            mounted: vec!["/home".to_owned()],
            held: true,
            ..good()
        };
        assert_eq!(bad.objections().len(), 5, "{:?}", bad.objections());
    }

    #[test]
    fn a_mounted_partition_is_found_by_its_number() {
        let text = "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n30 22 8:17 /sub /mnt/stick rw - vfat /dev/sdb1 rw\n";
        assert_eq!(mount_points(text, &["8:17".to_owned()]), ["/mnt/stick"]);
        assert_eq!(mount_points(text, &["8:1".to_owned()]), Vec::<String>::new());
    }

    #[test]
    fn a_larger_disk_gets_the_content_both_tables_and_names_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let (image, device) = (folder.path().join("image"), folder.path().join("device"));
        let hash = RootHash::parse(&"0123456789abcdef".repeat(4)).unwrap();
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&image).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        disk::write_table(&mut file, DISK_BYTES, &ImageGuids { version: "1", root_hash: &hash }).unwrap();
        let start = layout::partition("root-a").unwrap().start_bytes;
        file.seek(SeekFrom::Start(start)).unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        // The old disk's content, which must be gone where the image has zeros.
        let mut old = File::create(&device).unwrap();
        old.set_len(20 * layout::GIB).unwrap();
        old.seek(SeekFrom::Start(start)).unwrap();
        old.write_all(&[9; 20_000]).unwrap();
        let extents = [Extent { start_bytes: start, length_bytes: 16_384 }];
        write(&image, &extents, &device).unwrap();

        let mut bytes = vec![0; 20_000];
        let mut file = File::open(&device).unwrap();
        file.seek(SeekFrom::Start(start)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        assert!(bytes[..10_000].iter().all(|b| *b == 7) && bytes[10_000..16_384].iter().all(|b| *b == 0));
        let (before, after) =
            (disk::partition_guids(&image).unwrap(), disk::partition_guids(&device).unwrap());
        assert_eq!(before["root-a"], after["root-a"]);
        assert_eq!(before["verity-a"], after["verity-a"]);
        for name in ["esp", "state", "data"] {
            assert_ne!(before[name], after[name], "{name}");
        }
        let verdict =
            crate::command::output(std::process::Command::new("sgdisk").arg("-v").arg(&device)).unwrap();
        assert!(verdict.contains("No problems found"), "{verdict}");
    }

    #[test]
    fn a_small_disk_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (image, device) = (folder.path().join("image"), folder.path().join("device"));
        File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
        std::fs::write(&device, "precious").unwrap();
        assert!(write(&image, &[], &device).is_err());
        assert_eq!(std::fs::read_to_string(&device).unwrap(), "precious");
    }
}
