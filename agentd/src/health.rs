//! Is the appliance well, and what is wrong with it?
//!
//! Owns:  the board of present problems, one per place where something can go wrong.
//! In:    [`Board::set`] and [`Board::clear`] from wherever a problem is seen or gone.
//! Out:   the health and the problems, for the console at once and for init when they change.
//! Always: health follows from the board alone, so a colour without a problem that explains it cannot be.

use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

/// What a problem costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Less than everything works.
    Degraded,
    /// No agent can run, or nothing can be stored.
    Broken,
}

/// init keeps at most this many (`initctl::AgentdReport`).
const MOST_SHOWN: usize = 20;

pub struct Board {
    problems: Mutex<BTreeMap<String, (Weight, Report)>>,
    changed: watch::Sender<u64>,
}

impl Default for Board {
    fn default() -> Self {
        Self { problems: Mutex::default(), changed: watch::channel(0).0 }
    }
}

/// Until the launcher has answered for the first time, nothing is known and nothing may be called good.
pub const START: &str = "start";

impl Board {
    /// A board that waits for [`Board::clear`] of [`START`].
    pub fn starting() -> Self {
        let board = Self::default();
        let report = Report::environment(
            "starting",
            "no agent runs yet",
            "agentd is asking the launcher what lives",
            "wait a moment",
        );
        let start = (START.to_owned(), (Weight::Broken, report));
        board.problems.lock().unwrap_or_else(PoisonError::into_inner).extend([start]);
        board
    }

    /// Puts a problem at its place, instead of what was there.
    pub fn set(&self, place: &str, weight: Weight, report: Report) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = (weight, report);
        if problems.get(place) == Some(&entry) {
            return;
        }
        tracing::warn!(place, code = %entry.1.code, problem = %entry.1, "a problem appeared");
        problems.insert(place.to_owned(), entry);
        drop(problems);
        self.changed.send_modify(|version| *version += 1);
    }

    pub fn clear(&self, place: &str) {
        let gone = self.problems.lock().unwrap_or_else(PoisonError::into_inner).remove(place);
        if gone.is_some() {
            tracing::info!(place, "a problem is gone");
            self.changed.send_modify(|version| *version += 1);
        }
    }

    pub fn health(&self) -> Health {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problems.values().map(|(weight, _)| *weight).max() {
            None => Health::Green,
            Some(Weight::Degraded) => Health::Yellow,
            Some(Weight::Broken) => Health::Red,
        }
    }

    /// The heaviest last, as init and the local console show them.
    pub fn problems(&self) -> Vec<Report> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = problems.values().cloned().collect();
        all.sort_by_key(|(weight, _)| *weight);
        let surplus = all.len().saturating_sub(MOST_SHOWN);
        all.into_iter().skip(surplus).map(|(_, report)| report).collect()
    }

    /// Marks each change; the value itself means nothing.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(code: &str) -> Report {
        Report::environment(code, "w", "y", "f")
    }

    #[test]
    fn the_worst_problem_decides_and_every_colour_has_a_reason() {
        let board = Board::default();
        assert_eq!((board.health(), board.problems().len()), (Health::Green, 0));
        board.set("walls", Weight::Broken, report("walls_missing"));
        board.set("engine", Weight::Degraded, report("engine_down"));
        assert_eq!(board.health(), Health::Red);
        let codes: Vec<_> = board.problems().into_iter().map(|report| report.code).collect();
        assert_eq!(codes, ["engine_down", "walls_missing"]);
        board.clear("walls");
        assert_eq!(board.health(), Health::Yellow);
        board.clear("engine");
        assert_eq!(board.health(), Health::Green);
    }

    #[test]
    fn nothing_is_good_before_it_is_known() {
        let board = Board::starting();
        assert_eq!(board.health(), Health::Red);
        board.clear(START);
        assert_eq!(board.health(), Health::Green);
    }

    #[test]
    fn only_changes_are_told() {
        let board = Board::default();
        let mut watch = board.watch();
        board.set("engine", Weight::Degraded, report("a"));
        assert!(watch.has_changed().expect("open"));
        watch.mark_unchanged();
        board.set("engine", Weight::Degraded, report("a"));
        board.clear("elsewhere");
        assert!(!watch.has_changed().expect("open"));
    }
}
