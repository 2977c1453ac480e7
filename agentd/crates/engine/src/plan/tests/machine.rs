//! A machine without llama.cpp: a cache in which every token must find its past, clients, and the time that steps take.

use super::super::*;
use std::collections::{BTreeSet, HashMap, HashSet};

/// What a cell holds depends on all tokens up to it, as keys and values do.
pub(super) fn state(before: u64, token: i32) -> u64 {
    (before ^ (token as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .rotate_left(23)
        .wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

pub(super) fn state_of(tokens: &[i32]) -> u64 {
    tokens.iter().fold(1, |before, token| state(before, *token))
}

#[derive(Clone)]
pub(super) struct Cell {
    pub(super) position: u32,
    pub(super) state: u64,
    pub(super) holders: BTreeSet<SeqId>,
}

pub(super) type Kept = Vec<(u32, u64)>;

pub(super) struct Cache {
    pub(super) cells: Vec<Cell>,
    pub(super) total: usize,
    pub(super) blobs: HashMap<BlobId, (Kept, Tier)>,
    /// Disk or memory that fails now and then.
    pub(super) broken: bool,
}

impl Cache {
    pub(super) fn of(&self, seq: SeqId) -> Kept {
        let mut own: Kept =
            self.cells.iter().filter(|c| c.holders.contains(&seq)).map(|c| (c.position, c.state)).collect();
        own.sort_unstable();
        own
    }

    pub(super) fn trim(&mut self, seq: SeqId, from: u32) {
        for cell in self.cells.iter_mut().filter(|cell| cell.position >= from) {
            cell.holders.remove(&seq);
        }
        self.cells.retain(|cell| !cell.holders.is_empty());
    }

    pub(super) fn run(&mut self, planner: &mut Planner) {
        loop {
            let effects = planner.take_effects();
            if effects.is_empty() {
                return;
            }
            let mut effects = effects.into_iter();
            while let Some(effect) = effects.next() {
                match effect {
                    Effect::Share { from, to, length } => {
                        assert!(self.of(to).is_empty(), "{to:?} is somebody's");
                        assert!(self.of(from).len() as u32 >= length);
                        for cell in &mut self.cells {
                            if cell.position < length && cell.holders.contains(&from) {
                                cell.holders.insert(to);
                            }
                        }
                    }
                    Effect::Trim { seq, from } => self.trim(seq, from),
                    Effect::Store { seq, from, upto, blob, tier } => {
                        let own = self.of(seq);
                        let kept: Kept =
                            own.into_iter().filter(|(at, _)| (from..upto).contains(at)).collect();
                        assert_eq!(kept.len() as u32, upto - from, "all of what is stored is there");
                        if self.broken && blob % 3 == 0 {
                            planner.blob_lost(blob);
                        } else {
                            self.blobs.insert(blob, (kept, tier));
                        }
                    }
                    Effect::Load { blob, seq, from, upto } => {
                        assert_eq!(self.of(seq).len() as u32, from, "no hole before what is loaded");
                        let Some((kept, _)) = self.blobs.get(&blob).filter(|_| !self.broken || blob % 5 != 0)
                        else {
                            assert!(self.broken, "{blob} was kept");
                            self.cells.clear();
                            planner.load_failed(blob, effects.collect());
                            break;
                        };
                        assert!(
                            self.cells.len() + kept.len() <= self.total,
                            "it is unfolded beside all others"
                        );
                        for (position, state) in kept.iter().filter(|(at, _)| (from..upto).contains(at)) {
                            let holders = BTreeSet::from([seq]);
                            self.cells.push(Cell { position: *position, state: *state, holders });
                        }
                        assert_eq!(self.of(seq).len() as u32, upto);
                    }
                    Effect::Drop { blob } => {
                        self.blobs.remove(&blob);
                    }
                }
            }
        }
    }

    /// Computes a batch: every token must find a free cell and its whole past.
    pub(super) fn decode(&mut self, planner: &Planner, parts: &[Part]) {
        for part in parts {
            let past = self.of(part.seq);
            assert_eq!(past.len() as u32, part.from, "the past of {part:?}");
            assert!(past.iter().enumerate().all(|(at, cell)| cell.0 == at as u32), "a hole before {part:?}");
            let mut last = past.last().map_or(1, |cell| cell.1);
            for (position, token) in (part.from..).zip(planner.tokens_of(part)) {
                assert!(self.cells.len() < self.total, "NoKvCacheSlot");
                last = state(last, *token);
                self.cells.push(Cell { position, state: last, holders: BTreeSet::from([part.seq]) });
            }
            // Guesses too: until they are settled they are in the cache and not in the shadow.
            for (position, token) in (part.from + part.tokens..).zip(planner.guess_of(part)) {
                assert!(self.cells.len() < self.total, "no cell for a guess");
                last = state(last, *token);
                self.cells.push(Cell { position, state: last, holders: BTreeSet::from([part.seq]) });
            }
        }
    }
}

/// One client's view of its request.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) account: usize,
    pub(super) prompt: Vec<i32>,
    pub(super) answer: Vec<i32>,
    pub(super) most_new: u32,
    pub(super) began_ms: u64,
    pub(super) first_ms: Option<u64>,
    pub(super) ended_ms: Option<u64>,
}

pub(super) struct Machine {
    pub(super) planner: Planner,
    pub(super) cache: Cache,
    pub(super) clients: HashMap<RequestId, Client>,
    pub(super) now_ms: u64,
    pub(super) computed: u64,
    /// What a step takes whatever is in it.
    pub(super) weights_ms: u64,
    /// Answers are guessed: so many tokens, of which the last is right in two of three guesses.
    pub(super) guesses: u32,
}

/// What a step takes in the simulated machine: half a millisecond for a token of a prompt, 20 ms for the weights.
pub(super) fn step_ms(weights_ms: u64, tokens: u32) -> u64 {
    weights_ms + u64::from(tokens) / 2
}

pub(super) fn room(cells: u32, running: u32) -> Room {
    Room {
        cells,
        running,
        ids: (2 * running + 16) as u16,
        batch_tokens: 256,
        shelves: Shelves { memory_bytes: 200_000, disk_bytes: 200_000, bytes_per_cell: 100 },
        sharing: true,
    }
}

impl Machine {
    pub(super) fn new(room: Room) -> Self {
        let total = room.cells as usize;
        let cache = Cache { cells: Vec::new(), total, blobs: HashMap::new(), broken: false };
        Self {
            planner: Planner::new(room),
            cache,
            clients: HashMap::new(),
            now_ms: 0,
            computed: 0,
            weights_ms: 20,
            guesses: 0,
        }
    }

    pub(super) fn ask(&mut self, account: usize, prompt: Vec<i32>, most_new: u32) -> RequestId {
        self.ask_as(account, prompt, most_new, 50, 1)
    }

    pub(super) fn ask_as(
        &mut self,
        account: usize,
        prompt: Vec<i32>,
        most_new: u32,
        priority: u8,
        weight: u32,
    ) -> RequestId {
        let ask = Ask {
            account: format!("a{account}"),
            holder: String::new(),
            domain: Domain::from("all"),
            priority,
            weight,
            cells_most: 0,
            tokens: prompt.clone(),
            most_new,
            reuse: true,
        };
        self.put(account, ask)
    }

    pub(super) fn put(&mut self, account: usize, ask: Ask) -> RequestId {
        let client = Client {
            account,
            prompt: ask.tokens.clone(),
            answer: Vec::new(),
            most_new: ask.most_new,
            began_ms: self.now_ms,
            first_ms: None,
            ended_ms: None,
        };
        let id = self.planner.add(ask, self.now_ms);
        self.clients.insert(id, client);
        id
    }

    /// One step, as the decode thread does it. False when there was nothing to do.
    pub(super) fn step(&mut self) -> bool {
        if self.planner.is_idle() {
            return false;
        }
        self.planner.arrange(self.now_ms);
        self.cache.run(&mut self.planner);
        self.guess();
        let parts = self.planner.parts();
        if parts.is_empty() && self.cache.broken && self.planner.running() == 0 {
            // A blob did not come back, and everything begins anew.
            return true;
        }
        assert!(!parts.is_empty(), "requests are here and nobody works: {}", self.planner.waiting());
        let in_batch: u32 = parts.iter().map(|part| part.tokens + part.guessed).sum();
        assert!(in_batch <= self.planner.room.batch_tokens);
        self.cache.decode(&self.planner, &parts);
        let tokens: u32 = parts.iter().map(|part| part.tokens).sum();
        let took = step_ms(self.weights_ms, tokens);
        self.now_ms += took;
        self.planner.computed(&parts, Duration::from_millis(took));
        for part in &parts {
            let client = self.clients.get_mut(&part.request).unwrap();
            let upto = (part.from + part.tokens).min(client.prompt.len() as u32);
            self.computed += u64::from(upto.saturating_sub(part.from));
            if !part.last {
                continue;
            }
            // "Sampling": the cell's state must be that of all tokens before it, whatever was shared and swapped.
            let guess = self.planner.guess_of(part).to_vec();
            let past = self.cache.of(part.seq);
            let mut right = 0;
            let mut ended = false;
            loop {
                let all: Vec<i32> = client.prompt.iter().chain(&client.answer).copied().collect();
                let seen = past[all.len() - 1].1;
                assert_eq!(seen, state_of(&all), "the past of request {} is wrong", part.request);
                let token = (seen % 1000) as i32 + 1000;
                client.answer.push(token);
                client.first_ms.get_or_insert(self.now_ms);
                ended |=
                    self.planner.chosen(part.request, token) || client.answer.len() as u32 == client.most_new;
                if ended || guess.get(right) != Some(&token) {
                    break;
                }
                right += 1;
            }
            self.planner.settle(part, right as u32);
            if ended {
                client.ended_ms = Some(self.now_ms);
                self.planner.finish(part.request);
            }
        }
        self.cache.run(&mut self.planner);
        self.agree();
        true
    }

    pub(super) fn guess(&mut self) {
        for id in self.planner.working().collect::<Vec<_>>() {
            let Some(said) = self.planner.answer_of(id) else { continue };
            let mut all = said.to_vec();
            for _ in 0..self.guesses {
                all.push((state_of(&all) % 1000) as i32 + 1000);
            }
            let mut guess = all.split_off(said.len());
            if let Some(last) = guess.last_mut().filter(|_| (self.now_ms + id).is_multiple_of(3)) {
                *last += 1;
            }
            self.planner.guess(id, guess);
        }
    }

    /// The shadow is the cache.
    pub(super) fn agree(&self) {
        self.planner.tree.check();
        let (used, total) = self.planner.cells();
        assert_eq!(used as usize, self.cache.cells.len(), "used cells");
        let counts = self.planner.counts();
        assert_eq!(counts.private + counts.shared + (total - used), total);
        let shared = self.cache.cells.iter().filter(|cell| cell.holders.len() > 1).count();
        assert_eq!(counts.shared as usize, shared);
        let held: u32 = self.planner.holders().iter().map(|holder| holder.cells).sum();
        assert_eq!(held + counts.evictable, used, "every cell is somebody's or may go");
        let promised: u32 = self
            .planner
            .running
            .iter()
            .map(|id| {
                let request = &self.planner.requests[id];
                assert!(request.promised >= self.planner.held(request));
                request.promised - self.planner.held(request)
            })
            .sum();
        assert!(used + promised <= total, "promised twice");
        for (seq, cached) in &self.planner.cached {
            assert!(self.planner.tree.length(*seq) > 0, "{cached:?} holds nothing");
        }
        let (memory, disk) = self.planner.shelved_bytes();
        assert!(
            memory <= self.planner.room.shelves.memory_bytes && disk <= self.planner.room.shelves.disk_bytes
        );
        assert_eq!(
            self.cache.blobs.keys().copied().collect::<BTreeSet<_>>(),
            self.planner.shelf.ids(),
            "blobs"
        );
        let ids: usize = self.planner.requests.values().filter(|request| request.seq.is_some()).count();
        assert_eq!(
            ids + self.planner.cached.len() + self.planner.idle_ids.len(),
            self.planner.room.ids as usize,
            "ids are neither lost nor given twice"
        );
        assert_eq!(self.planner.idle_ids.iter().collect::<HashSet<_>>().len(), self.planner.idle_ids.len());
    }

    pub(super) fn run_to_end(&mut self) {
        for _ in 0..200_000 {
            if !self.step() {
                return;
            }
        }
        panic!("it never ends: {} run, {} wait", self.planner.running(), self.planner.waiting());
    }

    pub(super) fn answer(&self, id: RequestId) -> &[i32] {
        &self.clients[&id].answer
    }
}

/// What a request alone on a large machine answers.
pub(super) fn alone(prompt: &[i32], most_new: u32) -> Vec<i32> {
    let mut all = prompt.to_vec();
    for _ in 0..most_new {
        all.push((state_of(&all) % 1000) as i32 + 1000);
    }
    all.split_off(prompt.len())
}

pub(super) fn text(seed: i32, length: usize) -> Vec<i32> {
    (0..length as i32).map(|n| seed.wrapping_mul(31).wrapping_add(n * n) % 97).collect()
}

pub(super) fn joined(first: &[i32], second: &[i32]) -> Vec<i32> {
    first.iter().chain(second).copied().collect()
}

pub(super) fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
}
