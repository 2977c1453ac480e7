//! What does it cost to remember: time, disk and memory? (M11)
//!
//! The store as agentd uses it, in the build cache's file system (a temporary folder may be memory, which syncs
//! nothing). Each figure stands beside what the machine does by itself in the same run: a bare fsync, a bare write.
//! Texts have 400 bytes of words as often as a language's (a vocabulary by Zipf's law), vectors are clustered.

mod embed;
pub(super) mod told;

use crate::report;
use agentd_domain::agent_api::{Recall, Signals};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budget, Budgets, Duplicates, Identity, NewRecord, Options as StoreOptions, Store};
use anyhow::{Context, Result, ensure};
use image::cache::Cache;
use image::source::Checkout;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests_tidy::promises::{Bench, Row};
use told::{DIMENSION, EMBEDDER, Told};
use uuid::Uuid;

pub struct Options {
    /// Records of the large store.
    pub records: usize,
    /// Measure the embedder, too; it needs the appliance's engine.
    pub embedder: bool,
}

/// Writers that tell one record after another, as many agents' calls do.
const WRITERS: usize = 256;
const GROUP_SECONDS: u64 = 5;
const SINGLE_WRITES: usize = 200;
/// In one call; two callers at once, so that one makes ready while the other's is written.
const IMPORTED_AT_ONCE: usize = 20_000;
const IMPORTERS: usize = 2;
/// Openings and first recalls.
const RESTARTS: usize = 5;

pub fn measure(options: &Options) -> Result<Bench> {
    let (checkout, cache) = (Checkout::find()?, Cache::from_env()?);
    let folder = cache.path("bench-memory");
    fs::create_dir_all(&folder)?;
    let folder = tempfile::tempdir_in(&folder)?;
    let sync = probe_sync(folder.path())?;
    let mut rows = vec![
        sync.row("the machine's own fsync of 4 KiB, p50"),
        Row::new("the machine's own write of 64 MiB, then fsync", probe_write(folder.path())?, "MB/s")
            .detail(),
    ];
    rows.extend(single_writes(folder.path(), &sync)?);
    rows.push(group_commit(folder.path(), &sync)?);
    rows.extend(large_store(folder.path(), options.records)?);
    if options.embedder {
        rows.push(embed::measure(&cache, &checkout)?);
    }
    Ok(report::here("memory-disk", rows, &checkout))
}

/// Times of one thing, sorted.
pub(super) struct Times(Vec<Duration>);

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        Self(times)
    }

    pub(super) fn at(&self, share: f64) -> f64 {
        let at = ((self.0.len() as f64 - 1.0) * share) as usize;
        self.0.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }

    fn row(&self, what: &str) -> Row {
        let spread = format!("p99 {:.2} ms, {} times", self.at(0.99), self.0.len());
        Row { spread, ..Row::new(what, self.at(0.5), "ms") }
    }
}

pub(super) fn times(count: usize, mut each: impl FnMut(usize) -> Result<()>) -> Result<Times> {
    let mut times = Vec::with_capacity(count);
    for i in 0..count {
        let begun = Instant::now();
        each(i)?;
        times.push(begun.elapsed());
    }
    Ok(Times::of(times))
}

/// One page of a file that is there already is written over and synced.
fn probe_sync(folder: &Path) -> Result<Times> {
    let mut file = OpenOptions::new().create_new(true).write(true).open(folder.join("probe"))?;
    file.write_all(&vec![1; 1 << 20])?;
    file.sync_all()?;
    times(SINGLE_WRITES, |i| {
        file.seek(SeekFrom::Start(4096 * (i as u64 % 256)))?;
        file.write_all(&[i as u8; 4096])?;
        Ok(file.sync_data()?)
    })
}

fn probe_write(folder: &Path) -> Result<f64> {
    const MIB: usize = 64;
    let mut file = File::create(folder.join("probe-large"))?;
    let block = vec![7u8; 1 << 20];
    let begun = Instant::now();
    for _ in 0..MIB {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok((MIB << 20) as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

fn open(folder: &Path, name: &str) -> Result<Store> {
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    // As many as are told: what a full tier does is measured elsewhere.
    let budget = Budget { records: u64::MAX, bytes: u64::MAX };
    let budgets = Budgets::new([(agentd_domain::agent_api::Tier::Spirit, budget)]);
    let mut options = StoreOptions::new(identity, budgets);
    // An import comes out as it went in; records told one by one are compared with what is known.
    options.tuning.duplicates = Duplicates::Keep;
    Ok(Store::open(&folder.join(name), options)?)
}

fn single_writes(folder: &Path, sync: &Times) -> Result<Vec<Row>> {
    let store = open(folder, "single.redb")?;
    store.use_embedder(EMBEDDER, DIMENSION as u32)?;
    let told = Told::new();
    let records: Vec<NewRecord> = (0..SINGLE_WRITES + 1).map(|i| told.record(i)).collect();
    let mut next = records.into_iter();
    store.remember(next.next().context("a record")?, None)?;
    let times = times(SINGLE_WRITES, |i| {
        let new = next.next().context("a record")?;
        store.remember(new, Some(told.embedding(i)))?;
        Ok(())
    })?;
    let ratio = times.at(0.5) / sync.at(0.5);
    Ok(vec![
        times.row("one record told, on disk when it returns, p50"),
        Row::new("the same, of the machine's own fsync", ratio, "times").at_most(2.5),
    ])
}

fn group_commit(folder: &Path, sync: &Times) -> Result<Row> {
    let store = open(folder, "group.redb")?;
    let told = Told::new();
    let (stored, deadline) = (AtomicU64::new(0), Instant::now() + Duration::from_secs(GROUP_SECONDS));
    let begun = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (store, told, stored) = (&store, &told, &stored);
                scope.spawn(move || -> Result<()> {
                    let mut i = writer * 1_000_000;
                    while Instant::now() < deadline {
                        store.remember(told.record(i), None)?;
                        stored.fetch_add(1, Ordering::Relaxed);
                        i += 1;
                    }
                    Ok(())
                })
            })
            .collect();
        writers.into_iter().try_for_each(|w| w.join().map_err(|_| anyhow::anyhow!("a writer ended"))?)
    })?;
    let rate = stored.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    let spread = format!("{:.0} in the time of one fsync", rate * sync.at(0.5) / 1e3);
    let what = format!("records told by {WRITERS} at once, each on disk when it returns");
    Ok(Row { spread, ..Row::new(what, rate, "records/s") }.at_least(5000.0))
}

fn large_store(folder: &Path, records: usize) -> Result<Vec<Row>> {
    let told = Told::new();
    let name = "large.redb";
    let store = open(folder, name)?;
    store.use_embedder(EMBEDDER, DIMENSION as u32)?;
    // Made before the clock runs: what is measured is the store, not the making of texts.
    let made: Vec<_> = (0..records).map(|i| (told.record(i), Some(told.embedding(i)))).collect();
    let mut batches: Vec<Vec<_>> = Vec::new();
    let mut made = made.into_iter();
    while made.len() > 0 {
        batches.push(made.by_ref().take(IMPORTED_AT_ONCE).collect());
    }
    let queue = std::sync::Mutex::new(batches);
    let busy = busy_seconds()?;
    let begun = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let importers: Vec<_> = (0..IMPORTERS)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    loop {
                        let batch = queue.lock().map_err(|_| anyhow::anyhow!("an importer ended"))?.pop();
                        let Some(batch) = batch else { return Ok(()) };
                        let outcomes = store.remember_many(batch)?;
                        ensure!(outcomes.iter().all(std::result::Result::is_ok), "a record was refused");
                    }
                })
            })
            .collect();
        importers.into_iter().try_for_each(|i| i.join().map_err(|_| anyhow::anyhow!("an importer ended"))?)
    })?;
    let rate = records as f64 / begun.elapsed().as_secs_f64();
    let busy = (busy_seconds()? - busy) / records as f64 * 1e6;
    drop(store);
    let disk = taken_bytes(&folder.join(name))?;
    let restarts = times(RESTARTS, |i| {
        let store = open(folder, name)?;
        let hits = store.recall(&asked(), Some(&told.embedding(i)))?.hits;
        ensure!(hits.len() == 10, "{} hits", hits.len());
        Ok(())
    })?;
    let store = open(folder, name)?;
    store.recall(&asked(), Some(&told.embedding(0)))?;
    let memory = store.index_bytes();
    let of = format!("{records} records of 400 bytes with {DIMENSION} numbers each");
    let per = |bytes: f64| bytes / records as f64;
    let disk_row = |what: &str, bytes: u64| Row {
        spread: of.clone(),
        ..Row::new(what, per(bytes as f64), "bytes a record")
    };
    let begun = Instant::now();
    store.rewrite(1_790_000_000_000)?;
    let rewritten = begun.elapsed();
    let after = taken_bytes(&folder.join(name))?;
    let goal_ms = 200.0 * records as f64 / 100_000.0;
    Ok(vec![
        Row { spread: of.clone(), ..Row::new("bulk import, on disk when it returns", rate, "records/s") }
            .at_least(80_000.0),
        Row {
            spread: "of all threads; says what the machine could do if nothing else ran on it".to_owned(),
            ..Row::new("bulk import, processor time a record", busy, "us").detail()
        },
        disk_row("disk after a bulk import", disk).at_most(1536.0),
        disk_row("disk after the file was written anew", after).at_most(1536.0),
        disk_row("memory of the index", memory as u64).at_most(450.0),
        Row { spread: of.clone(), ..restarts.row("restart to first recall, p50") }.at_most(goal_ms),
        Row::new("written anew under another key", records as f64 / rewritten.as_secs_f64(), "records/s")
            .detail(),
    ])
}

/// Processor time of this process so far: user and system, all threads (proc_pid_stat(5), fields 14 and 15).
fn busy_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').context("a line of /proc/self/stat")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    // sysconf(_SC_CLK_TCK) is 100 on every Linux that Rust runs on.
    Ok(ticks / 100.0)
}

/// What the file takes on its disk. redb doubles a file that is full, and the end that nothing was written to is a hole.
fn taken_bytes(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

fn asked() -> Recall {
    Recall {
        query: "anything".into(),
        k: Some(10),
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: Some(Signals::Meaning),
        neighbours: None,
    }
}
