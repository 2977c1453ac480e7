//! What of a store does the ranking see?
//!
//! In:    one snapshot, the index, which records a question is about. Out: [`Corpus`].
//! Always: the same as if these records alone had been told to [`crate::rank::Plain`], which `tests/ranking.rs` compares
//!         it with: of the asked tiers, without tombstones. A record that a later one took the place of is no answer, but
//!         it is still what was said before the next.

use crate::error::{Damage, StoreError};
use crate::index::{Index, Seen};
use crate::life::speaker_number;
use crate::postings;
use crate::rank::{Corpus, Facts};
use crate::read::View;
use crate::rows::ReadRows;
use crate::seal::{Hashed, Seal};
use crate::tables::POSTING;
use crate::write::open_block;
use redb::ReadOnlyTable;
use std::collections::HashMap;

pub(crate) struct Told<'a> {
    pub(crate) view: View<'a>,
    pub(crate) index: &'a Index,
    pub(crate) seen: &'a Seen,
    pub(crate) rows: ReadRows<'a>,
    now_unix_ms: i64,
    table: ReadOnlyTable<&'static [u8], &'static [u8]>,
    /// Of words of the question that no record has.
    asked: HashMap<String, Vec<(String, f32)>>,
}

impl<'a> Told<'a> {
    pub(crate) fn new(
        view: View<'a>,
        index: &'a Index,
        seen: &'a Seen,
        now_unix_ms: i64,
        asked: &[(String, Vec<f32>)],
    ) -> Result<Self, StoreError> {
        let unknown = asked.iter().filter(|(term, _)| !index.kin.knows(term));
        let asked = unknown.map(|(term, vector)| (term.clone(), index.kin.nearest(vector))).collect();
        let (rows, table) = (view.rows()?, view.txn.open_table(POSTING)?);
        Ok(Self { view, index, seen, rows, now_unix_ms, table, asked })
    }

    pub(crate) fn speaker_of(seal: &Seal, index: &Index, seen: &Seen, term: &str) -> Option<u32> {
        let number = speaker_number(&seal.mark(Hashed::Term, term.as_bytes()));
        index.speaks(seen.tiers(), number).then_some(number)
    }

    fn among(&self, slot: Option<usize>) -> Option<usize> {
        slot.filter(|slot| self.index.is_among(*slot, self.seen))
    }
}

impl Corpus for Told<'_> {
    type Error = StoreError;

    fn slots(&self) -> usize {
        self.index.len()
    }

    fn records(&self) -> usize {
        self.index.standing(self.seen.tiers()).0 as usize
    }

    fn mean_words(&self) -> f32 {
        let (records, words) = self.index.standing(self.seen.tiers());
        words as f32 / records.max(1) as f32
    }

    /// A posting that is newer than the index belongs to a record that is not acknowledged yet.
    fn postings(&self, term: &str, each: &mut dyn FnMut(usize, u32)) -> Result<(), StoreError> {
        let mark = self.view.seal.mark(Hashed::Term, term.as_bytes());
        for tier in self.seen.tiers() {
            let (from, to) = (postings::key(*tier, &mark, 0), postings::key(*tier, &mark, u64::MAX));
            for row in self.table.range(from.as_slice()..=to.as_slice())? {
                let (key, sealed) = row?;
                let key: postings::Key = key
                    .value()
                    .try_into()
                    .map_err(|_| Damage::Postings("a key of another length".to_owned()))?;
                for posting in open_block(self.view.seal, &key, sealed.value())? {
                    if let Some(slot) = self.among(self.index.slot(posting.seq)) {
                        each(slot, posting.count);
                    }
                }
            }
        }
        Ok(())
    }

    fn kin(&self, term: &str, each: &mut dyn FnMut(&str, f32)) -> Result<(), StoreError> {
        match self.asked.get(term).filter(|_| !self.index.kin.knows(term)) {
            Some(nearest) => nearest.iter().for_each(|(other, likeness)| each(other, *likeness)),
            None => self.index.kin.of(term).into_iter().for_each(|(other, likeness)| each(other, likeness)),
        }
        Ok(())
    }

    fn speaker(&self, term: &str) -> Option<u32> {
        Self::speaker_of(self.view.seal, self.index, self.seen, term)
    }

    fn usefulness(&self, slot: usize) -> f32 {
        self.index.usefulness(slot, self.now_unix_ms)
    }

    fn facts(&self, slot: usize) -> Facts {
        self.index.facts(slot)
    }

    fn before(&self, slot: usize) -> Option<usize> {
        self.among(self.index.neighbours(slot).0)
    }

    fn after(&self, slot: usize) -> Option<usize> {
        self.among(self.index.neighbours(slot).1)
    }

    fn may_answer(&self, slot: usize) -> bool {
        self.index.may_answer(slot, self.seen)
    }
}
