//! May this partition be formatted, and what does it need before it is mounted?
//!
//! Pure. A partition is formatted only when it begins with the marker of the image builder, or when its
//! formatting, once begun for that reason, did not come to its end (the table remembers, see
//! [`super::table`]). Everything else that is not our own file system is left alone until the owner says so.

use super::ext4::{self, Check, Superblock};
use agentd_domain::fault::Report;
use agentd_domain::marker::{self, Volume};

/// Below this an appliance cannot keep an agent's store and a model at the same time.
pub const SMALLEST_DATA_BYTES: u64 = 1 << 30;

/// What is known of a partition.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'h> {
    /// Its first [`ext4::HEAD_BYTES`] bytes.
    pub head: &'h [u8],
    /// The spare superblock's bytes, if the partition reaches so far.
    pub spare: Option<&'h [u8]>,
    /// The table says that formatting was begun.
    pub format_begun: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Format,
    /// Our file system: check it first or not, and what it holds of the partition.
    Use {
        check: Check,
        size_bytes: u64,
    },
    /// Not ours: leave it alone, and say what it is.
    Foreign {
        found: String,
    },
}

pub fn decide(volume: Volume, seen: Seen<'_>) -> Decision {
    if marker::asks_to_be_formatted(seen.head, volume) || seen.format_begun {
        return Decision::Format;
    }
    let ours = |superblock: &Superblock| superblock.label == volume.label();
    let primary = ext4::primary(seen.head);
    if let Some(superblock) = primary.as_ref().filter(|superblock| ours(superblock)) {
        return Decision::Use { check: superblock.check, size_bytes: superblock.size_bytes };
    }
    // A primary superblock that was lost.
    if let (None, Some(superblock)) = (&primary, seen.spare.and_then(ext4::parse).filter(ours)) {
        return Decision::Use { check: Check::RepairFromSpare, size_bytes: superblock.size_bytes };
    }
    let found = match primary {
        Some(superblock) => format!("an ext4 file system named `{}`", superblock.label),
        None => ext4::describe(seen.head).to_owned(),
    };
    Decision::Foreign { found }
}

/// The report for a partition that is not ours.
pub fn foreign(volume: Volume, device: &str, found: &str) -> Report {
    let name = volume.partition_name();
    Report::environment(
        &format!("{name}_partition_foreign"),
        format!("the {name} partition was not mounted, and nothing was changed on it"),
        format!("{device} holds {found}, not the appliance's own file system"),
        "if it holds something you need, power off and copy it from the disk on another machine; to give the \
         partition to the appliance, press `f` on the local console: everything on it is then lost",
    )
}

/// The report for a disk without room for agents.
pub fn too_small(length_bytes: u64, disk: &str) -> Report {
    Report::environment(
        "disk_too_small",
        "the data partition was not set up, so no agent can run",
        format!(
            "the disk {disk} leaves {} MiB for it, and agents need {} MiB or more",
            length_bytes >> 20,
            SMALLEST_DATA_BYTES >> 20
        ),
        "use a disk of at least 16 GiB; a virtual disk can be enlarged, it is grown into at the next start",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(label: &str) -> Vec<u8> {
        let mut bytes = vec![0; ext4::SPARE_BYTES];
        bytes[4] = 100;
        bytes[24] = 2;
        bytes[56..58].copy_from_slice(&0xef53_u16.to_le_bytes());
        bytes[58] = 1;
        bytes[120..120 + label.len()].copy_from_slice(label.as_bytes());
        bytes
    }

    fn head(label: &str) -> Vec<u8> {
        let mut head = vec![0; ext4::HEAD_BYTES];
        head[1024..2048].copy_from_slice(&superblock(label));
        head
    }

    fn decided(head: &[u8], spare: Option<&[u8]>, format_begun: bool) -> Decision {
        decide(Volume::Data, Seen { head, spare, format_begun })
    }

    #[test]
    fn the_marker_allows_formatting_and_nothing_else_does() {
        assert_eq!(decided(&marker::block(Volume::Data), None, false), Decision::Format);
        for other in [vec![0; ext4::HEAD_BYTES], marker::block(Volume::State), vec![7; ext4::HEAD_BYTES]] {
            assert!(matches!(decided(&other, None, false), Decision::Foreign { .. }));
        }
    }

    #[test]
    fn formatting_that_was_begun_is_begun_again() {
        assert_eq!(decided(&[0; ext4::HEAD_BYTES], None, true), Decision::Format);
    }

    #[test]
    fn our_file_system_is_used_by_its_label() {
        let expected = Decision::Use { check: Check::Nothing, size_bytes: 409_600 };
        assert_eq!(decided(&head(marker::LABEL_DATA), None, false), expected);
    }

    #[test]
    fn somebody_elses_ext4_is_named_and_left_alone() {
        let decision = decided(&head("photos"), None, false);
        assert_eq!(decision, Decision::Foreign { found: "an ext4 file system named `photos`".to_owned() });
        let state = decided(&head(marker::LABEL_STATE), None, false);
        assert!(matches!(state, Decision::Foreign { .. }), "the other volume's file system is foreign here");
    }

    #[test]
    fn a_lost_superblock_is_restored_from_its_spare() {
        let spare = superblock(marker::LABEL_DATA);
        let decision = decided(&[0; ext4::HEAD_BYTES], Some(&spare), false);
        assert_eq!(decision, Decision::Use { check: Check::RepairFromSpare, size_bytes: 409_600 });
        let other = superblock("photos");
        assert!(matches!(decided(&[0; ext4::HEAD_BYTES], Some(&other), false), Decision::Foreign { .. }));
    }
}
