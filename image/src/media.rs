//! How does a model file reach a guest that has no other way in?
//!
//! `scripts/run --model FILE` makes a read-only erofs image that holds this one file under its own name. The
//! guest knows the drive by its serial number and mounts it at `paths::MEDIA_MODELS`.

use crate::cache::{Cache, Inputs};
use crate::command;
use crate::qemu::{Drive, Mode};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

/// The drive's serial number, by which init knows it.
pub const SERIAL: &str = "agentd-models";

/// Makes the medium, or finds it. The file is known by path, size and time: hashing tens of gigabytes at
/// every start would take longer than the start.
pub fn ensure_model_medium(cache: &Cache, model: &Path) -> Result<PathBuf> {
    let model = model.canonicalize().with_context(|| format!("no file {}", model.display()))?;
    let about = std::fs::metadata(&model)?;
    ensure!(about.is_file(), "{} is not a file", model.display());
    let name = model.file_name().context("a model without a name")?.to_owned();
    let changed = about.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    let mut inputs = Inputs::default();
    inputs
        .text("path", model.display().to_string())
        .text("bytes", about.len().to_string())
        .text("changed", changed.to_string());
    let folder = cache.stage("media", &inputs, |out| {
        let staged = tempfile::tempdir_in(out)?;
        let inside = staged.path().join(&name);
        // A link costs nothing; across file systems it has to be a copy.
        if std::fs::hard_link(&model, &inside).is_err() {
            std::fs::copy(&model, &inside)?;
        }
        let mut mkfs = Command::new("mkfs.erofs");
        mkfs.args(["-x-1", "--all-root", "--quiet"]).arg(out.join("models.erofs")).arg(staged.path());
        command::output(&mut mkfs).map(drop)
    })?;
    Ok(folder.join("models.erofs"))
}

/// The medium as a drive.
pub fn drive(image: &Path) -> Drive {
    Drive { serial: Some(SERIAL.to_owned()), mode: Mode::ReadOnly, ..Drive::raw(image) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_holds_the_file_under_its_name_and_is_made_anew_when_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("cache")).unwrap();
        let model = folder.path().join("chat model.gguf");
        std::fs::write(&model, "GGUF and so on").unwrap();
        let first = ensure_model_medium(&cache, &model).unwrap();
        assert_eq!(ensure_model_medium(&cache, &model).unwrap(), first);
        let bytes = std::fs::read(&first).unwrap();
        assert!(bytes.windows(15).any(|part| part == b"chat model.gguf"));
        std::fs::write(&model, "GGUF and so on, longer").unwrap();
        assert_ne!(ensure_model_medium(&cache, &model).unwrap(), first);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let error = ensure_model_medium(&cache, Path::new("/nowhere/x.gguf")).unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/x.gguf"));
    }
}
