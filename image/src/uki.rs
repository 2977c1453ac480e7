//! How do stub, command line and kernel become one EFI program?
//!
//! systemd's stub looks for sections by name. They are added with `objcopy` behind the stub's own, each at
//! an address that no other covers: an overlap is no error anywhere, the boot merely fails at random. The
//! kernel comes last because it is unpacked in place and may grow beyond its section.
//!
//! Source: systemd-stub(7); https://uapi-group.org/specifications/specs/unified_kernel_image/.

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's systemd-boot-efi.
pub const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";

/// What the section table of an EFI program says about addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    image_base: u64,
    alignment: u64,
    /// First address behind all sections, relative to the base.
    end: u64,
}

/// Writes the boot item to `out`.
pub fn write(kernel: &Path, command_line: &str, os_release: &str, out: &Path) -> Result<()> {
    let stub = std::fs::read(STUB).with_context(|| format!("{STUB}: install systemd-boot-efi"))?;
    let addresses = addresses(&stub).with_context(|| format!("{STUB} is no EFI program we understand"))?;
    let scratch = tempfile::tempdir()?;
    let text = |name: &str, content: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    };
    let sections = [
        (".osrel", text("osrel", os_release)?),
        (".cmdline", text("cmdline", command_line)?),
        (".linux", kernel.to_owned()),
    ];
    let mut sizes = Vec::new();
    for (_, path) in &sections {
        sizes.push(std::fs::metadata(path)?.len());
    }
    let mut objcopy = Command::new("objcopy");
    for ((name, path), address) in sections.iter().zip(places(addresses, &sizes)) {
        objcopy
            .arg("--add-section")
            .arg(format!("{name}={}", path.display()))
            .arg("--change-section-vma")
            .arg(format!("{name}={address:#x}"));
    }
    command::output(objcopy.arg(STUB).arg(out))?;
    Ok(())
}

/// Absolute addresses for sections of these sizes, behind everything that is there.
fn places(addresses: Addresses, sizes: &[u64]) -> Vec<u64> {
    let mut next = addresses.end;
    sizes
        .iter()
        .map(|size| {
            next = next.next_multiple_of(addresses.alignment);
            let place = addresses.image_base + next;
            next += size;
            place
        })
        .collect()
}

/// Reads the headers of a 64-bit PE file. Offsets are those of "PE Format" (Microsoft).
fn addresses(file: &[u8]) -> Result<Addresses> {
    let pe = usize::try_from(u32_at(file, 0x3c)?)?;
    ensure!(file.get(pe..pe + 4) == Some(b"PE\0\0".as_slice()), "no PE signature");
    let sections = usize::from(u16_at(file, pe + 6)?);
    let optional_bytes = usize::from(u16_at(file, pe + 20)?);
    let optional = pe + 24;
    const PE32_PLUS: u16 = 0x20b;
    ensure!(u16_at(file, optional)? == PE32_PLUS, "not a 64-bit program");
    let base = file.get(optional + 24..optional + 32).context("cut off")?;
    let image_base = u64::from_le_bytes(base.try_into()?);
    let alignment = u64::from(u32_at(file, optional + 32)?);
    if !alignment.is_power_of_two() {
        bail!("section alignment {alignment} is no power of two");
    }
    let mut end = 0;
    for index in 0..sections {
        const HEADER_BYTES: usize = 40;
        let header = optional + optional_bytes + index * HEADER_BYTES;
        let size = u64::from(u32_at(file, header + 8)?);
        let address = u64::from(u32_at(file, header + 12)?);
        end = end.max(address + size);
    }
    Ok(Addresses { image_base, alignment, end })
}

fn u16_at(file: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_le_bytes(file.get(at..at + 2).context("cut off")?.try_into()?))
}

fn u32_at(file: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(file.get(at..at + 4).context("cut off")?.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlaps(file: &[u8]) -> Vec<(u64, u64)> {
        let pe = u32_at(file, 0x3c).unwrap() as usize;
        let count = usize::from(u16_at(file, pe + 6).unwrap());
        let first = pe + 24 + usize::from(u16_at(file, pe + 20).unwrap());
        let mut ranges: Vec<(u64, u64)> = (0..count)
            .map(|index| {
                let header = first + index * 40;
                let address = u64::from(u32_at(file, header + 12).unwrap());
                (address, address + u64::from(u32_at(file, header + 8).unwrap()))
            })
            .collect();
        ranges.sort_unstable();
        ranges.windows(2).filter(|pair| pair[0].1 > pair[1].0).map(|pair| pair[1]).collect()
    }

    #[test]
    fn sections_follow_each_other_without_overlap() {
        let addresses = Addresses { image_base: 0x1000_0000, alignment: 0x1000, end: 0x1_9134 };
        assert_eq!(places(addresses, &[10, 0x1001, 5]), [0x1001_a000, 0x1001_b000, 0x1001_d000]);
    }

    #[test]
    fn a_real_boot_item_holds_what_was_put_in_and_nothing_overlaps() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, vec![0x5a; 3_000_001]).unwrap();
        let out = folder.path().join("item.efi");
        write(&kernel, "quiet root=/dev/dm-0", "ID=agentd-os\n", &out).unwrap();
        let bytes = std::fs::read(&out).unwrap();
        assert_eq!(overlaps(&bytes), Vec::new());
        let line = folder.path().join("line");
        let dump = format!(".cmdline={}", line.display());
        command::output(
            Command::new("objcopy")
                .args(["-O", "binary", "--dump-section", &dump])
                .args([&out, Path::new("/dev/null")]),
        )
        .unwrap();
        let line = std::fs::read_to_string(line).unwrap();
        assert_eq!(line.trim_end_matches('\0'), "quiet root=/dev/dm-0");
    }

    #[test]
    fn a_cut_or_foreign_file_is_refused() {
        assert!(addresses(b"MZ").is_err());
        assert!(addresses(&[0; 4096]).is_err());
        let stub = std::fs::read(STUB).unwrap();
        assert!(addresses(&stub[..0x100]).is_err());
    }
}
