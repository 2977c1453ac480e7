//! What of every record must be in memory, so that a question need not read the whole file?
//!
//! Owns:   per record its times, its neighbours, its number of words and the 8-bit half of its vector: about 440
//!         bytes with 384 dimensions.
//! Always: a copy of what is committed, never more. It is built at the first question, follows every commit, and
//!         is thrown away whenever the file is reopened, the embedder changes or many records have gone. Losing it
//!         costs time only.
//! Locks:  read by questions, written by the store's writer after its commit and before it acknowledges.

use crate::error::{Damage, StoreError};
use crate::life::{Life, State};
use crate::plan::At;
use crate::record::{TIERS, tier_code, tier_from_code};
use crate::rows::ReadRows;
use crate::seal::Seal;
use crate::tables::{COUNTERS, Counters, EMBEDDER, META};
use crate::vector::{Coarse, coarse_of_stored, dot};
use agentd_domain::agent_api::Tier;
use redb::ReadTransaction;
use std::collections::HashMap;

/// What a commit means for the index.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    Added {
        seq: u64,
        life: Life,
        vector: Option<Coarse>,
    },
    Embedded {
        seq: u64,
        vector: Coarse,
    },
    Life {
        seq: u64,
        life: Life,
    },
    Removed {
        seq: u64,
        session: u64,
    },
    /// Another embedder: nothing that was compared before may be compared now.
    Rebuild,
}

/// No neighbour.
const NONE: u32 = u32::MAX;
/// The place of a record that has gone.
const GONE: u8 = u8::MAX;
/// When so many of its places are of records that have gone, the index is built anew.
const GONE_MOST: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) embedder: u32,
    dimension: usize,
    /// Ascending: a slot is a position in all of these.
    seqs: Vec<u64>,
    /// Code of the tier, or [`GONE`].
    tiers: Vec<u8>,
    states: Vec<State>,
    words: Vec<u32>,
    /// When it happened.
    events: Vec<i64>,
    valid: Vec<(i64, i64)>,
    /// The slots before and after it in its session.
    neighbours: Vec<(u32, u32)>,
    /// 0: no vector.
    scales: Vec<f32>,
    /// `dimension` numbers per slot.
    values: Vec<i8>,
    /// Of every session its last slot and the place that has there.
    last: HashMap<u64, (u32, u64)>,
    gone: usize,
    /// Live records and their words, by tier.
    standing: [(u64, u64); 5],
}

/// Should it be kept after a change?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Kept,
    /// It must be loaded again.
    Stale,
}

impl Index {
    pub(crate) fn load(txn: &ReadTransaction, seal: &Seal) -> Result<Self, StoreError> {
        let counters = read_counters(txn)?;
        let dimension = match counters.embedder {
            0 => 0,
            number => embedder(txn, number)?.1 as usize,
        };
        let mut index = Self { embedder: counters.embedder, dimension, ..Self::default() };
        let rows = ReadRows::read(txn, seal)?;
        index.reserve(counters.records() as usize);
        let mut places = Vec::new();
        rows.for_each_life(|seq, life| {
            let slot = index.add(seq, &life);
            if life.session != 0 {
                places.push((life.session, life.order, slot));
            }
            Ok(())
        })?;
        index.link_neighbours(places);
        rows.for_each_coarse(|seq, number, first| {
            if number == index.embedder {
                let (scale, values) = coarse_of_stored(first, dimension).ok_or(Damage::Vector { seq })?;
                index.set_vector(seq, scale, values.iter().map(|v| *v as i8));
            }
            Ok(())
        })?;
        Ok(index)
    }

    fn link_neighbours(&mut self, mut places: Vec<(u64, u64, u32)>) {
        places.sort_unstable();
        for pair in places.windows(2) {
            let [(session, _, before), (other, _, after)] = pair else { continue };
            if session == other {
                self.neighbours[*before as usize].1 = *after;
                self.neighbours[*after as usize].0 = *before;
            }
        }
        for (session, order, slot) in places {
            self.last.insert(session, (slot, order));
        }
    }

    /// A record that is already there is left alone: the index may have been loaded from the very commit.
    pub(crate) fn apply(&mut self, change: &Change) -> Kept {
        match change {
            Change::Added { seq, life, vector } => {
                if self.seqs.last().is_none_or(|last| last < seq) {
                    let slot = self.add(*seq, life);
                    if let Some(vector) = vector.as_ref().filter(|v| v.values.len() == self.dimension) {
                        self.set_vector(*seq, vector.scale, vector.values.iter().copied());
                    }
                    return self.follow_session(slot, life);
                }
            }
            Change::Embedded { seq, vector } if vector.values.len() == self.dimension => {
                self.set_vector(*seq, vector.scale, vector.values.iter().copied());
            }
            Change::Embedded { .. } => {}
            Change::Life { seq, life } => self.set_life(*seq, life),
            Change::Removed { seq, session } => return self.remove(*seq, *session),
            Change::Rebuild => return Kept::Stale,
        }
        Kept::Kept
    }

    pub(crate) fn len(&self) -> usize {
        self.seqs.len()
    }

    pub(crate) fn slot(&self, seq: u64) -> Option<usize> {
        // Sequence numbers have few gaps, so the first guess is often right.
        let guess = usize::try_from(seq.checked_sub(*self.seqs.first()?)?).ok()?;
        if self.seqs.get(guess) == Some(&seq) { Some(guess) } else { self.seqs.binary_search(&seq).ok() }
    }

    pub(crate) fn seq(&self, slot: usize) -> u64 {
        self.seqs[slot]
    }

    pub(crate) fn words(&self, slot: usize) -> u32 {
        self.words[slot]
    }

    /// May a question of this time about these tiers see it?
    pub(crate) fn is_seen(&self, slot: usize, tiers: &[Tier], at: At) -> bool {
        let tier = tier_from_code(self.tiers[slot]);
        let state = self.states[slot];
        tier.is_some_and(|tier| tiers.contains(&tier))
            && match at {
                At::Latest => state == State::Live,
                At::Time(time) => {
                    let (from, to) = self.valid[slot];
                    state != State::Forgotten && (from..to).contains(&time)
                }
            }
    }

    /// Live records of these tiers, and their words.
    pub(crate) fn standing(&self, tiers: &[Tier]) -> (u64, u64) {
        tiers
            .iter()
            .map(|tier| self.standing[usize::from(tier_code(*tier))])
            .fold((0, 0), |(records, words), (r, w)| (records + r, words + w))
    }

    /// The records told before and after this one in its session.
    #[cfg_attr(not(test), expect(dead_code, reason = "for ranking with neighbours"))]
    pub(crate) fn neighbours(&self, slot: usize) -> (Option<usize>, Option<usize>) {
        let (before, after) = self.neighbours[slot];
        let some = |slot: u32| (slot != NONE && self.tiers[slot as usize] != GONE).then_some(slot as usize);
        (some(before), some(after))
    }

    /// When it happened, Unix milliseconds.
    #[cfg_attr(not(test), expect(dead_code, reason = "for ranking by time"))]
    pub(crate) fn event(&self, slot: usize) -> i64 {
        self.events[slot]
    }

    /// About the cosine of the question with every record it may see; nothing where there is no vector.
    pub(crate) fn scan<'a>(
        &'a self,
        query: &'a Coarse,
        tiers: &'a [Tier],
        at: At,
    ) -> impl Iterator<Item = (usize, f32)> + 'a {
        let width = self.dimension.max(1);
        let fits = query.values.len() == self.dimension;
        self.values
            .chunks_exact(width)
            .zip(&self.scales)
            .enumerate()
            .filter(move |(slot, (_, scale))| fits && **scale > 0.0 && self.is_seen(*slot, tiers, at))
            .map(|(slot, (values, scale))| (slot, dot(&query.values, values) as f32 * query.scale * scale))
    }

    /// What it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.seqs.capacity() * 8
            + self.tiers.capacity()
            + self.states.capacity()
            + self.words.capacity() * 4
            + self.events.capacity() * 8
            + self.valid.capacity() * 16
            + self.neighbours.capacity() * 8
            + self.scales.capacity() * 4
            + self.values.capacity()
            + self.last.capacity() * 32
    }

    fn reserve(&mut self, records: usize) {
        self.seqs.reserve_exact(records);
        self.tiers.reserve_exact(records);
        self.states.reserve_exact(records);
        self.words.reserve_exact(records);
        self.events.reserve_exact(records);
        self.valid.reserve_exact(records);
        self.neighbours.reserve_exact(records);
        self.scales.reserve_exact(records);
        self.values.reserve_exact(records * self.dimension);
    }

    fn add(&mut self, seq: u64, life: &Life) -> u32 {
        if self.seqs.len() == self.seqs.capacity() {
            // A sixteenth more, not twice as much: most of it is vectors, and memory is what bounds a store.
            self.reserve(self.seqs.len() / 16 + 64);
        }
        let slot = self.seqs.len();
        self.seqs.push(seq);
        self.tiers.push(tier_code(life.tier));
        self.states.push(State::Forgotten);
        self.words.push(life.words);
        self.events.push(life.event_unix_ms);
        self.valid.push((life.valid_from_unix_ms, life.valid_to_unix_ms));
        self.neighbours.push((NONE, NONE));
        self.scales.push(0.0);
        self.values.resize(self.seqs.len() * self.dimension, 0);
        self.set_state(slot, life.state);
        u32::try_from(slot).unwrap_or(NONE)
    }

    fn follow_session(&mut self, slot: u32, life: &Life) -> Kept {
        if life.session == 0 {
            return Kept::Kept;
        }
        match self.last.insert(life.session, (slot, life.order)) {
            None => Kept::Kept,
            Some((before, order)) if order <= life.order => {
                self.neighbours[before as usize].1 = slot;
                self.neighbours[slot as usize].0 = before;
                Kept::Kept
            }
            // Told into the middle of a session.
            Some(_) => Kept::Stale,
        }
    }

    fn set_life(&mut self, seq: u64, life: &Life) {
        if let Some(slot) = self.slot(seq) {
            self.valid[slot] = (life.valid_from_unix_ms, life.valid_to_unix_ms);
            self.set_state(slot, life.state);
        }
    }

    fn set_state(&mut self, slot: usize, state: State) {
        let (was, words) = (self.states[slot], u64::from(self.words[slot]));
        let counts = &mut self.standing[usize::from(self.tiers[slot].min(TIERS.len() as u8 - 1))];
        match (was, state) {
            (State::Live, State::Live) => {}
            (State::Live, _) => *counts = (counts.0 - 1, counts.1 - words),
            (_, State::Live) => *counts = (counts.0 + 1, counts.1 + words),
            _ => {}
        }
        self.states[slot] = state;
    }

    fn remove(&mut self, seq: u64, session: u64) -> Kept {
        let Some(slot) = self.slot(seq) else { return Kept::Kept };
        self.set_state(slot, State::Forgotten);
        self.tiers[slot] = GONE;
        self.scales[slot] = 0.0;
        // What is gone is gone from memory too.
        let start = slot * self.dimension;
        self.values[start..start + self.dimension].fill(0);
        let (before, after) = std::mem::replace(&mut self.neighbours[slot], (NONE, NONE));
        if before != NONE {
            self.neighbours[before as usize].1 = after;
        }
        if after != NONE {
            self.neighbours[after as usize].0 = before;
        }
        if let Some((last, _)) = self.last.get_mut(&session)
            && *last as usize == slot
        {
            // The place that the next one must come after stays that of the one that went.
            *last = before;
            if before == NONE {
                self.last.remove(&session);
            }
        }
        self.gone += 1;
        if self.gone > GONE_MOST && self.gone > self.seqs.len() / 8 { Kept::Stale } else { Kept::Kept }
    }

    fn set_vector(&mut self, seq: u64, scale: f32, values: impl Iterator<Item = i8>) {
        let Some(slot) = self.slot(seq) else { return };
        self.scales[slot] = scale;
        let start = slot * self.dimension;
        for (to, from) in self.values[start..start + self.dimension].iter_mut().zip(values) {
            *to = from;
        }
    }
}

pub(crate) fn read_counters(txn: &ReadTransaction) -> Result<Counters, StoreError> {
    let meta = txn.open_table(META)?;
    let row = meta.get(COUNTERS)?.ok_or(Damage::Meta(COUNTERS))?;
    Ok(Counters::from_bytes(row.value())?)
}

/// Digest and dimension of an embedder.
pub(crate) fn embedder(txn: &ReadTransaction, number: u32) -> Result<([u8; 32], u32), StoreError> {
    let table = txn.open_table(EMBEDDER)?;
    let row = table.get(number)?.ok_or(Damage::Embedder(number))?;
    let (digest, dimension) = row.value();
    Ok((*digest, dimension))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::life::tests::blank_life;

    fn added(seq: u64, session: u64, order: u64) -> Change {
        let life = Life { session, order, event_unix_ms: seq as i64, words: 3, ..blank_life() };
        Change::Added { seq, life, vector: None }
    }

    fn around(index: &Index, seq: u64) -> (Option<u64>, Option<u64>) {
        let (before, after) = index.neighbours(index.slot(seq).unwrap());
        (before.map(|slot| index.seq(slot)), after.map(|slot| index.seq(slot)))
    }

    #[test]
    fn neighbours_are_those_of_the_session() {
        let mut index = Index::default();
        // Two sessions told in turns, and a record of none.
        for (seq, session, order) in [(1, 7, 0), (2, 8, 0), (3, 7, 1), (4, 0, 0), (6, 8, 1), (7, 7, 2)] {
            assert_eq!(index.apply(&added(seq, session, order)), Kept::Kept);
        }
        assert_eq!(around(&index, 3), (Some(1), Some(7)));
        assert_eq!(around(&index, 2), (None, Some(6)));
        assert_eq!(around(&index, 4), (None, None));
        assert_eq!(index.event(index.slot(6).unwrap()), 6);

        // One goes: those beside it become neighbours, and the session goes on behind its last.
        assert_eq!(index.apply(&Change::Removed { seq: 3, session: 7 }), Kept::Kept);
        assert_eq!(around(&index, 7), (Some(1), None));
        index.apply(&Change::Removed { seq: 7, session: 7 });
        index.apply(&added(8, 7, 3));
        assert_eq!(around(&index, 8), (Some(1), None));
        // Told into the middle of a session: loaded anew.
        assert_eq!(index.apply(&added(9, 7, 1)), Kept::Stale);
    }

    #[test]
    fn what_stands_is_counted_and_seen() {
        let mut index = Index::default();
        index.apply(&added(1, 0, 0));
        index.apply(&added(2, 0, 0));
        let tiers = [Tier::Spirit];
        assert_eq!(index.standing(&tiers), (2, 6));
        let life =
            Life { valid_from_unix_ms: 10, valid_to_unix_ms: 20, state: State::Superseded, ..blank_life() };
        index.apply(&Change::Life { seq: 1, life });
        assert_eq!(index.standing(&tiers), (1, 3));
        let slot = index.slot(1).unwrap();
        assert!(!index.is_seen(slot, &tiers, At::Latest));
        assert!(index.is_seen(slot, &tiers, At::Time(15)) && !index.is_seen(slot, &tiers, At::Time(20)));
        assert!(!index.is_seen(slot, &[Tier::Working], At::Time(15)));
        index.apply(&Change::Life { seq: 1, life: Life { state: State::Forgotten, ..life } });
        assert!(!index.is_seen(slot, &tiers, At::Time(15)));
        index.apply(&Change::Removed { seq: 2, session: 0 });
        assert_eq!(index.standing(&tiers), (0, 0));
    }
}
