//! How do several answers to one request come as one?
//!
//! Each choice is a generation of its own: the engine reads their common prompt once and lets the others wait for it.
//! Dropping what is said drops all of them.

use crate::handle::{Piece, Pieces};
use crate::meter::Used;
use agentd_domain::engine::{Done, FinishReason, Generate};
use agentd_domain::fault::Report;
use futures::Stream;
use futures::stream::{SelectAll, StreamExt, select_all};
use std::pin::Pin;

/// The request of one choice: a key of its own, and a seed of its own if there is one.
pub(crate) fn one(generate: &Generate, index: usize) -> Generate {
    let mut generate = generate.clone();
    if index > 0 {
        generate.key = format!("{}#{index}", generate.key);
        generate.sampling.seed = generate.sampling.seed.map(|seed| seed.wrapping_add(index as u32));
    }
    generate
}

type Numbered = Pin<Box<dyn Stream<Item = (usize, Option<Result<Piece, Report>>)> + Send>>;

/// What all choices say, in the order in which they say it.
pub(crate) struct Said {
    model: String,
    pieces: SelectAll<Numbered>,
    ends: Vec<Option<Done>>,
}

impl Said {
    pub(crate) fn new(model: String, all: Vec<Pieces>) -> Self {
        let ends = all.iter().map(|_| None).collect();
        let numbered = |(index, pieces): (usize, Pieces)| -> Numbered {
            // That a choice has ended is said too: one that ends without an end was cut short.
            let end = futures::stream::once(async { None });
            Box::pin(pieces.map(Some).chain(end).map(move |piece| (index, piece)))
        };
        Self { model, pieces: select_all(all.into_iter().enumerate().map(numbered)), ends }
    }

    pub(crate) fn count(&self) -> usize {
        self.ends.len()
    }

    /// The next piece and whose it is; `None` when a choice was cut short.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Piece)>, Report> {
        while let Some((index, piece)) = self.pieces.next().await {
            match piece {
                Some(Ok(piece)) => {
                    if let Piece::Done(done) = &piece {
                        self.ends[index] = Some(done.clone());
                    }
                    return Ok(Some((index, piece)));
                }
                Some(Err(report)) => return Err(report),
                None if self.ends[index].is_some() => {}
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// What was used, once all have ended. The prompt counts once, as OpenAI counts it.
    pub(crate) fn used(&self) -> Option<Used> {
        let ends: Vec<&Done> = self.ends.iter().flatten().collect();
        let first = ends.first().filter(|_| ends.len() == self.ends.len())?;
        Some(Used {
            model: self.model.clone(),
            prompt_tokens: first.prompt_tokens,
            completion_tokens: ends.iter().map(|done| done.completion_tokens).sum(),
            // The others found the first one's prompt: only its own finds are the cache's.
            cached_tokens: ends.iter().map(|done| done.cached_tokens).min().unwrap_or(0),
        })
    }

    pub(crate) fn reasons(&self) -> Vec<FinishReason> {
        self.ends.iter().flatten().map(|done| done.reason).collect()
    }
}
