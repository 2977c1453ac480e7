//! How do keys and values leave the cache and come back the same?
//!
//! In:    what the plan says ([`crate::plan::Effect`]). Out: bytes in memory, or files in the folder that the engine
//!        was given; a sequence's cells, bit for bit as they were.
//! How:   llama.cpp writes and reads whole sequences only, and reading empties the sequence it reads into. So a part
//!        goes through a sequence that nobody works on: its cells are marked as the scratch sequence's, that one is
//!        written, and the other way round. What is shared stays where it is.
//! True:  the scratch sequence is empty before and after; a file is removed when its blob is dropped, when the model
//!        goes, and, if the engine was killed, when the folder is next used.
//! Disk:  llama.cpp's own sequence files (`llama_state_seq_save_file`), named `<process>-<model>-<blob>.kv`. They mean
//!        nothing to another process. What a file says of its shape is checked by llama.cpp when it is read.
//! Full:  a file is only taken for written when all of its bytes are there. After one that was not, no other is tried for
//!        [`PAUSE`]: what would have gone to it is computed again.
//! Secret: they hold what prompts say. The folder is this engine's alone, and encrypted if its partition is.
//! Thread: the model's own; writing a file blocks it.

use crate::radix::SeqId;
use crate::shelf::{BlobId, Tier};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::session::{LlamaStateSeqFlags, SeqState};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SUFFIX: &str = ".kv";
/// A disk that was full, or that failed, is not asked again for so long.
const PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(crate) enum SwapError {
    #[error("the engine was given no folder for files")]
    NoFolder,
    #[error("positions do not fit: {0}")]
    Positions(#[from] llama_cpp_2::context::kv_cache::KvCacheConversionError),
    #[error("llama.cpp did not copy the sequence: {0}")]
    Copy(#[from] llama_cpp_2::StateSeqError),
    #[error("the file was not written: {0}")]
    Save(#[from] llama_cpp_2::context::session::SaveSeqStateError),
    #[error("of {wanted} bytes {there} were written: the disk is full, or this engine's part of it")]
    Short { wanted: u64, there: u64 },
    #[error("a file could not be written some seconds ago")]
    Pause,
    #[error("the file was not read: {0}")]
    Load(#[from] llama_cpp_2::context::session::LoadSeqStateError),
    #[error("blob {0} is not here")]
    Missing(BlobId),
}

/// What was put aside of one model.
pub(crate) struct Swap {
    scratch: SeqId,
    memory: HashMap<BlobId, SeqState>,
    files: HashSet<BlobId>,
    folder: Option<PathBuf>,
    name: String,
    failed: Option<Instant>,
}

impl Swap {
    /// `scratch` is a sequence of the context that nobody else uses.
    pub(crate) fn new(scratch: SeqId, folder: Option<PathBuf>) -> Self {
        static MODELS: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-{}", std::process::id(), MODELS.fetch_add(1, Ordering::Relaxed));
        Self { scratch, memory: HashMap::new(), files: HashSet::new(), folder, name, failed: None }
    }

    /// Copies positions of a sequence out of the cache; they stay in it.
    pub(crate) fn store(
        &mut self,
        context: &mut LlamaContext<'_>,
        seq: SeqId,
        (from, upto): (u32, u32),
        (blob, tier): (BlobId, Tier),
    ) -> Result<Duration, SwapError> {
        let begun = Instant::now();
        if tier == Tier::Disk && self.failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(SwapError::Pause);
        }
        let scratch = i32::from(self.scratch.0);
        context.copy_kv_cache_seq(i32::from(seq.0), scratch, Some(from), Some(upto))?;
        let stored = match tier {
            Tier::Memory => {
                let state = context.state_seq_get(scratch, LlamaStateSeqFlags::empty());
                state.map(|state| drop(self.memory.insert(blob, state))).map_err(SwapError::from)
            }
            Tier::Disk => self.path(blob).ok_or(SwapError::NoFolder).and_then(|path| {
                self.files.insert(blob);
                let written = context.state_seq_save_file(&path, scratch, &[])?;
                whole(&path, written as u64)
            }),
        };
        self.empty_scratch(context)?;
        if stored.is_err() {
            self.forget(blob);
            self.failed = (tier == Tier::Disk).then(Instant::now).or(self.failed);
        }
        stored.map(|()| begun.elapsed())
    }

    /// Brings positions back. Cells for all of the blob must be free for the moment of it.
    pub(crate) fn load(
        &mut self,
        context: &mut LlamaContext<'_>,
        blob: BlobId,
        seq: SeqId,
        (from, upto): (u32, u32),
    ) -> Result<Duration, SwapError> {
        let begun = Instant::now();
        let scratch = i32::from(self.scratch.0);
        if let Some(state) = self.memory.get(&blob) {
            context.state_seq_set(state, scratch)?;
        } else if let Some(path) = self.path(blob).filter(|_| self.files.contains(&blob)) {
            context.state_seq_load_file(path, scratch, 0)?;
        } else {
            return Err(SwapError::Missing(blob));
        }
        context.copy_kv_cache_seq(scratch, i32::from(seq.0), Some(from), Some(upto))?;
        self.empty_scratch(context)?;
        Ok(begun.elapsed())
    }

    pub(crate) fn forget(&mut self, blob: BlobId) {
        self.memory.remove(&blob);
        if self.files.remove(&blob)
            && let Some(path) = self.path(blob)
        {
            remove(&path);
        }
    }

    fn empty_scratch(&self, context: &mut LlamaContext<'_>) -> Result<(), SwapError> {
        // A whole sequence can always be removed.
        context.clear_kv_cache_seq(Some(u32::from(self.scratch.0)), None, None)?;
        Ok(())
    }

    fn path(&self, blob: BlobId) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{}-{blob}{SUFFIX}", self.name)))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        for blob in std::mem::take(&mut self.files) {
            if let Some(path) = self.path(blob) {
                remove(&path);
            }
        }
    }
}

/// llama.cpp writes through a buffer and does not look at what closing the file says.
fn whole(path: &Path, wanted: u64) -> Result<(), SwapError> {
    let there = fs::metadata(path).map_or(0, |file| file.len());
    if there < wanted { Err(SwapError::Short { wanted, there }) } else { Ok(()) }
}

/// Removes what an engine left that was killed. Only one engine may use a folder.
pub(crate) fn clean(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) {
    // It may never have been written.
    if let Err(error) = fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a swap file was not removed");
    }
}
