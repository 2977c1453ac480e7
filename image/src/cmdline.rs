//! What does the boot item tell the kernel?
//!
//! Pure. Source: admin-guide/device-mapper/dm-init.rst and verity.rst of Linux 6.12.

use crate::verity::RootHash;

/// Device mapper counts in sectors of 512 bytes, verity here in blocks of 4096.
const SECTORS_PER_BLOCK: u64 = 8;
pub const BLOCK_BYTES: u64 = 4096;

/// What the table needs to know of the root.
#[derive(Debug, Clone, Copy)]
pub struct VerifiedRoot {
    pub blocks: u64,
    pub root_hash: RootHash,
}

/// The whole command line of a boot item.
///
/// A damaged block panics: the record reaches pstore, and the boot counter leads to the other slot.
/// The hash tree has a superblock in its block 0, so it starts at block 1.
pub fn kernel(root: &VerifiedRoot) -> String {
    let (data, hash) = (root.root_hash.data_partition(), root.root_hash.hash_partition());
    let sectors = root.blocks * SECTORS_PER_BLOCK;
    let blocks = root.blocks;
    [
        format!(
            "dm-mod.create=\"vroot,,,ro,0 {sectors} verity 1 PARTUUID={data} PARTUUID={hash} 4096 4096 \
             {blocks} 1 sha256 {} - 1 panic_on_corruption\"",
            root.root_hash.hex()
        )
        .as_str(),
        // Disks appear when they like. Waits for ever, which is why the watchdog below runs.
        &format!("dm-mod.waitfor=PARTUUID={data},PARTUUID={hash}"),
        "root=/dev/dm-0 rootfstype=erofs ro",
        // Reads the backup table when the primary one is damaged.
        "gpt",
        // Runs before init and is fed by init; a hang in between ends in a recorded panic and a reboot.
        "softdog.soft_active_on_boot=1 softdog.soft_panic=1",
        "panic=10",
        "page_alloc.shuffle=1",
        // The last one is /dev/console; init writes to all.
        "console=ttyS0,115200n8 console=tty0",
        "quiet loglevel=4",
    ]
    .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_sectors_blocks_partitions_and_hash_in_their_places() {
        let root_hash = RootHash::parse(&"0123456789abcdef".repeat(4)).unwrap();
        let line = kernel(&VerifiedRoot { blocks: 1000, root_hash });
        let table = line.split('"').nth(1).unwrap();
        let words: Vec<&str> = table.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "vroot,,,ro,0",
                "8000",
                "verity",
                "1",
                "PARTUUID=01234567-89ab-cdef-0123-456789abcdef",
                "PARTUUID=01234567-89ab-cdef-0123-456789abcdef",
                "4096",
                "4096",
                "1000",
                "1",
                "sha256",
                &"0123456789abcdef".repeat(4),
                "-",
                "1",
                "panic_on_corruption",
            ]
        );
        // COMMAND_LINE_SIZE on x86 is 2048; longer lines are cut without a word.
        assert!(line.len() < 2048 && line.is_ascii());
    }
}
