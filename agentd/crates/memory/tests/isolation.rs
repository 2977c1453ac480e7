//! Does anything of one agent's memory ever reach another, whatever either asks?
//!
//! Many agents' stores behind one pool, which opens and closes them all the while. Each text carries its owner's mark.
//! Random operations name ids, keys and words of others: reads must give nothing with another's mark, and what is
//! attempted against another's record is judged by that record, not by the answer. Budgets are looked at on the way.
//!
//! The same operations run against worlds with one fault each (a look-up by id over all stores, a question to all of
//! them, and so on): the check must catch every one of them.
//!
//! `ISOLATION_OPS=10000000 cargo test --release -p agentd-memory --test isolation` is the long form;
//! `scripts/test long memory-isolation` runs it. `ISOLATION_SEED` repeats a run.

use agentd_domain::agent_api::{Recall, Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::{
    Budget, Budgets, Detail, ForgetMode, Identity, Lease, Limits, Listing, NewRecord, Options, Pool, State,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::Instant;
use uuid::Uuid;

const AGENTS: usize = 24;
const THREADS: usize = 2;
/// Fewer than there are agents: stores are closed and opened again under the operations.
const OPEN: usize = 10;
const OPS: u64 = 12_000;
const RECORDS: u64 = 160;
const BYTES: u64 = 60_000;

/// What agents can do, by whoever is asking.
trait World: Sync {
    fn remember(&self, who: usize, texts: &[(Tier, String)]) -> Vec<RecordId>;
    fn insight(&self, who: usize, evidence: RecordId) -> bool;
    fn get(&self, who: usize, id: RecordId) -> Option<(String, State, bool)>;
    fn history(&self, who: usize, id: RecordId) -> (Vec<String>, usize);
    fn recall(&self, who: usize, query: &str) -> Vec<(RecordId, String)>;
    fn list(&self, who: usize, before: Option<RecordId>) -> Vec<(RecordId, String)>;
    fn journal(&self, who: usize) -> Vec<RecordId>;
    fn set_block(&self, who: usize, key: &str, text: String);
    fn block(&self, who: usize, key: &str) -> Option<String>;
    fn forget(&self, who: usize, id: RecordId, mode: ForgetMode) -> bool;
    fn restore(&self, who: usize, id: RecordId) -> bool;
    fn pin(&self, who: usize, id: RecordId, pinned: bool) -> bool;
    fn correct(&self, who: usize, id: RecordId, text: String) -> Option<RecordId>;
    fn used(&self, who: usize, id: RecordId);
    fn within_budget(&self, who: usize) -> bool;
}

/// The real ones: a store per agent, found by who asks.
struct Stores {
    budgets: Budgets,
    pool: Pool,
    folder: PathBuf,
    clock: AtomicU64,
}

fn budgets(records: u64) -> Budgets {
    let budget = Budget { records, bytes: BYTES };
    Budgets::new([(Tier::Working, budget), (Tier::Spirit, budget)])
}

impl Stores {
    fn new(folder: PathBuf) -> Self {
        let pool = Pool::new(Limits { open: OPEN, ..Limits::default() });
        Self { budgets: budgets(RECORDS), pool, folder, clock: AtomicU64::new(1_700_000_000_000) }
    }

    fn store(&self, who: usize) -> Lease {
        let id = Uuid::from_u128(who as u128 + 1);
        let identity = Identity { agent_id: AgentId(id), owner_id: OwnerId(Uuid::from_u128(9)) };
        let path = self.folder.join(format!("{who}.redb"));
        self.pool.lease(&path, || Options::new(identity, self.budgets.clone())).expect("opens")
    }

    fn now(&self) -> i64 {
        self.clock.fetch_add(1, Ordering::Relaxed) as i64
    }

    fn new_record(&self, tier: Tier, text: String, detail: Detail) -> NewRecord {
        let role = if detail.evidence.is_empty() { None } else { Some("insight".to_owned()) };
        let request = Remember { tier, text, role, source: None, event_unix_ms: None };
        NewRecord { detail, ..NewRecord::new(request, self.now()) }
    }
}

fn asked(query: &str) -> Recall {
    let request =
        serde_json::json!({ "query": query, "k": 10, "tiers": ["working", "spirit"], "signals": "words" });
    serde_json::from_value(request).expect("a question")
}

impl World for Stores {
    fn remember(&self, who: usize, texts: &[(Tier, String)]) -> Vec<RecordId> {
        let of = |(tier, text): &(Tier, String)| {
            let session = Some("a run of the same name".to_owned());
            (self.new_record(*tier, text.clone(), Detail { session, ..Detail::default() }), None)
        };
        let told = self.store(who).remember_many(texts.iter().map(of).collect()).expect("a transaction");
        told.into_iter().filter_map(Result::ok).map(|told| told.id).collect()
    }

    fn insight(&self, who: usize, evidence: RecordId) -> bool {
        let detail = Detail { evidence: vec![evidence], ..Detail::default() };
        let text = format!("{} drawn from something", mark(who));
        self.store(who).remember(self.new_record(Tier::Spirit, text, detail), None).is_ok()
    }

    fn get(&self, who: usize, id: RecordId) -> Option<(String, State, bool)> {
        let found = self.store(who).get(id).expect("read");
        found.map(|stored| (stored.text, stored.life.state, stored.life.pinned))
    }

    fn history(&self, who: usize, id: RecordId) -> (Vec<String>, usize) {
        let history = self.store(who).history(id).expect("read");
        (history.chain.into_iter().map(|stored| stored.text).collect(), history.entries.len())
    }

    fn recall(&self, who: usize, query: &str) -> Vec<(RecordId, String)> {
        let found = self.store(who).recall(&asked(query), None).expect("recalled");
        found.hits.into_iter().map(|hit| (hit.id, hit.text)).collect()
    }

    fn list(&self, who: usize, before: Option<RecordId>) -> Vec<(RecordId, String)> {
        let listing = Listing { before, most: 20, ..Listing::default() };
        let found = self.store(who).list(&listing).expect("read");
        found.into_iter().map(|stored| (stored.id, stored.text)).collect()
    }

    fn journal(&self, who: usize) -> Vec<RecordId> {
        let entries = self.store(who).journal(None, 20).expect("read");
        entries.into_iter().flat_map(|(_, entry)| [Some(entry.id), entry.other]).flatten().collect()
    }

    fn set_block(&self, who: usize, key: &str, text: String) {
        let store = self.store(who);
        let seen = store.block(key).expect("read").map_or(0, |block| block.version);
        drop(store.set_block(key.to_owned(), Some(text), seen, false, self.now()));
    }

    fn block(&self, who: usize, key: &str) -> Option<String> {
        self.store(who).block(key).expect("read").map(|block| block.text)
    }

    fn forget(&self, who: usize, id: RecordId, mode: ForgetMode) -> bool {
        self.store(who).forget(vec![id], mode, self.now()).is_ok()
    }

    fn restore(&self, who: usize, id: RecordId) -> bool {
        self.store(who).restore(id, self.now()).is_ok()
    }

    fn pin(&self, who: usize, id: RecordId, pinned: bool) -> bool {
        self.store(who).pin(id, pinned, self.now()).is_ok()
    }

    fn correct(&self, who: usize, id: RecordId, text: String) -> Option<RecordId> {
        self.store(who).correct(id, text, None, self.now()).ok().map(|told| told.id)
    }

    fn used(&self, who: usize, id: RecordId) {
        drop(self.store(who).used(vec![id], self.now()));
    }

    fn within_budget(&self, who: usize) -> bool {
        let counters = self.store(who).counters().expect("read");
        [Tier::Working, Tier::Spirit].into_iter().all(|tier| {
            let held = counters.tier(tier);
            held.records <= RECORDS && held.bytes <= BYTES
        }) && counters.block_bytes <= budgets(RECORDS).block_bytes
    }
}

/// What somebody might get wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    GetById,
    HistoryById,
    RecallEverywhere,
    ListEverywhere,
    BlockByKey,
    ForgetById,
    PinById,
    CorrectById,
    EvidenceById,
    /// A store that is opened with another budget than its agent has.
    OtherBudget,
}

/// The real ones but for one operation, which finds by what a request names and not by who asks.
struct Faulty {
    stores: Stores,
    fault: Fault,
}

impl Faulty {
    /// Whoever has it.
    fn holder(&self, who: usize, id: RecordId) -> usize {
        (0..AGENTS).find(|other| self.stores.get(*other, id).is_some()).unwrap_or(who)
    }

    fn by_id(&self, fault: Fault, who: usize, id: RecordId) -> usize {
        if self.fault == fault { self.holder(who, id) } else { who }
    }
}

impl World for Faulty {
    fn remember(&self, who: usize, texts: &[(Tier, String)]) -> Vec<RecordId> {
        self.stores.remember(who, texts)
    }

    fn insight(&self, who: usize, evidence: RecordId) -> bool {
        match self.fault {
            Fault::EvidenceById => self.stores.insight(self.holder(who, evidence), evidence),
            _ => self.stores.insight(who, evidence),
        }
    }

    fn get(&self, who: usize, id: RecordId) -> Option<(String, State, bool)> {
        self.stores.get(self.by_id(Fault::GetById, who, id), id)
    }

    fn history(&self, who: usize, id: RecordId) -> (Vec<String>, usize) {
        self.stores.history(self.by_id(Fault::HistoryById, who, id), id)
    }

    fn recall(&self, who: usize, query: &str) -> Vec<(RecordId, String)> {
        match self.fault {
            Fault::RecallEverywhere => {
                (0..AGENTS).flat_map(|other| self.stores.recall(other, query)).take(10).collect()
            }
            _ => self.stores.recall(who, query),
        }
    }

    fn list(&self, who: usize, before: Option<RecordId>) -> Vec<(RecordId, String)> {
        match (self.fault, before) {
            (Fault::ListEverywhere, Some(id)) => self.stores.list(self.holder(who, id), before),
            _ => self.stores.list(who, before),
        }
    }

    fn journal(&self, who: usize) -> Vec<RecordId> {
        self.stores.journal(who)
    }

    fn set_block(&self, who: usize, key: &str, text: String) {
        self.stores.set_block(who, key, text);
    }

    fn block(&self, who: usize, key: &str) -> Option<String> {
        let own = self.stores.block(who, key);
        match self.fault {
            Fault::BlockByKey => own.or_else(|| (0..AGENTS).find_map(|other| self.stores.block(other, key))),
            _ => own,
        }
    }

    fn forget(&self, who: usize, id: RecordId, mode: ForgetMode) -> bool {
        self.stores.forget(self.by_id(Fault::ForgetById, who, id), id, mode)
    }

    fn restore(&self, who: usize, id: RecordId) -> bool {
        self.stores.restore(who, id)
    }

    fn pin(&self, who: usize, id: RecordId, pinned: bool) -> bool {
        self.stores.pin(self.by_id(Fault::PinById, who, id), id, pinned)
    }

    fn correct(&self, who: usize, id: RecordId, text: String) -> Option<RecordId> {
        self.stores.correct(self.by_id(Fault::CorrectById, who, id), id, text)
    }

    fn used(&self, who: usize, id: RecordId) {
        self.stores.used(who, id);
    }

    fn within_budget(&self, who: usize) -> bool {
        self.stores.within_budget(who)
    }
}

/// Whose text it is. A word of its own, so that others can ask for it.
fn mark(who: usize) -> String {
    format!("mark{who:03}x")
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() % most as u64) as usize
    }
}

const WORDS: [&str; 12] = [
    "ship", "plum", "boiler", "train", "garden", "letter", "key", "winter", "sister", "music", "debt", "map",
];

/// What is known of all, by whoever looks from outside.
struct Known {
    /// Per agent the ids that it was given, the newest last.
    ids: Vec<RwLock<Vec<RecordId>>>,
    leaks: Mutex<Vec<String>>,
    done: AtomicU64,
}

impl Known {
    fn new() -> Self {
        let ids = (0..AGENTS).map(|_| RwLock::default()).collect();
        Self { ids, leaks: Mutex::default(), done: AtomicU64::new(0) }
    }

    fn note(&self, who: usize, new: Vec<RecordId>) {
        let mut ids = self.ids[who].write().expect("unpoisoned");
        ids.extend(new);
        // Those of long ago were evicted.
        let over = ids.len().saturating_sub(400);
        ids.drain(..over);
    }

    fn one_of(&self, who: usize, random: &mut Random) -> Option<RecordId> {
        let ids = self.ids[who].read().expect("unpoisoned");
        (!ids.is_empty()).then(|| ids[random.below(ids.len())])
    }

    fn is_of(&self, id: RecordId, who: usize) -> bool {
        self.ids[who].read().expect("unpoisoned").contains(&id)
    }

    fn leak(&self, what: String) {
        self.leaks.lock().expect("unpoisoned").push(what);
    }

    fn leaked(&self) -> bool {
        !self.leaks.lock().expect("unpoisoned").is_empty()
    }

    fn texts<'a>(&self, who: usize, deed: &str, texts: impl IntoIterator<Item = &'a String>) {
        for text in texts {
            if !text.contains(&mark(who)) {
                self.leak(format!("{deed}: {who} was given {text:?}"));
            }
        }
    }
}

/// One thread's share: it acts for its own agents, against all.
fn run(world: &dyn World, known: &Known, thread: usize, seed: u64, ops: u64) {
    let mut random = Random(seed.wrapping_mul(31).wrapping_add(thread as u64));
    let own: Vec<usize> = (0..AGENTS).filter(|who| who % THREADS == thread).collect();
    let mut left = ops;
    while left > 0 && !known.leaked() {
        // For a while a few of them are at work, so that a store is not opened for each operation.
        let group: Vec<usize> = (0..4).map(|_| own[random.below(own.len())]).collect();
        let mut turn = 2000.min(left);
        left -= turn;
        while turn > 0 && !known.leaked() {
            let who = group[random.below(group.len())];
            // Its own now and then: what never works shows nothing.
            let whose = match random.below(4) {
                0 => who,
                1 | 2 => group[random.below(group.len())],
                _ => random.below(AGENTS),
            };
            let done = operation(world, known, &mut random, who, whose).min(turn);
            known.done.fetch_add(done, Ordering::Relaxed);
            turn -= done;
        }
    }
}

/// One operation, or several that go into one transaction; says how many.
fn operation(world: &dyn World, known: &Known, random: &mut Random, who: usize, whose: usize) -> u64 {
    let foreign = who != whose;
    let some = |random: &mut Random| known.one_of(whose, random);
    match random.below(1000) {
        0..20 => {
            let count = 8 + random.below(24);
            let text = |random: &mut Random| {
                let words: Vec<&str> = (0..6).map(|_| WORDS[random.below(WORDS.len())]).collect();
                let tier = if random.below(2) == 0 { Tier::Working } else { Tier::Spirit };
                (tier, format!("{} {} {}", mark(who), words.join(" "), random.next()))
            };
            let texts: Vec<_> = (0..count).map(|_| text(random)).collect();
            known.note(who, world.remember(who, &texts));
            if !world.within_budget(who) {
                known.leak(format!("{who} holds more than its budget"));
            }
            return count as u64;
        }
        20..28 => {
            let key = ["plan", &format!("only-{who}")][random.below(2)].to_owned();
            world.set_block(who, &key, format!("{} {}", mark(who), random.next()));
        }
        28..60 => attempt(world, known, random, who, whose),
        60..400 => {
            if let Some(id) = some(random)
                && let Some((text, ..)) = world.get(who, id)
            {
                known.texts(who, "get", [&text]);
                if foreign {
                    known.leak(format!("get: {who} read {id} of {whose}"));
                }
            }
        }
        400..420 => {
            if let Some(id) = some(random) {
                let (chain, entries) = world.history(who, id);
                known.texts(who, "history", &chain);
                if foreign && entries > 0 {
                    known.leak(format!("history: {who} read what happened to {id} of {whose}"));
                }
            }
        }
        420..640 => {
            let query = match random.below(3) {
                0 => mark(whose),
                1 => format!("{} {}", mark(whose), WORDS[random.below(WORDS.len())]),
                _ => WORDS[random.below(WORDS.len())].to_owned(),
            };
            let hits = world.recall(who, &query);
            known.texts(who, "recall", hits.iter().map(|(_, text)| text));
        }
        640..740 => {
            let before = if random.below(2) == 0 { some(random) } else { None };
            let listed = world.list(who, before);
            known.texts(who, "list", listed.iter().map(|(_, text)| text));
        }
        740..800 => {
            for id in world.journal(who) {
                if let Some(other) = (0..AGENTS).find(|other| *other != who && known.is_of(id, *other)) {
                    known.leak(format!("journal: {who} was told of {id} of {other}"));
                }
            }
        }
        _ => {
            let key = ["plan".to_owned(), format!("only-{whose}")][random.below(2)].clone();
            if let Some(text) = world.block(who, &key) {
                known.texts(who, "block", [&text]);
            }
        }
    }
    1
}

/// Something is done to a record. When it is another's, that one must stand as it stood.
fn attempt(world: &dyn World, known: &Known, random: &mut Random, who: usize, whose: usize) {
    // Only agents of this thread change meanwhile.
    let whose = if whose % THREADS == who % THREADS { whose } else { (whose + 1) % AGENTS };
    let Some(id) = known.one_of(whose, random) else { return };
    let foreign = who != whose;
    let before = foreign.then(|| world.get(whose, id));
    let (deed, done) = match random.below(8) {
        0 => ("forget", world.forget(who, id, ForgetMode::Tombstone)),
        1 => ("purge", world.forget(who, id, ForgetMode::Purge)),
        2 => ("restore", world.restore(who, id)),
        3 => ("pin", world.pin(who, id, true)),
        4 => ("unpin", world.pin(who, id, false)),
        5 => {
            let new = world.correct(who, id, format!("{} corrected {}", mark(who), random.next()));
            known.note(who, new.into_iter().collect());
            ("correct", new.is_some())
        }
        6 => ("insight", world.insight(who, id)),
        _ => {
            world.used(who, id);
            ("used", false)
        }
    };
    let Some(before) = before else { return };
    if done {
        known.leak(format!("{deed}: {who} did it to {id} of {whose}"));
    }
    if world.get(whose, id) != before {
        known.leak(format!("{deed}: {id} of {whose} is not what it was after {who} tried"));
    }
}

/// The first leak, if there was one, and how many operations were done.
fn explore(world: &dyn World, seed: u64, ops: u64) -> (Option<String>, u64) {
    let known = Known::new();
    for who in 0..AGENTS {
        let texts: Vec<_> =
            (0..20).map(|n| (Tier::Spirit, format!("{} {} number {n}", mark(who), WORDS[n % 12]))).collect();
        known.note(who, world.remember(who, &texts));
        world.set_block(who, &format!("only-{who}"), mark(who));
    }
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let known = &known;
            scope.spawn(move || run(world, known, thread, seed, ops / THREADS as u64));
        }
    });
    let leaks = known.leaks.into_inner().expect("unpoisoned");
    (leaks.into_iter().next(), known.done.into_inner())
}

/// In memory where there is such a folder: what is asked here is not what the disk does.
fn folder() -> tempfile::TempDir {
    let in_memory = std::path::Path::new("/dev/shm");
    let made = if in_memory.is_dir() { tempfile::tempdir_in(in_memory) } else { tempfile::tempdir() };
    made.expect("a folder")
}

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

#[test]
fn nothing_of_one_agent_reaches_another() {
    let (ops, seed) = (number("ISOLATION_OPS", OPS), number("ISOLATION_SEED", 1));
    let folder = folder();
    let began = Instant::now();
    let (leak, done) = explore(&Stores::new(folder.path().to_owned()), seed, ops);
    println!("{done} operations of {AGENTS} agents, seed {seed}, {:.1} s", began.elapsed().as_secs_f32());
    assert_eq!(leak, None, "ISOLATION_SEED={seed}");
    assert!(done >= ops / THREADS as u64 * THREADS as u64, "{done}");
}

#[test]
fn every_fault_of_this_kind_is_caught() {
    let all = [
        Fault::GetById,
        Fault::HistoryById,
        Fault::RecallEverywhere,
        Fault::ListEverywhere,
        Fault::BlockByKey,
        Fault::ForgetById,
        Fault::PinById,
        Fault::CorrectById,
        Fault::EvidenceById,
        Fault::OtherBudget,
    ];
    for fault in all {
        let folder = folder();
        let mut stores = Stores::new(folder.path().to_owned());
        if fault == Fault::OtherBudget {
            stores.budgets = budgets(2 * RECORDS);
        }
        let (leak, done) = explore(&Faulty { stores, fault }, 1, OPS);
        println!("{fault:?} was caught after {done} operations: {leak:?}");
        assert!(leak.is_some(), "{fault:?} was not caught");
    }
}
