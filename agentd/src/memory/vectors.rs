//! Which texts' vectors are being made, or were made just now?
//!
//! One text is often wanted twice within seconds: an agent remembers a message and asks what it brings to mind.
//! Its vector is the dearest thing about it, so it is made once.
//!
//! Always: work that was begun goes on when its caller loses patience; who asks next joins it or finds it done.
//!         What failed is forgotten, so the next caller tries again.
//! Never:  a text; a digest of it stands here. One of these belongs to one store, so that no agent learns from
//!         the time of an answer what another one has stored.

use crate::engine::{Embedder, Engine};
use agentd_domain::fault::Report;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// A message and what is told around it; 1.5 KiB each with the built-in embedder.
const KEPT: usize = 8;

pub(super) type Vector = Arc<[f32]>;
/// Ready when the vector is; any number of callers may wait for it.
pub(super) type Making = Shared<BoxFuture<'static, Result<Vector, Report>>>;

#[derive(Default)]
pub(super) struct Vectors {
    /// The newest last.
    recent: Mutex<VecDeque<(Key, Making)>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    embedder: [u8; 32],
    text: [u8; 32],
}

impl Key {
    fn new(embedder: &Embedder, text: &str) -> Self {
        Self { embedder: embedder.digest, text: Sha256::digest(text.as_bytes()).into() }
    }
}

impl Vectors {
    /// The text's vector by this embedder; begins to make it unless that has been done.
    pub(super) fn of(&self, engine: &Engine, embedder: &Embedder, text: &str) -> Making {
        let key = Key::new(embedder, text);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(making) = find(&mut recent, key) {
            return making;
        }
        let (engine, model, text) = (engine.clone(), embedder.name.clone(), text.to_owned());
        // A task of its own: it ends even if nobody waits any longer.
        let task = tokio::spawn(async move {
            let mut answer = engine.embed_with(model, vec![text]).await?;
            answer.vectors.pop().map(Vector::from).ok_or_else(lost)
        });
        let making = async move { task.await.unwrap_or_else(|_| Err(lost())) }.boxed().shared();
        if recent.len() == KEPT {
            recent.pop_front();
        }
        recent.push_back((key, making.clone()));
        making
    }

    /// The same for a text whose vector somebody has asked for already; begins nothing.
    pub(super) fn known(&self, embedder: &Embedder, text: &str) -> Option<Making> {
        find(&mut self.recent.lock().unwrap_or_else(PoisonError::into_inner), Key::new(embedder, text))
    }
}

fn find(recent: &mut VecDeque<(Key, Making)>, key: Key) -> Option<Making> {
    recent.retain(|(_, making)| !matches!(making.peek(), Some(Err(_))));
    recent.iter().find(|(other, _)| *other == key).map(|(_, making)| making.clone())
}

pub(super) fn lost() -> Report {
    Report::bug(
        "embedding_lost",
        "a text got no vector",
        "the task that asked for it ended early",
        "try again",
    )
}
