//! Do the arrows between crates point down, and are the static programs free of an async runtime?
//!
//! In: the resolved graph of `cargo metadata` for the platform we build for.

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

/// Every edge between two crates of this workspace that is allowed. A new one is a decision: read "Arrows point
/// down" in agentd/ARCHITECTURE.md first. Service crates (serving, memory, console, ...) never import each other.
pub const ARROWS: &[(&str, &[&str])] = &[
    // init and its house
    ("init-sys", &[]),
    ("init", &["agentd-domain", "init-sys"]),
    ("netd", &["agentd-domain", "init-sys"]),
    // agentd and below
    ("agentd-domain", &[]),
    // agentd writes the audit log, agentctl checks it: both by the same code.
    ("agentd-audit", &["agentd-domain"]),
    ("agentd-capability", &["agentd-domain"]),
    ("agentd-gpu", &["agentd-domain"]),
    ("agentd-sandbox", &["agentd-domain", "init-sys"]),
    ("agentd-engine", &["agentd-domain", "agentd-gpu"]),
    ("agentd-serving", &["agentd-domain"]),
    ("agentd-egress", &["agentd-domain"]),
    ("agentd-memory", &["agentd-domain"]),
    ("agentd-console", &["agentd-domain", "init-sys"]),
    ("agentctl", &["agentd-audit", "agentd-capability", "agentd-domain"]),
    (
        "agentd",
        &[
            "agentd-audit",
            "agentd-capability",
            "agentd-console",
            "agentd-domain",
            "agentd-egress",
            "agentd-gpu",
            "agentd-memory",
            "agentd-sandbox",
            "agentd-serving",
            "init-sys",
        ],
    ),
    // What runs elsewhere
    ("echo-agent", &[]),
    ("image", &["agentd-domain"]),
    // Seeded models, for whoever tests or measures an engine.
    ("tests-models", &[]),
    // scripts/gpu-check: runs on machines that build nothing else of this.
    ("tests-gpu-check", &["agentd-domain"]),
    ("tests-host", &["agentd-domain", "agentd-gpu", "echo-agent", "tests-models", "tests-nvml-mock"]),
    // A library that programs load by its path; tests write the state it answers from.
    ("tests-nvml-mock", &[]),
    // Programs that run inside a guest, for tests and benchmarks.
    ("tests-guest", &["agentd-domain", "agentd-sandbox"]),
    ("tests-qemu", &["agentd-domain", "image", "init-sys"]),
    // The form of a result is tidy's, which reads what bench writes. What is ranked is memory's own ranking.
    (
        "tests-bench",
        &[
            "agentd-domain",
            "agentd-memory",
            "image",
            "tests-host",
            "tests-models",
            "tests-qemu",
            "tests-tidy",
        ],
    ),
    ("tests-tidy", &[]),
];

/// Edges that only tests have: a client is tested against the real server.
pub const TEST_ARROWS: &[(&str, &[&str])] = &[
    ("agentctl", &["agentd-console"]),
    ("tests-models", &["agentd-domain"]),
    ("tests-qemu", &["agentd-capability", "tests-models"]),
];

/// Programs that are one static, single-threaded file each, or that must be small because every jail holds one.
pub const STATIC_CRATES: &[&str] = &["init", "agentd-sandbox", "echo-agent"];
/// What must not be in the tree of a static program. zbus comes with cgroups-rs, which is for agentd.
pub const NOT_IN_STATIC: &[&str] = &["tokio", "zbus", "async-io", "smol", "hyper"];

pub fn metadata(root: &Path) -> Result<Metadata> {
    MetadataCommand::new()
        .current_dir(root)
        .other_options(["--filter-platform", "x86_64-unknown-linux-gnu"].map(String::from))
        .exec()
        .context("cargo metadata")
}

/// Complaints about edges that [`ARROWS`] does not allow, and about lines of it that have no crate.
pub fn arrows(metadata: &Metadata) -> Vec<String> {
    let ours: BTreeSet<&str> = metadata.workspace_packages().iter().map(|p| p.name.as_str()).collect();
    let mut edges = BTreeMap::new();
    for package in metadata.workspace_packages() {
        let test_edges =
            TEST_ARROWS.iter().find(|(from, _)| *from == package.name.as_str()).map_or(&[][..], |e| e.1);
        let targets: BTreeSet<String> = package
            .dependencies
            .iter()
            .filter(|to| ours.contains(to.name.as_str()))
            .filter(|to| to.kind != DependencyKind::Development || !test_edges.contains(&to.name.as_str()))
            .map(|to| to.name.clone())
            .collect();
        edges.insert(package.name.to_string(), targets);
    }
    compare_arrows(&edges, ARROWS)
}

fn compare_arrows(edges: &BTreeMap<String, BTreeSet<String>>, allowed: &[(&str, &[&str])]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (from, targets) in edges {
        let Some((_, may)) = allowed.iter().find(|(name, _)| name == from) else {
            complaints
                .push(format!("{from}: a new crate; give it a line in tests/tidy/src/crates.rs ARROWS"));
            continue;
        };
        for to in targets.iter().filter(|to| !may.contains(&to.as_str())) {
            complaints.push(format!("{from} -> {to}: this edge is not allowed (ARROWS in tests/tidy)"));
        }
    }
    for (from, _) in allowed.iter().filter(|(from, _)| !edges.contains_key(*from)) {
        complaints.push(format!("{from}: in ARROWS, but there is no such crate"));
    }
    complaints
}

/// Complaints about an async runtime in a static program, with the path that leads to it.
pub fn static_trees(metadata: &Metadata) -> Result<Vec<String>> {
    let resolve = metadata.resolve.as_ref().context("cargo metadata without a resolved graph")?;
    let name_of: BTreeMap<&PackageId, &str> =
        metadata.packages.iter().map(|package| (&package.id, package.name.as_str())).collect();
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for node in &resolve.nodes {
        let normal = node
            .deps
            .iter()
            .filter(|dep| dep.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal))
            .filter_map(|dep| name_of.get(&dep.pkg).copied());
        if let Some(from) = name_of.get(&node.id) {
            graph.entry(from).or_default().extend(normal);
        }
    }
    let mut complaints = Vec::new();
    for root in STATIC_CRATES {
        if !graph.contains_key(root) {
            complaints.push(format!("{root}: in STATIC_CRATES, but there is no such crate"));
        }
        for bad in NOT_IN_STATIC {
            if let Some(path) = way(&graph, root, bad) {
                complaints.push(format!("{root} must not hold {bad}: {}", path.join(" -> ")));
            }
        }
    }
    Ok(complaints)
}

/// The shortest way from one crate to another.
fn way<'a>(graph: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
    let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(at) = queue.pop_front() {
        if at == to {
            let mut path = vec![at];
            let mut here = at;
            while let Some(&before) = came_from.get(here) {
                path.push(before);
                here = before;
            }
            path.reverse();
            return Some(path);
        }
        for &next in graph.get(at).into_iter().flatten() {
            if next != from && !came_from.contains_key(next) {
                came_from.insert(next, at);
                queue.push_back(next);
            }
        }
    }
    None
}

/// Complaints about manifests: versions stand in the workspace, lints are the workspace's.
pub fn manifests(repo: &crate::Repo) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for (name, text) in repo.files.iter().filter(|(name, _)| name.ends_with("/Cargo.toml")) {
        let manifest: toml::Table = text.parse().with_context(|| name.clone())?;
        // A workspace of its own has nothing to inherit: what is compiled with other flags than all the rest.
        if manifest.contains_key("workspace") {
            continue;
        }
        let workspace_lints =
            manifest.get("lints").and_then(|l| l.get("workspace")).and_then(|w| w.as_bool());
        if workspace_lints != Some(true) {
            complaints.push(format!("{name}: `[lints] workspace = true` is missing"));
        }
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(kind).and_then(|t| t.as_table()) else { continue };
            for (dependency, how) in table {
                if how.get("workspace").and_then(|w| w.as_bool()) != Some(true) {
                    complaints
                        .push(format!("{name}: {dependency} has a version of its own; put it in the root's"));
                }
            }
        }
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(list: &[(&str, &[&str])]) -> BTreeMap<String, BTreeSet<String>> {
        list.iter().map(|(from, to)| ((*from).into(), to.iter().map(|t| (*t).into()).collect())).collect()
    }

    #[test]
    fn a_new_edge_is_a_complaint() {
        let allowed: &[(&str, &[&str])] = &[("a", &["b"]), ("b", &[])];
        assert_eq!(compare_arrows(&edges(&[("a", &["b"]), ("b", &[])]), allowed), Vec::<String>::new());
        let complaints = compare_arrows(&edges(&[("a", &["b"]), ("b", &["a"])]), allowed);
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        assert!(complaints[0].starts_with("b -> a"));
    }

    #[test]
    fn a_crate_without_a_line_and_a_line_without_a_crate_are_complaints() {
        assert_eq!(compare_arrows(&edges(&[("new", &[])]), &[("gone", &[])]).len(), 2);
    }

    #[test]
    fn the_way_to_a_forbidden_crate_is_shown() {
        let graph = BTreeMap::from([
            ("init", BTreeSet::from(["x", "y"])),
            ("x", BTreeSet::from(["init"])),
            ("y", BTreeSet::from(["tokio"])),
        ]);
        assert_eq!(way(&graph, "init", "tokio"), Some(vec!["init", "y", "tokio"]));
        assert_eq!(way(&graph, "x", "zbus"), None);
    }

    #[test]
    fn a_version_outside_the_workspace_is_a_complaint() {
        let text = "[lints]\nworkspace = true\n[dependencies]\na = \"1\"\nb.workspace = true\n";
        let complaints = manifests(&crate::Repo::of(&[("x/Cargo.toml", text)])).unwrap();
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        assert!(complaints[0].contains(" a has a version"));
    }
}
