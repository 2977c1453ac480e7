//! A kernel that cannot raise a wall: the machine says so, and no agent starts.

use agentd_domain::api::{Agent, ApplianceStatus};
use agentd_domain::initctl::Health;
use anyhow::{Result, ensure};
use tests_qemu::{Appliance, BOOT, Start};

#[test]
fn without_landlock_no_agent_starts() -> Result<()> {
    nothing_starts("landlock", &with_command_line("lsm=yama,lockdown"))
}

#[test]
fn without_the_memory_controller_no_agent_starts() -> Result<()> {
    nothing_starts("memory", &with_command_line("cgroup_disable=memory"))
}

/// Its kernel takes ten minutes to build, so `scripts/test long no-seccomp` does it and says here where it is.
#[test]
fn without_seccomp_filters_no_agent_starts() -> Result<()> {
    let Some(kernel) = std::env::var_os("AGENTD_KERNEL_WITHOUT_SECCOMP") else {
        println!("SKIP: a kernel without seccomp filters is built in the long run only");
        return Ok(());
    };
    nothing_starts("seccomp", &Start { kernel: Some(kernel.into()), ..Start::default() })?;
    println!("RESULT: without seccomp filters no agent starts, and health is red and says so");
    Ok(())
}

fn with_command_line(command_line: &str) -> Start {
    Start { command_line: command_line.to_owned(), ..Start::default() }
}

fn nothing_starts(word: &str, start: &Start) -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(start)?;
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
            ensure!(agent.run.is_none() && !agent.state.is_running(), "{agent:?} ({refused:?})");
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
