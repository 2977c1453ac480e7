//! Does what was purged open no more, with any key that is left?
//!
//! The proof does not trust redb's view of the file. It takes every page of every file of the store, free ones too,
//! for a leaf, opens all rows on it with the key that is left, and looks for the purged record's number in them: its
//! text, its life, both parts of its vector, its words. Before the rewriting the same walk must find them, or it
//! could not fail.

use crate::file::{Folder, Home};
use crate::key;
use crate::life::State;
use crate::pack::{self, COARSE, FINE, LIVES, RECORDS};
use crate::plan::Budgets;
use crate::run::{NewRecord, Options, Store};
use crate::seal::{Seal, Secret};
use crate::tables::Identity;
use crate::text;
use crate::write::{Embedding, ForgetMode, open_block};
use agentd_domain::agent_api::{Recall, Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use std::path::{Path, PathBuf};
use uuid::Uuid;

const EMBEDDER: [u8; 32] = [1; 32];
const NOW: i64 = 1_790_000_000_000;
const SECRET_TEXT: &str = "the safe behind the portrait opens with zanzibar";

fn identity() -> Identity {
    Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) }
}

fn open(path: &Path) -> Store {
    let store = Store::open(path, Options::new(identity(), Budgets::agent())).unwrap();
    store.use_embedder(EMBEDDER, 3).unwrap();
    store
}

fn tell(store: &Store, text: &str) -> RecordId {
    let request =
        Remember { tier: Tier::Spirit, text: text.into(), role: None, source: None, event_unix_ms: None };
    let embedding = Embedding { embedder: EMBEDDER, vector: vec![1.0, text.len() as f32, 0.5] };
    let new = NewRecord { idempotency_key: Some(text.into()), ..NewRecord::new(request, NOW) };
    store.remember(new, Some(embedding)).unwrap().id
}

fn found(store: &Store, query: &str) -> usize {
    let request = Recall {
        query: query.into(),
        k: Some(50),
        tiers: vec![],
        budget_tokens: None,
        explain: false,
        signals: Some(agentd_domain::agent_api::Signals::Words),
        neighbours: None,
    };
    store.recall(&request, None).unwrap().hits.len()
}

fn secret(path: &Path) -> (Uuid, Secret) {
    let keys = key::keys(path).unwrap();
    assert_eq!(keys.len(), 1, "one key and no other");
    (keys[0].0, key::read(path, keys[0].0).unwrap().secret)
}

/// The pairs of a page, if it is a leaf of redb's (its `docs/design.md`): a byte 1, the number of pairs, the ends of
/// keys (where they differ in length) and of values, the keys, the values.
fn pairs(page: &[u8], key_bytes: Option<usize>) -> Vec<(&[u8], &[u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(page.get(at..at + 4)?.try_into().ok()?) as usize);
    let read = || {
        let count = usize::from(u16::from_le_bytes(page.get(2..4)?.try_into().ok()?));
        let ends = if key_bytes.is_none() { 2 } else { 1 };
        let mut from = 4 + 4 * count * ends;
        let mut keys = Vec::new();
        for i in 0..count {
            let to = match key_bytes {
                Some(bytes) => from + bytes,
                None => number(4 + 4 * i)?,
            };
            keys.push(page.get(from..to)?);
            from = to;
        }
        let mut found = Vec::new();
        for (i, key) in keys.into_iter().enumerate() {
            let to = number(4 + 4 * (count * (ends - 1) + i))?;
            found.push((key, page.get(from..to)?));
            from = to;
        }
        Some(found)
    };
    if page.first() == Some(&1) { read().unwrap_or_default() } else { Vec::new() }
}

/// Every sealed row, on any page of any file of the store, that opens with this key to something of the record:
/// its text, its life, a part of its vector, one of its words.
fn opened(path: &Path, secret: &Secret, seq: u64) -> Vec<Vec<u8>> {
    const PAGE_BYTES: usize = 4096;
    /// No page of these tests is larger.
    const LARGEST_BYTES: usize = 16 * PAGE_BYTES;
    let seal = Seal::new(secret);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for at in (0..bytes.len()).step_by(PAGE_BYTES) {
            let page = &bytes[at..bytes.len().min(at + LARGEST_BYTES)];
            for (key, sealed) in pairs(page, Some(8)) {
                let key = u64::from_le_bytes(key.try_into().unwrap());
                let holds = [&RECORDS, &LIVES, &COARSE, &FINE]
                    .into_iter()
                    .any(|shape| pack::numbers_in(&seal, shape, key, sealed).contains(&seq));
                found.extend(holds.then(|| sealed.to_vec()));
            }
            for (key, sealed) in pairs(page, None) {
                let Ok(key) = key.try_into() else { continue };
                let postings = open_block(&seal, &key, sealed).unwrap_or_default();
                let holds = postings.iter().any(|posting| posting.seq == seq);
                found.extend(holds.then(|| sealed.to_vec()));
            }
        }
    }
    found
}

fn holds(path: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(path.parent().unwrap()).unwrap().any(|entry| {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}

#[test]
fn no_page_opens_to_what_was_purged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    for i in 0..5 {
        tell(&store, &format!("harmless note {i} about the garden"));
    }
    let purged = tell(&store, SECRET_TEXT);
    let seq = 5;
    let kept = tell(&store, "the portrait shows an uncle");
    assert_eq!(found(&store, "zanzibar"), 1);
    let (old, old_secret) = secret(&path);
    let sealed = opened(&path, &old_secret, seq);
    let terms = text::term_counts(SECRET_TEXT).len();
    assert!(sealed.len() >= 4 + terms, "the walk finds text, life, both parts of the vector and every word");
    store.forget(vec![purged], ForgetMode::Purge, NOW).unwrap();
    assert_eq!((found(&store, "zanzibar"), found(&store, "portrait")), (0, 1), "gone at once");
    drop(store);
    let left = opened(&path, &old_secret, seq);
    assert!(!left.is_empty(), "redb leaves free pages as they are: the walk must find what is there");

    let store = open(&path);
    assert!(store.sweep(NOW).unwrap().rewrite_by_unix_ms.is_some());
    store.rewrite(NOW + 1).unwrap();
    assert_eq!(store.sweep(NOW).unwrap().rewrite_by_unix_ms, None);
    let (live, live_secret) = secret(&path);
    assert_ne!(live, old, "another key");
    assert_eq!(opened(&path, &live_secret, seq).len(), 0, "opens with the live key");
    assert_eq!(opened(&path, &old_secret, seq).len(), 0, "is in the new file under the old key");
    // Not even what nobody can open: no row of it was copied.
    for row in sealed.iter().chain(&left) {
        assert!(!holds(&path, &row[..row.len().min(64)]), "a sealed row of it is left");
    }
    // The same walk with the live key finds what was not purged.
    assert!(opened(&path, &live_secret, seq + 1).len() >= 4);
    assert!(!holds(&path, old_secret.as_slice()), "the old key is somewhere");
    assert!(holds(&path, live_secret.as_slice()));
    assert!(!holds(&path, b"zanzibar"));

    // What was not purged is whole, before and after reopening.
    let whole = |store: &Store| {
        assert_eq!(store.get(kept).unwrap().unwrap().text, "the portrait shows an uncle");
        assert_eq!((found(store, "garden"), found(store, "portrait"), found(store, "zanzibar")), (5, 1, 0));
        assert_eq!(tell(store, "the portrait shows an uncle"), kept, "keys of requests are known still");
        let checked = store.check().unwrap();
        assert_eq!((checked.records, checked.vectors), (6, 6));
    };
    whole(&store);
    drop(store);
    whole(&open(&path));
}

/// The files of a store as they are now, in a folder of their own: what a power cut would leave.
fn snapshot(path: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(path.parent().unwrap()).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("memory.redb");
    (dir, path)
}

/// Whatever step of a rewriting was the last: the store opens, holds everything, and exactly one key is left.
#[test]
fn a_rewriting_may_stop_after_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    let ids: Vec<RecordId> = (0..40).map(|i| tell(&store, &format!("note {i} of the harbour"))).collect();
    let hidden = ids[7];
    store.forget(vec![hidden], ForgetMode::Tombstone, NOW).unwrap();
    store.pin(ids[3], true, NOW).unwrap();
    store.set_block("goal".into(), Some("sail".into()), 0, true, NOW).unwrap();
    let purged = tell(&store, SECRET_TEXT);
    store.forget(vec![purged], ForgetMode::Purge, NOW).unwrap();
    drop(store);

    let mut stopped = vec![("before", snapshot(&path))];
    key::make(&path).unwrap();
    stopped.push(("a key was made", snapshot(&path)));
    let next = path.with_extension("redb.next");
    std::fs::write(&next, b"half").unwrap();
    stopped.push(("a file was begun", snapshot(&path)));
    let home = Folder { path: path.clone(), identity: identity(), cache_bytes: 1 << 20 };
    {
        let open = home.open().unwrap();
        home.write_anew(&open, NOW).unwrap();
        stopped.push(("the file was written", snapshot(&path)));
        let whole = std::fs::read(&next).unwrap();
        for part in [4096, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&next, &whole[..part]).unwrap();
            stopped.push(("the file was written in part", snapshot(&path)));
        }
        std::fs::write(&next, &whole).unwrap();
    }
    home.take_place().unwrap();
    assert_eq!(key::keys(&path).unwrap().len(), 2, "the old key is still there");
    stopped.push(("it took the place", snapshot(&path)));
    drop(home.open().unwrap());
    stopped.push(("the old key was destroyed", snapshot(&path)));

    for (step, (_dir, path)) in stopped {
        let store = open(&path);
        assert_eq!(key::keys(&path).unwrap().len(), 1, "{step}");
        assert!(!path.with_extension("redb.next").exists(), "{step}");
        let checked = store.check().unwrap_or_else(|error| panic!("{step}: {error}"));
        assert_eq!((checked.records, checked.forgotten, checked.blocks), (40, 1, 1), "{step}");
        assert_eq!(found(&store, "harbour"), 39, "{step}");
        assert_eq!(store.get(hidden).unwrap().unwrap().life.state, State::Forgotten, "{step}");
        assert!(store.get(ids[3]).unwrap().unwrap().life.pinned, "{step}");
        assert_eq!(store.block("goal").unwrap().unwrap().text, "sail", "{step}");
        // And it can be done again.
        store.rewrite(NOW + 2).unwrap();
        store.restore(hidden, NOW + 3).unwrap();
        assert_eq!(found(&store, "harbour"), 40, "{step}");
        store.check().unwrap();
    }
}

/// Another key, none, or a damaged one: the store is refused by name, and nothing beside it is destroyed.
#[test]
fn a_store_without_its_key_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let id = tell(&open(&path), "still here");
    let (live, _) = secret(&path);
    let key_path = key::path(&path, live);
    let bytes = std::fs::read(&key_path).unwrap();
    let other = key::make(&path).unwrap();

    std::fs::remove_file(&key_path).unwrap();
    let refused = Store::open(&path, Options::new(identity(), Budgets::agent())).unwrap_err();
    assert_eq!(refused.report().code, "memory_key_missing");
    assert!(refused.report().fix.contains(&*key_path.to_string_lossy()));

    // A key of the right name and another content.
    let mut wrong = bytes.clone();
    wrong[24..56].copy_from_slice(other.secret.as_slice());
    let crc = crc32fast::hash(&wrong[..56]);
    wrong[56..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&key_path, &wrong).unwrap();
    let refused = Store::open(&path, Options::new(identity(), Budgets::agent())).unwrap_err();
    assert_eq!(refused.report().code, "memory_damaged");
    assert!(key::read(&path, other.id).is_ok(), "nothing is destroyed on the word of a wrong key");

    std::fs::write(&key_path, &bytes).unwrap();
    assert_eq!(open(&path).get(id).unwrap().unwrap().text, "still here");
}

/// An agent is removed: its keys are overwritten where they stood, before any file loses its name.
#[test]
fn a_store_that_is_destroyed_leaves_no_key() {
    use std::io::{Read, Seek};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    tell(&open(&path), SECRET_TEXT);
    let (id, live) = secret(&path);
    // As after a rewriting that was interrupted: two keys, a file that was begun.
    let second = key::make(&path).unwrap();
    std::fs::write(path.with_extension("redb.next"), b"half").unwrap();
    let other = tell(&open(&dir.path().join("other.redb")), "another agent's");
    let stale = |id| std::fs::File::open(key::path(&path, id)).unwrap();
    let mut held = [stale(id), key::make(&path).map(|key| stale(key.id)).unwrap()];
    let copy = snapshot(&path);

    crate::destroy(&path).unwrap();
    for file in &mut held {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert!(
            !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0),
            "overwritten before it was removed"
        );
    }
    let left: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("other."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!holds(&path, live.as_slice()) && !holds(&path, second.secret.as_slice()));
    assert!(open(&dir.path().join("other.redb")).get(other).unwrap().is_some(), "another's store stays");

    // Interrupted after the keys: nothing opens it, and it can be done again.
    let (_copy, copied) = copy;
    key::destroy_all(&copied).unwrap();
    let refused = Store::open(&copied, Options::new(identity(), Budgets::agent())).unwrap_err();
    assert_eq!(refused.report().code, "memory_key_missing");
    crate::destroy(&copied).unwrap();
    assert!(!copied.exists());
    crate::destroy(&copied).unwrap();
}
