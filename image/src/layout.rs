//! Which partitions does every disk of the appliance have, and where do they lie?
//!
//! Pure. One table for all variants, so that any variant can become any other. Everything is aligned to
//! 1 MiB, as every tool since 2008 does and as flash memory likes.
//!
//! The data partition is made small: first boot grows it to the end of whatever disk it finds itself on.

use crate::verity::RootHash;
use agentd_domain::marker;
use sha2::{Digest, Sha256};
use uuid::{Uuid, uuid};

pub const SECTOR_BYTES: u64 = 512;
pub const MIB: u64 = 1024 * 1024;
pub const GIB: u64 = 1024 * MIB;

/// The smallest disk that the appliance works on, and the size of the image.
pub const DISK_BYTES: u64 = 16 * GIB;

/// Partition types of the Discoverable Partitions Specification
/// (https://uapi-group.org/specifications/specs/discoverable_partitions_specification/).
const TYPE_ESP: Uuid = uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
const TYPE_ROOT: Uuid = uuid!("4f68bce3-e8cd-4db1-96e7-fbcaf984b709");
const TYPE_VERITY: Uuid = uuid!("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5");
const TYPE_LINUX: Uuid = uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4");

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    pub name: &'static str,
    pub kind: Uuid,
    pub start_bytes: u64,
    pub size_bytes: u64,
}

impl Partition {
    pub fn first_sector(&self) -> u64 {
        self.start_bytes / SECTOR_BYTES
    }

    pub fn last_sector(&self) -> u64 {
        (self.start_bytes + self.size_bytes) / SECTOR_BYTES - 1
    }
}

/// Names, types and sizes in the order in which they lie on the disk.
const TABLE: [(&str, Uuid, u64); 8] = [
    (marker::PARTITION_ESP, TYPE_ESP, 2 * GIB),
    (marker::PARTITION_STATE, TYPE_LINUX, 512 * MIB),
    (marker::PARTITION_ROOT_A, TYPE_ROOT, 4 * GIB),
    (marker::PARTITION_VERITY_A, TYPE_VERITY, 64 * MIB),
    (marker::PARTITION_ROOT_B, TYPE_ROOT, 4 * GIB),
    (marker::PARTITION_VERITY_B, TYPE_VERITY, 64 * MIB),
    (marker::PARTITION_RESERVE, TYPE_LINUX, 64 * MIB),
    (marker::PARTITION_DATA, TYPE_LINUX, 64 * MIB),
];

pub fn partitions() -> Vec<Partition> {
    let mut start_bytes = MIB;
    TABLE
        .iter()
        .map(|&(name, kind, size_bytes)| {
            let partition = Partition { name, kind, start_bytes, size_bytes };
            start_bytes += size_bytes;
            partition
        })
        .collect()
}

pub fn partition(name: &str) -> Option<Partition> {
    partitions().into_iter().find(|partition| partition.name == name)
}

/// A GUID that is the same for the same version: the image must not depend on chance. First boot and
/// `scripts/flash` give a machine GUIDs of its own.
pub fn stable_guid(version: &str, what: &str) -> Uuid {
    let digest = Sha256::digest(format!("agentd-os guid {version} {what}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    // The bits that RFC 9562 reserves for "version 8, of the maker's own making".
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// The GUID of a partition on a fresh image: roots are named by their hash, the rest by the version.
pub fn guid(name: &str, version: &str, root_hash: &RootHash) -> Uuid {
    match name {
        marker::PARTITION_ROOT_A => root_hash.data_partition(),
        marker::PARTITION_VERITY_A => root_hash.hash_partition(),
        _ => stable_guid(version, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_aligned_adjacent_and_fit_the_smallest_disk() {
        let all = partitions();
        let mut expected = MIB;
        for partition in &all {
            assert_eq!(partition.start_bytes, expected, "{}", partition.name);
            assert_eq!(partition.size_bytes % MIB, 0, "{}", partition.name);
            expected += partition.size_bytes;
        }
        assert!(expected + MIB <= DISK_BYTES, "room for the backup table");
        assert_eq!(all.last().unwrap().name, "data", "only the last one can grow");
    }

    #[test]
    fn the_sizes_are_the_designs() {
        let size = |name| partition(name).unwrap().size_bytes;
        assert_eq!(size("esp"), 2 * GIB);
        assert_eq!(size("state"), 512 * MIB);
        assert_eq!((size("root-a"), size("root-b")), (4 * GIB, 4 * GIB));
        assert_eq!((size("verity-a"), size("verity-b")), (64 * MIB, 64 * MIB));
    }

    #[test]
    fn a_hash_tree_of_a_full_root_fits_its_partition() {
        // 128 hashes of 32 bytes per block of 4096, level over level, and the superblock.
        let mut blocks = 4 * GIB / 4096;
        let mut tree = 1;
        while blocks > 1 {
            blocks = blocks.div_ceil(128);
            tree += blocks;
        }
        assert!(tree * 4096 <= 64 * MIB, "{tree} blocks");
    }

    #[test]
    fn guids_are_stable_distinct_and_well_formed() {
        let hash = RootHash::parse(&"ab".repeat(32)).unwrap();
        let mut all: Vec<Uuid> = ["esp", "state", "root-b", "verity-b", "reserve", "data", "disk"]
            .map(|name| guid(name, "1.0.0", &hash))
            .to_vec();
        assert_eq!(all[0], guid("esp", "1.0.0", &hash));
        assert_ne!(all[0], guid("esp", "1.0.1", &hash));
        assert_eq!(all[0].get_version_num(), 8);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 7);
        assert_eq!(guid("root-a", "1.0.0", &hash), hash.data_partition());
    }
}
