//! Which kernel policy follows from which manifest, all of it, for twenty of them?
//!
//! For each `snapshots/NN-name.toml` the whole plan is compared with `NN-name.json`, and the seccomp program that
//! is compiled from it with the file that its last line names. Equal programs are one file, `bpf-<hash>.txt`, an
//! instruction a line, so that a change of the policy is a change that a reviewer reads. They are those of x86-64.
//! Renew them on purpose: `AGENTD_RENEW_SNAPSHOTS=1 cargo test -p agentd snapshots`.

use agentd_capability::{Package, Subject, asked, compile, compile_with, parse_manifest};
use agentd_domain::ids::AgentId;
use agentd_domain::plan::SandboxPlan;
use agentd_domain::rights::{Limit, Narrowing};
use agentd_sandbox::{check, seccomp, syscalls};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Both kinds of place that a package can have.
fn subject(stem: &str) -> Subject {
    let package = match stem {
        "02-companion" => Package::Builtin { folder: "companion".to_owned() },
        _ => Package::Installed,
    };
    Subject {
        agent_id: AgentId(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001)),
        uid: 1_000_007,
        package,
    }
}

/// What a token takes away before the plan is compiled.
fn narrowing(stem: &str) -> Option<Narrowing> {
    let without = |group: &str| {
        let all =
            asked(&parse_manifest("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n").expect("a manifest"));
        Some(all.calls.into_iter().filter(|name| name != group).collect::<BTreeSet<_>>())
    };
    match stem {
        "18-without-processes" => Some(Narrowing { calls: without("processes"), ..Narrowing::default() }),
        "19-without-sockets" => Some(Narrowing { calls: without("client-sockets"), ..Narrowing::default() }),
        "20-child-of-a-child" => Some(Narrowing {
            api: Some(BTreeSet::new()),
            read: Some(BTreeSet::new()),
            limits: [
                (Limit::MemoryHigh, 8 << 20),
                (Limit::MemoryMax, 16 << 20),
                (Limit::Pids, 4),
                (Limit::AgentsChildren, 2),
                (Limit::AgentsDepth, 1),
            ]
            .into(),
            ..Narrowing::default()
        }),
        _ => None,
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots")
}

fn stems() -> Vec<String> {
    let files = fs::read_dir(folder()).expect("a folder").map(|entry| entry.expect("read").path());
    let manifests = files.filter(|path| path.extension().is_some_and(|ending| ending == "toml"));
    let stem = |path: PathBuf| path.file_stem().expect("a name").to_string_lossy().into_owned();
    let mut stems: Vec<String> = manifests.map(stem).collect();
    stems.sort();
    stems
}

fn plan(stem: &str) -> SandboxPlan {
    let text = fs::read_to_string(folder().join(format!("{stem}.toml"))).expect("read");
    let manifest = parse_manifest(&text).unwrap_or_else(|problems| panic!("{stem}: {problems:?}"));
    match narrowing(stem) {
        None => compile(&manifest, &subject(stem)),
        Some(by) => {
            compile_with(&manifest, &asked(&manifest).narrowed(&by), &subject(stem)).expect("compiled")
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn twenty_manifests_give_exactly_these_plans_and_programs() {
    let renew = std::env::var_os("AGENTD_RENEW_SNAPSHOTS").is_some();
    let same = |name: &str, text: &str| {
        let file = folder().join(name);
        if renew {
            fs::write(&file, text).expect("written");
        }
        let kept = fs::read_to_string(&file).unwrap_or_default();
        if let Some((at, (now, then))) =
            text.lines().zip(kept.lines()).enumerate().find(|(_, (now, then))| now != then)
        {
            panic!("{name}, line {}: now `{now}`, kept `{then}`", at + 1);
        }
        assert!(text == kept, "{name} has {} lines, kept are {}", text.lines().count(), kept.lines().count());
    };
    let stems = stems();
    assert_eq!(stems.len(), 20, "{stems:?}");
    let (mut programs, mut bytes) = (BTreeSet::new(), 0);
    for stem in &stems {
        let plan = plan(stem);
        check::check(&plan).unwrap_or_else(|report| panic!("{stem}: the launcher refuses it: {report}"));
        let program = listing(&seccomp::compile(&plan.seccomp).expect("compiled"));
        let hash = hex::encode(Sha256::digest(&program));
        let name = format!("bpf-{}.txt", &hash[..12]);
        same(&name, &program);
        let text = format!("{}\n{name}\n", serde_json::to_string_pretty(&plan).expect("JSON"));
        same(&format!("{stem}.json"), &text);
        bytes += text.len() + if programs.insert(name) { program.len() } else { 0 };
    }
    assert!(bytes < 1 << 20, "{bytes} bytes are more than a reviewer reads");
    assert!(programs.len() >= 3, "no filter follows from a token: {programs:?}");
    let stray = fs::read_dir(folder()).expect("a folder").filter(|entry| {
        let name = entry.as_ref().expect("read").file_name().to_string_lossy().into_owned();
        name.starts_with("bpf-") && !programs.contains(&name)
    });
    let stray: Vec<_> = stray.map(|entry| entry.expect("read").path()).collect();
    if renew {
        stray.iter().for_each(|file| fs::remove_file(file).expect("removed"));
        return;
    }
    assert_eq!(stray.len(), 0, "a program that no plan has lies in {}", folder().display());
}

/// What the kernel gets, an instruction a line: number, code, jumps, value, and the call where a number is compared.
fn listing(filter: &seccomp::Filter) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{} instructions", filter.program.len());
    // The accumulator holds the call's number from where it is loaded to the next load.
    let mut of_number = false;
    for (at, step) in filter.program.iter().enumerate() {
        let (k, jt, jf) = (step.k, step.jt, step.jf);
        let line = match step.code {
            0x20 => {
                of_number = k == 0;
                format!("ld [{k}]")
            }
            0x54 => format!("and {k:#x}"),
            0x05 => format!("ja {k}"),
            0x15 if of_number => format!("jeq {k} {jt} {jf} {}", call(k)),
            0x15 => format!("jeq {k:#x} {jt} {jf}"),
            0x25 => format!("jgt {k:#x} {jt} {jf}"),
            0x35 => format!("jge {k:#x} {jt} {jf}"),
            0x06 => format!("ret {k:#010x}"),
            code => format!("{code:#06x} {k:#x} {jt} {jf}"),
        };
        let _ = writeln!(text, "{at:4} {line}");
    }
    text
}

fn call(number: u32) -> &'static str {
    syscalls::name(i64::from(number)).unwrap_or("?")
}
