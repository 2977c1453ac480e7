//! Where do finished stages lie, and when is one up to date?
//!
//! A stage's result is a folder named by the hash of its inputs. It is made in a temporary folder beside it
//! and renamed, so a folder that exists is complete. One builder at a time holds the cache's lock.
//!
//! Each stage prints one line: its name, what happened, how long it took.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

/// Folders of one stage that are kept beside the newest: enough for going back and forth between commits,
/// few enough that the cache stays below a few gigabytes.
const KEPT_PER_STAGE: usize = 8;

/// Characters of a hash in a folder's name.
const SHORT_HASH: usize = 16;

#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$AGENTD_CACHE`, or `~/.cache/agentd-os`.
    pub fn from_env() -> Result<Self> {
        let root = match std::env::var_os("AGENTD_CACHE") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set; set AGENTD_CACHE")?)
                .join(".cache/agentd-os"),
        };
        Self::at(&root)
    }

    pub fn at(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
        Ok(Self { root: root.canonicalize()? })
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// Waits until no other builder works in this cache. The lock goes with the value.
    pub fn lock(&self) -> Result<File> {
        let path = self.path("build.lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if file.try_lock().is_err() {
            eprintln!("waiting     for another build in {}", self.root.display());
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }

    /// Finds the stage's folder, or makes it with `make` in a temporary folder. Returns the folder.
    pub fn stage(
        &self,
        name: &str,
        inputs: &Inputs,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let stages = self.path(name);
        let folder = stages.join(&inputs.hash()[..SHORT_HASH]);
        let line = Line::start(name);
        if folder.join("inputs.json").exists() {
            // The newest use keeps it from being pruned.
            File::open(&folder)?.set_modified(SystemTime::now()).ok();
            line.end("cached", &folder.display().to_string());
            return Ok(folder);
        }
        std::fs::create_dir_all(&stages)?;
        let scratch = tempfile::Builder::new().prefix(".making-").tempdir_in(&stages)?;
        if let Err(error) = make(scratch.path()) {
            line.end("FAILED", "");
            return Err(error.context(format!("stage {name}")));
        }
        inputs.write(&scratch.path().join("inputs.json"))?;
        let made = scratch.keep();
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::rename(&made, &folder)
            .with_context(|| format!("cannot rename {} to {}", made.display(), folder.display()))?;
        prune(&stages, &folder);
        line.end("built", &folder.display().to_string());
        Ok(folder)
    }
}

/// A line of progress for a stage that has no folder of its own.
pub struct Line {
    name: String,
    since: Instant,
}

impl Line {
    pub fn start(name: &str) -> Self {
        eprint!("{name:<10}  ");
        std::io::stderr().flush().ok();
        Self { name: name.to_owned(), since: Instant::now() }
    }

    pub fn end(self, what: &str, detail: &str) {
        debug_assert!(!self.name.is_empty());
        eprintln!("{what:<6} {:>7.1} s  {detail}", self.since.elapsed().as_secs_f64());
    }
}

/// Removes the oldest complete folders of a stage. Failing to is no reason to fail: it only costs space.
fn prune(stages: &Path, newest: &Path) {
    let Ok(entries) = std::fs::read_dir(stages) else { return };
    let mut folders: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().join("inputs.json").exists() && entry.path() != newest)
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    folders.sort();
    let surplus = folders.len().saturating_sub(KEPT_PER_STAGE);
    for (_, folder) in &folders[..surplus] {
        std::fs::remove_dir_all(folder).ok();
    }
}

/// What a stage's result depends on, by name. Facts are recorded beside it and do not count.
#[derive(Debug, Default, Clone)]
pub struct Inputs {
    counted: BTreeMap<String, String>,
    facts: BTreeMap<String, String>,
}

impl Inputs {
    pub fn text(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.counted.insert(name.to_owned(), value.into());
        self
    }

    pub fn file(&mut self, name: &str, path: &Path) -> Result<&mut Self> {
        let digest = sha256_file(path)?;
        Ok(self.text(name, format!("sha256:{digest}")))
    }

    /// Recorded for the reader, without effect on the hash.
    pub fn fact(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    /// SHA-256 of all names and values, lower-case hex.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        for (name, value) in &self.counted {
            // Lengths keep two different lists from being the same bytes.
            for part in [name, value] {
                hasher.update((part.len() as u64).to_le_bytes());
                hasher.update(part.as_bytes());
            }
        }
        hex::encode(hasher.finalize())
    }

    fn write(&self, path: &Path) -> Result<()> {
        let value =
            serde_json::json!({ "hash": self.hash(), "inputs": self.counted, "recorded": self.facts });
        std::fs::write(path, serde_json::to_vec_pretty(&value)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// SHA-256 of a file's bytes, lower-case hex.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_depends_on_names_and_values_and_not_on_facts_or_order() {
        let mut one = Inputs::default();
        one.text("a", "1").text("b", "2");
        let mut other = Inputs::default();
        other.text("b", "2").text("a", "1").fact("built", "yesterday");
        assert_eq!(one.hash(), other.hash());
        let mut shifted = Inputs::default();
        shifted.text("a", "12").text("b", "");
        assert_ne!(one.hash(), shifted.hash());
        let mut renamed = Inputs::default();
        renamed.text("a", "1").text("c", "2");
        assert_ne!(one.hash(), renamed.hash());
    }

    #[test]
    fn a_stage_is_made_once_and_a_failed_one_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let mut inputs = Inputs::default();
        inputs.text("x", "1");
        let failed = cache.stage("thing", &inputs, |_| anyhow::bail!("no"));
        assert!(format!("{:#}", failed.unwrap_err()).contains("stage thing"));
        let made =
            cache.stage("thing", &inputs, |path| Ok(std::fs::write(path.join("result"), "here")?)).unwrap();
        assert_eq!(std::fs::read_to_string(made.join("result")).unwrap(), "here");
        let again = cache.stage("thing", &inputs, |_| panic!("must not be made again")).unwrap();
        assert_eq!(made, again);
        let names: Vec<_> = std::fs::read_dir(cache.path("thing")).unwrap().collect();
        assert_eq!(names.len(), 1, "the scratch folder of the failure is gone");
    }

    #[test]
    fn old_results_are_pruned_and_the_newest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let mut last = PathBuf::new();
        for n in 0..KEPT_PER_STAGE + 5 {
            let mut inputs = Inputs::default();
            inputs.text("n", n.to_string());
            last = cache.stage("thing", &inputs, |_| Ok(())).unwrap();
        }
        assert!(last.exists());
        assert_eq!(std::fs::read_dir(cache.path("thing")).unwrap().count(), KEPT_PER_STAGE + 1);
    }

    #[test]
    fn a_files_digest_is_sha256() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(
            sha256_file(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
