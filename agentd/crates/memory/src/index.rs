//! What of every record must be in memory, so that a question need not read the whole file?
//!
//! Owns:   per record its times, its neighbours, what its text tells, its number of words and the 8-bit half of its
//!         vector: about 425 bytes with 384 dimensions. Per distinct word, once it has a vector, that vector.
//! Always: a copy of what is committed, never more. It is built at the first question, follows every commit, and
//!         is thrown away whenever the file is reopened, the embedder changes or many records have gone. Losing it
//!         costs time only.
//! Neighbours: of the same session and tier, tombstones left out; a question sees a conversation as if what was
//!         forgotten had never been told.
//! Locks:  read by questions, written by the store's writer after its commit and before it acknowledges.

use crate::cells::{Cells, Vectors};
use crate::error::{Damage, StoreError};
use crate::forget::decay;
use crate::life::{Life, OPEN_END, State, Told};
use crate::near::{Probe, biased, unbiased};
use crate::plan::At;
use crate::rank::{Facts, KinTable};
use crate::record::{TIERS, tier_code};
use crate::rows::ReadRows;
use crate::seal::Seal;
use crate::tables::{COUNTERS, Counters, EMBEDDER, META};
use crate::vector::{Coarse, coarse_of_stored};
use crate::vocabulary;
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
    /// Its vector was made of something that has gone.
    Unembedded {
        seq: u64,
    },
    Life {
        seq: u64,
        life: Life,
    },
    Removed {
        seq: u64,
    },
    /// Words with their vectors.
    Words(Vec<(String, Coarse)>),
    /// Another embedder: nothing that was compared before may be compared now.
    Rebuild,
}

/// No neighbour.
const NONE: u32 = u32::MAX;
/// The kind of a record that has gone.
const GONE: u8 = u8::MAX;
/// When so many of its places are of records that have gone, the index is built anew.
const GONE_MOST: usize = 4096;

/// Tier, state and what the text tells, in one byte: bits 0 to 2 the tier's code, 3 and 4 the state, 5 it asks, 6 it has
/// words of time.
const TIER: u8 = 0b111;
const STATE_SHIFT: u32 = 3;
const ASKS: u8 = 1 << 5;
const TELLS_TIME: u8 = 1 << 6;

#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) embedder: u32,
    pub(crate) dimension: usize,
    /// Ascending: a slot is a position in all of these.
    seqs: Vec<u64>,
    kinds: Vec<u8>,
    words: Vec<u16>,
    /// When it happened.
    events: Vec<i64>,
    /// Of records that are not true from when they happened on.
    valid: HashMap<u32, (i64, i64)>,
    /// The slots before and after it in its session.
    neighbours: Vec<(u32, u32)>,
    /// Number of the session and tier it belongs to, from 1; 0: none.
    sessions: Vec<u32>,
    speakers: Vec<u32>,
    /// 0: no vector.
    scales: Vec<f32>,
    /// `dimension` numbers per slot, as `near.rs` wants them.
    values: Vec<u8>,
    pub(crate) cells: Cells,
    /// With more vectors than so many there are cells.
    cells_from: usize,
    vectors: usize,
    /// Of records that were used.
    useful: HashMap<u32, Use>,
    /// Of every session and tier its number.
    numbers: HashMap<(u64, u8), u32>,
    /// By number less one: the last slot, and the place that it has there.
    last: Vec<(u32, u64)>,
    /// How often somebody speaks in a tier.
    speaks: HashMap<(u8, u32), u32>,
    gone: usize,
    /// Records that are no tombstones and their words, by tier.
    standing: [(u64, u64); 5],
    newest_unix_ms: i64,
    pub(crate) kin: KinTable,
}

/// What using it has brought, and how it fades.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Use {
    gain: f32,
    half_life_days: f32,
    last_used_unix_ms: i64,
}

/// Should it be kept after a change?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Kept,
    /// It must be loaded again.
    Stale,
}

/// Which records a question is about: those it looks among, and of these those that may be its answer.
#[derive(Clone)]
pub(crate) struct Seen {
    among: [bool; 256],
    answers: [bool; 256],
    tiers: Vec<Tier>,
    at: At,
}

impl Seen {
    pub(crate) fn new(tiers: &[Tier], at: At) -> Self {
        let codes: Vec<u8> = tiers.iter().map(|tier| tier_code(*tier)).collect();
        let of = |kind: usize, state: &[State]| {
            let kind = kind as u8;
            kind & 0x80 == 0 && codes.contains(&(kind & TIER)) && state.iter().any(|s| *s == state_of(kind))
        };
        let standing: &[State] = match at {
            At::Latest => &[State::Live],
            At::Time(_) => &[State::Live, State::Superseded],
        };
        Self {
            among: std::array::from_fn(|kind| of(kind, &[State::Live, State::Superseded])),
            answers: std::array::from_fn(|kind| of(kind, standing)),
            tiers: tiers.to_vec(),
            at,
        }
    }

    pub(crate) fn tiers(&self) -> &[Tier] {
        &self.tiers
    }
}

fn state_of(kind: u8) -> State {
    match kind >> STATE_SHIFT & 3 {
        0 => State::Live,
        1 => State::Superseded,
        _ => State::Forgotten,
    }
}

fn state_bits(state: State) -> u8 {
    let code: u8 = match state {
        State::Live => 0,
        State::Superseded => 1,
        State::Forgotten => 2,
    };
    code << STATE_SHIFT
}

impl Index {
    pub(crate) fn load(txn: &ReadTransaction, seal: &Seal, cells_from: usize) -> Result<Self, StoreError> {
        let counters = read_counters(txn)?;
        let dimension = match counters.embedder {
            0 => 0,
            number => embedder(txn, number)?.1 as usize,
        };
        let mut index = Self { embedder: counters.embedder, dimension, cells_from, ..Self::default() };
        let rows = ReadRows::read(txn, seal)?;
        index.reserve(counters.records() as usize);
        let mut places = Vec::new();
        rows.for_each_life(|seq, life| {
            let slot = index.add(seq, &life);
            if life.state != State::Forgotten && life.session != 0 {
                places.push((index.sessions[slot as usize], life.order, slot));
            }
            Ok(())
        })?;
        index.link_neighbours(places);
        rows.for_each_coarse(|seq, number, first| {
            if number == index.embedder {
                let (scale, values) = coarse_of_stored(first, dimension).ok_or(Damage::Vector { seq })?;
                // Cells come when all are there.
                let _ = index.set_vector(seq, scale, values.iter().map(|v| *v as i8));
            }
            Ok(())
        })?;
        if index.vectors > cells_from {
            index.cells = Cells::of(vectors(index.dimension, &index.scales, &index.values));
        }
        vocabulary::for_each(txn, seal, index.embedder, |term, scale, values| {
            index.kin.add_coarse(term, scale, values);
        })?;
        Ok(index)
    }

    fn link_neighbours(&mut self, mut places: Vec<(u32, u64, u32)>) {
        places.sort_unstable();
        for pair in places.windows(2) {
            let [(session, _, before), (other, _, after)] = pair else { continue };
            if session == other {
                self.neighbours[*before as usize].1 = *after;
                self.neighbours[*after as usize].0 = *before;
            }
        }
        for (session, order, slot) in places {
            self.last[session as usize - 1] = (slot, order);
        }
    }

    /// A record that is already there is left alone: the index may have been loaded from the very commit.
    pub(crate) fn apply(&mut self, change: &Change) -> Kept {
        match change {
            Change::Added { seq, life, vector } => {
                if self.seqs.last().is_none_or(|last| last < seq) {
                    let slot = self.add(*seq, life);
                    let vector = vector.as_ref().filter(|v| v.values.len() == self.dimension);
                    let kept = vector.map_or(Kept::Kept, |vector| {
                        self.set_vector(*seq, vector.scale, vector.values.iter().copied())
                    });
                    return if kept == Kept::Kept { self.follow_session(slot, life) } else { kept };
                }
            }
            Change::Embedded { seq, vector } if vector.values.len() == self.dimension => {
                return self.set_vector(*seq, vector.scale, vector.values.iter().copied());
            }
            Change::Embedded { .. } => {}
            Change::Unembedded { seq } => return self.set_vector(*seq, 0.0, std::iter::repeat(0)),
            Change::Life { seq, life } => return self.set_life(*seq, life),
            Change::Removed { seq } => return self.remove(*seq),
            Change::Words(words) => {
                words
                    .iter()
                    .for_each(|(term, coarse)| self.kin.add_coarse(term, coarse.scale, &coarse.values));
            }
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

    /// Does the question look at it at all?
    pub(crate) fn is_among(&self, slot: usize, seen: &Seen) -> bool {
        seen.among[usize::from(self.kinds[slot])]
    }

    /// May it be an answer?
    pub(crate) fn may_answer(&self, slot: usize, seen: &Seen) -> bool {
        seen.answers[usize::from(self.kinds[slot])]
            && match seen.at {
                At::Latest => true,
                At::Time(time) => {
                    let usual = || (self.events[slot], OPEN_END);
                    let (from, to) = self.valid.get(&(slot as u32)).copied().unwrap_or_else(usual);
                    (from..to).contains(&time)
                }
            }
    }

    /// Records of these tiers that are no tombstones, and their words.
    pub(crate) fn standing(&self, tiers: &[Tier]) -> (u64, u64) {
        tiers
            .iter()
            .map(|tier| self.standing[usize::from(tier_code(*tier))])
            .fold((0, 0), |(records, words), (r, w)| (records + r, words + w))
    }

    /// The records told before and after this one in its session.
    pub(crate) fn neighbours(&self, slot: usize) -> (Option<usize>, Option<usize>) {
        let (before, after) = self.neighbours[slot];
        let some = |slot: u32| (slot != NONE).then_some(slot as usize);
        (some(before), some(after))
    }

    /// The last record of a session in a tier.
    pub(crate) fn last_of(&self, session: u64, tier: Tier) -> Option<usize> {
        let number = *self.numbers.get(&(session, tier_code(tier)))?;
        let (slot, _) = *self.last.get(number as usize - 1)?;
        (slot != NONE).then_some(slot as usize)
    }

    pub(crate) fn facts(&self, slot: usize) -> Facts {
        Facts {
            session: u64::from(self.sessions[slot]),
            event_unix_ms: self.events[slot],
            words: u32::from(self.words[slot]),
            speaker: self.speakers[slot],
            asks: self.kinds[slot] & ASKS != 0,
            tells_time: self.kinds[slot] & TELLS_TIME != 0,
        }
    }

    /// Does somebody of this number speak in one of these tiers?
    pub(crate) fn speaks(&self, tiers: &[Tier], speaker: u32) -> bool {
        tiers.iter().any(|tier| self.speaks.contains_key(&(tier_code(*tier), speaker)))
    }

    /// What using it has brought of what could be had, faded by its half-life: 0 to 1.
    pub(crate) fn usefulness(&self, slot: usize, now_unix_ms: i64) -> f32 {
        match self.useful.get(&(slot as u32)) {
            None => 0.0,
            Some(used) => {
                decay::usefulness(used.gain, used.half_life_days, used.last_used_unix_ms, now_unix_ms)
            }
        }
    }

    /// When the latest of what it holds happened.
    pub(crate) fn newest_unix_ms(&self) -> i64 {
        self.newest_unix_ms
    }

    /// About the cosine of the question with a record's vector; NaN where there is none.
    pub(crate) fn cosine(&self, slot: usize, query: &Probe) -> f32 {
        let scale = self.scales[slot];
        if scale <= 0.0 || query.dimension() != self.dimension {
            return f32::NAN;
        }
        let start = slot * self.dimension;
        query.cosine(scale, &self.values[start..start + self.dimension])
    }

    /// The first part of its vector, as it stands on disk.
    pub(crate) fn first_part(&self, slot: usize) -> Option<Vec<u8>> {
        let scale = *self.scales.get(slot).filter(|scale| **scale > 0.0)?;
        let start = slot * self.dimension;
        let mut first = scale.to_le_bytes().to_vec();
        first.extend(self.values[start..start + self.dimension].iter().map(|value| unbiased(*value) as u8));
        Some(first)
    }

    /// The slots from the first record on that was told at or after this number.
    pub(crate) fn slots_from(&self, seq: u64) -> std::ops::Range<usize> {
        self.seqs.partition_point(|other| *other < seq)..self.len()
    }

    /// The same of every record that the question looks at.
    pub(crate) fn scan(&self, query: &Probe, seen: &Seen) -> Vec<f32> {
        let mut cosines = vec![f32::NAN; self.len()];
        if query.dimension() == self.dimension && self.dimension > 0 {
            let rows = self.values.chunks_exact(self.dimension).zip(&self.scales).zip(&self.kinds);
            for (cosine, ((values, scale), kind)) in cosines.iter_mut().zip(rows) {
                if *scale > 0.0 && seen.among[usize::from(*kind)] {
                    *cosine = query.cosine(*scale, values);
                }
            }
        }
        cosines
    }

    /// What it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.seqs.capacity() * 8
            + self.kinds.capacity()
            + self.words.capacity() * 2
            + self.events.capacity() * 8
            + self.valid.capacity() * 25
            + self.neighbours.capacity() * 8
            + self.sessions.capacity() * 4
            + self.speakers.capacity() * 4
            + self.scales.capacity() * 4
            + self.values.capacity()
            + self.useful.capacity() * 25
            + self.numbers.capacity() * 25
            + self.last.capacity() * 16
            + self.speaks.capacity() * 13
            + self.kin.bytes()
            + self.cells.bytes()
    }

    fn reserve(&mut self, records: usize) {
        self.seqs.reserve_exact(records);
        self.kinds.reserve_exact(records);
        self.words.reserve_exact(records);
        self.events.reserve_exact(records);
        self.neighbours.reserve_exact(records);
        self.sessions.reserve_exact(records);
        self.speakers.reserve_exact(records);
        self.scales.reserve_exact(records);
        self.values.reserve_exact(records * self.dimension);
    }

    fn add(&mut self, seq: u64, life: &Life) -> u32 {
        if self.seqs.len() == self.seqs.capacity() {
            // A sixteenth more, not twice as much: most of it is vectors, and memory is what bounds a store.
            self.reserve(self.seqs.len() / 16 + 64);
        }
        let slot = self.seqs.len() as u32;
        let Told { speaker, asks, tells_time } = life.told.unwrap_or_default();
        let flag = |there: bool, flag: u8| if there { flag } else { 0 };
        let tier = tier_code(life.tier);
        let told = flag(asks, ASKS) | flag(tells_time, TELLS_TIME);
        self.seqs.push(seq);
        self.kinds.push(tier | told | state_bits(State::Forgotten));
        self.words.push(u16::try_from(life.words).unwrap_or(u16::MAX));
        self.events.push(life.event_unix_ms);
        self.neighbours.push((NONE, NONE));
        let session = if life.session == 0 { 0 } else { self.number(life.session, tier) };
        self.sessions.push(session);
        self.speakers.push(speaker);
        self.scales.push(0.0);
        self.values.resize(self.seqs.len() * self.dimension, biased(0));
        self.newest_unix_ms = self.newest_unix_ms.max(life.event_unix_ms);
        self.set_state(slot as usize, life.state);
        self.set_times(slot, life);
        slot
    }

    fn number(&mut self, session: u64, tier: u8) -> u32 {
        let next = self.last.len() as u32 + 1;
        let number = *self.numbers.entry((session, tier)).or_insert(next);
        if number == next {
            self.last.push((NONE, 0));
        }
        number
    }

    fn follow_session(&mut self, slot: u32, life: &Life) -> Kept {
        let number = self.sessions[slot as usize];
        if number == 0 || life.state == State::Forgotten {
            return Kept::Kept;
        }
        let (before, order) = self.last[number as usize - 1];
        if before != NONE && order > life.order {
            // Told into the middle of a session.
            return Kept::Stale;
        }
        if before != NONE {
            self.neighbours[before as usize].1 = slot;
            self.neighbours[slot as usize].0 = before;
        }
        self.last[number as usize - 1] = (slot, life.order);
        Kept::Kept
    }

    fn set_life(&mut self, seq: u64, life: &Life) -> Kept {
        let Some(slot) = self.slot(seq) else { return Kept::Kept };
        let (was, is) = (state_of(self.kinds[slot]), life.state);
        self.set_state(slot, is);
        self.set_times(slot as u32, life);
        match (was == State::Forgotten, is == State::Forgotten) {
            (false, true) => self.unlink(slot),
            // Back into the middle of a session.
            (true, false) if self.sessions[slot] != 0 => return Kept::Stale,
            _ => {}
        }
        Kept::Kept
    }

    fn set_times(&mut self, slot: u32, life: &Life) {
        let valid = (life.valid_from_unix_ms, life.valid_to_unix_ms);
        if valid == (life.event_unix_ms, OPEN_END) {
            self.valid.remove(&slot);
        } else {
            self.valid.insert(slot, valid);
        }
        let gain = decay::gain(life);
        if life.uses > 0 && gain > 0.0 {
            let (half_life_days, last_used_unix_ms) = (life.half_life_days, life.last_used_unix_ms);
            self.useful.insert(slot, Use { gain, half_life_days, last_used_unix_ms });
        } else {
            self.useful.remove(&slot);
        }
    }

    fn set_state(&mut self, slot: usize, state: State) {
        let kind = self.kinds[slot];
        let (tier, words, speaker) = (kind & TIER, u64::from(self.words[slot]), self.speakers[slot]);
        let counts = &mut self.standing[usize::from(tier).min(TIERS.len() - 1)];
        match (state_of(kind) == State::Forgotten, state == State::Forgotten) {
            (false, true) => {
                *counts = (counts.0 - 1, counts.1 - words);
                if let Some(times) = self.speaks.get_mut(&(tier, speaker)) {
                    *times -= 1;
                    if *times == 0 {
                        self.speaks.remove(&(tier, speaker));
                    }
                }
            }
            (true, false) => {
                *counts = (counts.0 + 1, counts.1 + words);
                if speaker != 0 {
                    *self.speaks.entry((tier, speaker)).or_default() += 1;
                }
            }
            _ => {}
        }
        self.kinds[slot] = kind & !(3 << STATE_SHIFT) | state_bits(state);
    }

    /// Those beside it become neighbours.
    fn unlink(&mut self, slot: usize) {
        let (before, after) = std::mem::replace(&mut self.neighbours[slot], (NONE, NONE));
        if before != NONE {
            self.neighbours[before as usize].1 = after;
        }
        if after != NONE {
            self.neighbours[after as usize].0 = before;
        }
        if let Some((last, _)) =
            (self.sessions[slot] as usize).checked_sub(1).and_then(|n| self.last.get_mut(n))
            && *last as usize == slot
        {
            // The place that the next one must come after stays that of the one that went.
            *last = before;
        }
    }

    fn remove(&mut self, seq: u64) -> Kept {
        let Some(slot) = self.slot(seq) else { return Kept::Kept };
        self.set_state(slot, State::Forgotten);
        self.unlink(slot);
        self.kinds[slot] = GONE;
        if self.scales[slot] > 0.0 {
            self.vectors -= 1;
        }
        self.scales[slot] = 0.0;
        self.cells.set(vectors(self.dimension, &self.scales, &self.values), slot as u32);
        self.speakers[slot] = 0;
        self.valid.remove(&(slot as u32));
        self.useful.remove(&(slot as u32));
        // What is gone is gone from memory too.
        let start = slot * self.dimension;
        self.values[start..start + self.dimension].fill(biased(0));
        self.gone += 1;
        if self.gone > GONE_MOST && self.gone > self.seqs.len() / 8 { Kept::Stale } else { Kept::Kept }
    }

    fn set_vector(&mut self, seq: u64, scale: f32, values: impl Iterator<Item = i8>) -> Kept {
        let Some(slot) = self.slot(seq) else { return Kept::Kept };
        match (self.scales[slot] > 0.0, scale > 0.0) {
            (false, true) => self.vectors += 1,
            (true, false) => self.vectors -= 1,
            _ => {}
        }
        self.scales[slot] = scale;
        let start = slot * self.dimension;
        for (to, from) in self.values[start..start + self.dimension].iter_mut().zip(values) {
            *to = biased(from);
        }
        self.cells.set(vectors(self.dimension, &self.scales, &self.values), slot as u32);
        // With that many it is worth loading anew.
        if self.vectors == self.cells_from + 1 && !self.cells.are_there() || self.cells.are_outgrown() {
            return Kept::Stale;
        }
        Kept::Kept
    }
}

fn vectors<'a>(dimension: usize, scales: &'a [f32], values: &'a [u8]) -> Vectors<'a> {
    Vectors { dimension, scales, values }
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
        assert_eq!(index.facts(index.slot(6).unwrap()).event_unix_ms, 6);

        // One goes: those beside it become neighbours, and the session goes on behind its last.
        assert_eq!(index.apply(&Change::Removed { seq: 3 }), Kept::Kept);
        assert_eq!(around(&index, 7), (Some(1), None));
        index.apply(&Change::Removed { seq: 7 });
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
        let sees = |index: &Index, tiers: &[Tier], at| {
            let (slot, seen) = (index.slot(1).unwrap(), Seen::new(tiers, at));
            (index.is_among(slot, &seen), index.may_answer(slot, &seen))
        };
        assert_eq!((index.standing(&tiers), sees(&index, &tiers, At::Latest)), ((2, 6), (true, true)));
        let life =
            Life { valid_from_unix_ms: 10, valid_to_unix_ms: 20, state: State::Superseded, ..blank_life() };
        index.apply(&Change::Life { seq: 1, life });
        assert_eq!(index.standing(&tiers), (2, 6), "it is beside what stands still");
        assert_eq!(sees(&index, &tiers, At::Latest), (true, false));
        assert_eq!(sees(&index, &tiers, At::Time(15)), (true, true));
        assert_eq!(sees(&index, &tiers, At::Time(20)), (true, false));
        assert_eq!(sees(&index, &[Tier::Working], At::Time(15)), (false, false));
        index.apply(&Change::Life { seq: 1, life: Life { state: State::Forgotten, ..life } });
        assert_eq!((index.standing(&tiers), sees(&index, &tiers, At::Time(15))), ((1, 3), (false, false)));
        index.apply(&Change::Removed { seq: 2 });
        assert_eq!(index.standing(&tiers), (0, 0));
    }

    #[test]
    fn a_tombstone_is_nobodys_neighbour_and_comes_back_by_loading() {
        let mut index = Index::default();
        for seq in 1..=3 {
            index.apply(&added(seq, 7, seq));
        }
        let life = Life { session: 7, order: 2, ..blank_life() };
        let forgotten = Life { state: State::Forgotten, ..life };
        assert_eq!(index.apply(&Change::Life { seq: 2, life: forgotten }), Kept::Kept);
        assert_eq!((around(&index, 1), around(&index, 3)), ((None, Some(3)), (Some(1), None)));
        assert_eq!(index.apply(&Change::Life { seq: 2, life }), Kept::Stale);
    }

    #[test]
    fn who_speaks_and_what_was_used_is_known_while_it_stands() {
        let mut index = Index::default();
        let told = Told { speaker: 9, asks: true, tells_time: false };
        let life =
            Life { told: Some(told), uses: 1, strength: 0.75, half_life_days: f32::INFINITY, ..blank_life() };
        index.apply(&Change::Added { seq: 1, life, vector: None });
        let facts = index.facts(0);
        assert!(facts.asks && !facts.tells_time && facts.speaker == 9);
        assert!(index.speaks(&[Tier::Spirit], 9) && !index.speaks(&[Tier::Working], 9));
        assert_eq!(index.usefulness(0, 0), 0.5, "half of what was missing");
        index.apply(&Change::Life { seq: 1, life: Life { state: State::Forgotten, ..life } });
        assert!(!index.speaks(&[Tier::Spirit], 9));
    }
}
