//! What did the machine say before it died?
//!
//! The firmware keeps the kernel's last words (pstore); init moves them to state, where they do not fill the
//! firmware's memory and where agentd can show them. Source: Documentation/ABI/testing/pstore.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use agentd_domain::fault::Report;
use agentd_domain::paths;
use rustix::fs::{Gid, Mode};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

const PSTORE: &str = "/sys/fs/pstore";
/// The newest so many are kept.
const MOST_RECORDS: usize = 16;

pub fn keep(machine: &mut Machine) -> Outcome {
    let folder = Path::new(paths::STATE_INIT).join("crashes");
    let kept = move_records(Path::new(PSTORE), &folder, init_sys::clock::wall_ms()).map_err(|error| {
        Report::environment(
            "crash_records",
            "records of a crash were not kept",
            error.to_string(),
            "no action is needed; they are tried again at the next start",
        )
    })?;
    if kept == 0 {
        return Ok(Done::Skipped("the machine did not crash".to_owned()));
    }
    machine.log.warn(&format!("the machine crashed before: {kept} records are in {}", folder.display()));
    Ok(Done::Well)
}

/// How many were moved.
fn move_records(from: &Path, to: &Path, now_ms: u64) -> io::Result<usize> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(0) };
    let mut moved = 0;
    for entry in entries {
        let entry = entry?;
        let text = fs::read(entry.path())?;
        fs::create_dir_all(to)?;
        let name = format!("{now_ms:015}-{}", entry.file_name().to_string_lossy());
        write_synced(&to.join(name), &text)?;
        // After it is safe: removing it frees the firmware's memory.
        fs::remove_file(entry.path())?;
        moved += 1;
    }
    if moved > 0 {
        forget_oldest(to)?;
    }
    Ok(moved)
}

/// Readable for agentd: kernel messages are not for everybody.
fn write_synced(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(text)?;
    rustix::fs::fchmod(&file, Mode::from_bits_truncate(0o640))?;
    if rustix::process::getuid().is_root() {
        rustix::fs::fchown(&file, None, Some(Gid::from_raw(paths::UID_AGENTD)))?;
    }
    file.sync_all()
}

fn forget_oldest(folder: &Path) -> io::Result<()> {
    let mut names: Vec<_> = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    names.sort();
    for name in names.iter().rev().skip(MOST_RECORDS) {
        fs::remove_file(folder.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_moved_and_the_oldest_forgotten() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        for now_ms in 0..MOST_RECORDS as u64 + 3 {
            fs::write(from.path().join("dmesg-efi-1"), format!("boot {now_ms}")).unwrap();
            assert_eq!(move_records(from.path(), to.path(), now_ms).unwrap(), 1);
        }
        assert_eq!(fs::read_dir(from.path()).unwrap().count(), 0);
        let mut names: Vec<_> = fs::read_dir(to.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names.len(), MOST_RECORDS);
        assert_eq!(names[0], "000000000000003-dmesg-efi-1");
    }

    #[test]
    fn a_machine_without_pstore_has_no_records() {
        let to = tempfile::tempdir().unwrap();
        assert_eq!(move_records(Path::new("/nowhere"), to.path(), 0).unwrap(), 0);
    }
}
