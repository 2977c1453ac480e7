//! Who listens to a generation, and what happens to it when nobody does?
//!
//! Owns:   every generation under its idempotency key, with all text so far.
//! States: running with a listener; running alone (its client vanished; given up after [`KEEP`]); ended (kept
//!         for [`KEEP`], so that a client that lost its connection in the last moment can still read it).
//! True:   one key is one generation while it is kept; a listener gets every piece from the first one, once. What was
//!         cancelled or has failed is no answer: the same request under its key begins anew.
//! Thread: the table is locked by connections, each generation also by its decode thread. The table's lock is
//!         taken before a generation's, never after it, and nothing blocks under them.

use agentd_domain::engine::{Done, Event, FinishReason, ServerFrame};
use agentd_domain::fault::Report;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a generation outlives its client, and its own end. DESIGN: 60 s, time for agentd to restart.
pub(crate) const KEEP: Duration = Duration::from_secs(60);
/// Ended generations kept at most: the oldest go first. At some kilobytes each this bounds their memory.
const MAX_ENDED: usize = 256;

/// Where answers of one request go.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    pub(crate) connection: u64,
    pub(crate) request: u64,
    pub(crate) outbox: Sender<ServerFrame>,
}

impl Listener {
    /// False when the connection is gone.
    pub(crate) fn send(&self, body: Event) -> bool {
        self.outbox.send(ServerFrame { id: self.request, body }).is_ok()
    }
}

#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) key: String,
    cancelled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What was asked, to tell a retry from another request under the same key.
    request: String,
    events: Vec<Event>,
    listener: Option<Listener>,
    ended: Option<Instant>,
    alone_since: Option<Instant>,
}

impl Generation {
    fn new(key: &str, request: String, listener: Listener) -> Self {
        let state =
            State { request, events: Vec::new(), listener: Some(listener), ended: None, alone_since: None };
        Self { key: key.to_owned(), cancelled: AtomicBool::new(false), state: Mutex::new(state) }
    }

    pub(crate) fn piece(&self, text: String, tokens: u32, now: Instant) {
        self.lock().tell(Event::Piece { text, tokens }, now);
    }

    pub(crate) fn done(&self, done: Done, now: Instant) {
        self.end(Event::Done(done), now);
    }

    pub(crate) fn fail(&self, report: Report, now: Instant) {
        self.end(Event::Error(report), now);
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Why the decode thread should stop now, if it should.
    pub(crate) fn stop_reason(&self, now: Instant) -> Option<FinishReason> {
        let alone_too_long =
            || self.lock().alone_since.is_some_and(|since| now.saturating_duration_since(since) >= KEEP);
        (self.cancelled.load(Ordering::Relaxed) || alone_too_long()).then_some(FinishReason::Cancelled)
    }

    fn end(&self, event: Event, now: Instant) {
        let mut state = self.lock();
        state.tell(event, now);
        state.ended = Some(now);
    }

    /// Replays everything to a new listener, which replaces the one before.
    fn attach(&self, listener: Listener, now: Instant) {
        let mut state = self.lock();
        if let Some(before) = state.listener.take()
            && state.ended.is_none()
        {
            before.send(Event::Error(Report::caller(
                "conflict",
                "this stream ended early",
                format!("another client attached to the generation `{}`", self.key),
                "read the answer there, or use another key",
            )));
        }
        let all_sent = state.events.iter().all(|event| listener.send(event.clone()));
        state.alone_since = if all_sent { None } else { Some(now) };
        state.listener = all_sent.then_some(listener);
    }

    /// False when nobody will ever read a whole answer here.
    fn is_worth_reading(&self) -> bool {
        let state = self.lock();
        let failed = match state.events.last() {
            Some(Event::Done(done)) => done.reason == FinishReason::Cancelled,
            Some(Event::Error(_)) => true,
            _ => self.cancelled.load(Ordering::Relaxed),
        };
        !failed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process in release builds; in tests the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&mut self, event: Event, now: Instant) {
        if self.listener.as_ref().is_some_and(|listener| !listener.send(event.clone())) {
            self.listener = None;
            self.alone_since = Some(now);
        }
        self.events.push(event);
    }
}

/// What a `Generate` came to.
#[derive(Debug)]
pub(crate) enum Begun {
    /// Start decoding.
    New(Arc<Generation>),
    /// The same request again: the listener was attached.
    Attached,
    /// Another request under a key that is in use.
    Conflict,
}

#[derive(Debug, Default)]
pub(crate) struct Generations {
    by_key: Mutex<HashMap<String, Arc<Generation>>>,
}

impl Generations {
    pub(crate) fn begin(&self, key: &str, request: String, listener: Listener, now: Instant) -> Begun {
        let mut by_key = self.lock();
        forget_old(&mut by_key, now);
        if let Some(existing) = by_key.get(key).filter(|existing| existing.is_worth_reading()) {
            if existing.lock().request != request {
                return Begun::Conflict;
            }
            existing.attach(listener, now);
            return Begun::Attached;
        }
        let generation = Arc::new(Generation::new(key, request, listener));
        by_key.insert(key.to_owned(), Arc::clone(&generation));
        Begun::New(generation)
    }

    /// True when the key was known; its events then follow to the listener.
    pub(crate) fn attach(&self, key: &str, listener: Listener, now: Instant) -> bool {
        let mut by_key = self.lock();
        forget_old(&mut by_key, now);
        let found = by_key.get(key);
        if let Some(generation) = found {
            generation.attach(listener, now);
        }
        found.is_some()
    }

    pub(crate) fn cancel(&self, key: &str) -> bool {
        let by_key = self.lock();
        let found = by_key.get(key);
        if let Some(generation) = found {
            generation.cancel();
        }
        found.is_some()
    }

    /// A connection closed: its generations go on alone.
    pub(crate) fn vanished(&self, connection: u64, now: Instant) {
        for generation in self.lock().values() {
            let mut state = generation.lock();
            if state.listener.as_ref().is_some_and(|listener| listener.connection == connection) {
                state.listener = None;
                state.alone_since = Some(now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Generation>>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_old(by_key: &mut HashMap<String, Arc<Generation>>, now: Instant) {
    let ended = |generation: &Arc<Generation>| generation.lock().ended;
    by_key
        .retain(|_, generation| ended(generation).is_none_or(|at| now.saturating_duration_since(at) < KEEP));
    let mut ends: Vec<Instant> = by_key.values().filter_map(ended).collect();
    if ends.len() >= MAX_ENDED {
        ends.sort_unstable();
        let cut = ends[ends.len() - MAX_ENDED];
        by_key.retain(|_, generation| ended(generation).is_none_or(|at| at > cut));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn listener(connection: u64) -> (Listener, Receiver<ServerFrame>) {
        let (outbox, inbox) = channel();
        (Listener { connection, request: 1, outbox }, inbox)
    }

    fn done() -> Done {
        Done { reason: FinishReason::Stop, prompt_tokens: 3, completion_tokens: 2, cached_tokens: 0 }
    }

    fn text_of(inbox: &Receiver<ServerFrame>) -> String {
        inbox
            .try_iter()
            .map(|frame| match frame.body {
                Event::Piece { text, .. } => text,
                Event::Done(_) => ".".to_owned(),
                Event::Error(report) => format!("!{}", report.code),
                other => panic!("unexpected {other:?}"),
            })
            .collect()
    }

    fn begin(table: &Generations, key: &str, request: &str, to: Listener, now: Instant) -> Arc<Generation> {
        match table.begin(key, request.to_owned(), to, now) {
            Begun::New(generation) => generation,
            other => panic!("expected a new generation, got {other:?}"),
        }
    }

    #[test]
    fn a_client_that_comes_back_reads_everything_from_the_first_token() {
        let (table, now) = (Generations::default(), Instant::now());
        let (first, inbox) = listener(1);
        let generation = begin(&table, "k", "q", first, now);
        generation.piece("a".to_owned(), 1, now);
        assert_eq!(text_of(&inbox), "a");
        drop(inbox);
        table.vanished(1, now);
        generation.piece("b".to_owned(), 1, now);
        let (second, inbox) = listener(2);
        assert!(table.attach("k", second, now + KEEP / 2));
        generation.piece("c".to_owned(), 1, now);
        generation.done(done(), now);
        assert_eq!(text_of(&inbox), "abc.");
        let (third, inbox) = listener(3);
        assert!(matches!(table.begin("k", "q".to_owned(), third, now + KEEP / 2), Begun::Attached));
        assert_eq!(text_of(&inbox), "abc.");
    }

    #[test]
    fn nobody_listens_for_a_minute_and_it_stops() {
        let (table, now) = (Generations::default(), Instant::now());
        let (first, inbox) = listener(1);
        let generation = begin(&table, "k", "q", first, now);
        drop(inbox);
        assert_eq!(generation.stop_reason(now + 2 * KEEP), None, "nobody has noticed yet");
        generation.piece("a".to_owned(), 1, now);
        assert_eq!(generation.stop_reason(now + KEEP / 2), None);
        assert_eq!(generation.stop_reason(now + KEEP), Some(FinishReason::Cancelled));
        generation.done(done(), now + KEEP);
        let (late, _inbox) = listener(2);
        assert!(!table.attach("k", late, now + 2 * KEEP), "an end is kept for a minute, not for ever");
    }

    #[test]
    fn one_key_is_one_request() {
        let (table, now) = (Generations::default(), Instant::now());
        let (first, inbox) = listener(1);
        let _running = begin(&table, "k", "q", first, now);
        let (other, _other_inbox) = listener(2);
        assert!(matches!(table.begin("k", "another".to_owned(), other.clone(), now), Begun::Conflict));
        assert!(matches!(table.begin("k", "q".to_owned(), other, now), Begun::Attached));
        assert_eq!(text_of(&inbox), "!conflict", "the stream before ends with a reason");
    }

    #[test]
    fn what_was_cancelled_or_failed_is_begun_anew_and_not_read_as_an_answer() {
        let (table, now) = (Generations::default(), Instant::now());
        let (to, _inbox) = listener(1);
        let cancelled = begin(&table, "k", "q", to.clone(), now);
        cancelled.piece("half".to_owned(), 1, now);
        assert!(table.cancel("k"));
        let (again, inbox) = listener(2);
        let second = begin(&table, "k", "q", again, now);
        cancelled.done(Done { reason: FinishReason::Cancelled, ..done() }, now);
        assert_eq!(text_of(&inbox), "", "the first one's half and its end are not the second's");
        second.fail(Report::bug("x", "x", "x", "x"), now);
        assert_eq!(text_of(&inbox), "!x");
        let (third, inbox) = listener(3);
        let third = begin(&table, "k", "q", third, now);
        third.done(done(), now);
        let (fourth, _) = listener(4);
        assert!(matches!(table.begin("k", "q".to_owned(), fourth, now), Begun::Attached));
        assert_eq!(text_of(&inbox), ".");
    }

    #[test]
    fn cancel_reaches_the_decode_thread() {
        let (table, now) = (Generations::default(), Instant::now());
        let (first, _inbox) = listener(1);
        let generation = begin(&table, "k", "q", first, now);
        assert!(!table.cancel("unknown"));
        assert!(table.cancel("k"));
        assert_eq!(generation.stop_reason(now), Some(FinishReason::Cancelled));
    }

    #[test]
    fn ended_generations_are_bounded_and_running_ones_are_not_forgotten() {
        let (table, now) = (Generations::default(), Instant::now());
        let (to, _inbox) = listener(1);
        let _running = begin(&table, "running", "q", to.clone(), now);
        for index in 0..2 * MAX_ENDED {
            let at = now + Duration::from_millis(index as u64);
            begin(&table, &format!("k{index}"), "q", to.clone(), at).done(done(), at);
        }
        assert!(table.lock().len() <= MAX_ENDED + 2, "{} kept", table.lock().len());
        assert!(table.cancel("running"));
        assert!(!table.cancel("k0"));
    }
}
