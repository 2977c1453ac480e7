//! Does a store that looks only where it is worth looking still find what is near?

use agentd_domain::agent_api::{Recall, Remember, Signals, Tier};
use agentd_domain::ids::{AgentId, OwnerId};
use agentd_memory::{Budgets, Duplicates, Embedding, ForgetMode, Identity, NewRecord, Options, Store};
use uuid::Uuid;

const EMBEDDER: [u8; 32] = [4; 32];
const DIMENSION: usize = 16;

fn vector(number: usize) -> Vec<f32> {
    let part =
        |seed: usize, at: usize| ((seed * 7919 + at * 104_729 + seed * at * 31) % 1000) as f32 / 1000.0 - 0.5;
    let vector: Vec<f32> =
        (0..DIMENSION).map(|at| part(number % 97 + 1, at) + 0.3 * part(number + 1000, at)).collect();
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    vector.into_iter().map(|v| v / length).collect()
}

fn told(number: usize) -> (NewRecord, Option<Embedding>) {
    let request = Remember {
        tier: Tier::Spirit,
        text: format!("record {number}"),
        role: None,
        source: None,
        event_unix_ms: None,
    };
    (NewRecord::new(request, number as i64), Some(Embedding { embedder: EMBEDDER, vector: vector(number) }))
}

fn nearest(store: &Store, number: usize, k: u32) -> Vec<String> {
    let request =
        Recall { query: "x".to_owned(), k: Some(k), signals: Some(Signals::Meaning), ..Recall::default() };
    let embedding = Embedding { embedder: EMBEDDER, vector: vector(number) };
    let hits = store.recall(&request, Some(&embedding)).unwrap().hits;
    hits.into_iter().map(|hit| hit.text).collect()
}

#[test]
fn what_is_told_after_the_cells_were_made_is_found_and_what_goes_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let identity = Identity { agent_id: AgentId(Uuid::from_u128(1)), owner_id: OwnerId(Uuid::from_u128(2)) };
    let mut options = Options::new(identity, Budgets::agent());
    options.tuning.duplicates = Duplicates::Keep;
    options.tuning.cells_from = 1000;
    let store = Store::open(&folder.path().join("memory.redb"), options).unwrap();
    store.use_embedder(EMBEDDER, DIMENSION as u32).unwrap();
    let tell = |numbers: std::ops::Range<usize>| {
        let ids = store.remember_many(numbers.map(told).collect()).unwrap();
        ids.into_iter().map(|one| one.unwrap().id).collect::<Vec<_>>()
    };
    // Without cells, at the bound, and beyond it: each record is nearest itself.
    let ids = tell(0..900);
    assert_eq!(nearest(&store, 500, 1), ["record 500"]);
    tell(900..1500);
    assert_eq!(nearest(&store, 1400, 1), ["record 1400"]);
    // More than twice as many as the cells were made for.
    tell(1500..3300);
    let own =
        (0..3300).step_by(33).filter(|number| nearest(&store, *number, 1) == [format!("record {number}")]);
    assert!(own.count() >= 98);
    store.forget(vec![ids[500]], ForgetMode::Purge, 5000).unwrap();
    assert!(!nearest(&store, 500, 10).contains(&"record 500".to_owned()));
    store.check().unwrap();
}
