//! Is what a question finds by meaning what an exact comparison finds, and what does a record take?
//!
//! Short in every run; `SCAN_RECORDS=100000 cargo test --release --test scan -- --nocapture` also prints what the
//! machine needs for it.

use agentd_domain::agent_api::{Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Embedding, Identity, NewRecord, Options, Store};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;
use uuid::Uuid;

const DIMENSION: usize = 384;
const EMBEDDER: [u8; 32] = [5; 32];

/// xorshift64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    /// Clustered, as sentences are: a centre and a third as much of noise.
    fn near(&mut self, centre: &[f32]) -> Vec<f32> {
        let vector: Vec<f32> = centre.iter().map(|c| c + self.unit() * 0.7).collect();
        let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
        vector.into_iter().map(|v| v / length).collect()
    }
}

/// What the file takes on its disk. redb doubles a file that is full, and the end that nothing was written to is a hole.
fn taken_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn asked(k: u32) -> Recall {
    Recall {
        query: "anything".into(),
        k: Some(k),
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: Some(Signals::Meaning),
        neighbours: None,
    }
}

#[test]
fn the_first_ten_are_those_of_an_exact_comparison() {
    let records: usize =
        std::env::var("SCAN_RECORDS").ok().map_or(3000, |text| text.parse().expect("a number of records"));
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let centres: Vec<Vec<f32>> = (0..64).map(|_| (0..DIMENSION).map(|_| random.unit()).collect()).collect();
    let vectors: Vec<Vec<f32>> = (0..records).map(|i| random.near(&centres[i % 64])).collect();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    let mut options = Options::new(identity, Budgets::agent());
    options.tuning.duplicates = agentd_memory::Duplicates::Keep;
    let store = Store::open(&path, options.clone()).unwrap();
    store.use_embedder(EMBEDDER, DIMENSION as u32).unwrap();
    let begun = Instant::now();
    for (chunk_at, chunk) in vectors.chunks(2000).enumerate() {
        let news = chunk.iter().enumerate().map(|(i, vector)| {
            let i = chunk_at * 2000 + i;
            // 400 bytes of words from a vocabulary of some thousand.
            let mut text = format!("{i}");
            while text.len() < 400 {
                let word = random.next() % (1 + random.next() % 5000);
                text.push_str(&format!(" term{word}"));
            }
            text.truncate(400);
            let request =
                Remember { tier: Tier::Spirit, text, role: None, source: None, event_unix_ms: None };
            let embedding = Embedding { embedder: EMBEDDER, vector: vector.clone() };
            (NewRecord::new(request, 1_790_000_000_000), Some(embedding))
        });
        let outcomes = store.remember_many(news.collect()).unwrap();
        assert!(outcomes.iter().all(Result::is_ok));
    }
    let told = begun.elapsed();
    drop(store);
    let disk_bytes = taken_bytes(&path);

    let begun = Instant::now();
    let store = Store::open(&path, options).unwrap();
    let ids: Vec<_> = {
        let first = Embedding { embedder: EMBEDDER, vector: vectors[0].clone() };
        store.recall(&asked(1), Some(&first)).unwrap().hits.iter().map(|h| h.id).collect()
    };
    let restarted = begun.elapsed();
    assert_eq!(
        store.get(ids[0]).unwrap().unwrap().text.split(' ').next(),
        Some("0"),
        "a vector is nearest itself"
    );
    let memory_bytes = store.index_bytes() / records;
    assert!(memory_bytes <= 450, "{memory_bytes} bytes of memory per record");

    let (mut agreed, mut wanted, mut times) = (0, 0, Vec::new());
    for i in 0..40 {
        let query = random.near(&centres[i % 64]);
        let mut exact: Vec<(f32, usize)> = vectors
            .iter()
            .enumerate()
            .map(|(i, v)| (v.iter().zip(&query).map(|(a, b)| a * b).sum(), i))
            .collect();
        exact.sort_by(|a, b| b.0.total_cmp(&a.0));
        let question = Embedding { embedder: EMBEDDER, vector: query };
        let begun = Instant::now();
        let hits = store.recall(&asked(10), Some(&question)).unwrap().hits;
        times.push(begun.elapsed());
        for (_, i) in &exact[..10] {
            wanted += 1;
            agreed += usize::from(hits.iter().any(|h| h.text.split(' ').next() == Some(&i.to_string())));
        }
    }
    times.sort();
    println!(
        "{records} records: {:.0} told a second, {:.0} bytes of disk and {memory_bytes} of memory each, restart to \
         first recall {restarted:.1?}, recall p50 {:.2?} worst {:.2?}, {agreed} of {wanted} as exact",
        records as f64 / told.as_secs_f64(),
        disk_bytes as f64 / records as f64,
        times[20],
        times[39],
    );
    // An import leaves pages that its last transactions freed; writing anew, which every purge leads to, does not.
    store.rewrite(1_790_000_000_000).unwrap();
    let per_record = taken_bytes(&path) / records as u64;
    println!("written anew: {per_record} bytes of disk each");
    // In a small store what a file has anyway counts.
    assert!(records < 3000 || per_record <= 1536, "{per_record} bytes of disk per record");
    assert_eq!(agreed, wanted, "the first ten are not those of an exact comparison");
}
