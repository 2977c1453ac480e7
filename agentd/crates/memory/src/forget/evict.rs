//! What goes when a tier is full?
//!
//! The long memory forgets what is least present: first as tombstones, restorable, then for good. Above 95 % of a
//! budget records become tombstones until 90 % are left, so that forgetting happens in batches; the room between
//! is what tombstones live in. When even that is needed, the oldest tombstones go for good before their time.
//! The log of runs is a ring: its oldest go for good. Knowledge does not fade: a full one refuses.
//!
//! Always: a budget is never exceeded by one byte. What is pinned never goes, nor the last evidence that a live
//!         insight rests on. What is told is kept or refused, never traded for something pinned.

use crate::plan::Budget;
use agentd_domain::agent_api::Tier;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// What is told must be refused.
    Refuse,
    /// The oldest go for good.
    Ring,
    /// The least present become tombstones.
    Fade,
}

pub(crate) fn when_full(tier: Tier) -> Full {
    match tier {
        Tier::Working => Full::Ring,
        Tier::Spirit => Full::Fade,
        Tier::Active | Tier::Codegraph | Tier::Knowledge => Full::Refuse,
    }
}

/// Records and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Load {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
}

impl Load {
    pub(crate) fn fits(self, budget: Budget) -> bool {
        self.records <= budget.records && self.bytes <= budget.bytes
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            records: self.records.saturating_add(other.records),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            records: self.records.saturating_sub(other.records),
            bytes: self.bytes.saturating_sub(other.bytes),
        }
    }
}

/// This share of a budget, for what is not a tombstone.
pub(crate) fn share(budget: Budget, hundredths: u64) -> Budget {
    // Rounded up: a budget of a handful is used whole.
    let part = |whole: u64| whole - (u128::from(whole) * u128::from(100 - hundredths.min(100)) / 100) as u64;
    Budget { records: part(budget.records), bytes: part(budget.bytes) }
}

/// Above this much of a budget, forgetting begins ..
pub(crate) const BEGIN_HUNDREDTHS: u64 = 95;
/// .. and goes on down to this.
pub(crate) const END_HUNDREDTHS: u64 = 90;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) seq: u64,
    pub(crate) bytes: u64,
    pub(crate) pinned: bool,
    /// A live insight rests on it alone.
    pub(crate) sole_evidence: bool,
    /// What goes first is smallest: presence, or age.
    pub(crate) order: f64,
}

/// Whom to let go so that the rest and what comes fit into this much, least first. Fewer than needed when too much
/// is pinned.
pub(crate) fn victims(
    mut candidates: Vec<Candidate>,
    held: Load,
    coming: Load,
    into: Budget,
) -> Vec<Candidate> {
    candidates.retain(|c| !c.pinned && !c.sole_evidence);
    candidates.sort_unstable_by(|a, b| a.order.total_cmp(&b.order).then(a.seq.cmp(&b.seq)));
    let mut left = held.plus(coming);
    let mut gone = 0;
    for candidate in &candidates {
        if left.fits(into) {
            break;
        }
        left = left.minus(Load { records: 1, bytes: candidate.bytes });
        gone += 1;
    }
    candidates.truncate(gone);
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (1u64..100, proptest::bool::weighted(0.2), proptest::bool::weighted(0.1), -50f64..0.0);
        proptest::collection::vec(one, 0..40).prop_map(|all| {
            (0u64..)
                .zip(all)
                .map(|(seq, (bytes, pinned, sole_evidence, order))| Candidate {
                    seq,
                    bytes,
                    pinned,
                    sole_evidence,
                    order,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn the_least_go_no_more_than_needed_and_nobody_who_must_stay(
            candidates in any_candidates(), coming in 1u64..100, records in 0u64..40, bytes in 0u64..2000
        ) {
            let into = Budget { records, bytes };
            let held = Load {
                records: candidates.len() as u64,
                bytes: candidates.iter().map(|c| c.bytes).sum(),
            };
            let coming = Load { records: 1, bytes: coming };
            let gone = victims(candidates.clone(), held, coming, into);
            prop_assert!(gone.iter().all(|c| !c.pinned && !c.sole_evidence));
            let after = |n: usize| {
                gone.iter().take(n).fold(held.plus(coming), |l, c| l.minus(Load { records: 1, bytes: c.bytes }))
            };
            let may_go = candidates.iter().filter(|c| !c.pinned && !c.sole_evidence).count();
            prop_assert!(after(gone.len()).fits(into) || gone.len() == may_go);
            if !gone.is_empty() {
                prop_assert!(!after(gone.len() - 1).fits(into), "one too many");
            }
            let most = gone.iter().map(|c| c.order).fold(f64::NEG_INFINITY, f64::max);
            let kept = candidates.iter().filter(|c| !gone.contains(c) && !c.pinned && !c.sole_evidence);
            prop_assert!(kept.into_iter().all(|c| c.order >= most));
        }

        #[test]
        fn a_share_is_never_more_than_the_whole(records in any::<u64>(), bytes in any::<u64>(), part in 0u64..=100) {
            let share = share(Budget { records, bytes }, part);
            prop_assert!(share.records <= records && share.bytes <= bytes);
        }
    }
}
