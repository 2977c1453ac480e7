//! What do people read about an agent that does not run?
//!
//! Pure: rows and exit records in, words out.

use super::plan;
use crate::store::AgentRow;
use agentd_domain::audit::{Actor, Entry, Verdict};
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

/// What the audit log holds of an end by seccomp: a wall held against the agent. Other ends are the ledger's.
pub(super) fn killed(exit: &ExitRecord) -> Option<Entry> {
    (exit.cause == ExitCause::Seccomp).then(|| {
        let entry = Entry::new(Actor::Appliance, "run.end", Verdict::Killed);
        entry.of_run(exit.agent_id, exit.run_id).detail(&format!("SIGSYS: {}", told(exit)))
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::ids::RunId;
    use uuid::Uuid;

    #[test]
    fn the_log_holds_what_seccomp_ended_and_no_other_end() {
        let (agent_id, run_id) = (AgentId(Uuid::from_u128(1)), RunId(Uuid::from_u128(2)));
        let exit = |cause| ExitRecord {
            run_id,
            agent_id,
            cause,
            started_boot_ms: 1,
            ended_boot_ms: 2,
            memory_peak_bytes: 3,
        };
        let entry = killed(&exit(ExitCause::Seccomp)).expect("a kill");
        assert_eq!(
            (entry.verdict, entry.agent_id, entry.run_id),
            (Verdict::Killed, Some(agent_id), Some(run_id))
        );
        assert!(entry.detail.contains("SIGSYS"), "{}", entry.detail);
        for cause in [ExitCause::Stopped, ExitCause::OutOfMemory, ExitCause::Signalled { signal: 31 }] {
            assert_eq!(killed(&exit(cause)), None);
        }
    }
}
