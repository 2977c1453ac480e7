//! With which key are heads signed, and where is it kept?
//!
//! A file of its own on the state partition, two copies, mode 0600, as the authority's: the log is on the data
//! partition, so a copy of that partition cannot be signed anew. A damaged file is an error and never a new key.

use agentd_audit::Signer;
use agentd_console::StateFiles;
use agentd_domain::fault::Report;
use serde::{Deserialize, Serialize};
use std::io;

pub const KEY_FILE: &str = "audit-key.json";
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    format: u32,
    /// The 32 secret bytes of RFC 8032, 5.1.5.
    seed_hex: String,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("{KEY_FILE} cannot be read: {0}")]
    Read(#[source] io::Error),
    #[error("{KEY_FILE} cannot be written: {0}")]
    Write(#[source] io::Error),
    #[error("{KEY_FILE} is damaged: {0}")]
    Damaged(String),
    #[error("the kernel gave no randomness: {0}")]
    Random(getrandom::Error),
}

impl KeyError {
    pub fn report(&self) -> Report {
        Report::environment(
            "audit_key",
            "the audit log is not kept",
            self.to_string(),
            "see the state partition on the local console, then reboot the appliance",
        )
    }
}

/// Reads the key, or makes it at the first start. Blocks for the file.
pub fn open(files: &dyn StateFiles) -> Result<Signer, KeyError> {
    let seed = match files.read(KEY_FILE).map_err(KeyError::Read)? {
        Some(bytes) => parse(&bytes).map_err(KeyError::Damaged)?,
        None => {
            let mut seed = vec![0; 32];
            getrandom::fill(&mut seed).map_err(KeyError::Random)?;
            let file = KeyFile { format: FORMAT, seed_hex: hex::encode(&seed) };
            let bytes = serde_json::to_vec(&file).map_err(|error| KeyError::Write(error.into()))?;
            files.write(KEY_FILE, &bytes).map_err(KeyError::Write)?;
            seed
        }
    };
    Signer::from_seed(&seed).ok_or_else(|| KeyError::Damaged("it holds no key".to_owned()))
}

fn parse(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let file: KeyFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.format != FORMAT {
        return Err(format!("it has format {}, and this version reads {FORMAT}", file.format));
    }
    hex::decode(&file.seed_hex).map_err(|error| error.to_string())
}
