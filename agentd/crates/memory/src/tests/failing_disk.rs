//! Is everything acknowledged there, wherever the disk stops?
//!
//! A disk in memory that knows what was synced. It can stop for good at its N-th operation, after which the
//! power is cut: of what was not synced a seeded subset survives, torn at 512 bytes. Or it can fail once and work
//! on. Every N is tried until a run of the script ends without meeting it. A third disk ignores syncs: with it
//! records must be lost, or these tests could not fail. A fourth has room for so many blocks of 4 KiB and no more.
//! `DISK_FULL_STEP` (default 255) is the number of blocks between two of its sizes; the long run takes 1.
//! `POWER_CUT_SEEDS` (default 1) is how many subsets of the unsynced writes survive at each operation, one after another.

use crate::file::{Home, Open, check_canary, initialise, open_database, read_identity};
use crate::key::StoreKey;
use crate::plan::Budgets;
use crate::run::{NewRecord, Options, Store};
use crate::seal::Seal;
use crate::tables::Identity;
use crate::write::{Embedding, ForgetMode};
use agentd_domain::agent_api::{Recall, Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use redb::StorageBackend;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use uuid::Uuid;

const SECTOR_BYTES: usize = 512;
/// A file system's.
const BLOCK_BYTES: usize = 4096;
const EMBEDDER: [u8; 32] = [1; 32];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Never,
    /// This operation and all after it.
    From(u64),
    /// This operation alone.
    Once(u64),
}

#[derive(Debug, Clone)]
enum Unsynced {
    Write { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Clone)]
struct State {
    /// What a program reads: the page cache.
    cached: Vec<u8>,
    /// What is on the medium.
    durable: Vec<u8>,
    unsynced: Vec<Unsynced>,
    operations: u64,
    failure: Failure,
    honours_syncs: bool,
    /// Which blocks were ever written: the others are holes and take no room.
    written: BTreeSet<usize>,
    /// So many blocks may be written; none: as many as wanted.
    room_blocks: Option<usize>,
}

#[derive(Debug, Clone)]
struct Disk(Arc<Mutex<State>>);

impl Disk {
    fn new(content: Vec<u8>, failure: Failure) -> Self {
        let state = State {
            written: (0..content.len().div_ceil(BLOCK_BYTES)).collect(),
            room_blocks: None,
            cached: content.clone(),
            durable: content,
            unsynced: Vec::new(),
            operations: 0,
            failure,
            honours_syncs: true,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Counts an operation and fails if its turn has come.
    fn step(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.operations += 1;
        let fails = match state.failure {
            Failure::Never => false,
            Failure::From(n) => state.operations > n,
            Failure::Once(n) => state.operations == n + 1,
        };
        if fails { Err(io::Error::other("the test's disk failed")) } else { Ok(state) }
    }

    /// What the medium holds after the power is cut: all that was synced, and of the rest what the seed says.
    fn after_power_cut(&self, seed: u64) -> Vec<u8> {
        let state = self.state();
        let mut medium = state.durable.clone();
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut coin = || {
            // xorshift64: reproducible, and good enough to choose.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random & 1 == 0
        };
        for change in &state.unsynced {
            match change {
                Unsynced::Length(length) => {
                    if coin() {
                        medium.resize(*length, 0);
                    }
                }
                Unsynced::Write { offset, bytes } => {
                    for (i, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        let at = offset + i * SECTOR_BYTES;
                        if coin() && at + sector.len() <= medium.len() {
                            medium[at..at + sector.len()].copy_from_slice(sector);
                        }
                    }
                }
            }
        }
        medium
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.step()?.cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.step()?;
        let from = offset as usize;
        let bytes = state.cached.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut state = self.step()?;
        state.cached.resize(length as usize, 0);
        state.unsynced.push(Unsynced::Length(length as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.step()?;
        if state.honours_syncs {
            for change in std::mem::take(&mut state.unsynced) {
                match change {
                    Unsynced::Length(length) => state.durable.resize(length, 0),
                    Unsynced::Write { offset, bytes } => {
                        state.durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
                    }
                }
            }
            debug_assert_eq!(state.durable.len(), state.cached.len());
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.step()?;
        let from = offset as usize;
        let blocks = from / BLOCK_BYTES..(from + data.len()).div_ceil(BLOCK_BYTES);
        let new: Vec<usize> = blocks.filter(|block| !state.written.contains(block)).collect();
        if state.room_blocks.is_some_and(|room| state.written.len() + new.len() > room) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.written.extend(new);
        let place = state.cached.get_mut(from..from + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        place.copy_from_slice(data);
        state.unsynced.push(Unsynced::Write { offset: from, bytes: data.to_vec() });
        Ok(())
    }
}

fn identity() -> Identity {
    Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) }
}

fn name() -> &'static Path {
    Path::new("test-disk")
}

/// The content of a new, empty store.
fn new_store() -> Vec<u8> {
    let disk = Disk::new(Vec::new(), Failure::Never);
    let database =
        open_database(name(), 1 << 22, |builder| builder.create_with_backend(disk.clone())).unwrap();
    initialise(&database, name(), identity(), &key()).unwrap();
    drop(database);
    disk.state().durable.clone()
}

fn key() -> StoreKey {
    StoreKey { id: Uuid::from_u128(3), secret: [9; 32].into() }
}

impl Home for Disk {
    fn open(&self) -> Result<Open, crate::OpenError> {
        let database = open_database(name(), 1 << 22, |builder| builder.create_with_backend(self.clone()))?;
        let row = read_identity(&database, name())?;
        let open = Open { database, seal: Seal::new(&key().secret), row };
        check_canary(&open, name())?;
        Ok(open)
    }

    fn directory(&self) -> Option<&Path> {
        None
    }

    // A disk without files: `purge.rs` stops the real thing after every step.
    fn write_anew(&self, _: &Open, _: i64) -> Result<(), crate::OpenError> {
        Err(crate::OpenError::InUse { path: name().to_owned() })
    }

    fn take_place(&self) -> Result<(), crate::OpenError> {
        Err(crate::OpenError::InUse { path: name().to_owned() })
    }
}

fn open(disk: &Disk) -> Result<Store, crate::OpenError> {
    Store::open_at(name(), Box::new(disk.clone()), Options::new(identity(), Budgets::agent()))
}

fn told(i: usize) -> NewRecord {
    let text = format!("fact {i}: the number {} belongs to letter {}", i * 37, (b'a' + i as u8) as char);
    NewRecord {
        request: Remember { tier: Tier::Spirit, text, role: None, source: None, event_unix_ms: None },
        recorded_unix_ms: 1_790_000_000_000 + i as i64,
        idempotency_key: Some(format!("key {i}")),
        detail: Default::default(),
        with: Vec::new(),
    }
}

fn vector(i: usize) -> Vec<f32> {
    vec![1.0, i as f32, 0.5]
}

const RECORDS: usize = 6;

/// What a run of the script was told: the records, and how many vectors.
#[derive(Default)]
struct Acknowledged {
    records: Vec<(RecordId, String)>,
    /// Gone for good.
    purged: Vec<RecordId>,
    completed: u64,
    errors: usize,
}

/// Half of the records come with a vector, the others get it later; questions are asked between.
fn run_script(store: &Store) -> Acknowledged {
    let mut acknowledged = Acknowledged::default();
    let known = store.use_embedder(EMBEDDER, 3);
    acknowledged.errors += usize::from(known.is_err());
    for i in 0..RECORDS {
        let new = told(i);
        let text = new.request.text.clone();
        let embedding = (i % 2 == 0).then(|| Embedding { embedder: EMBEDDER, vector: vector(i) });
        match store.remember(new, embedding) {
            Ok(remembered) => acknowledged.records.push((remembered.id, text)),
            Err(_) => acknowledged.errors += 1,
        }
        acknowledged.errors += usize::from(store.recall(&asked(), None).is_err());
    }
    match store.pending_batch(RECORDS) {
        Err(_) => acknowledged.errors += 1,
        Ok(batch) => {
            let vectors = batch.iter().enumerate().map(|(i, p)| (p.id, vector(i))).collect();
            match store.complete_embedding(EMBEDDER, vectors) {
                Ok(done) => acknowledged.completed = done.embedded,
                Err(_) => acknowledged.errors += 1,
            }
        }
    }
    if !acknowledged.records.is_empty() {
        // Asked for: whether it is there is known again once the answer is.
        let (id, _) = acknowledged.records.remove(0);
        match store.forget(vec![id], ForgetMode::Purge, 1_790_000_000_000) {
            Ok(_) => acknowledged.purged.push(id),
            Err(_) => acknowledged.errors += 1,
        }
    }
    if let Some((id, _)) = acknowledged.records.first() {
        acknowledged.errors += usize::from(store.pin(*id, true, 1_790_000_000_000).is_err());
    }
    acknowledged
}

fn asked() -> Recall {
    Recall {
        query: "which letter has the number 74?".to_owned(),
        k: Some(50),
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: None,
        neighbours: None,
    }
}

/// Every acknowledged record must be there, found by its words, and all indexes must agree.
fn verify(store: &Store, acknowledged: &Acknowledged) -> Result<(), String> {
    let found = store.recall(&asked(), None).map_err(|e| e.to_string())?;
    for (id, text) in &acknowledged.records {
        match store.get(*id) {
            Ok(Some(stored)) if stored.text == *text => {}
            other => return Err(format!("acknowledged `{text}` is {other:?}")),
        }
        if !found.hits.iter().any(|hit| hit.id == *id) {
            return Err(format!("`{text}` is not found by its words"));
        }
    }
    for id in &acknowledged.purged {
        if store.get(*id).map_err(|e| e.to_string())?.is_some() {
            return Err(format!("{id} was purged and is back"));
        }
    }
    let checked = store.check().map_err(|e| e.to_string())?;
    if checked.records < acknowledged.records.len() as u64 || checked.vectors < acknowledged.completed {
        return Err(format!("{checked:?} is less than was acknowledged"));
    }
    Ok(())
}

/// Runs the script on a disk that stops at this operation, cuts the power, and looks. None: it did not stop.
fn stop_at(operation: u64, seed: u64, new: &[u8], honours_syncs: bool) -> Option<Result<(), String>> {
    let disk = Disk::new(new.to_vec(), Failure::From(operation));
    disk.state().honours_syncs = honours_syncs;
    let acknowledged = match open(&disk) {
        Ok(store) => run_script(&store),
        Err(_) => Acknowledged { errors: 1, ..Acknowledged::default() },
    };
    let after = Disk::new(disk.after_power_cut(seed), Failure::Never);
    let result = open(&after).map_err(|e| e.to_string()).and_then(|store| verify(&store, &acknowledged));
    (acknowledged.errors > 0 || !honours_syncs).then_some(result)
}

#[test]
fn a_power_cut_at_every_operation_loses_nothing_acknowledged() {
    let seeds: u64 =
        std::env::var("POWER_CUT_SEEDS").map_or(1, |n| n.parse().expect("POWER_CUT_SEEDS is a number"));
    let new = new_store();
    let mut cuts = 0;
    for seed in 0..seeds {
        let mut operation = 0;
        while let Some(result) = stop_at(operation, operation + seed * 7919, &new, true) {
            if let Err(why) = result {
                panic!("stopped at operation {operation}, seed {seed}: {why}");
            }
            operation += 1;
        }
        assert!(operation > 100, "the script met only {operation} operations of the disk");
        cuts += operation;
    }
    println!("power cuts: {cuts}, each after another operation or with other torn writes, nothing lost");
}

#[test]
fn a_disk_that_ignores_syncs_is_caught() {
    let new = new_store();
    let intact = |operation: u64| {
        // redb 4.4 panics on some files that such a disk leaves behind; that is a loss, too.
        let result = std::panic::catch_unwind(|| stop_at(operation, operation, &new, false));
        matches!(result, Ok(Some(Ok(()))))
    };
    let lost = (100..160).filter(|operation| !intact(*operation)).count();
    assert!(lost > 0, "the test cannot see lost records");
}

#[test]
fn one_failed_operation_costs_at_most_its_own_requests() {
    let new = new_store();
    for operation in 0.. {
        let disk = Disk::new(new.clone(), Failure::Once(operation));
        let Ok(store) = open(&disk) else { continue };
        let acknowledged = run_script(&store);
        if disk.state().operations <= operation {
            assert!(operation > 100, "the script met only {operation} operations of the disk");
            println!("one failure: at each of {operation} operations, at most its own requests were lost");
            return;
        }
        assert!(acknowledged.errors <= 2, "operation {operation} failed {} requests", acknowledged.errors);
        // What was not acknowledged is sent again under its key, as agentd's callers do: no record is doubled.
        let mut complete = Acknowledged { completed: acknowledged.completed, ..Acknowledged::default() };
        for i in 0..RECORDS {
            let text = told(i).request.text;
            let id =
                store.remember(told(i), None).unwrap_or_else(|e| panic!("operation {operation}: {e}")).id;
            complete.records.push((id, text));
        }
        for record in &acknowledged.records {
            assert!(complete.records.contains(record), "operation {operation}: another id for the same key");
        }
        verify(&store, &complete).unwrap_or_else(|why| panic!("operation {operation}: {why}"));
        assert_eq!(store.counters().unwrap().records(), RECORDS as u64, "operation {operation}");
        drop(store);
        let again = open(&Disk::new(disk.state().cached.clone(), Failure::Never)).unwrap();
        verify(&again, &complete).unwrap_or_else(|why| panic!("operation {operation}, reopened: {why}"));
    }
}

/// How much of the disk's end is tried.
const LAST_BYTES: usize = 8 * 1024 * 1024;
/// What is told until the disk is full has this size, so that some hundred commits fill its last 8 MiB.
const LARGE_TEXT_BYTES: usize = 24 * 1024;

fn large(i: usize) -> NewRecord {
    let mut text = format!("page {i} of the log:");
    let mut random = i as u64 + 1;
    // Few words, so that the time goes into pages, and long ones, so that nothing is squeezed.
    while text.len() < LARGE_TEXT_BYTES {
        text.push(' ');
        for _ in 0..16 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(&format!("{:012x}", random >> 16));
        }
    }
    let mut new = told(i % 20);
    new.idempotency_key = Some(format!("large {i}"));
    new.request.text = text;
    new
}

/// The disk is full at a block of its last 8 MiB: what was acknowledged is there, before and after a power cut, the
/// store opens, counts agree, questions are answered, and with room again everything goes on.
#[test]
fn a_disk_that_is_full_at_any_block_loses_nothing() {
    let step: usize =
        std::env::var("DISK_FULL_STEP").map_or(255, |step| step.parse().expect("DISK_FULL_STEP is a number"));
    let new = new_store();
    let (mut full, mut sizes) = (0, 0);
    for free_blocks in (0..LAST_BYTES / BLOCK_BYTES).step_by(step) {
        let disk = Disk::new(new.clone(), Failure::Never);
        let store = open(&disk).unwrap_or_else(|why| panic!("{why}"));
        store.use_embedder(EMBEDDER, 3).unwrap();
        {
            let mut state = disk.state();
            state.room_blocks = Some(state.written.len() + free_blocks);
        }
        let mut acknowledged = Acknowledged::default();
        let mut refused = 0;
        // A full disk is met twice, so that reopening on one is tried, too.
        for i in 0..1000 {
            let new = large(i);
            let text = new.request.text.clone();
            let embedding = (i % 2 == 0).then(|| Embedding { embedder: EMBEDDER, vector: vector(i) });
            match store.remember(new, embedding) {
                Ok(remembered) => acknowledged.records.push((remembered.id, text)),
                Err(_) => refused += 1,
            }
            if refused == 2 {
                break;
            }
        }
        full += usize::from(refused > 0);
        sizes += 1;
        let scene = format!("{free_blocks} blocks free, {} acknowledged", acknowledged.records.len());
        let whole = |store: &Store, when: &str| {
            for (id, text) in &acknowledged.records {
                let stored = store.get(*id).unwrap_or_else(|why| panic!("{scene}, {when}: {why}"));
                assert!(stored.is_some_and(|s| s.text == *text), "{scene}, {when}: a record is gone");
            }
            let checked = store.check().unwrap_or_else(|why| panic!("{scene}, {when}: {why}"));
            assert!(checked.records >= acknowledged.records.len() as u64, "{scene}, {when}");
            store.recall(&asked(), None).unwrap_or_else(|why| panic!("{scene}, {when}: {why}"));
        };
        whole(&store, "while it is full");
        let cut = Disk::new(disk.after_power_cut(free_blocks as u64), Failure::Never);
        whole(
            &open(&cut).unwrap_or_else(|why| panic!("{scene}, after a power cut: {why}")),
            "after a power cut",
        );
        disk.state().room_blocks = None;
        store.remember(told(1), None).unwrap_or_else(|why| panic!("{scene}, with room again: {why}"));
        whole(&store, "with room again");
    }
    assert!(full * 10 >= sizes * 9, "only {full} of {sizes} disks were ever full");
    println!("disk full: {sizes} sizes of the last 8 MiB, {full} of them filled, nothing lost");
}
