//! What hurts, and what became of it: the part of an agent's health that outlives its runs and agentd.

use super::{About, Effect, Health, Notice, Now};
use crate::ids::RunId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Kept of each agent. With texts of [`Pain::MESSAGE_MOST_BYTES`] that is 20 KiB at most.
const PAINS_MOST: usize = 32;
const NOTES_MOST: usize = 32;
/// Equal pains that follow each other closely are one with a count; and so long a pain is taken for present.
pub const OPEN_MS: i64 = 10 * 60_000;
/// On an agent's behalf, the same is not said more often.
const REPEAT_MS: i64 = 60_000;
/// From here on a budget is near its end, and from there on very near.
pub const BUDGET_NEAR_PERMILLE: u64 = 800;
const BUDGET_END_PERMILLE: u64 = 950;

const DAY_MS: i64 = 24 * 3600 * 1000;

/// When there is more of something bounded again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// When less of it is in use: processes.
    WhenFreed,
    /// With the next day of UTC: bytes moved.
    EachDay,
}

const BUDGET: &str = "budget";

/// How bad it is. From high on the owner sees it on the overview.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Low,
    Medium,
    High,
    Critical,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PainFrom {
    /// The agent itself, in its own words.
    Agent,
    /// agentd, on its behalf.
    Appliance,
}

/// A report that something hurts.
///
/// | kind, when agentd says it | what was seen |
/// |---|---|
/// | `pressure` | it waits for memory and gets nothing done |
/// | `missed_progress` | work waits for it and nothing comes of it |
/// | `error_rate` | most of its requests to agentd fail |
/// | `forks` | it runs against its limit of processes |
/// | `hog` | it takes the processors while others wait for them |
/// | `budget` | something bounded is nearly used up |
/// | `model_unavailable` | it asked for a model and there was none |
/// | `quarantine` | it failed too often |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pain {
    pub kind: String,
    pub severity: Severity,
    pub message: String,
    pub from: PainFrom,
    /// Of the last of them.
    pub at_unix_ms: i64,
    pub count: u32,
    /// Seen to be gone. What an agent reported is taken for gone after a while.
    #[serde(default)]
    pub over: bool,
}

impl Pain {
    pub const KIND_MOST_BYTES: usize = 32;
    pub const MESSAGE_MOST_BYTES: usize = 500;

    /// What an agent says of itself. The kind is a word of its own; the error says what a word is.
    pub fn of_agent(kind: &str, severity: Severity, message: &str, at_unix_ms: i64) -> Result<Self, String> {
        let good = (1..=Self::KIND_MOST_BYTES).contains(&kind.len())
            && kind
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte));
        if !good {
            return Err(format!(
                "`{}` is no kind of pain: use 1 to {} of a-z, 0-9, `_`, `-` and `.`",
                kind.escape_debug(),
                Self::KIND_MOST_BYTES
            ));
        }
        if message.len() > Self::MESSAGE_MOST_BYTES {
            return Err(format!(
                "the message has {} bytes of at most {}",
                message.len(),
                Self::MESSAGE_MOST_BYTES
            ));
        }
        let (kind, message) = (kind.to_owned(), message.to_owned());
        Ok(Self { kind, severity, message, from: PainFrom::Agent, at_unix_ms, count: 1, over: false })
    }

    /// Which budget a pain of the appliance is about: each is a pain of its own.
    fn budget(&self) -> Option<&str> {
        let about_budget = self.kind == BUDGET && self.from == PainFrom::Appliance;
        about_budget.then(|| self.message.split_once(": ").map_or(&*self.message, |(name, _)| name))
    }

    pub(super) fn of_appliance(kind: &str, severity: Severity, message: &str, at_unix_ms: i64) -> Self {
        let (kind, message) = (kind.to_owned(), message.to_owned());
        Self { kind, severity, message, from: PainFrom::Appliance, at_unix_ms, count: 1, over: false }
    }
}

impl FromStr for Severity {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Low, Self::Medium, Self::High, Self::Critical]
            .into_iter()
            .find(|severity| severity.name() == text)
            .ok_or_else(|| format!("`{}` is none of low, medium, high, critical", text.escape_debug()))
    }
}

/// Something that was done about the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub unix_ms: i64,
    pub text: String,
}

/// What is kept on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Oldest first.
    pub pains: Vec<Pain>,
    pub notes: Vec<Note>,
    #[serde(default)]
    pub ends: Ends,
}

/// What its ends have come to. Times are of the Unix clock, which goes on while the appliance is off; where it was set
/// anew in between, what lies in its future or too far back does not count.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Ends by itself that still count, oldest first.
    pub failed_unix_ms: Vec<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantined_until_unix_ms: Option<i64>,
    /// It was quarantined and has not been healthy since.
    #[serde(default)]
    pub probation: bool,
    /// The newest run whose end was counted. Run ids grow with the time of their start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<RunId>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pains {
    history: History,
    /// Budgets that are near their end, and how bad it was when that was told.
    budgets: BTreeMap<String, Severity>,
    /// Grows with each change.
    version: u64,
}

impl Pains {
    pub(super) fn of(history: History) -> Self {
        Self { history, ..Self::default() }
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    /// Another number when there is something new to keep.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The worst that is taken for present.
    pub fn worst(&self, now_unix_ms: i64) -> Option<&Pain> {
        let open = |pain: &&Pain| !pain.over && now_unix_ms.saturating_sub(pain.at_unix_ms) < OPEN_MS;
        self.history.pains.iter().filter(open).max_by_key(|pain| (pain.severity, pain.at_unix_ms))
    }

    /// Replaces what its ends have come to.
    pub(super) fn ended(&mut self, ends: Ends) {
        if self.history.ends != ends {
            self.history.ends = ends;
            self.version += 1;
        }
    }

    pub(super) fn note(&mut self, unix_ms: i64, text: &str) {
        let notes = &mut self.history.notes;
        notes.push(Note { unix_ms, text: text.to_owned() });
        let surplus = notes.len().saturating_sub(NOTES_MOST);
        notes.drain(..surplus);
        self.version += 1;
    }

    /// What agentd said of this kind is not present any more.
    pub(super) fn soothe(&mut self, kind: &str) {
        for pain in &mut self.history.pains {
            if pain.kind == kind && pain.from == PainFrom::Appliance && !pain.over {
                pain.over = true;
                self.version += 1;
            }
        }
    }

    /// Also by the agentd before this one.
    fn told_today(&self, budget: &str, severity: Severity, now: Now) -> bool {
        let day = |unix_ms: i64| unix_ms.div_euclid(DAY_MS);
        let mut told = self.history.pains.iter().filter(|pain| pain.budget() == Some(budget) && !pain.over);
        told.any(|pain| pain.severity >= severity && day(pain.at_unix_ms) == day(now.unix_ms))
    }

    /// What was told of this budget is over.
    fn more_again(&mut self, name: &str) {
        self.budgets.remove(name);
        for pain in self.history.pains.iter_mut().filter(|pain| pain.budget() == Some(name) && !pain.over) {
            pain.over = true;
            self.version += 1;
        }
    }

    /// False when it is a repetition that was only counted.
    fn take(&mut self, pain: Pain) -> bool {
        self.version += 1;
        let pains = &mut self.history.pains;
        let same = |known: &&mut Pain| {
            known.kind == pain.kind && known.from == pain.from && known.budget() == pain.budget()
        };
        if let Some(known) = pains.iter_mut().rev().find(same)
            && pain.at_unix_ms.saturating_sub(known.at_unix_ms) < OPEN_MS
        {
            let worse = pain.severity > known.severity || known.over;
            *known = Pain { count: known.count.saturating_add(1), ..pain };
            return worse;
        }
        pains.push(pain);
        let surplus = pains.len().saturating_sub(PAINS_MOST);
        pains.drain(..surplus);
        true
    }

    fn said_just_now(&self, kind: &str, now: Now) -> bool {
        let pains = self.history.pains.iter().filter(|pain| pain.from == PainFrom::Appliance);
        pains.filter(|pain| pain.kind == kind).any(|pain| (now.unix_ms - pain.at_unix_ms).abs() < REPEAT_MS)
    }
}

impl Health {
    /// A pain that an agent reports, or that was seen elsewhere.
    pub(super) fn hurt(&mut self, pain: Pain, effects: &mut Vec<Effect>) {
        self.ache(pain, effects);
    }

    pub(super) fn ache(&mut self, pain: Pain, effects: &mut Vec<Effect>) {
        // One line, whatever the agent wrote.
        let line: String = pain.message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let text = format!("pain, {}: {}: {line}", pain.severity, pain.kind);
        let brief = format!("{}: {}", pain.severity, pain.kind);
        if self.pains.take(pain) {
            effects.push(Effect::Tell(Notice { about: About::Pain, text, brief }));
        }
    }

    /// The same on the agent's behalf, and not each second.
    pub(super) fn ache_for(
        &mut self,
        kind: &str,
        severity: Severity,
        message: &str,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
        if !self.pains.said_just_now(kind, now) {
            self.ache(Pain::of_appliance(kind, severity, message, now.unix_ms), out);
        }
    }

    /// Told when it is near its end, very near, and, where waiting is all that helps, at its end: each once until there
    /// is more again.
    pub(super) fn budget(
        &mut self,
        name: &str,
        used: u64,
        most: u64,
        renewal: Renewal,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let permille = u64::try_from(u128::from(used) * 1000 / u128::from(most.max(1))).unwrap_or(u64::MAX);
        let severity = match (permille, renewal) {
            (0..BUDGET_NEAR_PERMILLE, _) => return self.pains.more_again(name),
            (BUDGET_NEAR_PERMILLE..BUDGET_END_PERMILLE, _) => Severity::Medium,
            (1000.., Renewal::EachDay) => Severity::Critical,
            _ => Severity::High,
        };
        if self.pains.budgets.get(name).is_some_and(|told| *told >= severity)
            || (renewal == Renewal::EachDay && self.pains.told_today(name, severity, now))
        {
            return;
        }
        self.pains.budgets.insert(name.to_owned(), severity);
        let until = match renewal {
            Renewal::WhenFreed => "",
            Renewal::EachDay => "; there is more at midnight, UTC",
        };
        let message = format!("{name}: {used} of {most} are used{until}");
        self.ache(Pain::of_appliance(BUDGET, severity, &message, now.unix_ms), effects);
    }
}
