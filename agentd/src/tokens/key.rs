//! With which key are tokens signed, and where is it kept?
//!
//! As the audit log's: a file of its own on the state partition, two copies, mode 0600, made at the first start. Tokens
//! are on the data partition, so a copy of that partition mints none. A damaged file is an error and never a new key:
//! without the key no token holds, and no agent runs.

use agentd_capability::token::RootKey;
use agentd_console::StateFiles;
use agentd_domain::fault::Report;
use serde::{Deserialize, Serialize};
use std::io;

pub const KEY_FILE: &str = "token-key.json";
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
            "token_key",
            "no agent is started: their tokens cannot be checked",
            self.to_string(),
            "see the state partition on the local console, then reboot the appliance",
        )
    }
}

/// Reads the key, or makes it at the first start. Blocks for the file.
pub fn open(files: &dyn StateFiles) -> Result<RootKey, KeyError> {
    let seed = match files.read(KEY_FILE).map_err(KeyError::Read)? {
        Some(bytes) => parse(&bytes).map_err(KeyError::Damaged)?,
        None => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed).map_err(KeyError::Random)?;
            let file = KeyFile { format: FORMAT, seed_hex: hex::encode(seed) };
            let bytes = serde_json::to_vec(&file).map_err(|error| KeyError::Write(error.into()))?;
            files.write(KEY_FILE, &bytes).map_err(KeyError::Write)?;
            seed
        }
    };
    RootKey::from_secret(&seed).map_err(|report| KeyError::Damaged(report.why))
}

fn parse(bytes: &[u8]) -> Result<[u8; 32], String> {
    let file: KeyFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.format != FORMAT {
        return Err(format!("it has format {}, and this version reads {FORMAT}", file.format));
    }
    let seed = hex::decode(&file.seed_hex).map_err(|error| error.to_string())?;
    seed.try_into().map_err(|_| "it does not hold 32 bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_files::TwoFiles;

    #[test]
    fn the_key_is_made_once_and_a_damaged_one_is_no_new_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = TwoFiles { folder: folder.path().to_owned() };
        let first = open(&files).expect("made").public();
        assert_eq!(open(&files).expect("read").public(), first);
        for damaged in
            ["{}", "{\"format\":2,\"seed_hex\":\"\"}", "{\"format\":1,\"seed_hex\":\"00\"}", "nonsense"]
        {
            files.write(KEY_FILE, damaged.as_bytes()).expect("written");
            let error = open(&files).err().expect("refused");
            assert!(matches!(error, KeyError::Damaged(_)), "{damaged}: {error}");
            assert_eq!(files.read(KEY_FILE).expect("read").as_deref(), Some(damaged.as_bytes()));
        }
    }
}
