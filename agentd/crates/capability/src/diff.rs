//! What would change for an agent, seen as what is enforced?
//!
//! In:     two checked manifests. Out: what the second allows beyond the first, what it no longer allows, and what
//!         else is different.
//! Always: whatever the second's plan gives and the first's does not stands under `wider`.

use crate::compile::{Subject, asked, compile};
use agentd_domain::manifest::Manifest;
use agentd_domain::plan::{FsAccess, LandlockRule};
use agentd_domain::rights::{Rights, is_beneath};
use serde::Serialize;
use std::collections::BTreeSet;

/// One line for each change.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub wider: Vec<String>,
    pub narrower: Vec<String>,
    /// Neither: another program, version, model, partition or restart rule.
    pub other: Vec<String>,
}

pub fn difference(before: &Manifest, after: &Manifest) -> Difference {
    // Folders are compared as the plan has them: another program may make a folder executable.
    let but_folders = |manifest| Rights { read: BTreeSet::new(), ..asked(manifest) };
    let (old, new) = (but_folders(before), but_folders(after));
    let (old_rules, new_rules) = (rules(before), rules(after));
    Difference {
        wider: [new.beyond(&old), access_beyond(&new_rules, &old_rules)].concat(),
        narrower: [old.beyond(&new), access_beyond(&old_rules, &new_rules)].concat(),
        other: other(before, after),
    }
}

fn rules(manifest: &Manifest) -> Vec<LandlockRule> {
    compile(manifest, &Subject::nobody()).landlock.rules
}

/// What these rules allow and the others do not, a line for each path and kind of access.
fn access_beyond(rules: &[LandlockRule], others: &[LandlockRule]) -> Vec<String> {
    let mut more = Vec::new();
    for rule in rules {
        let theirs: Vec<FsAccess> = others
            .iter()
            .filter(|other| is_beneath(&rule.path, &other.path))
            .flat_map(|other| kinds(other.access))
            .copied()
            .collect();
        for kind in kinds(rule.access).iter().filter(|kind| !theirs.contains(kind)) {
            let word = match kind {
                FsAccess::Read => "read",
                FsAccess::ReadExecute => "execute in",
                FsAccess::ReadWrite => "write",
                FsAccess::Device => "drive",
            };
            more.push(format!("{word} {}", rule.path));
        }
    }
    more
}

/// The access itself and what it includes.
fn kinds(access: FsAccess) -> &'static [FsAccess] {
    match access {
        FsAccess::Read => &[FsAccess::Read],
        FsAccess::ReadExecute => &[FsAccess::Read, FsAccess::ReadExecute],
        FsAccess::ReadWrite => &[FsAccess::Read, FsAccess::ReadWrite],
        FsAccess::Device => &[FsAccess::Read, FsAccess::ReadWrite, FsAccess::Device],
    }
}

fn other(before: &Manifest, after: &Manifest) -> Vec<String> {
    let none = || "none".to_owned();
    let model = |manifest: &Manifest| manifest.model.clone().unwrap_or_else(none);
    let partition = |manifest: &Manifest| manifest.partition.as_ref().map_or_else(none, ToString::to_string);
    [
        ("name", before.name.to_string(), after.name.to_string()),
        ("version", before.version.clone(), after.version.clone()),
        ("exec", before.exec.join(" "), after.exec.join(" ")),
        ("workdir", before.workdir.clone(), after.workdir.clone()),
        ("model", model(before), model(after)),
        ("partition", partition(before), partition(after)),
        (
            "restart",
            format!("{:?}", before.restart).to_lowercase(),
            format!("{:?}", after.restart).to_lowercase(),
        ),
    ]
    .into_iter()
    .filter(|(_, old, new)| old != new)
    .map(|(what, old, new)| format!("{what} {new} instead of {old}"))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse_manifest;

    fn manifest(exec: &str, rest: &str) -> Manifest {
        parse_manifest(&format!("[agent]\nname = \"a\"\nexec = [\"{exec}\"]\n{rest}")).unwrap()
    }

    #[test]
    fn the_same_is_no_difference() {
        let one = manifest("/agent/run", "[memory]\nspirit = \"rw\"\n");
        assert_eq!(difference(&one, &one), Difference::default());
    }

    #[test]
    fn every_kind_of_widening_is_marked_and_its_reverse_is_a_narrowing() {
        let small = manifest("/agent/run", "[limits]\nmemory_high = \"64M\"\nmemory_max = \"64M\"\n");
        let large = manifest(
            "/agent/run",
            "[limits]\nmemory_high = \"64M\"\nmemory_max = \"128M\"\nio = \"1M/s\"\n[fs]\nread = [\"/usr/share/dict\"]\n\
             [memory]\nspirit = \"r\"\n[model]\nuse = \"default\"\npartition = \"mail\"\n",
        );
        let wider = [
            "api memory.recall",
            "api memory.recall.spirit",
            "api models",
            "memory.max 134217728 instead of 67108864",
            "read /usr/share/dict",
        ];
        let found = difference(&small, &large);
        assert_eq!(found.wider, wider);
        assert_eq!(found.narrower, ["io.bytes no limit instead of 1048576"]);
        assert_eq!(found.other, ["model default instead of none", "partition mail instead of none"]);
        let back = difference(&large, &small);
        assert_eq!((back.narrower, back.wider), (found.wider, found.narrower));
    }

    #[test]
    fn a_folder_that_becomes_executable_is_a_widening() {
        let read = "[fs]\nread = [\"/usr/bin\"]\n";
        let found = difference(&manifest("/agent/run", read), &manifest("/usr/bin/python3", read));
        assert_eq!(found.wider, ["execute in /usr/bin"]);
        assert_eq!(found.other, ["exec /usr/bin/python3 instead of /agent/run"]);
    }

    #[test]
    fn a_folder_within_one_that_was_there_is_nothing_new() {
        let outer = manifest("/agent/run", "[fs]\nread = [\"/usr/share/doc\"]\n");
        let inner = manifest("/agent/run", "[fs]\nread = [\"/usr/share/doc/base\"]\n");
        assert_eq!(difference(&outer, &inner).wider, Vec::<String>::new());
        assert_eq!(difference(&inner, &outer).wider, ["read /usr/share/doc"]);
    }
}
