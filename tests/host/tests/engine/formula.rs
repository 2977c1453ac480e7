//! Is what agentd computes from a file's header what the engine then counts?
//!
//! The formula is agentd's (`agentd-gpu`), from the header alone; the count is llama.cpp's, by `agentd-engine plan`. Keys
//! and values must be the same to the byte. Weights and room for computing are upper estimates and must be near.

use crate::client::programs;
use agentd_domain::device::MemoryPlan;
use agentd_domain::engine::ModelKind;
use agentd_domain::gguf;
use agentd_domain::paths::{BUILTIN_EMBEDDER, BUILTIN_TINY};
use agentd_gpu::plan::{Layout, Sizes, need};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// Of the engine's count. An encoder's graph reuses more than the estimate knows.
const COMPUTE_OVER_PERCENT: u64 = 25;
/// Alignment of tensors, and a second copy of tied embeddings where the processor's variant makes none.
const WEIGHTS_OVER_BYTES: u64 = 64 * 1024;

struct Case {
    file: std::path::PathBuf,
    context_tokens: u32,
    sequences: u32,
    may_double_embeddings: bool,
}

#[test]
fn the_formula_over_a_header_is_what_the_engine_counts() {
    let Some((program, backends, models)) = programs() else { return };
    let cache = tests_models::cache().expect("a cache");
    let small = |layout| tests_models::ensure(&cache, &tests_models::SMALL, layout).expect("a model");
    let (q8, q4) = (small(tests_models::Layout::Q8_0), small(tests_models::Layout::Q4KM));
    let case = |file: &Path, context_tokens, sequences| Case {
        file: file.to_owned(),
        context_tokens,
        sequences,
        may_double_embeddings: true,
    };
    let mut cases = vec![Case { may_double_embeddings: false, ..case(&models.join(BUILTIN_EMBEDDER), 0, 0) }];
    for (context_tokens, sequences) in [(0, 0), (256, 1), (1000, 3), (8192, 32)] {
        cases
            .extend([&models.join(BUILTIN_TINY), &q8, &q4].map(|file| case(file, context_tokens, sequences)));
    }
    // Half a gigabyte that is made first.
    if std::env::var_os("AGENTD_LONG").is_some() {
        let shape = &tests_models::QWEN_HALF_BILLION;
        let file = tests_models::ensure(&cache, shape, tests_models::Layout::Q4KM).expect("a model");
        cases.extend(
            [(0, 0), (16_384, 8)].map(|(context_tokens, sequences)| case(&file, context_tokens, sequences)),
        );
    }
    for case in cases {
        compare(&program, &backends, &case);
    }
}

fn compare(program: &Path, backends: &Path, case: &Case) {
    let file = File::open(&case.file).expect("a file");
    let bytes = file.metadata().expect("its length").len();
    let summary = gguf::check(bytes, &mut |at, into: &mut [u8]| {
        file.read_exact_at(into, at).map_err(|error| error.to_string())
    })
    .expect("an honest file");
    let (context, sequences) = (u64::from(case.context_tokens), u64::from(case.sequences));
    let sizes = Sizes::of_engine(&summary.shape, summary.kind(), summary.context_length, context, sequences);
    let planned = need(&summary.shape, &summary.architecture, &sizes, &Layout::host_alone("host"), &|_| 0);
    let ours = planned.devices.first().expect("host memory");

    let mut command = Command::new(program);
    command.arg("plan").arg(&case.file).arg("--backends").arg(backends);
    command.args(["--context", &context.to_string(), "--sequences", &sequences.to_string()]);
    if summary.kind() == ModelKind::Embedding {
        command.arg("--embedding");
    }
    let output = command.output().expect("the engine's program");
    let counted: MemoryPlan = serde_json::from_slice(&output.stdout).expect("a plan");
    let theirs = counted.devices.first().expect("host memory");
    let name = format!("{} with {context} tokens of {sequences}", case.file.display());
    assert_eq!(ours.kv_bytes, theirs.context_bytes, "{name}: keys and values");
    let doubled = if case.may_double_embeddings { summary.shape.tied_output_bytes } else { 0 };
    assert!(
        (theirs.model_bytes..=theirs.model_bytes + doubled + WEIGHTS_OVER_BYTES)
            .contains(&ours.weights_bytes),
        "{name}: weights are {} and were counted as {}",
        ours.weights_bytes,
        theirs.model_bytes
    );
    let computing = theirs.compute_bytes + sizes.outputs_kept * counted.row_bytes;
    println!(
        "weights {} of {}, computing {} of {computing} ({:+.1} %), whole {:+.1} %: {name}",
        ours.weights_bytes,
        theirs.model_bytes,
        ours.compute_bytes,
        percent(ours.compute_bytes, computing),
        percent(ours.total_bytes(), theirs.model_bytes + theirs.context_bytes + computing),
    );
    let most = computing + computing * COMPUTE_OVER_PERCENT / 100;
    assert!(
        (computing..=most).contains(&ours.compute_bytes),
        "{name}: computing takes {} and was counted as {computing}",
        ours.compute_bytes
    );
}

fn percent(ours: u64, theirs: u64) -> f64 {
    (ours as f64 / theirs as f64 - 1.0) * 100.0
}
