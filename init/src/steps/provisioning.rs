//! Settings that came with the disk: `agentd.toml` on the boot partition, for a machine that is set up without a
//! keyboard.
//!
//! In:     the boot partition of the running root's disk, mounted read-only for as long as it takes to read one file.
//! Out:    the owner's `agentd.toml` on state, as if it had been entered.
//! Always: once. When there are settings or an owner the boot partition is not even mounted: whoever can write to
//!         it later, from another system, changes nothing.
//! Never:  a secret; anybody who holds the disk reads that partition.

use crate::boot::{Done, Outcome};
use crate::disk::find;
use crate::machine::Machine;
use crate::steps::config;
use crate::steps::kernel::make_folder;
use agentd_domain::fault::Report;
use agentd_domain::{marker, paths};
use init_sys::mounts::{self, Flags};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

const MOUNT_POINT: &str = "/run/init/esp";
const FILE: &str = "agentd.toml";
/// A configuration is a few hundred bytes.
const MOST_BYTES: u64 = 64 * 1024;

pub fn take_settings(machine: &mut Machine) -> Outcome {
    let exists = |path: &str| ["a", "b"].iter().any(|copy| Path::new(&format!("{path}.{copy}")).exists());
    if exists(paths::CONFIG) {
        return Ok(Done::Skipped("the appliance has settings of its own".to_owned()));
    }
    if exists(paths::STATE_OWNER) {
        return Ok(Done::Skipped("the appliance has an owner".to_owned()));
    }
    let Some(device) = device(machine) else {
        return Ok(Done::Skipped("the disk has no boot partition".to_owned()));
    };
    let Some(text) = read_from(&device).map_err(|error| unreadable(&device, &error))? else {
        return Ok(Done::Skipped(format!("the boot partition has no {FILE}")));
    };
    config::store(machine, &text)?;
    Ok(Done::Well)
}

fn device(machine: &Machine) -> Option<String> {
    let disk = machine.disk.as_ref()?;
    let entry = disk.partitions.iter().find(|entry| entry.name == marker::PARTITION_ESP)?;
    Some(format!("/dev/{}", find::partition_name(&disk.name, entry.number)?))
}

/// `None` when there is no such file.
fn read_from(device: &str) -> io::Result<Option<String>> {
    let target = Path::new(MOUNT_POINT);
    make_folder(target, 0, 0o700)?;
    let flags = Flags::RDONLY | Flags::NOSUID | Flags::NODEV | Flags::NOEXEC;
    mounts::mount(device, target, "vfat", flags, "")?;
    let text = read_text(&target.join(FILE));
    mounts::unmount(target)?;
    text
}

fn read_text(path: &Path) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut text = String::new();
    file.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("the file has more than {MOST_BYTES} bytes")));
    }
    Ok(Some(text))
}

fn unreadable(device: &str, error: &io::Error) -> Report {
    Report::environment(
        "provisioning_unreadable",
        format!("{FILE} on the boot partition was not taken; the image's settings are in force"),
        format!("{device}: {error}"),
        format!(
            "write {FILE} to the boot partition as plain text and restart, or enter the settings on the local console"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_when_it_is_there_and_small() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        assert_eq!(read_text(&path).unwrap(), None);
        std::fs::write(&path, "[time]\nservers = []\n").unwrap();
        assert_eq!(read_text(&path).unwrap().as_deref(), Some("[time]\nservers = []\n"));
        std::fs::write(&path, vec![b'#'; MOST_BYTES as usize]).unwrap();
        assert!(read_text(&path).unwrap().is_some());
        std::fs::write(&path, vec![b'#'; MOST_BYTES as usize + 1]).unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("more than"));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(read_text(&path).is_err());
    }
}
