//! A record is told.
//!
//! Steps: the same request again gives its first answer; what is known already is strengthened instead of stored
//! twice; room is made; a later claim closes the earlier; the record is written.

use super::{Batch, Embedding, Meaning, Ready, new_id};
use crate::error::{Refusal, StoreError};
use crate::forget::{decay, duplicate, supersede, trust};
use crate::journal::{Deed, Entry, Why};
use crate::life::{Life, OPEN_END, State};
use crate::plan::{self, Checked, Detail, Duplicates};
use crate::postings;
use crate::record::{Claim, Record};
use crate::seal::{Hashed, Mark};
use crate::tables::{LINK_EVIDENCE, LINK_SUPERSEDED};
use crate::text;
use crate::vector::Vector;
use agentd_domain::agent_api::{EmbedState, Remembered, Tier};
use agentd_domain::ids::RecordId;
use redb::ReadableTable;
use ring::digest;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

#[derive(Debug)]
pub(crate) struct RememberWork {
    pub(crate) record: Checked,
    pub(crate) recorded_unix_ms: i64,
    pub(crate) key: Option<String>,
    /// Until it is made ready.
    pub(crate) embedding: Option<Embedding>,
    /// Whose texts are in the embedding besides its own.
    pub(crate) with: Vec<RecordId>,
    pub(crate) ready: Ready,
}

/// So many of the records that share words with a new one are looked at: those that share most, newest first.
/// A duplicate beyond them is stored as a record of its own, which costs room and nothing else.
const LOOKED_AT: usize = 16;

impl Batch<'_> {
    pub(crate) fn remember(&mut self, work: &RememberWork) -> Result<Remembered, StoreError> {
        let now = work.recorded_unix_ms;
        self.told_at(now);
        if let Some(earlier) = self.earlier(work)? {
            return Ok(earlier);
        }
        let tier = work.record.tier;
        let window = self.window_of(&work.with)?;
        let unready = work.embedding.clone().map(Meaning::of);
        // One of them was purged meanwhile: what the vector says of it must not stay.
        let meaning = work.ready.meaning.as_ref().or(unready.as_ref()).filter(|_| window.is_some());
        let vector = self.usable(tier, meaning)?;
        let standing = self.standing(work.record.claim.as_ref())?;
        if let Some((seq, cosine)) = self.known_already(&work.record, vector, &standing)? {
            self.repeat(seq, cosine, now)?;
            return self.told(work, seq, self.record(seq)?.id);
        }
        let evidence = self.evidence_of(&work.record)?;
        let record = self.record_of(work);
        self.make_room(tier, record.encoded_bytes(), now)?;

        let seq = self.counters.next_seq;
        self.counters.next_seq += 1;
        let life = self.life_of(work)?;
        let claims: Vec<_> = standing.iter().map(|(standing, _)| *standing).collect();
        let placement = supersede::place(life.valid_from_unix_ms, life.trust, &claims);
        let life = match placement.ends_unix_ms {
            Some(end) => {
                Life { valid_to_unix_ms: end.min(life.valid_to_unix_ms), state: State::Superseded, ..life }
            }
            None => life,
        };
        // A record names the one it takes the place of; of several only the last, the table `link` has all.
        let record = Record { supersedes: self.last_of(&placement.closes)?, ..record };
        match work.ready.terms.as_ref().filter(|terms| terms.are_of(self.ground.seal)) {
            Some(terms) => self.put_ready(seq, &record, life, vector.map(Vector::parts), terms)?,
            None => self.put(seq, &record, life, vector)?,
        };
        if vector.is_some() {
            self.link_window(seq, window.as_deref().unwrap_or_default())?;
        }
        for old in placement.closes {
            self.close(old, seq, &record, life.valid_from_unix_ms, Why::LaterClaim, now)?;
        }
        for other in evidence {
            if self.rows.has(other)? {
                self.link.insert((other, LINK_EVIDENCE, seq), ())?;
            }
        }
        self.told(work, seq, record.id)
    }

    fn last_of(&self, closes: &[u64]) -> Result<Option<RecordId>, StoreError> {
        let Some(seq) = closes.iter().max() else { return Ok(None) };
        // Making room may have purged it.
        if self.rows.has(*seq)? { Ok(Some(self.record(*seq)?.id)) } else { Ok(None) }
    }

    fn told(&mut self, work: &RememberWork, seq: u64, id: RecordId) -> Result<Remembered, StoreError> {
        if let Some(key) = &work.key {
            let (key, request) = (self.once_key(key), self.request_mark(&work.record));
            self.once.insert(&key, (work.recorded_unix_ms, seq, &request))?;
        }
        Ok(Remembered { id, state: self.embed_state(seq)? })
    }

    fn embed_state(&self, seq: u64) -> Result<EmbedState, StoreError> {
        Ok(if !plan::has_meaning(self.life(seq)?.tier) {
            EmbedState::WordsOnly
        } else if self.pending.get(seq)?.is_some() {
            EmbedState::Pending
        } else {
            EmbedState::Embedded
        })
    }

    /// The same request again, within 24 hours: its first answer, never a second record.
    fn earlier(&self, work: &RememberWork) -> Result<Option<Remembered>, StoreError> {
        let Some(key) = &work.key else { return Ok(None) };
        let Some(row) = self.once.get(&self.once_key(key))? else { return Ok(None) };
        let (used_unix_ms, seq, request) = row.value();
        // A clock that was set back makes the age negative: then the key still counts.
        if work.recorded_unix_ms.saturating_sub(used_unix_ms) > plan::IDEMPOTENCY_KEPT_MS {
            return Ok(None);
        }
        // It may have been purged meanwhile; then nothing is known of it, as it should be.
        if !self.rows.has(seq)? {
            return Ok(None);
        }
        let (record, life) = (self.record(seq)?, self.life(seq)?);
        let same = match *request == Mark::default() {
            true => is_same_request(&record, &life, &work.record),
            false => *request == self.request_mark(&work.record),
        };
        if !same {
            return Err(Refusal::KeyReused.into());
        }
        Ok(Some(Remembered { id: record.id, state: self.embed_state(seq)? }))
    }

    /// Not keyed by the store's key: it must be found after the key was changed, and it is no text of anybody.
    fn once_key(&self, key: &str) -> [u8; 16] {
        salted(self.ground.store, b"once", key)
    }

    /// A key that was used in another format of this store.
    pub(crate) fn take_over_key(&mut self, key: &str, used_unix_ms: i64, seq: u64) -> Result<(), StoreError> {
        let key = self.once_key(key);
        self.once.insert(&key, (used_unix_ms, seq, &Mark::default()))?;
        Ok(())
    }

    fn request_mark(&self, told: &Checked) -> Mark {
        // A request that is sent again after its run ended is the same request: the session is its host's word.
        let detail = Detail { session: None, ..told.detail.clone() };
        let what = format!(
            "{:?}\0{}\0{}\0{:?}\0{:?}\0{:?}\0{:?}\0{}",
            told.tier,
            told.role.name(),
            told.source.name(),
            told.reference,
            told.event_unix_ms,
            told.claim,
            detail,
            told.text
        );
        self.ground.seal.mark(Hashed::Request, what.as_bytes())
    }

    pub(super) fn session_of(&self, session: &str) -> u64 {
        session_number(self.ground.store, session)
    }

    fn record_of(&self, work: &RememberWork) -> Record {
        let told = &work.record;
        Record {
            id: new_id(work.recorded_unix_ms),
            owner: self.ground.owner,
            reference: told.reference.clone(),
            session: told.detail.session.clone(),
            claim: told.claim.clone(),
            supersedes: None,
            evidence: told.detail.evidence.clone(),
            text: told.text.clone(),
        }
    }

    fn life_of(&mut self, work: &RememberWork) -> Result<Life, StoreError> {
        let (told, now) = (&work.record, work.recorded_unix_ms);
        let (session, order) = self.place_in_session(told.detail.session.as_deref(), told.detail.order)?;
        let event = told.event_unix_ms.unwrap_or(now);
        Ok(Life {
            tier: told.tier,
            role: told.role,
            source: told.source,
            state: State::Live,
            before: State::Live,
            pinned: told.detail.pinned,
            trust: trust::of(told.source),
            words: 0,
            uses: 0,
            strength: decay::FIRST_STRENGTH,
            half_life_days: told.detail.half_life_days.unwrap_or_else(|| decay::half_life_days(told.role)),
            event_unix_ms: event,
            recorded_unix_ms: now,
            valid_from_unix_ms: told.detail.valid_from_unix_ms.unwrap_or(event),
            valid_to_unix_ms: told.detail.valid_to_unix_ms.unwrap_or(OPEN_END),
            last_used_unix_ms: now,
            changed_unix_ms: 0,
            session,
            order,
            bytes: 0,
            told: None,
        })
    }

    /// A session's records stand in the order they name, or are told.
    pub(super) fn place_in_session(
        &mut self,
        session: Option<&str>,
        order: Option<u64>,
    ) -> Result<(u64, u64), StoreError> {
        let Some(session) = session.map(|name| self.session_of(name)) else { return Ok((0, 0)) };
        let (next, ended) = self.session.get(session)?.map_or((0, 0), |row| row.value());
        let order = order.unwrap_or(next);
        self.session.insert(session, (next.max(order.saturating_add(1)), ended))?;
        Ok((session, order))
    }

    fn evidence_of(&self, told: &Checked) -> Result<Vec<u64>, StoreError> {
        let known = told.detail.evidence.iter().map(|id| {
            let seq = self.seq_of(*id)?.ok_or(Refusal::Evidence(*id))?;
            match self.life(seq)?.state {
                State::Forgotten => Err(Refusal::Evidence(*id).into()),
                State::Live | State::Superseded => Ok(seq),
            }
        });
        known.collect()
    }

    pub(super) fn claim_key(&self, claim: &Claim, seq: u64) -> [u8; 24] {
        let mark = self.ground.seal.mark(Hashed::Claim, supersede::key(claim).as_bytes());
        let mut key = [0; 24];
        key[..16].copy_from_slice(&mark);
        key[16..].copy_from_slice(&seq.to_be_bytes());
        key
    }

    /// What is said of the same thing already, tombstones left out.
    fn standing(&self, claim: Option<&Claim>) -> Result<Vec<(supersede::Standing, Record)>, StoreError> {
        let Some(claim) = claim.filter(|claim| claim.functional) else { return Ok(Vec::new()) };
        let (from, to) = (self.claim_key(claim, 0), self.claim_key(claim, u64::MAX));
        let mut standing = Vec::new();
        for row in self.claim.range(from.as_slice()..=to.as_slice())? {
            let key = row?.0;
            let seq = u64::from_be_bytes(std::array::from_fn(|i| key.value()[16 + i]));
            let (record, life) = (self.record(seq)?, self.life(seq)?);
            if life.state != State::Forgotten && record.claim.as_ref().is_some_and(|c| c.functional) {
                let one = supersede::Standing {
                    seq,
                    valid_from_unix_ms: life.valid_from_unix_ms,
                    valid_to_unix_ms: life.valid_to_unix_ms,
                    trust: life.trust,
                };
                standing.push((one, record));
            }
        }
        Ok(standing)
    }

    /// The end of a record's interval: another one holds from there.
    pub(super) fn close(
        &mut self,
        old: u64,
        new: u64,
        record: &Record,
        at_unix_ms: i64,
        why: Why,
        now: i64,
    ) -> Result<(), StoreError> {
        // Making room for the new one may have taken the old one.
        if !self.rows.has(old)? {
            return Ok(());
        }
        let life = self.life(old)?;
        let (tier, id) = (life.tier, self.record(old)?.id);
        let latest = life.valid_to_unix_ms.max(life.valid_from_unix_ms);
        let closed = Life {
            valid_to_unix_ms: at_unix_ms.clamp(life.valid_from_unix_ms, latest),
            changed_unix_ms: now,
            ..life
        };
        let closed = match life.state {
            State::Forgotten => Life { before: State::Superseded, ..closed },
            State::Live | State::Superseded => Life { state: State::Superseded, ..closed },
        };
        self.set_life(old, closed)?;
        self.link.insert((old, LINK_SUPERSEDED, new), ())?;
        self.note(Entry {
            at_unix_ms: now,
            deed: Deed::Superseded,
            why,
            tier,
            id,
            other: Some(record.id),
            number: 0.0,
        })
    }

    fn known_already(
        &self,
        told: &Checked,
        vector: Option<&Vector>,
        standing: &[(supersede::Standing, Record)],
    ) -> Result<Option<(u64, f32)>, StoreError> {
        if self.ground.duplicates == Duplicates::Keep {
            return Ok(None);
        }
        if told.claim.is_some() {
            // The same claim in the same words, still standing.
            let same = standing.iter().find(|(standing, record)| {
                standing.valid_to_unix_ms == OPEN_END
                    && record.text == told.text
                    && standing.trust >= trust::of(told.source)
            });
            return Ok(same.map(|(standing, _)| (standing.seq, 1.0)));
        }
        let open =
            told.detail.valid_to_unix_ms.is_none() && told.detail.evidence.is_empty() && !told.detail.pinned;
        match vector.filter(|_| open) {
            Some(vector) => self.duplicate(told.tier, &told.text, vector, trust::of(told.source), u64::MAX),
            None => Ok(None),
        }
    }

    /// A live record that is one memory with this text, and how near it is. One that is believed less does not
    /// stand in for what is told now.
    pub(super) fn duplicate(
        &self,
        tier: Tier,
        text: &str,
        vector: &Vector,
        trust: u8,
        except: u64,
    ) -> Result<Option<(u64, f32)>, StoreError> {
        let terms = text::term_counts(text);
        let own: BTreeSet<&str> = terms.keys().map(String::as_str).collect();
        // Long terms are rare ones, nearly always.
        let mut rare: Vec<&str> = own.iter().copied().collect();
        rare.sort_unstable_by_key(|term| std::cmp::Reverse(term.len()));
        rare.truncate(duplicate::terms_to_look_up(own.len()));
        let looked_up = rare.len();
        let mut shared: BTreeMap<u64, u32> = BTreeMap::new();
        for term in rare {
            for seq in self.seqs_with(tier, term)? {
                *shared.entry(seq).or_default() += 1;
            }
        }
        let mut candidates: Vec<(u64, u32)> = shared.into_iter().filter(|(seq, _)| *seq != except).collect();
        candidates
            .sort_unstable_by_key(|(seq, shared)| (std::cmp::Reverse(*shared), std::cmp::Reverse(*seq)));
        for (seq, shared) in candidates.into_iter().take(LOOKED_AT) {
            let Some(cosine) = self.cosine_with(seq, vector)? else { continue };
            // Far apart only because of what was said around them?
            if cosine < duplicate::COSINE && (shared as usize) < looked_up {
                continue;
            }
            let (record, life) = (self.record(seq)?, self.life(seq)?);
            let other = text::term_counts(&record.text);
            let jaccard = duplicate::jaccard(&own, &other.keys().map(String::as_str).collect());
            if life.state == State::Live
                && life.trust >= trust
                && record.claim.is_none()
                && (duplicate::is_duplicate(cosine, jaccard)
                    || life.session != 0 && duplicate::says_the_same(text, &record.text))
                && !duplicate::differ_in_what_matters(text, &record.text)
            {
                return Ok(Some((seq, cosine)));
            }
        }
        Ok(None)
    }

    pub(super) fn seqs_with(&self, tier: Tier, term: &str) -> Result<Vec<u64>, StoreError> {
        let mark = self.ground.seal.mark(Hashed::Term, term.as_bytes());
        let (from, to) = (postings::key(tier, &mark, 0), postings::key(tier, &mark, u64::MAX));
        let mut found = Vec::new();
        for row in self.posting.range(from.as_slice()..=to.as_slice())? {
            let (key, sealed) = row?;
            let key = key.value().try_into().map_err(|_| crate::Damage::Postings("a key".to_owned()))?;
            found.extend(super::open_block(self.ground.seal, &key, sealed.value())?.iter().map(|p| p.seq));
        }
        let new = self.new_postings.get(&(tier, mark)).into_iter().flatten();
        found.extend(new.map(|posting| posting.seq));
        if let Some(gone) = self.gone_postings.get(&(tier, mark)) {
            found.retain(|seq| !gone.contains(seq));
        }
        Ok(found)
    }

    pub(super) fn cosine_with(&self, seq: u64, vector: &Vector) -> Result<Option<f32>, StoreError> {
        let Some(stored) = self.rows.vector(seq)?.filter(|v| v.embedder == self.counters.embedder) else {
            return Ok(None);
        };
        let cosine = vector.cosine_with_stored(&stored.first, &stored.fine);
        Ok(Some(cosine.ok_or(crate::Damage::Vector { seq })?))
    }

    /// Told again: what is known is strengthened.
    pub(super) fn repeat(&mut self, seq: u64, cosine: f32, now: i64) -> Result<(), StoreError> {
        let life = self.life(seq)?;
        let id = self.record(seq)?.id;
        self.set_life(seq, decay::used(&life, now))?;
        self.note(Entry {
            at_unix_ms: now,
            deed: Deed::Repeated,
            why: Why::Duplicate,
            tier: life.tier,
            id,
            other: None,
            number: cosine,
        })
    }
}

/// How a session stands in its records' lives; 0 means none.
pub(crate) fn session_number(store: Uuid, session: &str) -> u64 {
    let hash = salted(store, b"session", session);
    u64::from_le_bytes(std::array::from_fn(|i| hash[i])).max(1)
}

fn salted(store: Uuid, what: &[u8], text: &str) -> [u8; 16] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(store.as_bytes());
    context.update(what);
    context.update(text.as_bytes());
    let hash = context.finish();
    let mut short = [0; 16];
    short.copy_from_slice(&hash.as_ref()[..16]);
    short
}

/// Whether the record came of this request, as far as the record tells. Without a time in the request it has that
/// of the first attempt.
fn is_same_request(record: &Record, life: &Life, told: &Checked) -> bool {
    record.text == told.text
        && life.tier == told.tier
        && life.role == told.role
        && life.source == told.source
        && record.reference == told.reference
        && told.event_unix_ms.is_none_or(|event| event == life.event_unix_ms)
}
