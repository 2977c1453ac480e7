//! How is a disk image put together, and how does a disk that is in use get another root?
//!
//! Always: partitions that first boot may format begin with the marker block; nothing else does. The file is
//!         sparse: 16 GiB long, a few hundred megabytes on the builder's disk.

use crate::cache::{Cache, Inputs};
use crate::cmdline::{self, VerifiedRoot};
use crate::esp;
use crate::kernel::Kernel;
use crate::layout::{self, DISK_BYTES, Partition};
use crate::root::Root;
use crate::uki;
use crate::verity::RootHash;
use agentd_domain::marker::{self, Volume};
use anyhow::{Context, Result, ensure};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::{OperatingSystem, Type};
use gpt::{GptConfig, GptDisk};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Written when the code here puts something else on the disk.
const FORMAT: &str = "3";

#[derive(Debug, Clone)]
pub struct Disk {
    pub image: PathBuf,
    /// What of the image has content, for writing it to a real disk; see [`Extent`].
    pub extents: PathBuf,
    pub boot_item: PathBuf,
    pub command_line: String,
}

/// Builds boot item and disk image or finds them in the cache.
pub fn ensure_disk(cache: &Cache, kernel: &Kernel, root: &Root) -> Result<Disk> {
    let command_line =
        cmdline::kernel(&VerifiedRoot { blocks: root.about.blocks, root_hash: root.about.root_hash });
    let mut inputs = Inputs::default();
    inputs
        .text("format", FORMAT)
        .text("root hash", root.about.root_hash.hex())
        .text("version", root.about.version.clone())
        .text("command line", command_line.clone())
        .file("kernel", &kernel.image)?
        .file("stub", Path::new(uki::STUB))?
        .file("boot loader", Path::new(esp::BOOT_LOADER))?;
    let folder = cache.stage("disk", &inputs, |out| {
        let item = out.join("boot-item.efi");
        uki::write(&kernel.image, &command_line, &root.os_release, &item)?;
        std::fs::write(out.join("cmdline"), &command_line)?;
        // The whole record beside the image: toolchain, Debian's packages, the kernel's point release.
        for (name, part) in [("root", &root.image), ("kernel", &kernel.image)] {
            std::fs::copy(part.with_file_name("inputs.json"), out.join(format!("inputs-{name}.json")))
                .with_context(|| format!("{} has no record of its inputs", part.display()))?;
        }
        let image = out.join("disk.img");
        write(&image, root, &item)?;
        let extents = serde_json::to_vec_pretty(&extents(&image, root)?)?;
        std::fs::write(out.join("extents.json"), extents).context("cannot write the list of extents")
    })?;
    Ok(Disk {
        image: folder.join("disk.img"),
        extents: folder.join("extents.json"),
        boot_item: folder.join("boot-item.efi"),
        command_line,
    })
}

/// Writes a fresh disk image.
fn write(path: &Path, root: &Root, boot_item: &Path) -> Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.set_len(DISK_BYTES)?;
    let guids = ImageGuids { version: &root.about.version, root_hash: &root.about.root_hash };
    write_table(&mut file, DISK_BYTES, &guids)?;
    write_root(&mut file, root)?;
    for volume in [Volume::State, Volume::Data] {
        let partition = find(volume.partition_name())?;
        file.seek(SeekFrom::Start(partition.start_bytes))?;
        file.write_all(&marker::block(volume))?;
    }
    drop(file);
    esp::write(path, &find(marker::PARTITION_ESP)?, boot_item, &root.about.version)
}

/// A stretch of the image that a disk must hold byte for byte; the tables excepted, all else may be anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub start_bytes: u64,
    pub length_bytes: u64,
}

fn extents(image: &Path, root: &Root) -> Result<Vec<Extent>> {
    let file = File::open(image)?;
    let esp = find(marker::PARTITION_ESP)?;
    // From its start, so that the tables of free clusters are written even where they are holes.
    let used = last_data(&file, esp.start_bytes, esp.start_bytes + esp.size_bytes)? - esp.start_bytes;
    let block = marker::BLOCK_BYTES as u64;
    [
        (marker::PARTITION_ESP, used),
        (marker::PARTITION_STATE, block),
        (marker::PARTITION_ROOT_A, std::fs::metadata(&root.image)?.len()),
        (marker::PARTITION_VERITY_A, std::fs::metadata(&root.tree)?.len()),
        (marker::PARTITION_DATA, block),
    ]
    .into_iter()
    .map(|(name, length_bytes)| Ok(Extent { start_bytes: find(name)?.start_bytes, length_bytes }))
    .collect()
}

/// Where the last data before `end` ends. A file system without holes says: at `end`.
fn last_data(file: &File, start: u64, end: u64) -> Result<u64> {
    use rustix::fs::{SeekFrom, seek};
    let mut last = start;
    // ENXIO: only a hole is left.
    while let Ok(data) = seek(file, SeekFrom::Data(last)) {
        if data >= end {
            break;
        }
        last = seek(file, SeekFrom::Hole(data))?.min(end);
        if last == end {
            break;
        }
    }
    Ok(last)
}

/// Names on a disk: its own, and each partition's.
pub trait Guids {
    fn disk(&self) -> Uuid;
    fn partition(&self, name: &str) -> Uuid;
}

/// Those of an image: they follow from version and root hash.
pub struct ImageGuids<'a> {
    pub version: &'a str,
    pub root_hash: &'a RootHash,
}

impl Guids for ImageGuids<'_> {
    fn disk(&self) -> Uuid {
        layout::stable_guid(self.version, "disk")
    }

    fn partition(&self, name: &str) -> Uuid {
        layout::guid(name, self.version, self.root_hash)
    }
}

/// Writes both partition tables and the protective master boot record.
pub fn write_table<D>(device: &mut D, disk_bytes: u64, guids: &impl Guids) -> Result<()>
where
    D: gpt::DiskDevice,
{
    let sectors = disk_bytes / layout::SECTOR_BYTES;
    ProtectiveMBR::with_lb_size(u32::try_from(sectors - 1).unwrap_or(u32::MAX)).overwrite_lba0(device)?;
    let mut disk = GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(device, Some(guids.disk()))?;
    let partitions: BTreeMap<u32, gpt::partition::Partition> = (1..)
        .zip(layout::partitions())
        .map(|(number, partition)| (number, entry(&partition, guids.partition(partition.name))))
        .collect();
    disk.update_partitions(partitions)?;
    disk.write()?;
    Ok(())
}

fn entry(partition: &Partition, guid: Uuid) -> gpt::partition::Partition {
    gpt::partition::Partition {
        part_type_guid: Type { guid: partition.kind, os: OperatingSystem::None },
        part_guid: guid,
        first_lba: partition.first_sector(),
        last_lba: partition.last_sector(),
        flags: 0,
        name: partition.name.to_owned(),
    }
}

/// Puts a newer root into slot a of a disk that already has state and data, and names its partitions by it.
/// For direct boot only: a machine that boots by itself is updated by agentd.
pub fn replace_root(path: &Path, root: &Root) -> Result<()> {
    let mut disk = open(path)?;
    let mut partitions = disk.partitions().clone();
    for (name, guid) in [
        (marker::PARTITION_ROOT_A, root.about.root_hash.data_partition()),
        (marker::PARTITION_VERITY_A, root.about.root_hash.hash_partition()),
    ] {
        let partition =
            partitions.values_mut().find(|partition| partition.name == name).with_context(|| {
                format!("{} has no partition {name}; remove it to start anew", path.display())
            })?;
        partition.part_guid = guid;
    }
    disk.update_partitions(partitions)?;
    disk.write()?;
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    write_root(&mut file, root)?;
    file.sync_all()?;
    Ok(())
}

/// The GUIDs of a disk's partitions, by name.
pub fn partition_guids(path: &Path) -> Result<BTreeMap<String, Uuid>> {
    let disk = open(path)?;
    Ok(disk.partitions().values().map(|partition| (partition.name.clone(), partition.part_guid)).collect())
}

/// The GUID that slot a's root has on a disk: which root it holds.
pub fn root_guid(path: &Path) -> Result<Uuid> {
    partition_guids(path)?
        .get(marker::PARTITION_ROOT_A)
        .copied()
        .with_context(|| format!("{} has no slot a", path.display()))
}

fn open(path: &Path) -> Result<GptDisk<File>> {
    GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .open(path)
        .with_context(|| format!("{} is no disk of ours", path.display()))
}

fn write_root(file: &mut File, root: &Root) -> Result<()> {
    for (name, source) in [(marker::PARTITION_ROOT_A, &root.image), (marker::PARTITION_VERITY_A, &root.tree)]
    {
        let partition = find(name)?;
        let bytes = std::fs::metadata(source)?.len();
        ensure!(bytes <= partition.size_bytes, "{} does not fit into {name}", source.display());
        copy_sparse(source, file, partition.start_bytes)?;
    }
    Ok(())
}

fn find(name: &str) -> Result<Partition> {
    layout::partition(name).with_context(|| format!("the layout has no partition {name}"))
}

/// Copies a file to an offset, writing zeros only where something else is.
fn copy_sparse(source: &Path, to: &mut File, offset: u64) -> Result<()> {
    const BLOCK: usize = 64 * 1024;
    let mut from = File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
    let (mut block, mut there) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut at = offset;
    loop {
        let mut length = 0;
        while length < BLOCK {
            match from.read(&mut block[length..])? {
                0 => break,
                read => length += read,
            }
        }
        if length == 0 {
            return Ok(());
        }
        to.seek(SeekFrom::Start(at))?;
        to.read_exact(&mut there[..length])?;
        if block[..length] != there[..length] {
            to.seek(SeekFrom::Start(at))?;
            to.write_all(&block[..length])?;
        }
        at += length as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command;
    use std::process::Command;

    fn table() -> (tempfile::NamedTempFile, RootHash) {
        let hash = RootHash::parse(&"0123456789abcdef".repeat(4)).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DISK_BYTES).unwrap();
        write_table(file.as_file_mut(), DISK_BYTES, &ImageGuids { version: "1.0.0", root_hash: &hash })
            .unwrap();
        (file, hash)
    }

    #[test]
    fn another_tool_finds_the_table_sound_and_the_root_under_its_hash() {
        let (file, hash) = table();
        let verdict = command::output(Command::new("sgdisk").arg("-v").arg(file.path())).unwrap();
        assert!(verdict.contains("No problems found"), "{verdict}");
        let number = 1 + layout::partitions().iter().position(|p| p.name == "root-a").unwrap();
        let about =
            command::output(Command::new("sgdisk").arg(format!("-i{number}")).arg(file.path())).unwrap();
        assert!(about.to_lowercase().contains(&hash.data_partition().to_string()), "{about}");
        assert!(about.contains("'root-a'"), "{about}");
    }

    #[test]
    fn the_table_does_not_depend_on_chance() {
        let read = |file: &tempfile::NamedTempFile| {
            let mut bytes = vec![0; 40 * 1024];
            file.as_file().seek(SeekFrom::Start(0)).unwrap();
            file.as_file().read_exact(&mut bytes).unwrap();
            bytes
        };
        let ((one, _), (other, _)) = (table(), table());
        assert_eq!(read(&one), read(&other));
    }

    #[test]
    fn a_sparse_copy_overwrites_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let mut bytes = vec![0; 200_000];
        bytes[150_000] = 1;
        std::fs::write(&from, &bytes).unwrap();
        std::fs::write(&to, vec![0xff; 300_000]).unwrap();
        let mut file = OpenOptions::new().read(true).write(true).open(&to).unwrap();
        copy_sparse(&from, &mut file, 4096).unwrap();
        let result = std::fs::read(&to).unwrap();
        assert_eq!(&result[4096..4096 + bytes.len()], &bytes[..]);
        assert!(result[..4096].iter().chain(&result[4096 + bytes.len()..]).all(|byte| *byte == 0xff));
    }

    #[test]
    fn the_end_of_data_in_a_sparse_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(64 * layout::MIB).unwrap();
        file.seek(SeekFrom::Start(5 * layout::MIB)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file.seek(SeekFrom::Start(40 * layout::MIB)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file.sync_all().unwrap();
        let end = last_data(&file, layout::MIB, 32 * layout::MIB).unwrap();
        assert!((5 * layout::MIB + 4096..=32 * layout::MIB).contains(&end), "{end}");
        assert_eq!(last_data(&file, 50 * layout::MIB, 60 * layout::MIB).unwrap(), 50 * layout::MIB);
    }

    #[test]
    fn a_file_without_a_table_is_no_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DISK_BYTES).unwrap();
        assert!(root_guid(file.path()).is_err());
    }
}
