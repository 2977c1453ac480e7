//! Agents that fall ill in one way each: what agentd sees, does about it and shows.

use crate::packages;
use agentd_domain::agent_api::SelfInfo;
use agentd_domain::api::{Agent, AgentState, LogLine};
use agentd_domain::health::{PainFrom, Severity, Throttle};
use agentd_domain::launcher::ExitCause;
use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests_qemu::{Appliance, BOOT, Ctl, Start};

/// Sixty seconds without progress, ten of grace, and the end of the run; slower under emulation.
const STUCK: Duration = Duration::from_secs(180);
/// Ten minutes of quarantine.
const QUARANTINE: Duration = Duration::from_secs(700);

#[test]
fn agents_fall_ill() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    let livelock = "memory_max = \"400M\"\nmemory_high = \"24M\"\n";
    let small = "memory_max = \"32M\"\nmemory_high = \"32M\"\n";
    for (way, limits, more) in [
        ("sit", small, ""),
        ("exit", small, ""),
        ("hang", small, "[messages]\naccept = true\n"),
        ("hurt", small, ""),
        ("reboot", small, "[restart]\npolicy = \"never\"\n"),
        ("threads", "memory_max = \"32M\"\nmemory_high = \"32M\"\npids = 16\n", ""),
        ("livelock", livelock, "[restart]\npolicy = \"never\"\n"),
    ] {
        let folder = packages::ill(&appliance.file("packages"), way, limits, more)?;
        appliance.ctl().run(&["agent", "install", folder.to_str().context("path")?])?.success()?;
    }
    for way in ["sit", "exit", "hang"] {
        appliance.ctl().run(&["agent", "start", way])?.success()?;
    }
    // Sixty seconds go by for it while the others are looked at.
    let message = appliance.ctl().spawn(&["chat", "hang", "are you there?", "--json"])?;
    a_forbidden_call_has_a_name(&mut appliance)?;
    a_livelock_is_ended_by_the_watchdog(&mut appliance)?;
    pain_is_shown(&mut appliance)?;
    threads_against_the_limit_are_throttled(&mut appliance)?;
    a_crash_loop_is_quarantined(&mut appliance)?;
    a_hang_with_a_message_in_hand_is_restarted(&mut appliance)?;
    idle_is_healthy(&mut appliance)?;
    message.kill();
    a_quarantine_ends_by_its_owner(&mut appliance)?;
    what_was_done_is_in_the_audit_log(&appliance)?;
    Ok(())
}

fn agent(ctl: &Ctl, name: &str) -> Result<Agent> {
    ctl.json(&["agent", "show", name])
}

fn start(appliance: &Appliance, name: &str) -> Result<()> {
    appliance.ctl().run(&["agent", "start", name])?.success().map(drop)
}

fn a_forbidden_call_has_a_name(appliance: &mut Appliance) -> Result<()> {
    start(appliance, "reboot").ok();
    let ended = appliance.until("seccomp ends it", BOOT, |ctl| Ok(agent(ctl, "reboot")?.last_exit))?;
    ensure!(ended.cause == ExitCause::Seccomp { syscall: Some("reboot".to_owned()) }, "{ended:?}");
    let shown = appliance.ctl().run(&["agent", "show", "reboot"])?.success()?;
    ensure!(shown.contains("seccomp: the forbidden system call reboot"), "{shown}");
    Ok(())
}

fn a_livelock_is_ended_by_the_watchdog(appliance: &mut Appliance) -> Result<()> {
    start(appliance, "livelock").ok();
    let ended = appliance.until("the watchdog ends it", BOOT, |ctl| Ok(agent(ctl, "livelock")?.last_exit))?;
    ensure!(ended.cause == ExitCause::Pressure, "{ended:?}");
    // It was far from its hard limit: without the watchdog the kernel would have held it back for ever.
    ensure!(ended.memory_peak_bytes < 200 << 20, "{ended:?}");
    let life_ms = ended.ended_boot_ms - ended.started_boot_ms;
    println!("RESULT: a livelock under memory.high is ended {life_ms} ms after its start");
    let shown = agent(&appliance.ctl(), "livelock")?;
    ensure!(shown.health.pains.iter().any(|pain| pain.kind == "pressure"), "{shown:?}");
    ensure!(shown.health.notes.iter().any(|note| note.text.contains("memory pressure")), "{shown:?}");
    Ok(())
}

fn pain_is_shown(appliance: &mut Appliance) -> Result<()> {
    start(appliance, "hurt")?;
    let shown = appliance.until("its pain is shown", BOOT, |ctl| {
        let shown = agent(ctl, "hurt")?;
        Ok(shown.health.pain.is_some().then_some(shown))
    })?;
    let pain = shown.health.pain.context("no pain")?;
    let seen = (pain.kind.as_str(), pain.severity, pain.from, pain.message.as_str());
    ensure!(
        seen == ("sensor.lost", Severity::High, PainFrom::Agent, "the <b>boiler</b> is silent"),
        "{pain:?}"
    );
    let status = appliance.ctl().run(&["status"])?.success()?;
    ensure!(status.contains("the agent hurt is not well"), "{status}");
    let line = appliance.until("it sees itself", BOOT, |ctl| {
        let log = ctl.run(&["agent", "logs", "hurt", "--json"])?.success()?;
        let lines: Vec<LogLine> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(lines.into_iter().find(|line| line.text.starts_with("self {")))
    })?;
    let own: SelfInfo = serde_json::from_str(line.text.trim_start_matches("self "))?;
    let health = own.health.context("it is not seen")?;
    ensure!(health.state.is_running() && health.limits.memory_max_bytes == 32 << 20, "{health:?}");
    ensure!(health.memory_bytes > 0 && health.pids >= 2, "{health:?}");
    appliance.ctl().run(&["agent", "stop", "hurt"])?.success()?;
    Ok(())
}

fn threads_against_the_limit_are_throttled(appliance: &mut Appliance) -> Result<()> {
    start(appliance, "threads")?;
    appliance.until("it is throttled", BOOT, |ctl| {
        let shown = agent(ctl, "threads")?;
        Ok((shown.state == AgentState::Throttled && shown.health.throttle != Throttle::None).then_some(()))
    })?;
    let calm = appliance.until("it has its limits back", BOOT, |ctl| {
        let shown = agent(ctl, "threads")?;
        Ok((shown.state.is_running() && shown.health.throttle == Throttle::None).then_some(shown))
    })?;
    ensure!(calm.restarts == 0 && calm.run.is_some(), "{calm:?}");
    ensure!(calm.health.notes.iter().any(|note| note.text.contains("all of its limits back")), "{calm:?}");
    appliance.ctl().run(&["agent", "stop", "threads"])?.success()?;
    Ok(())
}

/// The trial start comes after ten minutes, which only the long run waits for; the owner need not.
fn a_crash_loop_is_quarantined(appliance: &mut Appliance) -> Result<()> {
    let held = appliance.until("one that always exits is quarantined", BOOT, |ctl| {
        let shown = agent(ctl, "exit")?;
        Ok((shown.state == AgentState::Quarantined).then_some(shown))
    })?;
    ensure!(held.restarts == 5 && held.health.exits.len() == 5, "{held:?}");
    // Newest first: each pause is longer than the one before.
    let ends: Vec<_> =
        held.health.exits.iter().rev().map(|exit| (exit.started_boot_ms, exit.ended_boot_ms)).collect();
    let pauses: Vec<u64> = ends.windows(2).map(|two| two[1].0 - two[0].1).collect();
    ensure!(pauses.windows(2).all(|two| two[0] < two[1]), "back-off {pauses:?} ms");
    println!("RESULT: back-off of a crash loop {pauses:?} ms, then quarantine");
    Ok(())
}

/// After ten minutes it is tried once, in the long run; its owner may start it at any time.
fn a_quarantine_ends_by_its_owner(appliance: &mut Appliance) -> Result<()> {
    if std::env::var_os("AGENTD_LONG").is_some() {
        appliance.until("the trial start fails and it stays", QUARANTINE, |ctl| {
            let shown = agent(ctl, "exit")?;
            let tried = |text: &str| shown.health.notes.iter().any(|note| note.text.contains(text));
            let stays = tried("trial start failed") && shown.state == AgentState::Quarantined;
            Ok((tried("the quarantine's trial start") && stays).then_some(()))
        })?;
    }
    start(appliance, "exit").ok();
    let tried = agent(&appliance.ctl(), "exit")?;
    ensure!(tried.state != AgentState::Quarantined, "the owner's start ends it: {tried:?}");
    appliance.ctl().run(&["agent", "stop", "exit"])?.success()?;
    Ok(())
}

fn a_hang_with_a_message_in_hand_is_restarted(appliance: &mut Appliance) -> Result<()> {
    let again = appliance.until("it is killed and started again", STUCK, |ctl| {
        let shown = agent(ctl, "hang")?;
        let stuck = shown.last_exit.as_ref().is_some_and(|exit| exit.cause == ExitCause::Stuck);
        Ok((stuck && shown.state.is_running()).then_some(shown))
    })?;
    ensure!(again.restarts == 1, "{again:?}");
    ensure!(again.health.pains.iter().any(|pain| pain.kind == "missed_progress"), "{again:?}");
    // The message was not lost with the run that had it.
    appliance.until("its next run has the message", BOOT, |ctl| {
        let log = ctl.run(&["agent", "logs", "hang"])?.success()?;
        Ok((log.matches("hanging").count() == 2).then_some(()))
    })
}

/// Through all of the above.
fn idle_is_healthy(appliance: &mut Appliance) -> Result<()> {
    let sitting = appliance.until("it is idle", BOOT, |ctl| {
        let shown = agent(ctl, "sit")?;
        Ok((shown.state == AgentState::Idle).then_some(shown))
    })?;
    ensure!(
        sitting.restarts == 0 && sitting.last_exit.is_none() && sitting.health.pains.is_empty(),
        "{sitting:?}"
    );
    ensure!(sitting.health.reason.contains("which is well"), "{sitting:?}");
    let up_ms = sitting.run.context("no run")?.uptime_ms;
    ensure!(up_ms > 60_000, "{up_ms} ms");
    Ok(())
}

fn what_was_done_is_in_the_audit_log(appliance: &Appliance) -> Result<()> {
    let log = appliance.ctl().run(&["audit", "ls", "--limit", "1000", "--json"])?.success()?;
    for action in ["health.killed", "health.pain", "health.throttled", "health.quarantined", "run.end"] {
        ensure!(log.contains(&format!("\"action\":\"{action}\"")), "{action} is missing: {log}");
    }
    ensure!(!log.contains("boiler"), "what an agent wrote stands in the log: {log}");
    appliance.ctl().run(&["audit", "verify"])?.success()?;
    Ok(())
}
