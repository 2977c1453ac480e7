//! The boot, as a list to be read aloud.
//!
//! Each step has a name, is required or optional, and says why. A required step that fails makes the health
//! red and is told on every console, but the boot goes on: the owner must always reach a console that says
//! what is wrong. A step is left out when one that it builds upon did not succeed.

use crate::children::Child;
use crate::machine::Machine;
use crate::plan::Event;
use crate::steps::{
    clock, config, control_groups, crashes, disk, drivers, kernel, medium, provisioning, sysctl, volumes,
    walls,
};
use agentd_domain::fault::Report;
use agentd_domain::initctl::{StepOutcome, StepStatus};

/// What a step gives when nothing is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    Well,
    /// There was nothing to do, and why.
    Skipped(String),
}

pub type Outcome = Result<Done, Report>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Without it no agent can run, for this reason.
    Required(&'static str),
    /// Things go on without it, for this reason.
    Optional(&'static str),
}

pub struct Step {
    pub name: &'static str,
    pub need: Need,
    /// Steps that must have succeeded.
    pub after: &'static [&'static str],
    pub run: fn(&mut Machine) -> Outcome,
}

use Need::{Optional, Required};

const fn step(
    name: &'static str,
    need: Need,
    after: &'static [&'static str],
    run: fn(&mut Machine) -> Outcome,
) -> Step {
    Step { name, need, after, run }
}

#[rustfmt::skip]
pub const STEPS: &[Step] = &[
    step("kernel file systems", Required("everything below reads them"), &[], kernel::mount_file_systems),
    step("kernel log", Optional("lines go to the console instead"), &[], kernel::open_log),
    step("watchdogs", Optional("without one the machine does not restart by itself"), &[], kernel::feed_watchdogs),
    step("Ctrl-Alt-Del", Optional("the power button and the console remain"), &[], kernel::take_ctrl_alt_del),
    // Early, because the reader of its partition table runs beside the steps up to `partition table`.
    step("disk", Required("state and data lie on the disk of the running root"), &[], disk::find),
    step("kernel settings", Required("the walls around agents lean on them"), &[], sysctl::apply),
    step("control groups", Required("agents have no limits without them"), &[], control_groups::make_tree),
    step("walls", Required("an agent is not started unless all its walls stand"), &[], walls::check),
    step("control socket", Required("the local console and agentd ask here"), &[], kernel::listen),
    step("local console", Optional("the web console remains"), &[], start_console_tty),
    step("partition table", Required("state and data are found in it"), &["disk"], disk::set_up_table),
    step("state", Required("it holds what lets the owner in"), &["partition table"], volumes::open_state),
    step("crash records", Optional("they only explain the past"), &["state"], crashes::keep),
    step("settings on the boot partition", Optional("they can be entered on the console"), &["state"], provisioning::take_settings),
    step("configuration", Optional("safe defaults stand in"), &[], config::load),
    step("clock", Optional("time servers set it later"), &[], clock::raise_to_floor),
    step("drivers", Optional("the processor computes without them"), &["kernel file systems"], drivers::load),
    step("no more modules", Required("root in the kernel would pass every wall"), &[], sysctl::end_module_loading),
    step("network", Optional("everything but the network works without it"), &[], start_netd),
    step("data", Required("agents, their memory and models lie there"), &["partition table", "state"], volumes::open_data),
    step("models medium", Optional("models on data and in the image remain"), &[], medium::mount_models),
    step("launcher", Required("it starts agents and engines"), &["control groups", "data"], start_launcher),
    // Whatever failed: it tells the owner in the web console what, why and how to mend it.
    step("agentd", Required("it serves the owner and the agents"), &[], start_agentd),
];

/// All of it. Ends early when the machine is to be shut down.
pub fn run(machine: &mut Machine) {
    for step in STEPS {
        if machine.is_ending() {
            return;
        }
        run_step(machine, step);
    }
    machine.facts.milestone("boot done", init_sys::clock::boot_ms());
}

fn run_step(machine: &mut Machine, step: &Step) {
    let begun_ms = init_sys::clock::boot_ms();
    let missing = step.after.iter().find(|name| !machine.facts.step_is_ok(name));
    let outcome = match missing {
        Some(name) => StepOutcome::Skipped { why: format!("`{name}` did not succeed") },
        None => match (step.run)(machine) {
            Ok(Done::Well) => {
                StepOutcome::Ok { elapsed_ms: init_sys::clock::boot_ms().saturating_sub(begun_ms) }
            }
            Ok(Done::Skipped(why)) => StepOutcome::Skipped { why },
            Err(report) => StepOutcome::Failed { report },
        },
    };
    tell(machine, step, &outcome);
    machine.facts.milestone(step.name, init_sys::clock::boot_ms());
    machine.facts.steps.push(StepStatus {
        name: step.name.to_owned(),
        required: matches!(step.need, Required(_)),
        outcome,
    });
}

fn tell(machine: &mut Machine, step: &Step, outcome: &StepOutcome) {
    match (outcome, step.need) {
        (StepOutcome::Ok { elapsed_ms }, _) => machine.log.info(&format!("{}: {elapsed_ms} ms", step.name)),
        (StepOutcome::Skipped { why }, _) => machine.log.info(&format!("{}: left out, {why}", step.name)),
        (StepOutcome::Failed { report }, Required(reason)) => {
            machine.log.alarm(&format!("{} FAILED: {}", step.name, report.what));
            machine.log.alarm(&format!("  why: {}", report.why));
            machine.log.alarm(&format!("  fix: {}", report.fix));
            machine.log.alarm(&format!("  it is required: {reason}"));
        }
        (StepOutcome::Failed { report }, Optional(reason)) => {
            machine.log.warn(&format!("{} failed: {report} (going on: {reason})", step.name));
        }
    }
}

fn start_console_tty(machine: &mut Machine) -> Outcome {
    start(machine, Child::ConsoleTty)
}

fn start_netd(machine: &mut Machine) -> Outcome {
    start(machine, Child::Netd)
}

fn start_launcher(machine: &mut Machine) -> Outcome {
    start(machine, Child::Launcher)
}

fn start_agentd(machine: &mut Machine) -> Outcome {
    start(machine, Child::Agentd)
}

/// That it starts is the plan's business from now on, and so is that it is running: see `status`.
fn start(machine: &mut Machine, child: Child) -> Outcome {
    machine.event(Event::Start(child));
    Ok(Done::Well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_each_step_builds_on_earlier_ones() {
        for (index, step) in STEPS.iter().enumerate() {
            let earlier = &STEPS[..index];
            assert!(earlier.iter().all(|other| other.name != step.name), "{}", step.name);
            for name in step.after {
                assert!(earlier.iter().any(|other| other.name == *name), "{} builds on {name}", step.name);
            }
        }
    }

    #[test]
    fn what_a_required_step_builds_on_is_required() {
        for step in STEPS.iter().filter(|step| matches!(step.need, Required(_))) {
            for name in step.after {
                let base = STEPS.iter().find(|other| other.name == *name).unwrap();
                assert!(matches!(base.need, Required(_)), "{} builds on the optional {name}", step.name);
            }
        }
    }

    #[test]
    fn the_console_does_not_wait_for_the_disk() {
        let index = |name: &str| STEPS.iter().position(|step| step.name == name).unwrap();
        assert!(index("local console") < index("partition table"));
        assert!(index("watchdogs") < index("disk"));
    }
}
