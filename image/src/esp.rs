//! What lies on the EFI system partition, and how is it written without privileges?
//!
//! mkfs.vfat and mtools work inside the disk image, at the partition's offset. systemd-boot comes from
//! Debian's systemd-boot-efi; its version is recorded with the image.

use crate::command;
use crate::layout::{Partition, SECTOR_BYTES};
use crate::release;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

pub const BOOT_LOADER: &str = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi";

/// `default` is a pattern: a literal name would defeat the fall-back to the other slot.
const LOADER_CONF: &str = "timeout 0\neditor no\nconsole-mode keep\ndefault agentd-os_*\n";

const FOLDERS: [&str; 5] = ["EFI", "EFI/BOOT", "EFI/systemd", "EFI/Linux", "loader"];

/// Makes the file system and puts loader and boot item in.
pub fn write(disk: &Path, partition: &Partition, boot_item: &Path, version: &str) -> Result<()> {
    let volume = &crate::layout::stable_guid(version, "esp volume").simple().to_string()[..8];
    command::output(
        Command::new("mkfs.vfat")
            .args(["-F", "32", "-S", "512", "-n", "AGENTD-ESP", "--invariant", "-i", volume])
            .arg("--offset")
            .arg(partition.first_sector().to_string())
            .arg("-h")
            .arg(partition.first_sector().to_string())
            .arg(disk)
            .arg((partition.size_bytes / 1024).to_string()),
    )?;
    let scratch = tempfile::tempdir()?;
    let conf = scratch.path().join("loader.conf");
    std::fs::write(&conf, LOADER_CONF)?;
    let tools = Mtools { disk, offset_bytes: partition.first_sector() * SECTOR_BYTES };
    for folder in FOLDERS {
        tools.run("mmd", &[], &format!("::{folder}"))?;
    }
    let loader = Path::new(BOOT_LOADER);
    tools.copy(loader, "EFI/BOOT/BOOTX64.EFI").context("install systemd-boot-efi")?;
    tools.copy(loader, "EFI/systemd/systemd-bootx64.efi")?;
    tools.copy(&conf, "loader/loader.conf")?;
    tools.copy(boot_item, &format!("EFI/Linux/{}", release::boot_item(version)))
}

/// Copies one file out of a disk's system partition, for tests and the flasher's check.
pub fn read(disk: &Path, partition: &Partition, name: &str, to: &Path) -> Result<()> {
    let tools = Mtools { disk, offset_bytes: partition.first_sector() * SECTOR_BYTES };
    let image = tools.image();
    command::output(Command::new("mcopy").args(["-n", "-i", &image, &format!("::{name}")]).arg(to))?;
    Ok(())
}

struct Mtools<'a> {
    disk: &'a Path,
    offset_bytes: u64,
}

impl Mtools<'_> {
    fn image(&self) -> String {
        format!("{}@@{}", self.disk.display(), self.offset_bytes)
    }

    fn run(&self, tool: &str, from: &[&Path], to: &str) -> Result<()> {
        let image = self.image();
        command::output(Command::new(tool).args(["-i", &image]).args(from).arg(to))?;
        Ok(())
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        self.run("mcopy", &[from], &format!("::{to}"))
    }
}
