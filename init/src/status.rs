//! What does the machine say of itself, and is that green?
//!
//! Pure but for one file of netd's that is read when somebody asks. [`Facts`] collects what the boot found.
//!
//! Always: green means that everything required works, agentd's own word included. Missing enforcement (a
//!         wall that the kernel does not have) is a failed required step, so it is red.

use crate::children::{ALL, Child};
use crate::machine::Machine;
use agentd_domain::config::Config;
use agentd_domain::fault::Report;
use agentd_domain::initctl::{
    AgentdReport, ChildStatus, Clock, Health, StepOutcome, StepStatus, SystemStatus,
};
use agentd_domain::marker::Volume;
use agentd_domain::{netd, paths};
use init_sys::clock;
use std::collections::BTreeMap;

/// Names of the milestones that tests and benchmarks wait for.
pub const MILESTONE_AGENTD: &str = "agentd ready";
pub const MILESTONE_GREEN: &str = "ready";

/// A status is one packet; more problems than this help nobody at a small console.
const MOST_PROBLEMS: usize = 20;
const LONGEST_TEXT_BYTES: usize = 600;
/// agentd reports every minute, and at once when something changes.
const AGENTD_SILENT_MS: u64 = 200_000;

#[derive(Debug, Default)]
pub struct Facts {
    pub version: String,
    /// Of the image, as its release file says.
    pub variant: String,
    /// `a`, `b`, `direct` or `rescue`.
    pub slot: String,
    pub command_line: String,
    /// When the image was built, milliseconds since 1970.
    pub build_ms: u64,
    /// No earlier time is believed.
    pub floor_ms: u64,
    /// The latest time that was confirmed and stored.
    pub confirmed_ms: u64,
    pub config: Config,
    /// The file behind it, as it was read.
    pub config_text: String,
    /// What is wrong with the configuration.
    pub config_problems: Vec<Report>,
    pub state_is_mounted: bool,
    /// Partitions with foreign or damaged content, by device: only the owner's yes changes them.
    pub unusable: Vec<(Volume, String)>,
    /// The owner has asked for this repair; the main loop does it.
    pub repair: Option<Volume>,
    pub steps: Vec<StepStatus>,
    pub agentd: Option<AgentdReport>,
    /// When agentd reported last, by the boot clock.
    pub agentd_heard_ms: u64,
    pub milestones: Vec<(String, u64)>,
    last_exits: BTreeMap<Child, String>,
}

impl Facts {
    /// Notes the first time that something was reached.
    pub fn milestone(&mut self, name: &str, now_ms: u64) {
        if !self.milestones.iter().any(|(known, _)| known == name) {
            self.milestones.push((name.to_owned(), now_ms));
        }
    }

    pub fn child_ended(&mut self, child: Child, how: String) {
        self.last_exits.insert(child, how);
        if child == Child::Agentd {
            // Its claim code and its health died with it.
            self.agentd = None;
        }
    }

    /// It has reported before and does no longer: it hangs, which is not the same as having ended.
    pub fn agentd_is_silent(&self, now_ms: u64) -> bool {
        self.agentd.is_some() && now_ms.saturating_sub(self.agentd_heard_ms) > AGENTD_SILENT_MS
    }

    /// Did this step end well?
    pub fn step_is_ok(&self, name: &str) -> bool {
        self.steps.iter().any(|step| step.name == name && matches!(step.outcome, StepOutcome::Ok { .. }))
    }
}

/// netd's file; nothing while it has not come that far.
pub fn netd_status() -> netd::Status {
    let Ok(text) = std::fs::read(paths::NETD_STATUS) else { return netd::Status::default() };
    serde_json::from_slice(&text).unwrap_or_default()
}

/// The whole status. Notes the first green.
pub fn of(machine: &mut Machine) -> SystemStatus {
    let network = netd_status();
    let now_ms = clock::boot_ms();
    let children = children(machine);
    let problems = problems(&machine.facts, &network, machine);
    let health = health(&Parts {
        steps: &machine.facts.steps,
        essential_children_run: [Child::Launcher, Child::Agentd].iter().all(|c| machine.plan.is_running(*c)),
        other_children_run: ALL.iter().all(|c| !machine.plan.is_wanted(*c) || machine.plan.is_running(*c)),
        config_is_whole: machine.facts.config_problems.is_empty(),
        // An unconfirmed clock has its own place in the status, and is no fault of an appliance off the net.
        network_is_well: network.problems.iter().all(|problem| problem.code.starts_with("time_")),
        agentd: machine
            .facts
            .agentd
            .as_ref()
            .filter(|_| !machine.facts.agentd_is_silent(now_ms))
            .map(|report| report.health),
    });
    if health == Health::Green {
        machine.facts.milestone(MILESTONE_GREEN, now_ms);
    }
    let facts = &machine.facts;
    SystemStatus {
        version: facts.version.clone(),
        variant: facts.variant.clone(),
        slot: facts.slot.clone(),
        uptime_ms: now_ms,
        health,
        steps: facts.steps.iter().map(shortened_step).collect(),
        children,
        problems: problems.iter().map(shortened).take(MOST_PROBLEMS).collect(),
        addresses: network.addresses.into_iter().take(32).collect(),
        clock: network.clock.state,
        agentd: facts.agentd.clone(),
        milestones: facts.milestones.clone(),
        network: facts.config.network.clone(),
    }
}

/// What health depends on.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'p> {
    pub steps: &'p [StepStatus],
    pub essential_children_run: bool,
    pub other_children_run: bool,
    pub config_is_whole: bool,
    pub network_is_well: bool,
    pub agentd: Option<Health>,
}

pub fn health(parts: &Parts<'_>) -> Health {
    let failed = |required: bool| {
        parts
            .steps
            .iter()
            .any(|step| step.required == required && matches!(step.outcome, StepOutcome::Failed { .. }))
    };
    // A required step that was not done, because another failed or because the boot is not there yet.
    let undone = parts.steps.iter().any(|s| s.required && matches!(s.outcome, StepOutcome::Skipped { .. }));
    if failed(true) || undone || !parts.essential_children_run {
        return Health::Red;
    }
    let own =
        if failed(false) || !parts.other_children_run || !parts.config_is_whole || !parts.network_is_well {
            Health::Yellow
        } else {
            Health::Green
        };
    match parts.agentd {
        None | Some(Health::Red) => Health::Red,
        Some(Health::Yellow) => Health::Yellow,
        Some(Health::Green) => own,
    }
}

/// The worst first: what failed in the boot, children, configuration, network, what agentd says.
fn problems(facts: &Facts, network: &netd::Status, machine: &Machine) -> Vec<Report> {
    let steps = |required: bool| {
        facts.steps.iter().filter(move |step| step.required == required).filter_map(|step| {
            match &step.outcome {
                StepOutcome::Failed { report } => Some(report.clone()),
                _ => None,
            }
        })
    };
    let restless =
        ALL.iter().filter(|child| machine.plan.is_restless(**child, clock::boot_ms())).map(|child| {
            let last = facts.last_exits.get(child).map_or("it ended", String::as_str);
            Report::bug(
                "child_keeps_ending",
                child.loss(),
                format!("{} keeps ending soon after its start: {last}", child.name()),
                "choose `restart` on the local console; if it happens again, choose another version there or \
             report the lines under `last errors`",
            )
        });
    let silent = facts.agentd_is_silent(clock::boot_ms()).then(|| {
        Report::bug(
            "agentd_silent",
            Child::Agentd.loss(),
            "agentd runs but has not reported for minutes",
            "choose `restart` on the local console",
        )
    });
    let mut problems: Vec<Report> = steps(true).collect();
    problems.extend(silent);
    problems.extend(restless);
    problems.extend(steps(false));
    problems.extend(facts.config_problems.iter().cloned());
    problems.extend(network.problems.iter().cloned());
    problems.extend(facts.agentd.iter().flat_map(|report| report.problems.iter().cloned()));
    problems
}

fn children(machine: &Machine) -> Vec<ChildStatus> {
    let wanted = ALL.iter().filter(|child| machine.plan.is_wanted(**child));
    wanted
        .map(|child| ChildStatus {
            name: child.name().to_owned(),
            pid: machine.pid(*child).map(|pid| pid.as_raw_nonzero().get()),
            restarts: machine.plan.restarts(*child),
            last_exit: machine.facts.last_exits.get(child).cloned(),
        })
        .collect()
}

/// A packet has an end; a report's sense lies in its beginning.
fn shortened(report: &Report) -> Report {
    let short = |text: &str| {
        let mut text = text.to_owned();
        if text.len() > LONGEST_TEXT_BYTES {
            let cut = (0..=LONGEST_TEXT_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        text
    };
    Report {
        code: short(&report.code),
        fault: report.fault,
        what: short(&report.what),
        why: short(&report.why),
        fix: short(&report.fix),
    }
}

fn shortened_step(step: &StepStatus) -> StepStatus {
    let outcome = match &step.outcome {
        StepOutcome::Failed { report } => StepOutcome::Failed { report: shortened(report) },
        other => other.clone(),
    };
    StepStatus { outcome, ..step.clone() }
}

/// Whether the clock is confirmed, for the floor.
pub fn confirmed_ms(network: &netd::Status) -> Option<u64> {
    network.clock.confirmed_unix_ms.filter(|_| network.clock.state != Clock::Unconfirmed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(required: bool, outcome: StepOutcome) -> StepStatus {
        StepStatus { name: "x".to_owned(), required, outcome }
    }

    fn report() -> Report {
        Report::environment("x", "what", "why", "fix")
    }

    fn well(steps: &[StepStatus]) -> Parts<'_> {
        Parts {
            steps,
            essential_children_run: true,
            other_children_run: true,
            config_is_whole: true,
            network_is_well: true,
            agentd: Some(Health::Green),
        }
    }

    #[test]
    fn all_well_is_green() {
        let steps = [
            step(true, StepOutcome::Ok { elapsed_ms: 1 }),
            step(false, StepOutcome::Skipped { why: "not there".into() }),
        ];
        assert_eq!(health(&well(&steps)), Health::Green);
    }

    #[test]
    fn what_is_required_makes_it_red() {
        let failed = [step(true, StepOutcome::Failed { report: report() })];
        assert_eq!(health(&well(&failed)), Health::Red);
        let skipped = [step(true, StepOutcome::Skipped { why: "data failed".into() })];
        assert_eq!(health(&well(&skipped)), Health::Red);
        assert_eq!(health(&Parts { essential_children_run: false, ..well(&[]) }), Health::Red);
        assert_eq!(health(&Parts { agentd: None, ..well(&[]) }), Health::Red);
        assert_eq!(health(&Parts { agentd: Some(Health::Red), ..well(&[]) }), Health::Red);
    }

    #[test]
    fn what_is_optional_makes_it_yellow() {
        let failed = [step(false, StepOutcome::Failed { report: report() })];
        assert_eq!(health(&well(&failed)), Health::Yellow);
        assert_eq!(health(&Parts { network_is_well: false, ..well(&[]) }), Health::Yellow);
        assert_eq!(health(&Parts { config_is_whole: false, ..well(&[]) }), Health::Yellow);
        assert_eq!(health(&Parts { other_children_run: false, ..well(&[]) }), Health::Yellow);
        assert_eq!(health(&Parts { agentd: Some(Health::Yellow), ..well(&[]) }), Health::Yellow);
    }

    #[test]
    fn a_full_status_fits_into_a_packet() {
        let long = "x".repeat(10_000);
        let report = shortened(&Report::environment(&long, &long, &long, &long));
        let one = serde_json::to_vec(&report).unwrap().len();
        assert!(one * MOST_PROBLEMS < agentd_domain::initctl::MAX_MESSAGE_BYTES, "{one} bytes each");
    }

    #[test]
    fn an_agentd_that_stopped_reporting_is_silent() {
        let mut facts = Facts { agentd_heard_ms: 1_000, ..Facts::default() };
        assert!(!facts.agentd_is_silent(10_000_000), "one that never reported is not there at all");
        facts.agentd = Some(AgentdReport::default());
        assert!(!facts.agentd_is_silent(1_000 + AGENTD_SILENT_MS));
        assert!(facts.agentd_is_silent(1_001 + AGENTD_SILENT_MS));
    }

    #[test]
    fn a_milestone_is_noted_once() {
        let mut facts = Facts::default();
        facts.milestone("init", 5);
        facts.milestone("init", 9);
        assert_eq!(facts.milestones, [("init".to_owned(), 5)]);
    }
}
