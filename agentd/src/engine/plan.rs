//! Which model is loaded or unloaded next?
//!
//! Pure. At most one load is under way: two large files at once only thrash the disk's cache.

use agentd_domain::engine::{LoadModel, LoadedModel, ModelKind};
use std::collections::BTreeMap;

/// What is to be loaded, in order of preference.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The embedder of all memories.
    pub embedder: Option<Choice>,
    /// The first that loads becomes `default`; the others wait for its failure.
    pub chat: Vec<Choice>,
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

/// `failed` holds the names that the engine refused; it is emptied when the wish changes.
pub fn next<T>(wanted: &Wanted, loaded: &[LoadedModel], failed: &BTreeMap<String, T>) -> Next {
    let keep: Vec<&Choice> = wanted
        .embedder
        .iter()
        .filter(|choice| !failed.contains_key(&choice.name))
        .chain(chat(wanted, failed))
        .collect();
    // What is not wanted goes first: its memory may be what the wanted one needs. The same name at another path
    // is another file.
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

pub fn load(choice: &Choice) -> LoadModel {
    LoadModel {
        model: choice.name.clone(),
        path: choice.path.clone(),
        kind: choice.kind,
        context_tokens: 0,
        sequences: 0,
    }
}

fn is(choice: &Choice, model: &LoadedModel) -> bool {
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
        }
    }

    fn wanted() -> Wanted {
        Wanted {
            embedder: Some(choice("minilm", ModelKind::Embedding)),
            chat: vec![choice("big", ModelKind::Chat), choice("tiny", ModelKind::Chat)],
        }
    }

    #[test]
    fn the_embedder_comes_first_then_the_preferred_chat_model() {
        let (wanted, none) = (wanted(), BTreeMap::<String, ()>::new());
        let minilm = wanted.embedder.clone().expect("one");
        assert_eq!(next(&wanted, &[], &none), Next::Load(minilm.clone()));
        assert_eq!(next(&wanted, &[loaded(&minilm)], &none), Next::Load(wanted.chat[0].clone()));
        assert_eq!(next(&wanted, &[loaded(&minilm), loaded(&wanted.chat[0])], &none), Next::Settled);
    }

    #[test]
    fn a_refused_model_gives_way_to_the_next() {
        let wanted = wanted();
        let failed = BTreeMap::from([("big".to_owned(), ())]);
        let minilm = wanted.embedder.clone().expect("one");
        assert_eq!(next(&wanted, &[loaded(&minilm)], &failed), Next::Load(wanted.chat[1].clone()));
    }

    #[test]
    fn the_same_name_at_another_path_is_another_model() {
        let (wanted, none) = (wanted(), BTreeMap::<String, ()>::new());
        let mut old = loaded(&wanted.chat[0]);
        old.path = "/elsewhere".to_owned();
        assert_eq!(next(&wanted, &[old], &none), Next::Unload("big".to_owned()));
    }

    proptest! {
        /// Following the advice ends, and ends with what is wanted and nothing else.
        #[test]
        fn it_settles(before in prop::collection::vec(0..4usize, 0..4), refuses in prop::collection::vec(any::<bool>(), 4)) {
            let all = [choice("minilm", ModelKind::Embedding), choice("big", ModelKind::Chat), choice("tiny", ModelKind::Chat), choice("old", ModelKind::Chat)];
            let mut held: Vec<LoadedModel> = before.iter().map(|&at| loaded(&all[at])).collect();
            held.sort_by(|a, b| a.model.cmp(&b.model));
            held.dedup();
            let mut failed = BTreeMap::new();
            for _ in 0..20 {
                match next(&wanted(), &held, &failed) {
                    Next::Settled => {
                        let expect = [&all[0]].into_iter().chain([&all[1], &all[2]]).find(|c| !failed.contains_key(&c.name));
                        prop_assert!(held.len() <= 2);
                        prop_assert!(held.iter().all(|model| model.model != "old"));
                        if let Some(choice) = expect {
                            prop_assert!(held.iter().any(|model| is(choice, model)));
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
            prop_assert!(false, "it never settles");
        }
    }
}
