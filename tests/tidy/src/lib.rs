//! Is the house in order?
//!
//! Each module answers one question about the repository with a list of complaints, empty when all is well:
//! what is read stands in [`Repo`], so that every rule is also tested on a small wrong example.
//! `tests/tidy.rs` runs the rules on the repository itself.
//!
//! Never: change a file. Format is `cargo fmt`'s, lints are clippy's; here is what those cannot see.
#![forbid(unsafe_code)]

pub mod acceptance;
pub mod crates;
pub mod documents;
pub mod kernel;
pub mod licences;
pub mod promises;
pub mod results;
pub mod sources;

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The text files of the repository, by path below its root with `/` between parts.
pub struct Repo {
    pub root: PathBuf,
    pub files: BTreeMap<String, String>,
}

impl Repo {
    /// Reads what git tracks or would track. Files that are not UTF-8 (a picture) keep an empty text, so that
    /// links to them are still known to lead somewhere.
    pub fn open() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
        let mut files = BTreeMap::new();
        for name in git(&root, &["ls-files", "--cached", "--others", "--exclude-standard", "-z"])?.split('\0')
        {
            // A file that is deleted but not yet committed is listed and cannot be read.
            if let (false, Ok(bytes)) = (name.is_empty(), std::fs::read(root.join(name))) {
                files.insert(name.to_owned(), String::from_utf8(bytes).unwrap_or_default());
            }
        }
        if files.is_empty() {
            bail!("git lists no file in {}: tidy needs a clone, not an exported tree", root.display());
        }
        Ok(Self { root, files })
    }

    /// A repository of a few files, for the tests of the rules.
    pub fn of(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Self { root: PathBuf::new(), files }
    }

    /// The files whose names end with `.<extension>`.
    pub fn with_extension<'a>(&'a self, extension: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> + 'a {
        self.files
            .iter()
            .filter(move |(name, _)| name.rsplit_once('.').is_some_and(|(_, end)| end == extension))
            .map(|(name, text)| (name.as_str(), text.as_str()))
    }

    pub fn has_path(&self, path: &str) -> bool {
        let folder = format!("{}/", path.trim_end_matches('/'));
        path.is_empty() || self.files.contains_key(path) || self.files.keys().any(|f| f.starts_with(&folder))
    }
}

/// The standard output of one git command.
pub(crate) fn git(root: &Path, arguments: &[&str]) -> Result<String> {
    let output =
        Command::new("git").arg("-C").arg(root).args(arguments).output().context("git does not run")?;
    if !output.status.success() {
        bail!("git {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}
