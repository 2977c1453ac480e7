//! How fast do others find an agent's ten nearest vectors, and what does it cost them to be on disk? (M10)
//!
//! The same vectors and questions in one run: our store, one for each agent, through the pool that agentd uses; and
//! usearch, sqlite-vec, lancedb and chromadb from PyPI, in a Python of their own below the build cache, each with the
//! settings of `peers.py`. What cannot be installed here is a row that says so. A Python call costs some microseconds,
//! ours none; the figures are of milliseconds.
//!
//! hnsw_rs is not among them: it removes nothing and cannot be written to a disk by halves, and its tree of crates
//! would enter this workspace's lock file for it.

use super::disk::told::{DIMENSION, EMBEDDER, Told};
use super::disk::{Times, times};
use crate::report;
use agentd_domain::agent_api::{Recall, Signals};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Duplicates, Embedding, Identity, Lease, Limits, Options as StoreOptions, Pool};
use anyhow::{Context, Result, ensure};
use image::cache::Cache;
use image::source::Checkout;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests_tidy::promises::{Bench, Row};
use uuid::Uuid;

pub struct Options {
    pub records: usize,
    pub agents: usize,
}

const SCRIPT: &str = include_str!("peers.py");
/// Name in the script, packages it needs.
const PEERS: [(&str, &[&str]); 5] = [
    ("usearch, a graph for each agent", &["usearch"]),
    ("usearch, one graph", &["usearch"]),
    ("sqlite-vec", &["sqlite-vec", "pysqlite3-binary"]),
    ("lancedb", &["lancedb"]),
    ("chromadb", &["chromadb"]),
];
const QUERIES: usize = 400;
const WRITES: usize = 50;
const HITS: usize = 10;

#[derive(Deserialize)]
struct Found {
    name: String,
    version: String,
    build_s: f64,
    exactness: f64,
    search_p50_ms: f64,
    search_p99_ms: f64,
    /// None: not tried.
    write_p50_ms: Option<f64>,
    write_p99_ms: Option<f64>,
    durability: String,
}

pub fn measure(options: &Options) -> Result<Bench> {
    let (checkout, cache) = (Checkout::find()?, Cache::from_env()?);
    fs::create_dir_all(cache.path("bench-memory"))?;
    let folder = tempfile::tempdir_in(cache.path("bench-memory"))?;
    let told = Told::new();
    write_vectors(folder.path(), &told, options)?;
    let mut rows = ours(folder.path(), &told, options)?;
    let python = python(&cache.path("bench-peers"))?;
    fs::write(folder.path().join("peers.py"), SCRIPT)?;
    for (name, packages) in PEERS {
        match peer(&python, folder.path(), name, packages) {
            Ok(found) => rows.extend(rows_of(&found)),
            Err(error) => {
                println!("{name}: {error:#}");
                let row = Row::new(format!("{name}: could not be measured here"), 0.0, "");
                rows.push(Row { spread: format!("{error}"), ..row }.detail());
            }
        }
    }
    Ok(report::here("memory-peers", rows, &checkout))
}

/// Query i is of agent i modulo their number, near one of that agent's vectors.
fn query(told: &Told, i: usize, options: &Options) -> Vec<f32> {
    let of = i % options.agents;
    let number = of + options.agents * (i * 7 % (options.records / options.agents));
    let (a, b) = (told.vector(number), told.vector(number + 1_000_003 + i));
    let mixed: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + 0.5 * b).collect();
    let length = mixed.iter().map(|v| v * v).sum::<f32>().sqrt();
    mixed.into_iter().map(|v| v / length).collect()
}

fn write_vectors(folder: &Path, told: &Told, options: &Options) -> Result<()> {
    let bytes = |vector: Vec<f32>| vector.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let vectors: Vec<u8> = (0..options.records).flat_map(|i| bytes(told.vector(i))).collect();
    fs::write(folder.join("vectors.f32"), vectors)?;
    let queries: Vec<u8> = (0..QUERIES).flat_map(|i| bytes(query(told, i, options))).collect();
    fs::write(folder.join("queries.f32"), queries)?;
    let agents = (0..options.records).flat_map(|i| ((i % options.agents) as u32).to_le_bytes());
    Ok(fs::write(folder.join("agents.u32"), agents.collect::<Vec<u8>>())?)
}

fn lease(pool: &Pool, folder: &Path, agent: usize) -> Result<Lease> {
    let make = || {
        let agent_id = AgentId(Uuid::from_u128(agent as u128 + 1));
        let identity = Identity { agent_id, owner_id: OwnerId(Uuid::from_u128(1)) };
        let mut options = StoreOptions::new(identity, Budgets::agent());
        options.tuning.duplicates = Duplicates::Keep;
        options
    };
    Ok(pool.lease(&folder.join(format!("{agent}.redb")), make)?)
}

fn ours(folder: &Path, told: &Told, options: &Options) -> Result<Vec<Row>> {
    let folder = folder.join("ours");
    fs::create_dir_all(&folder)?;
    // All of them at once, as the others have theirs.
    let pool = Pool::new(Limits { open: options.agents + 1, ..Limits::default() });
    let begun = std::time::Instant::now();
    let mut numbers = Vec::new();
    for agent in 0..options.agents {
        let store = lease(&pool, &folder, agent)?;
        store.use_embedder(EMBEDDER, DIMENSION as u32)?;
        let own: Vec<usize> = (agent..options.records).step_by(options.agents).collect();
        let news = own.iter().map(|i| (told.record(*i), Some(told.embedding(*i)))).collect();
        let ids = store.remember_many(news)?;
        let ids: Vec<_> = ids.into_iter().map(|id| Ok(id?.id)).collect::<Result<_>>()?;
        numbers.push((ids, own));
    }
    let build_s = begun.elapsed().as_secs_f64();
    let asked = Recall {
        query: "anything".into(),
        k: Some(HITS as u32),
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: Some(Signals::Meaning),
        neighbours: None,
    };
    let ask = |i: usize| -> Result<BTreeSet<usize>> {
        let agent = i % options.agents;
        let embedding = Embedding { embedder: EMBEDDER, vector: query(told, i, options) };
        let hits = lease(&pool, &folder, agent)?.recall(&asked, Some(&embedding))?.hits;
        let (ids, own) = &numbers[agent];
        let number = |id| ids.iter().position(|known| *known == id).map(|at| own[at]).context("its own");
        hits.into_iter().map(|hit| number(hit.id)).collect()
    };
    (0..options.agents).try_for_each(|i| ask(i).map(drop))?;
    let (mut agreed, mut wanted) = (0, 0);
    for i in 0..QUERIES {
        let query = query(told, i, options);
        let mut exact: Vec<(f32, usize)> = numbers[i % options.agents]
            .1
            .iter()
            .map(|number| (told.vector(*number).iter().zip(&query).map(|(a, b)| a * b).sum(), *number))
            .collect();
        exact.sort_by(|a, b| b.0.total_cmp(&a.0));
        let found = ask(i)?;
        wanted += exact.len().min(HITS);
        agreed += exact.iter().take(HITS).filter(|(_, number)| found.contains(number)).count();
    }
    let questions: Vec<Embedding> =
        (0..QUERIES).map(|i| Embedding { embedder: EMBEDDER, vector: query(told, i, options) }).collect();
    let searches = times(QUERIES, |i| {
        let hits = lease(&pool, &folder, i % options.agents)?.recall(&asked, Some(&questions[i]))?.hits;
        ensure!(hits.len() == HITS, "{} hits", hits.len());
        Ok(())
    })?;
    let records: Vec<_> =
        (0..WRITES).map(|i| (told.record(options.records + i), told.embedding(i))).collect();
    let mut records = records.into_iter();
    let writes = times(WRITES, |i| {
        let (new, embedding) = records.next().context("a record")?;
        lease(&pool, &folder, i % options.agents)?.remember(new, Some(embedding))?;
        Ok(())
    })?;
    let at = |times: &Times, share| times.at(share);
    Ok(rows_of(&Found {
        name: format!("ours, {} records of {} agents", options.records, options.agents),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build_s,
        exactness: f64::from(agreed as u32) / f64::from(wanted as u32),
        search_p50_ms: at(&searches, 0.5),
        search_p99_ms: at(&searches, 0.99),
        write_p50_ms: Some(at(&writes, 0.5)),
        write_p99_ms: Some(at(&writes, 0.99)),
        durability: "text, words and vector in one transaction, two fsyncs".to_owned(),
    }))
}

fn rows_of(found: &Found) -> Vec<Row> {
    let name = &found.name;
    let search = format!(
        "p99 {:.2} ms, exact {:.3}, built in {:.0} s",
        found.search_p99_ms, found.exactness, found.build_s
    );
    let what = format!("{name} ({}): the ten nearest of one agent, p50", found.version);
    let mut rows = vec![Row { spread: search, ..Row::new(what, found.search_p50_ms, "ms") }];
    if let (Some(p50), Some(p99)) = (found.write_p50_ms, found.write_p99_ms) {
        let spread = format!("p99 {p99:.2} ms; {}", found.durability);
        rows.push(Row { spread, ..Row::new(format!("{name}: one vector more, p50"), p50, "ms") });
    }
    rows
}

fn python(folder: &Path) -> Result<PathBuf> {
    let python = folder.join("bin/python");
    if !python.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
    }
    Ok(python)
}

fn peer(python: &Path, folder: &Path, name: &str, packages: &[&str]) -> Result<Found> {
    let pip = ["-m", "pip", "install", "--quiet", "--only-binary", ":all:", "numpy"];
    run(Command::new(python).args(pip).args(packages))?;
    let disk = folder.join("disk");
    if disk.exists() {
        fs::remove_dir_all(&disk)?;
    }
    let mut command = Command::new(python);
    let out =
        run(command.arg(folder.join("peers.py")).arg(name).arg(folder).env("ANONYMIZED_TELEMETRY", "False"))?;
    let line = out.lines().rev().find(|line| line.starts_with('{')).context("it said nothing")?;
    Ok(serde_json::from_str(line)?)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
    ensure!(output.status.success(), "{last}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
