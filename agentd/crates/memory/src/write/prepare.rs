//! What of a record can be made ready before its transaction begins?
//!
//! There is one writer, and everything it does delays everybody's acknowledgement. So whoever tells a record finds
//! its words and rounds its vector on the own thread; many records are shared out over the machine's cores.
//!
//! Always: the writer comes to the same by itself. What was made ready under another key (the store was written
//!         anew meanwhile) or for another dimension is made again.

use super::Embedding;
use crate::life::Told;
use crate::seal::{Hashed, Mark, Seal};
use crate::text::{self, Words};
use crate::vector::{BadVector, Vector};
use std::collections::HashMap;

/// The terms of a text as they stand on disk, each once, and how often it occurs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Which key the marks were made with.
    seal: u64,
    pub(crate) marks: Vec<(Mark, u32)>,
    /// How many words that are.
    pub(crate) words: u32,
    /// What else the text tells.
    pub(crate) told: Told,
}

/// A vector of the embedder that it says, of length 1 and rounded already.
#[derive(Debug, Clone)]
pub(crate) struct Meaning {
    pub(crate) embedding: Embedding,
    vector: Result<Vector, BadVector>,
}

/// What was made ready of a record.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ready {
    pub(crate) terms: Option<Terms>,
    pub(crate) meaning: Option<Meaning>,
}

impl Terms {
    /// Are they this key's?
    pub(crate) fn are_of(&self, seal: &Seal) -> bool {
        self.seal == seal.number()
    }
}

impl Meaning {
    pub(crate) fn of(embedding: Embedding) -> Self {
        let dimension = u32::try_from(embedding.vector.len()).unwrap_or(u32::MAX);
        let vector = Vector::new(&embedding.vector, dimension);
        if let Ok(vector) = &vector {
            vector.parts();
        }
        Self { embedding, vector }
    }

    /// The vector, if it has this dimension.
    pub(crate) fn vector(&self, dimension: u32) -> Result<&Vector, BadVector> {
        let got = self.embedding.vector.len();
        match got == dimension as usize {
            true => self.vector.as_ref().map_err(|why| *why),
            false => Err(BadVector::Dimension { expected: dimension, got }),
        }
    }
}

/// Words that are looked up rather than stemmed and hashed; a language's usual ones are fewer.
const KNOWN_MOST: usize = 16 * 1024;

/// Turns texts into marks. Meeting a word again costs a look-up.
pub(crate) struct Marker<'a> {
    seal: &'a Seal,
    words: Words,
    /// None: a word that carries no content.
    known: HashMap<String, Option<Mark>>,
}

impl<'a> Marker<'a> {
    pub(crate) fn new(seal: &'a Seal) -> Self {
        Self { seal, words: Words::default(), known: HashMap::new() }
    }

    pub(crate) fn terms(&mut self, text: &str) -> Terms {
        let (known, seal) = (&mut self.known, self.seal);
        let mut all: Vec<Mark> = Vec::with_capacity(text.len() / 8);
        self.words.for_each(text, |word, stemmer| {
            let mark = match known.get(word) {
                Some(mark) => *mark,
                None => {
                    let term = text::term_of(word, stemmer);
                    let mark = term.map(|term| seal.mark(Hashed::Term, term.as_bytes()));
                    if known.len() < KNOWN_MOST {
                        known.insert(word.to_owned(), mark);
                    }
                    mark
                }
            };
            all.extend(mark);
        });
        let words = u32::try_from(all.len()).unwrap_or(u32::MAX);
        all.sort_unstable();
        let mut marks: Vec<(Mark, u32)> = Vec::with_capacity(all.len());
        for mark in all {
            match marks.last_mut() {
                Some((last, count)) if *last == mark => *count += 1,
                _ => marks.push((mark, 1)),
            }
        }
        let told = Told::read(text, |term| seal.mark(Hashed::Term, term.as_bytes()));
        Terms { seal: seal.number(), marks, words, told }
    }
}

/// Fewer are not worth a thread.
const PER_THREAD_LEAST: usize = 128;

/// Makes many records ready: `make` is called for each, with a marker of its thread.
pub(crate) fn share_out<T: Send>(
    items: &mut [T],
    seal: &Seal,
    make: impl Fn(&mut T, &mut Marker<'_>) + Sync,
) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (items.len() / PER_THREAD_LEAST).clamp(1, cores);
    let each = items.len().div_ceil(threads).max(1);
    let work = |part: &mut [T]| {
        let mut marker = Marker::new(seal);
        part.iter_mut().for_each(|item| make(item, &mut marker));
    };
    std::thread::scope(|scope| {
        let mut parts = items.chunks_mut(each);
        let own = parts.next();
        for part in parts {
            scope.spawn(|| work(part));
        }
        own.into_iter().for_each(work);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zeroize::Zeroizing;

    proptest! {
        #[test]
        fn marks_are_those_of_the_terms(text in prop_oneof![".{0,200}", "[a-zA-Z' .,0-9]{0,200}"]) {
            let seal = Seal::new(&Zeroizing::new([3; 32]));
            let mut marker = Marker::new(&seal);
            for _ in 0..2 {
                let found = marker.terms(&text);
                let mut expected: Vec<(Mark, u32)> = text::term_counts(&text)
                    .into_iter()
                    .map(|(term, count)| (seal.mark(Hashed::Term, term.as_bytes()), count))
                    .collect();
                expected.sort_unstable();
                prop_assert_eq!(found.words, expected.iter().map(|(_, count)| count).sum::<u32>());
                prop_assert_eq!(found.marks, expected);
            }
        }
    }

    #[test]
    fn all_of_many_are_made_ready() {
        let seal = Seal::new(&Zeroizing::new([3; 32]));
        for count in [0, 1, 127, 1000] {
            let mut items = vec![0u32; count];
            share_out(&mut items, &seal, |item, marker| *item += marker.terms("two words").words);
            assert!(items.iter().all(|item| *item == 2), "{count}");
        }
    }
}
