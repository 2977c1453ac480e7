//! The store as agentd uses it, on a real file.

use agentd_domain::agent_api::{EmbedState, Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{
    Budget, Budgets, Embedding, Identity, NewRecord, OpenError, Options, Refusal, Store, StoreError,
};
use redb::ReadableTable;
use std::path::Path;
use uuid::Uuid;

const EMBEDDER: [u8; 32] = [7; 32];
const OTHER: [u8; 32] = [8; 32];
const NOW: i64 = 1_790_000_000_000;

fn identity(agent: u128) -> Identity {
    Identity { agent_id: AgentId(Uuid::from_u128(agent)), owner_id: OwnerId(Uuid::from_u128(1)) }
}

fn options() -> Options {
    Options::new(identity(2), Budgets::agent())
}

fn open(path: &Path) -> Store {
    Store::open(path, options()).unwrap()
}

fn told(text: &str) -> NewRecord {
    told_in(Tier::Spirit, text)
}

fn told_in(tier: Tier, text: &str) -> NewRecord {
    NewRecord {
        request: Remember { tier, text: text.to_owned(), role: None, source: None, event_unix_ms: None },
        recorded_unix_ms: NOW,
        idempotency_key: None,
        detail: Default::default(),
        with: vec![],
    }
}

fn asked(query: &str) -> Recall {
    Recall {
        query: query.to_owned(),
        k: None,
        tiers: vec![],
        budget_tokens: None,
        explain: true,
        signals: None,
        neighbours: None,
    }
}

/// Three meanings are three axes: enough to see which signal decided.
fn meaning(vector: [f32; 3]) -> Option<Embedding> {
    Some(Embedding { embedder: EMBEDDER, vector: vector.to_vec() })
}

fn texts(store: &Store, recall: &Recall, embedding: Option<Embedding>) -> Vec<String> {
    store.recall(recall, embedding.as_ref()).unwrap().hits.into_iter().map(|h| h.text).collect()
}

#[test]
fn what_was_acknowledged_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    store.use_embedder(EMBEDDER, 3).unwrap();
    let first = store.remember(told("My sister Ana lives in Porto"), meaning([1.0, 0.0, 0.0])).unwrap();
    let second = store.remember(told("The boiler was serviced in May"), None).unwrap();
    assert_eq!((first.state, second.state), (EmbedState::Embedded, EmbedState::Pending));
    drop(store);

    let store = open(&path);
    let found = store.get(first.id).unwrap().unwrap();
    assert_eq!(found.text, "My sister Ana lives in Porto");
    assert_eq!((found.format, found.embedder), (2, Some(EMBEDDER)));
    assert_eq!((found.owner, found.recorded_unix_ms, found.event_unix_ms), (identity(2).owner_id, NOW, NOW));
    assert_eq!(store.get(second.id).unwrap().unwrap().embedder, None);
    assert_eq!(texts(&store, &asked("boiler service"), None), ["The boiler was serviced in May"]);
    let checked = store.check().unwrap();
    assert_eq!((checked.records, checked.vectors, checked.pending), (2, 1, 1));
}

#[test]
fn the_file_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    drop(open(&path));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left beside the store and its key"
    );
}

#[test]
fn a_store_left_half_made_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    std::fs::write(path.with_extension("redb.new"), b"half a file").unwrap();
    assert_eq!(open(&path).counters().unwrap().records(), 0);
}

#[test]
fn both_signals_find_and_explain() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    store.use_embedder(EMBEDDER, 3).unwrap();
    store.remember(told("The cat is called Miso"), meaning([1.0, 0.1, 0.0])).unwrap();
    store.remember(told("Rent is due on the third"), meaning([0.0, 1.0, 0.1])).unwrap();
    store.remember(told("Bring the cat to the vet on Friday"), meaning([0.5, 0.0, 0.9])).unwrap();

    let by_meaning = Recall { signals: Some(Signals::Meaning), ..asked("pet's name") };
    assert_eq!(texts(&store, &by_meaning, meaning([1.0, 0.0, 0.0]))[0], "The cat is called Miso");
    let by_words = Recall { signals: Some(Signals::Words), ..asked("which vet for the cat") };
    assert_eq!(
        texts(&store, &by_words, None),
        ["Bring the cat to the vet on Friday", "The cat is called Miso"]
    );

    let both = store.recall(&asked("cat"), meaning([1.0, 0.0, 0.0]).as_ref()).unwrap();
    assert!(!both.words_only);
    let hit = &both.hits[0];
    assert_eq!(hit.text, "The cat is called Miso");
    let explain = hit.explain.as_ref().unwrap();
    assert_eq!(explain.matched, ["cat"]);
    assert!(explain.meaning > 0.99 && explain.words > 0.5, "{explain:?}");
    assert_eq!(both.hits.len(), 3, "a record without a common word is still ranked by meaning");
}

#[test]
fn without_the_embedder_words_answer_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    store.remember(told("The cat is called Miso"), meaning([1.0, 0.0, 0.0])).unwrap();
    let answer = store.recall(&asked("cat"), None).unwrap();
    assert!(answer.words_only);
    assert_eq!((answer.pending, answer.hits.len()), (1, 1));
    let only_meaning = Recall { signals: Some(Signals::Meaning), ..asked("cat") };
    assert!(matches!(store.recall(&only_meaning, None), Err(StoreError::EmbedderAway)));
}

#[test]
fn pending_records_are_embedded_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    for text in ["one", "two", "three"] {
        assert_eq!(store.remember(told(text), None).unwrap().state, EmbedState::Pending);
    }
    assert!(matches!(
        store.complete_embedding(EMBEDDER, vec![]),
        Err(StoreError::Refused(Refusal::OtherEmbedder))
    ));
    assert_eq!(store.use_embedder(EMBEDDER, 3).unwrap().pending, 3);
    drop(store);

    let store = open(&path);
    assert!(!store.use_embedder(EMBEDDER, 3).unwrap().changed);
    let batch = store.pending_batch(2).unwrap();
    assert_eq!(batch.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    let vectors = vec![(batch[0].id, vec![1.0, 0.0, 0.0]), (batch[1].id, vec![f32::NAN, 0.0, 0.0])];
    let done = store.complete_embedding(EMBEDDER, vectors).unwrap();
    assert_eq!((done.embedded, done.refused.len()), (1, 1));
    assert_eq!(done.refused[0].id, batch[1].id);
    assert_eq!(store.pending_batch(10).unwrap().len(), 2, "a broken vector leaves its record pending");
    // Repeated after a lost answer: nothing changes.
    let again = store.complete_embedding(EMBEDDER, vec![(batch[0].id, vec![0.0, 1.0, 0.0])]).unwrap();
    assert_eq!(again.embedded, 0);
    let hits = store.recall(&asked("anything"), meaning([1.0, 0.0, 0.0]).as_ref()).unwrap();
    assert_eq!(hits.hits[0].text, "one");
    assert_eq!(store.check().unwrap().vectors, 1);
}

#[test]
fn vectors_of_another_embedder_are_never_compared() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    store.use_embedder(EMBEDDER, 3).unwrap();
    let id = store.remember(told("alpha"), meaning([1.0, 0.0, 0.0])).unwrap().id;
    assert_eq!(texts(&store, &asked("unrelated"), meaning([1.0, 0.0, 0.0])), ["alpha"]);

    let change = store.use_embedder(OTHER, 2).unwrap();
    assert!(change.changed);
    assert_eq!(change.pending, 1);
    let query = Embedding { embedder: OTHER, vector: vec![1.0, 0.0] };
    assert!(texts(&store, &asked("unrelated"), Some(query.clone())).is_empty());
    // A question embedded by the old model, on its way while the change was made.
    assert!(store.recall(&asked("alpha"), meaning([1.0, 0.0, 0.0]).as_ref()).unwrap().words_only);
    // A record embedded by the old model waits.
    let late = store.remember(told("beta"), meaning([0.0, 1.0, 0.0])).unwrap();
    assert_eq!(late.state, EmbedState::Pending);

    store.complete_embedding(OTHER, vec![(id, vec![1.0, 0.0])]).unwrap();
    assert_eq!(texts(&store, &asked("unrelated"), Some(query)), ["alpha"]);
    assert_eq!(store.get(id).unwrap().unwrap().embedder, Some(OTHER));
    store.check().unwrap();

    // Back to the first: "alpha" was overwritten by the other one's vector and waits again.
    assert_eq!(store.use_embedder(EMBEDDER, 3).unwrap().pending, 2);
    store.check().unwrap();
    assert!(matches!(
        store.use_embedder(EMBEDDER, 4),
        Err(StoreError::Refused(Refusal::DimensionChanged { known: 3, named: 4 }))
    ));
}

#[test]
fn a_repeated_request_is_one_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    let keyed = |text: &str, at: i64| NewRecord {
        idempotency_key: Some("k1".into()),
        recorded_unix_ms: at,
        ..told(text)
    };
    let first = store.remember(keyed("once", NOW), None).unwrap();
    drop(store);
    let store = open(&path);
    let again = store.remember(keyed("once", NOW + 1000), None).unwrap();
    assert_eq!(first.id, again.id);
    assert!(matches!(
        store.remember(keyed("other", NOW + 1000), None),
        Err(StoreError::Refused(Refusal::KeyReused))
    ));
    let mut other = keyed("once", NOW + 1000);
    other.request.role = Some("preference".into());
    assert!(matches!(store.remember(other, None), Err(StoreError::Refused(Refusal::KeyReused))));
    assert_eq!(store.counters().unwrap().records(), 1);
    let day = 24 * 60 * 60 * 1000;
    let later = store.remember(keyed("other", NOW + day + 1), None).unwrap();
    assert_ne!(first.id, later.id);
}

#[test]
fn budgets_hold_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let budgets = Budgets::new([(Tier::Knowledge, Budget { records: 2, bytes: 200 })]);
    let store = Store::open(&dir.path().join("memory.redb"), Options::new(identity(2), budgets)).unwrap();
    let told = |text: &str| told_in(Tier::Knowledge, text);
    let free = 200 - 51;
    let too_long = store.remember(told(&"a".repeat(free + 1)), None);
    assert!(matches!(too_long, Err(StoreError::Refused(Refusal::TierFull { bytes: 0, .. }))), "{too_long:?}");
    store.remember(told(&"a".repeat(free - 52)), None).unwrap();
    store.remember(told("b"), None).unwrap();
    assert_eq!(store.counters().unwrap().tier(Tier::Knowledge).bytes, 200);
    let report = store.remember(told("c"), None).unwrap_err().report();
    assert_eq!(report.code, "memory_full");
    store.check().unwrap();
}

#[test]
fn wrong_requests_are_refused_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    let mut wrong = vec![
        (told("  "), "text_empty"),
        (told(&"x".repeat(32 * 1024 + 1)), "too_large"),
        (told(&"x".repeat(100 * 1024 * 1024)), "too_large"),
        (told_in(Tier::Codegraph, "x"), "tier_not_kept"),
        (told_in(Tier::Knowledge, "x"), "tier_not_kept"),
    ];
    let mut role = told("x");
    role.request.role = Some("rumour".into());
    wrong.push((role, "role_unknown"));
    let mut source = told("x");
    source.request.source = Some(agentd_domain::agent_api::Source { kind: "moon".into(), reference: None });
    wrong.push((source, "source_unknown"));
    let mut stranger = told("x");
    stranger.request.source = Some(agentd_domain::agent_api::Source { kind: "web".into(), reference: None });
    stranger.request.role = Some("identity".into());
    wrong.push((stranger.clone(), "untrusted_source"));
    stranger.request.source =
        Some(agentd_domain::agent_api::Source { kind: "recall".into(), reference: None });
    stranger.request.role = None;
    wrong.push((stranger, "recalled_text"));
    let mut insight = told("x");
    insight.request.role = Some("insight".into());
    wrong.push((insight, "evidence_missing"));
    wrong.push((NewRecord { idempotency_key: Some("k".repeat(129)), ..told("x") }, "idempotency_key"));
    for (new, code) in wrong {
        let report = store.remember(new, None).unwrap_err().report();
        assert_eq!(report.code, code);
        assert!(!report.fix.is_empty());
    }
    for (recall, code) in [
        (asked(" "), "query_empty"),
        (asked(&"x".repeat(9000)), "too_large"),
        (Recall { k: Some(0), ..asked("x") }, "k_out_of_range"),
        (Recall { k: Some(51), ..asked("x") }, "k_out_of_range"),
        (Recall { tiers: vec![Tier::Active], ..asked("x") }, "tier_not_kept"),
    ] {
        assert_eq!(store.recall(&recall, None).unwrap_err().report().code, code);
    }
    assert_eq!(store.counters().unwrap().records(), 0);
    assert!(store.remember(told(&"x".repeat(32 * 1024)), None).is_ok());
}

#[test]
fn tiers_and_token_budgets_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    let working = store.remember(told_in(Tier::Working, "tea at noon, said the user"), None).unwrap();
    assert_eq!(working.state, EmbedState::WordsOnly);
    store.remember(told("tea tea tea and a long story about tea in the garden"), None).unwrap();
    store.remember(told("tea"), None).unwrap();
    assert_eq!(texts(&store, &asked("tea"), None).len(), 2, "spirit is the default");
    let in_working = Recall { tiers: vec![Tier::Working], ..asked("tea") };
    assert_eq!(texts(&store, &in_working, None), ["tea at noon, said the user"]);
    let everywhere = Recall { tiers: vec![Tier::Working, Tier::Spirit], ..asked("tea") };
    assert_eq!(texts(&store, &everywhere, None).len(), 3);
    let small = Recall { budget_tokens: Some(1), ..asked("tea") };
    assert_eq!(texts(&store, &small, None), ["tea"], "what does not fit is left out");
    assert!(texts(&store, &Recall { budget_tokens: Some(0), ..asked("tea") }, None).is_empty());
}

#[test]
fn a_store_answers_only_for_its_agent_and_one_opener() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    let second = Store::open(&path, options());
    assert!(matches!(second, Err(OpenError::InUse { .. })), "{second:?}");
    drop(store);
    let other = Store::open(&path, Options::new(identity(3), Budgets::agent()));
    assert!(matches!(other, Err(OpenError::OtherAgent { .. })), "{other:?}");
    assert!(open(&path).check().is_ok());
}

#[test]
fn foreign_and_future_files_are_refused_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let foreign = dir.path().join("foreign.redb");
    std::fs::write(&foreign, b"this was never a store").unwrap();
    let refused = Store::open(&foreign, options()).unwrap_err();
    assert_eq!(refused.report().code, "memory_unopened");
    assert_eq!(std::fs::read(&foreign).unwrap(), b"this was never a store");

    let future = dir.path().join("future.redb");
    drop(open(&future));
    let database = redb::Database::open(&future).unwrap();
    let txn = database.begin_write().unwrap();
    {
        let mut meta = txn.open_table(redb::TableDefinition::<&str, &[u8]>::new("meta")).unwrap();
        let mut row = meta.get("identity").unwrap().unwrap().value().to_vec();
        row[0] = 9;
        meta.insert("identity", row.as_slice()).unwrap();
    }
    txn.commit().unwrap();
    drop(database);
    let refused = Store::open(&future, options());
    assert!(matches!(refused, Err(OpenError::NewerFormat { found: 9, .. })), "{refused:?}");
}

#[test]
fn an_older_word_index_is_rebuilt_from_the_texts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    let id = store.remember(told("Grandmother's recipe needs two lemons"), None).unwrap().id;
    drop(store);
    let database = redb::Database::open(&path).unwrap();
    let txn = database.begin_write().unwrap();
    {
        let mut meta = txn.open_table(redb::TableDefinition::<&str, &[u8]>::new("meta")).unwrap();
        let mut row = meta.get("identity").unwrap().unwrap().value().to_vec();
        row[4] = 0;
        meta.insert("identity", row.as_slice()).unwrap();
        let mut postings = txn.open_table(redb::TableDefinition::<&[u8], &[u8]>::new("posting")).unwrap();
        postings.retain(|_, _| false).unwrap();
    }
    txn.commit().unwrap();
    drop(database);
    let store = open(&path);
    assert_eq!(store.recall(&asked("lemon"), None).unwrap().hits[0].id, id);
    store.check().unwrap();
}

/// A bit flipped in any byte of the file that is not free: what is answered afterwards is what was told, or an
/// error; never another text.
#[test]
fn a_flipped_bit_is_noticed_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    store.use_embedder(EMBEDDER, 3).unwrap();
    let text = "the combination is 4 7 11";
    let id = store.remember(told(text), meaning([1.0, 0.5, 0.0])).unwrap().id;
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    let used: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
    let mut noticed = 0;
    for at in used.iter().copied().step_by(used.len() / 60) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();
        // redb 4.4 ends the program on some damaged files; agentd's note beside the file bounds that.
        let answer = std::panic::catch_unwind(|| {
            let store = Store::open(&path, options()).map_err(|e| e.to_string())?;
            store.check().map_err(|e| e.to_string())?;
            let found = store.get(id).map_err(|e| e.to_string())?;
            let hits = store.recall(&asked("combination"), None).map_err(|e| e.to_string())?.hits;
            Ok::<_, String>((found.map(|s| s.text), hits.into_iter().map(|h| h.text).collect::<Vec<_>>()))
        });
        match answer {
            Ok(Ok((found, hits))) => {
                assert_eq!((found.as_deref(), hits), (Some(text), vec![text.to_owned()]), "byte {at}");
            }
            Ok(Err(_)) | Err(_) => noticed += 1,
        }
        std::fs::write(&path, &whole).unwrap();
        let _ = std::fs::remove_file(path.with_extension("redb.opening"));
    }
    assert!(noticed > 0, "no flipped bit was noticed");
    assert_eq!(open(&path).get(id).unwrap().unwrap().text, text);
}

#[test]
fn no_word_stands_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let store = open(&path);
    let mut new = told("the combination is unmistakable-needle");
    new.request.source = Some(agentd_domain::agent_api::Source {
        kind: "user".into(),
        reference: Some("needle-reference".into()),
    });
    new.idempotency_key = Some("needle-key".into());
    new.detail.session = Some("needle-session".into());
    store.remember(new, None).unwrap();
    store.set_block("needle-goal".into(), Some("find the needle".into()), 0, true, NOW).unwrap();
    drop(store);
    let bytes = std::fs::read(&path).unwrap();
    for word in ["needle", "combin", "unmistak"] {
        assert!(!bytes.windows(word.len()).any(|w| w == word.as_bytes()), "`{word}` stands in the file");
    }
}

#[test]
fn many_writers_share_commits_and_all_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    let ids: Vec<_> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..16)
            .map(|writer| {
                let store = &store;
                scope.spawn(move || {
                    (0..20)
                        .map(|i| store.remember(told(&format!("writer{writer} item{i}")), None).unwrap().id)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        writers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    assert_eq!(ids.len(), 320);
    assert!(ids.iter().all(|id| store.get(*id).unwrap().is_some()));
    let counters = store.counters().unwrap();
    assert_eq!(counters.records(), 320);
    assert!(counters.commits < 320, "{} transactions for 320 records of 16 writers", counters.commits);
    store.check().unwrap();
}

#[test]
fn a_file_that_ends_its_readers_is_left_alone_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory.redb");
    let id = open(&path).remember(told("still here"), None).unwrap().id;
    let note = path.with_extension("redb.opening");
    // Two openings that did not return may have been two kills.
    std::fs::write(&note, [2]).unwrap();
    drop(open(&path));
    assert!(!note.exists(), "an opening that returns forgives those before");

    std::fs::write(&note, [3]).unwrap();
    let refused = Store::open(&path, options()).unwrap_err();
    assert_eq!(refused.report().code, "memory_damaged");
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(601);
    std::fs::File::options().write(true).open(&note).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(open(&path).get(id).unwrap().unwrap().text, "still here");
    assert!(!note.exists());
}

/// Writers that come one after the other at their own pace share a commit only if it waits for them.
#[test]
fn a_window_lets_slow_writers_share_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut slow = options();
    slow.tuning.group_window = std::time::Duration::from_millis(50);
    let store = Store::open(&dir.path().join("memory.redb"), slow).unwrap();
    let before = store.counters().unwrap().commits;
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let store = &store;
            scope.spawn(move || {
                // A millisecond apart: each would find the writer idle if it did not wait.
                std::thread::sleep(std::time::Duration::from_millis(writer));
                store.remember(told(&format!("writer{writer}")), None).unwrap();
            });
        }
    });
    let counters = store.counters().unwrap();
    assert_eq!(counters.records(), 8);
    assert!(counters.commits - before <= 4, "{} commits for 8 records", counters.commits - before);
}

#[test]
fn many_in_one_transaction_each_with_its_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("memory.redb"));
    let before = store.counters().unwrap().commits;
    let news = ["one", " ", "three"].map(|text| (told(text), None)).to_vec();
    let outcomes = store.remember_many(news).unwrap();
    assert!(matches!(outcomes.as_slice(), [Ok(_), Err(Refusal::TextEmpty), Ok(_)]), "{outcomes:?}");
    let counters = store.counters().unwrap();
    assert_eq!((counters.records(), counters.commits - before), (2, 1));
    store.check().unwrap();
}
