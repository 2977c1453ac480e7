//! With which key are tokens signed? With a file of its own, see [`crate::seed_file`]. Without it no token holds, and no
//! agent runs.

use crate::seed_file::{self, SeedError};
use agentd_capability::token::RootKey;
use agentd_console::StateFiles;
use agentd_domain::fault::Report;

pub const KEY_FILE: &str = "token-key.json";

/// Reads the key, or makes it at the first start. Blocks for the file.
pub fn open(files: &dyn StateFiles) -> Result<RootKey, SeedError> {
    let seed = seed_file::open(files, KEY_FILE)?;
    RootKey::from_secret(&seed).map_err(|report| SeedError::Damaged { file: KEY_FILE, why: report.why })
}

pub fn report(error: &SeedError) -> Report {
    Report::environment(
        "token_key",
        "no agent is started: their tokens cannot be checked",
        error.to_string(),
        "see the state partition on the local console, then reboot the appliance",
    )
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
            assert!(matches!(error, SeedError::Damaged { .. }), "{damaged}: {error}");
            assert_eq!(files.read(KEY_FILE).expect("read").as_deref(), Some(damaged.as_bytes()));
        }
    }
}
