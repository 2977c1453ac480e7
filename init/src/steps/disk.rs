//! Finding our disk and bringing its partition table up to date.

use crate::boot::{Done, Outcome};
use crate::disk::find::{self, FindError};
use crate::disk::table::{BootLoader, Job, Outcome as TableOutcome, RESULT_PREFIX};
use crate::machine::{Machine, OurDisk, Started};
use agentd_domain::fault::Report;
use agentd_domain::marker;

/// systemd-boot tells from which partition it came, in UTF-16 behind four bytes of attributes
/// (systemd.io/BOOT_LOADER_INTERFACE).
const LOADER_PARTITION: &str =
    "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// Seconds; it writes a few sectors.
const TABLE_LIMIT_S: u64 = 60;

pub fn find(machine: &mut Machine) -> Outcome {
    let disk = find::of_root().map_err(|error| no_disk(&error))?;
    machine.log.info(&format!("the root lies on {}, {}", disk.name, disk.root_partitions.join(" and ")));
    machine.disk = Some(OurDisk {
        name: disk.name,
        root_partitions: disk.root_partitions,
        partitions: Vec::new(),
        boot_loader: BootLoader::Unknown,
    });
    // Its reader runs beside the next steps; `set_up_table` takes its result.
    machine.table_reader = Some(start_job(machine, Vec::new())?);
    Ok(Done::Well)
}

fn no_disk(error: &FindError) -> Report {
    Report::environment(
        "no_disk",
        "there is no disk for state and data, so no agent can run and nothing can be kept",
        error.to_string(),
        "attach the disk that carries the appliance's image (`scripts/run` does), then restart",
    )
}

pub fn set_up_table(machine: &mut Machine) -> Outcome {
    let Some(reader) = machine.table_reader.take() else { return Err(table_report("it is not being read")) };
    finish_job(machine, reader)?;
    let Some(disk) = &machine.disk else { return Err(table_report("the disk is gone")) };
    machine.facts.slot = slot(disk);
    if disk.boot_loader == BootLoader::AnotherDisk {
        // The step itself is done; `data` refuses, and says why.
        machine.log.alarm("the boot loader came from another disk than the root");
    }
    Ok(Done::Well)
}

/// Tells the table that these volumes are formatted.
pub fn note_formatted(machine: &mut Machine, names: Vec<String>) -> Result<(), Report> {
    let writer = start_job(machine, names.clone())?;
    finish_job(machine, writer)?;
    let entries = machine.disk.as_ref().map(|disk| disk.partitions.as_slice()).unwrap_or_default();
    match entries.iter().find(|entry| entry.format_begun && names.contains(&entry.name)) {
        None => Ok(()),
        // Used in spite of it, the volume would be formatted again at the next boot, with all that was kept on it.
        Some(entry) => Err(table_report(&format!("`{}` still counts as not formatted", entry.name))),
    }
}

/// Starts `init disk-setup`.
fn start_job(machine: &mut Machine, formatted: Vec<String>) -> Result<Started, Report> {
    let Some(disk) = &machine.disk else { return Err(table_report("no disk was found")) };
    let (name, judged) = (disk.name.clone(), disk.boot_loader);
    let job = Job { disk: name, boot_loader_partition: boot_loader_partition(), judged, formatted };
    let job = serde_json::to_string(&job).map_err(|error| table_report(&error.to_string()))?;
    machine
        .start_tool("/proc/self/exe", &["disk-setup", &job], TABLE_LIMIT_S)
        .map_err(|error| table_report(&error.to_string()))
}

fn finish_job(machine: &mut Machine, started: Started) -> Result<(), Report> {
    let result = machine.finish_tool(started).map_err(|error| table_report(&error.to_string()))?;
    let line = result.output.lines().find_map(|line| line.strip_prefix(RESULT_PREFIX));
    let outcome = line.and_then(|line| serde_json::from_str::<TableOutcome>(line).ok());
    match outcome {
        Some(TableOutcome::Done { partitions, boot_loader, changed }) => {
            if changed {
                machine
                    .log
                    .info("the partition table was changed: GUIDs of its own, data up to the disk's end");
            }
            if let Some(disk) = &mut machine.disk {
                disk.partitions = partitions;
                disk.boot_loader = boot_loader;
            }
            Ok(())
        }
        Some(TableOutcome::Failed { why }) => Err(table_report(&why)),
        None => Err(table_report(&format!("its reader ended with {}", result.ended))),
    }
}

fn table_report(why: &str) -> Report {
    Report::environment(
        "partition_table",
        "the partition table could not be used, so state and data are not mounted",
        why,
        "if the disk was copied or shrunk, write the image to a disk of at least 16 GiB again; data on it is \
         still there and can be copied first",
    )
}

fn boot_loader_partition() -> Option<String> {
    let bytes = std::fs::read(LOADER_PARTITION).ok()?;
    loader_guid(&bytes)
}

fn loader_guid(bytes: &[u8]) -> Option<String> {
    let units: Vec<u16> = bytes
        .get(4..)?
        .chunks_exact(2)
        .filter_map(|pair| pair.first_chunk::<2>().map(|pair| u16::from_le_bytes(*pair)))
        .take_while(|unit| *unit != 0)
        .collect();
    let guid = String::from_utf16(&units).ok()?.to_lowercase();
    uuid::Uuid::parse_str(&guid).ok().map(|guid| guid.to_string())
}

/// `direct` without a boot loader; else the slot whose root is running.
fn slot(disk: &OurDisk) -> String {
    if disk.boot_loader == BootLoader::Unknown {
        return "direct".to_owned();
    }
    let running = disk.partitions.iter().find(|entry| {
        find::partition_name(&disk.name, entry.number)
            .is_some_and(|name| disk.root_partitions.contains(&name))
            && [marker::PARTITION_ROOT_A, marker::PARTITION_ROOT_B].contains(&entry.name.as_str())
    });
    match running.map(|entry| entry.name.as_str()) {
        Some(marker::PARTITION_ROOT_A) => "a".to_owned(),
        Some(marker::PARTITION_ROOT_B) => "b".to_owned(),
        _ => "rescue".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_loaders_guid_is_read_from_its_variable() {
        let mut bytes = vec![6, 0, 0, 0];
        for unit in "C12A7328-F81F-11D2-BA4B-00A0C93EC93B\0".encode_utf16() {
            bytes.extend(unit.to_le_bytes());
        }
        assert_eq!(loader_guid(&bytes).as_deref(), Some("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"));
        assert_eq!(loader_guid(&[]), None);
        assert_eq!(loader_guid(&[6, 0, 0, 0, 65, 0]), None);
    }
}
