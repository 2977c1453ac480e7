//! Does the store do what a plain list would do?
//!
//! Random works on a real file, reopened at random, beside a model: a list of records, the ranking over them
//! without a file, exact cosines. After every step counters agree; every question must give the
//! model's answer.

use agentd_domain::agent_api::{EmbedState, Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::rank::{Nearness, Plain, Question, Weights, rank};
use agentd_memory::{
    Budget, Budgets, Duplicates, Embedding, Identity, NewRecord, Options, Refusal, Store, StoreError,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use uuid::Uuid;

/// Few words, so that they meet.
const WORDS: [&str; 12] =
    ["cat", "dogs", "river", "running", "blue", "tea", "the", "green", "house", "and", "ana", "moon"];
const DIMENSION: [u32; 2] = [3, 5];
const RECORDS_MOST: u64 = 12;

#[derive(Debug, Clone)]
enum Step {
    Remember {
        words: Vec<usize>,
        working: bool,
        vector: Option<[i8; 5]>,
        key: Option<u8>,
    },
    /// Embed so many pending records.
    Complete {
        most: usize,
        vector: [i8; 5],
    },
    UseEmbedder(usize),
    Reopen,
    Recall {
        words: Vec<usize>,
        vector: [i8; 5],
        signals: Signals,
        k: u32,
        both_tiers: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let words = || proptest::collection::vec(0..WORDS.len(), 1..8);
    let vector = || any::<[i8; 5]>();
    let signals = prop_oneof![Just(Signals::Both), Just(Signals::Words), Just(Signals::Meaning)];
    let step = prop_oneof![
        6 => (words(), any::<bool>(), proptest::option::of(vector()), proptest::option::weighted(0.3, 0u8..4))
            .prop_map(|(words, working, vector, key)| Step::Remember { words, working, vector, key }),
        2 => (1usize..4, vector()).prop_map(|(most, vector)| Step::Complete { most, vector }),
        1 => (0usize..2).prop_map(Step::UseEmbedder),
        1 => Just(Step::Reopen),
        4 => (words(), vector(), signals, 1u32..6, any::<bool>())
            .prop_map(|(words, vector, signals, k, both_tiers)| Step::Recall { words, vector, signals, k, both_tiers }),
    ];
    proptest::collection::vec(step, 1..24)
}

fn sentence(words: &[usize]) -> String {
    words.iter().map(|w| WORDS[*w]).collect::<Vec<_>>().join(" ")
}

/// A vector of this embedder's dimension; never zero.
fn vector(numbers: [i8; 5], embedder: usize) -> Vec<f32> {
    // Of whole numbers up to 127, so that rounding to 8 bits takes nothing away.
    let mut values: Vec<f32> =
        numbers.iter().take(DIMENSION[embedder] as usize).map(|n| f32::from((*n).max(-127))).collect();
    values[0] = 127.0;
    values
}

fn digest(embedder: usize) -> [u8; 32] {
    [embedder as u8 + 1; 32]
}

#[derive(Debug, Clone)]
struct Known {
    id: RecordId,
    tier: Tier,
    text: String,
    /// The last vector it got, and whose.
    vector: Option<(usize, Vec<f32>)>,
}

#[derive(Default)]
struct Model {
    records: Vec<Known>,
    keys: BTreeMap<u8, usize>,
    embedder: Option<usize>,
}

impl Model {
    fn current<'a>(&self, record: &'a Known) -> Option<&'a [f32]> {
        record.vector.as_ref().filter(|(e, _)| Some(*e) == self.embedder).map(|(_, v)| v.as_slice())
    }

    fn pending(&self) -> Vec<usize> {
        (0..self.records.len())
            .filter(|i| self.records[*i].tier == Tier::Knowledge && self.current(&self.records[*i]).is_none())
            .collect()
    }

    /// Score of every record that has anything to do with the question.
    fn answer(
        &self,
        query: &str,
        vector: Option<&[f32]>,
        signals: Signals,
        tiers: &[Tier],
    ) -> Vec<(usize, f32)> {
        let held: Vec<usize> =
            (0..self.records.len()).filter(|i| tiers.contains(&self.records[*i].tier)).collect();
        let cosines: Vec<f32> = held
            .iter()
            .map(|i| vector.and_then(|v| self.current(&self.records[*i]).map(|own| cosine(v, own))))
            .map(|cosine| cosine.unwrap_or(f32::NAN))
            .collect();
        if signals == Signals::Meaning {
            return held.into_iter().zip(cosines).filter(|(_, cosine)| cosine.is_finite()).collect();
        }
        let mut plain = Plain::default();
        for i in &held {
            plain.push(&self.records[*i].text, 0, 1000);
        }
        let question = Question::read(query, 1000);
        let Ok(ranked) = rank(&plain, &question, Nearness::new(&cosines), &Weights::MEASURED, 50);
        ranked.into_iter().map(|one| (held[one.slot], one.score)).collect()
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())
}

fn open(path: &Path) -> Store {
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    let budgets = Budgets::new([
        (Tier::Knowledge, Budget { records: RECORDS_MOST, bytes: u64::MAX }),
        (Tier::Working, Budget { records: u64::MAX, bytes: u64::MAX }),
    ]);
    // The model is a list: told twice is stored twice.
    let mut options = Options::new(identity, budgets);
    options.tuning.duplicates = Duplicates::Keep;
    Store::open(path, options).unwrap()
}

fn remember(
    store: &Store,
    model: &mut Model,
    words: &[usize],
    working: bool,
    numbers: Option<[i8; 5]>,
    key: Option<u8>,
) -> Result<(), TestCaseError> {
    let tier = if working { Tier::Working } else { Tier::Knowledge };
    let sentence = sentence(words);
    let request = Remember { tier, text: sentence.clone(), role: None, source: None, event_unix_ms: None };
    let idempotency_key = key.map(|k| format!("key {k}"));
    let embedding = numbers.zip(model.embedder).map(|(numbers, embedder)| Embedding {
        embedder: digest(embedder),
        vector: vector(numbers, embedder),
    });
    let result = store.remember(
        NewRecord {
            request,
            recorded_unix_ms: 1000,
            idempotency_key,
            detail: Default::default(),
            with: vec![],
        },
        embedding.clone(),
    );

    if let Some(earlier) = key.and_then(|k| model.keys.get(&k)) {
        let earlier = &model.records[*earlier];
        if earlier.text == sentence && earlier.tier == tier {
            prop_assert_eq!(result.unwrap().id, earlier.id);
        } else {
            prop_assert!(matches!(result, Err(StoreError::Refused(Refusal::KeyReused))), "{:?}", result);
        }
        return Ok(());
    }
    let in_knowledge = model.records.iter().filter(|r| r.tier == Tier::Knowledge).count() as u64;
    if tier == Tier::Knowledge && in_knowledge == RECORDS_MOST {
        prop_assert!(matches!(result, Err(StoreError::Refused(Refusal::TierFull { .. }))), "{:?}", result);
        return Ok(());
    }
    let remembered = result.unwrap();
    let vector = embedding
        .filter(|_| tier == Tier::Knowledge)
        .zip(model.embedder)
        .map(|(e, embedder)| (embedder, e.vector));
    let expected = match (tier, &vector) {
        (Tier::Knowledge, Some(_)) => EmbedState::Embedded,
        (Tier::Knowledge, None) => EmbedState::Pending,
        _ => EmbedState::WordsOnly,
    };
    prop_assert_eq!(remembered.state, expected);
    if let Some(key) = key {
        model.keys.insert(key, model.records.len());
    }
    model.records.push(Known { id: remembered.id, tier, text: sentence, vector });
    Ok(())
}

fn complete(store: &Store, model: &mut Model, most: usize, numbers: [i8; 5]) -> Result<(), TestCaseError> {
    let batch = store.pending_batch(most).unwrap();
    let pending = model.pending();
    let expected: Vec<RecordId> = pending.iter().take(most).map(|i| model.records[*i].id).collect();
    prop_assert_eq!(batch.iter().map(|p| p.id).collect::<Vec<_>>(), expected);
    let Some(embedder) = model.embedder else { return Ok(()) };
    let vectors = batch.iter().map(|p| (p.id, vector(numbers, embedder))).collect();
    prop_assert_eq!(
        store.complete_embedding(digest(embedder), vectors).unwrap().embedded,
        batch.len() as u64
    );
    for i in pending.into_iter().take(most) {
        model.records[i].vector = Some((embedder, vector(numbers, embedder)));
    }
    Ok(())
}

fn recall(
    store: &Store,
    model: &Model,
    words: &[usize],
    numbers: [i8; 5],
    signals: Signals,
    k: u32,
    tiers: Vec<Tier>,
) -> Result<(), TestCaseError> {
    let query = sentence(words);
    let embedding = model
        .embedder
        .map(|embedder| Embedding { embedder: digest(embedder), vector: vector(numbers, embedder) });
    let request = Recall {
        query: query.clone(),
        k: Some(k),
        tiers: tiers.clone(),
        budget_tokens: None,
        explain: false,
        signals: Some(signals),
        neighbours: None,
    };
    let result = store.recall(&request, embedding.as_ref());
    if signals == Signals::Meaning && embedding.is_none() {
        prop_assert!(matches!(result, Err(StoreError::EmbedderAway)), "{:?}", result);
        return Ok(());
    }
    let found = result.unwrap();
    let asked = embedding.as_ref().filter(|_| signals != Signals::Words).map(|e| e.vector.as_slice());
    let scores: BTreeMap<RecordId, f32> = model
        .answer(&query, asked, signals, &tiers)
        .into_iter()
        .map(|(i, s)| (model.records[i].id, s))
        .collect();
    prop_assert_eq!(found.hits.len(), scores.len().min(k as usize));
    let mut expected: Vec<f32> = scores.values().copied().collect();
    expected.sort_by(|a, b| b.total_cmp(a));
    for (hit, expected) in found.hits.iter().zip(expected) {
        // Rounded vectors: equal scores may change places, so scores are compared, each with its own record's.
        let own = scores.get(&hit.id).copied().unwrap_or(f32::NAN);
        prop_assert!((hit.score - own).abs() < 2e-3, "`{}`: {} instead of {own}", hit.text, hit.score);
        prop_assert!(
            (hit.score - expected).abs() < 2e-3,
            "`{}`: {} where {expected} is best",
            hit.text,
            hit.score
        );
    }
    Ok(())
}

fn agree(store: &Store, model: &Model) -> Result<(), TestCaseError> {
    let checked = store.check().unwrap();
    let pending = model.pending().len() as u64;
    let spirit = model.records.iter().filter(|r| r.tier == Tier::Knowledge).count() as u64;
    prop_assert_eq!((checked.records, checked.pending), (model.records.len() as u64, pending));
    prop_assert_eq!(checked.vectors, spirit - pending);
    let ids: BTreeSet<RecordId> = model.records.iter().map(|r| r.id).collect();
    prop_assert_eq!(ids.len(), model.records.len(), "ids are unique");
    for record in &model.records {
        let stored = store.get(record.id).unwrap().unwrap();
        prop_assert_eq!((&stored.text, stored.tier), (&record.text, record.tier));
        prop_assert_eq!(stored.embedder, record.vector.as_ref().map(|(e, _)| digest(*e)));
    }
    Ok(())
}

proptest! {
    // Every step is a transaction with its fsyncs.
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_store_is_a_list_that_survives(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.redb");
        let mut store = open(&path);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Remember { words, working, vector, key } => remember(&store, &mut model, &words, working, vector, key)?,
                Step::Complete { most, vector } => complete(&store, &mut model, most, vector)?,
                Step::UseEmbedder(embedder) => {
                    let used = store.use_embedder(digest(embedder), DIMENSION[embedder]).unwrap();
                    prop_assert_eq!(used.changed, model.embedder != Some(embedder));
                    model.embedder = Some(embedder);
                    prop_assert_eq!(used.pending, model.pending().len() as u64);
                }
                Step::Reopen => {
                    drop(store);
                    store = open(&path);
                }
                Step::Recall { words, vector, signals, k, both_tiers } => {
                    let tiers = if both_tiers { vec![Tier::Working, Tier::Knowledge] } else { vec![Tier::Knowledge] };
                    recall(&store, &model, &words, vector, signals, k, tiers)?;
                }
            }
            agree(&store, &model)?;
        }
        drop(store);
        agree(&open(&path), &model)?;
    }
}
