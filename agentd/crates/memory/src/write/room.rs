//! A tier is full. What goes is decided in `forget/evict.rs`; here it goes.

use super::Batch;
use crate::error::{Refusal, StoreError};
use crate::forget::decay;
use crate::forget::evict::{self, Candidate, Full, Load};
use crate::journal::{Deed, Why};
use crate::life::{Life, State};
use crate::plan::Budget;
use crate::tables::LINK_EVIDENCE;
use agentd_domain::agent_api::Tier;
use redb::ReadableTable;
use std::collections::{BTreeMap, BTreeSet};

impl Batch<'_> {
    /// Room for one more record of so many bytes, or a refusal that has changed nothing.
    pub(super) fn make_room(&mut self, tier: Tier, bytes: u64, now: i64) -> Result<(), StoreError> {
        let budget = self.ground.budgets.of(tier)?;
        let coming = Load { records: 1, bytes };
        if self.held(tier).plus(coming).fits(evict::share(budget, evict::BEGIN_HUNDREDTHS)) {
            return Ok(());
        }
        match evict::when_full(tier) {
            Full::Refuse if self.held(tier).plus(coming).fits(budget) => Ok(()),
            Full::Refuse => Err(self.full(tier, budget)),
            Full::Ring => self.turn_ring(tier, budget, coming, now),
            Full::Fade => self.fade(tier, budget, coming, now),
        }
    }

    /// The oldest of the log go for good.
    fn turn_ring(&mut self, tier: Tier, budget: Budget, coming: Load, now: i64) -> Result<(), StoreError> {
        if self.held(tier).plus(coming).fits(budget) {
            return Ok(());
        }
        let candidates = self
            .lives(|life| life.tier == tier)?
            .iter()
            .map(|(seq, life)| in_order(*seq, life, *seq as f64))
            .collect();
        let into = evict::share(budget, evict::END_HUNDREDTHS);
        let gone = evict::victims(candidates, self.held(tier), coming, into);
        if !self.without(tier, &gone).plus(coming).fits(budget) {
            return Err(self.full(tier, budget));
        }
        for victim in gone {
            self.purge(victim.seq, Why::Budget, now)?;
        }
        Ok(())
    }

    /// The least present become tombstones, and the oldest tombstones go for good if there is no room even so.
    fn fade(&mut self, tier: Tier, budget: Budget, coming: Load, now: i64) -> Result<(), StoreError> {
        if !self.standing_in(tier).plus(coming).fits(evict::share(budget, evict::BEGIN_HUNDREDTHS)) {
            let sole = self.sole_evidence()?;
            let candidates = self
                .lives(|life| life.tier == tier && life.state != State::Forgotten)?
                .iter()
                .map(|(seq, life)| Candidate {
                    sole_evidence: sole.contains(seq),
                    ..in_order(*seq, life, decay::effective_log2(life, now))
                })
                .collect();
            let into = evict::share(budget, evict::END_HUNDREDTHS);
            let gone = evict::victims(candidates, self.standing_in(tier), coming, into);
            let left = gone.iter().fold(self.standing_in(tier), |load, victim| {
                load.minus(Load { records: 1, bytes: victim.bytes })
            });
            if !left.plus(coming).fits(budget) {
                return Err(self.full(tier, budget));
            }
            for victim in gone {
                self.bury(victim.seq, Why::Budget, victim.order.exp2() as f32, now, Deed::Forgotten)?;
            }
        }
        if !self.held(tier).plus(coming).fits(budget) {
            let tombstones = self
                .lives(|life| life.tier == tier && life.state == State::Forgotten)?
                .iter()
                .map(|(seq, life)| Candidate {
                    pinned: false,
                    ..in_order(*seq, life, life.changed_unix_ms as f64)
                })
                .collect();
            // One in a hundred more than needed: a full tier is not read through at every record.
            let gone = evict::victims(tombstones, self.held(tier), coming, evict::share(budget, 99));
            for victim in gone {
                self.purge(victim.seq, Why::Room, now)?;
            }
        }
        match self.held(tier).plus(coming).fits(budget) {
            true => Ok(()),
            false => Err(self.full(tier, budget)),
        }
    }

    fn held(&self, tier: Tier) -> Load {
        let held = self.counters.tier(tier);
        Load { records: held.records, bytes: held.bytes }
    }

    /// Without tombstones.
    fn standing_in(&self, tier: Tier) -> Load {
        let held = self.counters.tier(tier);
        self.held(tier).minus(Load { records: held.forgotten, bytes: held.forgotten_bytes })
    }

    fn without(&self, tier: Tier, gone: &[Candidate]) -> Load {
        gone.iter().fold(self.held(tier), |load, one| load.minus(Load { records: 1, bytes: one.bytes }))
    }

    fn full(&self, tier: Tier, budget: Budget) -> StoreError {
        let held = self.held(tier);
        Refusal::TierFull {
            tier,
            records: held.records,
            bytes: held.bytes,
            budget_records: budget.records,
            budget_bytes: budget.bytes,
        }
        .into()
    }

    /// Of every live insight the one piece of evidence that must stay: the latest that stands.
    fn sole_evidence(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut last: BTreeMap<u64, u64> = BTreeMap::new();
        for row in self.link.iter()? {
            let (evidence, kind, insight) = row?.0.value();
            if kind == LINK_EVIDENCE
                && self.life(insight)?.state == State::Live
                && self.life(evidence)?.state != State::Forgotten
            {
                last.insert(insight, evidence);
            }
        }
        Ok(last.into_values().collect())
    }
}

fn in_order(seq: u64, life: &Life, order: f64) -> Candidate {
    Candidate { seq, bytes: u64::from(life.bytes), pinned: life.pinned, sole_evidence: false, order }
}
