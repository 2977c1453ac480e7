//! How did each run end, and does agentd know yet?
//!
//! Owns:  `/run/agentd/runs/<run_id>.json`, one [`ExitRecord`] each, written whole or not at all.
//! Always: a record stays until agentd says that it has stored it. A launcher that was restarted reads them again.

use agentd_domain::ids::RunId;
use agentd_domain::launcher::{ExitCause, ExitRecord};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A step's name and an errno are far shorter; the rest of an agent's choosing is cut.
const WHY_MAX_CHARS: usize = 500;

#[derive(Debug)]
pub(super) struct Records {
    folder: PathBuf,
    pub(super) kept: BTreeMap<RunId, ExitRecord>,
}

impl Records {
    pub(super) fn load(folder: PathBuf) -> io::Result<Self> {
        let mut kept = BTreeMap::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            // A half-written temporary file of a launcher that died is of no use.
            match fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<ExitRecord>(&bytes).ok()) {
                Some(record) => {
                    kept.insert(record.run_id, record);
                }
                None => fs::remove_file(&path)?,
            }
        }
        Ok(Self { folder, kept })
    }

    /// Keeps the record in memory even when the file could not be written: the list still shows it.
    pub(super) fn add(&mut self, mut record: ExitRecord) -> io::Result<()> {
        if let ExitCause::WallFailed { why } = &mut record.cause {
            *why = why.chars().take(WHY_MAX_CHARS).collect();
        }
        let path = file(&self.folder, record.run_id);
        let written = write_whole(&path, &record);
        self.kept.insert(record.run_id, record);
        written
    }

    pub(super) fn forget(&mut self, run_id: RunId) -> io::Result<()> {
        self.kept.remove(&run_id);
        match fs::remove_file(file(&self.folder, run_id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn file(folder: &Path, run_id: RunId) -> PathBuf {
    folder.join(format!("{run_id}.json"))
}

fn write_whole(path: &Path, record: &ExitRecord) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec(record)?)?;
    fs::rename(&temporary, path)
}
