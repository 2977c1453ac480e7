//! Does what the stores hold equal what the agents were told?
//!
//! In:    the agents' own files of acknowledgements; `memory.redb` and `system.redb`, read by their format pages
//!        (`agentd/crates/memory/FORMAT.md`, `agentd/FORMAT-system.md`) and by none of agentd's code.
//! Out:   every difference, in words. [`differences`] is pure.

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::{digest, hkdf};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use uuid::Uuid;

const RECORD_BLOCK: TableDefinition<u64, &[u8]> = TableDefinition::new("record_block");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const MEMORY_ONCE: TableDefinition<&[u8; 16], (i64, u64, &[u8; 16])> = TableDefinition::new("once");
const REQUEST: TableDefinition<(u128, u64), &[u8]> = TableDefinition::new("request");
const RUN: TableDefinition<(u128, u128), &[u8]> = TableDefinition::new("run");
const AGENT: TableDefinition<u128, &[u8]> = TableDefinition::new("agent");
const REQUEST_TOTAL: TableDefinition<u128, &[u8]> = TableDefinition::new("request_total");

/// What one agent was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Key to the text that was to be remembered.
    pub memories: BTreeMap<String, String>,
    /// Key to the completion's tokens.
    pub requests: BTreeMap<String, (u64, u64)>,
    /// What is wrong with the answers themselves.
    pub wrong: Vec<String>,
    pub operations: u64,
    pub repeats: u64,
    /// Operations that needed more than one attempt, and of these the completions whose text had begun.
    pub retried: u64,
    pub resumed: u64,
    /// Completions that the agent itself hung up on once.
    pub left: u64,
    pub longest_ms: u64,
}

/// What the stores hold of one agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// The text of every record.
    pub texts: Vec<String>,
    /// Key to the text of the record that it stands for.
    pub keys: BTreeMap<String, String>,
    /// Key and tokens of every row, oldest first.
    pub requests: Vec<(String, (u64, u64))>,
    /// Requests, tokens in, tokens out.
    pub totals: (u64, u64, u64),
}

pub fn told(work: &Path) -> Told {
    let text = fs::read_to_string(work.join("acknowledged.jsonl")).unwrap_or_default();
    let mut told = Told::default();
    let mut answers: BTreeMap<u64, Value> = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).expect("a line is whole or absent");
        told.take(&line, &answers);
        answers.insert(line["number"].as_u64().expect("a number"), line);
    }
    told
}

impl Told {
    fn take(&mut self, line: &Value, before: &BTreeMap<u64, Value>) {
        let key = line["key"].as_str().unwrap_or_default().to_owned();
        self.operations += 1;
        self.longest_ms = self.longest_ms.max(line["elapsed_ms"].as_u64().unwrap_or(0));
        let left = line["left"] == true;
        self.left += u64::from(left);
        self.retried += u64::from(!left && line["attempts"].as_u64() > Some(1));
        self.resumed += u64::from(!left && line["partial_bytes"].as_u64() > Some(0));
        if !line["refused"].is_null() {
            self.wrong.push(format!("{key} was refused: {}", line["refused"]));
        }
        if line["diverged"] == true {
            self.wrong.push(format!("{key}: a retry was answered with another text than the first attempt"));
        }
        let tokens = || Some((line["prompt_tokens"].as_u64()?, line["completion_tokens"].as_u64()?));
        match line["kind"].as_str() {
            Some("completion") => match tokens() {
                Some(tokens) => drop(self.requests.insert(key, tokens)),
                None => self.wrong.push(format!("{key}: no usage in {line}")),
            },
            Some("memory") => {
                let text = line["text"].as_str().unwrap_or_default().to_owned();
                self.memories.insert(key, text);
            }
            Some("repeat") => {
                self.repeats += 1;
                let first = line["of"].as_u64().and_then(|of| before.get(&of));
                let same = |first: &Value| {
                    let of_completion = first["kind"] == "completion";
                    first["id"] == line["id"] && (!of_completion || first["text"] == line["text"])
                };
                if !first.is_some_and(same) {
                    self.wrong.push(format!("{key}: the repetition was answered otherwise: {line}"));
                }
            }
            Some("nothing") => {}
            other => self.wrong.push(format!("what is {other:?}?")),
        }
    }
}

/// Opens files that nobody has open. Keys of requests stand hashed on disk, so they are looked up by name; any other
/// stands for a record that nobody was told of.
pub fn stored(memory: &Path, system: &Path, agent_id: &str, keys: &BTreeMap<String, String>) -> Stored {
    let mut stored = Stored::default();
    if memory.exists() {
        let database = Database::open(memory).expect("the memory opens");
        let txn = database.begin_read().expect("reads");
        let meta = txn.open_table(META).expect("meta");
        let identity = meta.get("identity").expect("reads").expect("an identity").value().to_vec();
        assert_eq!(identity[..4], 3u32.to_le_bytes(), "the format that this reads");
        let values = values_key(memory, &identity[56..72]);
        let mut by_seq = BTreeMap::new();
        for row in txn.open_table(RECORD_BLOCK).expect("records").iter().expect("rows") {
            let (key, row) = row.expect("a row");
            for (seq, record) in entries(key.value(), &opened(&values, key.value(), row.value())) {
                by_seq.insert(seq, text_of(&record));
            }
        }
        stored.texts = by_seq.values().cloned().collect();
        let once = txn.open_table(MEMORY_ONCE).expect("keys");
        for key in keys.keys() {
            let mut hash = digest::Context::new(&digest::SHA256);
            for part in [&identity[8..24], b"once", key.as_bytes()] {
                hash.update(part);
            }
            let hash: [u8; 16] = hash.finish().as_ref()[..16].try_into().expect("16 bytes");
            if let Some(used) = once.get(&hash).expect("reads") {
                let text = by_seq.get(&used.value().1).expect("a key stands for a record");
                stored.keys.insert(key.clone(), text.clone());
            }
        }
    }
    let agent = agent_id.parse::<Uuid>().expect("an id").as_u128();
    let database = Database::open(system).expect("the system's store opens");
    let txn = database.begin_read().expect("reads");
    let number = |value: &Value| value.as_u64().expect("a number");
    let rows = txn.open_table(REQUEST).expect("requests");
    for row in rows.range((agent, 0)..=(agent, u64::MAX)).expect("rows") {
        let row: Value = serde_json::from_slice(row.expect("a row").1.value()).expect("json");
        let tokens = (number(&row["prompt_tokens"]), number(&row["completion_tokens"]));
        stored.requests.push((row["key"].as_str().unwrap_or("(no key)").to_owned(), tokens));
    }
    if let Some(row) = txn.open_table(REQUEST_TOTAL).expect("totals").get(agent).expect("reads") {
        let row: Value = serde_json::from_slice(row.value()).expect("json");
        let part = |name: &str| number(&row[name]);
        stored.totals = (part("requests"), part("prompt_tokens"), part("completion_tokens"));
    }
    stored
}

/// How the runs of this agent ended, by run id, as JSON.
pub fn ended_runs(system: &Path, agent_id: &str) -> BTreeMap<String, Value> {
    let agent = agent_id.parse::<Uuid>().expect("an id").as_u128();
    let database = Database::open(system).expect("the system's store opens");
    let txn = database.begin_read().expect("reads");
    let runs = txn.open_table(RUN).expect("runs");
    let rows = runs.range((agent, 0)..=(agent, u128::MAX)).expect("rows").map(|row| {
        let (key, row) = row.expect("a row");
        (Uuid::from_u128(key.value().1).to_string(), serde_json::from_slice(row.value()).expect("json"))
    });
    rows.collect()
}

/// How often an agent was started again after an end by itself.
pub fn restarts(system: &Path, agent_id: &str) -> u64 {
    let agent = agent_id.parse::<Uuid>().expect("an id").as_u128();
    let database = Database::open(system).expect("the system's store opens");
    let txn = database.begin_read().expect("reads");
    let row = txn.open_table(AGENT).expect("agents").get(agent).expect("reads").expect("a row");
    let row: Value = serde_json::from_slice(row.value()).expect("json");
    row["restarts"].as_u64().expect("a number")
}

/// The key of the store's values, from the file beside it.
fn values_key(memory: &Path, id: &[u8]) -> LessSafeKey {
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = fs::read(memory.with_file_name(format!("memory.{digits}.key"))).expect("the store's key");
    assert_eq!((&file[..8], &file[8..24]), (&b"agentdk1"[..], id));
    let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"agentd memory 2").extract(&file[24..56]);
    LessSafeKey::new(UnboundKey::from(root.expand(&[b"values"], &AES_256_GCM).expect("a key")))
}

/// A sealed row of the table `record_block`.
fn opened(values: &LessSafeKey, key: u64, sealed: &[u8]) -> Vec<u8> {
    let mut place = [0u8; 34];
    (place[0], place[1]) = (7, 8);
    place[2..10].copy_from_slice(&key.to_be_bytes());
    let (nonce, body) = sealed.split_first_chunk::<12>().expect("a nonce");
    let mut body = body.to_vec();
    let nonce = Nonce::assume_unique_for_key(*nonce);
    values.open_in_place(nonce, Aad::from(place), &mut body).expect("a block opens").to_vec()
}

/// The records of a block, each under its number.
fn entries(key: u64, block: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let (kind, rest) = block.split_first().expect("a first byte");
    let raw = if *kind == 1 {
        let (bytes, squeezed) = rest.split_first_chunk::<4>().expect("a length");
        lz4_flex::block::decompress(squeezed, u32::from_le_bytes(*bytes) as usize).expect("LZ4")
    } else {
        rest.to_vec()
    };
    let (count, mut rest) = raw.split_first_chunk::<2>().expect("a number of entries");
    let mut heads = Vec::new();
    let mut seq = key;
    for _ in 0..u16::from_le_bytes(*count) {
        seq += varint(&mut rest);
        heads.push((seq, varint(&mut rest) as usize));
    }
    let part = |(seq, length)| {
        let (record, after) = rest.split_at(length);
        rest = after;
        (seq, record.to_vec())
    };
    heads.into_iter().map(part).collect()
}

/// LEB128.
fn varint(rest: &mut &[u8]) -> u64 {
    let length = 1 + rest.iter().position(|byte| byte & 0x80 == 0).expect("a last byte");
    let (bytes, after) = rest.split_at(length);
    *rest = after;
    bytes.iter().rev().fold(0, |number, byte| number << 7 | u64::from(byte & 0x7f))
}

/// Layout 2: which texts there are at 1, evidence counted at 2, 51 bytes of head, then the texts.
fn text_of(record: &[u8]) -> String {
    let mut at = 51 + 16 * usize::from(record[2]);
    let skip = |at: usize| at + 2 + usize::from(u16::from_le_bytes([record[at], record[at + 1]]));
    if record[1] & 1 != 0 {
        at = skip(at);
    }
    if record[1] & 2 != 0 {
        at = skip(at);
    }
    if record[1] & 4 != 0 {
        at = skip(skip(at + 1));
    }
    String::from_utf8(record[at..].to_vec()).expect("text")
}

/// Lost, twice, or other than it was told: nothing of it may be. `rows_kept` is how many requests have a row each.
pub fn differences(told: &Told, stored: &Stored, rows_kept: usize) -> Vec<String> {
    let mut found = told.wrong.clone();
    let mut texts: BTreeMap<&str, usize> = BTreeMap::new();
    for text in &stored.texts {
        *texts.entry(text.as_str()).or_default() += 1;
    }
    for (key, text) in &told.memories {
        match texts.remove(text.as_str()) {
            Some(1) => {}
            None => found.push(format!("the memory {key} is lost")),
            Some(times) => found.push(format!("the memory {key} is there {times} times")),
        }
        if stored.keys.get(key) != Some(text) {
            found.push(format!("the key {key} does not stand for its memory"));
        }
    }
    found.extend(texts.keys().map(|text| format!("a memory that nobody was told of: {text:?}")));
    let mut rows: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for (key, tokens) in &stored.requests {
        rows.entry(key.as_str()).or_default().push(*tokens);
    }
    let gone = told.requests.len().saturating_sub(rows_kept);
    let mut missing = 0;
    for (key, tokens) in &told.requests {
        match rows.remove(key.as_str()).as_deref() {
            Some([one]) if one == tokens => {}
            Some([one]) => {
                found.push(format!("the request {key} used {tokens:?} and is entered with {one:?}"))
            }
            Some(many) => found.push(format!("the request {key} is entered {} times", many.len())),
            None => {
                missing += 1;
                if missing > gone {
                    found.push(format!("the request {key} is lost"));
                }
            }
        }
    }
    found.extend(rows.keys().map(|key| format!("a request that nobody was told of: {key}")));
    let sum =
        told.requests.values().fold((0, 0, 0), |sum, tokens| (sum.0 + 1, sum.1 + tokens.0, sum.2 + tokens.1));
    if sum != stored.totals {
        found.push(format!("the sums are {:?} and not {sum:?}", stored.totals));
    }
    found
}

#[test]
fn the_oracle_sees_what_is_lost_or_twice_or_other() {
    let text = |n: u32| format!("text {n}");
    let told = Told {
        memories: BTreeMap::from([("a".to_owned(), text(1)), ("b".to_owned(), text(2))]),
        requests: BTreeMap::from([("c".to_owned(), (3, 4)), ("d".to_owned(), (5, 6))]),
        ..Told::default()
    };
    let good = Stored {
        texts: vec![text(2), text(1)],
        keys: told.memories.clone(),
        requests: vec![("d".to_owned(), (5, 6)), ("c".to_owned(), (3, 4))],
        totals: (2, 8, 10),
    };
    assert_eq!(differences(&told, &good, 100), Vec::<String>::new());
    type Change = fn(&mut Stored);
    let bad: [(Change, &str); 9] = [
        (|s| drop(s.texts.pop()), "the memory a is lost"),
        (|s| s.texts.push("text 1".to_owned()), "the memory a is there 2 times"),
        (|s| s.texts.push("text 3".to_owned()), "a memory that nobody was told of"),
        (|s| drop(s.keys.remove("b")), "the key b does not stand"),
        (|s| drop(s.requests.pop()), "the request c is lost"),
        (|s| s.requests.push(("c".to_owned(), (3, 4))), "the request c is entered 2 times"),
        (|s| s.requests[0].1 = (5, 7), "is entered with (5, 7)"),
        (|s| s.requests.push(("e".to_owned(), (0, 0))), "a request that nobody was told of: e"),
        (|s| s.totals.0 = 3, "the sums are (3, 8, 10)"),
    ];
    for (change, expect) in bad {
        let mut stored = good.clone();
        change(&mut stored);
        let found = differences(&told, &stored, 100);
        assert!(found.iter().any(|line| line.contains(expect)), "{expect}: {found:?}");
    }
}
