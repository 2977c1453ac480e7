//! Which partitions may be formatted, and what are they called?
//!
//! The image builder writes the marker into the state and data partitions; init formats a partition only if
//! it begins with it. Everything else, zeros included, waits for the owner's yes: a partition that merely
//! looks empty may be one whose first blocks were lost.
//!
//! Always: the marker is found by its exact first bytes; the rest of the block is zero and is not looked at.

use serde::{Deserialize, Serialize};

/// The marker lies in the first block of the partition; this much is written and read.
pub const BLOCK_BYTES: usize = 4096;

/// The volume names that init gives to the file systems it makes, by which it knows them again
/// (ext4 keeps up to 16 bytes).
pub const LABEL_STATE: &str = "agentd-os-state";
pub const LABEL_DATA: &str = "agentd-os-data";

/// Names in the partition table. They are looked up only on the disk that carries the running root.
pub const PARTITION_ESP: &str = "esp";
pub const PARTITION_STATE: &str = "state";
pub const PARTITION_ROOT_A: &str = "root-a";
pub const PARTITION_VERITY_A: &str = "verity-a";
pub const PARTITION_ROOT_B: &str = "root-b";
pub const PARTITION_VERITY_B: &str = "verity-b";
pub const PARTITION_RESERVE: &str = "reserve";
pub const PARTITION_DATA: &str = "data";

/// The two partitions that carry a file system of the appliance's own making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Volume {
    State,
    Data,
}

impl Volume {
    pub const fn partition_name(self) -> &'static str {
        match self {
            Self::State => PARTITION_STATE,
            Self::Data => PARTITION_DATA,
        }
    }

    pub const fn label(self) -> &'static str {
        match self {
            Self::State => LABEL_STATE,
            Self::Data => LABEL_DATA,
        }
    }

    const fn line(self) -> &'static [u8] {
        match self {
            Self::State => b"agentd-os:format-me:v1:state\n",
            Self::Data => b"agentd-os:format-me:v1:data\n",
        }
    }
}

/// The block that `image/` writes at the start of a partition that first boot may format.
pub fn block(volume: Volume) -> Vec<u8> {
    let mut block = volume.line().to_vec();
    block.resize(BLOCK_BYTES, 0);
    block
}

/// Does a partition that begins with these bytes ask to be formatted as `volume`?
pub fn asks_to_be_formatted(first_bytes: &[u8], volume: Volume) -> bool {
    first_bytes.starts_with(volume.line())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_names_its_own_volume_only() {
        assert!(asks_to_be_formatted(&block(Volume::State), Volume::State));
        assert!(asks_to_be_formatted(&block(Volume::Data), Volume::Data));
        assert!(!asks_to_be_formatted(&block(Volume::Data), Volume::State));
        assert!(!asks_to_be_formatted(&block(Volume::State), Volume::Data));
    }

    #[test]
    fn zeros_and_a_cut_marker_are_no_marker() {
        assert!(!asks_to_be_formatted(&[0; BLOCK_BYTES], Volume::Data));
        let whole = block(Volume::Data);
        for cut in 0..Volume::Data.line().len() {
            assert!(!asks_to_be_formatted(&whole[..cut], Volume::Data), "cut at {cut}");
        }
    }

    #[test]
    fn labels_fit_into_an_ext4_superblock() {
        for volume in [Volume::State, Volume::Data] {
            assert!(volume.label().len() <= 16);
        }
    }
}
