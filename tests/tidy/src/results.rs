//! Are the committed results of long runs still about the code that we have?
//!
//! In: `tests/results/<part>.md`. A line `Covers: path path ...` says which code the part is about; each run
//! appended a line `| date | commit | result | ... |`. Out: warnings, never failures: a long run is not made for
//! every change.

use crate::{Repo, git};

pub const FOLDER: &str = "tests/results/";

/// What one results file says about itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    pub covers: Vec<String>,
    /// The commit of the newest run.
    pub commit: Option<String>,
}

pub fn read(text: &str) -> Part {
    let covers = text
        .lines()
        .find_map(|line| line.strip_prefix("Covers: "))
        .map(|paths| paths.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    let commit = text
        .lines()
        .filter(|line| line.starts_with("| 2"))
        .filter_map(|line| line.split('|').nth(2))
        .map(|cell| cell.trim().trim_matches('`').trim_end_matches("-dirty").to_owned())
        .next_back();
    Part { covers, commit }
}

/// Complaints about the form of results files.
pub fn form(repo: &Repo) -> Vec<String> {
    parts(repo)
        .filter_map(|(name, part)| {
            let dead: Vec<_> = part.covers.iter().filter(|path| !repo.has_path(path)).cloned().collect();
            if part.covers.is_empty() {
                Some(format!("{name}: no line `Covers: path ...`"))
            } else if !dead.is_empty() {
                Some(format!("{name}: covers {}, which does not exist", dead.join(" ")))
            } else {
                None
            }
        })
        .collect()
}

/// Which results are older than the code they cover.
pub fn stale(repo: &Repo) -> Vec<String> {
    parts(repo)
        .filter_map(|(name, part)| {
            let commit = part.commit?;
            let mut arguments = vec!["diff", "--name-only", &commit, "--"];
            arguments.extend(part.covers.iter().map(String::as_str));
            match git(&repo.root, &arguments) {
                Ok(changed) if changed.is_empty() => None,
                Ok(changed) => Some(format!(
                    "{name}: {} files changed since its run at {commit}; scripts/test long makes a new one",
                    changed.lines().count()
                )),
                Err(why) => Some(format!("{name}: {why}")),
            }
        })
        .collect()
}

fn parts(repo: &Repo) -> impl Iterator<Item = (&str, Part)> {
    repo.with_extension("md")
        .filter(|(name, _)| name.starts_with(FOLDER) && !name.ends_with("README.md"))
        .map(|(name, text)| (name, read(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_run_counts() {
        let text = "# Silence\n\nCovers: init agentd/src\n\n| date | commit | result |\n|---|---|---|\n\
                    | 2026-01-01 | `aaa` | ok |\n| 2026-02-01 | `bbb` | ok |\n";
        let part = Part { covers: vec!["init".into(), "agentd/src".into()], commit: Some("bbb".into()) };
        assert_eq!(read(text), part);
    }

    #[test]
    fn a_part_that_covers_nothing_is_a_complaint() {
        let repo = Repo::of(&[("tests/results/a.md", "# A\n"), ("tests/results/b.md", "Covers: gone\n")]);
        assert_eq!(form(&repo).len(), 2);
    }
}
