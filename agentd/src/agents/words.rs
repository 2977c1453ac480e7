//! What do people read about an agent that does not run?
//!
//! Pure: rows and exit records in, words out.

use crate::store::AgentRow;
use agentd_domain::agent_api::SelfHealth;
use agentd_domain::api::AgentHealth;
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::fault::{Fault, Report};
use agentd_domain::health::{About, Health, Notice, PainFrom, QUARANTINE_MS, Severity};
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{ExitCause, ExitRecord, Forbidden};
use agentd_domain::manifest::Limits;

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
        ExitCause::Seccomp { syscall: Some(call) } => format!("the system call {call}, which is forbidden"),
        ExitCause::Seccomp { syscall: None } => "a system call that is forbidden".to_owned(),
        ExitCause::Pressure => {
            format!(
                "killed under memory pressure, with {} MiB at its peak",
                exit.memory_peak_bytes / (1024 * 1024)
            )
        }
        ExitCause::Stuck => "killed because it was stuck".to_owned(),
        ExitCause::WallFailed { why } => format!("a wall could not be raised: {why}"),
        ExitCause::Stopped => "stopped".to_owned(),
    }
}

/// What the audit log holds of an end by seccomp: a wall held against the agent. Other ends are the ledger's.
pub(super) fn killed(exit: &ExitRecord) -> Option<Entry> {
    matches!(exit.cause, ExitCause::Seccomp { .. }).then(|| {
        let entry = Entry::new(Actor::Appliance, "run.end", Verdict::Killed);
        entry.of_run(exit.agent_id, exit.run_id).detail(&format!("SIGSYS: {}", told(exit)))
    })
}

/// What the audit log holds of a process that seccomp killed while its run lived on. The agent can cause it at will:
/// the log counts repetitions.
pub(super) fn forbidden(agent: AgentId, run: RunId, seen: &Forbidden) -> Entry {
    let detail = format!("SIGSYS: the system call {}, which is forbidden", seen.syscall);
    Entry::new(Actor::Agent, "run.process", Verdict::Killed).of_run(agent, run).detail(&detail)
}

/// What the audit log holds of what was done about an agent. What an agent wrote itself is not in it.
pub(super) fn noted(agent: AgentId, run: Option<RunId>, notice: &Notice) -> Entry {
    let (actor, verdict) = match notice.about {
        // Whatever an agent can cause at will is counted when it repeats (`audit/plan.rs`).
        About::Pain | About::Throttled | About::Restored | About::Stuck => (Actor::Agent, Verdict::Allowed),
        About::Killed => (Actor::Appliance, Verdict::Killed),
        About::Quarantined | About::Probe | About::Recovered => (Actor::Appliance, Verdict::Allowed),
    };
    let entry = Entry::new(actor, &format!("health.{}", notice.about.name()), verdict).detail(&notice.brief);
    match run {
        Some(run) => entry.of_run(agent, run),
        None => entry.of_agent(agent),
    }
}

/// What hurts an agent so that its owner should know.
pub(super) fn hurting(row: &AgentRow, health: &Health, now_unix_ms: i64) -> Option<Report> {
    let pain = health.pains().worst(now_unix_ms).filter(|pain| pain.severity >= Severity::High)?;
    let name = &row.name;
    health.wanted().then(|| {
        let says = match pain.from {
            PainFrom::Agent => "it says",
            PainFrom::Appliance => "agentd saw",
        };
        Report::environment(
            "agent_hurts",
            format!("the agent {name} is not well"),
            format!("{says}: {} ({}, {})", pain.message, pain.kind, pain.severity),
            format!(
                "`agentctl agent show {name}` shows its health; `agentctl agent logs {name}` what it wrote"
            ),
        )
    })
}

pub(super) fn shown_health(
    health: Option<&Health>,
    exits: &[ExitRecord],
    now_ms: u64,
    now_unix_ms: i64,
) -> AgentHealth {
    let Some(health) = health else { return AgentHealth { exits: exits.to_vec(), ..AgentHealth::default() } };
    let runs = health.state().is_running();
    AgentHealth {
        reason: health.reason(now_ms),
        pressure: health.vitals().pressure().filter(|_| runs),
        throttle: health.vitals().throttle(),
        pain: health.pains().worst(now_unix_ms).cloned(),
        pains: health.pains().history().pains.clone(),
        notes: health.pains().history().notes.clone(),
        exits: exits.to_vec(),
    }
}

/// The same for the agent itself.
pub(super) fn self_health(health: &Health, limits: Limits, now_ms: u64) -> SelfHealth {
    let last = health.vitals().last();
    SelfHealth {
        state: health.state(),
        reason: health.reason(now_ms),
        restarts: health.restarts(),
        limits,
        throttle: health.vitals().throttle(),
        pressure: health.vitals().pressure(),
        memory_bytes: last.map_or(0, |reading| reading.memory_bytes),
        pids: last.map_or(0, |reading| reading.pids),
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
            QUARANTINE_MS / 60_000,
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
            forbidden: None,
        };
        let ptrace = ExitCause::Seccomp { syscall: Some("ptrace".to_owned()) };
        let entry = killed(&exit(ptrace)).expect("a kill");
        assert_eq!(
            (entry.verdict, entry.agent_id, entry.run_id),
            (Verdict::Killed, Some(agent_id), Some(run_id))
        );
        assert!(entry.detail.contains("SIGSYS") && entry.detail.contains("ptrace"), "{}", entry.detail);
        for cause in [ExitCause::Stopped, ExitCause::OutOfMemory, ExitCause::Signalled { signal: 31 }] {
            assert_eq!(killed(&exit(cause)), None);
        }
    }
}
