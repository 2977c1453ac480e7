//! A corpus that lies in memory, record by record.
//!
//! What a benchmark ranks, and what the tests compare others with. A store feeds the ranking from its own index.

use super::told::{self, Facts};
use super::{Corpus, KinTable};
use crate::text;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;

/// Records in the order they were told.
#[derive(Debug, Default)]
pub struct Plain {
    postings: HashMap<String, Vec<(usize, u32)>>,
    facts: Vec<Facts>,
    before: Vec<Option<usize>>,
    after: Vec<Option<usize>>,
    last_of: HashMap<u64, usize>,
    speakers: HashSet<String>,
    words: u64,
    kin: KinTable,
    /// Of words of a question that no record has.
    asked: HashMap<String, Vec<(String, f32)>>,
    useful: HashMap<usize, f32>,
    silent: HashSet<usize>,
}

impl Plain {
    /// Takes in the next record; session 0 is none. Returns its slot.
    pub fn push(&mut self, record_text: &str, session: u64, event_unix_ms: i64) -> usize {
        let slot = self.facts.len();
        let facts = Facts::read(record_text, session, event_unix_ms);
        for (term, count) in text::term_counts(record_text) {
            self.postings.entry(term).or_default().push((slot, count));
        }
        self.speakers.extend(told::speaker(record_text));
        self.words += u64::from(facts.words);
        self.facts.push(facts);
        self.after.push(None);
        let before = if session == 0 { None } else { self.last_of.insert(session, slot) };
        if let Some(before) = before {
            self.after[before] = Some(slot);
        }
        self.before.push(before);
        slot
    }

    /// A word's vector, so that it has kin.
    pub fn add_word(&mut self, term: &str, vector: &[f32]) {
        self.kin.add(term, vector);
    }

    /// The vector of a word of a question that no record has.
    pub fn add_asked(&mut self, term: &str, vector: &[f32]) {
        if !self.kin.knows(term) {
            self.asked.insert(term.to_owned(), self.kin.nearest(vector));
        }
    }

    /// It was used.
    pub fn set_usefulness(&mut self, slot: usize, usefulness: f32) {
        self.useful.insert(slot, usefulness);
    }

    /// It is no answer, and a neighbour still.
    pub fn silence(&mut self, slot: usize) {
        self.silent.insert(slot);
    }

    pub fn knows(&self, term: &str) -> bool {
        self.kin.knows(term)
    }
}

impl Corpus for Plain {
    type Error = Infallible;

    fn slots(&self) -> usize {
        self.facts.len()
    }

    fn mean_words(&self) -> f32 {
        self.words as f32 / self.facts.len().max(1) as f32
    }

    fn postings(&self, term: &str, each: &mut dyn FnMut(usize, u32)) -> Result<(), Infallible> {
        self.postings.get(term).into_iter().flatten().for_each(|(slot, count)| each(*slot, *count));
        Ok(())
    }

    fn kin(&self, term: &str, each: &mut dyn FnMut(&str, f32)) -> Result<(), Infallible> {
        match self.asked.get(term).filter(|_| !self.kin.knows(term)) {
            Some(nearest) => nearest.iter().for_each(|(other, likeness)| each(other, *likeness)),
            None => self.kin.of(term).into_iter().for_each(|(other, likeness)| each(other, likeness)),
        }
        Ok(())
    }

    fn speaker(&self, term: &str) -> Option<u32> {
        self.speakers.contains(term).then(|| told::speaker_id(term))
    }

    fn usefulness(&self, slot: usize) -> f32 {
        self.useful.get(&slot).copied().unwrap_or(0.0)
    }

    fn may_answer(&self, slot: usize) -> bool {
        !self.silent.contains(&slot)
    }

    fn facts(&self, slot: usize) -> Facts {
        self.facts[slot]
    }

    fn before(&self, slot: usize) -> Option<usize> {
        self.before[slot]
    }

    fn after(&self, slot: usize) -> Option<usize> {
        self.after[slot]
    }
}
