//! Is what the engine plans what a model then takes?
//!
//! The plan is made by one process, the load by another one that maps no file and fills its context to the end; only
//! then the growth of its memory says what the model took.

use crate::client::{Engine, programs};
use agentd_domain::device::{MemoryMeasured, MemoryPlan};
use agentd_domain::engine::{Event, LoadModel, ModelKind, Request};
use serde::de::DeserializeOwned;
use std::path::Path;
use std::process::{Command, Output};
use tests_models::{Layout, SMALL};

/// E17. The models here are small, so that what follows is more of them than of any that is worth a plan.
const ERROR_MOST: f64 = 0.02;
/// llama.cpp makes a second graph when it computes for the first time (src/llama-graph.cpp, `buf_compute_meta`: 0.5 MB
/// and more), which no plan has.
const GRAPH_BYTES: u64 = 1 << 20;

fn run(file: &Path, more: &[&str]) -> Option<Output> {
    let (program, backends, _) = programs()?;
    let output =
        Command::new(program).arg("plan").arg(file).arg("--backends").arg(backends).args(more).output();
    Some(output.expect("the engine"))
}

fn printed<T: DeserializeOwned>(output: &Output) -> T {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_plan_is_what_the_load_then_takes() {
    let Some((_, _, models)) = programs() else { return };
    let cache = tests_models::cache().expect("a cache");
    let small = tests_models::ensure(&cache, &SMALL, Layout::Q8_0).expect("a model");
    let (tiny, embedder) = (models.join("tiny.gguf"), models.join("all-minilm-l6-v2.q8_0.gguf"));
    let cases: [(&Path, &[&str]); 5] = [
        (&tiny, &[]),
        (&tiny, &["--context", "16384", "--sequences", "4"]),
        (&embedder, &["--embedding"]),
        (&tiny, &["--context", "512", "--sequences", "64"]),
        (&small, &["--context", "8192"]),
    ];
    for (file, more) in cases {
        let name = file.display();
        let plan: MemoryPlan = printed(&run(file, more).expect("an engine"));
        let real = [more, &["--real"]].concat();
        let real: MemoryMeasured = printed(&run(file, &real).expect("an engine"));
        // Buffer by buffer there is no difference at all.
        let buffers = |devices: &[agentd_domain::device::PlannedDevice]| {
            devices
                .iter()
                .map(|on| (on.device.clone(), on.model_bytes, on.context_bytes, on.compute_bytes))
                .collect::<Vec<_>>()
        };
        assert_eq!(buffers(&plan.devices), buffers(&real.devices), "{name} {more:?}");
        assert!(plan.devices[0].model_bytes > 0 && plan.devices[0].compute_bytes > 0, "{plan:?}");
        let planned = plan.bytes_on("host", real.rows);
        let off = planned.abs_diff(real.grown_bytes);
        println!(
            "planned {planned} ({} overhead, {} rows), grew {}, off {off} ({:.2} %): {name} {more:?}",
            plan.overhead_bytes,
            real.rows,
            real.grown_bytes,
            off as f64 * 100.0 / real.grown_bytes as f64
        );
        let most = ((real.grown_bytes as f64 * ERROR_MOST) as u64).max(GRAPH_BYTES);
        assert!(off <= most, "{name} {more:?}: planned {planned}, grew {}", real.grown_bytes);
    }
}

#[test]
fn an_engine_plans_while_it_holds_nothing() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    let path = engine.tiny().to_str().expect("a plain path").to_owned();
    let kind = ModelKind::Chat;
    let load = LoadModel {
        model: "tiny".to_owned(),
        path,
        kind,
        context_tokens: 2048,
        sequences: 2,
        placement: None,
    };
    let plan = match client.ask(Request::Plan(load.clone())) {
        Event::Plan(plan) => plan,
        other => panic!("expected a plan, got {other:?}"),
    };
    assert_eq!((plan.context_tokens, plan.sequences, plan.architecture.as_str()), (2048, 2, "llama"));
    assert!(client.status().models.is_empty(), "a plan loads nothing");
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    match client.ask(Request::Plan(load)) {
        Event::Error(report) => assert_eq!(report.code, "plan_elsewhere"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Files that lie about their content: the process that plans may die of one, and no other does.
#[test]
fn a_lying_file_costs_only_the_process_that_planned_it() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    let tiny = std::fs::read(engine.tiny()).expect("the tiny model");
    let lies =
        [("llama.block_count", 200_u32), ("llama.attention.head_count", 3), ("llama.embedding_length", 129)];
    for (key, value) in lies {
        let mut bytes = tiny.clone();
        let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).expect("the key");
        let at = at + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let path = engine.scratch("lie.gguf");
        std::fs::write(&path, bytes).expect("writing");
        let output = run(&path, &[]).expect("an engine");
        assert!(!output.status.success(), "{key}: {output:?}");
        assert_eq!(client.status().models.len(), 1, "{key}");
    }
    let output = run(&engine.scratch("missing.gguf"), &[]).expect("an engine");
    let report: serde_json::Value = printed(&output);
    assert_eq!((output.status.code(), &report["code"]), (Some(1), &"model_file_unreadable".into()));
}
