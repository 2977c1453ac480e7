//! Are the seeded models (`tests/models`) what tests and benchmarks take them for?

use crate::client::{Engine, greedy, text};
use agentd_domain::engine::{FinishReason, Generate, ModelKind, Request};
use std::collections::BTreeSet;
use tests_models::{Layout, SMALL, words};

const ANSWER_TOKENS: u32 = 200;

/// A key that is used again within the minute is answered from what was said under it, so each is used once.
fn ask(layout: Layout, key: &str, prompt: &str) -> Generate {
    let key = format!("{} {key}", layout.name());
    Generate { model: "small".to_owned(), ..greedy(&key, text(prompt), ANSWER_TOKENS) }
}

#[test]
fn both_layouts_load_and_speak_without_end_and_without_repeating_one_word() {
    let Some(engine) = Engine::start() else { return };
    let cache = tests_models::cache().expect("a cache");
    for layout in [Layout::Q8_0, Layout::Q4KM] {
        let mut client = engine.connect();
        let path = tests_models::ensure(&cache, &SMALL, layout).expect("a model");
        let loaded = client.load("small", &path, ModelKind::Chat).expect("llama.cpp takes it");
        assert_eq!(loaded.architecture, "qwen2");
        assert_eq!(loaded.chat_template.as_deref(), Some("file"));
        // The promise that load generators rely on.
        for count in [1, 7, 300] {
            assert_eq!(client.tokenize("small", &words(5, count)).len(), count, "{layout:?}");
        }
        let long = words(9, 400);
        let told = client.generate(ask(layout, "a", &long));
        let done = told.end.expect("an answer");
        assert_eq!((done.reason, done.completion_tokens), (FinishReason::Length, ANSWER_TOKENS));
        let tokens = client.tokenize("small", &told.text);
        let different: BTreeSet<i32> = tokens.iter().copied().collect();
        assert!(different.len() > 20, "{layout:?} says {} words only: {:?}", different.len(), told.text);
        // What stands far back counts: else a wrong cache would not show.
        let other = format!("{}{}", words(10, 10), &long[40..]);
        assert_ne!(client.generate(ask(layout, "b", &other)).text, told.text, "{layout:?}");
        // Again, now from the cache: rounding may differ and part the answers later, not at once.
        let again = client.generate(ask(layout, "c", &long)).text;
        assert_eq!(again[..24], told.text[..24], "{layout:?}");
        client.ask(Request::Unload { model: "small".to_owned() });
    }
}
