//! Which agent is started, stopped, left alone or quarantined now?
//!
//! Pure: [`step`] takes what happened and says what to do; `run.rs` does it and tells what came of it.
//!
//! ```text
//!            wanted, launcher known            started
//! Stopped ───────────────────────▶ Starting ───────────▶ Running ──┐ ended by itself
//!    ▲                               │    ▲                 │      ▼
//!    │ not wanted                    │    │ until is over   │   Waiting ── too often ──▶ Quarantined
//!    │                     refused   ▼    │                 │ not wanted       (both start again on a timer)
//!    └──────────────────────────── Refused┘                 ▼
//!    └────────────────────────────── ended ───────────── Stopping
//! ```
//!
//! Always: an agent has at most one run. A start is only asked for while the agent has none and the launcher's
//!         own list has been seen since it was last lost, so a run that outlived agentd is adopted and not
//!         doubled. A stop wins: after it nothing is started until somebody wants the agent again.
//! Time:   boot-clock milliseconds, given from outside.

use agentd_domain::api::AgentState;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::ExitCause;
use agentd_domain::manifest::Restart;
use std::collections::BTreeMap;

/// The first pause after an agent ended by itself; doubled with each further end.
pub const BACKOFF_FIRST_MS: u64 = 1_000;
pub const BACKOFF_MOST_MS: u64 = 60_000;
/// So many ends within the window put an agent into quarantine.
pub const FAILURES_MOST: usize = 5;
pub const FAILURE_WINDOW_MS: u64 = 10 * 60_000;
/// A run that lasted so long was healthy: what failed before it does not count any more.
pub const HEALTHY_MS: u64 = 60_000;
pub const QUARANTINE_MS: u64 = 10 * 60_000;
/// Pause after the launcher has refused a start; doubled up to the time of a quarantine.
pub const REFUSED_FIRST_MS: u64 = 5_000;
/// From SIGTERM to the end of the whole cgroup.
pub const GRACE_MS: u32 = 5_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Whether the owner wants it to run.
    pub wanted: bool,
    pub restart: Restart,
    pub phase: Phase,
    /// Ends by itself within the window, oldest first.
    failures: Vec<u64>,
    /// It was quarantined and has not been healthy since: one more failure is enough.
    probation: bool,
    refusals: u32,
    removing: bool,
    /// Starts after an end by itself.
    pub restarts: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Stopped,
    /// The launcher has been asked. `Unsure`: its answer was lost, its list will tell.
    Starting {
        run: RunId,
        answer: Answer,
    },
    Running {
        run: RunId,
        since_ms: u64,
    },
    /// A kill was asked for.
    Stopping {
        run: RunId,
        since_ms: u64,
    },
    Waiting {
        until_ms: u64,
    },
    Quarantined {
        until_ms: u64,
    },
    Refused {
        until_ms: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Awaited,
    Unsure,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    pub agents: BTreeMap<AgentId, Entry>,
    /// Whether the launcher's list has been seen since it was last lost.
    pub launcher: Sight,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sight {
    #[default]
    Lost,
    Seen,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// From the store at start, or just installed.
    Known {
        agent: AgentId,
        wanted: bool,
        restart: Restart,
        restarts: u32,
    },
    Want {
        agent: AgentId,
        wanted: bool,
    },
    Remove {
        agent: AgentId,
    },
    /// A start or an adoption succeeded.
    Started {
        agent: AgentId,
        run: RunId,
    },
    NotStarted {
        agent: AgentId,
        run: RunId,
        why: NotStarted,
    },
    Ended {
        agent: AgentId,
        run: RunId,
        cause: ExitCause,
    },
    /// All runs that live, as the launcher says; the ends it reported have been told before.
    Listed {
        runs: Vec<(RunId, AgentId)>,
    },
    LauncherLost,
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotStarted {
    /// The launcher was not reached: nothing was started.
    NotAsked,
    /// It was asked and its answer is lost.
    Unsure,
    /// It said no.
    Refused,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    Start {
        agent: AgentId,
        run: RunId,
    },
    /// Ask for the sockets of a living run.
    Adopt {
        agent: AgentId,
        run: RunId,
    },
    Kill {
        run: RunId,
        grace_ms: u32,
    },
    /// The agent has no run any more: remove its files and forget it.
    Remove {
        agent: AgentId,
    },
    /// Ask the launcher what lives.
    List,
}

/// What outside of the state a step may know.
pub struct Now<'a> {
    pub boot_ms: u64,
    pub fresh_run: &'a mut dyn FnMut() -> RunId,
}

impl Phase {
    pub fn run(&self) -> Option<RunId> {
        match *self {
            Self::Starting { run, .. } | Self::Running { run, .. } | Self::Stopping { run, .. } => Some(run),
            Self::Stopped | Self::Waiting { .. } | Self::Quarantined { .. } | Self::Refused { .. } => None,
        }
    }

    /// As people see it. An agent that is being stopped still runs.
    pub fn shown(&self) -> AgentState {
        match self {
            Self::Stopped => AgentState::Stopped,
            Self::Starting { .. } => AgentState::Starting,
            Self::Running { .. } | Self::Stopping { .. } => AgentState::Running,
            Self::Waiting { .. } => AgentState::BackingOff,
            Self::Quarantined { .. } => AgentState::Quarantined,
            Self::Refused { .. } => AgentState::Refused,
        }
    }

    fn until_ms(&self) -> Option<u64> {
        match *self {
            Self::Waiting { until_ms } | Self::Quarantined { until_ms } | Self::Refused { until_ms } => {
                Some(until_ms)
            }
            _ => None,
        }
    }
}

/// When the next [`Event::Tick`] has something to do.
pub fn next_tick_ms(state: &State) -> Option<u64> {
    if state.launcher == Sight::Lost {
        return None;
    }
    state.agents.values().filter(|entry| entry.wanted).filter_map(|entry| entry.phase.until_ms()).min()
}

pub fn step(state: &mut State, event: Event, now: &mut Now<'_>) -> Vec<Effect> {
    let mut effects = Vec::new();
    match event {
        Event::Known { agent, wanted, restart, restarts } => {
            let phase = if wanted { Phase::Waiting { until_ms: now.boot_ms } } else { Phase::Stopped };
            state.agents.entry(agent).or_insert(Entry {
                wanted,
                restart,
                phase,
                failures: Vec::new(),
                probation: false,
                refusals: 0,
                removing: false,
                restarts,
            });
        }
        Event::Want { agent, wanted } => {
            if let Some(entry) = state.agents.get_mut(&agent).filter(|entry| !entry.removing) {
                entry.want(wanted, now.boot_ms, &mut effects);
            }
        }
        Event::Remove { agent } => {
            if let Some(entry) = state.agents.get_mut(&agent) {
                entry.want(false, now.boot_ms, &mut effects);
                entry.removing = true;
            }
        }
        Event::Started { agent, run } => match state.agents.get_mut(&agent) {
            Some(entry) if entry.phase.run() == Some(run) => entry.started(run, now.boot_ms, &mut effects),
            // Nobody asked for it any more.
            _ => effects.push(Effect::Kill { run, grace_ms: GRACE_MS }),
        },
        Event::NotStarted { agent, run, why } => {
            if let Some(entry) = state.agents.get_mut(&agent).filter(|entry| entry.phase.run() == Some(run)) {
                entry.not_started(run, why, now.boot_ms, &mut effects);
            }
        }
        Event::Ended { agent, run, cause } => {
            if let Some(entry) = state.agents.get_mut(&agent).filter(|entry| entry.phase.run() == Some(run)) {
                entry.ended(Some(&cause), now.boot_ms);
            }
        }
        Event::Listed { runs } => {
            state.launcher = Sight::Seen;
            listed(state, &runs, now.boot_ms, &mut effects);
        }
        Event::LauncherLost => state.launcher = Sight::Lost,
        Event::Tick => {}
    }
    start_what_is_due(state, now, &mut effects);
    remove_what_is_at_rest(state, &mut effects);
    effects
}

impl Entry {
    fn want(&mut self, wanted: bool, now_ms: u64, effects: &mut Vec<Effect>) {
        self.wanted = wanted;
        if wanted {
            // A person's wish ends every waiting and forgives what was before it.
            if self.phase.run().is_none() {
                self.phase = Phase::Waiting { until_ms: now_ms };
                self.failures.clear();
                self.probation = false;
                self.refusals = 0;
            }
            return;
        }
        match self.phase {
            Phase::Running { run, .. } => {
                self.phase = Phase::Stopping { run, since_ms: now_ms };
                effects.push(Effect::Kill { run, grace_ms: GRACE_MS });
            }
            // It cannot be killed before it exists; `started` does it.
            Phase::Starting { .. } | Phase::Stopping { .. } => {}
            _ => self.phase = Phase::Stopped,
        }
    }

    fn started(&mut self, run: RunId, now_ms: u64, effects: &mut Vec<Effect>) {
        self.refusals = 0;
        if !matches!(self.phase, Phase::Starting { .. }) {
            return;
        }
        if self.wanted {
            self.phase = Phase::Running { run, since_ms: now_ms };
        } else {
            self.phase = Phase::Stopping { run, since_ms: now_ms };
            effects.push(Effect::Kill { run, grace_ms: GRACE_MS });
        }
    }

    fn not_started(&mut self, run: RunId, why: NotStarted, now_ms: u64, effects: &mut Vec<Effect>) {
        match why {
            NotStarted::Unsure => {
                self.phase = Phase::Starting { run, answer: Answer::Unsure };
                effects.push(Effect::List);
            }
            _ if !self.wanted => self.phase = Phase::Stopped,
            NotStarted::NotAsked => self.phase = Phase::Waiting { until_ms: now_ms + BACKOFF_FIRST_MS },
            NotStarted::Refused => self.refuse(now_ms),
        }
    }

    fn refuse(&mut self, now_ms: u64) {
        let pause_ms = REFUSED_FIRST_MS.saturating_mul(1 << self.refusals.min(16)).min(QUARANTINE_MS);
        self.refusals += 1;
        self.phase = Phase::Refused { until_ms: now_ms + pause_ms };
    }

    /// `None`: the run is gone and nobody knows how, because the launcher died with it.
    fn ended(&mut self, cause: Option<&ExitCause>, now_ms: u64) {
        let since_ms = match self.phase {
            Phase::Running { since_ms, .. } => since_ms,
            _ => now_ms,
        };
        if !self.wanted {
            self.phase = Phase::Stopped;
            return;
        }
        match cause {
            // Not the agent's doing: started again at once.
            None | Some(ExitCause::Stopped) => self.phase = Phase::Waiting { until_ms: now_ms },
            Some(ExitCause::WallFailed { .. }) => self.refuse(now_ms),
            Some(_) if self.restart == Restart::Never => self.phase = Phase::Stopped,
            Some(_) => self.failed(since_ms, now_ms),
        }
    }

    fn failed(&mut self, since_ms: u64, now_ms: u64) {
        if now_ms.saturating_sub(since_ms) >= HEALTHY_MS {
            self.failures.clear();
            self.probation = false;
        }
        self.failures.retain(|&at| now_ms.saturating_sub(at) < FAILURE_WINDOW_MS);
        self.failures.push(now_ms);
        self.restarts += 1;
        if self.probation || self.failures.len() >= FAILURES_MOST {
            self.failures.clear();
            self.probation = true;
            self.phase = Phase::Quarantined { until_ms: now_ms + QUARANTINE_MS };
        } else {
            let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX).min(16);
            let pause_ms = (BACKOFF_FIRST_MS << doublings).min(BACKOFF_MOST_MS);
            self.phase = Phase::Waiting { until_ms: now_ms + pause_ms };
        }
    }
}

fn listed(state: &mut State, runs: &[(RunId, AgentId)], now_ms: u64, effects: &mut Vec<Effect>) {
    // What we believe to live and does not, is gone.
    for entry in state.agents.values_mut() {
        let missing = entry.phase.run().is_some_and(|run| runs.iter().all(|(living, _)| *living != run));
        let awaited = matches!(entry.phase, Phase::Starting { answer: Answer::Awaited, .. });
        if missing && !awaited {
            entry.ended(None, now_ms);
        }
    }
    for &(run, agent) in runs {
        let Some(entry) = state.agents.get_mut(&agent) else {
            effects.push(Effect::Kill { run, grace_ms: 0 });
            continue;
        };
        match entry.phase {
            Phase::Starting { run: ours, answer: Answer::Unsure } if ours == run => {
                entry.phase = Phase::Starting { run, answer: Answer::Awaited };
                effects.push(Effect::Adopt { agent, run });
            }
            Phase::Stopping { run: ours, since_ms } if ours == run => {
                // The order to kill may have been lost with the launcher's connection.
                if now_ms.saturating_sub(since_ms) > u64::from(GRACE_MS) {
                    effects.push(Effect::Kill { run, grace_ms: 0 });
                }
            }
            phase if phase.run() == Some(run) => {}
            phase if phase.run().is_none() && entry.wanted => {
                entry.phase = Phase::Starting { run, answer: Answer::Awaited };
                effects.push(Effect::Adopt { agent, run });
            }
            phase if phase.run().is_none() => {
                entry.phase = Phase::Stopping { run, since_ms: now_ms };
                effects.push(Effect::Kill { run, grace_ms: GRACE_MS });
            }
            _ => effects.push(Effect::Kill { run, grace_ms: 0 }),
        }
    }
}

fn start_what_is_due(state: &mut State, now: &mut Now<'_>, effects: &mut Vec<Effect>) {
    if state.launcher == Sight::Lost {
        return;
    }
    for (&agent, entry) in &mut state.agents {
        let due = entry.phase.until_ms().is_some_and(|until_ms| until_ms <= now.boot_ms);
        if entry.wanted && !entry.removing && due {
            let run = (now.fresh_run)();
            entry.phase = Phase::Starting { run, answer: Answer::Awaited };
            effects.push(Effect::Start { agent, run });
        }
    }
}

fn remove_what_is_at_rest(state: &mut State, effects: &mut Vec<Effect>) {
    state.agents.retain(|&agent, entry| {
        let at_rest = entry.removing && entry.phase.run().is_none();
        if at_rest {
            effects.push(Effect::Remove { agent });
        }
        !at_rest
    });
}

#[cfg(test)]
mod tests;
