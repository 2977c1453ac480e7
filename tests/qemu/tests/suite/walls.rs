//! A kernel that cannot raise a wall: the machine says so, and no agent starts.

use agentd_domain::api::{Agent, AgentState, ApplianceStatus};
use agentd_domain::initctl::Health;
use anyhow::{Result, ensure};
use tests_qemu::{Appliance, BOOT, Start};

#[test]
fn without_landlock_no_agent_starts() -> Result<()> {
    nothing_starts("lsm=yama,lockdown", "landlock")
}

#[test]
fn without_the_memory_controller_no_agent_starts() -> Result<()> {
    nothing_starts("cgroup_disable=memory", "memory")
}

fn nothing_starts(command_line: &str, word: &str) -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { command_line: command_line.to_owned(), ..Start::default() })?;
    appliance.claim()?;
    let status = appliance.until("health is red and says why", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let named = status
            .problems
            .iter()
            .any(|problem| format!("{} {}", problem.what, problem.why).to_lowercase().contains(word));
        Ok((status.health == Health::Red && named).then_some(status))
    })?;
    // The owner asks for it, and it is refused.
    let refused = appliance.ctl().run(&["agent", "start", "echo"])?;
    let listed = appliance.ctl().run(&["agent", "ls", "--json"])?;
    if listed.code == Some(0) {
        let agents: Vec<Agent> = serde_json::from_str(&listed.stdout)?;
        for agent in &agents {
            ensure!(agent.run.is_none() && agent.state != AgentState::Running, "{agent:?} ({refused:?})");
        }
    } else {
        // agentd itself could not be shut in: it keeps no agents at all, and says so.
        let report = listed.report()?;
        ensure!(report.what.contains("no agent"), "{report:?}");
    }
    // The status outlives the question: nothing was started in between and stopped again.
    ensure!(status.problems.iter().all(|problem| !problem.fix.is_empty()), "{:?}", status.problems);
    Ok(())
}
