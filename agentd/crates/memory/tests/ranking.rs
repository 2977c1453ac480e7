//! Does a store answer as the ranking does that sees the same records in memory, without a file?
//!
//! What is told, forgotten, superseded and used is random; the other side is a [`rank::Plain`] made of what the store says
//! that it holds.

use agentd_domain::agent_api::{Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::rank::{self, Facts, Nearness, Plain, Question, Weights};
use agentd_memory::{
    Asked, At, Budgets, Claim, Duplicates, ForgetMode, Identity, Listing, Made, NewRecord, Options, State,
    Store, Stored,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use uuid::Uuid;

const EMBEDDER: [u8; 32] = [3; 32];
const DIMENSION: usize = 8;
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
const BEGUN: i64 = 19_600 * DAY_MS;
const NOW: i64 = 19_700 * DAY_MS;

const WORDS: [&str; 12] = [
    "Ana:",
    "Bob:",
    "boat",
    "candle",
    "drum",
    "harbour",
    "yesterday",
    "what?",
    "Lisbon",
    "in October",
    "song",
    "we",
];

/// Of whole numbers up to 127, so that rounding to 8 bits takes nothing away.
fn vector_of(text: &str) -> Vec<f32> {
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut values: Vec<f32> =
        (0..DIMENSION).map(|at| (hash.rotate_left(at as u32 * 8) % 200) as f32 - 100.0).collect();
    values[(hash % DIMENSION as u64) as usize] = 127.0;
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

#[derive(Debug, Clone)]
struct Event {
    text: String,
    session: usize,
    working: bool,
    claim: Option<u8>,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let words = proptest::collection::vec(0usize..WORDS.len(), 1..7);
    let one = (words, 0usize..4, proptest::bool::weighted(0.2), proptest::option::weighted(0.2, 0u8..2));
    let event = one.prop_map(|(words, session, working, claim)| Event {
        text: words.into_iter().map(|at| WORDS[at]).collect::<Vec<_>>().join(" "),
        session,
        working,
        claim,
    });
    proptest::collection::vec(event, 1..40)
}

fn open(folder: &std::path::Path) -> Store {
    open_with(folder, Duplicates::Keep)
}

fn open_with(folder: &std::path::Path, duplicates: Duplicates) -> Store {
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    let mut options = Options::new(identity, Budgets::agent());
    options.tuning.duplicates = duplicates;
    let store = Store::open(&folder.join("memory.redb"), options).unwrap();
    store.use_embedder(EMBEDDER, DIMENSION as u32).unwrap();
    store
}

fn tell(store: &Store, events: &[Event]) -> Vec<RecordId> {
    let news = events.iter().enumerate().map(|(at, event)| {
        let request = Remember {
            tier: if event.working { Tier::Working } else { Tier::Spirit },
            text: event.text.clone(),
            role: None,
            source: None,
            event_unix_ms: Some(BEGUN + at as i64 * DAY_MS),
        };
        let mut new = NewRecord::new(request, BEGUN + at as i64 * DAY_MS);
        new.detail.session = (event.session > 0).then(|| format!("s{}", event.session));
        new.detail.claim = event.claim.map(|n| Claim {
            subject: format!("subject {n}"),
            predicate: "is".to_owned(),
            functional: true,
        });
        (new, None)
    });
    let told = store.remember_many(news.collect()).unwrap();
    told.into_iter().map(|told| told.unwrap().id).collect()
}

fn embed(store: &Store) {
    loop {
        let batch = store.pending_batch(16).unwrap();
        if batch.is_empty() {
            break;
        }
        let made = batch.into_iter().map(|p| Made { id: p.id, vector: vector_of(&p.text), with: p.with });
        store.complete_pending(EMBEDDER, made.collect()).unwrap();
    }
    let words = store.pending_words(1000).unwrap();
    let vectors = words.words.iter().map(|word| vector_of(word)).collect();
    store.complete_words(EMBEDDER, words, vectors).unwrap();
}

/// The store's records of these tiers as the ranking alone would be told of them, and what their windows' vectors are.
struct Other {
    plain: Plain,
    ids: Vec<RecordId>,
    vectors: Vec<Option<Vec<f32>>>,
}

fn other(store: &Store, tiers: &[Tier], at: At) -> Other {
    let mut all = store.list(&Listing { most: 10_000, ..Listing::default() }).unwrap();
    all.reverse();
    let mut other = Other { plain: Plain::default(), ids: Vec::new(), vectors: Vec::new() };
    let mut numbers: HashMap<(String, Tier), u64> = HashMap::new();
    let mut told: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for one in all.iter().filter(|one| tiers.contains(&one.tier) && one.life.state != State::Forgotten) {
        let next = numbers.len() as u64 + 1;
        let session = one.session.clone().map_or(0, |s| *numbers.entry((s, one.tier)).or_insert(next));
        let slot = other.plain.push(&one.text, session, one.event_unix_ms);
        let answers = match at {
            At::Latest => one.life.state == State::Live,
            At::Time(time) => one.life.holds_at(time),
        };
        if !answers {
            other.plain.silence(slot);
        }
        if one.life.uses > 0 {
            other.plain.set_usefulness(slot, (one.life.strength - 0.5) / 0.5);
        }
        let before = told.entry(session).or_default();
        let earlier: Vec<&str> =
            if session == 0 { Vec::new() } else { before.iter().map(String::as_str).collect() };
        let window = rank::window(&earlier, &one.text);
        other.vectors.push((one.tier == Tier::Spirit).then(|| vector_of(&window)));
        before.push(one.text.clone());
        other.ids.push(one.id);
    }
    // Words of the long memory have vectors, as they were first written.
    for one in all.iter().filter(|one| one.tier == Tier::Spirit && one.life.state != State::Forgotten) {
        for word in agentd_memory::text::content_words(&one.text) {
            other.plain.add_word(&agentd_memory::text::terms(&word)[0], &vector_of(&word));
        }
    }
    other
}

fn compare(store: &Store, other: &mut Other, request: &Recall, at: At) -> Result<(), TestCaseError> {
    let wanted = store.wanted(request).unwrap();
    // The answer as it would be told has the question's vector: a sum of two others would be rounded by the scan, and
    // with few records, whose cosines differ little, that counts for much.
    let mut vectors: Vec<Vec<f32>> = wanted.texts.iter().map(|text| vector_of(text)).collect();
    vectors[1] = vectors[0].clone();
    let with_meaning = request.signals != Some(Signals::Words);
    let cosines: Vec<f32> = other
        .vectors
        .iter()
        .map(|vector| match vector.as_ref().filter(|_| with_meaning) {
            Some(vector) => vector.iter().zip(&vectors[0]).map(|(a, b)| a * b).sum(),
            None => f32::NAN,
        })
        .collect();
    let asked = Asked { at, now_unix_ms: Some(NOW), vectors: wanted.clone().with(EMBEDDER, vectors.clone()) };
    let found = store.answer(request, &asked).unwrap();
    let question = Question::read(&request.query, NOW);
    for term in &question.terms {
        other.plain.add_asked(&term.text, &vector_of(&term.word));
    }
    let nearness = Nearness::new(&cosines);
    let Ok(expected) = rank::rank(&other.plain, &question, nearness, &Weights::MEASURED, 50);
    let clear = expected.windows(2).all(|pair| (pair[0].score - pair[1].score).abs() > 2e-2);
    prop_assert_eq!(found.hits.len(), expected.len());
    for (place, (hit, one)) in found.hits.iter().zip(&expected).enumerate() {
        if clear {
            prop_assert_eq!(hit.id, other.ids[one.slot], "place {}", place);
        }
        if place < 5 {
            prop_assert!(
                (hit.score - one.score).abs() < 2e-2,
                "place {}: {} {}",
                place,
                hit.score,
                one.score
            );
        }
        let explain = hit.explain.as_ref().unwrap();
        let sum: f32 = explain.signals.iter().map(|share| share.share).sum();
        prop_assert!((sum - hit.score).abs() < 1e-3, "{} {}", sum, hit.score);
    }
    Ok(())
}

fn asked(query: &str, tiers: &[Tier], signals: Signals) -> Recall {
    Recall {
        query: query.to_owned(),
        k: Some(50),
        tiers: tiers.to_vec(),
        explain: true,
        signals: Some(signals),
        ..Recall::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_store_answers_as_the_ranking_of_its_records(
        events in events(),
        forgotten in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
        used in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
        day in 0i64..40,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let ids = tell(&store, &events);
        // Windows are of what stands when they are made: what is forgotten later is in them still.
        let gone: Vec<RecordId> = forgotten.iter().map(|at| *at.get(&ids)).collect();
        store.forget(gone.clone(), ForgetMode::Tombstone, NOW).unwrap();
        embed(&store);
        store.used(used.iter().map(|at| *at.get(&ids)).filter(|id| !gone.contains(id)).collect(), NOW).unwrap();
        for tiers in [&[Tier::Spirit][..], &[Tier::Working], &[Tier::Working, Tier::Spirit]] {
            for at in [At::Latest, At::Time(BEGUN + day * DAY_MS)] {
                let mut other = other(&store, tiers, at);
                for query in ["When had Ana a boat?", "What drum and song in Lisbon yesterday?", "harbours of Bob"] {
                    for signals in [Signals::Both, Signals::Words] {
                        compare(&store, &mut other, &asked(query, tiers, signals), at)?;
                    }
                }
            }
        }
        // Loaded anew it is the same index that followed every change.
        let question = asked("When had Ana a boat?", &[Tier::Spirit], Signals::Words);
        let before: Vec<RecordId> = store.recall(&question, None).unwrap().hits.iter().map(|hit| hit.id).collect();
        store.drop_index();
        let after: Vec<RecordId> = store.recall(&question, None).unwrap().hits.iter().map(|hit| hit.id).collect();
        prop_assert_eq!(before, after);
        store.check().unwrap();
    }

    #[test]
    fn an_answer_keeps_to_its_budget_and_its_tiers(
        events in events(), budget in 0u32..60, neighbours in 0u32..4, k in 1u32..10
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        tell(&store, &events);
        for tiers in [vec![Tier::Spirit], vec![Tier::Working]] {
            let request = Recall {
                k: Some(k),
                budget_tokens: Some(budget),
                neighbours: Some(neighbours),
                ..asked("Ana boat drum Lisbon", &tiers, Signals::Words)
            };
            let hits = store.recall(&request, None).unwrap().hits;
            let tokens = |text: &String| text.chars().count().div_ceil(4) as u32;
            let spent: u32 = hits.iter().flat_map(|hit| {
                [&hit.text].into_iter().chain(&hit.before).chain(&hit.after)
            }).map(tokens).sum();
            prop_assert!(spent <= budget, "{} of {}", spent, budget);
            prop_assert!(hits.len() <= k as usize);
            for hit in &hits {
                prop_assert_eq!(hit.tier, tiers[0]);
                prop_assert!(hit.before.len().max(hit.after.len()) <= neighbours as usize);
                let told: Vec<&String> = events.iter().filter(|event| {
                    event.session > 0
                        && Some(format!("s{}", event.session)) == hit.session
                        && event.working == (hit.tier == Tier::Working)
                }).map(|event| &event.text).collect();
                let around: Vec<&String> = hit.before.iter().chain([&hit.text]).chain(&hit.after).collect();
                if hit.session.is_some() {
                    prop_assert!(told.windows(around.len()).any(|told| told == around), "{:?} in {:?}", around, told);
                } else {
                    prop_assert_eq!(around.len(), 1);
                }
            }
        }
    }
}

fn stored(store: &Store, id: RecordId) -> Stored {
    store.get(id).unwrap().unwrap()
}

#[test]
fn a_hit_says_why_it_was_found_and_what_was_told_around_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let told = |text: &str| Event { text: text.to_owned(), session: 1, working: false, claim: None };
    let events =
        ["Ana: hello", "Bob: I adopted a puppy", "Ana: What is it called?", "Bob: Biscuit."].map(told);
    tell(&store, &events);
    embed(&store);
    let request = Recall {
        query: "What is Bob's puppy called?".to_owned(),
        k: Some(1),
        explain: true,
        neighbours: Some(1),
        ..Recall::default()
    };
    let hits = store.recall(&request, None).unwrap().hits;
    let hit = &hits[0];
    assert_eq!((hit.session.as_deref(), hit.order.is_some()), (Some("s1"), true));
    assert!(hit.before.len() + hit.after.len() >= 1, "{hit:?}");
    let explain = hit.explain.as_ref().unwrap();
    assert_eq!(explain.signals.len(), rank::SIGNALS);
    assert!(explain.why.iter().any(|why| why.contains("bob says it")), "{:?}", explain.why);
    let share = explain.signals.iter().find(|share| share.signal == "speaker").unwrap();
    assert_eq!((share.value, share.share), (1.0, Weights::MEASURED.of(rank::Signal::Speaker)));
}

#[test]
fn use_decides_between_equals_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let told = |text: &str| Event { text: text.to_owned(), session: 0, working: false, claim: None };
    let ids = tell(&store, &["the boat is red", "the boat is blue", "a drum"].map(told));
    let request = asked("Which boat?", &[Tier::Spirit], Signals::Words);
    let first = |store: &Store| store.recall(&request, None).unwrap().hits[0].id;
    assert_eq!(first(&store), ids[1], "of equals the later");
    for _ in 0..20 {
        store.used(vec![ids[0], ids[2]], NOW).unwrap();
    }
    assert_eq!(first(&store), ids[0]);
    assert!(stored(&store, ids[0]).life.strength > 0.9);
    let hits = store.recall(&request, None).unwrap().hits;
    assert!(hits.iter().all(|hit| hit.id != ids[2]), "of use, but not to this question");
}

/// Nothing of a purged text stays behind in the vectors of those told after it.
#[test]
fn a_vector_goes_with_what_it_was_made_of() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let told = |text: &str| Event { text: text.to_owned(), session: 1, working: false, claim: None };
    let ids = tell(&store, &["Ana: a secret", "Bob: oh", "Ana: a boat", "Bob: a drum"].map(told));
    let batch = store.pending_batch(10).unwrap();
    assert_eq!(batch[2].text, "Ana: a secret\nBob: oh\nAna: a boat");
    assert_eq!(batch[2].with.len(), 2);
    embed(&store);
    assert_eq!(store.counters().unwrap().pending, 0);
    store.forget(vec![ids[0]], ForgetMode::Purge, NOW).unwrap();
    let batch = store.pending_batch(10).unwrap();
    let texts: Vec<&str> = batch.iter().map(|pending| pending.text.as_str()).collect();
    assert_eq!(texts, ["Bob: oh", "Bob: oh\nAna: a boat"], "of those two the vector knew it");
    store.check().unwrap();
    // A vector that was asked for before the purge and comes after it is not taken.
    let late = Made { id: batch[1].id, vector: vector_of("x"), with: vec![batch[0].id] };
    store.forget(vec![ids[1]], ForgetMode::Purge, NOW).unwrap();
    let completed = store.complete_pending(EMBEDDER, vec![late]).unwrap();
    assert_eq!((completed.embedded, store.counters().unwrap().pending), (0, 2));
    store.check().unwrap();
    embed(&store);
    assert_eq!(store.counters().unwrap().pending, 0);
    store.rewrite(NOW).unwrap();
    store.check().unwrap();
}

/// Facts that the index keeps are those that the ranking reads of the text.
#[test]
fn facts_of_a_record_are_those_of_its_text() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for (at, text) in ["Ana: Is it yours?", "note: next week", "We moved in 2019."].into_iter().enumerate() {
        let ids = tell(&store, &[Event { text: text.to_owned(), session: 0, working: false, claim: None }]);
        let life = stored(&store, ids[0]).life;
        let (told, facts) = (life.told.unwrap(), Facts::read(text, 0, 0));
        assert_eq!(
            (told.asks, told.tells_time, life.words),
            (facts.asks, facts.tells_time, facts.words),
            "{at}"
        );
        assert_eq!(told.speaker == 0, facts.speaker == 0);
    }
}

/// Vectors are of what was said around a text, too, so equal texts of two conversations lie apart.
#[test]
fn what_says_enough_is_one_memory_in_any_conversation_and_an_answer_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_with(folder.path(), Duplicates::Reinforce);
    let told = |text: &str, session| Event { text: text.to_owned(), session, working: false, claim: None };
    let ids = tell(
        &store,
        &[
            told("Bob: shall we sail?", 1),
            told("Yes, I do.", 1),
            told("Ana likes green tea", 1),
            told("a boat sank in the harbour", 2),
            told("Yes, I do.", 2),
            told("Ana likes green tea", 2),
        ],
    );
    embed(&store);
    let states: Vec<State> = ids.iter().map(|id| stored(&store, *id).life.state).collect();
    assert_eq!(states[..5], [State::Live; 5], "an answer belongs to what was asked");
    assert_eq!(states[5], State::Forgotten);
    assert_eq!(stored(&store, ids[2]).life.uses, 1);
    store.check().unwrap();
}
