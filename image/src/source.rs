//! Which checkout is this, which version does it make, and what time does its image carry?

use crate::command;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Debug, Clone)]
pub struct Checkout {
    pub root: PathBuf,
    /// `0.1.0~57`: the workspace's version and the number of commits, so that versions strictly increase in
    /// systemd's order and stay below the release they lead to. A build without git has no count.
    pub version: String,
    /// The commit's time, seconds since 1970: every file in the image carries it, and it is the clock's floor.
    pub epoch_s: u64,
    /// `git describe`-like identity for the record; `none` without git.
    pub commit: String,
}

impl Checkout {
    /// The checkout that this program was built from, or `$AGENTD_SOURCE`.
    pub fn find() -> Result<Self> {
        let root = match std::env::var_os("AGENTD_SOURCE") {
            Some(path) => PathBuf::from(path),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
        };
        Self::at(&root)
    }

    pub fn at(root: &Path) -> Result<Self> {
        let root = root.canonicalize().with_context(|| format!("no checkout at {}", root.display()))?;
        let base = env!("CARGO_PKG_VERSION");
        let count = git(&root, &["rev-list", "--count", "HEAD"]);
        let time = git(&root, &["log", "-1", "--format=%ct"]);
        let commit = git(&root, &["describe", "--always", "--dirty", "--abbrev=12"]);
        let epoch_s = match (std::env::var("SOURCE_DATE_EPOCH"), time) {
            (Ok(value), _) => value.trim().parse().context("SOURCE_DATE_EPOCH is not a number")?,
            (Err(_), Some(value)) => value.parse().context("git gave a commit time that is no number")?,
            (Err(_), None) => anyhow::bail!("not a git checkout: set SOURCE_DATE_EPOCH to the build's time"),
        };
        Ok(Self {
            root,
            version: count.map_or_else(|| base.to_owned(), |count| format!("{base}~{count}")),
            epoch_s,
            commit: commit.unwrap_or_else(|| "none".to_owned()),
        })
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    // A checkout may belong to another user than the builder; reading it is harmless.
    let safe = format!("safe.directory={}", root.display());
    let mut command = Command::new("git");
    command.arg("-C").arg(root).args(["-c", &safe]).args(arguments);
    command::output(&mut command).ok().map(|text| text.trim().to_owned())
}
