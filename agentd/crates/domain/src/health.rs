//! How is an agent, and what is done about it?
//!
//! Owns:  one agent's state from the wish to run until its end ([`Health`]): its run, its back-off, its quarantine,
//!        what it is throttled to, its pain. Pure: [`step`] takes what happened and says what to do; agentd does it.
//! In:    wishes, starts and ends, readings of the kernel's counters each second, reports of pain.
//! Out:   [`Effect`]s; [`Health::state`] with [`Health::reason`], for people.
//!
//! ```text
//!           wanted          started              work in hand        no progress with work
//! stopped ─────────▶ starting ─────▶ ready ◀──────▶ busy ─────────────────▶ stuck ──┐
//!    ▲                 ▲   │           ▲ │           ▲ │      progress ◀──────┘      │ ten seconds later:
//!    │ not wanted      │   │ refused   │ ▼ quiet     │ │                             │ killed
//!    │ (from each)     │   ▼           idle ◀────────┘ │ forks, errors, hog          │
//!    │                 │ refused                       ▼          ▲                  │
//!    │                 │ (on a timer)              throttled ─────┘ calm             │
//!    │                 │                               │ memory stalls: killed       │
//!    │        back-off │                               ▼                             ▼
//!    │                 └───────────────────────────── crashed ◀────── ended by itself or killed
//!    │      probe, or the owner ┌───────────────────────┘ too often
//!    └──────────────── quarantined
//! ```
//! Each of ready, busy, idle, stuck and throttled is a run that lives; any of them may end, and leads to crashed.
//!
//! Always: an agent has at most one run, and no start is asked for while it has one. Idle is healthy: nothing is
//!         done to an agent because it is quiet while no work waits for it. What is throttled and calms down gets
//!         all of its limits back. A quarantine ends by its one trial start or by the owner. Pauses grow, with a
//!         jitter from outside that never makes a later one shorter than the one before.
//! Never:  a clock or chance: both are in [`Now`].
//! Time:   boot-clock milliseconds decide; Unix milliseconds are only shown.

mod lifecycle;
mod pains;
mod signs;

pub use pains::{BUDGET_NEAR_PERMILLE, Ends, History, Note, Pain, PainFrom, Pains, Renewal, Severity};
pub use signs::{Machine, Mood, Pressure, Pulse, Reading, Stall, Throttle, Vitals};

use crate::api::AgentState;
use crate::ids::RunId;
use crate::launcher::{ExitCause, KillReason};
use crate::manifest::Restart;
use lifecycle::Lived;

/// The first pause after an agent ended by itself; doubled with each further end.
pub const BACKOFF_FIRST_MS: u64 = 1_000;
pub const BACKOFF_MOST_MS: u64 = 60_000;
/// A pause is longer by up to so many thousandths, so that agents that fell together do not rise together. Below
/// 1000, or a later pause could be shorter than the one before it.
pub const JITTER_MOST_PERMILLE: u16 = 250;
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
pub struct Health {
    /// Whether the owner wants it to run.
    wanted: bool,
    restart: Restart,
    phase: Phase,
    /// Of the run that lives; afresh with each.
    vitals: Vitals,
    /// Ends by itself within the window, oldest first.
    failures: Vec<u64>,
    /// It was quarantined and has not been healthy since: one more failure is enough.
    probation: bool,
    refusals: u32,
    /// Starts after an end by itself.
    restarts: u32,
    pains: Pains,
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
        why: KillReason,
    },
    /// It is to run, and does not yet.
    Waiting {
        until_ms: u64,
        after: After,
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

/// What a wait is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Its start is due, or was not asked for yet.
    Wish,
    /// It ended by itself, or was killed for its own good.
    End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Want(bool),
    /// The launcher is asked now. Only for an agent that is due ([`Health::due_ms`]).
    Start {
        run: RunId,
    },
    /// A start or an adoption succeeded.
    Started {
        run: RunId,
    },
    NotStarted {
        run: RunId,
        why: NotStarted,
    },
    /// A run has ended, perhaps one that no agentd saw end: times are those of its exit record, by the boot clock.
    Ended {
        run: RunId,
        cause: ExitCause,
        began_ms: u64,
        ended_ms: u64,
    },
    /// The launcher's list does not have the run that we believe in.
    Missing,
    /// The launcher's list has this run.
    Lives {
        run: RunId,
    },
    /// The limits that were ordered last were not set.
    NotThrottled {
        run: RunId,
    },
    Read {
        run: RunId,
        reading: Box<Reading>,
    },
    Hurt(Pain),
    /// How much of something bounded is used: bytes moved, processes.
    Budget {
        name: String,
        used: u64,
        most: u64,
        renewal: Renewal,
    },
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
        run: RunId,
    },
    /// Ask for the sockets of a living run.
    Adopt {
        run: RunId,
    },
    Kill {
        run: RunId,
        grace_ms: u32,
        why: KillReason,
    },
    /// Set the run's limits to its plan's, as far as this lets it.
    Limit {
        run: RunId,
        throttle: Throttle,
    },
    /// Ask the launcher what lives.
    List,
    /// Tell the owner.
    Tell(Notice),
}

/// What the owner is told: it stands in the agent's history, its log and the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub about: About,
    pub text: String,
    /// Without what the agent itself wrote.
    pub brief: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    Throttled,
    Restored,
    Stuck,
    /// It was killed on the agent's behalf or its neighbours'.
    Killed,
    Quarantined,
    /// The trial start of a quarantine.
    Probe,
    Recovered,
    Pain,
}

impl About {
    /// The second word of the audit log's action.
    pub fn name(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Restored => "restored",
            Self::Stuck => "stuck",
            Self::Killed => "killed",
            Self::Quarantined => "quarantined",
            Self::Probe => "probe",
            Self::Recovered => "recovered",
            Self::Pain => "pain",
        }
    }
}

/// What outside of the state a step may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub boot_ms: u64,
    pub unix_ms: i64,
    /// A fresh random number; what exceeds [`JITTER_MOST_PERMILLE`] is folded into it.
    pub jitter: u16,
}

impl Phase {
    pub fn run(&self) -> Option<RunId> {
        match *self {
            Self::Starting { run, .. } | Self::Running { run, .. } | Self::Stopping { run, .. } => Some(run),
            Self::Stopped | Self::Waiting { .. } | Self::Quarantined { .. } | Self::Refused { .. } => None,
        }
    }
}

impl Health {
    /// An agent from the store, or just installed. What its ends have come to was kept: neither a new agentd nor a
    /// reboot lets it off a quarantine.
    pub fn known(wanted: bool, restart: Restart, restarts: u32, history: History, now: Now) -> Self {
        let due = Phase::Waiting { until_ms: now.boot_ms, after: After::Wish };
        let mut health = Self {
            wanted,
            restart,
            phase: if wanted { due } else { Phase::Stopped },
            vitals: Vitals::default(),
            failures: Vec::new(),
            probation: false,
            refusals: 0,
            restarts,
            pains: Pains::of(history),
        };
        health.recall_ends(now);
        health
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn wanted(&self) -> bool {
        self.wanted
    }

    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    pub fn pains(&self) -> &Pains {
        &self.pains
    }

    pub fn vitals(&self) -> &Vitals {
        &self.vitals
    }

    /// When it is to be started, if it waits for that.
    pub fn due_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Waiting { until_ms, .. }
            | Phase::Quarantined { until_ms }
            | Phase::Refused { until_ms }
                if self.wanted =>
            {
                Some(until_ms)
            }
            _ => None,
        }
    }

    /// As people see it. An agent that is being stopped still runs.
    pub fn state(&self) -> AgentState {
        match self.phase {
            Phase::Stopped => AgentState::Stopped,
            Phase::Starting { .. } | Phase::Waiting { after: After::Wish, .. } => AgentState::Starting,
            Phase::Running { .. } | Phase::Stopping { why: KillReason::Order, .. } => self.vitals.state(),
            Phase::Stopping { .. } => AgentState::Stuck,
            Phase::Waiting { after: After::End, .. } => AgentState::Crashed,
            Phase::Quarantined { .. } => AgentState::Quarantined,
            Phase::Refused { .. } => AgentState::Refused,
        }
    }

    /// Why it is in that state, in one clause.
    pub fn reason(&self, now_ms: u64) -> String {
        let seconds = |until_ms: u64| until_ms.saturating_sub(now_ms).div_ceil(1000);
        match self.phase {
            Phase::Stopped => {
                "nobody wants it to run, or it has ended and is not to be started again".to_owned()
            }
            Phase::Starting { .. } => "its walls are being raised".to_owned(),
            Phase::Waiting { after: After::Wish, .. } => "its start is due".to_owned(),
            Phase::Running { .. } => self.vitals.reason(now_ms),
            Phase::Stopping { why: KillReason::Order, .. } => "it was told to end".to_owned(),
            Phase::Stopping { why, .. } => format!("it is being killed: {}", why.told()),
            Phase::Waiting { until_ms, after: After::End } => {
                format!("it ended by itself and is started again in {} s", seconds(until_ms))
            }
            Phase::Quarantined { until_ms } => {
                format!("it kept failing; one trial start in {} s, or when you start it", seconds(until_ms))
            }
            Phase::Refused { until_ms } => format!("its start was refused; again in {} s", seconds(until_ms)),
        }
    }
}

/// The one way in which an agent's state changes.
pub fn step(health: &mut Health, event: Event, now: Now) -> Vec<Effect> {
    let mut effects = Vec::new();
    match event {
        Event::Want(wanted) => health.want(wanted, now, &mut effects),
        Event::Start { run } => health.start(run, now, &mut effects),
        Event::Started { run } => health.started(run, now, &mut effects),
        Event::NotStarted { run, why } if health.phase.run() == Some(run) => {
            health.not_started(run, why, now, &mut effects);
        }
        Event::Ended { run, cause, .. } if health.phase.run() == Some(run) => {
            health.ended(Some(run), Some(&cause), now, &mut effects);
        }
        Event::Ended { run, cause, began_ms, ended_ms } => {
            health.ended_unseen(run, &cause, Lived { began_ms, ended_ms }, now, &mut effects);
        }
        Event::Missing => health.missing(now, &mut effects),
        Event::Lives { run } => health.lives(run, now, &mut effects),
        Event::NotThrottled { run } if health.phase.run() == Some(run) => health.vitals.limits_unknown(),
        Event::Read { run, reading } => health.read(run, *reading, now, &mut effects),
        Event::Hurt(pain) => health.hurt(pain, &mut effects),
        Event::Budget { name, used, most, renewal } => {
            health.budget(&name, used, most, renewal, now, &mut effects);
        }
        // Of a run that is not this agent's any more.
        Event::NotStarted { .. } | Event::NotThrottled { .. } => {}
    }
    for effect in &effects {
        if let Effect::Tell(notice) = effect
            && notice.about != About::Pain
        {
            health.pains.note(now.unix_ms, &notice.text);
        }
    }
    effects
}

#[cfg(test)]
mod tests;
