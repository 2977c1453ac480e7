//! Is a bad file refused, and does the engine go on?

use crate::client::{Engine, greedy, text};
use agentd_domain::engine::ModelKind;
use std::fs;

#[test]
fn bad_files_are_refused_and_others_go_on() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    let before = client.generate(greedy("before", text("Hello"), 16)).text;
    let tiny = fs::read(engine.tiny()).expect("the tiny model");
    let mut huge_count = tiny.clone();
    huge_count[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut newer = tiny.clone();
    newer[4] = 9;
    let bad: [(&str, &[u8], &str); 6] = [
        ("half.gguf", &tiny[..tiny.len() / 2], "model_file_truncated"),
        ("header.gguf", &tiny[..1000], "model_file_truncated"),
        ("foreign.gguf", b"PK\x03\x04 not a model", "model_not_gguf"),
        ("empty.gguf", b"", "model_not_gguf"),
        ("count.gguf", &huge_count, "model_corrupt"),
        ("newer.gguf", &newer, "model_version_unsupported"),
    ];
    for (name, bytes, code) in bad {
        let path = engine.scratch(name);
        fs::write(&path, bytes).expect("writing a bad file");
        let report = client.load(name, &path, ModelKind::Chat).expect_err(name);
        assert_eq!(report.code, code, "{name}: {report}");
        assert!(!report.fix.is_empty() && report.what.contains(name), "{report:?}");
    }
    let missing =
        client.load("missing", &engine.scratch("missing.gguf"), ModelKind::Chat).expect_err("missing");
    assert_eq!(missing.code, "model_file_unreadable");
    assert_eq!(client.status().models.len(), 1);
    assert_eq!(client.generate(greedy("after", text("Hello"), 16)).text, before);
}

/// Files whose frame is right and whose content lies. llama.cpp must refuse them or load them; a crash would
/// close the connection.
#[test]
fn a_lying_file_does_not_end_the_engine() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    let tiny = fs::read(engine.tiny()).expect("the tiny model");
    let lies: [(&str, u32); 8] = [
        ("llama.block_count", 200),
        ("llama.block_count", 1),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count_kv", 4),
        ("llama.embedding_length", 129),
        ("llama.rope.dimension_count", 4096),
        ("llama.vocab_size", 1_000_000),
        ("tokenizer.ggml.eos_token_id", u32::MAX),
    ];
    for (index, (key, value)) in lies.into_iter().enumerate() {
        let mut bytes = tiny.clone();
        // After the key come the type of the value (4 bytes) and the value.
        let at = find(&bytes, key.as_bytes()) + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        try_load(&engine, &mut client, &format!("lie-{index}"), &bytes);
    }
    // Without a foreign word in its architecture a model is refused by name.
    let mut alien = tiny.clone();
    for at in 0..alien.len().min(4096) - 5 {
        if &alien[at..at + 5] == b"llama" {
            alien[at..at + 5].copy_from_slice(b"lhama");
        }
    }
    let path = engine.scratch("alien.gguf");
    fs::write(&path, &alien).expect("writing");
    let report = client.load("alien", &path, ModelKind::Chat).expect_err("alien");
    assert_eq!(report.code, "model_refused");
    assert!(report.why.contains("lhama"), "{report}");
    // Damage of single bytes, spread over the header.
    let mut state = 0x1234_5678_u64;
    for index in 0..60 {
        let mut bytes = tiny.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = 24 + (state >> 33) as usize % 40_000;
            bytes[at] = (state >> 24) as u8;
        }
        try_load(&engine, &mut client, &format!("damage-{index}"), &bytes);
    }
    client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the engine still loads");
}

/// Loads, and where that works generates a little: the answer is noise either way.
fn try_load(engine: &Engine, client: &mut crate::client::Client, name: &str, bytes: &[u8]) {
    let path = engine.scratch("lie.gguf");
    fs::write(&path, bytes).expect("writing");
    if client.load("tiny", &path, ModelKind::Chat).is_ok() {
        let _noise = client.generate(greedy(name, text("Hello, how are you?"), 4));
        client.ask(agentd_domain::engine::Request::Unload { model: "tiny".to_owned() });
    }
    assert!(client.status().models.is_empty(), "{name}");
    fs::remove_file(&path).expect("removing");
}

fn find(bytes: &[u8], key: &[u8]) -> usize {
    bytes.windows(key.len()).position(|window| window == key).expect("the key is in the file")
}

#[test]
fn a_model_is_used_for_what_it_is() {
    let Some(engine) = Engine::start() else { return };
    let mut client = engine.connect();
    let report = client.load("minilm", &engine.embedder(), ModelKind::Chat).expect_err("an encoder");
    assert_eq!(report.code, "model_kind_wrong");
    let first = client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the tiny model loads");
    let again = client.load("tiny", &engine.tiny(), ModelKind::Chat).expect("the same load again");
    assert_eq!(first, again);
    assert_eq!(first.chat_template.as_deref(), Some("file"));
    let other = client.load("tiny", &engine.embedder(), ModelKind::Embedding).expect_err("another file");
    assert_eq!(other.code, "conflict");
    let digest = std::process::Command::new("sha256sum").arg(engine.tiny()).output().expect("sha256sum");
    assert!(digest.stdout.starts_with(first.sha256.as_bytes()), "{}", first.sha256);
}
