//! Tokens in the booted image: an agent starts children that may do less, nobody widens, a stolen token is worth
//! nothing, and to revoke one ends all below it.

use crate::packages;
use agentd_domain::api::{Agent, AgentState, LogLine};
use agentd_domain::audit::Linked;
use agentd_domain::rights::Limit;
use agentd_domain::token::{Revocation, Shown, Verified};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use tests_qemu::{Appliance, BOOT, Ctl, Start};

/// Natively or under KVM a run is dead within so many milliseconds of the acknowledgement; under emulation it is
/// printed.
const DEAD_WITHIN_MS: i64 = 100;

#[test]
fn children_have_less_and_end_with_what_they_come_from() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    let packages = tempfile::tempdir()?;
    let folder = packages::family(packages.path())?;
    let ctl = appliance.ctl();
    ctl.run(&["agent", "install", &folder.to_string_lossy()])?.success()?;
    ctl.run(&["agent", "start", "family"])?.success()?;
    let child = the_child(&mut appliance)?;
    what_the_parent_was_answered(&mut appliance)?;
    what_the_child_was_answered(&mut appliance, &child)?;
    what_the_tokens_say(&appliance, &child)?;
    what_another_jail_gets_for_them(&mut appliance, packages.path())?;
    revoking_ends_both(&mut appliance, &child)?;
    a_new_token_starts_again_and_a_stop_ends_the_child(&mut appliance)?;
    a_token_that_is_over_ends_its_run(&mut appliance)
}

fn agents(ctl: &Ctl) -> Result<Vec<Agent>> {
    ctl.json(&["agent", "ls"])
}

fn family(ctl: &Ctl) -> Result<Agent> {
    agents(ctl)?.into_iter().find(|agent| agent.name.as_str() == "family").context("no family")
}

/// The one that stays: the first that its parent has started in this life.
fn the_child(appliance: &mut Appliance) -> Result<Agent> {
    appliance.until("a child runs", BOOT, |ctl| {
        let Some(line) = line(ctl, "family", "child")? else {
            bail!("its log: {}", ctl.run(&["agent", "logs", "family"])?.success()?)
        };
        let parent = family(ctl)?.agent_id;
        let children = agents(ctl)?.into_iter().filter(|agent| agent.parent == Some(parent));
        let child = children.into_iter().find(|child| line.contains(&child.agent_id.to_string()));
        match child {
            Some(child) if child.run.is_some() => Ok(Some(child)),
            other => bail!("{line}: {other:?}"),
        }
    })
}

/// What the agent printed last under this name.
fn line(ctl: &Ctl, agent: &str, name: &str) -> Result<Option<String>> {
    let log = ctl.run(&["agent", "logs", agent, "--json"])?.success()?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<LogLine>(line).ok());
    let said = lines.filter(|line| line.stream == "out").map(|line| line.text).collect::<Vec<_>>();
    Ok(said.iter().rev().find_map(|text| text.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned))
}

fn what_the_parent_was_answered(appliance: &mut Appliance) -> Result<()> {
    appliance.until("the parent has asked for all", BOOT, |ctl| line(ctl, "family", "children"))?;
    let ctl = appliance.ctl();
    let said = |name: &str| line(&ctl, "family", name)?.with_context(|| format!("no line `{name}`"));
    let id = |text: &str| text.split_once("\"agent_id\":\"").map(|(_, rest)| rest[..36].to_owned());
    let (child, again) = (said("child")?, said("again")?);
    ensure!(child.starts_with("200 ") && id(&child).is_some(), "{child}");
    ensure!(id(&child) == id(&again), "the same key is the same child: {child} {again}");
    for (name, status, words) in [
        ("other", "409", "conflict"),
        ("right", "403", "models"),
        ("large", "403", "memory.max"),
        ("shared", "403", "30 more is asked"),
        ("brief", "200", "agent_id"),
        ("third", "403", "2 children"),
    ] {
        let line = said(name)?;
        ensure!(line.starts_with(status) && line.contains(words), "{name}: {line}");
    }
    Ok(())
}

fn what_the_child_was_answered(appliance: &mut Appliance, child: &Agent) -> Result<()> {
    let name = child.name.as_str();
    let start = appliance.until("the child has asked", BOOT, |ctl| line(ctl, name, "start"))?;
    ensure!(start.starts_with("403"), "a child without the right starts none: {start}");
    let remember = appliance.until("the child has asked", BOOT, |ctl| line(ctl, name, "remember"))?;
    ensure!(remember.starts_with("403"), "what was taken away is denied: {remember}");
    let itself = line(&appliance.ctl(), name, "self")?.context("no line")?;
    ensure!(
        itself.contains(&format!("\"name\":\"{name}\"")) && itself.contains("[\"messages\"]"),
        "{itself}"
    );
    Ok(())
}

fn what_the_tokens_say(appliance: &Appliance, child: &Agent) -> Result<()> {
    let ctl = appliance.ctl();
    let parent: Shown = ctl.json(&["token", "inspect", "--agent", "family"])?;
    let own: Shown = ctl.json(&["token", "inspect", "--agent", &child.agent_id.to_string()])?;
    ensure!(own.says.holder == child.agent_id && own.says.later.len() == 1, "{:?}", own.says);
    ensure!(own.says.rights.beyond(&parent.says.rights).is_empty(), "{:?}", own.says.rights);
    ensure!(own.says.rights.limit(Limit::MemoryMax) == 16 << 20 && own.says.rights.limit(Limit::Pids) == 4);
    // Offline, as anybody can who has the text and the key.
    let key = ctl.run(&["token", "key"])?.success()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = appliance.file(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (parents, childs) = (file("parent.token", &parent.token)?, file("child.token", &own.token)?);
    let less: Shown =
        ctl.json(&["token", "attenuate", &childs, "--api", "models,messages", "--limit", "pids=99"])?;
    ensure!(less.says.rights == own.says.rights, "nobody widens: {:?}", less.says.rights);
    let less = file("less.token", &less.token)?;
    let here: Verified = ctl.json(&["token", "verify", &less, "--key", key.trim()])?;
    let there: Verified = ctl.json(&["token", "verify", &less])?;
    ensure!(here == there && here.holder == child.agent_id);
    // Stolen, either way round.
    let child_id = child.agent_id.to_string();
    for (token, agent) in [(&parents, child_id.as_str()), (&childs, "family"), (&parents, "echo")] {
        let report = ctl.refused(&["token", "verify", token, "--agent", agent])?;
        ensure!(report.code == "token_stolen", "{report}");
    }
    Ok(())
}

/// The parent's token, alive and with all its rights, in a neighbour's hands.
fn what_another_jail_gets_for_them(appliance: &mut Appliance, packages: &Path) -> Result<()> {
    let ctl = appliance.ctl();
    let parent: Shown = ctl.json(&["token", "inspect", "--agent", "family"])?;
    let folder = packages::thief(packages, &parent.token)?;
    let thief: Agent = ctl.json(&["agent", "install", &folder.to_string_lossy()])?;
    ctl.run(&["agent", "start", "thief"])?.success()?;
    let own = appliance.until("the thief has asked", BOOT, |ctl| line(ctl, "thief", "own"))?;
    ensure!(own.starts_with("200 "), "its own token is good for its own rights: {own}");
    let log = ctl.run(&["agent", "logs", "thief", "--json"])?.success()?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<LogLine>(line).ok());
    let stolen: Vec<String> =
        lines.map(|line| line.text).filter(|text| text.starts_with("stolen ")).collect();
    let refused = |text: &String| text.starts_with("stolen 403 ") && text.contains("token_stolen");
    ensure!(stolen.len() == 4 && stolen.iter().all(refused), "{stolen:?}");
    let log = ctl.run(&["audit", "ls", "--json", "--limit", "200"])?.success()?;
    let records = log.lines().filter_map(|line| serde_json::from_str::<Linked>(line).ok());
    let recorded = records
        .filter(|linked| {
            linked.record.action == "token.use" && linked.record.agent_id == Some(thief.agent_id)
        })
        .filter(|linked| linked.record.detail.starts_with("token_stolen"))
        .count();
    ensure!(recorded > 0, "the theft is not in the log: {log}");
    ctl.run(&["agent", "rm", "thief"])?.success().map(drop)
}

fn revoking_ends_both(appliance: &mut Appliance, child: &Agent) -> Result<()> {
    let ctl = appliance.ctl();
    let parent = family(&ctl)?;
    let done: Revocation =
        ctl.json(&["token", "revoke", "--agent", "family", "--why", "the test says so"])?;
    for agent in [parent.agent_id, child.agent_id] {
        ensure!(done.ended.contains(&agent), "{agent} was not ended: {done:?}");
    }
    let ended = appliance.until("the parent is refused and the child is gone", BOOT, |ctl| {
        let (all, parent) = (agents(ctl)?, family(ctl)?);
        let gone = all.iter().all(|agent| agent.parent != Some(parent.agent_id));
        let refused = parent.problem.as_ref().is_some_and(|problem| problem.code == "token_revoked");
        Ok((gone && refused && parent.run.is_none()).then_some(parent))
    })?;
    let log = ctl.run(&["audit", "ls", "--json", "--limit", "200"])?.success()?;
    let records: Vec<Linked> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of =
        |action: &str| records.iter().map(|linked| &linked.record).find(|record| record.action == action);
    let acknowledged = of("token.revoke").context("the order is not in the log")?.boot_ms;
    ensure!(of("token.end").is_some() && of("token.hand_on").is_some(), "{records:?}");
    let died = ended.last_exit.context("no end")?.ended_boot_ms;
    let after_ms = i64::try_from(died)? - i64::try_from(acknowledged)?;
    println!(
        "RESULT: the run was dead {after_ms} ms after the revocation was acknowledged (goal {DEAD_WITHIN_MS} ms)"
    );
    if tests_qemu::setup().accelerator == image::qemu::Accelerator::Kvm {
        ensure!(after_ms <= DEAD_WITHIN_MS, "{after_ms} ms");
    }
    let listed = ctl.run(&["token", "revoked"])?.success()?;
    ensure!(listed.contains("owner") && listed.contains("the test says so"), "{listed}");
    let start: Agent = ctl.json(&["agent", "start", "family"])?;
    ensure!(start.run.is_none() && start.state == AgentState::Refused, "it must not run again: {start:?}");
    Ok(())
}

fn a_new_token_starts_again_and_a_stop_ends_the_child(appliance: &mut Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    let minted: Shown = ctl.json(&["token", "mint", "family"])?;
    ensure!(minted.says.later.is_empty() && minted.says.expires_unix_s.is_none());
    the_child(appliance)?;
    ctl.run(&["agent", "stop", "family"])?.success()?;
    appliance.until("the children end with their parent", BOOT, |ctl| {
        Ok(agents(ctl)?.iter().all(|agent| agent.parent.is_none()).then_some(()))
    })
}

fn a_token_that_is_over_ends_its_run(appliance: &mut Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    ctl.run(&["token", "mint", "family", "--expires-in", "45s"])?.success()?;
    ctl.run(&["agent", "start", "family"])?.success()?;
    the_child(appliance)?;
    appliance.until("the run ends with its token", BOOT, |ctl| {
        let parent = family(ctl)?;
        let expired = parent.problem.as_ref().is_some_and(|problem| problem.code == "token_expired");
        let alone = agents(ctl)?.iter().all(|agent| agent.parent.is_none());
        Ok((expired && alone && parent.run.is_none()).then_some(()))
    })
}
