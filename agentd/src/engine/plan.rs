//! Which model is loaded or unloaded next?
//!
//! In:     what is installed and pinned, what the engine holds, what is to stay there, who waits for what. Out: one step.
//! Always: at most one load is under way: two large files at once only thrash the disk's cache. What goes is decided
//!         elsewhere (`agentd_gpu::evict`): here it is what is not to stay.
//! Pure.

use agentd_domain::device::Placement;
use agentd_domain::engine::{LoadModel, LoadedModel, ModelKind};
use std::collections::{BTreeMap, BTreeSet};

/// What may be loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The embedder of all memories. It is always loaded.
    pub embedder: Option<Choice>,
    /// In order of preference: the first that was not refused is `default`, the others are loaded when somebody asks for
    /// them by name.
    pub chat: Vec<Choice>,
    /// Further models that make vectors, loaded when somebody asks for them by name.
    pub embedding: Vec<Choice>,
    /// Of those and of chat models, the ones that are always loaded and never give way.
    pub pinned: BTreeSet<String>,
}

impl Wanted {
    pub fn has(&self, name: &str) -> bool {
        self.embedder.iter().chain(self.on_demand()).any(|choice| choice.name == name)
    }

    pub fn names(&self, choice: &Choice) -> bool {
        self.embedder.iter().chain(self.on_demand()).any(|one| one == choice)
    }

    /// All that come when somebody names them, and may go again.
    pub fn on_demand(&self) -> impl Iterator<Item = &Choice> + Clone {
        self.chat.iter().chain(&self.embedding)
    }

    /// Whether a model never gives way.
    pub fn stays(&self, name: &str) -> bool {
        self.pinned.contains(name) || self.embedder.as_ref().is_some_and(|choice| choice.name == name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub name: String,
    pub path: String,
    pub kind: ModelKind,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Load(Choice),
    Unload(String),
    /// All that can be loaded is.
    Settled,
}

/// What is to be in the engine.
#[derive(Debug, Clone, Copy)]
pub struct Stay<'a> {
    /// Loaded once, and not sent away since.
    pub resident: &'a BTreeSet<String>,
    /// Somebody waits for these, the most important first.
    pub waited_for: &'a [String],
}

/// `failed` holds the names that were refused; it is emptied when the wish changes.
pub fn next<T>(
    wanted: &Wanted,
    loaded: &[LoadedModel],
    failed: &BTreeMap<String, T>,
    stay: Stay<'_>,
) -> Next {
    let usable = |choice: &&Choice| !failed.contains_key(&choice.name);
    let waited = stay.waited_for.iter().filter_map(|name| wanted.on_demand().find(|one| one.name == *name));
    let pinned = wanted.on_demand().filter(|one| wanted.pinned.contains(&one.name));
    let resident = wanted.on_demand().filter(|one| stay.resident.contains(&one.name));
    let mut keep: Vec<&Choice> = Vec::new();
    for choice in wanted.embedder.iter().chain(waited).chain(pinned).chain(resident).filter(usable) {
        if !keep.contains(&choice) {
            keep.push(choice);
        }
    }
    // What is not to stay goes first: its memory may be what the next one needs. The same name at another path is
    // another file.
    let surplus = loaded.iter().find(|model| !keep.iter().any(|choice| is(choice, model)));
    if let Some(model) = surplus {
        return Next::Unload(model.model.clone());
    }
    let missing = keep.into_iter().find(|choice| !loaded.iter().any(|model| is(choice, model)));
    missing.map_or(Next::Settled, |choice| Next::Load(choice.clone()))
}

/// The chat model that `default` means: the first that was not refused.
pub fn chat<'a, T>(wanted: &'a Wanted, failed: &BTreeMap<String, T>) -> Option<&'a Choice> {
    wanted.chat.iter().find(|choice| !failed.contains_key(&choice.name))
}

/// Whether a refusal may be another one in a moment: others may have ended by then.
pub fn passes(report: &agentd_domain::fault::Report) -> bool {
    report.fault == agentd_domain::fault::Fault::Environment && report.code != ENDED_ENGINE
}

/// Of a file that ended engines.
pub const ENDED_ENGINE: &str = "model_ended_engine";

pub fn load(choice: &Choice, placement: Option<Placement>) -> LoadModel {
    LoadModel {
        model: choice.name.clone(),
        path: choice.path.clone(),
        kind: choice.kind,
        context_tokens: 0,
        sequences: 0,
        placement,
    }
}

pub fn is(choice: &Choice, model: &LoadedModel) -> bool {
    choice.name == model.model && choice.path == model.path && choice.kind == model.kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(name: &str, kind: ModelKind) -> Choice {
        Choice { name: name.to_owned(), path: format!("/m/{name}"), kind }
    }

    fn loaded(choice: &Choice) -> LoadedModel {
        LoadedModel {
            model: choice.name.clone(),
            path: choice.path.clone(),
            kind: choice.kind,
            architecture: String::new(),
            parameters: 0,
            file_bytes: 0,
            sha256: String::new(),
            context_tokens: 0,
            sequences: 0,
            dimension: 0,
            chat_template: None,
            sharing_refused: None,
            placement: None,
        }
    }

    fn wanted() -> Wanted {
        Wanted {
            embedder: Some(choice("minilm", ModelKind::Embedding)),
            chat: ["big", "tiny", "code", "small"].map(|name| choice(name, ModelKind::Chat)).into(),
            embedding: vec![choice("bge", ModelKind::Embedding)],
            pinned: BTreeSet::from(["code".to_owned()]),
        }
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn step(loaded: &[LoadedModel], resident: &[&str], waited_for: &[&str]) -> Next {
        let waited_for: Vec<String> = waited_for.iter().map(|name| (*name).to_owned()).collect();
        let stay = Stay { resident: &names(resident), waited_for: &waited_for };
        next(&wanted(), loaded, &BTreeMap::<String, ()>::new(), stay)
    }

    fn loads(name: &str) -> Next {
        let wanted = wanted();
        let all = wanted.embedder.iter().chain(&wanted.chat);
        Next::Load(all.clone().find(|one| one.name == name).expect("known").clone())
    }

    #[test]
    fn the_embedder_comes_first_then_who_is_waited_for_then_what_is_pinned_and_what_was_there() {
        let all: Vec<LoadedModel> = {
            let wanted = wanted();
            wanted.embedder.iter().chain(&wanted.chat).map(loaded).collect()
        };
        let of = |names: &[&str]| {
            all.iter().filter(|one| names.contains(&one.model.as_str())).cloned().collect::<Vec<_>>()
        };
        assert_eq!(step(&[], &["big"], &["tiny"]), loads("minilm"));
        assert_eq!(step(&of(&["minilm"]), &["big"], &["tiny"]), loads("tiny"));
        assert_eq!(step(&of(&["minilm", "tiny"]), &["big"], &["tiny"]), loads("code"));
        assert_eq!(step(&of(&["minilm", "tiny", "code"]), &["big"], &["tiny"]), loads("big"));
        assert_eq!(step(&of(&["minilm", "tiny", "code", "big"]), &["big"], &["tiny"]), Next::Settled);
        let gone = Next::Unload("small".to_owned());
        assert_eq!(step(&of(&["minilm", "tiny", "code", "big", "small"]), &["big"], &["tiny"]), gone);
    }

    #[test]
    fn a_further_embedding_model_comes_for_who_waits_and_stays_until_it_is_sent_away() {
        let wanted = wanted();
        let bge = &wanted.embedding[0];
        let there = [loaded(wanted.embedder.as_ref().expect("one")), loaded(&wanted.chat[2])];
        assert_eq!(step(&there, &[], &[]), Next::Settled);
        assert_eq!(step(&there, &[], &["bge"]), Next::Load(bge.clone()));
        let with_it = [&there[..], &[loaded(bge)]].concat();
        assert_eq!(step(&with_it, &["bge"], &[]), Next::Settled);
        assert_eq!(step(&with_it, &[], &[]), Next::Unload("bge".to_owned()));
    }

    #[test]
    fn a_refused_model_gives_way_to_the_next() {
        let wanted = wanted();
        let failed = BTreeMap::from([("big".to_owned(), ())]);
        assert_eq!(chat(&wanted, &failed).map(|one| one.name.as_str()), Some("tiny"));
        let stay = Stay { resident: &names(&["big"]), waited_for: &["big".to_owned()] };
        let held = [loaded(wanted.embedder.as_ref().expect("one")), loaded(&wanted.chat[2])];
        assert_eq!(next(&wanted, &held, &failed, stay), Next::Settled);
    }

    #[test]
    fn the_same_name_at_another_path_is_another_model() {
        let mut old = loaded(&wanted().chat[0]);
        old.path = "/elsewhere".to_owned();
        assert_eq!(step(&[old], &["big"], &[]), Next::Unload("big".to_owned()));
    }

    proptest! {
        /// Following the advice ends, and ends with what is to stay and nothing else.
        #[test]
        fn it_settles(
            before in prop::collection::btree_set(0..7usize, 0..7),
            refuses in prop::collection::vec(any::<bool>(), 7),
            stays in prop::collection::btree_set(0..7usize, 0..7),
            waits in prop::collection::vec(0..7usize, 0..4),
        ) {
            let wanted = wanted();
            let mut all: Vec<Choice> = wanted.embedder.iter().chain(wanted.on_demand()).cloned().collect();
            all.push(choice("old", ModelKind::Chat));
            let mut held: Vec<LoadedModel> = before.iter().map(|&at| loaded(&all[at])).collect();
            let resident: BTreeSet<String> = stays.iter().map(|&at| all[at].name.clone()).collect();
            let waited_for: Vec<String> = waits.iter().map(|&at| all[at].name.clone()).collect();
            let mut failed = BTreeMap::new();
            let stay = Stay { resident: &resident, waited_for: &waited_for };
            for _ in 0..40 {
                match next(&wanted, &held, &failed, stay) {
                    Next::Settled => {
                        for (at, choice) in all.iter().enumerate() {
                            let wished = choice.name == "minilm" || choice.name == "code"
                                || resident.contains(&choice.name) || waited_for.contains(&choice.name);
                            let there = held.iter().any(|model| is(choice, model));
                            let refused = failed.contains_key(&choice.name);
                            prop_assert_eq!(there, wished && choice.name != "old" && !refused, "{}", at);
                        }
                        return Ok(());
                    }
                    Next::Unload(name) => held.retain(|model| model.model != name),
                    Next::Load(choice) => {
                        let at = all.iter().position(|other| *other == choice).expect("known");
                        if refuses[at] { failed.insert(choice.name, ()); } else { held.push(loaded(&choice)); }
                    }
                }
            }
            prop_assert!(false, "it goes on for ever");
        }
    }
}
