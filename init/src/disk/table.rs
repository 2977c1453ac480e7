//! The partition table: GUIDs of this machine's own, a data partition that reaches to the disk's end.
//!
//! Runs in a process of its own, `init disk-setup <job>`, because the library asserts on what it reads and a
//! panic must not be PID 1's. In: a [`Job`] as JSON. Out: one line on standard output, `result: ` and an
//! [`Outcome`] as JSON; everything else it prints is for the log.
//!
//! Always: the backup table is written and synced before the primary one is touched, so at every moment one
//!         of the two is whole; `gpt` on the kernel's command line makes the kernel use the backup.
//! States of a volume, kept in [`FORMAT_BEGUN`] of its entry: marker on the partition -> bit set (with the new
//!         GUIDs, in one write of the table) -> mke2fs -> bit cleared. mke2fs destroys the marker early and
//!         finishes late; without the bit a power cut between would leave a partition that nobody may format.
//! Source: UEFI 2.10, 5.3 (GUID partition table).

use super::find;
use agentd_domain::marker::{self, Volume};
use gpt::disk::LogicalBlockSize;
use gpt::header::Header;
use gpt::partition::Partition;
use gpt::{DiskDevice, GptConfig};
use init_sys::block;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;

pub const RESULT_PREFIX: &str = "result: ";

/// A bit that the specification leaves to the partition type's owner (48 to 63); systemd's are 59 and up.
const FORMAT_BEGUN: u64 = 1 << 48;
/// Partitions end at whole MiB, as everywhere in the table.
const ALIGNMENT_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The disk's kernel name.
    pub disk: String,
    /// The GUID of the partition from which the boot loader came, in lower case.
    pub boot_loader_partition: Option<String>,
    /// What an earlier job of this boot found of the boot loader. It holds for the whole boot: the first job of a
    /// first boot gives the partitions GUIDs of their own, and the boot loader had told the old one.
    pub judged: BootLoader,
    /// Names of the partitions whose formatting is done.
    pub formatted: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    Done { partitions: Vec<Entry>, boot_loader: BootLoader, changed: bool },
    Failed { why: String },
}

/// Where the boot loader came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootLoader {
    /// It told nothing: booted directly.
    #[default]
    Unknown,
    ThisDisk,
    AnotherDisk,
}

/// A partition as init needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub number: u32,
    pub name: String,
    pub start_bytes: u64,
    pub length_bytes: u64,
    pub format_begun: bool,
}

/// The program `init disk-setup`.
pub fn main(job: Option<String>) -> ExitCode {
    let outcome = match job.as_deref().map(serde_json::from_str::<Job>) {
        Some(Ok(job)) => work(&job).unwrap_or_else(|why| Outcome::Failed { why }),
        _ => Outcome::Failed { why: "the job is no JSON".to_owned() },
    };
    match serde_json::to_string(&outcome) {
        Ok(line) => println!("{RESULT_PREFIX}{line}"),
        Err(error) => eprintln!("cannot tell the result: {error}"),
    }
    ExitCode::SUCCESS
}

fn work(job: &Job) -> Result<Outcome, String> {
    let path = Path::new("/dev").join(&job.disk);
    let told = |error: io::Error| format!("{}: {error}", path.display());
    let mut device = OpenOptions::new().read(true).write(true).open(&path).map_err(told)?;
    let sector = block::sector_bytes(&device).map_err(told)?;
    let sector = LogicalBlockSize::try_from(u64::from(sector)).map_err(told)?;
    // The markers were cleared through the partitions; an older copy of them may be cached for the disk.
    block::forget_cached(&device).map_err(told)?;
    let outcome = set_up(&mut device, sector, job)?;
    if let Outcome::Done { partitions, .. } = &outcome {
        tell_kernel(&device, &job.disk, partitions)
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(outcome)
}

/// The kernel read the table at boot; a data partition that has grown since (now, or at a boot that was cut
/// short) is told to it.
fn tell_kernel(device: &File, disk: &str, partitions: &[Entry]) -> io::Result<()> {
    for entry in partitions {
        let known =
            find::partition_name(disk, entry.number).and_then(|name| find::kernel_size_bytes(disk, &name));
        if known.is_some_and(|known| known != entry.length_bytes) {
            let Entry { number, start_bytes, length_bytes, .. } = *entry;
            block::tell_kernel_of_new_size(device, block::Extent { number, start_bytes, length_bytes })?;
        }
    }
    Ok(())
}

/// Something that can be synced: a disk, or a buffer in a test.
pub trait Durable: DiskDevice {
    fn sync(&mut self) -> io::Result<()>;
}

impl Durable for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

fn set_up<D: Durable>(device: &mut D, sector: LogicalBlockSize, job: &Job) -> Result<Outcome, String> {
    let Table { header, mut partitions, both_whole } = read(device, sector)?;
    let boot_loader = boot_loader(job, &partitions);
    let (mut wanted, before) = (header.clone(), partitions.clone());
    if boot_loader != BootLoader::AnotherDisk {
        for partition in partitions.values_mut().filter(|p| job.formatted.contains(&p.name)) {
            partition.flags &= !FORMAT_BEGUN;
        }
        first_boot(device, sector, &mut wanted, &mut partitions)?;
        grow(device, sector, &mut wanted, &mut partitions)?;
    }
    let changed = wanted != header || partitions != before;
    if (changed || !both_whole) && boot_loader != BootLoader::AnotherDisk {
        write(device, sector, wanted, &partitions)?;
    }
    let entries = partitions.iter().filter_map(|(number, p)| entry(*number, p, sector)).collect();
    Ok(Outcome::Done { partitions: entries, boot_loader, changed })
}

fn entry(number: u32, partition: &Partition, sector: LogicalBlockSize) -> Option<Entry> {
    Some(Entry {
        number,
        name: partition.name.clone(),
        start_bytes: partition.bytes_start(sector).ok()?,
        length_bytes: partition.bytes_len(sector).ok()?,
        format_begun: partition.flags & FORMAT_BEGUN != 0,
    })
}

fn boot_loader(job: &Job, partitions: &BTreeMap<u32, Partition>) -> BootLoader {
    if job.judged != BootLoader::Unknown {
        return job.judged;
    }
    match &job.boot_loader_partition {
        None => BootLoader::Unknown,
        Some(guid) if partitions.values().any(|p| p.part_guid.to_string() == *guid) => BootLoader::ThisDisk,
        Some(_) => BootLoader::AnotherDisk,
    }
}

/// The table as it is read, whichever copy it comes from.
struct Table {
    /// As the primary one.
    header: Header,
    partitions: BTreeMap<u32, Partition>,
    /// Both copies are good and say the same.
    both_whole: bool,
}

fn read<D: Durable>(device: &mut D, sector: LogicalBlockSize) -> Result<Table, String> {
    let config = GptConfig::new().logical_block_size(sector);
    // The library takes the backup only when the primary *header* is broken; a torn primary *array* would end
    // in an error, so the backup is read by itself, without sight of the primary header.
    let primary = config.clone().open_from_device(Borrowed(device));
    let primary = primary.map(|disk| (disk.primary_header().ok().cloned(), disk.partitions().clone()));
    let backup = config.open_from_device(WithoutPrimary { device, sector });
    let backup = backup.map(|disk| (disk.header().clone(), disk.partitions().clone()));
    match (primary, backup) {
        (Ok((Some(header), partitions)), backup) => {
            let both_whole = backup.is_ok_and(|(backup, same)| {
                same == partitions
                    && backup.disk_guid == header.disk_guid
                    && backup.current_lba == header.backup_lba
            });
            Ok(Table { header, partitions, both_whole })
        }
        (_, Ok((mut header, partitions))) => {
            (header.current_lba, header.backup_lba) = (1, header.current_lba);
            header.part_start = 2;
            Ok(Table { header, partitions, both_whole: false })
        }
        (Err(primary), Err(backup)) => Err(format!("primary table: {primary}; backup table: {backup}")),
        (Ok((None, _)), Err(backup)) => Err(format!("primary table: broken header; backup table: {backup}")),
    }
}

/// New GUIDs for whatever two disks with the same image must not share. The roots keep theirs: they are named
/// by their hash.
fn first_boot<D: Durable>(
    device: &mut D,
    sector: LogicalBlockSize,
    header: &mut Header,
    partitions: &mut BTreeMap<u32, Partition>,
) -> Result<(), String> {
    let mut is_first = false;
    for partition in partitions.values_mut() {
        let Some(volume) = volume_of(&partition.name) else { continue };
        if partition.flags & FORMAT_BEGUN == 0 && begins_with_marker(device, sector, partition, volume)? {
            partition.flags |= FORMAT_BEGUN;
            is_first |= volume == Volume::State;
        }
    }
    if is_first {
        header.disk_guid = new_guid()?;
        let own = [marker::PARTITION_ESP, marker::PARTITION_STATE, marker::PARTITION_DATA];
        for partition in partitions.values_mut().filter(|p| own.contains(&p.name.as_str())) {
            partition.part_guid = new_guid()?;
        }
    }
    Ok(())
}

fn volume_of(name: &str) -> Option<Volume> {
    [Volume::State, Volume::Data].into_iter().find(|volume| volume.partition_name() == name)
}

fn begins_with_marker<D: Durable>(
    device: &mut D,
    sector: LogicalBlockSize,
    partition: &Partition,
    volume: Volume,
) -> Result<bool, String> {
    let told = |error: io::Error| format!("partition `{}`: {error}", partition.name);
    let start_bytes = partition.bytes_start(sector).map_err(told)?;
    let mut head = vec![0; marker::BLOCK_BYTES];
    device.seek(SeekFrom::Start(start_bytes)).map_err(told)?;
    device.read_exact(&mut head).map_err(told)?;
    Ok(marker::asks_to_be_formatted(&head, volume))
}

fn new_guid() -> Result<uuid::Uuid, String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| format!("no random numbers: {error}"))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

/// Lets the usable area and the data partition reach to the end of the disk as it is now.
fn grow<D: Durable>(
    device: &mut D,
    sector: LogicalBlockSize,
    header: &mut Header,
    partitions: &mut BTreeMap<u32, Partition>,
) -> Result<(), String> {
    let sector_bytes = sector.as_u64();
    let length_bytes = device.seek(SeekFrom::End(0)).map_err(|error| format!("size of the disk: {error}"))?;
    let array_sectors = (u64::from(header.num_parts) * u64::from(header.part_size)).div_ceil(sector_bytes);
    let last_sector = (length_bytes / sector_bytes).checked_sub(1).ok_or("the disk is empty")?;
    let last_usable =
        last_sector.checked_sub(array_sectors + 1).ok_or("the disk is too small for a table")?;
    if partitions.values().any(|partition| partition.last_lba > last_usable) {
        return Err(format!(
            "the table describes a larger disk: a partition ends behind the last usable sector {last_usable}"
        ));
    }
    header.backup_lba = last_sector;
    header.last_usable = last_usable;
    let others_end =
        partitions.values().filter(|p| p.name != marker::PARTITION_DATA).map(|p| p.last_lba).max();
    let aligned_end = (last_usable + 1) / (ALIGNMENT_BYTES / sector_bytes) * (ALIGNMENT_BYTES / sector_bytes);
    for partition in partitions.values_mut().filter(|p| p.name == marker::PARTITION_DATA) {
        // Only a partition with nothing behind it can grow.
        if others_end.is_none_or(|end| end < partition.first_lba) {
            partition.last_lba = partition.last_lba.max(aligned_end.saturating_sub(1));
        }
    }
    Ok(())
}

/// Backup first, sync, then primary, sync.
fn write<D: Durable>(
    device: &mut D,
    sector: LogicalBlockSize,
    primary: Header,
    partitions: &BTreeMap<u32, Partition>,
) -> Result<(), String> {
    let mut primary = primary;
    let mut backup = primary.clone();
    (backup.current_lba, backup.backup_lba) = (primary.backup_lba, primary.current_lba);
    backup.part_start = primary.last_usable + 1;
    let written = (|| {
        write_array(device, sector, &backup, partitions)?;
        backup
            .write_backup(&mut Borrowed(device), sector)
            .map_err(|error| io::Error::other(error.to_string()))?;
        device.sync()?;
        write_array(device, sector, &primary, partitions)?;
        primary
            .write_primary(&mut Borrowed(device), sector)
            .map_err(|error| io::Error::other(error.to_string()))?;
        device.sync()
    })();
    written.map_err(|error: io::Error| format!("writing the partition table: {error}"))
}

fn write_array<D: Durable>(
    device: &mut D,
    sector: LogicalBlockSize,
    header: &Header,
    partitions: &BTreeMap<u32, Partition>,
) -> io::Result<()> {
    // Put together in memory, so that the disk sees one write.
    let length = usize::try_from(u64::from(header.num_parts) * u64::from(header.part_size));
    let mut array = io::Cursor::new(vec![0; length.map_err(io::Error::other)?]);
    let empty = Partition::zero();
    for index in 0..header.num_parts {
        let partition = partitions.get(&(index + 1)).unwrap_or(&empty);
        partition.write_to_device(&mut array, index.into(), 0, sector, header.part_size)?;
    }
    device.seek(SeekFrom::Start(header.part_start * sector.as_u64()))?;
    device.write_all(array.get_ref())
}

/// The library wants to own its device.
#[derive(Debug)]
struct Borrowed<'d, D>(&'d mut D);

impl<D: Read> Read for Borrowed<'_, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<D: Write> Write for Borrowed<'_, D> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<D: Seek> Seek for Borrowed<'_, D> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.0.seek(position)
    }
}

/// The same device with nothing in the sector of the primary header.
#[derive(Debug)]
struct WithoutPrimary<'d, D> {
    device: &'d mut D,
    sector: LogicalBlockSize,
}

impl<D: Read + Seek> Read for WithoutPrimary<'_, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let position = self.device.stream_position()?;
        let read = self.device.read(buffer)?;
        let header = self.sector.as_u64()..self.sector.as_u64() * 2;
        for (offset, byte) in (0_u64..).zip(buffer.iter_mut().take(read)) {
            if header.contains(&(position + offset)) {
                *byte = 0;
            }
        }
        Ok(read)
    }
}

impl<D: Write> Write for WithoutPrimary<'_, D> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<D: Seek> Seek for WithoutPrimary<'_, D> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.device.seek(position)
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
