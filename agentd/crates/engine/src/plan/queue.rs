//! Who begins, and with whose cells?
//!
//! A request that shares enough with a prompt in progress waits for it instead of computing the same beside it; the
//! one it waits for gets its urgency. A request that is to go first and does not fit holds the queue: who comes later
//! never overtakes into the room it waits for.

use super::*;

impl Planner {
    pub(super) fn admit(&mut self) {
        for id in &self.running {
            if let Some(request) = self.requests.get_mut(id) {
                request.boost = 0;
            }
        }
        while self.may_admit() {
            let Some((id, start)) = self.next_in_queue() else { return };
            if self.takes_from_who_returns(id, &start) || !self.start(id, start) {
                return;
            }
        }
    }

    /// False when nobody could be admitted whatever it has: spares the look-ups.
    fn may_admit(&self) -> bool {
        let mut queued = self.requests.values().filter(|request| !request.running).peekable();
        if queued.peek().is_none() {
            return false;
        }
        if (self.running.len() as u32) < self.room.running {
            return true;
        }
        let running = self.running.iter().filter_map(|id| self.requests.get(id));
        let lowest = running.map(|request| request.class().max(request.boost)).min().unwrap_or(0);
        queued.any(|request| class(request.priority, 0) > lowest)
    }

    /// The first that need not wait for somebody else's prompt.
    fn next_in_queue(&mut self) -> Option<(RequestId, Start)> {
        let queued = self.requests.iter().filter(|(_, request)| !request.running);
        let within = queued.filter(|(_, request)| self.within_own_share(request));
        let mut order: Vec<(Turn, RequestId)> =
            within.map(|(id, request)| (self.turn(*id, request, request.tokens.len() as u32), *id)).collect();
        order.sort_unstable();
        order.truncate(LOOKED_AT);
        let mut exact: Vec<(Turn, RequestId, Start)> = Vec::with_capacity(order.len());
        for (_, id) in order {
            let Some(request) = self.requests.get(&id) else { continue };
            let start = self.start_of(request);
            let left = request.tokens.len() as u32
                - self.begins_at(request, &start).min(request.tokens.len() as u32);
            exact.push((self.turn(id, request, left), id, start));
        }
        exact.sort_unstable_by_key(|(turn, ..)| *turn);
        for (_, id, start) in exact {
            let Some(leader) = self.leader_of(id, &start) else { return Some((id, start)) };
            let urgency = self.requests.get(&id).map_or(0, |request| request.class());
            if let Some(leader) = self.requests.get_mut(&leader) {
                leader.boost = leader.boost.max(urgency);
            }
        }
        None
    }

    /// Where in its tokens a request would begin to compute.
    fn begins_at(&self, request: &Request, start: &Start) -> u32 {
        let resident = if request.seq.is_some() { self.held(request) } else { start.tokens() };
        match request.stored {
            Some(stored) if stored.from <= resident => stored.upto.max(resident),
            _ => resident,
        }
    }

    fn within_own_share(&self, request: &Request) -> bool {
        request.cells_most == 0
            || self.account_cells(&request.account) + request.first_promise() <= request.cells_most
            || self.account_cells(&request.account) == 0
    }

    /// The longest beginning that lies in the cache, or beside it. The last token is always computed: its logits
    /// are wanted.
    fn start_of(&self, request: &Request) -> Start {
        if !request.reuse || request.seq.is_some() {
            return Start::default();
        }
        let wanted = &request.tokens[..request.tokens.len().saturating_sub(1)];
        let resident = self.tree.longest(&request.domain, wanted, None);
        let length = resident.map_or(0, |(_, length)| length);
        // Its own part is at hand already.
        let shelved = match request.stored {
            Some(_) => None,
            None => self.shelf.find(&request.domain, wanted, length),
        };
        Start { resident, shelved }
    }

    /// Somebody who is computing what this request begins with, and has not come to its end.
    fn leader_of(&self, id: RequestId, start: &Start) -> Option<RequestId> {
        let request = self.requests.get(&id)?;
        if !request.reuse || request.seq.is_some() || request.stored.is_some() {
            return None;
        }
        let wanted = &request.tokens[..request.tokens.len().saturating_sub(1)];
        let gain = worth_waiting_for(wanted.len() as u32);
        let leads = |other: &Request| {
            if !other.reuse || other.domain != request.domain {
                return false;
            }
            let same = common(&other.tokens, wanted) as u32;
            same > self.held(other) && same >= start.tokens() + gain
        };
        self.running.iter().copied().find(|other| self.requests.get(other).is_some_and(leads))
    }

    /// Gives a request its sequence and its cells. False when it has to wait.
    fn start(&mut self, id: RequestId, start: Start) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        let (resident, promise) = (self.held(request), request.first_promise());
        let at = if request.seq.is_some() { resident } else { start.resident_tokens() };
        let need = promise.saturating_sub(at);
        let Some(victims) = self.victims_for(id, &start, need) else {
            // Nobody works, so nobody will make room: whoever stepped aside gives up what it still holds.
            return self.running.is_empty() && self.forget_one(id) && {
                let again = self.requests.get(&id).map(|request| self.start_of(request)).unwrap_or_default();
                self.start(id, again)
            };
        };
        let Some(seq) = self.seat(id, &start) else {
            // Ids are held by who stepped aside; what of theirs lies in memory or on disk stays.
            return self.forget_one(id) && {
                let again = self.requests.get(&id).map(|request| self.start_of(request)).unwrap_or_default();
                self.start(id, again)
            };
        };
        self.make_room(need, id);
        for victim in victims {
            // Who only has to leave its place keeps its cells, until they are needed.
            self.step_aside(victim, self.free() < need);
        }
        self.make_room(need, id);
        if self.free() < need {
            tracing::error!(need, free = self.free(), "cells that were counted are not there");
            self.unseat(id, seq);
            return false;
        }
        let Some(request) = self.requests.get_mut(&id) else { return false };
        (request.running, request.promised) = (true, promise);
        self.running.push(id);
        self.accounts.advance(self.accounts.rounds(&request.account));
        let loaded = start.shelved.map_or(0, |found| self.load_cached(id, seq, found));
        let Some(request) = self.requests.get_mut(&id) else { return false };
        if request.cached.is_none() {
            let cached = (start.resident_tokens() + loaded).min(request.prompt);
            request.cached = Some(cached);
            self.counters.cached_tokens += u64::from(cached);
            self.accounts.charge_prompt(&request.account, request.prompt - cached);
        }
        true
    }

    /// Who has to go so that there are so many cells and a place: nobody of the same urgency. `None` if that is not
    /// enough.
    fn victims_for(&self, id: RequestId, start: &Start, need: u32) -> Option<Vec<RequestId>> {
        let request = self.requests.get(&id)?;
        let kept = start.resident.map_or(0, |(seq, length)| self.tree.evictable_within(seq, length));
        let mut available = self.free() + self.tree.counts().evictable.saturating_sub(kept);
        available += self.aside(id).map(|(_, seq)| self.gain_beside(seq, start)).sum::<u32>();
        let mut places = self.room.running.saturating_sub(self.running.len() as u32);
        let mut victims = Vec::new();
        // Its own urgency, not what waiting has added: equals never change places for waiting alone.
        let own_class = class(request.priority, 0);
        for (victim, sacrifice) in self.sacrifices() {
            if (available >= need && places > 0) || sacrifice.class >= own_class {
                break;
            }
            let Some((request, seq)) = self.seated(victim) else { continue };
            available +=
                request.promised.saturating_sub(self.tree.length(seq)) + self.gain_beside(seq, start);
            places += 1;
            victims.push(victim);
        }
        (available >= need && places > 0).then_some(victims)
    }

    /// Cells that a strand would free, but for those that the new request goes on from.
    fn gain_beside(&self, seq: SeqId, start: &Start) -> u32 {
        let private = self.tree.private(seq);
        match start.resident {
            Some((source, length)) if source == seq => {
                private - length.saturating_sub(self.tree.length(seq) - private).min(private)
            }
            _ => private,
        }
    }

    /// A sequence for a request: its own, a new one, or the cached one it goes on from when there is no other.
    fn seat(&mut self, id: RequestId, start: &Start) -> Option<SeqId> {
        let request = self.requests.get(&id)?;
        if let Some(seq) = request.seq {
            return Some(seq);
        }
        let domain = request.domain.clone();
        let source = start.resident;
        let seq = match self.take_id(source.map(|(seq, _)| seq)) {
            Some(seq) => {
                self.tree.fork(&domain, seq, source);
                if let Some((from, length)) = source {
                    self.effects.push(Effect::Share { from, to: seq, length });
                }
                seq
            }
            None => {
                let (seq, length) = source.filter(|(seq, _)| self.cached.contains_key(seq))?;
                self.cached.remove(&seq);
                self.tree.pin(seq, true);
                self.tree.truncate(seq, length);
                self.effects.push(Effect::Trim { seq, from: length });
                seq
            }
        };
        self.clock += 1;
        if let Some(cached) = source.and_then(|(seq, _)| self.cached.get_mut(&seq)) {
            cached.used = self.clock;
        }
        if let Some(request) = self.requests.get_mut(&id) {
            request.seq = Some(seq);
        }
        Some(seq)
    }

    fn unseat(&mut self, id: RequestId, seq: SeqId) {
        self.release(seq);
        if let Some(request) = self.requests.get_mut(&id) {
            request.seq = None;
        }
    }
}
