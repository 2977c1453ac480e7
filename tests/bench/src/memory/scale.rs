//! How long does a question take, and is its answer exact? (M10)
//!
//! Stores of 10,000, 100,000 and a million records of one agent, and a million of a thousand agents, filled through the
//! store's interface; questions by words and meaning as agents ask them, without the embedding. Limits are in units of a
//! plain scan, timed in the same run: the reference machine took 5.4 ms for 100,000 vectors of 384 8-bit numbers.

use super::synthetic::{DIMENSION, Synthetic};
use super::told::said;
use crate::report;
use agentd_domain::agent_api::{Recall, Signals};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{
    Asked, Budget, Budgets, Duplicates, Embedding, Identity, Options, QuestionVectors, Store, Wanted,
};
use anyhow::{Context, Result, anyhow};
use image::source::Checkout;
use std::collections::HashMap;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;
use tests_tidy::promises::{Bench, Row};

const EMBEDDER: [u8; 32] = [9; 32];
const AT_ONCE: usize = 4096;
const QUESTIONS: usize = 200;
/// Of these the nearest are found by comparing all.
const COMPARED: usize = 50;
const HITS: usize = 10;
/// What the machine of the reference took for the probe.
const REFERENCE_SCAN_MS: f64 = 5.4;
const PROBE_VECTORS: usize = 100_000;

pub struct Sizes {
    pub records: Vec<usize>,
    /// Stores that a million records are shared out to.
    pub agents: usize,
}

/// p50 and p99 on the machine of the reference.
fn goal_ms(records: usize) -> Option<(f64, f64)> {
    match records {
        10_000 => Some((0.6, 3.0)),
        100_000 => Some((6.0, 15.0)),
        1_000_000 => Some((10.0, 40.0)),
        _ => None,
    }
}

pub fn measure(options: &Sizes) -> Result<Bench> {
    let synthetic = Synthetic::default();
    let mut scan_ms = probe();
    let mut rows = Vec::new();
    for records in &options.records {
        println!("{records} records");
        let scale = one(&synthetic, *records)?;
        // Neighbours on the machine come and go: a probe right before and right after each.
        let again = probe();
        let slower = (scan_ms + again) / 2.0 / REFERENCE_SCAN_MS;
        scan_ms = again;
        rows.extend(rows_of(&format!("{records} records"), &scale, goal_ms(*records), slower));
    }
    if options.agents > 0 {
        println!("{} agents", options.agents);
        let times = many(&synthetic, options.agents, 1_000_000 / options.agents)?;
        let again = probe();
        let slower = (scan_ms + again) / 2.0 / REFERENCE_SCAN_MS;
        let name = format!("a million records of {} agents", options.agents);
        rows.extend(latency(&name, &times, Some((0.2, 1.0)), slower));
        scan_ms = again;
    }
    let probe = Row::new("plain scan of 100,000 vectors of 384 8-bit numbers", scan_ms, "ms").detail();
    rows.push(Row { spread: format!("{REFERENCE_SCAN_MS} ms on the machine of the limits"), ..probe });
    let mut bench = report::here("memory-scale", rows, &Checkout::find()?);
    bench.command = "scripts/bench memory-scale".to_owned();
    Ok(bench)
}

/// The best of several: what this machine can do.
fn probe() -> f64 {
    let values: Vec<i8> = (0..PROBE_VECTORS * DIMENSION).map(|at| (at * 37 % 255) as u8 as i8).collect();
    let query: Vec<i8> = (0..DIMENSION).map(|at| (at * 91 % 255) as u8 as i8).collect();
    let scan = || {
        let begun = Instant::now();
        let sum: i64 = values.chunks_exact(DIMENSION).map(|row| i64::from(dot(black_box(&query), row))).sum();
        black_box(sum);
        begun.elapsed().as_secs_f64() * 1e3
    };
    (0..7).map(|_| scan()).fold(f64::INFINITY, f64::min)
}

fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

struct Scale {
    both: Times,
    words: Times,
    meaning: Times,
    first_ms: f64,
    filled_seconds: f64,
    index_bytes: usize,
    exact: f64,
}

struct Times {
    p50_ms: f64,
    p99_ms: f64,
}

impl Times {
    fn of(mut each_ms: Vec<f64>) -> Self {
        each_ms.sort_by(f64::total_cmp);
        let at = |share: f64| {
            each_ms.get(((each_ms.len() as f64 - 1.0) * share) as usize).copied().unwrap_or(f64::NAN)
        };
        Self { p50_ms: at(0.5), p99_ms: at(0.99) }
    }
}

fn open(path: &Path) -> Result<Store> {
    let identity = Identity { agent_id: AgentId(Default::default()), owner_id: OwnerId(Default::default()) };
    let all = Budget { records: u64::MAX, bytes: u64::MAX };
    let mut options = Options::new(identity, Budgets::new([(agentd_domain::agent_api::Tier::Spirit, all)]));
    options.tuning.duplicates = Duplicates::Keep;
    let store = Store::open(path, options)?;
    store.use_embedder(EMBEDDER, DIMENSION as u32).map_err(|e| said(&e))?;
    Ok(store)
}

/// Fills a store with records from `first` on; `see` gets each vector.
fn fill(
    store: &Store,
    synthetic: &Synthetic,
    first: usize,
    records: usize,
    mut see: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let mut at = first;
    while at < first + records {
        let chunk = at..(at + AT_ONCE).min(first + records);
        let news = chunk.clone().map(|number| {
            let vector = synthetic.vector(number);
            see(number, &vector);
            (synthetic.record(number), Some(Embedding { embedder: EMBEDDER, vector }))
        });
        let told = store.remember_many(news.collect()).map_err(|e| said(&e))?;
        told.into_iter().try_for_each(|one| one.map(drop).map_err(|refusal| anyhow!("{refusal}")))?;
        at = chunk.end;
    }
    loop {
        let batch = store.pending_words(4096).map_err(|e| said(&e))?;
        let more = batch.more;
        let vectors = batch.words.iter().map(|word| synthetic.word_vector(word)).collect();
        store.complete_words(EMBEDDER, batch, vectors).map_err(|e| said(&e))?;
        if !more {
            return Ok(());
        }
    }
}

fn vectors(wanted: Wanted, vector: &[f32], synthetic: &Synthetic) -> Option<QuestionVectors> {
    let each = wanted.texts.iter().enumerate();
    let each = each.map(|(at, text)| if at < 2 { vector.to_vec() } else { synthetic.word_vector(text) });
    let each = each.collect();
    wanted.with(EMBEDDER, each)
}

fn asked(query: &str, signals: Signals) -> Recall {
    Recall { query: query.to_owned(), k: Some(HITS as u32), signals: Some(signals), ..Recall::default() }
}

fn one(synthetic: &Synthetic, records: usize) -> Result<Scale> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("memory.redb");
    let questions: Vec<(String, Vec<f32>)> = (0..QUESTIONS).map(|at| synthetic.question(at)).collect();
    let mut nearest: Vec<Vec<(f32, usize)>> = vec![Vec::new(); COMPARED];
    let store = open(&path)?;
    let begun = Instant::now();
    fill(&store, synthetic, 0, records, |number, vector| {
        for ((_, query), best) in questions.iter().zip(&mut nearest) {
            let cosine: f32 = query.iter().zip(vector).map(|(a, b)| a * b).sum();
            if best.len() < HITS || best.last().is_some_and(|(least, _)| cosine > *least) {
                let place = best.partition_point(|(other, _)| *other >= cosine);
                best.insert(place, (cosine, number));
                best.truncate(HITS);
            }
        }
    })?;
    let filled_seconds = begun.elapsed().as_secs_f64();
    drop(store);
    let store = open(&path)?;
    let begun = Instant::now();
    store.recall(&asked("anything", Signals::Words), None).map_err(|e| said(&e))?;
    let first_ms = begun.elapsed().as_secs_f64() * 1e3;
    let times = |signals: Signals| -> Result<Times> {
        let mut each = Vec::new();
        // The first few bring pages into the cache, as the questions before these would have.
        for _ in 0..2 {
            each.clear();
            for (query, vector) in &questions {
                let request = asked(query, signals);
                let wanted = store.wanted(&request).map_err(|e| said(&e))?;
                let asked = Asked { vectors: vectors(wanted, vector, synthetic), ..Asked::default() };
                let begun = Instant::now();
                black_box(store.answer(&request, &asked).map_err(|e| said(&e))?);
                each.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(Times::of(each))
    };
    let (both, words, meaning) = (times(Signals::Both)?, times(Signals::Words)?, times(Signals::Meaning)?);
    let mut found = 0;
    for ((query, vector), exact) in questions.iter().zip(&nearest) {
        let embedding = Embedding { embedder: EMBEDDER, vector: vector.clone() };
        let hits =
            store.recall(&asked(query, Signals::Meaning), Some(&embedding)).map_err(|e| said(&e))?.hits;
        let ids: HashMap<&str, ()> = hits.iter().map(|hit| (hit.text.as_str(), ())).collect();
        found += exact
            .iter()
            .filter(|(_, number)| ids.contains_key(synthetic.record(*number).request.text.as_str()))
            .count();
    }
    let exact = found as f64 / (COMPARED * HITS) as f64;
    Ok(Scale { both, words, meaning, first_ms, filled_seconds, index_bytes: store.index_bytes(), exact })
}

fn rows_of(name: &str, scale: &Scale, goal: Option<(f64, f64)>, slower: f64) -> Vec<Row> {
    let mut rows = latency(name, &scale.both, goal, slower);
    let records: f64 = name.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN);
    let least = if records > 150_000.0 { 0.98 } else { 1.0 };
    rows.push(
        Row::new(format!("{name}: nearest ten as by comparing all"), scale.exact, "share").at_least(least),
    );
    for (what, times) in [("words alone", &scale.words), ("nearest vectors alone", &scale.meaning)] {
        rows.extend(latency(&format!("{name}, {what}"), times, None, slower));
    }
    rows.push(Row::new(format!("{name}: first recall after opening"), scale.first_ms, "ms").detail());
    rows.push(
        Row::new(format!("{name}: index in memory for each"), scale.index_bytes as f64 / records, "bytes")
            .detail(),
    );
    rows.push(Row::new(format!("{name}: filled"), records / scale.filled_seconds, "records/s").detail());
    rows
}

fn latency(name: &str, times: &Times, goal: Option<(f64, f64)>, slower: f64) -> Vec<Row> {
    let row = |what: &str, value: f64, goal: Option<f64>| {
        let row = Row::new(format!("{name}: recall without embedding, {what}"), value, "ms");
        match goal {
            None => row.detail(),
            Some(goal) => Row {
                spread: format!("{goal} ms on the machine of the limits, {slower:.2} times as long here"),
                ..row.at_most(goal * slower)
            },
        }
    };
    vec![row("p50", times.p50_ms, goal.map(|goal| goal.0)), row("p99", times.p99_ms, goal.map(|goal| goal.1))]
}

/// Questions to one store after the other, all of them open.
fn many(synthetic: &Synthetic, agents: usize, records: usize) -> Result<Times> {
    let folder = tempfile::tempdir()?;
    let mut stores = Vec::new();
    for agent in 0..agents {
        let store = open(&folder.path().join(format!("{agent}.redb")))?;
        fill(&store, synthetic, agent * records, records, |_, _| ())?;
        stores.push(store);
    }
    let mut each = Vec::new();
    for round in 0..2 {
        each.clear();
        for (at, store) in stores.iter().enumerate() {
            let (query, vector) = synthetic.question(at + round);
            let request = asked(&query, Signals::Both);
            let wanted = store.wanted(&request).map_err(|e| said(&e))?;
            let asked = Asked { vectors: vectors(wanted, &vector, synthetic), ..Asked::default() };
            let begun = Instant::now();
            black_box(store.answer(&request, &asked).map_err(|e| said(&e))?);
            each.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    stores.first().context("no agents")?;
    Ok(Times::of(each))
}
