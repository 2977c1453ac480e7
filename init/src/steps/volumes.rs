//! The two partitions that change: formatted once, checked, grown, mounted.
//!
//! What may be formatted is decided by [`crate::disk::volume`]; here it is done.

use crate::boot::{Done, Outcome};
use crate::children::Child;
use crate::disk::ext4::Check;
use crate::disk::table::{BootLoader, Entry};
use crate::disk::volume::{self, Decision, Seen};
use crate::disk::{ext4, find};
use crate::machine::{Machine, ToolResult};
use crate::plan::{Event, Goal};
use crate::steps::disk::note_formatted;
use crate::steps::kernel::make_folder;
use agentd_domain::fault::Report;
use agentd_domain::marker::{self, Volume};
use agentd_domain::paths;
use init_sys::mounts::{self, Flags};
use init_sys::signals::Ended;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

const MKE2FS: &str = "/usr/sbin/mke2fs";
const E2FSCK: &str = "/usr/sbin/e2fsck";
const RESIZE2FS: &str = "/usr/sbin/resize2fs";

/// mke2fs writes a few MiB; a slow card takes seconds.
const FORMAT_LIMIT_S: u64 = 600;
/// A full check of a large and damaged data partition takes long, and cutting it short helps nobody.
const CHECK_LIMIT_S: u64 = 4 * 3600;
const GROW_LIMIT_S: u64 = 1800;
/// A file system ends at a whole block group; less than this is no reason to call resize2fs.
const NOT_WORTH_GROWING_BYTES: u64 = 16 << 20;

/// Where `ext4::SPARE_OFFSET_BYTES` is, in blocks, and the size of a block.
const SPARE_SUPERBLOCK: [&str; 4] = ["-b", "32768", "-B", "4096"];

/// What ext4 leaves to a boot loader, before its superblock.
const BOOT_BLOCK_BYTES: usize = 1024;

/// For both: no link count is lost to the clock, and an error stops writing instead of spreading.
const ON_ERROR: &str = "errors=remount-ro";

pub fn open_state(machine: &mut Machine) -> Outcome {
    let opened = open(machine, Volume::State)?;
    let flags = Flags::NOSUID | Flags::NODEV | Flags::NOEXEC | Flags::NOATIME;
    mount(&opened, Path::new(paths::STATE), flags, ON_ERROR)?;
    make_folders(&[
        (paths::STATE, 0, 0o755),
        (paths::STATE_INIT, 0, 0o755),
        (paths::STATE_AGENTD, paths::UID_AGENTD, 0o700),
        (paths::STATE_NETD, paths::UID_NETD, 0o700),
    ])?;
    machine.facts.state_is_mounted = true;
    Ok(Done::Well)
}

pub fn open_data(machine: &mut Machine) -> Outcome {
    if machine.disk.as_ref().is_some_and(|disk| disk.boot_loader == BootLoader::AnotherDisk) {
        return Err(Report::environment(
            "boot_loader_on_another_disk",
            "data was not mounted, so no agent can run",
            "the boot loader came from another disk than the running root: two disks with copies of the \
             appliance are attached",
            "detach one of the two disks (an installation stick, for example) and restart",
        ));
    }
    let opened = open(machine, Volume::Data)?;
    let flags = Flags::NOSUID | Flags::NODEV | Flags::NOATIME;
    // agentd may use the reserved blocks: a full disk must not keep it from committing what it acknowledges.
    let options = format!("usrquota,resuid={},{ON_ERROR}", paths::UID_AGENTD);
    mount(&opened, Path::new(paths::DATA), flags, &options)?;
    grow(machine, &opened);
    // Sticky, and `agents` is root's: agentd makes its own files here but cannot put a link in place of a
    // folder on which the launcher works as root.
    make_folders(&[
        (paths::DATA, 0, 0o1771),
        (paths::DATA_AGENTS, 0, 0o755),
        (paths::DATA_MODELS, paths::UID_AGENTD, 0o755),
        (paths::DATA_LOGS, paths::UID_AGENTD, 0o750),
    ])?;
    let group = rustix::fs::Gid::from_raw(paths::UID_AGENTD);
    rustix::fs::chown(paths::DATA, None, Some(group))
        .map_err(|error| folder_report(paths::DATA, &error.into()))?;
    rustix::fs::chmod(paths::DATA, rustix::fs::Mode::from_bits_truncate(0o1771))
        .map_err(|error| folder_report(paths::DATA, &error.into()))?;
    Ok(Done::Well)
}

/// A partition that can be mounted.
struct Opened {
    volume: Volume,
    device: String,
    length_bytes: u64,
    /// What the file system fills of it.
    size_bytes: u64,
}

fn open(machine: &mut Machine, volume: Volume) -> Result<Opened, Report> {
    let (device, entry) = locate(machine, volume)?;
    if volume == Volume::Data && entry.length_bytes < volume::SMALLEST_DATA_BYTES {
        return Err(volume::too_small(
            entry.length_bytes,
            machine.disk.as_ref().map_or("", |disk| &disk.name),
        ));
    }
    let (head, spare) = read_heads(&device).map_err(|error| unreadable(volume, &device, &error))?;
    let seen = Seen { head: &head, spare: spare.as_deref(), format_begun: entry.format_begun };
    let size_bytes = match volume::decide(volume, seen) {
        Decision::Format => {
            format(machine, volume, &device)?;
            entry.length_bytes
        }
        Decision::Use { check, size_bytes } => {
            self::check(machine, volume, &device, check)?;
            size_bytes
        }
        Decision::Foreign { found } => {
            let report = volume::foreign(volume, &device, &found);
            machine.facts.unusable.push((volume, device));
            return Err(report);
        }
    };
    Ok(Opened { volume, device, length_bytes: entry.length_bytes, size_bytes })
}

/// The owner's yes: the marker goes where the volume was, and the next boot formats.
pub fn allow_format(machine: &mut Machine, volume: Volume) -> Result<(), Report> {
    let device = unusable(machine, volume)?;
    let written = OpenOptions::new().write(true).open(&device).and_then(|mut file| {
        file.write_all(&marker::block(volume))?;
        file.sync_all()
    });
    written.map_err(|error| format_report(volume, &device, &error.to_string()))?;
    machine.log.alarm(&format!("the owner allowed {device} to be formatted"));
    Ok(())
}

/// The device of a volume that this boot could not use, and so has not mounted. No other can be given up.
pub fn unusable(machine: &Machine, volume: Volume) -> Result<String, Report> {
    let found = machine.facts.unusable.iter().find(|(unusable, _)| *unusable == volume);
    found.map(|(_, device)| device.clone()).ok_or_else(|| {
        Report::caller(
            "nothing_to_repair",
            "nothing was changed",
            format!("the {} partition is in use, or there is none", volume.partition_name()),
            "no action is needed",
        )
    })
}

/// A repair that answers every question with yes, for which the owner has asked. Called by the main loop, because
/// it takes long; the machine restarts afterwards, whatever came of it.
pub fn repair(machine: &mut Machine, volume: Volume) {
    let Ok(device) = unusable(machine, volume) else { return };
    machine.log.alarm(&format!("repairing {device}, this may take long; do not switch off"));
    let words = match machine.run_tool(E2FSCK, &["-f", "-y", &device], CHECK_LIMIT_S) {
        Ok(result) if matches!(result.ended, Ended::Exit(0..=3)) => format!("{device} is repaired"),
        Ok(result) => format!("{device} could not be repaired: {}", beginning(&result.output)),
        Err(error) => error.to_string(),
    };
    machine.log.alarm(&words);
    machine.end(Goal::Restart, "the repair has ended");
}

/// The volume's device file and its entry in the table.
fn locate(machine: &Machine, volume: Volume) -> Result<(String, Entry), Report> {
    let name = volume.partition_name();
    let missing = |why: String| {
        Report::environment(
            &format!("{name}_partition_missing"),
            format!("there is no {name} partition"),
            why,
            "write the appliance's image to the disk again; partitions of other names are not touched by it",
        )
    };
    let Some(disk) = &machine.disk else { return Err(missing("no disk was found".to_owned())) };
    let entry = disk.partitions.iter().find(|entry| entry.name == name);
    let entry = entry
        .ok_or_else(|| missing(format!("the table of {} has no partition named `{name}`", disk.name)))?;
    let kernel_name = find::partition_name(&disk.name, entry.number).ok_or_else(|| {
        missing(format!(
            "the kernel does not know partition {} of {}: the disk is smaller than its table",
            entry.number, disk.name
        ))
    })?;
    Ok((format!("/dev/{kernel_name}"), entry.clone()))
}

fn read_heads(device: &str) -> io::Result<(Vec<u8>, Option<Vec<u8>>)> {
    let mut file = File::open(device)?;
    let mut head = vec![0; ext4::HEAD_BYTES];
    file.read_exact(&mut head)?;
    let mut spare = vec![0; ext4::SPARE_BYTES];
    let read = file.seek(SeekFrom::Start(ext4::SPARE_OFFSET_BYTES)).and_then(|_| file.read_exact(&mut spare));
    Ok((head, read.is_ok().then_some(spare)))
}

fn format(machine: &mut Machine, volume: Volume, device: &str) -> Result<(), Report> {
    let name = volume.partition_name();
    machine.log.info(&format!("formatting {device} as {name}, as its marker asks"));
    // Blocks of 4 KiB put the spare superblock where `disk::ext4` looks for it. Lazy tables: the kernel fills
    // them in later, so a first boot on a large disk takes seconds.
    let common = ["-q", "-F", "-t", "ext4", "-b", "4096", "-L", volume.label()];
    let own: &[&str] = match volume {
        Volume::State => &["-m", "5", "-E", "lazy_itable_init=1"],
        Volume::Data => &["-m", "2", "-O", "quota", "-E", "lazy_itable_init=1,quotatype=usrquota"],
    };
    let arguments: Vec<&str> = common.into_iter().chain(own.iter().copied()).chain([device]).collect();
    let result = machine.run_tool(MKE2FS, &arguments, FORMAT_LIMIT_S);
    let result = result.map_err(|error| format_report(volume, device, &error.to_string()))?;
    if result.ended != Ended::Exit(0) {
        let why = format!("mke2fs ended with {}: {}", result.ended, result.output.trim());
        return Err(format_report(volume, device, &why));
    }
    clear_marker(Path::new(device)).map_err(|error| format_report(volume, device, &error.to_string()))?;
    // Only now may the table forget that formatting was begun.
    note_formatted(machine, vec![name.to_owned()])
}

/// While the marker is there the next boot formats again. mke2fs overwrites it on the machines we know, which is
/// its habit and not its promise. It goes only when the file system is whole on the disk.
fn clear_marker(device: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(device)?;
    file.sync_all()?;
    let mut boot_block = [0; BOOT_BLOCK_BYTES];
    file.write_all(&boot_block)?;
    file.sync_all()?;
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut boot_block)?;
    if boot_block.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(io::Error::other("the marker could not be cleared"))
}

fn check(machine: &mut Machine, volume: Volume, device: &str, check: Check) -> Result<(), Report> {
    let why = match check {
        Check::Nothing => return Ok(()),
        Check::Journal => "it was not unmounted",
        Check::Repair => "it has errors",
        Check::RepairFromSpare => "its superblock is lost",
    };
    machine.log.info(&format!("checking {device}: {why}"));
    if volume == Volume::Data && check != Check::Journal {
        // Hours, maybe. The web console is to say so meanwhile; agentd begins again when data has come.
        machine.event(Event::Start(Child::Agentd));
    }
    let spare: &[&str] = if check == Check::RepairFromSpare { &SPARE_SUPERBLOCK } else { &[] };
    let arguments: Vec<&str> = ["-p"].into_iter().chain(spare.iter().copied()).chain([device]).collect();
    let ended = machine.run_tool(E2FSCK, &arguments, CHECK_LIMIT_S);
    // e2fsck(8): 1 and 2 mean that errors were corrected. 2 asks for a restart, which is for a mounted root.
    let why = match ended {
        Ok(ToolResult { ended: Ended::Exit(0..=3), .. }) => return Ok(()),
        Ok(ToolResult { ended, output }) => format!("e2fsck ended with {ended}: {}", beginning(&output)),
        Err(error) => error.to_string(),
    };
    machine.facts.unusable.push((volume, device.to_owned()));
    let name = volume.partition_name();
    Err(Report::environment(
        &format!("{name}_partition_damaged"),
        format!("the {name} partition was not mounted"),
        why,
        "press `c` on the local console to repair it, which may lose damaged files; to save them first, power off \
         and copy the disk on another machine",
    ))
}

/// The first words of a tool's output: enough to look the error up.
fn beginning(output: &str) -> String {
    output.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

/// To the end of its partition, while mounted. Failing is no reason not to use what there is.
fn grow(machine: &mut Machine, opened: &Opened) {
    if opened.length_bytes.saturating_sub(opened.size_bytes) < NOT_WORTH_GROWING_BYTES {
        return;
    }
    machine.log.info(&format!("growing {} to {} MiB", opened.device, opened.length_bytes >> 20));
    match machine.run_tool(RESIZE2FS, &[&opened.device], GROW_LIMIT_S) {
        Ok(result) if result.ended == Ended::Exit(0) => {}
        Ok(result) => {
            machine.log.warn(&format!("resize2fs ended with {}: {}", result.ended, result.output.trim()))
        }
        Err(error) => machine.log.warn(&error.to_string()),
    }
}

fn mount(opened: &Opened, target: &Path, flags: Flags, options: &str) -> Result<(), Report> {
    mounts::mount(&opened.device, target, "ext4", flags, options).map_err(|error| {
        let name = opened.volume.partition_name();
        Report::environment(
            &format!("{name}_partition_not_mounted"),
            format!("the {name} partition was not mounted"),
            format!("{} at {}: {error}", opened.device, target.display()),
            "restart; if it happens again, attach the disk to another machine and run `e2fsck -f` on the partition",
        )
    })
}

fn make_folders(folders: &[(&str, u32, u32)]) -> Result<(), Report> {
    for (path, owner, mode) in folders {
        make_folder(Path::new(path), *owner, *mode).map_err(|error| folder_report(path, &error))?;
    }
    Ok(())
}

fn folder_report(path: &str, error: &io::Error) -> Report {
    Report::environment(
        "folder",
        format!("the folder {path} could not be made"),
        error.to_string(),
        "restart; if it happens again, the partition is full or damaged: attach it to another machine and run `e2fsck -f` on it",
    )
}

fn format_report(volume: Volume, device: &str, why: &str) -> Report {
    Report::environment(
        &format!("{}_partition_not_formatted", volume.partition_name()),
        format!("the {} partition was not formatted", volume.partition_name()),
        why,
        format!(
            "restart to try again; if it happens again, the disk behind {device} is faulty: use another one"
        ),
    )
}

fn unreadable(volume: Volume, device: &str, error: &io::Error) -> Report {
    Report::environment(
        &format!("{}_partition_unreadable", volume.partition_name()),
        format!("the {} partition was not mounted", volume.partition_name()),
        format!("{device} cannot be read: {error}"),
        "the disk is faulty: copy what can be read, and use another one",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    #[test]
    fn a_formatted_partition_is_used_and_not_formatted_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let device = file.path().to_str().unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-L", marker::LABEL_DATA, device])
            .status();
        let Ok(made) = made else {
            eprintln!("skipped: mke2fs is not installed");
            return;
        };
        assert!(made.success());
        // As if mke2fs had left it alone.
        file.as_file().write_all_at(&marker::block(Volume::Data)[..BOOT_BLOCK_BYTES], 0).unwrap();
        let decide = || {
            let (head, spare) = read_heads(device).unwrap();
            volume::decide(Volume::Data, Seen { head: &head, spare: spare.as_deref(), format_begun: false })
        };
        assert_eq!(decide(), Decision::Format);
        clear_marker(file.path()).unwrap();
        assert_eq!(decide(), Decision::Use { check: Check::Nothing, size_bytes: 64 << 20 });
    }
}
