//! Which files are models, what are they called, and which are to be loaded?
//!
//! Pure: a list of files in, names and an order of preference out.

use crate::engine::{Choice, Wanted};
use agentd_domain::engine::ModelKind;
use agentd_domain::paths;
use std::collections::BTreeSet;

/// Names of the models that are part of the image.
pub const EMBEDDER: &str = "minilm";
pub const TINY: &str = "tiny";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    Medium,
    Data,
    Image,
}

impl Origin {
    pub fn word(self) -> &'static str {
        match self {
            Self::Medium => "medium",
            Self::Data => "data",
            Self::Image => "image",
        }
    }
}

/// A file that ends with `.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub origin: Origin,
    pub path: String,
    /// Without the folder.
    pub file: String,
    pub kind: ModelKind,
    /// Whether its header was good.
    pub good: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub found: Found,
}

/// Gives every file a name of its own. The image's come first, so that nobody can take their names.
pub fn name(mut files: Vec<Found>) -> Vec<Named> {
    files.sort_by(|a, b| b.origin.cmp(&a.origin).then_with(|| a.file.cmp(&b.file)));
    let mut taken = BTreeSet::new();
    let mut named = Vec::new();
    for found in files {
        let wish = match (found.origin, found.file.as_str()) {
            (Origin::Image, paths::BUILTIN_EMBEDDER) => EMBEDDER.to_owned(),
            (Origin::Image, paths::BUILTIN_TINY) => TINY.to_owned(),
            (_, file) => safe(file.strip_suffix(".gguf").unwrap_or(file)),
        };
        let mut name = wish.clone();
        let mut number = 2;
        while !taken.insert(name.clone()) {
            name = format!("{wish}-{number}");
            number += 1;
        }
        named.push(Named { name, found });
    }
    named.sort_by(|a, b| a.name.cmp(&b.name));
    named
}

/// The embedder is the image's own: what stands in memories was made by it; others make vectors for who names them. For chat
/// the owner's models come first, those on an extra medium before all, because they were put in for this boot.
pub fn wanted(models: &[Named], pinned: &BTreeSet<String>) -> Wanted {
    let choice = |model: &Named| Choice {
        name: model.name.clone(),
        path: model.found.path.clone(),
        kind: model.found.kind,
    };
    let embedder = models.iter().find(|model| model.name == EMBEDDER && model.found.good).map(choice);
    let mut chat: Vec<_> =
        models.iter().filter(|model| model.found.good && model.found.kind == ModelKind::Chat).collect();
    chat.sort_by_key(|model| (model.found.origin, model.name == TINY));
    let chat: Vec<Choice> = chat.into_iter().map(choice).collect();
    let others = models.iter().filter(|model| model.found.good && model.found.kind == ModelKind::Embedding);
    let embedding: Vec<Choice> = others.filter(|model| model.name != EMBEDDER).map(choice).collect();
    // A pin outlives its model: it holds again when one of that name comes back.
    let names = chat.iter().chain(&embedding).map(|one| &one.name);
    let pinned = names.filter(|name| pinned.contains(*name)).cloned().collect();
    Wanted { embedder, chat, embedding, pinned }
}

/// As `api::ModelName` allows it.
fn safe(text: &str) -> String {
    let safe: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(90)
        .collect();
    if safe.is_empty() { "model".to_owned() } else { safe }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::api::ModelName;
    use proptest::prelude::*;

    fn found(origin: Origin, file: &str, kind: ModelKind) -> Found {
        Found { origin, path: format!("/{file}"), file: file.to_owned(), kind, good: true }
    }

    fn image() -> Vec<Found> {
        vec![
            found(Origin::Image, paths::BUILTIN_EMBEDDER, ModelKind::Embedding),
            found(Origin::Image, paths::BUILTIN_TINY, ModelKind::Chat),
        ]
    }

    fn names(wanted: &Wanted) -> Vec<&str> {
        wanted.chat.iter().map(|choice| choice.name.as_str()).collect()
    }

    #[test]
    fn alone_the_image_offers_its_tiny_model() {
        let wanted = wanted(&name(image()), &BTreeSet::new());
        assert_eq!(wanted.embedder.as_ref().map(|choice| choice.name.as_str()), Some(EMBEDDER));
        assert_eq!(names(&wanted), [TINY]);
    }

    #[test]
    fn the_owners_models_come_before_the_images() {
        let mut files = image();
        files.push(found(Origin::Data, "b.gguf", ModelKind::Chat));
        files.push(found(Origin::Data, "a.gguf", ModelKind::Chat));
        files.push(found(Origin::Medium, "usb.gguf", ModelKind::Chat));
        files.push(found(Origin::Data, "e.gguf", ModelKind::Embedding));
        files.push(Found { good: false, ..found(Origin::Data, "broken.gguf", ModelKind::Chat) });
        let wanted = wanted(&name(files), &BTreeSet::from(["e".to_owned(), "gone".to_owned()]));
        assert_eq!(names(&wanted), ["usb", "a", "b", TINY]);
        // A further embedding model is nobody's memory: it comes when it is named, or is pinned.
        assert_eq!(wanted.embedder.as_ref().map(|choice| choice.name.as_str()), Some(EMBEDDER));
        assert_eq!(wanted.embedding.iter().map(|choice| choice.name.as_str()).collect::<Vec<_>>(), ["e"]);
        assert_eq!(wanted.pinned, BTreeSet::from(["e".to_owned()]));
    }

    #[test]
    fn nobody_takes_the_images_names() {
        let mut files = image();
        files.insert(0, found(Origin::Medium, "tiny.gguf", ModelKind::Chat));
        let named = name(files);
        let tiny = named.iter().find(|model| model.name == TINY).expect("there");
        assert_eq!(tiny.found.origin, Origin::Image);
        assert!(named.iter().any(|model| model.name == "tiny-2"));
    }

    proptest! {
        #[test]
        fn every_name_is_good_and_one_of_its_kind(files in prop::collection::vec(".{0,120}", 0..20)) {
            let files = files.iter().map(|file| found(Origin::Data, &format!("{file}.gguf"), ModelKind::Chat)).collect::<Vec<_>>();
            let count = files.len();
            let named = name(files);
            let names: BTreeSet<_> = named.iter().map(|model| model.name.clone()).collect();
            prop_assert_eq!(names.len(), count);
            for name in names {
                prop_assert!(ModelName::try_from(name.clone()).is_ok(), "{}", name);
            }
        }
    }
}
