//! A run ends: what of its log is worth keeping goes to the long memory (`forget/promote.rs` decides).

use super::{Batch, Embedding, new_id};
use crate::error::StoreError;
use crate::forget::promote::{self, Item};
use crate::forget::{decay, duplicate, trust};
use crate::journal::{Deed, Why};
use crate::life::{Life, State};
use crate::rank;
use crate::record::Record;
use crate::text;
use crate::vector::Vector;
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::RecordId;
use redb::ReadableTable;
use std::collections::{BTreeMap, BTreeSet};

/// A run is over.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionEnd {
    pub session: String,
    pub ended_unix_ms: i64,
    /// Vectors of the run's items, as far as somebody made them: with them, likeness is that of meanings;
    /// without, of words.
    pub embeddings: Vec<(RecordId, Embedding)>,
}

/// What became of its log.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SessionEnded {
    pub items: u64,
    /// New records of the long memory, each with its item and the item's salience.
    pub promoted: Vec<(RecordId, RecordId, f32)>,
    /// Items that the long memory knew already.
    pub repeated: u64,
    /// Items that were worth keeping and found no room.
    pub no_room: u64,
}

/// Of a long run so many of the last items are judged; a ring of 32 MiB may hold a hundred thousand.
const JUDGED_MOST: usize = 2000;
/// So many records that share a rare word with an item are compared with it.
const COMPARED: usize = 32;

impl Batch<'_> {
    pub(crate) fn end_session(&mut self, end: &SessionEnd) -> Result<SessionEnded, StoreError> {
        let session = self.session_of(&end.session);
        self.end(session, end)
    }

    /// Ends all sessions but this one: of runs whose end nobody told, because power or agentd went first. Says how
    /// many.
    pub(crate) fn end_sessions_but(&mut self, current: Option<&str>, now: i64) -> Result<u64, StoreError> {
        let current = current.map(|session| self.session_of(session));
        let mut open = Vec::new();
        for row in self.session.iter()? {
            let (session, row) = row?;
            if row.value().1 == 0 && Some(session.value()) != current {
                open.push(session.value());
            }
        }
        let end = SessionEnd { session: String::new(), ended_unix_ms: now, embeddings: Vec::new() };
        for session in &open {
            // Documents' parts are a session too; nothing of theirs is in a log.
            self.end(*session, &end)?;
        }
        Ok(open.len() as u64)
    }

    fn end(&mut self, session: u64, end: &SessionEnd) -> Result<SessionEnded, StoreError> {
        let now = end.ended_unix_ms;
        self.told_at(now);
        let (next, ended) = self.session.get(session)?.map_or((0, 0), |row| row.value());
        if ended != 0 {
            // Told twice: what there was to keep was kept.
            return Ok(SessionEnded::default());
        }
        self.session.insert(session, (next, now.max(1)))?;
        self.flush_postings()?;
        let mut lives =
            self.lives(|l| l.tier == Tier::Working && l.session == session && l.state == State::Live)?;
        lives.sort_unstable_by_key(|(seq, life)| (life.order, *seq));
        lives.drain(..lives.len().saturating_sub(JUDGED_MOST));

        let embeddings: BTreeMap<RecordId, &Embedding> =
            end.embeddings.iter().map(|(id, e)| (*id, e)).collect();
        let mut read = Vec::with_capacity(lives.len());
        for (seq, life) in lives {
            let record = self.record(seq)?;
            let vector = self.usable_vector(Tier::Spirit, embeddings.get(&record.id).copied())?;
            let (likeness, idf_mass) = self.likeness(&record.text, vector.as_ref())?;
            read.push((record, life, vector, likeness, idf_mass));
        }
        let items: Vec<Item<'_>> = read
            .iter()
            .map(|(record, life, _, likeness, idf_mass)| Item {
                text: &record.text,
                role: life.role,
                source: life.source,
                pinned: life.pinned,
                uses: life.uses,
                likeness: *likeness,
                idf_mass: *idf_mass,
            })
            .collect();
        let mut done = SessionEnded { items: items.len() as u64, ..SessionEnded::default() };
        for (verdict, (record, life, vector, ..)) in promote::judge(&items).into_iter().zip(&read) {
            let Some(role) = verdict.promoted else { continue };
            let known = match vector {
                Some(vector) => self.duplicate(Tier::Spirit, &record.text, vector, life.trust, u64::MAX)?,
                None => None,
            };
            if let Some((seq, cosine)) = known {
                self.repeat(seq, cosine, now)?;
                done.repeated += 1;
                continue;
            }
            match self.promote(record, life, role, verdict.salience, now) {
                Ok(id) => done.promoted.push((id, record.id, verdict.salience)),
                Err(StoreError::Refused(_)) => done.no_room += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn promote(
        &mut self,
        item: &Record,
        life: &Life,
        role: crate::record::Role,
        salience: f32,
        now: i64,
    ) -> Result<RecordId, StoreError> {
        let record = Record { id: new_id(now), ..item.clone() };
        self.make_room(Tier::Spirit, record.encoded_bytes(), now)?;
        let seq = self.counters.next_seq;
        self.counters.next_seq += 1;
        let kept = Life {
            tier: Tier::Spirit,
            role,
            trust: trust::of(life.source),
            uses: 0,
            strength: decay::FIRST_STRENGTH.max(salience),
            half_life_days: decay::half_life_days(role),
            recorded_unix_ms: now,
            last_used_unix_ms: now,
            ..*life
        };
        // Judged by itself, it is found with those around it: it waits for the vector of its window like any other.
        self.put(seq, &record, kept, None)?;
        self.journal(now, Deed::Promoted, Why::Salient, Tier::Spirit, item.id, Some(record.id), salience)?;
        Ok(record.id)
    }

    /// The largest likeness of a text to what the long memory holds, and the sum of its terms' idf there.
    fn likeness(&self, text: &str, vector: Option<&Vector>) -> Result<(f32, f32), StoreError> {
        let terms = text::term_counts(text);
        let own: BTreeSet<&str> = terms.keys().map(String::as_str).collect();
        let records = self.counters.tier(Tier::Spirit).records;
        let (mut mass, mut by_rarity) = (0.0, Vec::new());
        for term in &own {
            let seqs = self.seqs_with(Tier::Spirit, term)?;
            mass += rank::idf(records as usize, seqs.len());
            by_rarity.push(seqs);
        }
        by_rarity.sort_unstable_by_key(Vec::len);
        let mut candidates = BTreeSet::new();
        for seqs in by_rarity {
            candidates.extend(seqs.into_iter().rev().take(COMPARED));
            if candidates.len() >= COMPARED {
                break;
            }
        }
        let mut likeness = 0f32;
        for seq in candidates.into_iter().rev().take(COMPARED) {
            if self.life(seq)?.state != State::Live {
                continue;
            }
            let cosine = match vector {
                Some(vector) => self.cosine_with(seq, vector)?,
                None => None,
            };
            let one = match cosine {
                Some(cosine) => cosine,
                None => {
                    let other = text::term_counts(&self.record(seq)?.text);
                    duplicate::jaccard(&own, &other.keys().map(String::as_str).collect())
                }
            };
            likeness = likeness.max(one);
        }
        Ok((likeness.clamp(0.0, 1.0), mass))
    }
}
