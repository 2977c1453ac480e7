//! What do people read about an agent that does not run?
//!
//! Pure: rows and exit records in, words out.

use super::plan;
use crate::store::AgentRow;
use agentd_domain::fault::{Fault, Report};
use agentd_domain::ids::AgentId;
use agentd_domain::launcher::{ExitCause, ExitRecord};

/// On the board.
pub(super) fn place_of(agent: AgentId) -> String {
    format!("agent {agent}")
}

/// Whether a refusal says that this machine cannot keep its agents in, rather than that this agent is ill made.
pub(super) fn is_about_walls(report: &Report) -> bool {
    report.fault != Fault::Caller
}

/// How a run ended, for people.
pub fn told(exit: &ExitRecord) -> String {
    match &exit.cause {
        ExitCause::Exited { code } => format!("exit code {code}"),
        ExitCause::Signalled { signal } => format!("signal {signal}"),
        ExitCause::OutOfMemory => {
            format!("over its memory limit, with {} MiB at its peak", exit.memory_peak_bytes / (1024 * 1024))
        }
        ExitCause::Seccomp => "a system call that is forbidden".to_owned(),
        ExitCause::WallFailed { why } => format!("a wall could not be raised: {why}"),
        ExitCause::Stopped => "stopped".to_owned(),
    }
}

pub(super) fn unknown_agent(what: &str) -> Report {
    Report::caller("not_found", what, "there is no such agent", "`agentctl agent ls` shows the agents")
}

pub(super) fn wall_failed(row: &AgentRow, why: &str) -> Report {
    let what = format!("the agent {} was not started", row.name);
    // The launcher names the step that failed; the last one is the agent's own program.
    if why.starts_with("exec: ") {
        let fix =
            "check `agent.exec`: the program must be in the package, executable, and made for this machine";
        return Report::caller("exec_failed", what, why, fix);
    }
    let fix = "start the appliance with its own kernel and command line; no agent runs without all its walls";
    Report::environment("wall_failed", what, why, fix)
}

pub(super) fn quarantined(row: &AgentRow, last_exit: Option<&ExitRecord>) -> Report {
    Report::environment(
        "quarantined",
        format!("the agent {} is in quarantine", row.name),
        format!(
            "it keeps ending by itself, last with: {}",
            last_exit.map_or_else(|| "nothing known".to_owned(), told)
        ),
        format!(
            "`agentctl agent logs {name}` shows why; `agentctl agent start {name}` tries at once, a timer in {} minutes",
            plan::QUARANTINE_MS / 60_000,
            name = row.name
        ),
    )
}
