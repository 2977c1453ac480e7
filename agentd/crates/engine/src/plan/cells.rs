//! Where do cells come from, and where do they go?
//!
//! From the free ones, from cached beginnings (oldest first, from their ends), then from whoever is to step aside.
//! Who steps aside keeps what it shares; its own part is copied to memory or disk, or is computed again.

use super::*;

impl Planner {
    /// Every running request gets room for its next token, or makes room by stepping aside itself.
    pub(super) fn grow(&mut self) {
        let mut order: Vec<(RequestId, Sacrifice)> = self.sacrifices();
        // The last to step aside is the first to grow.
        order.reverse();
        for (id, _) in order {
            while let Some(wanted) = self.growth(id) {
                self.make_room(wanted, id);
                let granted = wanted.min(self.free());
                if granted > 0 {
                    if let Some(request) = self.requests.get_mut(&id) {
                        request.promised += granted;
                    }
                } else if !self.sacrifice_for(id) {
                    break;
                }
            }
        }
    }

    /// Cells that a running request would like, if it has none left for its next token.
    fn growth(&self, id: RequestId) -> Option<u32> {
        let request = self.requests.get(&id).filter(|request| request.running)?;
        let needs = (request.tokens.len() as u32).saturating_sub(request.promised);
        if needs == 0 {
            return None;
        }
        let wanted = request.limit.saturating_sub(request.promised).min(GROWTH_CELLS).max(needs);
        // Within what its account may have; at its end others of the same account step aside.
        let own = match request.cells_most {
            0 => wanted,
            most => most.saturating_sub(self.account_cells(&request.account)).min(wanted),
        };
        Some(own)
    }

    /// Somebody steps aside for a request that must grow; perhaps itself. False when that is so, or nobody can.
    fn sacrifice_for(&mut self, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        // What is scarce is its account's share, if there is one and it is used up.
        let account = (request.cells_most > 0 && self.account_cells(&request.account) >= request.cells_most)
            .then(|| request.account.clone());
        let candidates = self.sacrifices().into_iter().map(|(victim, _)| victim);
        let victim =
            candidates.filter(|victim| *victim == id || self.gain(*victim) > 0).find(|victim| {
                match (&account, self.requests.get(victim)) {
                    (Some(account), Some(other)) => other.account == *account,
                    _ => true,
                }
            });
        match victim {
            Some(victim) if victim != id => {
                self.step_aside(victim, true);
                true
            }
            // The last that works: what others still hold goes.
            _ if self.running.len() == 1 => self.forget_one(id),
            _ => {
                self.step_aside(id, true);
                false
            }
        }
    }

    /// Who works, the first to step aside first.
    pub(super) fn sacrifices(&self) -> Vec<(RequestId, Sacrifice)> {
        let mut all: Vec<(RequestId, Sacrifice)> = Vec::with_capacity(self.running.len());
        for id in &self.running {
            let Some((request, seq)) = self.seated(*id) else { continue };
            let sacrifice = Sacrifice {
                class: request.class().max(request.boost),
                over_share: self.accounts.over_share(&request.account),
                to_restore: self.tree.private(seq),
                order: *id,
            };
            all.push((*id, sacrifice));
        }
        all.sort_by(|(_, left), (_, right)| left.compare(right));
        all
    }

    /// Cells that come free when this one steps aside.
    pub(super) fn gain(&self, id: RequestId) -> u32 {
        let Some((request, seq)) = self.seated(id) else { return 0 };
        request.promised.saturating_sub(self.tree.length(seq)) + self.tree.private(seq)
    }

    /// A running request goes back to the queue, and gives its own cells up if they are needed.
    pub(super) fn step_aside(&mut self, id: RequestId, cells_are_needed: bool) {
        self.running.retain(|running| *running != id);
        self.counters.preemptions += 1;
        if let Some(request) = self.requests.get_mut(&id) {
            (request.running, request.promised) = (false, 0);
        }
        if cells_are_needed {
            self.put_aside(id);
        }
    }

    /// The own cells of a request that stepped aside are copied out, or will be computed again.
    fn put_aside(&mut self, id: RequestId) {
        let Some((request, seq)) = self.seated(id) else { return };
        let length = self.tree.length(seq);
        let shared = length - self.tree.private(seq);
        // Its own part may lie there already, not yet brought back.
        let has_stored = request.stored.is_some();
        let stored = if has_stored { None } else { self.store(seq, (shared, length), None) };
        self.tree.truncate(seq, shared);
        self.effects.push(Effect::Trim { seq, from: shared });
        if shared == 0 {
            self.tree.release(seq);
            self.idle_ids.push(seq);
        }
        if let Some(request) = self.requests.get_mut(&id) {
            if let Some(blob) = stored {
                request.stored = Some(Stored { blob, from: shared, upto: length });
            }
            if shared == 0 {
                request.seq = None;
            }
        }
    }

    /// Who stepped aside and still has a sequence, but for one.
    pub(super) fn aside(&self, except: RequestId) -> impl Iterator<Item = (RequestId, SeqId)> + '_ {
        let others = self.requests.iter().filter(move |(id, request)| **id != except && !request.running);
        others.filter_map(|(id, request)| Some((*id, request.seq?)))
    }

    /// Takes what a request that stepped aside still holds, of any but this one. False when nobody holds anything.
    pub(super) fn forget_one(&mut self, except: RequestId) -> bool {
        let Some((id, seq)) = self.aside(except).max() else { return false };
        // What is its own can be kept, and fits again once the part before it was computed.
        self.put_aside(id);
        if let Some(request) = self.requests.get_mut(&id)
            && request.seq.take().is_some()
        {
            self.release(seq);
        }
        true
    }

    /// Takes from cached beginnings, then from those who stepped aside, until so many cells are free for this one.
    pub(super) fn make_room(&mut self, cells: u32, wanting: RequestId) {
        while self.free() < cells {
            let short = cells - self.free();
            if self.evict(short) {
                continue;
            }
            // Whoever came last waits longest.
            let last = self.aside(wanting).filter(|(_, seq)| self.tree.private(*seq) > 0).max();
            match last {
                Some((id, _)) => self.put_aside(id),
                None => return,
            }
        }
    }

    fn evict(&mut self, short: u32) -> bool {
        let mut oldest: Vec<(u64, SeqId)> =
            self.cached.iter().map(|(seq, cached)| (cached.used, *seq)).collect();
        oldest.sort_unstable();
        let Some((_, first)) = oldest.first().copied() else { return false };
        let frees = oldest.iter().map(|(_, seq)| *seq).find(|seq| self.tree.private(*seq) > 0);
        let Some(seq) = frees else {
            // Held by others as well, all of it: its id is all there is to have.
            self.drop_cached(first);
            return true;
        };
        let (length, private) = (self.tree.length(seq), self.tree.private(seq));
        let cut = if self.shelve(seq, (length - private, length)) {
            private
        } else {
            private.min(short.max(EVICT_LEAST_CELLS))
        };
        self.tree.truncate(seq, length - cut);
        self.effects.push(Effect::Trim { seq, from: length - cut });
        if self.tree.private(seq) == 0 {
            self.drop_cached(seq);
        }
        true
    }

    /// Keeps the end of a cached beginning aside, if there is room and it is worth it.
    fn shelve(&mut self, seq: SeqId, (from, upto): (u32, u32)) -> bool {
        let Some(cached) = self.cached.get(&seq) else { return false };
        let (domain, tokens) = (cached.domain.clone(), self.tree.tokens(seq));
        if self.shelf.covers(&domain, &tokens, from) {
            return true;
        }
        self.store(seq, (from, upto), Some((domain, tokens))).is_some()
    }

    fn store(
        &mut self,
        seq: SeqId,
        (from, upto): (u32, u32),
        cached: Option<(Domain, Vec<i32>)>,
    ) -> Option<BlobId> {
        if !self.room.sharing || upto - from < STORE_LEAST_TOKENS {
            return None;
        }
        let mut dropped = Vec::new();
        let put = self.shelf.put((from, upto), cached, &mut dropped);
        self.effects.extend(dropped.into_iter().map(|blob| Effect::Drop { blob }));
        let (blob, tier) = put?;
        self.effects.push(Effect::Store { seq, from, upto, blob, tier });
        self.counters.stored += 1;
        Some(blob)
    }

    /// Brings back what running requests had put aside, once everything before it is there.
    pub(super) fn load(&mut self) {
        for id in self.running.clone() {
            let Some((request, seq)) = self.seated(id) else { continue };
            let Some(stored) = request.stored else { continue };
            let held = self.tree.length(seq);
            if held < stored.from {
                continue;
            }
            if held < stored.upto && self.has_cells_to_load(stored.upto - stored.from) {
                self.load_blob(id, seq, stored.blob, (held, stored.upto));
            }
            // It is used up, was overtaken, or there is no room to unfold it: then it is computed.
            if let Some(request) = self.requests.get_mut(&id) {
                request.stored = None;
            }
            self.drop_blob(stored.blob);
        }
    }

    /// Tokens that came from a cached beginning aside.
    pub(super) fn load_cached(&mut self, id: RequestId, seq: SeqId, found: Found) -> u32 {
        let held = self.tree.length(seq);
        if !self.has_cells_to_load(found.upto - found.from)
            || !self.shelf.has(found.blob)
            || found.usable <= held
        {
            return 0;
        }
        self.shelf.touch(found.blob);
        self.load_blob(id, seq, found.blob, (held, found.usable));
        found.usable - held
    }

    fn load_blob(&mut self, id: RequestId, seq: SeqId, blob: BlobId, (from, upto): (u32, u32)) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        self.tree.extend(seq, &request.tokens[from as usize..upto as usize]);
        request.reached = request.reached.max(upto);
        self.effects.push(Effect::Load { blob, seq, from, upto });
        self.counters.restored += 1;
    }

    /// A blob is unfolded whole, beside everything that is there, before its part is taken.
    fn has_cells_to_load(&self, cells: u32) -> bool {
        self.room.cells - self.tree.used() >= cells
    }

    /// An id for somebody new. The strand that it goes on from is not given away.
    pub(super) fn take_id(&mut self, except: Option<SeqId>) -> Option<SeqId> {
        if self.idle_ids.is_empty() {
            let others = self.cached.iter().filter(|(seq, _)| Some(**seq) != except);
            let oldest = others.min_by_key(|(_, cached)| cached.used).map(|(seq, _)| *seq)?;
            let (length, private) = (self.tree.length(oldest), self.tree.private(oldest));
            self.shelve(oldest, (length - private, length));
            self.drop_cached(oldest);
        }
        self.idle_ids.pop()
    }

    fn drop_cached(&mut self, seq: SeqId) {
        self.cached.remove(&seq);
        self.release(seq);
    }

    pub(super) fn release(&mut self, seq: SeqId) {
        self.tree.release(seq);
        self.effects.push(Effect::Trim { seq, from: 0 });
        self.idle_ids.push(seq);
    }

    pub(super) fn drop_blob(&mut self, blob: BlobId) {
        if self.shelf.remove(blob) {
            self.effects.push(Effect::Drop { blob });
        }
    }
}
