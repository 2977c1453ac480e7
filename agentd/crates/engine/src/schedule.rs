//! Whose turn is it, and who has to step aside?
//!
//! Pure rules, without the state they are applied to (that is [`crate::plan`]'s).
//!
//! Order: by class of priority, to which the longest waiting in it adds; within a class accounts that have something
//! left of their share before those that have had it; within these whoever is done soonest (what is in the cache
//! already need not be computed, so a long resident prefix goes first), counted from when it came, so that nobody is
//! passed for ever.
//! Cost:  a computed prompt token counts 1, a token of an answer 2, a token from the cache nothing.
//! Source: deficit with longest-prefix match (DLPM), arXiv 2501.14312; virtual token counter, arXiv 2401.00588.

use std::collections::HashMap;

/// Priorities are 0 to 100; each twenty are a class.
const PRIORITIES_PER_CLASS: u8 = 20;
pub(crate) const TOP_CLASS: u8 = 5;
/// What one class is worth in time: a request that has waited this long counts as one class higher, so that no
/// stream of more urgent requests keeps it out for ever. Ten seconds are a long answer on a small machine.
const CLASS_AGE_MS: u64 = 10_000;
/// What the account with the greatest weight is given when all have used up theirs, in virtual tokens. Larger keeps
/// one prefix in work for longer, smaller is fairer over short times.
const REFILL: f64 = 512.0;
/// Rounds for which an account without a request is treated as if it had one: an agent asks again when it has read the
/// answer.
const AWAY_ROUNDS: u64 = 4;
/// What an answer's token costs beside a prompt's.
const OUTPUT_COST: f64 = 2.0;
/// What a request waits for rather than compute it a second time beside somebody who is at it.
const WORTH_WAITING_TOKENS: u32 = 256;
const WORTH_WAITING_LEAST: u32 = 32;

/// The class of a priority, after it has waited.
pub(crate) fn class(priority: u8, waited_ms: u64) -> u8 {
    let aged = waited_ms / CLASS_AGE_MS;
    let own = u64::from(priority.min(100) / PRIORITIES_PER_CLASS);
    (own + aged).min(u64::from(TOP_CLASS)) as u8
}

/// Tokens in progress elsewhere for which a prompt of this length waits: half of a short one.
pub(crate) fn worth_waiting_for(prompt_tokens: u32) -> u32 {
    (prompt_tokens / 2).clamp(WORTH_WAITING_LEAST, WORTH_WAITING_TOKENS)
}

/// What each account may still use before others go first.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    of: HashMap<String, Account>,
    /// The greatest weight.
    most: f64,
}

#[derive(Debug)]
struct Account {
    deficit: f64,
    weight: f64,
    requests: u32,
    /// Rounds since it had a request.
    away: u64,
}

impl Accounts {
    /// A request of this account came. Its latest weight holds.
    pub(crate) fn join(&mut self, name: &str, weight: u32) {
        let weight = f64::from(weight.max(1));
        let account =
            self.of.entry(name.to_owned()).or_insert(Account { deficit: 0.0, weight, requests: 0, away: 0 });
        account.weight = weight;
        account.requests += 1;
        account.away = 0;
        self.most = self.most.max(weight);
    }

    /// A request of this account has ended. What it owes or has left stays for its next one.
    pub(crate) fn leave(&mut self, name: &str) {
        if let Some(account) = self.of.get_mut(name) {
            account.requests = account.requests.saturating_sub(1);
        }
    }

    pub(crate) fn has_request(&self, name: &str) -> bool {
        self.of.get(name).is_some_and(|account| account.requests > 0)
    }

    pub(crate) fn charge_prompt(&mut self, name: &str, tokens: u32) {
        self.charge(name, f64::from(tokens));
    }

    pub(crate) fn charge_answer(&mut self, name: &str, tokens: u32) {
        self.charge(name, f64::from(tokens) * OUTPUT_COST);
    }

    fn charge(&mut self, name: &str, cost: f64) {
        if let Some(account) = self.of.get_mut(name) {
            account.deficit -= cost;
        }
    }

    /// After how many rounds it has something left of its share: none if it has now.
    pub(crate) fn rounds(&self, name: &str) -> u64 {
        let Some(account) = self.of.get(name) else { return 0 };
        if account.deficit > 0.0 {
            0
        } else {
            (-account.deficit / share(account.weight, self.most)).floor() as u64 + 1
        }
    }

    /// Shares that an account is behind (negative) or ahead of the others.
    pub(crate) fn over_share(&self, name: &str) -> f64 {
        self.of.get(name).map_or(0.0, |account| -account.deficit / account.weight)
    }

    /// Gives everybody so many new shares, because somebody begins who had to wait for them. Only then: a round that
    /// nobody could use would be lost to those who have not had theirs.
    pub(crate) fn advance(&mut self, rounds: u64) {
        if rounds == 0 {
            return;
        }
        let most = self.most;
        for account in self.of.values_mut() {
            let each = share(account.weight, most);
            // Nobody saves up more than one share.
            account.deficit = (account.deficit + rounds as f64 * each).min(each);
            account.away += if account.requests > 0 { 0 } else { rounds };
        }
        self.of.retain(|_, account| account.deficit < 0.0 || account.away < AWAY_ROUNDS);
        self.most = self.of.values().map(|account| account.weight).fold(1.0, f64::max);
    }
}

fn share(weight: f64, most: f64) -> f64 {
    (REFILL * weight / most).max(1.0)
}

/// Where somebody stands in the queue. Smaller goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    /// Counted from the top.
    class: u8,
    /// Until its account has something left of its share.
    rounds: u64,
    /// When it would be done if it had been alone since it came.
    due_ms: u64,
    order: u64,
}

impl Turn {
    pub(crate) fn new(class: u8, rounds: u64, arrived_ms: u64, takes_ms: u64, order: u64) -> Self {
        Self {
            class: TOP_CLASS - class.min(TOP_CLASS),
            rounds,
            due_ms: arrived_ms.saturating_add(takes_ms),
            order,
        }
    }
}

/// How willingly somebody who works is put aside. Smaller goes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sacrifice {
    pub(crate) class: u8,
    /// By how many of its shares its account is ahead.
    pub(crate) over_share: f64,
    /// What comes back from memory costs little, what must be computed again much: tokens to bring back.
    pub(crate) to_restore: u32,
    pub(crate) order: u64,
}

impl Sacrifice {
    pub(crate) fn compare(&self, other: &Self) -> std::cmp::Ordering {
        // Ahead by less than a share is not ahead: small differences must not make sequences change places.
        let ahead = |sacrifice: &Self| (sacrifice.over_share / REFILL).floor();
        self.class
            .cmp(&other.class)
            .then(ahead(other).total_cmp(&ahead(self)))
            .then(self.to_restore.cmp(&other.to_restore))
            .then(other.order.cmp(&self.order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waiting_makes_important() {
        assert_eq!((class(0, 0), class(50, 0), class(100, 0), class(255, 0)), (0, 2, 5, 5));
        assert_eq!(class(0, 3 * CLASS_AGE_MS), 3);
        assert_eq!(class(50, u64::MAX), TOP_CLASS);
    }

    #[test]
    fn turns_go_by_class_then_share_then_what_is_soon_done() {
        let urgent = Turn::new(5, 1, 1000, 9000, 9);
        let behind = Turn::new(2, 0, 900, 8000, 3);
        let cached = Turn::new(2, 0, 1000, 10, 8);
        let old = Turn::new(2, 0, 0, 900, 1);
        let had = Turn::new(2, 1, 0, 0, 0);
        let mut turns = [had, behind, old, cached, urgent];
        turns.sort();
        assert_eq!(turns, [urgent, old, cached, behind, had]);
    }

    #[test]
    fn rounds_follow_weights_and_nobody_saves_up() {
        let mut accounts = Accounts::default();
        accounts.join("light", 1);
        accounts.join("heavy", 4);
        assert_eq!((accounts.rounds("light"), accounts.rounds("heavy")), (1, 1));
        accounts.advance(2);
        assert_eq!(accounts.of["heavy"].deficit, REFILL);
        assert_eq!(accounts.of["light"].deficit, REFILL / 4.0);
        accounts.charge_answer("light", 1000);
        assert_eq!((accounts.rounds("light"), accounts.rounds("heavy")), (15, 0));
        // Alone in the queue, it goes on at once; the other has no more than one share for it.
        accounts.advance(15);
        assert_eq!(accounts.rounds("light"), 0);
        assert_eq!(accounts.of["heavy"].deficit, REFILL);
        // Who leaves in debt and comes back still owes, and who left something finds it.
        accounts.charge_prompt("light", 10_000);
        accounts.charge_prompt("heavy", 100);
        accounts.leave("light");
        accounts.leave("heavy");
        accounts.advance(2);
        accounts.join("light", 1);
        accounts.join("heavy", 4);
        assert!(accounts.over_share("light") > 5_000.0);
        assert_eq!(accounts.of["heavy"].deficit, REFILL, "for some rounds it counts as here");
        accounts.leave("heavy");
        accounts.advance(AWAY_ROUNDS);
        assert!(!accounts.of.contains_key("heavy"), "not for ever");
        accounts.leave("light");
        accounts.advance(10_000);
        assert!(!accounts.of.contains_key("light"), "it has paid");
    }

    #[test]
    fn the_lowest_and_the_one_ahead_steps_aside() {
        let one = |class, over_share, to_restore, order| Sacrifice { class, over_share, to_restore, order };
        let mut all = [
            one(2, 0.0, 10, 1),
            one(2, 0.0, 10, 2),
            one(2, 0.0, 5, 0),
            one(2, 3.0 * REFILL, 900, 0),
            one(1, -3.0, 900, 0),
        ];
        all.sort_by(Sacrifice::compare);
        let seen: Vec<_> = all.iter().map(|one| (one.class, one.to_restore, one.order)).collect();
        assert_eq!(seen, [(1, 900, 0), (2, 900, 0), (2, 5, 0), (2, 10, 2), (2, 10, 1)]);
    }

    proptest! {
        /// Whoever is served by deficit gets service by weight, whatever the requests cost.
        #[test]
        fn service_follows_weights(
            weights in proptest::collection::vec(1u32..6, 2..6),
            costs in proptest::collection::vec(20u32..400, 50..51),
        ) {
            let names: Vec<String> = (0..weights.len()).map(|n| format!("a{n}")).collect();
            let mut accounts = Accounts::default();
            for (name, weight) in names.iter().zip(&weights) {
                accounts.join(name, *weight);
            }
            let mut served = vec![0.0; names.len()];
            for turn in 0..4000usize {
                let needed = names.iter().map(|name| accounts.rounds(name)).min().unwrap();
                accounts.advance(needed);
                // The worst order: always the first that has anything left.
                let next = names.iter().position(|name| accounts.rounds(name) == 0).unwrap();
                let cost = costs[(turn * 7 + next * 3) % costs.len()];
                accounts.charge_prompt(&names[next], cost);
                served[next] += f64::from(cost);
            }
            let shares: Vec<f64> = served.iter().zip(&weights).map(|(s, w)| s / f64::from(*w)).collect();
            prop_assert!(jain(&shares) >= 0.95, "{shares:?}");
        }
    }

    /// Jain's index of fairness: 1 when all are equal, 1/n when one has everything.
    pub(crate) fn jain(shares: &[f64]) -> f64 {
        let sum: f64 = shares.iter().sum();
        sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
    }
}
