use super::*;
use gpt::partition_types;
use std::io::Cursor;

const SECTOR: LogicalBlockSize = LogicalBlockSize::Lb512;
const MIB: usize = 1 << 20;

/// A disk in memory that remembers every write, so that a test can stop at each.
#[derive(Debug, Clone, Default)]
struct Memory {
    bytes: Cursor<Vec<u8>>,
    writes: Vec<(u64, Vec<u8>)>,
    syncs: Vec<usize>,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Cursor::new(bytes), ..Self::default() }
    }

    fn apply(&mut self, writes: &[(u64, Vec<u8>)]) {
        for (offset, bytes) in writes {
            let start = usize::try_from(*offset).unwrap();
            self.bytes.get_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }
}

impl Read for Memory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(buffer)
    }
}

impl Write for Memory {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.writes.push((self.bytes.position(), buffer.to_vec()));
        self.bytes.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Memory {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(position)
    }
}

impl Durable for Memory {
    fn sync(&mut self) -> io::Result<()> {
        self.syncs.push(self.writes.len());
        Ok(())
    }
}

/// What `image/` makes, at a smaller scale: four partitions, markers, equal GUIDs on every copy.
fn factory_disk(length: usize) -> Memory {
    let mut bytes = vec![0; 16 * MIB];
    gpt::mbr::ProtectiveMBR::with_lb_size(32767).overwrite_lba0(&mut Cursor::new(&mut bytes)).unwrap();
    let mut disk = GptConfig::new()
        .writable(true)
        .logical_block_size(SECTOR)
        .create_from_device(Cursor::new(bytes), Some(uuid::Uuid::from_u128(1)))
        .unwrap();
    let names = [("esp", 2), ("state", 2), ("root-a", 2), ("data", 1)];
    let mut start = 2048;
    for (number, (name, mib)) in (1..).zip(names) {
        let sectors = mib * MIB as u64 / 512;
        disk.add_partition_at(name, number, start, sectors, partition_types::LINUX_FS, 0).unwrap();
        start += sectors;
    }
    let mut bytes = disk.write().unwrap().into_inner();
    for (name, volume) in [("state", Volume::State), ("data", Volume::Data)] {
        let mib = if name == "state" { 3 } else { 7 };
        bytes[mib * MIB..mib * MIB + marker::BLOCK_BYTES].copy_from_slice(&marker::block(volume));
    }
    bytes.resize(length, 0);
    Memory::new(bytes)
}

fn done(device: &mut Memory, job: &Job) -> (Vec<Entry>, BootLoader, bool) {
    match set_up(device, SECTOR, job).unwrap() {
        Outcome::Done { partitions, boot_loader, changed } => (partitions, boot_loader, changed),
        Outcome::Failed { why } => panic!("{why}"),
    }
}

fn guids(device: &mut Memory) -> Vec<(String, uuid::Uuid)> {
    let Table { header, partitions, .. } = read(device, SECTOR).unwrap();
    let mut guids = vec![("disk".to_owned(), header.disk_guid)];
    guids.extend(partitions.values().map(|p| (p.name.clone(), p.part_guid)));
    guids
}

#[test]
fn first_boot_gives_guids_and_grows_and_the_second_changes_nothing() {
    let mut device = factory_disk(64 * MIB);
    let before = guids(&mut device);
    let (entries, _, changed) = done(&mut device, &Job::default());
    assert!(changed);
    let after = guids(&mut device);
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        assert_eq!(old == new, name == "root-a", "{name}");
    }
    let data = entries.last().unwrap();
    assert_eq!((data.start_bytes, data.length_bytes), (7 * MIB as u64, 56 * MIB as u64));
    assert!(entries.iter().all(|e| e.format_begun == (e.name == "state" || e.name == "data")));
    let (_, _, changed) = done(&mut device, &Job::default());
    assert!(!changed, "the second boot finds everything done");
}

#[test]
fn both_copies_of_the_table_are_whole_and_at_the_ends_of_the_disk() {
    let mut device = factory_disk(64 * MIB);
    done(&mut device, &Job::default());
    let strict = GptConfig::new().only_valid_headers(true).logical_block_size(SECTOR);
    let disk = strict.open_from_device(device.bytes.clone()).unwrap();
    assert_eq!(disk.primary_header().unwrap().backup_lba, 64 * MIB as u64 / 512 - 1);
    assert_eq!(disk.backup_header().unwrap().part_start, disk.primary_header().unwrap().last_usable + 1);
}

#[test]
fn formatting_is_remembered_until_it_is_done() {
    let mut device = factory_disk(32 * MIB);
    done(&mut device, &Job::default());
    // mke2fs has destroyed the marker, then the power went.
    device.bytes.get_mut()[3 * MIB..3 * MIB + 4096].fill(0);
    let (entries, ..) = done(&mut device, &Job::default());
    assert!(entries[1].format_begun);
    let own = guids(&mut device);
    let job = Job { formatted: vec!["state".to_owned()], ..Job::default() };
    let (entries, ..) = done(&mut device, &job);
    assert!(!entries[1].format_begun && entries[3].format_begun);
    assert_eq!(guids(&mut device), own, "GUIDs are given once");
}

#[test]
fn a_boot_loader_on_another_disk_means_no_change() {
    let mut device = factory_disk(64 * MIB);
    let stranger = uuid::Uuid::from_u128(42).to_string();
    let job = Job { boot_loader_partition: Some(stranger), ..Job::default() };
    let (_, boot_loader, changed) = done(&mut device, &job);
    assert_eq!((boot_loader, changed), (BootLoader::AnotherDisk, false));
    let esp = guids(&mut device)[1].1.to_string();
    let job = Job { boot_loader_partition: Some(esp), ..Job::default() };
    let (_, boot_loader, changed) = done(&mut device, &job);
    assert_eq!((boot_loader, changed), (BootLoader::ThisDisk, true));
}

/// The boot loader told the GUID that the boot partition had when it was read; the first job of a first boot changes
/// it. The second job took that for another disk, left the bit, and the next boot formatted state and data again,
/// with the owner on them.
#[test]
fn a_boot_loader_is_judged_once_and_what_was_formatted_stays_so() {
    let mut device = factory_disk(64 * MIB);
    let told = guids(&mut device)[1].1.to_string();
    let first = Job { boot_loader_partition: Some(told.clone()), ..Job::default() };
    let (_, judged, _) = done(&mut device, &first);
    // mke2fs overwrites the marker.
    device.bytes.get_mut()[3 * MIB..3 * MIB + 4096].fill(0);
    let formatted = vec!["state".to_owned()];
    let second = Job { boot_loader_partition: Some(told), judged, formatted, ..Job::default() };
    let (entries, boot_loader, changed) = done(&mut device, &second);
    assert_eq!((boot_loader, changed), (BootLoader::ThisDisk, true));
    assert!(!entries[1].format_begun, "{entries:?}");
}

#[test]
fn a_disk_that_is_smaller_than_its_table_is_an_error() {
    let mut device = factory_disk(16 * MIB);
    device.bytes.get_mut().truncate(8 * MIB);
    let why = set_up(&mut device, SECTOR, &Job::default()).unwrap_err();
    assert!(why.contains("larger disk"), "{why}");
}

#[test]
fn rubbish_is_an_error() {
    let mut device = Memory::new(vec![7; 8 * MIB]);
    assert!(set_up(&mut device, SECTOR, &Job::default()).is_err());
}

/// Power goes at every sector of every write, and what was not synced before may be lost. The table is readable
/// afterwards, and the next boot brings everything to its end.
#[test]
fn a_power_cut_at_every_sector_leaves_a_table_and_the_next_boot_finishes() {
    let factory = factory_disk(20 * MIB);
    let mut whole = factory.clone();
    done(&mut whole, &Job::default());
    assert_eq!((whole.writes.len(), whole.syncs.as_slice()), (4, [2, 4].as_slice()));
    for (cut, (offset, bytes)) in whole.writes.iter().enumerate() {
        let synced = if cut < whole.syncs[0] { 0 } else { whole.syncs[0] };
        for sector in 0..=bytes.len() / 512 {
            for unsynced_is_lost in [false, true] {
                let mut device = factory.clone();
                device.apply(&whole.writes[..synced]);
                if !unsynced_is_lost {
                    device.apply(&whole.writes[synced..cut]);
                }
                device.apply(&[(*offset, bytes[..sector * 512].to_vec())]);
                let scene = format!("cut at write {cut}, sector {sector}, unsynced lost: {unsynced_is_lost}");
                let (entries, _, _) = done(&mut device, &Job::default());
                assert_eq!(entries.last().unwrap().length_bytes, 12 * MIB as u64, "{scene}");
                assert!(entries[1].format_begun && entries[3].format_begun, "{scene}");
                let (_, _, changed) = done(&mut device, &Job::default());
                assert!(!changed, "{scene}");
                assert!(read(&mut device, SECTOR).unwrap().both_whole, "{scene}");
            }
        }
    }
}
