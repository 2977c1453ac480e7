//! What was done already, and what is written down of it?
//!
//! Owns: `<cache>/gpu-check/done.json`, the outcomes of one commit on one card with one model; another of these begins
//!       anew. Out: a row of `tests/results/gpu-check.md`; of a rehearsal, of `gpu-check-rehearsal.md`.

use crate::card::Card;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const REPORT: &str = "tests/results/gpu-check.md";
const TITLE: &str = "# Our promises on a real GPU";
const REHEARSAL: &str = "tests/results/gpu-check-rehearsal.md";
const REHEARSAL_TITLE: &str =
    "# `scripts/gpu-check` rehearsed on a software device: no GPU, and no GPU's numbers";
const HEAD: &str = "

Covers: agentd/crates/engine tests/gpu-check

| date | commit | result | seconds | details |
|---|---|---|---|---|
";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Passed(String),
    Skipped(String),
    Failed(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed(what) => write!(f, "ok, {what}"),
            Self::Skipped(why) => write!(f, "SKIPPED, {why}"),
            Self::Failed(why) => write!(f, "FAILED, {why}"),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Progress {
    commit: String,
    card: Card,
    model: PathBuf,
    done: BTreeMap<String, (Outcome, u64)>,
    #[serde(skip)]
    file: PathBuf,
}

impl Progress {
    pub fn open(cache: &Path, commit: &str, card: &Card, model: &Path, again: bool) -> Result<Self> {
        let folder = cache.join("gpu-check");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let file = folder.join("done.json");
        let fresh = Self {
            commit: commit.to_owned(),
            card: card.clone(),
            model: model.to_owned(),
            done: BTreeMap::new(),
            file: file.clone(),
        };
        let kept: Option<Self> = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(match kept {
            Some(kept) if !again && kept.is_of(&fresh) => Self { file, ..kept },
            _ => fresh,
        })
    }

    fn is_of(&self, other: &Self) -> bool {
        (&self.commit, &self.card, &self.model) == (&other.commit, &other.card, &other.model)
    }

    /// A step that failed is done again.
    pub fn of(&self, step: &str) -> Option<&Outcome> {
        self.done
            .get(step)
            .map(|(outcome, _)| outcome)
            .filter(|outcome| !matches!(outcome, Outcome::Failed(_)))
    }

    pub fn keep(&mut self, step: &str, outcome: Outcome, took: Duration) -> Result<()> {
        self.done.insert(step.to_owned(), (outcome, took.as_secs()));
        fs::write(&self.file, serde_json::to_vec_pretty(self)?)?;
        Ok(())
    }

    pub fn failed(&self) -> bool {
        self.done.values().any(|(outcome, _)| matches!(outcome, Outcome::Failed(_)))
    }

    /// Appends the row.
    pub fn report(&self, source: &Path) -> Result<PathBuf> {
        let (file, title) = if self.card.software { (REHEARSAL, REHEARSAL_TITLE) } else { (REPORT, TITLE) };
        let path = source.join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|_| format!("{title}{HEAD}"));
        let date = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
        fs::write(&path, format!("{text}{}\n", self.row(&date)))
            .with_context(|| path.display().to_string())?;
        Ok(path)
    }

    fn row(&self, date: &str) -> String {
        let result = if self.failed() { "FAILED" } else { "ok" };
        let seconds: u64 = self.done.values().map(|(_, seconds)| seconds).sum();
        let steps = self.done.iter().map(|(name, (outcome, _))| format!("{name}: {outcome}"));
        let model = self.model.file_name().unwrap_or_default().to_string_lossy();
        let details = format!("{}; {model}; {}", self.card, steps.collect::<Vec<_>>().join("; "));
        let details = details.replace(['|', '\n'], " ");
        format!("| {date} | `{}` | {result} | {seconds} | {details} |", self.commit)
    }
}

/// This checkout's commit, with `-dirty` when something was changed since.
pub fn commit(source: &Path) -> Result<String> {
    let git = |arguments: &[&str]| -> Result<String> {
        let output = Command::new("git")
            .args(["-c", "safe.directory=*", "-C"])
            .arg(source)
            .args(arguments)
            .output()
            .context("git does not run")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=7", "HEAD"])?;
    let dirty = if git(&["status", "--porcelain"])?.is_empty() { "" } else { "-dirty" };
    Ok(if commit.is_empty() { "unknown".to_owned() } else { format!("{commit}{dirty}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Card {
        Card {
            backend: crate::Backend::Cuda,
            software: false,
            name: "A | card".to_owned(),
            uuid: "GPU-1".to_owned(),
            driver: "1".to_owned(),
            compute: "9.0".to_owned(),
            memory_total_mib: 1,
        }
    }

    #[test]
    fn a_run_goes_on_where_it_was_and_another_commit_begins_anew() {
        let cache = tempfile::tempdir().unwrap();
        let open = |commit: &str, again| {
            Progress::open(cache.path(), commit, &card(), Path::new("m.gguf"), again).unwrap()
        };
        let mut first = open("a", false);
        first.keep("plan", Outcome::Passed("1 %".to_owned()), Duration::from_secs(3)).unwrap();
        first.keep("parity", Outcome::Failed("no".to_owned()), Duration::from_secs(4)).unwrap();
        let second = open("a", false);
        assert_eq!(second.of("plan"), Some(&Outcome::Passed("1 %".to_owned())));
        assert_eq!(second.of("parity"), None, "what failed is done again");
        assert!(second.failed());
        assert_eq!(open("b", false).of("plan"), None);
        assert_eq!(open("a", true).of("plan"), None);
        let row = second.row("2026-01-02");
        assert!(row.starts_with("| 2026-01-02 | `a` | FAILED | 7 | A   card"), "{row}");
        assert_eq!(row.matches('|').count(), 6, "a cell in a cell: {row}");
    }
}
