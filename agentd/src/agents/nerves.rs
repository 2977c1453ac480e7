//! What does agentd itself notice of an agent, and what does the agent say of itself?
//!
//! Owns:  counters of each agent's requests, the way of its pain to the loop, and what its own `GET /agent/v1/self`
//!        shows of its health.
//! In:    the agent's API on the data plane. Out: a [`Pulse`] for each reading, [`Felt`] for the loop.
//! Always: nothing here waits. A pain that finds the way full is refused, and its sender told so.

use crate::clock;
use agentd_domain::agent_api::SelfHealth;
use agentd_domain::fault::Report;
use agentd_domain::health::{Pain, Pulse};
use agentd_domain::ids::AgentId;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Of one agent. Whoever has more to say says it in one.
pub const PAINS_A_MINUTE: usize = 10;
/// Pains on their way to the loop.
const QUEUE: usize = 64;

/// Something to tell the loop.
#[derive(Debug)]
pub enum Felt {
    Hurt {
        agent: AgentId,
        pain: Pain,
    },
    /// Of what an agent has for a day, so much is spent.
    Spent {
        agent: AgentId,
        name: String,
        used: u64,
        most: u64,
    },
}

/// All agents' nerves. Cheap to clone.
#[derive(Clone)]
pub struct Nerves(Arc<Shared>);

struct Shared {
    beats: Mutex<HashMap<AgentId, Arc<Beat>>>,
    seen: Mutex<HashMap<AgentId, SelfHealth>>,
    felt: mpsc::Sender<Felt>,
}

impl Nerves {
    /// The other end is the loop's.
    pub fn new() -> (Self, mpsc::Receiver<Felt>) {
        let (felt, feel) = mpsc::channel(QUEUE);
        (Self(Arc::new(Shared { beats: Mutex::default(), seen: Mutex::default(), felt })), feel)
    }

    /// The counters of one agent; they go on over its runs.
    pub fn beat(&self, agent: AgentId) -> Arc<Beat> {
        Arc::clone(locked(&self.0.beats).entry(agent).or_default())
    }

    /// What was last seen of it.
    pub fn seen(&self, agent: AgentId) -> Option<SelfHealth> {
        locked(&self.0.seen).get(&agent).cloned()
    }

    pub fn show(&self, agent: AgentId, health: SelfHealth) {
        locked(&self.0.seen).insert(agent, health);
    }

    pub fn forget(&self, agent: AgentId) {
        locked(&self.0.seen).remove(&agent);
        locked(&self.0.beats).remove(&agent);
    }

    pub fn hurt(&self, agent: AgentId, pain: Pain) -> Result<(), Report> {
        let spared = || {
            Report::caller(
                "too_many_requests",
                "the pain was not taken",
                format!("there were {PAINS_A_MINUTE} within a minute, or agentd is busy"),
                "say it once, and again when it is worse",
            )
        };
        if !self.beat(agent).may_complain(clock::boot_ms()) {
            return Err(spared());
        }
        self.0.felt.try_send(Felt::Hurt { agent, pain }).map_err(|_| spared())
    }

    /// False when the way is full: to be said again.
    pub fn spent(&self, agent: AgentId, name: String, used: u64, most: u64) -> bool {
        self.0.felt.try_send(Felt::Spent { agent, name, used, most }).is_ok()
    }
}

/// One agent's requests so far.
#[derive(Debug, Default)]
pub struct Beat {
    calls: AtomicU64,
    errors: AtomicU64,
    model_refusals: AtomicU64,
    open: AtomicU32,
    progress_ms: AtomicU64,
    complaints: Mutex<VecDeque<u64>>,
}

/// A request that is being answered, until this is dropped.
pub struct Open(Arc<Beat>);

impl Open {
    pub fn progress(&self) {
        self.0.progress();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.progress();
    }
}

impl Beat {
    pub fn open(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Relaxed);
        Open(Arc::clone(self))
    }

    pub fn called(&self) {
        self.calls.fetch_add(1, Relaxed);
    }

    pub fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    pub fn model_was_away(&self) {
        self.model_refusals.fetch_add(1, Relaxed);
    }

    /// Something came of what it does.
    pub fn progress(&self) {
        self.progress_ms.fetch_max(clock::boot_ms(), Relaxed);
    }

    pub fn pulse(&self, work: u32) -> Pulse {
        Pulse {
            calls: self.calls.load(Relaxed),
            errors: self.errors.load(Relaxed),
            model_refusals: self.model_refusals.load(Relaxed),
            open: self.open.load(Relaxed),
            progress_ms: self.progress_ms.load(Relaxed),
            work,
        }
    }

    fn may_complain(&self, now_ms: u64) -> bool {
        let mut times = locked(&self.complaints);
        while times.front().is_some_and(|at_ms| now_ms.saturating_sub(*at_ms) >= 60_000) {
            times.pop_front();
        }
        let may = times.len() < PAINS_A_MINUTE;
        if may {
            times.push_back(now_ms);
        }
        may
    }
}

/// A panic elsewhere leaves counters and copies, which are whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_complaints_a_minute_and_again_in_the_next() {
        let beat = Beat::default();
        let taken = (0..20).filter(|n| beat.may_complain(n * 100)).count();
        assert_eq!(taken, PAINS_A_MINUTE);
        assert!(!beat.may_complain(59_999));
        assert!(beat.may_complain(60_000), "the first is a minute ago");
    }

    #[test]
    fn a_request_is_open_until_it_is_dropped_and_its_end_is_progress() {
        let beat = Arc::new(Beat::default());
        let open = beat.open();
        assert_eq!((beat.pulse(3).open, beat.pulse(3).work, beat.pulse(3).progress_ms), (1, 3, 0));
        drop(open);
        assert_eq!(beat.pulse(0).open, 0);
        assert!(beat.pulse(0).progress_ms > 0);
    }
}
