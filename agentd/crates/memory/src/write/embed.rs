//! Vectors come, and embedders change.
//!
//! Always: vectors of two embedders are never compared. Another digest is another space: its records wait until
//!         each has a vector of it, which takes the old one's place.

use super::{Batch, Meaning};
use crate::error::{Damage, Refusal, RefusedVector, StoreError};
use crate::index::Change;
use crate::journal::{Deed, Why};
use crate::plan::{self, Duplicates};
use crate::tables::LINK_WINDOW;
use crate::vector::Vector;
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::RecordId;
use redb::ReadableTable;

/// SHA-256 of the embedding model's file.
pub type EmbedderDigest = [u8; 32];

/// A vector and who made it.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    pub embedder: EmbedderDigest,
    pub vector: Vec<f32>,
}

/// A pending record's vector, as it was asked for with [`Pending`](crate::Pending).
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    pub id: RecordId,
    pub vector: Vec<f32>,
    /// Whose texts are in it besides the record's own.
    pub with: Vec<RecordId>,
}

impl From<(RecordId, Vec<f32>)> for Made {
    /// Of the record's text alone.
    fn from((id, vector): (RecordId, Vec<f32>)) -> Self {
        Self { id, vector, with: Vec::new() }
    }
}

/// What `complete_embedding` did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Completed {
    pub embedded: u64,
    /// Their records stay pending: an embedder that gives such vectors is broken.
    pub refused: Vec<RefusedVector>,
}

/// What `use_embedder` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedderUse {
    /// Records that wait for a vector of this embedder.
    pub pending: u64,
    pub changed: bool,
}

impl Batch<'_> {
    /// A vector of another embedder, or a broken one, is as good as none: the record waits for a good one.
    pub(super) fn usable_vector(
        &self,
        tier: Tier,
        embedding: Option<&Embedding>,
    ) -> Result<Option<Vector>, StoreError> {
        let meaning = embedding.cloned().map(Meaning::of);
        Ok(self.usable(tier, meaning.as_ref())?.cloned())
    }

    /// The same of one that was made ready.
    pub(super) fn usable<'m>(
        &self,
        tier: Tier,
        meaning: Option<&'m Meaning>,
    ) -> Result<Option<&'m Vector>, StoreError> {
        let Some(meaning) = meaning.filter(|_| plan::has_meaning(tier)) else { return Ok(None) };
        let Some((digest, dimension)) = self.current_embedder()? else { return Ok(None) };
        if digest != meaning.embedding.embedder {
            return Ok(None);
        }
        match meaning.vector(dimension) {
            Ok(vector) => Ok(Some(vector)),
            Err(why) => {
                tracing::warn!(%why, "the embedder gave an unusable vector; the record is stored without it");
                Ok(None)
            }
        }
    }

    pub(crate) fn current_embedder(&self) -> Result<Option<(EmbedderDigest, u32)>, StoreError> {
        match self.counters.embedder {
            0 => Ok(None),
            number => {
                let row = self.embedder.get(number)?.ok_or(Damage::Embedder(number))?;
                let (digest, dimension) = row.value();
                Ok(Some((*digest, dimension)))
            }
        }
    }

    pub(crate) fn complete(
        &mut self,
        embedder: &EmbedderDigest,
        vectors: &[Made],
    ) -> Result<Completed, StoreError> {
        let Some((digest, dimension)) = self.current_embedder()? else {
            return Err(Refusal::OtherEmbedder.into());
        };
        if digest != *embedder {
            return Err(Refusal::OtherEmbedder.into());
        }
        let mut done = Completed::default();
        for Made { id, vector, with } in vectors {
            let Some(seq) = self.seq_of(*id)? else { continue };
            // One of them was purged meanwhile: it waits for a vector that says nothing of it.
            let Some(window) = self.window_of(with)? else { continue };
            let vector = match Vector::new(vector, dimension) {
                Ok(vector) => vector,
                Err(why) => {
                    done.refused.push(RefusedVector { id: *id, why });
                    continue;
                }
            };
            if self.pending.remove(seq)?.is_none() {
                continue;
            }
            self.put_vector(seq, self.counters.embedder, &vector);
            self.link_window(seq, &window)?;
            self.counters.pending -= 1;
            self.counters.vectors += 1;
            done.embedded += 1;
            self.changes.push(Change::Embedded { seq, vector: vector.coarse() });
            self.join_with_earlier(seq, &vector)?;
        }
        Ok(done)
    }

    /// The records whose texts a vector has in it; none when one of them is not there any more.
    pub(super) fn window_of(&self, with: &[RecordId]) -> Result<Option<Vec<u64>>, StoreError> {
        with.iter().map(|id| self.seq_of(*id)).collect()
    }

    pub(super) fn link_window(&mut self, seq: u64, window: &[u64]) -> Result<(), StoreError> {
        for before in window {
            self.link.insert((*before, LINK_WINDOW, seq), ())?;
        }
        Ok(())
    }

    /// A record goes for good: vectors with its text in them go too, and are made again without it.
    pub(super) fn drop_windows_with(&mut self, seq: u64) -> Result<(), StoreError> {
        let mut after = Vec::new();
        for row in self.link.range((seq, LINK_WINDOW, 0)..=(seq, LINK_WINDOW, u64::MAX))? {
            after.push(row?.0.value().2);
        }
        for seq in after {
            let Some(number) = self.rows.embedder_of(seq)? else { continue };
            self.rows.remove_vector(seq);
            if number == self.counters.embedder {
                self.counters.vectors -= 1;
                self.pending.insert(seq, ())?;
                self.counters.pending += 1;
            }
            self.changes.push(Change::Unembedded { seq });
        }
        Ok(())
    }

    /// Now that its meaning is known, a record may turn out to be told before: the earlier one is strengthened, the
    /// later becomes a tombstone.
    fn join_with_earlier(&mut self, seq: u64, vector: &Vector) -> Result<(), StoreError> {
        let (record, life) = (self.record(seq)?, self.life(seq)?);
        let joins = self.ground.duplicates == Duplicates::Reinforce
            && life.state == crate::life::State::Live
            && !life.pinned
            && record.claim.is_none()
            && record.supersedes.is_none();
        if !joins {
            return Ok(());
        }
        let Some((earlier, cosine)) = self.duplicate(life.tier, &record.text, vector, life.trust, seq)?
        else {
            return Ok(());
        };
        if earlier >= seq {
            return Ok(());
        }
        let now = life.recorded_unix_ms;
        self.repeat(earlier, cosine, now)?;
        self.bury(seq, Why::Duplicate, cosine, now, Deed::Forgotten)
    }

    pub(crate) fn use_embedder(
        &mut self,
        digest: &EmbedderDigest,
        dimension: u32,
    ) -> Result<EmbedderUse, StoreError> {
        if dimension == 0 || dimension > crate::vector::DIMENSION_MAX {
            return Err(Refusal::Dimension(dimension).into());
        }
        let number = self.number_of(digest, dimension)?;
        if number == self.counters.embedder {
            return Ok(EmbedderUse { pending: self.counters.pending, changed: false });
        }
        self.counters.embedder = number;
        self.counters.vectors = 0;
        self.counters.pending = 0;
        self.pending.retain(|_, ()| false)?;
        for (seq, _) in self.lives(|life| plan::has_meaning(life.tier))? {
            if self.rows.embedder_of(seq)? == Some(number) {
                self.counters.vectors += 1;
            } else {
                self.pending.insert(seq, ())?;
                self.counters.pending += 1;
            }
        }
        self.changes.push(Change::Rebuild);
        Ok(EmbedderUse { pending: self.counters.pending, changed: true })
    }

    /// The number of an embedder; a new one is written down.
    fn number_of(&mut self, digest: &EmbedderDigest, dimension: u32) -> Result<u32, StoreError> {
        let mut last = 0;
        for row in self.embedder.iter()? {
            let (number, row) = row?;
            let (known, known_dimension) = row.value();
            last = number.value();
            if known == digest {
                if known_dimension != dimension {
                    return Err(Refusal::DimensionChanged { known: known_dimension, named: dimension }.into());
                }
                return Ok(last);
            }
        }
        self.embedder.insert(last + 1, (digest, dimension))?;
        Ok(last + 1)
    }
}
