//! Is this file a model that may be handed to llama.cpp, and what is in it?
//!
//! In:    the file's length and a way to read a range of it; the caller owns the file.
//! Out:   a [`Summary`], or a [`GgufError`] that says where and why the file is refused.
//! Never: reads tensor data, allocates by a length that the file claims, panics. `agentd` runs it at
//!        `model add`, the engine once more before it loads: llama.cpp answers a broken promise inside a file
//!        with `abort()`, which ends every generation of the engine.
//! True after success: every string, array and tensor lies inside the file; tensors follow one another in
//!        file order without holes or overlaps; the tokenizer's parallel arrays have one length; the
//!        hyperparameters that llama.cpp divides by or allocates by are within bounds.
//! Source: the GGUF specification, `docs/gguf.md` of ggml-org/ggml, version 3, and `ggml/src/gguf.cpp`.

mod cursor;
mod metadata;
mod shape;
mod tensors;

use crate::fault::Report;
use cursor::Cursor;
pub use metadata::Summary;
pub use shape::{Block, Shape, WindowPattern};

/// Models carry a few dozen keys; the largest seen have about 60.
const MAX_KEYS: u64 = 4096;
/// The largest mixture-of-experts files have a few thousand tensors.
const MAX_TENSORS: u64 = 65_536;

/// How the parser reads: fill the buffer from this offset of the file.
pub type ReadAt<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<(), String>;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    #[error("the file begins with {0:02x?} and not with `GGUF`")]
    NotGguf([u8; 4]),
    #[error("GGUF version {0} is not supported, only 2 and 3 are")]
    Version(u32),
    #[error("{what} needs bytes up to {needs_bytes}, the file ends at {has_bytes}")]
    Truncated { what: String, needs_bytes: u64, has_bytes: u64 },
    #[error("at byte {at}: {what}")]
    Corrupt { at: u64, what: String },
    #[error("the file is part {part} of {parts} of a split model")]
    Split { part: u64, parts: u64 },
    #[error("reading failed at byte {at}: {why}")]
    Unreadable { at: u64, why: String },
}

impl GgufError {
    /// The error as the owner sees it; `file` is the name to show.
    pub fn report(&self, file: &str) -> Report {
        let what = format!("the model {file} was not loaded");
        let why = self.to_string();
        match self {
            Self::NotGguf(_) => Report::caller(
                "model_not_gguf",
                what,
                why,
                "give a model in GGUF format; its name usually ends with .gguf",
            ),
            Self::Version(_) => Report::caller(
                "model_version_unsupported",
                what,
                why,
                "convert the model again, to GGUF version 3",
            ),
            Self::Truncated { .. } => Report::caller(
                "model_file_truncated",
                what,
                why,
                "the copy is incomplete: fetch the file again and compare its size and SHA-256 with its source",
            ),
            Self::Corrupt { .. } => Report::caller(
                "model_corrupt",
                what,
                why,
                "fetch the file again from a source you trust and compare its SHA-256",
            ),
            Self::Split { .. } => Report::caller(
                "model_split_unsupported",
                what,
                why,
                "merge the parts into one file with `llama-gguf-split --merge`, then add that file",
            ),
            Self::Unreadable { .. } => Report::environment(
                "model_file_unreadable",
                what,
                why,
                "check the medium that holds the file",
            ),
        }
    }
}

/// Checks a file of `file_bytes` bytes. Reads the header only, a few megabytes at most.
///
/// # Errors
/// The first thing that is wrong, in file order.
pub fn check(file_bytes: u64, read_at: ReadAt<'_>) -> Result<Summary, GgufError> {
    let mut cursor = Cursor::new(file_bytes, read_at);
    let magic = cursor.magic()?;
    if &magic != b"GGUF" {
        return Err(GgufError::NotGguf(magic));
    }
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version(version));
    }
    let tensor_count = bounded(&mut cursor, "the number of tensors", 1, MAX_TENSORS)?;
    let key_count = bounded(&mut cursor, "the number of keys", 1, MAX_KEYS)?;
    let metadata = metadata::read(&mut cursor, key_count)?;
    let tensors = tensors::read(&mut cursor, tensor_count, metadata.alignment)?;
    metadata.summary(version, file_bytes, &tensors)
}

/// [`check`] for a file that is in memory.
///
/// # Errors
/// As [`check`].
pub fn check_slice(bytes: &[u8]) -> Result<Summary, GgufError> {
    check(bytes.len() as u64, &mut |at, into: &mut [u8]| {
        let start = usize::try_from(at).map_err(|e| e.to_string())?;
        let range = bytes.get(start..start.saturating_add(into.len())).ok_or("out of range")?;
        into.copy_from_slice(range);
        Ok(())
    })
}

fn bounded(cursor: &mut Cursor<'_>, what: &str, low: u64, high: u64) -> Result<u64, GgufError> {
    let at = cursor.position();
    let value = cursor.u64(what)?;
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(GgufError::Corrupt { at, what: format!("{what} is {value}, expected {low} to {high}") })
    }
}

#[cfg(test)]
mod tests;
