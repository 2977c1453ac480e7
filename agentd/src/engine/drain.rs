//! How does an engine make way for another one?
//!
//! ```text
//! serving ── Drain: all doors close ──▶ draining ── nothing is open ──▶ ended, all of it done
//!    │                                     └── its time is over ─────▶ ended, the rest told to come again
//!    └── other terms, and somebody works ──▶ waits for a quiet moment ── nothing is open ──▶ ended
//! ```
//!
//! Why:    a device that is to be reset must have no process on it, and llama.cpp's process is on every device that it
//!         can open. The next engine is started without it (`Terms::hidden`).
//! Always: who works when an engine drains has a bounded time to finish; who has not by then gets an error that says why
//!         and that the same request may be sent again. Who wants a model meanwhile waits for the next engine.

use super::run::Task;
use super::session::{Open, Session};
use agentd_domain::fault::Report;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were told to come again.
    pub broken_off: usize,
}

/// An engine that is to end.
pub(super) struct Renewal {
    /// `None` waits for a moment in which nobody uses it.
    pub until: Option<Instant>,
    pub why: Report,
    pub told: Vec<oneshot::Sender<Drained>>,
}

impl Renewal {
    pub fn when_idle(why: Report) -> Self {
        Self { until: None, why, told: Vec::new() }
    }

    /// Nothing new is taken.
    pub fn is_urgent(&self) -> bool {
        self.until.is_some()
    }
}

impl Task {
    pub(super) fn drains(&self) -> bool {
        self.renewal.as_ref().is_some_and(Renewal::is_urgent)
    }

    /// The sooner of two ends, and both who asked are told.
    pub(super) fn begin_drain(
        &mut self,
        session: &Session,
        until: Instant,
        why: Report,
        answer: oneshot::Sender<Drained>,
    ) {
        let before = self.renewal.take();
        let earlier = before.as_ref().and_then(|renewal| renewal.until);
        let mut told = before.map(|renewal| renewal.told).unwrap_or_default();
        told.push(answer);
        let until = earlier.map_or(until, |earlier| earlier.min(until));
        tracing::info!(problem = %why, working = working(session), "the engine makes way for another one");
        self.renewal = Some(Renewal { until: Some(until), why, told });
        session.loaded.iter().for_each(|model| self.uses.close(&model.model));
    }

    /// Whether nobody has anything of this engine that would be lost with it.
    pub(super) fn is_quiet(&self, session: &Session) -> bool {
        let waited_for = !self.drains() && !self.waiting.models().is_empty();
        let inside = |name: &str| self.uses.seen(name).inside > 0;
        session.busy.is_none()
            && working(session) == 0
            && !waited_for
            && !session.loaded.iter().any(|model| inside(&model.model))
    }

    /// Ends it: what is open is told to come again.
    pub(super) async fn renew(&mut self, session: &mut Session) {
        let Some(renewal) = self.renewal.take() else { return };
        self.end_engine().await;
        let broken_off = working(session);
        let again = Report { what: "the answer was broken off".to_owned(), ..renewal.why.clone() };
        for (_, open) in session.open.drain() {
            open.fail(again.clone());
        }
        tracing::info!(broken_off, "the engine is ended and begins anew");
        for told in renewal.told {
            // Who asked may have gone.
            let _ = told.send(Drained { broken_off });
        }
    }
}

/// Requests whose answers somebody waits for.
fn working(session: &Session) -> usize {
    let open = |open: &&Open| matches!(open, Open::Generation { .. } | Open::One(_));
    session.open.values().filter(open).count()
}
