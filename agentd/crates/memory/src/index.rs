//! What of every record must be in memory, so that a question need not read the whole file?
//!
//! Owns:   per record its tier, its number of words and the 8-bit half of its vector: about 400 bytes.
//! Always: a copy of what is committed, never more. It is built at the first question, follows every commit, and
//!         is thrown away whenever the file is reopened or the embedder changes. Losing it costs time only.
//! Locks:  read by questions, written by the store's writer after its commit and before it acknowledges.

use crate::error::{Damage, StoreError};
use crate::record::tier_from_code;
use crate::tables::{COUNTERS, Counters, EMBEDDER, META, RANK, VECTOR};
use crate::vector::{Coarse, coarse_of_stored, dot};
use agentd_domain::agent_api::Tier;
use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};

/// What a commit means for the index.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    Added {
        seq: u64,
        tier: Tier,
        words: u32,
        vector: Option<Coarse>,
    },
    Embedded {
        seq: u64,
        vector: Coarse,
    },
    /// Another embedder: nothing that was compared before may be compared now.
    Rebuild,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) embedder: u32,
    dimension: usize,
    /// Ascending: a slot is a position in these four.
    seqs: Vec<u64>,
    tiers: Vec<Tier>,
    words: Vec<u32>,
    /// 0: no vector.
    scales: Vec<f32>,
    /// `dimension` numbers per slot.
    values: Vec<i8>,
}

impl Index {
    pub(crate) fn load(txn: &ReadTransaction) -> Result<Self, StoreError> {
        let counters = read_counters(txn)?;
        let dimension = match counters.embedder {
            0 => 0,
            number => embedder(txn, number)?.1 as usize,
        };
        let mut index = Self { embedder: counters.embedder, dimension, ..Self::default() };
        let rank = txn.open_table(RANK)?;
        index.reserve(rank.len()? as usize);
        for row in rank.iter()? {
            let (seq, row) = row?;
            let (tier, words) = row.value();
            let tier = tier_from_code(tier)
                .ok_or_else(|| Damage::Record { seq: seq.value(), why: format!("tier {tier}") })?;
            index.add(seq.value(), tier, words, None);
        }
        for row in txn.open_table(VECTOR)?.iter()? {
            let (seq, row) = row?;
            let (seq, (number, bytes)) = (seq.value(), row.value());
            if number == index.embedder {
                let (scale, values) = coarse_of_stored(bytes, dimension).ok_or(Damage::Vector { seq })?;
                index.set_vector(seq, scale, values.iter().map(|v| *v as i8));
            }
        }
        Ok(index)
    }

    /// A record that is already there is left alone: the index may have been loaded from the very commit.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Added { seq, tier, words, vector } => {
                if self.seqs.last().is_none_or(|last| last < seq) {
                    self.add(*seq, *tier, *words, vector.as_ref());
                }
            }
            Change::Embedded { seq, vector } if vector.values.len() == self.dimension => {
                self.set_vector(*seq, vector.scale, vector.values.iter().copied());
            }
            Change::Embedded { .. } => {}
            Change::Rebuild => *self = Self::default(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.seqs.len()
    }

    pub(crate) fn slot(&self, seq: u64) -> Option<usize> {
        // Sequence numbers have no gaps until records are forgotten, so the first guess is nearly always right.
        let guess = usize::try_from(seq.checked_sub(*self.seqs.first()?)?).ok()?;
        if self.seqs.get(guess) == Some(&seq) { Some(guess) } else { self.seqs.binary_search(&seq).ok() }
    }

    pub(crate) fn seq(&self, slot: usize) -> u64 {
        self.seqs[slot]
    }

    pub(crate) fn tier(&self, slot: usize) -> Tier {
        self.tiers[slot]
    }

    pub(crate) fn words(&self, slot: usize) -> u32 {
        self.words[slot]
    }

    /// About the cosine of the question with every record of these tiers; None where there is no vector.
    pub(crate) fn scan<'a>(
        &'a self,
        query: &'a Coarse,
        tiers: &'a [Tier],
    ) -> impl Iterator<Item = (usize, f32)> + 'a {
        let width = self.dimension.max(1);
        let fits = query.values.len() == self.dimension;
        self.values
            .chunks_exact(width)
            .zip(&self.scales)
            .enumerate()
            .filter(move |(slot, (_, scale))| fits && **scale > 0.0 && tiers.contains(&self.tiers[*slot]))
            .map(|(slot, (values, scale))| (slot, dot(&query.values, values) as f32 * query.scale * scale))
    }

    /// What it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.seqs.capacity() * 8
            + self.tiers.capacity()
            + self.words.capacity() * 4
            + self.scales.capacity() * 4
            + self.values.capacity()
    }

    fn reserve(&mut self, records: usize) {
        self.seqs.reserve(records);
        self.tiers.reserve(records);
        self.words.reserve(records);
        self.scales.reserve(records);
        self.values.reserve(records * self.dimension);
    }

    fn add(&mut self, seq: u64, tier: Tier, words: u32, vector: Option<&Coarse>) {
        self.seqs.push(seq);
        self.tiers.push(tier);
        self.words.push(words);
        self.scales.push(0.0);
        self.values.resize(self.seqs.len() * self.dimension, 0);
        if let Some(vector) = vector.filter(|v| v.values.len() == self.dimension) {
            self.set_vector(seq, vector.scale, vector.values.iter().copied());
        }
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
