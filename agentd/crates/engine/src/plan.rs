//! What does the engine do next?
//!
//! Owns:   every request of one model from its arrival to its end, the shadow of the KV cache, the ledger of what was
//!         put aside. Decides; [`crate::chat`] does it with llama.cpp, the tests with a cache of their own.
//!
//! ```text
//!             a place, cells                      all computed
//!  queued ──────────────────────> running: prompt ────────────> running: answer ──end──> cached or gone
//!    ^                               │                              │
//!    └── steps aside: own cells to memory, disk, or forgotten ──────┘
//! ```
//!
//! In:     requests, the tokens that were chosen, how long steps took. Out: effects on the cache, then a batch.
//! True:   cells used and cells promised never exceed the cache, so a decode always finds its cells; a promise that
//!         must grow takes from what is cached, then from whoever is to step aside, and fails nobody; as long as a
//!         request is here, some step brings one of them forward.
//! Order:  effects are carried out in order, before the batch of the same step.

use crate::pace::{Pace, Read, Urgency};
use crate::radix::{Counts, Domain, Prefixes, SeqId, common};
use crate::schedule::{Accounts, Sacrifice, TOP_CLASS, Turn, class, worth_waiting_for};
use crate::shelf::{BlobId, Found, Shelf, Shelves, Tier};
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) type RequestId = u64;

/// Cells that an answer is promised beyond its prompt, and by which the promise grows.
const GROWTH_CELLS: u32 = 256;
/// A shorter beginning is not worth a sequence id.
const KEEP_LEAST_TOKENS: u32 = 16;
/// Fewer cells are computed again sooner than they are written and read.
const STORE_LEAST_TOKENS: u32 = 32;
/// What is thrown away of a cached beginning at once, at least.
const EVICT_LEAST_CELLS: u32 = 64;
/// Requests whose beginnings are looked up in one round: the rest waits behind them anyway.
const LOOKED_AT: usize = 64;

/// What there is to share out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Of the KV cache.
    pub(crate) cells: u32,
    /// Sequences that work at once.
    pub(crate) running: u32,
    /// Sequence ids, those of cached beginnings and of who stepped aside included.
    pub(crate) ids: u16,
    pub(crate) batch_tokens: u32,
    pub(crate) shelves: Shelves,
    /// False for models whose cache cannot be cut at any position.
    pub(crate) sharing: bool,
}

/// A request, as far as its place is concerned.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) account: String,
    /// For whom it is counted what it holds; empty is the account.
    pub(crate) holder: String,
    pub(crate) domain: Domain,
    pub(crate) priority: u8,
    pub(crate) weight: u32,
    /// Most cells of this account at once; 0 is no limit.
    pub(crate) cells_most: u32,
    pub(crate) tokens: Vec<i32>,
    /// Most tokens of the answer; 0 is as many as fit.
    pub(crate) most_new: u32,
    /// Takes cells of others, and leaves its own to them.
    pub(crate) reuse: bool,
}

/// Something to do to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The first cells of one sequence become another's as well.
    Share {
        from: SeqId,
        to: SeqId,
        length: u32,
    },
    /// A sequence leaves all cells from this position on.
    Trim {
        seq: SeqId,
        from: u32,
    },
    /// Keys and values of these positions are copied out.
    Store {
        seq: SeqId,
        from: u32,
        upto: u32,
        blob: BlobId,
        tier: Tier,
    },
    /// What was copied out comes back: of the blob's positions, these to this sequence.
    Load {
        blob: BlobId,
        seq: SeqId,
        from: u32,
        upto: u32,
    },
    Drop {
        blob: BlobId,
    },
}

/// What one request contributes to the next batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) request: RequestId,
    pub(crate) seq: SeqId,
    /// Position of the first token.
    pub(crate) from: u32,
    pub(crate) tokens: u32,
    /// Its logits choose the next token.
    pub(crate) last: bool,
    /// Guessed tokens that are computed after it ([`Planner::guess_of`]).
    pub(crate) guessed: u32,
}

impl Part {
    /// The one token of somebody who answers.
    pub(crate) fn is_answer(&self) -> bool {
        self.tokens == 1 && self.last
    }
}

/// Since the model was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counters {
    pub(crate) computed_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) preemptions: u64,
    pub(crate) stored: u64,
    pub(crate) restored: u64,
    /// Tokens of answers and prompts that had to be computed again.
    pub(crate) recomputed_tokens: u64,
    /// Tokens of answers that were guessed, and of these those that were then chosen.
    pub(crate) guessed_tokens: u64,
    pub(crate) guessed_right: u64,
}

pub(crate) struct Planner {
    room: Room,
    tree: Prefixes,
    shelf: Shelf,
    accounts: Accounts,
    pace: Pace,
    requests: BTreeMap<RequestId, Request>,
    running: Vec<RequestId>,
    returning: Vec<Returning>,
    idle_ids: Vec<SeqId>,
    cached: BTreeMap<SeqId, Cached>,
    effects: Vec<Effect>,
    counters: Counters,
    next_id: RequestId,
    clock: u64,
    /// Of the last step.
    now_ms: u64,
    /// What waiting has made of each class: as urgent as the one of it that has waited longest. Within a class it
    /// counts for nothing, else who waits for long would be equal to who has more weight.
    aged: [u8; TOP_CLASS as usize + 1],
}

#[derive(Debug)]
struct Cached {
    domain: Domain,
    used: u64,
}

struct Request {
    account: String,
    holder: String,
    domain: Domain,
    priority: u8,
    cells_most: u32,
    reuse: bool,
    /// The prompt, and the answer as far as it was chosen.
    tokens: Vec<i32>,
    prompt: u32,
    /// Most cells it may come to.
    limit: u32,
    arrived_ms: u64,
    /// Time of steps in which others were computed and it was not.
    waited_ms: u64,
    /// It was in the last step.
    served: bool,
    seq: Option<SeqId>,
    running: bool,
    /// Cells it may fill without asking; at least what it has.
    promised: u32,
    /// Its own part that was put aside.
    stored: Option<Stored>,
    /// Prompt tokens that came from the cache; `None` before it ran.
    cached: Option<u32>,
    /// How far it was once computed.
    reached: u32,
    /// The class of whoever waits for its prompt.
    boost: u8,
    /// Tokens that may come next, for one batch.
    guess: Vec<i32>,
}

#[derive(Debug, Clone, Copy)]
struct Stored {
    blob: BlobId,
    from: u32,
    upto: u32,
}

/// Where a request that is not resident may begin.
#[derive(Debug, Clone, Copy, Default)]
struct Start {
    resident: Option<(SeqId, u32)>,
    shelved: Option<Found>,
}

impl Start {
    fn resident_tokens(&self) -> u32 {
        self.resident.map_or(0, |(_, length)| length)
    }

    fn tokens(&self) -> u32 {
        self.shelved.map_or(self.resident_tokens(), |found| found.usable)
    }
}

impl Planner {
    pub(crate) fn new(room: Room) -> Self {
        Self {
            room,
            tree: Prefixes::default(),
            shelf: Shelf::new(room.shelves),
            accounts: Accounts::default(),
            pace: Pace::default(),
            requests: BTreeMap::new(),
            running: Vec::new(),
            returning: Vec::new(),
            idle_ids: (0..room.ids).rev().map(SeqId).collect(),
            cached: BTreeMap::new(),
            effects: Vec::new(),
            counters: Counters::default(),
            next_id: 0,
            clock: 0,
            now_ms: 0,
            aged: [0; TOP_CLASS as usize + 1],
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    pub(crate) fn running(&self) -> u32 {
        self.running.len() as u32
    }

    pub(crate) fn waiting(&self) -> u32 {
        (self.requests.len() - self.running.len()) as u32
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    pub(crate) fn counts(&self) -> Counts {
        self.tree.counts()
    }

    pub(crate) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Bytes put aside in memory and on disk.
    pub(crate) fn shelved_bytes(&self) -> (u64, u64) {
        self.shelf.used()
    }

    /// What one cell needs in memory or on disk, once it is known.
    pub(crate) fn set_cell_bytes(&mut self, bytes: u64) {
        self.shelf.set_cell_bytes(bytes);
    }

    /// Cells that hold something, of all.
    pub(crate) fn cells(&self) -> (u32, u32) {
        (self.tree.used(), self.room.cells)
    }

    /// Tokens of a part, or nothing if its request has ended.
    pub(crate) fn tokens_of(&self, part: &Part) -> &[i32] {
        let tokens = self.requests.get(&part.request).map_or(&[][..], |request| &request.tokens);
        tokens.get(part.from as usize..(part.from + part.tokens) as usize).unwrap_or_default()
    }

    /// Prompt tokens of a request that needed no computing.
    pub(crate) fn cached_tokens(&self, id: RequestId) -> u32 {
        self.requests.get(&id).and_then(|request| request.cached).unwrap_or(0)
    }

    pub(crate) fn add(&mut self, ask: Ask, now_ms: u64) -> RequestId {
        let prompt = ask.tokens.len() as u32;
        let most = if ask.cells_most == 0 { self.room.cells } else { ask.cells_most.min(self.room.cells) };
        let wanted = if ask.most_new == 0 { most } else { prompt.saturating_add(ask.most_new) };
        self.next_id += 1;
        self.accounts.join(&ask.account, ask.weight);
        self.is_back(&ask.account);
        let reuse = ask.reuse && self.room.sharing;
        // Who shares nothing is alone in a domain that no name can be: names have no control characters.
        let domain = if reuse { ask.domain } else { Domain::from(format!("\0{}", self.next_id)) };
        let holder = if ask.holder.is_empty() { ask.account.clone() } else { ask.holder };
        let request = Request {
            holder,
            account: ask.account,
            domain,
            priority: ask.priority,
            cells_most: ask.cells_most,
            reuse,
            tokens: ask.tokens,
            prompt,
            // A prompt that fills its account's share is refused before it comes here.
            limit: wanted.min(most).max(prompt.min(self.room.cells)),
            arrived_ms: now_ms,
            waited_ms: 0,
            served: false,
            seq: None,
            running: false,
            promised: 0,
            stored: None,
            cached: None,
            reached: 0,
            boost: 0,
            guess: Vec::new(),
        };
        self.requests.insert(self.next_id, request);
        self.next_id
    }

    /// A token was chosen. True when the request has no cell for it: it ends by its length.
    pub(crate) fn chosen(&mut self, id: RequestId, token: i32) -> bool {
        let Some(request) = self.requests.get_mut(&id) else { return true };
        request.tokens.push(token);
        let full = request.tokens.len() as u32 > request.limit;
        self.accounts.charge_answer(&request.account, 1);
        full
    }

    /// A request ends, for whatever reason and in whatever state; what it computed stays for others.
    pub(crate) fn finish(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else { return };
        self.running.retain(|running| *running != id);
        self.accounts.leave(&request.account);
        self.expect_back(&request);
        if let Some(stored) = request.stored {
            self.drop_blob(stored.blob);
        }
        let Some(seq) = request.seq else { return };
        self.tree.pin(seq, false);
        let length = self.tree.length(seq);
        let covered = || {
            let tokens = self.tree.tokens(seq);
            self.tree.longest(&request.domain, &tokens, Some(seq)).is_some_and(|(_, same)| same == length)
        };
        if !request.reuse || length < KEEP_LEAST_TOKENS || covered() {
            return self.release(seq);
        }
        self.clock += 1;
        self.cached.insert(seq, Cached { domain: request.domain, used: self.clock });
    }

    /// What was computed, and how long it took.
    pub(crate) fn computed(&mut self, parts: &[Part], took: Duration) {
        let (mut prompts, mut answers) = (Read::default(), 0);
        for part in parts {
            let Some(request) = self.requests.get_mut(&part.request) else { continue };
            request.served = true;
            let range = part.from as usize..(part.from + part.tokens) as usize;
            self.tree.extend(part.seq, &request.tokens[range]);
            let upto = part.from + part.tokens;
            let again = request.reached.min(upto).saturating_sub(part.from);
            self.counters.recomputed_tokens += u64::from(again);
            let of_prompt = request.prompt.min(upto).saturating_sub(part.from);
            self.counters.computed_tokens += u64::from(of_prompt);
            request.reached = request.reached.max(upto);
            if part.tokens == 1 && of_prompt == 0 {
                answers += 1;
            } else {
                prompts.add(part.from, part.tokens);
            }
        }
        // With a guess it took longer than an answer's step takes.
        if parts.iter().all(|part| part.guessed == 0) {
            self.pace.measured(prompts, answers, took);
        }
    }

    /// The cache is empty now, whatever was in it: everybody computes again. `undone` are effects that were taken and
    /// not carried out; what was copied out before is whole.
    pub(crate) fn lost(&mut self, undone: Vec<Effect>) {
        for effect in undone.into_iter().chain(self.take_effects()) {
            match effect {
                Effect::Store { blob, .. } => self.blob_lost(blob),
                Effect::Drop { .. } => self.effects.push(effect),
                Effect::Share { .. } | Effect::Trim { .. } | Effect::Load { .. } => {}
            }
        }
        self.tree.clear();
        self.cached.clear();
        self.running.clear();
        self.idle_ids = (0..self.room.ids).rev().map(SeqId).collect();
        for request in self.requests.values_mut() {
            (request.seq, request.running, request.promised) = (None, false, 0);
        }
    }

    /// A blob could not be written: its request computes that part again.
    pub(crate) fn blob_lost(&mut self, blob: BlobId) {
        self.shelf.remove(blob);
        for request in self.requests.values_mut() {
            if request.stored.is_some_and(|stored| stored.blob == blob) {
                request.stored = None;
            }
        }
    }

    /// A blob did not come back. Others may share already what it was to bring, so all that is resident is given up:
    /// the cache must be emptied. A disk that failed once is not asked again.
    pub(crate) fn load_failed(&mut self, blob: BlobId, undone: Vec<Effect>) {
        for dropped in self.shelf.failed(blob) {
            self.blob_lost(dropped);
            self.effects.push(Effect::Drop { blob: dropped });
        }
        self.lost(undone);
    }

    /// What is to be done to the cache by now, in order.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Decides who works. The batch is [`Self::parts`], after the effects were carried out.
    pub(crate) fn arrange(&mut self, now_ms: u64) {
        self.age(now_ms);
        self.expect_no_longer();
        self.grow();
        self.admit();
        self.load();
    }

    /// Whoever was not in the step before has waited. Who is served does not become more important by it: else nobody
    /// could take the place of somebody who answers for long.
    fn age(&mut self, now_ms: u64) {
        let before = std::mem::replace(&mut self.now_ms, now_ms);
        for request in self.requests.values_mut() {
            if !std::mem::take(&mut request.served) {
                request.waited_ms += now_ms.saturating_sub(before.max(request.arrived_ms));
            }
        }
        self.aged = [0; TOP_CLASS as usize + 1];
        for request in self.requests.values() {
            let aged = &mut self.aged[usize::from(class(request.priority, 0))];
            *aged = request.class().max(*aged);
        }
    }

    /// The next batch: one token for each who answers, then prompts in the order of their turns.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut prompts = Vec::new();
        for id in &self.running {
            let Some((request, seq)) = self.seated(*id) else { continue };
            let held = self.tree.length(seq);
            // Up to its own part that lies aside, if it lost what was before that.
            let all = request.tokens.len() as u32;
            let goal = request.stored.map_or(all, |stored| stored.from).min(request.promised);
            let left = goal.saturating_sub(held);
            let last = goal == all;
            match left {
                0 => {}
                1 if last => {
                    let guessed = self.guessed(request, held);
                    parts.push(Part { request: *id, seq, from: held, tokens: 1, last, guessed });
                }
                _ => {
                    let part = Part { request: *id, seq, from: held, tokens: left, last, guessed: 0 };
                    prompts.push((self.turn(*id, request, left), part));
                }
            }
        }
        let answering = parts.len() as u32;
        let room = self.room.batch_tokens.saturating_sub(answering);
        // Guesses are for machines with nothing better to do.
        let guesses: u32 = parts.iter().map(|part| part.guessed).sum();
        if !prompts.is_empty() || guesses > room {
            parts.iter_mut().for_each(|part| part.guessed = 0);
        }
        prompts.sort_by_key(|(turn, _)| *turn);
        let urgency = self.urgency(&parts, prompts.first().map(|(_, part)| part));
        let from = prompts.first().map_or(0, |(_, part)| part.from);
        let mut left = self.pace.chunk(answering, urgency, from, room).min(room);
        for (_, mut part) in prompts {
            if left == 0 {
                break;
            }
            if part.tokens > left {
                part.tokens = left;
                part.last = false;
            }
            left -= part.tokens;
            parts.push(part);
        }
        parts
    }

    fn urgency(&self, answers: &[Part], first: Option<&Part>) -> Urgency {
        // By priority alone: what has waited for long goes first, and makes nobody stall for it.
        let class_of = |part: &Part| self.requests.get(&part.request).map(|r| class(r.priority, 0));
        match (first.and_then(class_of), answers.iter().filter_map(class_of).max()) {
            (Some(prompt), Some(answer)) if prompt > answer => Urgency::AboveAllAnswers,
            _ => Urgency::Usual,
        }
    }

    fn turn(&self, id: RequestId, request: &Request, left: u32) -> Turn {
        Turn::new(
            self.aged_class(request.priority).max(request.boost),
            self.accounts.rounds(&request.account),
            request.arrived_ms,
            self.pace.prompt_ms(left),
            id,
        )
    }

    /// What waiting has made of a priority's class.
    fn aged_class(&self, priority: u8) -> u8 {
        self.aged[usize::from(class(priority, 0))]
    }

    fn seated(&self, id: RequestId) -> Option<(&Request, SeqId)> {
        let request = self.requests.get(&id)?;
        Some((request, request.seq?))
    }

    fn held(&self, request: &Request) -> u32 {
        request.seq.map_or(0, |seq| self.tree.length(seq))
    }

    /// Cells that nobody has and nobody was promised.
    fn free(&self) -> u32 {
        let promised = |id: &RequestId| {
            let request = self.requests.get(id)?;
            Some(request.promised.saturating_sub(self.held(request)))
        };
        let promised: u32 = self.running.iter().filter_map(promised).sum();
        self.room.cells.saturating_sub(self.tree.used()).saturating_sub(promised)
    }

    /// Cells promised to one account.
    fn account_cells(&self, account: &str) -> u32 {
        let requests = self.running.iter().filter_map(|id| self.requests.get(id));
        requests.filter(|request| request.account == account).map(|request| request.promised).sum()
    }
}

impl Request {
    /// Its priority's, and what waiting has added.
    fn class(&self) -> u8 {
        class(self.priority, self.waited_ms)
    }

    /// Cells it needs to begin or go on: what it has said so far and a piece of an answer.
    fn first_promise(&self) -> u32 {
        (self.tokens.len() as u32).saturating_add(GROWTH_CELLS).min(self.limit).max(self.tokens.len() as u32)
    }
}

mod cells;
mod draft;
mod holders;
mod queue;
mod returning;

pub(crate) use holders::Holders;
use returning::Returning;

#[cfg(test)]
mod tests;
