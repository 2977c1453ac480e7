//! How fast does the appliance's own embedder read? 150 sentences of 16 tokens, by its own engine.

use super::super::{engine, vectors::Engine};
use anyhow::Result;
use image::cache::Cache;
use image::models;
use image::source::Checkout;
use std::time::Instant;
use tests_tidy::promises::Row;

const SENTENCES: usize = 150;
const RUNS: usize = 5;
const GOAL: f64 = 2400.0;

pub fn measure(cache: &Cache, checkout: &Checkout) -> Result<Row> {
    let embedder = models::ensure(&cache.path(""))?.embedder;
    let mut engine = Engine::start(&engine(cache, checkout)?, &embedder)?;
    // With the two tokens that stand around every text, 16; counted below, not believed.
    let words = [
        "the", "boat", "goes", "out", "at", "noon", "and", "comes", "back", "with", "fish", "for", "all",
        "of",
    ];
    let sentences: Vec<String> = (0..SENTENCES)
        .map(|i| {
            (0..13).map(|w| words[(i + w * (1 + i % 3)) % words.len()]).collect::<Vec<_>>().join(" ") + "."
        })
        .collect();
    let sentences: Vec<&str> = sentences.iter().map(String::as_str).collect();
    let mut tokens = 0u64;
    for sentence in &sentences {
        tokens += u64::from(engine.tokens(sentence)?);
    }
    engine.embed(&sentences)?;
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        let begun = Instant::now();
        engine.embed(&sentences)?;
        rates.push(tokens as f64 / begun.elapsed().as_secs_f64());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let per_core: Vec<f64> = rates.iter().map(|rate| rate / cores as f64).collect();
    let mean = tokens as f64 / SENTENCES as f64;
    let what = format!("embedding {SENTENCES} sentences of {mean:.0} tokens, a core of {cores}");
    Ok(Row::median(what, &per_core, "tokens/s")?.at_least(GOAL))
}
