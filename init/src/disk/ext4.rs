//! What does a partition hold, judged by its first bytes?
//!
//! Pure. Source: Documentation/filesystems/ext4/super.rst (the superblock lies at byte 1024).

/// So many bytes of the partition are looked at.
pub const HEAD_BYTES: usize = 4096;
/// Where an ext4 with blocks of 4 KiB keeps its first spare superblock: block group 1.
pub const SPARE_OFFSET_BYTES: u64 = 32_768 * 4096;
/// Length of a superblock.
pub const SPARE_BYTES: usize = 1024;

const PRIMARY_OFFSET: usize = 1024;
const MAGIC: u16 = 0xef53;
const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;
/// The journal holds what is not yet in place.
const INCOMPAT_RECOVER: u32 = 4;
const INCOMPAT_64BIT: u32 = 0x80;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub label: String,
    pub size_bytes: u64,
    pub check: Check,
}

/// What e2fsck has to do before this is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    Nothing,
    /// It was not unmounted: the journal is put in its place, in seconds.
    Journal,
    /// It has errors: everything is read, for as long as that takes.
    Repair,
    /// Its superblock is lost, the spare one stands in; everything is read.
    RepairFromSpare,
}

/// The superblock in the first bytes of a partition.
pub fn primary(head: &[u8]) -> Option<Superblock> {
    parse(head.get(PRIMARY_OFFSET..)?)
}

/// A superblock by itself, as it lies at [`SPARE_OFFSET_BYTES`].
pub fn parse(bytes: &[u8]) -> Option<Superblock> {
    if u16_at(bytes, 56)? != MAGIC {
        return None;
    }
    let incompatible = u32_at(bytes, 96)?;
    let state = u16_at(bytes, 58)?;
    let high = if incompatible & INCOMPAT_64BIT != 0 { u32_at(bytes, 336)? } else { 0 };
    let blocks = (u64::from(high) << 32) | u64::from(u32_at(bytes, 4)?);
    let block_bytes = 1024_u64.checked_shl(u32_at(bytes, 24)?.min(6))?;
    let label = bytes.get(120..136)?.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Superblock {
        label: String::from_utf8_lossy(label).into_owned(),
        size_bytes: blocks.checked_mul(block_bytes)?,
        check: if state & STATE_CLEAN == 0 || state & STATE_ERRORS != 0 {
            Check::Repair
        } else if incompatible & INCOMPAT_RECOVER != 0 {
            Check::Journal
        } else {
            Check::Nothing
        },
    })
}

/// A name for what else may lie there, to be told to the owner.
pub fn describe(head: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    match () {
        () if head.iter().all(|byte| *byte == 0) => "only zeros in its first block",
        () if at(1024, &[0xe2, 0xe1, 0xf5, 0xe0]) => "an erofs file system",
        () if at(0, b"XFSB") => "an XFS file system",
        () if at(0, b"LUKS\xba\xbe") => "an encrypted volume (LUKS)",
        () if at(3, b"NTFS    ") => "an NTFS file system",
        () if at(82, b"FAT32") || at(54, b"FAT1") => "a FAT file system",
        () if at(512, b"LABELONE") => "an LVM volume",
        () => "data of an unknown kind",
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk::<2>().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk::<4>().map(|chunk| u32::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Read;
    use std::process::Command;

    fn head_of(path: &std::path::Path) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        std::fs::File::open(path).unwrap().read_exact(&mut head).unwrap();
        head
    }

    #[test]
    fn what_mke2fs_makes_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let status = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "agentd-os-state"])
            .arg(file.path())
            .status();
        let Ok(status) = status else {
            eprintln!("skipped: mke2fs is not installed");
            return;
        };
        assert!(status.success());
        let superblock = primary(&head_of(file.path())).unwrap();
        let expected =
            Superblock { label: "agentd-os-state".to_owned(), size_bytes: 64 << 20, check: Check::Nothing };
        assert_eq!(superblock, expected);
    }

    #[test]
    fn an_unclean_file_system_needs_a_check() {
        let mut bytes = vec![0; SPARE_BYTES];
        bytes[56..58].copy_from_slice(&MAGIC.to_le_bytes());
        let check = |bytes: &[u8]| parse(bytes).unwrap().check;
        assert_eq!(check(&bytes), Check::Repair, "not marked clean");
        bytes[58] = 1;
        assert_eq!(check(&bytes), Check::Nothing);
        bytes[96] = 4;
        assert_eq!(check(&bytes), Check::Journal);
        bytes[58] = 3;
        assert_eq!(check(&bytes), Check::Repair, "marked as having errors");
    }

    #[test]
    fn other_content_is_named() {
        assert_eq!(describe(&[0; HEAD_BYTES]), "only zeros in its first block");
        let mut xfs = vec![0; HEAD_BYTES];
        xfs[..4].copy_from_slice(b"XFSB");
        assert_eq!(describe(&xfs), "an XFS file system");
        assert_eq!(primary(&xfs), None);
        assert_eq!(describe(&[7; HEAD_BYTES]), "data of an unknown kind");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let _ = primary(&bytes);
            let _ = parse(&bytes);
            let _ = describe(&bytes);
        }
    }
}
