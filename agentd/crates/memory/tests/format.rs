//! Does a store of an earlier format become one of this format, whole? The files were written by the programs that had
//! format 1 (`tests/data/format-1.redb.zst`) and 2 (`format-2.redb.zst`, with its key).

use agentd_domain::agent_api::{EmbedState, Recall, Remember, Signals, Source, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Embedding, Identity, Listing, NewRecord, OpenError, Options, Role, Store};
use std::io::Read;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const TOLD: i64 = 1_790_000_000_000;

fn options(agent: u128) -> Options {
    let identity =
        Identity { agent_id: AgentId(Uuid::from_u128(agent)), owner_id: OwnerId(Uuid::from_u128(1)) };
    Options::new(identity, Budgets::agent())
}

fn first_format(dir: &Path) -> PathBuf {
    unpacked(dir, include_bytes!("data/format-1.redb.zst"))
}

const SECOND_KEY: &str = "memory.01a202e4fefd73c2b1bbae5fe64e52ff.key";

fn second_format(dir: &Path) -> PathBuf {
    std::fs::write(dir.join(SECOND_KEY), include_bytes!("data/format-2.key")).unwrap();
    unpacked(dir, include_bytes!("data/format-2.redb.zst"))
}

fn unpacked(dir: &Path, packed: &[u8]) -> PathBuf {
    let path = dir.join("memory.redb");
    let mut bytes = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(packed).unwrap().read_to_end(&mut bytes).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn asked(query: &str, signals: Signals) -> Recall {
    Recall {
        query: query.into(),
        k: None,
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: Some(signals),
        neighbours: None,
    }
}

#[test]
fn a_store_of_format_1_becomes_one_of_this_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = first_format(dir.path());
    let old = std::fs::File::open(&path).unwrap();
    assert!(std::fs::read(&path).unwrap().windows(5).any(|w| w == b"Porto"));
    let store = Store::open(&path, options(2)).unwrap();
    let checked = store.check().unwrap();
    assert_eq!((checked.records, checked.vectors, checked.pending), (4, 2, 1));
    let all = store.list(&Listing { most: 10, ..Listing::default() }).unwrap();
    let texts: Vec<&str> = all.iter().map(|s| s.text.as_str()).collect();
    assert_eq!(
        texts,
        [
            "Ana prefers tea to coffee",
            "the user asked about unmistakable-needle",
            "The boiler was serviced in May",
            "My sister Ana lives in Porto",
        ]
    );
    let ana = &all[3];
    assert_eq!((ana.tier, ana.role), (Tier::Spirit, Role::Fact));
    assert_eq!(ana.source, Source { kind: "user".into(), reference: Some("m1".into()) });
    assert_eq!((ana.event_unix_ms, ana.recorded_unix_ms), (1_780_000_000_000, TOLD));
    assert_eq!((ana.life.trust, ana.life.half_life_days, ana.format), (100, 120.0, 2));
    assert_eq!(all[0].source.reference.as_deref(), Some(""));

    // Its vectors, its words, its pending record, its keys.
    let question = Embedding { embedder: [7; 32], vector: vec![1.0, 0.5, 0.25] };
    let by_meaning = store.recall(&asked("anything", Signals::Meaning), Some(&question)).unwrap().hits;
    assert_eq!(by_meaning[0].id, ana.id);
    assert!(by_meaning[0].score > 0.999, "{}", by_meaning[0].score);
    assert_eq!(store.recall(&asked("boiler service", Signals::Words), None).unwrap().hits[0].id, all[2].id);
    assert_eq!(store.pending_batch(10).unwrap()[0].id, all[2].id);
    let request = Remember {
        tier: Tier::Spirit,
        text: "The boiler was serviced in May".into(),
        role: None,
        source: None,
        event_unix_ms: None,
    };
    let again = NewRecord { idempotency_key: Some("key one".into()), ..NewRecord::new(request, TOLD + 5) };
    let remembered = store.remember(again, None).unwrap();
    assert_eq!((remembered.id, remembered.state), (all[2].id, EmbedState::Pending));
    drop(store);

    // No word is left of what was not sealed, not even in the file that has no name any more.
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(5).any(|w| w == b"Porto" || w == b"needl"));
    }
    let mut left = Vec::new();
    let mut old = old;
    old.read_to_end(&mut left).unwrap();
    assert!(left.iter().all(|byte| *byte == 0), "the old file's bytes were overwritten");
    assert_eq!(Store::open(&path, options(2)).unwrap().check().unwrap().records, 4);
}

/// A migration that was interrupted begins again: the store of format 1 stays until its successor is whole.
#[test]
fn an_interrupted_migration_begins_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = first_format(dir.path());
    std::fs::write(path.with_extension("redb.next"), b"half of a successor").unwrap();
    let stale = dir.path().join("memory.00000000000000000000000000000005.key");
    std::fs::write(&stale, b"its key").unwrap();
    let store = Store::open(&path, options(2)).unwrap();
    assert_eq!(store.check().unwrap().records, 4);
    assert!(!stale.exists() && !path.with_extension("redb.next").exists());
}

#[test]
fn a_store_of_format_1_of_another_agent_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = first_format(dir.path());
    let before = std::fs::read(&path).unwrap();
    let refused = Store::open(&path, options(3));
    assert!(matches!(refused, Err(OpenError::OtherAgent { .. })), "{refused:?}");
    assert!(std::fs::read(&path).unwrap().windows(5).any(|w| w == b"Porto"), "not migrated for a stranger");
    assert_eq!(before.len(), std::fs::read(&path).unwrap().len());
    assert_eq!(Store::open(&path, options(2)).unwrap().check().unwrap().records, 4);
}

/// Everything that format 2 had: claims, a session, a tombstone, a pinned record, a block, vectors and records that
/// wait for one, keys of requests, the journal. One record had been purged.
#[test]
fn a_store_of_format_2_becomes_one_of_this_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = second_format(dir.path());
    let store = Store::open(&path, options(2)).unwrap();
    let checked = store.check().unwrap();
    assert_eq!((checked.records, checked.forgotten, checked.vectors, checked.pending), (47, 1, 31, 10));
    assert_eq!((checked.postings, checked.blocks, checked.entries), (230, 1, 3));
    assert!(!dir.path().join(SECOND_KEY).exists(), "the old file's rows open no more");

    let found = |query: &str| store.recall(&asked(query, Signals::Words), None).unwrap().hits;
    assert_eq!(found("Porto")[0].text, "Ana lives in Porto");
    assert!(found("Lisbon").is_empty(), "superseded");
    let question = Embedding { embedder: [7; 32], vector: vec![0.1, 0.2, 9.0] };
    let near = store.recall(&asked("anything", Signals::Meaning), Some(&question)).unwrap().hits;
    assert_eq!(near[0].text, "Ana lives in Porto");
    assert!(near[0].score > 0.999, "{}", near[0].score);

    let all = store.list(&Listing { most: 100, ..Listing::default() }).unwrap();
    let of = |text: &str| all.iter().find(|stored| stored.text.starts_with(text)).unwrap();
    assert!(of("note 7 ").life.pinned);
    // Told later, and of an earlier time.
    assert_eq!(of("Ana lives in Lisbon").life.state.name(), "superseded");
    assert_eq!(of("note 5 ").life.state.name(), "forgotten");
    assert!(!all.iter().any(|stored| stored.text.starts_with("note 6 ")));
    assert_eq!(of("turn 42").session.as_deref(), Some("run"));
    assert_eq!(store.block("goal").unwrap().unwrap().text, "sail at noon");
    assert_eq!(store.pending_batch(100).unwrap().len(), 10);

    // A request of before is known by its key, and a tombstone comes back.
    let text = of("note 8 ").text.clone();
    let request = Remember { tier: Tier::Spirit, text, role: None, source: None, event_unix_ms: None };
    let again = NewRecord { idempotency_key: Some("key 8".into()), ..NewRecord::new(request, TOLD + 90) };
    assert_eq!(store.remember(again, None).unwrap().id, of("note 8 ").id);
    store.restore(of("note 5 ").id, TOLD + 91).unwrap();
    drop(store);
    assert_eq!(Store::open(&path, options(2)).unwrap().check().unwrap().forgotten, 0);
}

#[test]
fn a_store_of_format_2_of_another_agent_is_refused_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = second_format(dir.path());
    assert!(matches!(Store::open(&path, options(3)), Err(OpenError::OtherAgent { .. })));
    assert!(dir.path().join(SECOND_KEY).exists());
    assert_eq!(Store::open(&path, options(2)).unwrap().check().unwrap().records, 47);
}
