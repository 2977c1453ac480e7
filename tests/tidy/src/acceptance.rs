//! Does every promise name what shows it, and does that exist?
//!
//! In: `tests/acceptance.toml`, one table per id:
//!
//! ```toml
//! [B9]
//! status = "part"                                   # open | part | holds | not reached: why
//! test = ["init/netd/tests/network.rs::a_lease_is_applied", "scripts/bench boot"]
//! missing = "what is left, when the status is part"
//! ```
//!
//! A test is `file::function`, or a command whose first word is a file of the repository.

use crate::Repo;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;

pub const FILE: &str = "tests/acceptance.toml";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    status: String,
    #[serde(default)]
    test: Vec<String>,
    missing: Option<String>,
}

pub fn check(repo: &Repo) -> Result<Vec<String>> {
    let text = repo.files.get(FILE).with_context(|| format!("{FILE} is missing"))?;
    let entries: BTreeMap<String, Entry> = toml::from_str(text).context(FILE)?;
    let mut complaints = Vec::new();
    for id in (1..=20).map(|n| format!("B{n}")).filter(|id| !entries.contains_key(id)) {
        complaints.push(format!("{FILE}: {id} is missing"));
    }
    for (id, entry) in &entries {
        let not_reached =
            entry.status.strip_prefix("not reached: ").is_some_and(|why| !why.trim().is_empty());
        if !not_reached && !["open", "part", "holds"].contains(&entry.status.as_str()) {
            complaints.push(format!(
                "{id}: status `{}` is none of open, part, holds, not reached: why",
                entry.status
            ));
        }
        if ["part", "holds"].contains(&entry.status.as_str()) && entry.test.is_empty() {
            complaints.push(format!("{id}: {} without a test", entry.status));
        }
        if (entry.status == "part") != entry.missing.is_some() {
            complaints.push(format!("{id}: `missing` belongs to the status part, and only to that"));
        }
        complaints.extend(
            entry
                .test
                .iter()
                .filter(|test| !exists(repo, test))
                .map(|test| format!("{id}: there is no `{test}`")),
        );
    }
    Ok(complaints)
}

fn exists(repo: &Repo, test: &str) -> bool {
    match test.split_once("::") {
        Some((file, function)) => {
            repo.files.get(file).is_some_and(|text| text.contains(&format!("fn {function}(")))
        }
        None => test.split_whitespace().next().is_some_and(|file| repo.files.contains_key(file)),
    }
}

/// The lines for people: id, status, what shows it.
pub fn table(repo: &Repo) -> Result<String> {
    let entries: BTreeMap<String, Entry> = toml::from_str(&repo.files[FILE])?;
    let mut lines = String::new();
    for (id, entry) in entries {
        lines += &format!("{id:4} {:12} {}\n", entry.status, entry.missing.unwrap_or_default());
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(b1: &str) -> Vec<String> {
        let rest: String = (2..=20).map(|n| format!("[B{n}]\nstatus = \"open\"\n")).collect();
        let text = format!("[B1]\n{b1}\n{rest}");
        check(&Repo::of(&[(FILE, &text), ("t.rs", "#[test]\nfn works() {}"), ("scripts/run", "")])).unwrap()
    }

    #[test]
    fn what_exists_is_fine() {
        assert_eq!(
            complaints("status = \"holds\"\ntest = [\"t.rs::works\", \"scripts/run --headless\"]"),
            [""; 0]
        );
        assert_eq!(complaints("status = \"not reached: no such device\""), [""; 0]);
    }

    #[test]
    fn each_mistake_is_one_complaint() {
        for wrong in [
            "status = \"holds\"",
            "status = \"done\"",
            "status = \"not reached: \"",
            "status = \"holds\"\ntest = [\"t.rs::works_not\"]",
            "status = \"holds\"\ntest = [\"scripts/gone\"]",
            "status = \"part\"\ntest = [\"t.rs::works\"]",
        ] {
            assert_eq!(complaints(wrong).len(), 1, "{wrong}: {:?}", complaints(wrong));
        }
        assert_eq!(check(&Repo::of(&[(FILE, "")])).unwrap().len(), 20);
    }
}
