//! With which key are heads signed? With a file of its own, see [`crate::seed_file`].

use crate::seed_file::{self, SeedError};
use agentd_audit::Signer;
use agentd_console::StateFiles;
use agentd_domain::fault::Report;

pub const KEY_FILE: &str = "audit-key.json";

/// Reads the key, or makes it at the first start. Blocks for the file.
pub fn open(files: &dyn StateFiles) -> Result<Signer, SeedError> {
    let seed = seed_file::open(files, KEY_FILE)?;
    let damaged = || SeedError::Damaged { file: KEY_FILE, why: "it holds no key".to_owned() };
    Signer::from_seed(&seed).ok_or_else(damaged)
}

pub fn report(error: &SeedError) -> Report {
    Report::environment(
        "audit_key",
        "the audit log is not kept",
        error.to_string(),
        "see the state partition on the local console, then reboot the appliance",
    )
}
