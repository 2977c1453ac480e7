//! Forget, restore, pin, correct, use, roll back, sweep.
//!
//! Always: whatever is done here is written into the journal with its reason, in the same transaction. Gone for
//!         good means that no table of this file names the record or its words any longer; that its old pages open
//!         no more is the matter of `rewrite.rs`.

use super::{Batch, Embedding, new_id};
use crate::error::{Refusal, StoreError};
use crate::forget::{decay, trust};
use crate::journal::{self, Deed, Entry, Why};
use crate::life::{Life, OPEN_END, State};
use crate::plan;
use crate::record::{Record, SourceKind};
use crate::tables::{LINK_EVIDENCE, LINK_SUPERSEDED};
use agentd_domain::agent_api::{EmbedState, Remembered, Tier};
use agentd_domain::ids::RecordId;
use redb::ReadableTable;
use std::collections::BTreeSet;

/// How something is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForgetMode {
    /// Found by no question; restorable for seven days, unless its room is needed.
    Tombstone,
    /// Gone for good, at once.
    Purge,
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Tombstones whose seven days were over.
    pub purged: u64,
    /// Records of runs that ended a day ago.
    pub expired: u64,
    /// More is to be done: sweep again.
    pub more: bool,
    /// When the file must be written anew under another key at the latest, because something is gone for good.
    pub rewrite_by_unix_ms: Option<i64>,
}

/// What a roll-back did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RolledBack {
    pub forgotten: u64,
    /// Earlier records that stand again.
    pub reopened: u64,
}

#[derive(Debug)]
pub(crate) struct CorrectWork {
    pub(crate) id: RecordId,
    pub(crate) text: String,
    /// Whose word it is.
    pub(crate) source: SourceKind,
    pub(crate) now_unix_ms: i64,
    pub(crate) embedding: Option<Embedding>,
}

const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// A tombstone is restorable so long.
pub(crate) const TOMBSTONE_MS: i64 = 7 * DAY_MS;
/// The log of a run outlives it by this.
pub(crate) const RUN_KEPT_MS: i64 = DAY_MS;
/// What is gone for good must not open on the medium after this.
pub(crate) const REWRITE_WITHIN_MS: i64 = DAY_MS;
/// One sweep's transaction must not delay a record that is being told by more than some tenths of a second.
const SWEPT_AT_ONCE: usize = 500;

impl Batch<'_> {
    pub(crate) fn forget(&mut self, ids: &[RecordId], mode: ForgetMode, now: i64) -> Result<u64, StoreError> {
        // All are known before the first goes: a refusal must have changed nothing.
        let known: Result<BTreeSet<u64>, StoreError> =
            ids.iter().map(|id| self.known(*id).map(|(seq, _)| seq)).collect();
        let mut done = 0;
        for seq in known? {
            let state = self.life(seq)?.state;
            match mode {
                ForgetMode::Tombstone if state == State::Forgotten => continue,
                ForgetMode::Tombstone => self.bury(seq, Why::Asked, 0.0, now, Deed::Forgotten)?,
                ForgetMode::Purge => {
                    self.forget_what_rested_on(seq, now)?;
                    self.purge(seq, Why::Asked, now)?;
                }
            }
            done += 1;
        }
        Ok(done)
    }

    pub(crate) fn restore(&mut self, id: RecordId, now: i64) -> Result<(), StoreError> {
        let (seq, life) = self.known(id)?;
        if life.state != State::Forgotten {
            return Err(Refusal::NotForgotten(id).into());
        }
        let held = self.counters.tier_mut(life.tier);
        held.forgotten -= 1;
        held.forgotten_bytes -= u64::from(life.bytes);
        // Used now: what a person fetched back is not the next to go.
        let back = Life { state: life.before, changed_unix_ms: now, ..decay::used(&life, now) };
        self.set_life(seq, back)?;
        self.journal(now, Deed::Restored, Why::Asked, life.tier, id, None, 0.0)
    }

    pub(crate) fn pin(&mut self, id: RecordId, pinned: bool, now: i64) -> Result<(), StoreError> {
        let (seq, life) = self.known(id)?;
        if life.state == State::Forgotten {
            return Err(Refusal::Unknown(id).into());
        }
        if life.pinned == pinned {
            return Ok(());
        }
        self.set_life(seq, Life { pinned, ..life })?;
        let deed = if pinned { Deed::Pinned } else { Deed::Unpinned };
        self.journal(now, deed, Why::Asked, life.tier, id, None, 0.0)
    }

    /// Another text in a record's place. The old one stays for questions about then.
    pub(crate) fn correct(&mut self, work: &CorrectWork) -> Result<Remembered, StoreError> {
        let now = work.now_unix_ms;
        let (old, life) = self.known(work.id)?;
        if life.state != State::Live {
            return Err(Refusal::NotLive(work.id).into());
        }
        let trust = trust::of(work.source);
        if trust < life.trust {
            return Err(Refusal::BelievedMore { of: life.source.name(), by: work.source.name() }.into());
        }
        let before = self.record(old)?;
        let record = Record {
            id: new_id(now),
            owner: self.ground.owner,
            supersedes: Some(work.id),
            text: work.text.clone(),
            ..before
        };
        self.make_room(life.tier, record.encoded_bytes(), now)?;
        let vector = self.usable_vector(life.tier, work.embedding.as_ref())?;
        let seq = self.counters.next_seq;
        self.counters.next_seq += 1;
        let corrected = Life {
            state: State::Live,
            source: work.source,
            trust,
            uses: 0,
            strength: decay::FIRST_STRENGTH,
            // What a person put right stays.
            half_life_days: match work.source {
                SourceKind::User => f32::INFINITY,
                _ => life.half_life_days,
            },
            recorded_unix_ms: now,
            valid_from_unix_ms: now.max(life.valid_from_unix_ms),
            valid_to_unix_ms: OPEN_END,
            last_used_unix_ms: now,
            changed_unix_ms: 0,
            ..life
        };
        self.put(seq, &record, corrected, vector.as_ref())?;
        for id in &record.evidence {
            if let Some(evidence) = self.seq_of(*id)? {
                self.link.insert((evidence, LINK_EVIDENCE, seq), ())?;
            }
        }
        self.close(old, seq, &record, corrected.valid_from_unix_ms, Why::Corrected, now)?;
        let state = match (plan::has_meaning(life.tier), vector.is_some()) {
            (false, _) => EmbedState::WordsOnly,
            (true, true) => EmbedState::Embedded,
            (true, false) => EmbedState::Pending,
        };
        Ok(Remembered { id: record.id, state })
    }

    /// These were recalled. Unknown ones are passed over: they may have been forgotten meanwhile.
    pub(crate) fn used(&mut self, ids: &[RecordId], now: i64) -> Result<(), StoreError> {
        for id in ids {
            let Some(seq) = self.seq_of(*id)? else { continue };
            let life = self.life(seq)?;
            if life.state != State::Forgotten {
                self.set_life(seq, decay::used(&life, now))?;
            }
        }
        Ok(())
    }

    /// Everything that came from this source since then becomes a tombstone, and what it had closed stands again.
    pub(crate) fn roll_back(
        &mut self,
        source: SourceKind,
        reference: Option<&str>,
        since_unix_ms: i64,
        now: i64,
    ) -> Result<RolledBack, StoreError> {
        let mut done = RolledBack::default();
        let of_source = self.lives(|life| {
            life.source == source && life.state != State::Forgotten && life.recorded_unix_ms >= since_unix_ms
        })?;
        for (seq, _) in of_source {
            if reference
                .is_some_and(|wanted| self.record(seq).is_ok_and(|r| r.reference.as_deref() != Some(wanted)))
            {
                continue;
            }
            // It may have gone with what it rested on.
            if self.life(seq)?.state == State::Forgotten {
                continue;
            }
            self.bury(seq, Why::SourceRolledBack, 0.0, now, Deed::Forgotten)?;
            done.forgotten += 1;
            done.reopened += self.reopen_what_it_closed(seq, now)?;
        }
        Ok(done)
    }

    fn reopen_what_it_closed(&mut self, newer: u64, now: i64) -> Result<u64, StoreError> {
        let mut closed = Vec::new();
        for row in self.link.iter()? {
            let (old, kind, new) = row?.0.value();
            if kind == LINK_SUPERSEDED && new == newer {
                closed.push(old);
            }
        }
        let (until, record) = (self.life(newer)?.valid_to_unix_ms, self.record(newer)?);
        for old in &closed {
            self.link.remove((*old, LINK_SUPERSEDED, newer))?;
            let life = self.life(*old)?;
            // It holds as long as the one that is taken back would have.
            let state = if until == OPEN_END { State::Live } else { State::Superseded };
            let back = match life.state {
                State::Forgotten => Life { before: state, valid_to_unix_ms: until, ..life },
                State::Live | State::Superseded => {
                    Life { state, valid_to_unix_ms: until, changed_unix_ms: now, ..life }
                }
            };
            self.set_life(*old, back)?;
            let id = self.record(*old)?.id;
            self.journal(now, Deed::Reopened, Why::SourceRolledBack, life.tier, id, Some(record.id), 0.0)?;
        }
        Ok(closed.len() as u64)
    }

    /// What time has come for: tombstones of seven days, runs that ended a day ago, old entries of the journal.
    pub(crate) fn sweep(&mut self, now: i64) -> Result<Swept, StoreError> {
        let mut ended = BTreeSet::new();
        for row in self.session.iter()? {
            let (session, row) = row?;
            let (_, at) = row.value();
            if at != 0 && now.saturating_sub(at) >= RUN_KEPT_MS {
                ended.insert(session.value());
            }
        }
        let run_over = |life: &Life| life.tier == Tier::Working && ended.contains(&life.session);
        let time_over = |life: &Life| {
            life.state == State::Forgotten && now.saturating_sub(life.changed_unix_ms) >= TOMBSTONE_MS
        };
        let due = self.lives(|life| run_over(life) || time_over(life))?;
        let mut swept = Swept { more: due.len() > SWEPT_AT_ONCE, ..Swept::default() };
        for (seq, life) in due.into_iter().take(SWEPT_AT_ONCE) {
            match time_over(&life) {
                true => {
                    self.forget_what_rested_on(seq, now)?;
                    self.purge(seq, Why::TimeOver, now)?;
                    swept.purged += 1;
                }
                false => {
                    self.purge(seq, Why::RunOver, now)?;
                    swept.expired += 1;
                }
            }
        }
        if !swept.more {
            for session in ended {
                self.session.remove(session)?;
            }
        }
        let oldest = self.counters.next_entry.saturating_sub(journal::KEPT);
        let stale: Vec<u64> = {
            let rows = self.journal.range(..oldest)?.take(SWEPT_AT_ONCE);
            rows.map(|row| row.map(|(number, _)| number.value())).collect::<Result<_, _>>()?
        };
        for number in stale {
            self.journal.remove(number)?;
        }
        swept.rewrite_by_unix_ms = (self.counters.purged > 0)
            .then(|| self.counters.first_purged_unix_ms.saturating_add(REWRITE_WITHIN_MS));
        Ok(swept)
    }

    /// A record becomes a tombstone, and so do insights that rested on nothing else.
    pub(super) fn bury(
        &mut self,
        seq: u64,
        why: Why,
        number: f32,
        now: i64,
        deed: Deed,
    ) -> Result<(), StoreError> {
        let life = self.life(seq)?;
        if life.state == State::Forgotten {
            return Ok(());
        }
        let id = self.record(seq)?.id;
        let held = self.counters.tier_mut(life.tier);
        held.forgotten += 1;
        held.forgotten_bytes += u64::from(life.bytes);
        let gone = Life { before: life.state, state: State::Forgotten, changed_unix_ms: now, ..life };
        self.set_life(seq, gone)?;
        self.journal(now, deed, why, life.tier, id, None, number)?;
        self.forget_what_rested_on(seq, now)
    }

    fn forget_what_rested_on(&mut self, seq: u64, now: i64) -> Result<(), StoreError> {
        let mut insights = Vec::new();
        for row in self.link.range((seq, LINK_EVIDENCE, 0)..=(seq, LINK_EVIDENCE, u64::MAX))? {
            insights.push(row?.0.value().2);
        }
        for insight in insights {
            let record = self.record(insight)?;
            let mut stands = false;
            for id in &record.evidence {
                if let Some(other) = self.seq_of(*id)?.filter(|other| *other != seq) {
                    stands |= self.life(other)?.state != State::Forgotten;
                }
            }
            if !stands {
                self.bury(insight, Why::EvidenceGone, 0.0, now, Deed::Forgotten)?;
            }
        }
        Ok(())
    }

    /// Gone for good.
    pub(super) fn purge(&mut self, seq: u64, why: Why, now: i64) -> Result<(), StoreError> {
        let (record, life) = self.drop_row(seq)?;
        // The ring and a run that is over leave by themselves; nobody asked that they be unreadable by tomorrow.
        if !matches!(why, Why::Budget | Why::RunOver | Why::Room) {
            if self.counters.purged == 0 {
                self.counters.first_purged_unix_ms = now;
            }
            self.counters.purged += 1;
        }
        match why {
            // A log is no loss worth a line for each of its words.
            Why::Budget | Why::RunOver => Ok(()),
            why => self.journal(now, Deed::Purged, why, life.tier, record.id, None, 0.0),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an entry's own fields")]
    pub(super) fn journal(
        &mut self,
        at_unix_ms: i64,
        deed: Deed,
        why: Why,
        tier: Tier,
        id: RecordId,
        other: Option<RecordId>,
        number: f32,
    ) -> Result<(), StoreError> {
        self.note(Entry { at_unix_ms, deed, why, tier, id, other, number })
    }
}
