//! What is the hash of a root, and which partitions does it name?
//!
//! The hash tree is made by `veritysetup format` (no privileges needed on plain files), without salt: the
//! root contains its version, so two roots never share a hash.

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;
use uuid::Uuid;

/// SHA-256 at the top of the hash tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RootHash([u8; 32]);

impl RootHash {
    pub fn parse(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).with_context(|| format!("not a SHA-256: {text:?}"))?;
        Ok(Self(bytes))
    }

    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// GUID of the partition with the root: the first half.
    pub fn data_partition(&self) -> Uuid {
        self.half(0)
    }

    /// GUID of the partition with the hash tree: the second half.
    pub fn hash_partition(&self) -> Uuid {
        self.half(16)
    }

    fn half(&self, from: usize) -> Uuid {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.0[from..from + 16]);
        Uuid::from_bytes(bytes)
    }
}

impl TryFrom<String> for RootHash {
    type Error = anyhow::Error;
    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<RootHash> for String {
    fn from(hash: RootHash) -> Self {
        hash.hex()
    }
}

/// Writes the hash tree of `data` to `tree`.
pub fn format(data: &Path, tree: &Path, uuid: Uuid) -> Result<RootHash> {
    let said = command::output(
        Command::new("veritysetup")
            .args(["format", "--salt=-", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096"])
            .arg(format!("--uuid={uuid}"))
            .args([data, tree]),
    )?;
    let line = said.lines().find_map(|line| line.strip_prefix("Root hash:"));
    let Some(line) = line else { bail!("veritysetup printed no root hash:\n{said}") };
    RootHash::parse(line.trim())
}

/// Reads every block and compares.
pub fn verify(data: &Path, tree: &Path, hash: &RootHash) -> Result<()> {
    command::output(Command::new("veritysetup").arg("verify").args([data, tree]).arg(hash.hex()))?;
    Ok(())
}

/// Number of whole blocks in a root.
pub fn blocks(data: &Path) -> Result<u64> {
    let bytes = std::fs::metadata(data)?.len();
    ensure!(
        bytes % crate::cmdline::BLOCK_BYTES == 0,
        "{}: {bytes} bytes are no whole blocks",
        data.display()
    );
    Ok(bytes / crate::cmdline::BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_halves_of_the_hash_name_the_partitions() {
        let hash =
            RootHash::parse("00112233445566778899aabbccddeeff0f1e2d3c4b5a69788796a5b4c3d2e1f0").unwrap();
        assert_eq!(hash.data_partition().to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(hash.hash_partition().to_string(), "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0");
    }

    #[test]
    fn a_short_or_foreign_hash_is_refused() {
        assert!(RootHash::parse("00").is_err());
        assert!(RootHash::parse(&"g".repeat(64)).is_err());
    }
}
