//! When is a child started again, and in which order does everything end?
//!
//! Pure: `step` takes an event and the boot clock and gives effects; [`crate::machine`] carries them out.
//!
//! A child:    Idle -> Running -> Waiting (back-off) -> Running ...
//! The machine: Up -> Stopping(agentd) -> Stopping(launcher) -> Stopping(netd, console) -> Clearing -> Over
//!
//! Always: the back-off starts at [`FIRST_PAUSE_MS`], doubles up to [`LONGEST_PAUSE_MS`], and starts over after
//!         a life of [`GOOD_LIFE_MS`]. Each wave of the end has a deadline after which it is killed, so the end
//!         comes whatever a child does. agentd goes first: it closes its stores while the launcher still runs.

use crate::children::{ALL, Child};

pub const FIRST_PAUSE_MS: u64 = 250;
pub const LONGEST_PAUSE_MS: u64 = 30_000;
/// A child that lived so long had a good start; its next death is a new story.
pub const GOOD_LIFE_MS: u64 = 10_000;
/// Two children in a row that end at once are a pattern, one is an accident.
const RESTLESS_PAUSE_MS: u64 = FIRST_PAUSE_MS * 4;

/// Who ends together, and how long they may take.
const WAVES: [(&[Child], u64); 3] = [
    (&[Child::Agentd], 15_000),
    // It ends every jail and engine, each with its own deadline of 10 s at most.
    (&[Child::Launcher], 15_000),
    (&[Child::Netd, Child::ConsoleTty], 3_000),
];
/// From SIGKILL to the end of the process; only one that hangs in the kernel takes longer.
const KILLED_MS: u64 = 3_000;

/// What the machine does at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    PowerOff,
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The boot has come to this child.
    Start(Child),
    /// It ended, or could not be started.
    Ended(Child),
    /// A button, a signal, a request.
    End(Goal),
    /// No process is left but init.
    Alone,
    /// Time has passed.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Spawn(Child),
    Terminate(Child),
    Kill(Child),
    KillEverybody,
    Finish(Goal),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Idle,
    Running { since_ms: u64 },
    Waiting { until_ms: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    child: Child,
    life: Life,
    pause_ms: u64,
    restarts: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Up,
    Stopping { goal: Goal, wave: usize, deadline_ms: u64, killed: bool },
    Clearing { goal: Goal, deadline_ms: u64 },
    Over,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    children: [Kept; ALL.len()],
    phase: Phase,
}

impl Default for State {
    fn default() -> Self {
        let kept = |child| Kept { child, life: Life::Idle, pause_ms: FIRST_PAUSE_MS, restarts: 0 };
        Self { children: ALL.map(kept), phase: Phase::Up }
    }
}

impl State {
    /// Is the end on its way?
    pub fn is_ending(&self) -> bool {
        self.phase != Phase::Up
    }

    pub fn is_running(&self, child: Child) -> bool {
        self.kept(child).is_some_and(|kept| matches!(kept.life, Life::Running { .. }))
    }

    pub fn restarts(&self, child: Child) -> u32 {
        self.kept(child).map_or(0, |kept| kept.restarts)
    }

    /// Was it started at all in this boot?
    pub fn is_wanted(&self, child: Child) -> bool {
        self.kept(child).is_some_and(|kept| kept.life != Life::Idle)
    }

    /// Does it keep ending soon after its start? Until it has lived well again, so that the answer does not
    /// change with every attempt.
    pub fn is_restless(&self, child: Child, now_ms: u64) -> bool {
        self.kept(child).is_some_and(|kept| {
            let lives_well = match kept.life {
                Life::Running { since_ms } => now_ms.saturating_sub(since_ms) >= GOOD_LIFE_MS,
                Life::Idle => true,
                Life::Waiting { .. } => false,
            };
            kept.pause_ms >= RESTLESS_PAUSE_MS && !lives_well
        })
    }

    /// When `Event::Tick` will change something.
    pub fn next_tick_ms(&self) -> Option<u64> {
        let restart = self.children.iter().filter_map(|kept| match kept.life {
            Life::Waiting { until_ms } => Some(until_ms),
            _ => None,
        });
        match self.phase {
            Phase::Up => restart.min(),
            Phase::Stopping { deadline_ms, .. } | Phase::Clearing { deadline_ms, .. } => Some(deadline_ms),
            Phase::Over => None,
        }
    }

    fn kept(&self, child: Child) -> Option<&Kept> {
        self.children.iter().find(|kept| kept.child == child)
    }

    fn running(&self, children: &[Child]) -> Vec<Child> {
        children.iter().copied().filter(|child| self.is_running(*child)).collect()
    }
}

pub fn step(state: &mut State, event: Event, now_ms: u64) -> Vec<Effect> {
    let mut effects = Vec::new();
    match event {
        Event::Start(child) if state.phase == Phase::Up => start(state, child, now_ms, &mut effects),
        Event::Start(_) => {}
        Event::Ended(child) => ended(state, child, now_ms),
        Event::End(goal) if state.phase == Phase::Up => enter_wave(state, goal, 0, now_ms, &mut effects),
        Event::End(_) => {}
        Event::Alone => {
            if let Phase::Clearing { goal, .. } = state.phase {
                state.phase = Phase::Over;
                effects.push(Effect::Finish(goal));
            }
        }
        Event::Tick => {}
    }
    advance(state, now_ms, &mut effects);
    effects
}

fn start(state: &mut State, child: Child, now_ms: u64, effects: &mut Vec<Effect>) {
    if let Some(kept) = state.children.iter_mut().find(|kept| kept.child == child && kept.life == Life::Idle)
    {
        kept.life = Life::Running { since_ms: now_ms };
        effects.push(Effect::Spawn(child));
    }
}

fn ended(state: &mut State, child: Child, now_ms: u64) {
    let up = state.phase == Phase::Up;
    let Some(kept) = state.children.iter_mut().find(|kept| kept.child == child) else { return };
    let Life::Running { since_ms } = kept.life else { return };
    if !up {
        kept.life = Life::Idle;
        return;
    }
    if now_ms.saturating_sub(since_ms) >= GOOD_LIFE_MS {
        kept.pause_ms = FIRST_PAUSE_MS;
    }
    kept.life = Life::Waiting { until_ms: now_ms.saturating_add(kept.pause_ms) };
    kept.pause_ms = kept.pause_ms.saturating_mul(2).min(LONGEST_PAUSE_MS);
}

/// Carries out everything whose time has come.
fn advance(state: &mut State, now_ms: u64, effects: &mut Vec<Effect>) {
    match state.phase {
        Phase::Up => restart_the_rested(state, now_ms, effects),
        Phase::Stopping { goal, wave, deadline_ms, killed } => {
            let members = WAVES.get(wave).map_or(&[][..], |wave| wave.0);
            let running = state.running(members);
            if running.is_empty() || (killed && now_ms >= deadline_ms) {
                enter_wave(state, goal, wave + 1, now_ms, effects);
            } else if now_ms >= deadline_ms {
                effects.extend(running.into_iter().map(Effect::Kill));
                let deadline_ms = now_ms.saturating_add(KILLED_MS);
                state.phase = Phase::Stopping { goal, wave, deadline_ms, killed: true };
            }
        }
        Phase::Clearing { goal, deadline_ms } if now_ms >= deadline_ms => {
            state.phase = Phase::Over;
            effects.push(Effect::Finish(goal));
        }
        Phase::Clearing { .. } | Phase::Over => {}
    }
}

fn restart_the_rested(state: &mut State, now_ms: u64, effects: &mut Vec<Effect>) {
    for kept in &mut state.children {
        if let Life::Waiting { until_ms } = kept.life
            && until_ms <= now_ms
        {
            kept.life = Life::Running { since_ms: now_ms };
            kept.restarts = kept.restarts.saturating_add(1);
            effects.push(Effect::Spawn(kept.child));
        }
    }
}

fn enter_wave(state: &mut State, goal: Goal, from: usize, now_ms: u64, effects: &mut Vec<Effect>) {
    for (wave, (members, patience_ms)) in WAVES.iter().enumerate().skip(from) {
        let running = state.running(members);
        if running.is_empty() {
            continue;
        }
        effects.extend(running.into_iter().map(Effect::Terminate));
        let deadline_ms = now_ms.saturating_add(*patience_ms);
        state.phase = Phase::Stopping { goal, wave, deadline_ms, killed: false };
        return;
    }
    effects.push(Effect::KillEverybody);
    state.phase = Phase::Clearing { goal, deadline_ms: now_ms.saturating_add(KILLED_MS) };
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
