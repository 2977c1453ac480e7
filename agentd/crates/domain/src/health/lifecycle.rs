//! Starts, ends, and the pauses between them.

use super::{
    About, After, Answer, BACKOFF_FIRST_MS, BACKOFF_MOST_MS, Effect, Ends, FAILURE_WINDOW_MS, FAILURES_MOST,
    GRACE_MS, HEALTHY_MS, Health, JITTER_MOST_PERMILLE, NotStarted, Notice, Now, Pain, Phase, QUARANTINE_MS,
    REFUSED_FIRST_MS, Severity, Vitals,
};
use crate::ids::RunId;
use crate::launcher::{ExitCause, KillReason};
use crate::manifest::Restart;

/// By the boot clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lived {
    pub began_ms: u64,
    pub ended_ms: u64,
}

impl Health {
    pub(super) fn want(&mut self, wanted: bool, now: Now, effects: &mut Vec<Effect>) {
        self.wanted = wanted;
        if wanted {
            // A person's wish ends every waiting and forgives what was before it.
            if self.phase.run().is_none() {
                self.phase = Phase::Waiting { until_ms: now.boot_ms, after: After::Wish };
                self.forgive();
                self.refusals = 0;
                self.keep_ends(None, now);
            }
            return;
        }
        match self.phase {
            Phase::Running { run, .. } => self.kill(run, KillReason::Order, now, effects),
            // It cannot be killed before it exists; `started` does it.
            Phase::Starting { .. } | Phase::Stopping { .. } => {}
            _ => self.phase = Phase::Stopped,
        }
    }

    pub(super) fn start(&mut self, run: RunId, now: Now, effects: &mut Vec<Effect>) {
        if self.due_ms().is_none_or(|due_ms| due_ms > now.boot_ms) {
            return;
        }
        if let Phase::Quarantined { .. } = self.phase {
            tell(effects, About::Probe, "the quarantine's trial start".to_owned());
        }
        self.phase = Phase::Starting { run, answer: Answer::Awaited };
        self.vitals = Vitals::fresh();
        effects.push(Effect::Start { run });
    }

    pub(super) fn started(&mut self, run: RunId, now: Now, effects: &mut Vec<Effect>) {
        if self.phase.run() != Some(run) {
            // Nobody asked for it any more.
            effects.push(Effect::Kill { run, grace_ms: GRACE_MS, why: KillReason::Order });
            return;
        }
        self.refusals = 0;
        if !matches!(self.phase, Phase::Starting { .. }) {
            return;
        }
        if self.wanted {
            self.phase = Phase::Running { run, since_ms: now.boot_ms };
            self.vitals.begin(now.boot_ms);
        } else {
            self.kill(run, KillReason::Order, now, effects);
        }
    }

    pub(super) fn not_started(&mut self, run: RunId, why: NotStarted, now: Now, effects: &mut Vec<Effect>) {
        match why {
            NotStarted::Unsure => {
                self.phase = Phase::Starting { run, answer: Answer::Unsure };
                effects.push(Effect::List);
            }
            _ if !self.wanted => self.phase = Phase::Stopped,
            NotStarted::NotAsked => {
                let until_ms = now.boot_ms + BACKOFF_FIRST_MS;
                self.phase = Phase::Waiting { until_ms, after: After::Wish };
            }
            NotStarted::Refused => self.refuse(now),
        }
    }

    fn refuse(&mut self, now: Now) {
        let pause_ms = REFUSED_FIRST_MS.saturating_mul(1 << self.refusals.min(16)).min(QUARANTINE_MS);
        self.refusals += 1;
        self.phase = Phase::Refused { until_ms: now.boot_ms + pause_ms };
    }

    /// Without a cause the run is gone and nobody knows how, because the launcher died with it.
    pub(super) fn ended(
        &mut self,
        run: Option<RunId>,
        cause: Option<&ExitCause>,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let began_ms = match self.phase {
            Phase::Running { since_ms, .. } => since_ms,
            Phase::Stopping { .. } => self.vitals.begun_ms(),
            _ => now.boot_ms,
        };
        self.after_end(cause, Lived { began_ms, ended_ms: now.boot_ms }, now, effects);
        self.keep_ends(run, now);
    }

    /// A run of a former agentd, which did not live to see its end: it counts as if it had. A record that comes again,
    /// because the order to forget it was lost, counts once.
    pub(super) fn ended_unseen(
        &mut self,
        run: RunId,
        cause: &ExitCause,
        lived: Lived,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let counted = self.pains.history().ends.newest.is_some_and(|newest| run <= newest);
        if counted || self.phase.run().is_some() {
            return;
        }
        // A record cannot be of the future.
        let ended_ms = lived.ended_ms.min(now.boot_ms);
        self.after_end(Some(cause), Lived { ended_ms, ..lived }, now, effects);
        self.keep_ends(Some(run), now);
    }

    fn after_end(&mut self, cause: Option<&ExitCause>, lived: Lived, now: Now, effects: &mut Vec<Effect>) {
        self.vitals = Vitals::fresh();
        if !self.wanted {
            self.phase = Phase::Stopped;
            return;
        }
        match cause {
            // Not the agent's doing: started again at once.
            None | Some(ExitCause::Stopped) => {
                self.phase = Phase::Waiting { until_ms: now.boot_ms, after: After::Wish };
            }
            Some(ExitCause::WallFailed { .. }) => self.refuse(now),
            Some(_) if self.restart == Restart::Never => self.phase = Phase::Stopped,
            Some(_) => self.failed(lived, now, effects),
        }
    }

    fn failed(&mut self, lived: Lived, now: Now, effects: &mut Vec<Effect>) {
        if lived.ended_ms.saturating_sub(lived.began_ms) >= HEALTHY_MS {
            self.forgive();
        }
        self.failures.push(lived.ended_ms);
        self.failures.retain(|&at| now.boot_ms.saturating_sub(at) < FAILURE_WINDOW_MS);
        self.restarts = self.restarts.saturating_add(1);
        if self.probation || self.failures.len() >= FAILURES_MOST {
            let text = match self.probation {
                true => "its trial start failed: it stays in quarantine".to_owned(),
                false => format!("it failed {} times: it is in quarantine", self.failures.len()),
            };
            self.failures.clear();
            self.probation = true;
            self.phase = Phase::Quarantined { until_ms: lived.ended_ms + QUARANTINE_MS };
            let pain = Pain::of_appliance("quarantine", Severity::High, &text, now.unix_ms);
            tell(effects, About::Quarantined, text);
            self.ache(pain, effects);
        } else {
            let until_ms = lived.ended_ms + pause_ms(self.failures.len().max(1), now.jitter);
            self.phase = Phase::Waiting { until_ms, after: After::End };
        }
    }

    /// What is to be known of it by the next agentd.
    fn keep_ends(&mut self, run: Option<RunId>, now: Now) {
        let unix_ms = |at_ms: u64| {
            let ms = i64::try_from(now.boot_ms.abs_diff(at_ms)).unwrap_or(i64::MAX);
            if at_ms <= now.boot_ms { now.unix_ms.saturating_sub(ms) } else { now.unix_ms.saturating_add(ms) }
        };
        let ends = Ends {
            failed_unix_ms: self.failures.iter().map(|at_ms| unix_ms(*at_ms)).collect(),
            quarantined_until_unix_ms: match self.phase {
                Phase::Quarantined { until_ms } => Some(unix_ms(until_ms)),
                _ => None,
            },
            probation: self.probation,
            newest: self.pains.history().ends.newest.max(run),
        };
        self.pains.ended(ends);
    }

    /// The other way: what was kept, by this boot's clock.
    pub(super) fn recall_ends(&mut self, now: Now) {
        let ends = &self.pains.history().ends;
        let ago = |unix_ms: &i64| u64::try_from(now.unix_ms.saturating_sub(*unix_ms)).ok();
        let recent = ends.failed_unix_ms.iter().filter_map(ago).filter(|ago_ms| *ago_ms < FAILURE_WINDOW_MS);
        // What was before this boot lies before its clock's beginning, as near to it as can be said.
        self.failures = recent.map(|ago_ms| now.boot_ms.saturating_sub(ago_ms)).collect();
        self.probation = ends.probation;
        let left = ends.quarantined_until_unix_ms.map(|until| until.saturating_sub(now.unix_ms));
        if let Some(left_ms) = left.and_then(|left_ms| u64::try_from(left_ms).ok())
            && self.wanted
            && (1..=QUARANTINE_MS).contains(&left_ms)
        {
            self.phase = Phase::Quarantined { until_ms: now.boot_ms + left_ms };
        }
    }

    fn forgive(&mut self) {
        self.failures.clear();
        self.probation = false;
    }

    /// A run that has lived long enough ends what was held against its agent.
    pub(super) fn proven(&mut self, since_ms: u64, now: Now, effects: &mut Vec<Effect>) {
        let held_against_it = self.probation || !self.failures.is_empty();
        if held_against_it && now.boot_ms.saturating_sub(since_ms) >= HEALTHY_MS {
            if self.probation {
                tell(effects, About::Recovered, "its trial start lives: the quarantine is over".to_owned());
                self.pains.soothe("quarantine");
            }
            self.forgive();
            self.keep_ends(None, now);
        }
    }

    /// The list does not have it. What was just asked for may not be in it yet.
    pub(super) fn missing(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let awaited = matches!(self.phase, Phase::Starting { answer: Answer::Awaited, .. });
        if self.phase.run().is_some() && !awaited {
            self.ended(None, None, now, effects);
        }
    }

    pub(super) fn lives(&mut self, run: RunId, now: Now, effects: &mut Vec<Effect>) {
        match self.phase {
            Phase::Starting { run: ours, answer: Answer::Unsure } if ours == run => {
                self.phase = Phase::Starting { run, answer: Answer::Awaited };
                self.vitals = Vitals::adopted();
                effects.push(Effect::Adopt { run });
            }
            Phase::Stopping { run: ours, since_ms, why } if ours == run => {
                // The order to kill may have been lost with the launcher's connection.
                if now.boot_ms.saturating_sub(since_ms) > u64::from(GRACE_MS) {
                    effects.push(Effect::Kill { run, grace_ms: 0, why });
                }
            }
            phase if phase.run() == Some(run) => {}
            phase if phase.run().is_none() && self.wanted => {
                self.phase = Phase::Starting { run, answer: Answer::Awaited };
                self.vitals = Vitals::adopted();
                effects.push(Effect::Adopt { run });
            }
            phase if phase.run().is_none() => self.kill(run, KillReason::Order, now, effects),
            _ => effects.push(Effect::Kill { run, grace_ms: 0, why: KillReason::Order }),
        }
    }

    /// What hangs in the kernel's reclaim would not hear SIGTERM for long.
    pub(super) fn kill(&mut self, run: RunId, why: KillReason, now: Now, effects: &mut Vec<Effect>) {
        self.phase = Phase::Stopping { run, since_ms: now.boot_ms, why };
        let grace_ms = if why == KillReason::Pressure { 0 } else { GRACE_MS };
        effects.push(Effect::Kill { run, grace_ms, why });
    }
}

/// The pause before the next start, after so many failures.
fn pause_ms(failures: usize, jitter: u16) -> u64 {
    let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
    let base_ms = (BACKOFF_FIRST_MS << doublings).min(BACKOFF_MOST_MS);
    base_ms + base_ms * u64::from(jitter % (JITTER_MOST_PERMILLE + 1)) / 1000
}

pub(super) fn tell(effects: &mut Vec<Effect>, about: About, text: String) {
    let brief = text.clone();
    effects.push(Effect::Tell(Notice { about, text, brief }));
}
