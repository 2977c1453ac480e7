//! Where is a signing key kept?
//!
//! A file of its own on the state partition, two copies, mode 0600, made at the first start: what it signs is on the data
//! partition, so a copy of that partition cannot be signed anew.
//! Always: a damaged file is an error and never a new key.

use agentd_console::StateFiles;
use serde::{Deserialize, Serialize};
use std::io;

const FORMAT: u32 = 1;

/// The 32 secret bytes of an Ed25519 key (RFC 8032, 5.1.5).
pub type Seed = [u8; 32];

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedFile {
    format: u32,
    seed_hex: String,
}

#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    #[error("{file} cannot be read: {source}")]
    Read { file: &'static str, source: io::Error },
    #[error("{file} cannot be written: {source}")]
    Write { file: &'static str, source: io::Error },
    #[error("{file} is damaged: {why}")]
    Damaged { file: &'static str, why: String },
    #[error("the kernel gave no randomness: {0}")]
    Random(getrandom::Error),
}

/// Reads the seed, or makes it at the first start. Blocks for the file.
pub fn open(files: &dyn StateFiles, file: &'static str) -> Result<Seed, SeedError> {
    if let Some(bytes) = files.read(file).map_err(|source| SeedError::Read { file, source })? {
        return parse(&bytes).map_err(|why| SeedError::Damaged { file, why });
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(SeedError::Random)?;
    let write = |source| SeedError::Write { file, source };
    let kept = SeedFile { format: FORMAT, seed_hex: hex::encode(seed) };
    let bytes = serde_json::to_vec(&kept).map_err(|error| write(error.into()))?;
    files.write(file, &bytes).map_err(write)?;
    Ok(seed)
}

fn parse(bytes: &[u8]) -> Result<Seed, String> {
    let file: SeedFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.format != FORMAT {
        return Err(format!("it has format {}, and this version reads {FORMAT}", file.format));
    }
    let seed = hex::decode(&file.seed_hex).map_err(|error| error.to_string())?;
    seed.try_into().map_err(|_| "it does not hold 32 bytes".to_owned())
}
