//! Are the numbers right?

use crate::client::{Engine, greedy, text};
use agentd_domain::engine::{FinishReason, ModelKind, Prompt};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// B12.
const LOGIT_TOLERANCE: f64 = 1e-3;
const GREEDY_TOKENS: u32 = 64;
/// B14: cosine with the 32-bit original, on each of the sentences.
const LEAST_COSINE: f64 = 0.999;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/models")
}

/// Runs a reference; `None`, with the reason printed, where Python has no NumPy.
fn reference(script: &str, argument: &Path, input: &Value) -> Option<Vec<Value>> {
    let python = ["/usr/bin/python3", "python3"].into_iter().find(|python| {
        let probe = Command::new(python).args(["-c", "import numpy"]).stderr(Stdio::null()).status();
        probe.is_ok_and(|status| status.success())
    });
    let Some(python) = python else {
        println!("SKIP: engine: no python3 with NumPy; `apt-get install python3-numpy` brings it");
        return None;
    };
    let mut process = Command::new(python)
        .arg("-B")
        .arg(fixtures().join(script))
        .arg(argument)
        // Small matrices: more threads only wait for each other.
        .env("OPENBLAS_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    let mut stdin = process.stdin.take().expect("a pipe");
    stdin.write_all(input.to_string().as_bytes()).expect("the reference reads");
    drop(stdin);
    let output = process.wait_with_output().expect("the reference ends");
    assert!(output.status.success(), "{script} failed: {}", output.status);
    Some(serde_json::from_slice(&output.stdout).expect("the reference answers in JSON"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn ids(value: &Value) -> Vec<i32> {
    numbers(value).into_iter().map(|id| id as i32).collect()
}

#[test]
fn the_tiny_model_computes_what_numpy_computes() {
    let Some(engine) = Engine::start() else { return };
    let prompts = [
        "Hello, how are you today? In 1999 it was 12 degrees; it's 15 now.",
        "The key is under the stone beside the door.\n\n  Please remind me!",
        "a",
    ];
    let request = json!({ "prompts": prompts, "greedy": GREEDY_TOKENS });
    let Some(answers) = reference("tiny_reference.py", &engine.tiny(), &request) else { return };
    let mut client = engine.connect();
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    for (index, (prompt, expected)) in prompts.iter().zip(&answers).enumerate() {
        let tokens = client.tokenize("tiny", prompt);
        assert_eq!(tokens, ids(&expected["tokens"]), "tokens of {prompt:?}");
        let logits = client.logits("tiny", &tokens);
        let right = numbers(&expected["logits"]);
        assert_eq!(logits.len(), right.len());
        let worst = logits.iter().zip(&right).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        println!(
            "prompt {index}: largest difference of a logit {worst:.2e}, least margin {}",
            expected["margin"]
        );
        assert!(worst <= LOGIT_TOLERANCE, "{worst} for {prompt:?}");
        let answer = client.generate(greedy(&format!("k{index}"), Prompt::Tokens(tokens), GREEDY_TOKENS));
        let done = answer.end.expect("a whole answer");
        assert_eq!((done.reason, done.completion_tokens), (FinishReason::Length, GREEDY_TOKENS));
        assert_eq!(answer.piece_tokens, GREEDY_TOKENS);
        assert_eq!(answer.text, expected["text"].as_str().expect("text"), "greedy text of {prompt:?}");
    }
}

/// The text of a generation could hide that another token was chosen; here each choice is made from logits.
#[test]
fn every_greedy_token_is_the_one_that_numpy_chooses() {
    let Some(engine) = Engine::start() else { return };
    let request = json!({ "prompts": ["Yes, of course"], "greedy": GREEDY_TOKENS });
    let Some(answers) = reference("tiny_reference.py", &engine.tiny(), &request) else { return };
    let mut client = engine.connect();
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    let mut tokens = ids(&answers[0]["tokens"]);
    for right in ids(&answers[0]["greedy"]) {
        let logits = client.logits("tiny", &tokens);
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("logits");
        assert_eq!(best as i32, right, "after {} tokens", tokens.len());
        tokens.push(right);
    }
}

#[test]
fn the_embedder_means_what_the_original_means() {
    let Some(engine) = Engine::start() else { return };
    let sentences = std::fs::read_to_string(fixtures().join("sentences.txt")).expect("the sentences");
    let sentences: Vec<&str> = sentences.lines().collect();
    assert_eq!(sentences.len(), 100);
    let package = engine.models.join("all-minilm-l6-v2.whl");
    let Some(answers) = reference("minilm_reference.py", &package, &json!(sentences)) else { return };
    let mut client = engine.connect();
    let info = client.load("minilm", &engine.embedder(), ModelKind::Embedding).expect("the embedder loads");
    assert_eq!((info.dimension, info.architecture.as_str()), (384, "bert"));
    let (vectors, truncated) = client.embed("minilm", &sentences);
    assert_eq!((vectors.len(), truncated), (100, 0));
    let mut worst = 1.0f64;
    for ((sentence, vector), expected) in sentences.iter().zip(&vectors).zip(&answers) {
        let tokens = client.tokenize("minilm", sentence);
        let right = ids(&expected["tokens"]);
        assert_eq!(tokens, right[1..right.len() - 1], "tokens of {sentence:?}");
        let cosine =
            numbers(&expected["vector"]).iter().zip(vector).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
        assert!(cosine >= LEAST_COSINE, "{cosine} for {sentence:?}");
        worst = worst.min(cosine);
    }
    println!("least cosine of 100 sentences: {worst:.6}");
}

#[test]
fn texts_embedded_together_are_embedded_alone() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    client.load("minilm", &engine.embedder(), ModelKind::Embedding).expect("the embedder loads");
    let long = "The violin and the orchestra, again and again. ".repeat(200);
    let texts = ["rain", "My sister plays the violin.", "", long.as_str()];
    let (together, truncated) = client.embed("minilm", &texts);
    assert_eq!(truncated, 1, "the long text is cut and that is said");
    for (single, vector) in texts.iter().zip(&together) {
        let (alone, _) = client.embed("minilm", &[single]);
        let cosine: f64 = alone[0].iter().zip(vector).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!(cosine > 0.9999, "{cosine} for {single:.20?}");
    }
    assert!(client.embed("minilm", &[]).0.is_empty());
}

#[test]
fn several_at_once_say_what_each_says_alone() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    let prompts: Vec<String> =
        (0..12).map(|n| format!("{} Where is number {n}?", "One, two. ".repeat(n * 7))).collect();
    let alone: Vec<String> = prompts
        .iter()
        .enumerate()
        .map(|(n, prompt)| client.generate(greedy(&format!("alone-{n}"), text(prompt), 48)).text)
        .collect();
    // More than the engine runs at once, so some join while others answer.
    let mut started = Vec::new();
    for (n, prompt) in prompts.iter().enumerate() {
        let request = greedy(&format!("together-{n}"), text(prompt), 48);
        started.push(client.send(agentd_domain::engine::Request::Generate(request)));
    }
    let together: Vec<String> = client.read_answers(&started).into_iter().map(|answer| answer.text).collect();
    assert_eq!(together, alone);
}
