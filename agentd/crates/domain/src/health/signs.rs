//! What do the kernel's counters and the agent's requests say about a run that lives?
//!
//! A reading comes about once a second. Totals that only grow are compared with the reading before, so that the
//! length of the time between does not matter.
//! Sources: Documentation/accounting/psi.rst, Documentation/admin-guide/cgroup-v2.rst (`memory.events`,
//!          `pids.events`).

use super::lifecycle::tell;
use super::{About, Effect, Health, Now, Phase, Severity};
use crate::api::AgentState;
use crate::ids::RunId;
use crate::launcher::KillReason;
use crate::plan::CgroupLimits;
use serde::{Deserialize, Serialize};

/// Waiting for memory so much of the time is a livelock when it lasts: below it, reclaim still gets ahead.
const CHOKED_PERMILLE: u64 = 700;
/// Two readings: as soon as it is told from one slow second.
pub const CHOKED_MS: u64 = 2_000;
/// So much of the time gets an agent nowhere, more slowly.
const STARVED_PERMILLE: u64 = 300;
pub const STARVED_MS: u64 = 10_000;
/// Work, no progress and no processor time used: nothing will come of it. A slow model is no reason: a request that
/// is open counts as progress.
pub const STUCK_MS: u64 = 60_000;
/// The same while it computes, which may be what it was asked to do; `POST /agent/v1/self/progress` says so.
pub const STUCK_COMPUTING_MS: u64 = 5 * 60_000;
/// From stuck to its end, for what comes late.
pub const STUCK_GRACE_MS: u64 = 10_000;
/// After so long without work an agent is idle rather than ready.
const QUIET_MS: u64 = 60_000;
/// A throttled agent that behaves for so long has its limits back.
pub const CALM_MS: u64 = 10_000;
/// A process that polls a few times a second uses less than this.
const COMPUTING_PERMILLE: u64 = 50;
/// Forks that fail within one reading's time: a program that meets its limit once stops or waits.
const FORKS_REFUSED: u64 = 5;
const ERRORS_AT_ONCE: u64 = 10;
/// Machine-wide: for so much of the time somebody waits for a processor.
const CROWDED_PERMILLE: u64 = 300;

/// Time that was lost to waiting for one resource.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stall {
    /// Hundredths of a percent of the last ten seconds in which some, and in which all that wanted to run, waited.
    pub some_avg10: u32,
    pub full_avg10: u32,
    pub some_total_us: u64,
    pub full_total_us: u64,
}

/// What an agent asked of agentd so far, and what waits for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pulse {
    pub calls: u64,
    pub errors: u64,
    /// Of these, requests for a model that was not there.
    pub model_refusals: u64,
    /// Requests that agentd is working on, but for those that wait for a message.
    pub open: u32,
    /// Boot clock; of the last request that brought something.
    pub progress_ms: u64,
    /// Messages it was given and has not answered, and those that wait for it.
    pub work: u32,
}

/// The whole machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Machine {
    pub cpus: u32,
    pub cpu: Stall,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// Boot clock.
    pub at_ms: u64,
    pub memory_bytes: u64,
    pub memory_high_events: u64,
    pub memory_max_events: u64,
    pub oom_kills: u64,
    pub pids: u32,
    /// Forks that the limit refused.
    pub pids_refused: u64,
    pub cpu_us: u64,
    pub memory: Stall,
    pub cpu: Stall,
    pub io: Stall,
    pub pulse: Pulse,
    pub machine: Machine,
}

impl Reading {
    /// What was before the first reading of a new run: its group's counters began at zero, the agent's and the
    /// machine's did not.
    fn at_the_beginning(&self, begun_ms: u64) -> Self {
        let (pulse, machine) = (self.pulse, self.machine);
        Self { at_ms: begun_ms, pulse, machine, ..Self::default() }
    }
}

/// For people: thousandths of the last ten seconds that were lost to waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    pub memory_some_permille: u32,
    pub memory_full_permille: u32,
    pub cpu_some_permille: u32,
    pub io_some_permille: u32,
    pub io_full_permille: u32,
    pub memory_high_events: u64,
    pub memory_max_events: u64,
}

/// How much of its processor time an agent is left. Nothing else is taken, for what is wrong shows there: whoever forks,
/// fails and hogs does it with processor time, and less of it slows everything that the agent does, its writing too.
/// - `memory.high` lower would make it reclaim, which is the livelock that the watchdog is there to end, and reading its
///   pages back is work for the disk that all share.
/// - `io.max` lower would hold back data that the file system's next commit waits for (ext4, `data=ordered`), and with
///   the commit every neighbour's `fsync`: who is to be spared would wait. A manifest's own `limits.io` stays as it is.
/// - `io.weight` does nothing without the cost model of `io.cost.qos`, which needs a disk that was measured.
/// - `pids.max` below what runs ends nothing: it makes forks fail that the agent may need to calm down.
///
/// Sources: Documentation/admin-guide/cgroup-v2.rst; Documentation/filesystems/ext4/journal.rst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Throttle {
    #[default]
    None,
    Half,
    Quarter,
}

impl Throttle {
    /// Never wider than the plan, and never below what the kernel takes.
    pub fn within(self, plan: &CgroupLimits) -> CgroupLimits {
        let share = match self {
            Self::None => 1,
            Self::Half => 2,
            Self::Quarter => 4,
        };
        // cpu.max takes no quota below a millisecond.
        let cpu_quota_us = (plan.cpu_quota_us / share).max(1_000).min(plan.cpu_quota_us);
        CgroupLimits { cpu_quota_us, ..plan.clone() }
    }

    fn more(self) -> Self {
        match self {
            Self::None => Self::Half,
            Self::Half | Self::Quarter => Self::Quarter,
        }
    }

    fn told(self) -> &'static str {
        match self {
            Self::None => "all",
            Self::Half => "half",
            Self::Quarter => "a quarter",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mood {
    /// Started, and nothing was asked of it for long.
    #[default]
    Ready,
    Busy,
    Idle,
    Stuck,
}

/// Why an agent is throttled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heat {
    Forks,
    Errors,
    Hog,
}

impl Heat {
    fn kind(self) -> &'static str {
        match self {
            Self::Forks => "forks",
            Self::Errors => "error_rate",
            Self::Hog => "hog",
        }
    }

    fn told(self) -> &'static str {
        match self {
            Self::Forks => "it starts processes against its limit",
            Self::Errors => "most of its requests fail",
            Self::Hog => "it takes the processors while others wait for them",
        }
    }
}

/// What is known of a run that lives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vitals {
    begun_ms: u64,
    /// Begun under this agentd, and not taken over from one before.
    is_fresh: bool,
    mood: Mood,
    mood_since_ms: u64,
    last: Option<Reading>,
    /// Since when it waits for memory: milliseconds at both rates, and the counters at the beginning.
    choked_ms: u64,
    starved_ms: u64,
    high_before: u64,
    starved_since_ms: u64,
    /// There is work since then, or an answer came then.
    work_since_ms: Option<u64>,
    computing_ms: u64,
    active_ms: u64,
    throttle: Throttle,
    /// The last limits are known to be set.
    limits: Limits,
    heat: Option<Heat>,
    /// Readings in a row in which it hogged.
    hogged: u32,
    hot_ms: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Limits {
    #[default]
    Ordered,
    Unknown,
}

impl Vitals {
    pub(super) fn fresh() -> Self {
        Self { is_fresh: true, ..Self::default() }
    }

    /// Of a run that lived before agentd: whoever was before may have throttled it.
    pub(super) fn adopted() -> Self {
        Self { limits: Limits::Unknown, ..Self::default() }
    }

    pub(super) fn begin(&mut self, now_ms: u64) {
        self.begun_ms = now_ms;
        self.mood_since_ms = now_ms;
        self.active_ms = now_ms;
        self.computing_ms = now_ms;
    }

    pub(super) fn begun_ms(&self) -> u64 {
        self.begun_ms
    }

    pub(super) fn limits_unknown(&mut self) {
        self.limits = Limits::Unknown;
    }

    pub fn throttle(&self) -> Throttle {
        self.throttle
    }

    pub fn last(&self) -> Option<&Reading> {
        self.last.as_ref()
    }

    pub fn pressure(&self) -> Option<Pressure> {
        let reading = self.last.as_ref()?;
        Some(Pressure {
            memory_some_permille: reading.memory.some_avg10 / 10,
            memory_full_permille: reading.memory.full_avg10 / 10,
            cpu_some_permille: reading.cpu.some_avg10 / 10,
            io_some_permille: reading.io.some_avg10 / 10,
            io_full_permille: reading.io.full_avg10 / 10,
            memory_high_events: reading.memory_high_events,
            memory_max_events: reading.memory_max_events,
        })
    }

    pub(super) fn state(&self) -> AgentState {
        match (self.mood, self.throttle) {
            (Mood::Stuck, _) => AgentState::Stuck,
            (_, Throttle::Half | Throttle::Quarter) => AgentState::Throttled,
            (Mood::Ready, _) => AgentState::Ready,
            (Mood::Busy, _) => AgentState::Busy,
            (Mood::Idle, _) => AgentState::Idle,
        }
    }

    pub(super) fn reason(&self, now_ms: u64) -> String {
        let since = now_ms.saturating_sub(self.mood_since_ms) / 1000;
        let heat = self.heat.map_or("it was", Heat::told);
        match (self.state(), self.last.as_ref().map(|reading| reading.pulse)) {
            (AgentState::Stuck, _) => format!("work waits for it and nothing has come of it for {since} s"),
            (AgentState::Throttled, _) => {
                format!("it has {} of its processor time: {heat}", self.throttle.told())
            }
            (AgentState::Busy, Some(pulse)) if pulse.open > 0 => {
                "a request of it is being answered".to_owned()
            }
            (AgentState::Busy, Some(pulse)) if pulse.work > 0 => {
                format!("it has {} messages to answer", pulse.work)
            }
            (AgentState::Busy, _) => "it computes".to_owned(),
            (AgentState::Idle, _) => format!("nothing to do for {since} s, which is well"),
            _ => "it waits for work".to_owned(),
        }
    }

    fn feel(&mut self, mood: Mood, now_ms: u64) {
        if self.mood != mood {
            self.mood = mood;
            self.mood_since_ms = now_ms;
        }
    }
}

/// What happened between two readings.
struct Passed {
    ms: u64,
    memory_full_permille: u64,
    cpu_permille: u64,
    forks_refused: u64,
    calls: u64,
    errors: u64,
    model_refusals: u64,
    crowded_permille: u64,
}

impl Passed {
    /// Counters of another run would go backwards: then nothing has passed.
    fn between(before: &Reading, now: &Reading) -> Self {
        let ms = now.at_ms.saturating_sub(before.at_ms).max(1);
        let permille = |later: u64, earlier: u64| later.saturating_sub(earlier) / ms;
        Self {
            ms,
            memory_full_permille: permille(now.memory.full_total_us, before.memory.full_total_us),
            cpu_permille: permille(now.cpu_us, before.cpu_us),
            forks_refused: now.pids_refused.saturating_sub(before.pids_refused),
            calls: now.pulse.calls.saturating_sub(before.pulse.calls),
            errors: now.pulse.errors.saturating_sub(before.pulse.errors),
            model_refusals: now.pulse.model_refusals.saturating_sub(before.pulse.model_refusals),
            crowded_permille: permille(now.machine.cpu.some_total_us, before.machine.cpu.some_total_us),
        }
    }
}

impl Health {
    pub(super) fn read(&mut self, run: RunId, reading: Reading, now: Now, effects: &mut Vec<Effect>) {
        let Phase::Running { run: ours, since_ms } = self.phase else { return };
        if ours != run {
            return;
        }
        self.proven(since_ms, now, effects);
        let last = self.vitals.last.replace(reading.clone());
        let begun = || self.vitals.is_fresh.then(|| reading.at_the_beginning(self.vitals.begun_ms));
        if let Some(before) = last.or_else(begun) {
            let passed = Passed::between(&before, &reading);
            if self.is_choked(&before, &reading, &passed) {
                let text = "it waits for memory and gets nothing done".to_owned();
                self.ache_for("pressure", Severity::High, &text, now, effects);
                let told = format!("killed: {}: {text}", KillReason::Pressure.told());
                tell(effects, About::Killed, told);
                return self.kill(run, KillReason::Pressure, now, effects);
            }
            self.cool_or_heat(run, &reading, &passed, now, effects);
            if passed.model_refusals > 0 {
                let text = "it asked for a model, and the engine has none to answer";
                self.ache_for("model_unavailable", Severity::Medium, text, now, effects);
            }
            if passed.cpu_permille >= COMPUTING_PERMILLE {
                self.vitals.computing_ms = now.boot_ms;
            }
        }
        self.consider_work(run, &reading, now, effects);
        if self.vitals.limits == Limits::Unknown && self.phase.run() == Some(run) {
            self.limit(run, effects);
        }
    }

    /// The livelock that `memory.high` alone allows: the kernel makes the run wait on each allocation, more and more,
    /// and never ends it. Source: can1357/oh-my-pi issue 12769, with 11 million `high` events and no kill.
    fn is_choked(&mut self, before: &Reading, reading: &Reading, passed: &Passed) -> bool {
        let vitals = &mut self.vitals;
        if passed.memory_full_permille < STARVED_PERMILLE {
            (vitals.choked_ms, vitals.starved_ms) = (0, 0);
            return false;
        }
        if vitals.starved_ms == 0 {
            vitals.high_before = before.memory_high_events;
            vitals.starved_since_ms = before.at_ms;
        }
        vitals.starved_ms += passed.ms;
        vitals.choked_ms =
            if passed.memory_full_permille >= CHOKED_PERMILLE { vitals.choked_ms + passed.ms } else { 0 };
        // A single wait lasts up to two seconds, in which nothing is counted: since the beginning, not since the last.
        let over_high = reading.memory_high_events > vitals.high_before;
        let progress = reading.pulse.progress_ms >= vitals.starved_since_ms && reading.pulse.progress_ms > 0;
        let hopeless = !progress && vitals.choked_ms + JUST_SHORT_MS >= CHOKED_MS;
        let slow = !progress && vitals.starved_ms >= STARVED_MS;
        // An agent that keeps a heartbeat while all else of it stands still is not let off for ever.
        let lasting = vitals.choked_ms >= STARVED_MS;
        over_high && (hopeless || slow || lasting)
    }

    fn cool_or_heat(
        &mut self,
        run: RunId,
        reading: &Reading,
        passed: &Passed,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
        let vitals = &mut self.vitals;
        let cpus = u64::from(reading.machine.cpus.max(1));
        let hogs = passed.crowded_permille >= CROWDED_PERMILLE && passed.cpu_permille * 2 >= 1000 * cpus;
        vitals.hogged = if hogs { vitals.hogged.saturating_add(1) } else { 0 };
        let heat = if passed.forks_refused >= FORKS_REFUSED {
            Some(Heat::Forks)
        } else if passed.errors >= ERRORS_AT_ONCE && passed.errors * 2 >= passed.calls {
            Some(Heat::Errors)
        } else {
            (vitals.hogged >= 2).then_some(Heat::Hog)
        };
        match heat {
            Some(heat) => {
                vitals.hot_ms = now.boot_ms;
                vitals.heat = Some(heat);
                let more = vitals.throttle.more();
                if more != vitals.throttle {
                    vitals.throttle = more;
                    let text = format!("throttled to {} of its processor time: {}", more.told(), heat.told());
                    tell(out, About::Throttled, text);
                    self.limit(run, out);
                    let severity = if heat == Heat::Hog { Severity::Low } else { Severity::Medium };
                    self.ache_for(heat.kind(), severity, heat.told(), now, out);
                }
            }
            None if vitals.throttle != Throttle::None
                && now.boot_ms.saturating_sub(vitals.hot_ms) >= CALM_MS =>
            {
                vitals.throttle = Throttle::None;
                let was = vitals.heat.take();
                tell(out, About::Restored, "it has calmed down and has all of its limits back".to_owned());
                self.limit(run, out);
                if let Some(heat) = was {
                    self.pains.soothe(heat.kind());
                }
            }
            None => {}
        }
    }

    fn limit(&mut self, run: RunId, effects: &mut Vec<Effect>) {
        self.vitals.limits = Limits::Ordered;
        effects.push(Effect::Limit { run, throttle: self.vitals.throttle });
    }

    /// Ready, busy, idle or stuck.
    fn consider_work(&mut self, run: RunId, reading: &Reading, now: Now, effects: &mut Vec<Effect>) {
        let vitals = &mut self.vitals;
        let pulse = &reading.pulse;
        let at_ms = now.boot_ms;
        let computes = vitals.computing_ms == at_ms && at_ms > vitals.begun_ms;
        if pulse.work == 0 && pulse.open == 0 {
            vitals.work_since_ms = None;
            if computes || pulse.progress_ms > vitals.active_ms {
                vitals.active_ms = if computes { at_ms } else { pulse.progress_ms };
            }
            let quiet = at_ms.saturating_sub(vitals.active_ms) >= QUIET_MS;
            let mood = match (computes, quiet) {
                (true, _) => Mood::Busy,
                (false, true) => Mood::Idle,
                (false, false) => Mood::Ready,
            };
            self.unstick();
            return self.vitals.feel(mood, at_ms);
        }
        vitals.active_ms = at_ms;
        let begun = vitals.work_since_ms.get_or_insert(at_ms);
        // What agentd itself is working on is not the agent's to hurry.
        *begun = if pulse.open > 0 { at_ms } else { (*begun).max(pulse.progress_ms) };
        let quiet_ms = at_ms.saturating_sub(*begun);
        let still_ms = at_ms.saturating_sub(vitals.computing_ms.max(*begun));
        if still_ms < STUCK_MS && quiet_ms < STUCK_COMPUTING_MS {
            self.unstick();
            return self.vitals.feel(Mood::Busy, at_ms);
        }
        if vitals.mood != Mood::Stuck {
            vitals.feel(Mood::Stuck, at_ms);
            let text = format!(
                "{} messages wait for it and nothing has come of them for {} s",
                pulse.work,
                quiet_ms / 1000
            );
            tell(effects, About::Stuck, format!("stuck: {text}"));
            self.ache_for("missed_progress", Severity::High, &text, now, effects);
        } else if at_ms.saturating_sub(vitals.mood_since_ms) >= STUCK_GRACE_MS {
            tell(effects, About::Killed, format!("killed: {}", KillReason::Stuck.told()));
            self.kill(run, KillReason::Stuck, now, effects);
        }
    }

    fn unstick(&mut self) {
        if self.vitals.mood == Mood::Stuck {
            self.pains.soothe("missed_progress");
        }
    }
}

/// Readings do not come to the millisecond: two of them are two seconds.
const JUST_SHORT_MS: u64 = 100;
