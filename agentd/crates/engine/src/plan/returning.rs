//! Who will be back in a moment?
//!
//! An agent that asks one request at a time asks the next some milliseconds after the end of an answer. If its place went
//! to somebody else in just that moment, it would wait for another's whole answer each time, and no weight could be
//! kept. So the place is kept for the next step, from those who are further from their next share.
//! Source: "deceptive idleness", S. Iyer and P. Druschel, Anticipatory scheduling, SOSP 2001.
//!
//! True: nothing is kept when nobody works, from a higher class, or for longer than a step, or ten milliseconds if that is
//!       more.

use super::*;

/// An agent on this machine asks again sooner, and what steps last on a fast device is less.
const KEPT_LEAST_MS: u64 = 10;

/// An account whose only request has ended.
#[derive(Debug)]
pub(super) struct Returning {
    account: String,
    class: u8,
    /// That its request had.
    cells: u32,
    /// When somebody could first have had its place.
    since_ms: Option<u64>,
}

impl Planner {
    /// A request has ended that had a place.
    pub(super) fn expect_back(&mut self, request: &Request) {
        if request.running && !self.accounts.has_request(&request.account) {
            self.returning.push(Returning {
                account: request.account.clone(),
                class: class(request.priority, 0),
                cells: request.promised,
                since_ms: None,
            });
        }
    }

    pub(super) fn is_back(&mut self, account: &str) {
        self.returning.retain(|returning| returning.account != account);
    }

    /// Once for each step.
    pub(super) fn expect_no_longer(&mut self) {
        let now_ms = self.now_ms;
        self.returning.retain_mut(|returning| {
            let since_ms = *returning.since_ms.get_or_insert(now_ms);
            since_ms == now_ms || now_ms.saturating_sub(since_ms) < KEPT_LEAST_MS
        });
    }

    /// Would this request take a place from somebody who is expected back, and whose turn is before its own?
    pub(super) fn takes_from_who_returns(&self, id: RequestId, start: &Start) -> bool {
        let Some(request) = self.requests.get(&id).filter(|_| !self.running.is_empty()) else { return false };
        let (own, rounds) = (self.aged_class(request.priority), self.accounts.rounds(&request.account));
        let before = self.returning.iter().filter(|returning| {
            let its = self.aged[usize::from(returning.class)].max(returning.class);
            its >= own && self.accounts.rounds(&returning.account) < rounds
        });
        let (places, cells) = before.fold((0, 0), |(places, cells), one| (places + 1, cells + one.cells));
        let left = self.room.running.saturating_sub(self.running.len() as u32);
        let at = if request.seq.is_some() { self.held(request) } else { start.resident_tokens() };
        let need = request.first_promise().saturating_sub(at);
        places > 0 && (left <= places || self.free() + self.tree.counts().evictable < need + cells)
    }
}
