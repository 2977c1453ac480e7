//! Do the thirty questions of `tests/fixtures/recall` really share no word with the thirty facts?
//!
//! A word here is a lemma: irregular forms are led back to their family, everything is stemmed, and two words that
//! begin with the same five letters count as one as well. Then words alone cannot answer, which the last test
//! shows on a store; that meaning can is measured with the real model (`tests/host`, B4).

use agentd_domain::agent_api::{Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Identity, NewRecord, Options, Store, text};
use std::collections::{BTreeMap, BTreeSet};

#[derive(serde::Deserialize)]
struct Pairs {
    pair: Vec<Pair>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    fact: String,
    question: String,
}

fn fixture(name: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/recall/");
    std::fs::read_to_string(format!("{path}{name}")).unwrap()
}

fn pairs() -> Vec<Pair> {
    toml::from_str::<Pairs>(&fixture("facts.toml")).unwrap().pair
}

/// Every irregular form to the stems of all families it may belong to ("left" is of "leave").
fn families() -> BTreeMap<String, BTreeSet<String>> {
    let mut families: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in fixture("irregular.txt").lines().filter(|l| !l.starts_with('#')) {
        let mut forms = line.split_whitespace();
        let lemma = forms.next().expect("no empty lines");
        for form in std::iter::once(lemma).chain(forms) {
            families.entry(form.to_owned()).or_default().insert(format!("={lemma}"));
        }
    }
    families
}

/// All marks by which a text's content words are recognised: stems and families.
fn marks(text: &str, families: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let mut marks: BTreeSet<String> = text::terms(text).into_iter().collect();
    for word in text::content_words(text) {
        marks.extend(families.get(&word).into_iter().flatten().cloned());
        // A regular ending on a form of the table: "drawers", "keepers".
        marks.extend(families.get(word.trim_end_matches('s')).into_iter().flatten().cloned());
        if word.chars().count() >= 5 {
            marks.insert(format!("{}-", word.chars().take(5).collect::<String>()));
        }
    }
    marks
}

#[test]
fn there_are_thirty_different_pairs() {
    let pairs = pairs();
    assert_eq!(pairs.len(), 30);
    let texts: BTreeSet<&str> = pairs.iter().flat_map(|p| [p.fact.as_str(), p.question.as_str()]).collect();
    assert_eq!(texts.len(), 60);
    for pair in &pairs {
        assert!(pair.fact.ends_with('.') && pair.question.ends_with('?'), "{}", pair.fact);
        assert!(
            text::terms(&pair.fact).len() >= 3 && !text::terms(&pair.question).is_empty(),
            "{}",
            pair.fact
        );
    }
}

#[test]
fn no_question_shares_a_content_word_with_any_fact() {
    let families = families();
    let pairs = pairs();
    for question in pairs.iter().map(|p| &p.question) {
        let asked = marks(question, &families);
        for fact in pairs.iter().map(|p| &p.fact) {
            let shared: Vec<_> = marks(fact, &families).intersection(&asked).cloned().collect();
            assert!(shared.is_empty(), "`{question}` and `{fact}` share {shared:?}");
        }
    }
}

#[test]
fn the_check_itself_notices_forms_stems_and_beginnings() {
    let families = families();
    for (one, other) in [
        ("I broke it", "will it break?"),
        ("my teeth hurt", "which tooth?"),
        ("she teaches", "a teacher"),
        ("we drove", "drivers"),
        ("allergic", "allergies"),
        ("electrician", "electricity"),
        ("moved", "moving"),
    ] {
        assert!(!marks(one, &families).is_disjoint(&marks(other, &families)), "{one} / {other}");
    }
    assert!(marks("my cat", &families).is_disjoint(&marks("which pet?", &families)));
}

#[test]
fn words_alone_find_at_most_six() {
    let dir = tempfile::tempdir().unwrap();
    let identity =
        Identity { agent_id: AgentId(uuid::Uuid::from_u128(1)), owner_id: OwnerId(uuid::Uuid::from_u128(2)) };
    let store =
        Store::open(&dir.path().join("memory.redb"), Options::new(identity, Budgets::agent())).unwrap();
    let pairs = pairs();
    for pair in &pairs {
        let request = Remember {
            tier: Tier::Spirit,
            text: pair.fact.clone(),
            role: None,
            source: None,
            event_unix_ms: None,
        };
        store
            .remember(
                NewRecord {
                    request,
                    recorded_unix_ms: 0,
                    idempotency_key: None,
                    detail: Default::default(),
                    with: vec![],
                },
                None,
            )
            .unwrap();
    }
    let found = pairs
        .iter()
        .filter(|pair| {
            let recall = Recall {
                query: pair.question.clone(),
                k: Some(1),
                tiers: vec![],
                budget_tokens: None,
                explain: false,
                signals: Some(Signals::Words),
                neighbours: None,
            };
            store.recall(&recall, None).unwrap().hits.first().is_some_and(|hit| hit.text == pair.fact)
        })
        .count();
    println!("words alone: {found} of 30");
    assert!(found <= 6, "{found} of 30");
}
