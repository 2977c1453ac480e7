use super::*;
use proptest::prelude::*;

const FULL: &str = r#"
schema = 1
[agent]
name = "inbox-triage"
version = "1.4.0"
description = "Sorts mail and drafts replies"
exec = ["/agent/bin/triage", "--loop"]
workdir = "mail/today"
[model]
use = "local/qwen3-8b-q4"
partition = "mail"
[limits]
memory_high = "96M"
memory_max = "128M"
cpu = "150%"
pids = 32
disk = "2G"
inodes = 5000
open_files = 128
tmp = "32M"
io = "20M/s"
[fs]
read = ["/usr/share/dict"]
[memory]
working = "rw"
spirit = "rw"
knowledge = "r"
codegraph = "none"
[messages]
accept = true
[calls]
allow = true
[agents]
children = 4
depth = 2
[restart]
policy = "never"
"#;

fn whys(text: &str) -> Vec<String> {
    parse_manifest(text)
        .unwrap_err()
        .into_iter()
        .map(|report| format!("{}: {}", report.code, report.why))
        .collect()
}

#[test]
fn every_key_is_read() {
    let manifest = parse_manifest(FULL).unwrap();
    assert_eq!(
        manifest,
        Manifest {
            name: AgentName::try_from("inbox-triage".to_owned()).unwrap(),
            version: "1.4.0".to_owned(),
            description: "Sorts mail and drafts replies".to_owned(),
            exec: vec!["/agent/bin/triage".to_owned(), "--loop".to_owned()],
            workdir: "/work/mail/today".to_owned(),
            model: Some("local/qwen3-8b-q4".to_owned()),
            partition: Some("mail".parse().unwrap()),
            limits: Limits {
                memory_high_bytes: 96 << 20,
                memory_max_bytes: 128 << 20,
                cpu_percent: 150,
                pids: 32,
                disk_bytes: 2 << 30,
                inodes: 5_000,
                open_files: 128,
                tmp_bytes: 32 << 20,
                io_bytes_per_second: Some(20 << 20),
                net_bytes_per_day: None,
            },
            read: vec!["/usr/share/dict".to_owned()],
            net: vec![],
            memory: vec![
                (Tier::Working, MemoryAccess::ReadWrite),
                (Tier::Spirit, MemoryAccess::ReadWrite),
                (Tier::Knowledge, MemoryAccess::Read),
            ],
            store: agentd_domain::manifest::StoreBudget::default(),
            messages: true,
            calls: true,
            children: agentd_domain::manifest::Children { most: 4, depth: 2 },
            gpu: None,
            restart: Restart::Never,
        }
    );
}

#[test]
fn the_manifest_in_the_readme_is_one() {
    let readme = include_str!("../../../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let (text, _) = rest.split_once("```").unwrap();
    let manifest = parse_manifest(text).unwrap();
    assert!(manifest.calls && manifest.messages && manifest.net.len() == 1, "{manifest:?}");
}

#[test]
fn what_memories_may_take_is_a_size_and_a_number() {
    let of = |rest: &str| {
        parse_manifest(&format!(
            "[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n[memory]\nspirit = \"rw\"\n{rest}"
        ))
    };
    let store = of("bytes = \"64M\"\nrecords = 1000\n").unwrap().store;
    assert_eq!((store.bytes, store.records), (64 << 20, 1000));
    assert_eq!(of("").unwrap().store, agentd_domain::manifest::StoreBudget::default());
    for bad in [
        "bytes = 64",
        "bytes = \"0\"",
        "records = 0",
        "records = \"many\"",
        "bytes = \"65G\"",
        "byte = \"1M\"",
    ] {
        assert!(of(&format!("{bad}\n")).is_err(), "{bad}");
    }
}

#[test]
fn two_keys_are_enough_and_grant_nothing() {
    let manifest = parse_manifest("[agent]\nname = \"hello\"\nexec = [\"/agent/run\"]\n").unwrap();
    assert_eq!(manifest.limits, Limits::default());
    assert_eq!((manifest.model, manifest.messages), (None, false));
    assert!(manifest.memory.is_empty() && manifest.read.is_empty());
}

#[test]
fn a_partition_is_a_name_and_for_who_asks_for_a_model() {
    let of =
        |model: &str| whys(&format!("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n[model]\n{model}\n"));
    let [named] = of("use = \"default\"\npartition = \"No Name\"").try_into().unwrap();
    assert!(named.contains("no name of a partition"), "{named}");
    let [alone] = of("partition = \"mail\"").try_into().unwrap();
    assert!(alone.contains("asks for no model"), "{alone}");
}

#[test]
fn every_mistake_is_reported_at_once_with_its_key() {
    let problems = whys(
        "colour = 1\n[agent]\nnmae = \"x\"\nname = \"No Capitals\"\nexec = \"/agent/run\"\n[limits]\nmemory_max = \"256\
         MB\"\npids = 1\n[memory]\nspirit = \"write\"\n[netwrok]\n",
    );
    let starts = [
        "manifest_invalid: `agent.name`",
        "manifest_invalid: `agent.exec`: it is a text",
        "manifest_unknown_key: `agent.nmae`",
        "manifest_invalid: `limits.memory_max`",
        "manifest_invalid: `limits.pids`",
        "manifest_invalid: `memory.spirit`",
        "manifest_unknown_key: `colour`",
        "manifest_unknown_key: `netwrok`",
    ];
    assert_eq!(problems.len(), starts.len(), "{problems:#?}");
    for (problem, start) in problems.iter().zip(starts) {
        assert!(problem.starts_with(start), "{problem} does not start with {start}");
    }
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(
        whys(""),
        ["manifest_invalid: `agent.name`: it is missing", "manifest_invalid: `agent.exec`: it is missing"]
    );
}

#[test]
fn paths_cannot_leave_their_place() {
    let with = |agent: &str, rest: &str| {
        parse_manifest(&format!("[agent]\nname = \"a\"\n{agent}\n{rest}")).err().unwrap_or_default().len()
    };
    let exec = "exec = [\"/agent/run\"]";
    assert_eq!(with(exec, ""), 0);
    for bad in [
        "/agent/../usr/bin/x",
        "agent/run",
        "/usr/bin/python3",
        "/agent",
        "/agentx/run",
        "/agent//run",
        "/work/run",
    ] {
        assert_eq!(with(&format!("exec = [\"{bad}\"]"), ""), 1, "{bad}");
    }
    for bad in ["..", "/etc", "a/../../b", "a//b", "./a", "\\u0000"] {
        assert_eq!(with(&format!("{exec}\nworkdir = \"{bad}\""), ""), 1, "{bad}");
    }
    for bad in [
        "/",
        "/etc",
        "/usr",
        "/usr/lib",
        "/usr/share",
        "/usr/lib/agentd",
        "/usr/share/agentd/models",
        "/data",
        "/state",
        "/usr/share/../../data",
        "/proc",
        "/usr/libx",
    ] {
        assert_eq!(with(exec, &format!("[fs]\nread = [\"{bad}\"]")), 1, "{bad}");
    }
    assert_eq!(with("exec = [\"/usr/bin/python3\"]", "[fs]\nread = [\"/usr/bin\", \"/usr/lib/python3\"]"), 0);
    assert_eq!(with(exec, "[fs]\nread = [\"/usr/share/a\", \"/usr/share/a/b\"]"), 1);
}

#[test]
fn a_name_of_look_alikes_is_refused() {
    // Cyrillic letters that print like Latin ones.
    assert_eq!(whys("[agent]\nname = \"есho\"\nexec = [\"/agent/run\"]").len(), 1);
}

#[test]
fn limits_must_fit_the_machine_and_each_other() {
    let limits = |text: &str| {
        parse_manifest(&format!("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n[limits]\n{text}"))
            .map(|manifest| manifest.limits)
    };
    for bad in [
        "memory_max = \"1T\"",
        "memory_max = \"1K\"",
        "cpu = \"0%\"",
        "cpu = \"100000%\"",
        "pids = 5000",
        "pids = -1",
        "open_files = 100000",
        "disk = \"99999999T\"",
        "io = \"1/s\"",
        "memory_high = \"2G\"\nmemory_max = \"1G\"",
    ] {
        assert_eq!(limits(bad).unwrap_err().len(), 1, "{bad}");
    }
    let only_max = limits("memory_max = \"64M\"").unwrap();
    assert_eq!((only_max.memory_high_bytes, only_max.tmp_bytes), (48 << 20, 64 << 20));
    let only_high = limits("memory_high = \"512M\"").unwrap();
    assert_eq!(only_high.memory_max_bytes, 512 << 20);
}

#[test]
fn text_that_is_no_toml_names_its_line() {
    let problems = whys("[agent]\nname = \"a\"\nname = \"b\"\n");
    assert!(problems[0].starts_with("manifest_not_toml: line 3"), "{problems:?}");
    assert!(whys(&"#".repeat(100_000))[0].starts_with("manifest_too_large"));
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _ = parse_manifest(&text);
    }

    /// Pieces of real manifests in any order reach deeper than random characters.
    #[test]
    fn no_mixture_of_lines_makes_the_parser_panic(lines in proptest::collection::vec(
        prop_oneof![
            proptest::sample::select(FULL.lines().collect::<Vec<_>>()).prop_map(str::to_owned),
            "[a-z_.]{1,12} = (\"[^\"\\\\\n]{0,20}\"|-?[0-9]{1,20}|true|\\[\"/[a-z./]{0,12}\"\\])",
        ], 0..40))
    {
        if let Ok(manifest) = parse_manifest(&lines.join("\n")) {
            prop_assert!(manifest.limits.memory_high_bytes <= manifest.limits.memory_max_bytes);
            prop_assert!(manifest.workdir.starts_with("/work") && !manifest.workdir.contains(".."));
        }
    }
}

#[test]
fn a_share_of_a_device_has_a_size_or_is_whole() {
    use agentd_domain::manifest::GpuShare;
    let gpu = |text: &str| {
        parse_manifest(&format!("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n[gpu]\n{text}\n"))
    };
    assert_eq!(gpu("memory = \"8G\"").unwrap().gpu, Some(GpuShare::Bytes(8 << 30)));
    assert_eq!(gpu("memory = \"whole\"").unwrap().gpu, Some(GpuShare::Whole));
    assert_eq!(gpu("").unwrap().gpu, None);
    for wrong in
        ["memory = \"0\"", "memory = \"1M\"", "memory = \"half\"", "device = \"CUDA0\"", "memory = 8"]
    {
        let reports = gpu(wrong).unwrap_err();
        assert!(reports.iter().any(|report| report.why.contains("gpu.")), "{wrong}: {reports:?}");
    }
}
