//! Which agent is started, stopped or left alone now?
//!
//! Pure: [`step`] takes what happened and says what to do; `run.rs` does it and tells what came of it. The state of
//! each agent is `agentd_domain::health`'s, which draws it; here are those things that concern all agents together:
//! the launcher's list, who is due, who is removed.
//!
//! Always: an agent has at most one run. A start is only asked for while the agent has none and the launcher's
//!         own list has been seen since it was last lost, so a run that outlived agentd is adopted and not
//!         doubled. A stop wins: after it nothing is started until somebody wants the agent again.
//! Time:   boot-clock milliseconds, given from outside.

use agentd_domain::health::{self, Effect, GRACE_MS, Health, History};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::manifest::Restart;
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub health: Health,
    removing: bool,
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
        history: History,
    },
    Remove {
        agent: AgentId,
    },
    /// What concerns one agent alone.
    Of {
        agent: AgentId,
        event: health::Event,
    },
    /// All runs that live, as the launcher says; the ends it reported have been told before.
    Listed {
        runs: Vec<(RunId, AgentId)>,
    },
    LauncherLost,
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Of an agent's health.
    For { agent: AgentId, effect: Effect },
    /// A run of nobody that we know.
    Kill { run: RunId, grace_ms: u32 },
    /// The agent has no run any more: remove its files and forget it.
    Remove { agent: AgentId },
    /// Ask the launcher what lives.
    List,
}

/// What outside of the state a step may know.
pub struct Now<'a> {
    pub boot_ms: u64,
    pub unix_ms: i64,
    pub fresh_run: &'a mut dyn FnMut() -> RunId,
    /// Chance, for back-off.
    pub jitter: &'a mut dyn FnMut() -> u16,
}

impl Now<'_> {
    fn of_one(&mut self) -> health::Now {
        health::Now { boot_ms: self.boot_ms, unix_ms: self.unix_ms, jitter: (self.jitter)() }
    }
}

/// When the next [`Event::Tick`] has something to do.
pub fn next_tick_ms(state: &State) -> Option<u64> {
    if state.launcher == Sight::Lost {
        return None;
    }
    state.agents.values().filter(|entry| !entry.removing).filter_map(|entry| entry.health.due_ms()).min()
}

pub fn step(state: &mut State, event: Event, now: &mut Now<'_>) -> Vec<Action> {
    let mut actions = Vec::new();
    match event {
        Event::Known { agent, wanted, restart, restarts, history } => {
            let health = Health::known(wanted, restart, restarts, history, now.of_one());
            state.agents.entry(agent).or_insert(Entry { health, removing: false });
        }
        Event::Remove { agent } => {
            of_one(state, agent, health::Event::Want(false), now, &mut actions);
            if let Some(entry) = state.agents.get_mut(&agent) {
                entry.removing = true;
            }
        }
        Event::Of { agent, event } => {
            let leaving = state.agents.get(&agent).is_some_and(|entry| entry.removing);
            match (&event, state.agents.contains_key(&agent)) {
                (health::Event::Want(_), _) if leaving => {}
                (health::Event::Started { run }, false) => {
                    actions.push(Action::Kill { run: *run, grace_ms: GRACE_MS });
                }
                _ => of_one(state, agent, event, now, &mut actions),
            }
        }
        Event::Listed { runs } => {
            state.launcher = Sight::Seen;
            listed(state, &runs, now, &mut actions);
        }
        Event::LauncherLost => state.launcher = Sight::Lost,
        Event::Tick => {}
    }
    start_what_is_due(state, now, &mut actions);
    remove_what_is_at_rest(state, &mut actions);
    actions
}

fn of_one(
    state: &mut State,
    agent: AgentId,
    event: health::Event,
    now: &mut Now<'_>,
    actions: &mut Vec<Action>,
) {
    let Some(entry) = state.agents.get_mut(&agent) else { return };
    let effects = health::step(&mut entry.health, event, now.of_one());
    actions.extend(effects.into_iter().map(|effect| match effect {
        Effect::List => Action::List,
        effect => Action::For { agent, effect },
    }));
}

fn listed(state: &mut State, runs: &[(RunId, AgentId)], now: &mut Now<'_>, actions: &mut Vec<Action>) {
    // What we believe to live and does not, is gone.
    let missing = |entry: &Entry| {
        let run = entry.health.phase().run();
        run.is_some_and(|run| runs.iter().all(|(living, _)| *living != run))
    };
    let gone: Vec<AgentId> =
        state.agents.iter().filter(|(_, entry)| missing(entry)).map(|(agent, _)| *agent).collect();
    for agent in gone {
        of_one(state, agent, health::Event::Missing, now, actions);
    }
    for &(run, agent) in runs {
        if state.agents.contains_key(&agent) {
            of_one(state, agent, health::Event::Lives { run }, now, actions);
        } else {
            actions.push(Action::Kill { run, grace_ms: 0 });
        }
    }
}

fn start_what_is_due(state: &mut State, now: &mut Now<'_>, actions: &mut Vec<Action>) {
    if state.launcher == Sight::Lost {
        return;
    }
    let due =
        |entry: &Entry| !entry.removing && entry.health.due_ms().is_some_and(|due_ms| due_ms <= now.boot_ms);
    let due: Vec<AgentId> =
        state.agents.iter().filter(|(_, entry)| due(entry)).map(|(agent, _)| *agent).collect();
    for agent in due {
        let run = (now.fresh_run)();
        of_one(state, agent, health::Event::Start { run }, now, actions);
    }
}

fn remove_what_is_at_rest(state: &mut State, actions: &mut Vec<Action>) {
    state.agents.retain(|&agent, entry| {
        let at_rest = entry.removing && entry.health.phase().run().is_none();
        if at_rest {
            actions.push(Action::Remove { agent });
        }
        !at_rest
    });
}

#[cfg(test)]
mod tests;
