//! Which records does a decision become, and when must they be written?
//!
//! Pure: entries and times in, counted entries out. The first of its kind is written at once. Equal ones that an
//! agent causes within a window are counted, and written as one record at its end: an agent asks for its messages
//! all day, and one that is refused in a loop must not push all others out of a bounded log.
//! Always: every entry is counted somewhere. Where there is no room, what is left of it is whose it was and its
//!         verdict, in a record `audit.overflow`.

use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::ids::AgentId;
use std::collections::{HashMap, VecDeque};

/// What an agent may do it may do often; that it does is known from the first record on.
const ALLOWED_WINDOW_MS: u64 = 3600 * 1000;
/// A minute tells a burst from a mistake.
const DENIED_WINDOW_MS: u64 = 60 * 1000;
/// Kinds of entries of one agent, and of strangers, that are told apart at a time. More is somebody who tries
/// names, hosts or addresses one after the other: at 32 a minute a log of 40,000 records lasts most of a day.
const KINDS_MOST: usize = 32;
/// Entries that wait for the disk.
const WAITING_MOST: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub unix_ms: i64,
    pub boot_ms: u64,
}

/// What becomes one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    pub entry: Entry,
    pub count: u32,
    /// Of the last of them.
    pub at: Now,
}

#[derive(Debug, Default)]
pub struct Pending {
    waiting: VecDeque<Counted>,
    windows: HashMap<Entry, Window>,
    /// Entries so far: many come within a millisecond.
    taken: u64,
}

#[derive(Debug)]
struct Window {
    until_boot_ms: u64,
    /// Since the last record.
    more: u32,
    last: Now,
    last_taken: u64,
}

impl Window {
    fn count(&mut self, now: Now, taken: u64) {
        self.more = self.more.saturating_add(1);
        (self.last, self.last_taken) = (now, taken);
    }
}

impl Pending {
    pub fn take(&mut self, entry: Entry, now: Now) {
        self.taken += 1;
        if let Some(window) = self.windows.get_mut(&entry)
            && (window.more > 0 || now.boot_ms < window.until_boot_ms)
        {
            return window.count(now, self.taken);
        }
        self.windows.retain(|_, window| window.more > 0 || now.boot_ms < window.until_boot_ms);
        let length_ms = window_ms(&entry);
        let crowded = length_ms.is_some() && self.kinds_of(&entry) >= KINDS_MOST;
        if crowded || self.waiting.len() >= WAITING_MOST {
            let until_boot_ms = now.boot_ms + DENIED_WINDOW_MS;
            let window = self.windows.entry(overflow(&entry));
            let window = window.or_insert(Window { until_boot_ms, more: 0, last: now, last_taken: 0 });
            return window.count(now, self.taken);
        }
        if let Some(length_ms) = length_ms {
            let until_boot_ms = now.boot_ms + length_ms;
            self.windows.insert(entry.clone(), Window { until_boot_ms, more: 0, last: now, last_taken: 0 });
        }
        self.waiting.push_back(Counted { entry, count: 1, at: now });
    }

    /// All that must be written now, oldest first.
    pub fn drain(&mut self, now: Now) -> Vec<Counted> {
        self.drain_where(|window| window.until_boot_ms <= now.boot_ms, now)
    }

    /// At the end of agentd: what was counted is written before its window is over.
    pub fn drain_all(&mut self, now: Now) -> Vec<Counted> {
        self.drain_where(|_| true, now)
    }

    /// What could not be written waits again, before all others.
    pub fn put_back(&mut self, batch: Vec<Counted>) {
        for counted in batch.into_iter().rev() {
            self.waiting.push_front(counted);
        }
    }

    /// When something must be written that does not wait already.
    pub fn next_boot_ms(&self) -> Option<u64> {
        self.windows.values().filter(|window| window.more > 0).map(|window| window.until_boot_ms).min()
    }

    pub fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn drain_where(&mut self, over: impl Fn(&Window) -> bool, now: Now) -> Vec<Counted> {
        let mut batch: Vec<_> = self.waiting.drain(..).collect();
        let mut counted = Vec::new();
        for (entry, window) in self.windows.iter_mut().filter(|(_, w)| w.more > 0 && over(w)) {
            let record = Counted { entry: entry.clone(), count: window.more, at: window.last };
            counted.push((window.last_taken, record));
            window.more = 0;
            // Whoever goes on goes on being counted.
            window.until_boot_ms = now.boot_ms + window_ms(entry).unwrap_or(DENIED_WINDOW_MS);
        }
        counted.sort_by_key(|(taken, _)| *taken);
        batch.extend(counted.into_iter().map(|(_, record)| record));
        batch
    }

    fn kinds_of(&self, entry: &Entry) -> usize {
        let whose = |entry: &Entry| -> (Actor, Option<AgentId>) { (entry.actor, entry.agent_id) };
        self.windows.keys().filter(|known| whose(known) == whose(entry)).count()
    }
}

/// `None`: each is a record of its own. An owner's orders and the kernel's kills are few.
fn window_ms(entry: &Entry) -> Option<u64> {
    match (entry.actor, entry.verdict) {
        (Actor::Agent, Verdict::Allowed) => Some(ALLOWED_WINDOW_MS),
        (Actor::Agent, Verdict::Denied) | (Actor::Stranger, _) => Some(DENIED_WINDOW_MS),
        (Actor::Agent, Verdict::Killed) | (Actor::Owner | Actor::Appliance, _) => None,
    }
}

fn overflow(entry: &Entry) -> Entry {
    Entry { agent_id: entry.agent_id, ..Entry::new(entry.actor, "audit.overflow", entry.verdict) }
}
