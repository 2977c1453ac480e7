//! From a factory disk to an agent that remembers, through a power cut: what the README promises first.

use crate::packages;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{Agent, AgentState, ApplianceStatus, EngineState, LogLine, Model};
use agentd_domain::initctl::Health;
use agentd_domain::launcher::ExitCause;
use agentd_domain::plan::SandboxPlan;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::Value;
use std::time::{Duration, Instant};
use tests_qemu::{Appliance, BOOT, Capture, Ctl, PASSWORD, Start, Traffic, setup};

const FACTS: &str = include_str!("../../../fixtures/recall/facts.toml");
/// The promise: of thirty questions by meaning, the right fact first for this many.
const RIGHT_LEAST: usize = 24;
const OF: usize = 30;

#[derive(Deserialize)]
struct Facts {
    pair: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    fact: String,
    question: String,
}

#[test]
fn an_owners_first_day() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    everything_is_there(&mut appliance)?;
    agentd_is_killed_and_the_rest_goes_on(&mut appliance)?;
    bad_input_is_refused(&mut appliance)?;
    bad_agents_are_held(&mut appliance)?;
    agents_are_served(&mut appliance)?;
    the_log_of_decisions_is_whole(&appliance)?;
    let serial = appliance.power_off()?;
    ensure!(serial.contains("reached power off"), "no orderly end: {serial}");
    Ok(())
}

/// All thirty facts and ten minutes of silence when `AGENTD_LONG` is set (`scripts/test long remembers`); otherwise a
/// few and one minute, because an answer under emulation takes seconds.
#[test]
fn from_the_factory_to_an_agent_that_remembers() -> Result<()> {
    let long = std::env::var_os("AGENTD_LONG").is_some();
    let (facts, idle) = if long { (usize::MAX, 600) } else { (6, 60) };
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { capture: true, ..Start::default() })?;
    appliance.claim()?;
    everything_is_there(&mut appliance)?;
    silence(&mut appliance, Duration::from_secs(idle))?;
    told_facts_survive_the_plug(&mut appliance, facts)
}

fn everything_is_there(appliance: &mut Appliance) -> Result<()> {
    let echo = appliance.until("echo runs", BOOT, |ctl| running(ctl, "echo"))?;
    ensure!(echo.bundled && echo.limits.memory_max_bytes == 64 << 20, "{echo:?}");
    let status = appliance.until("the engine is ready and health green", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let ready = matches!(status.engine, EngineState::Ready { loading: false, .. });
        Ok((ready && status.health == Health::Green).then_some(status))
    })?;
    ensure!(status.slot == "direct", "slot is {}", status.slot);
    ensure!(status.memory_total_bytes > 512 << 20 && status.data_total_bytes > 4 << 30, "{status:?}");
    ensure!(status.devices.iter().any(|device| device.kind == "cpu"), "{:?}", status.devices);
    appliance.until("a default model of each kind is loaded", BOOT, |ctl| {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok((models.iter().filter(|model| model.default && model.loaded).count() == 2).then_some(()))
    })?;
    let logs = appliance.ctl().run(&["agent", "logs", "echo"])?.success()?;
    ensure!(!logs.trim().is_empty(), "echo's log is empty");
    Ok(())
}

fn running(ctl: &Ctl, name: &str) -> Result<Option<Agent>> {
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    Ok(agents.into_iter().find(|agent| agent.name.as_str() == name && agent.state.is_running()))
}

/// The local console kills agentd (signal 9) as its owner would when the web console hangs. The new agentd adopts the
/// agent, its process unchanged, and the engine with its models, not started again.
fn agentd_is_killed_and_the_rest_goes_on(appliance: &mut Appliance) -> Result<()> {
    let lives = |ctl: &Ctl| -> Result<Option<(Agent, u64)>> {
        let Some(echo) = running(ctl, "echo")? else { return Ok(None) };
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let EngineState::Ready { loading: false, uptime_ms, ref models, .. } = status.engine else {
            return Ok(None);
        };
        let whole = models.len() == 2 && status.health == Health::Green;
        Ok(whole.then_some((echo, uptime_ms)))
    };
    let (before, engine_ms) = appliance.until("echo and the engine live", BOOT, lives)?;
    appliance.type_and_hear("a", "restart agentd now?")?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    let asked = Instant::now();
    appliance.type_and_hear("y", "done")?;
    // Sessions end with agentd, so this one signs in to the new one.
    let fingerprint = appliance.said("fingerprint: ")?;
    appliance.until("the new agentd lets the owner in", BOOT, |ctl| {
        if ctl.run(&["status"])?.code == Some(0) {
            // Still the old one's last moment.
            return Ok(None);
        }
        let answer = ctl
            .input(&["login", "--fingerprint", &fingerprint, "--password-stdin"], &format!("{PASSWORD}\n"))?;
        answer.success().map(Some)
    })?;
    let (after, engine_later_ms) = appliance.until("both live on", BOOT, lives)?;
    let (before, after) = (before.run.context("no run")?, after.run.context("no run")?);
    ensure!((before.run_id, before.pid) == (after.run_id, after.pid), "{before:?} became {after:?}");
    // By the guest's clock, which agentd told just before the key was pressed.
    let log = appliance.ctl().run(&["agent", "logs", "echo", "--json"])?.success()?;
    let lines: Vec<LogLine> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mark = format!("run {} is served", after.run_id);
    let served = lines.iter().rfind(|line| line.text.starts_with(&mark)).context("nobody served it")?;
    let within_ms = served.unix_ms - status.now_unix_ms;
    ensure!((0..asked.elapsed().as_millis().try_into()?).contains(&within_ms), "{status:?} and {served:?}");
    println!(
        "RESULT: from the key that kills agentd to the adopted run {within_ms} ms ({:?})",
        setup().accelerator
    );
    ensure!(
        engine_later_ms > engine_ms,
        "the engine was started again: {engine_ms} and {engine_later_ms} ms"
    );
    Ok(())
}

fn bad_input_is_refused(appliance: &mut Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    let folder = packages::misbehaving(&appliance.file("packages"), "exit")?;
    let manifest = folder.join("agent.toml");
    let good = std::fs::read_to_string(&manifest)?;
    let path = manifest.to_str().context("path")?;

    let plan: SandboxPlan = ctl.json(&["plan", path])?;
    ensure!(plan.cgroup.memory_max_bytes == 32 << 20, "{plan:?}");
    let remote: SandboxPlan = ctl.json(&["plan", "--remote", path])?;
    ensure!(remote.seccomp == plan.seccomp && remote.mounts.len() == plan.mounts.len());

    std::fs::write(&manifest, format!("{good}swap = true\n"))?;
    let unknown = ctl.refused(&["plan", "--remote", path])?;
    ensure!(unknown.why.contains("swap") || unknown.what.contains("swap"), "{unknown:?}");
    std::fs::write(&manifest, good)?;

    let tiny = tests_qemu::builtin_model(agentd_domain::paths::BUILTIN_TINY)?;
    let whole = std::fs::read(&tiny)?;
    let half = appliance.file("half.gguf");
    std::fs::write(&half, whole.get(..whole.len() / 2).context("half")?)?;
    let cut = ctl.refused(&["model", "add", half.to_str().context("path")?])?;
    ensure!(cut.code.contains("truncated"), "{cut:?}");
    let models: Vec<Model> = ctl.json(&["model", "ls"])?;
    ensure!(models.iter().all(|model| !model.file.contains("half")), "{models:?}");

    let large = tests_qemu::post_zeros(appliance.ctl().host(), "/api/v1/login", 100 << 20)?;
    ensure!(large.starts_with("HTTP/1.1 413"), "100 MB was answered with {large}");
    let status: ApplianceStatus = ctl.json(&["status"])?;
    ensure!(status.health == Health::Green, "{status:?}");
    Ok(())
}

fn bad_agents_are_held(appliance: &mut Appliance) -> Result<()> {
    let packages = appliance.file("packages");
    for way in ["exit", "eat-memory"] {
        let folder = packages::misbehaving(&packages, way)?;
        let installed: Agent =
            appliance.ctl().json(&["agent", "install", folder.to_str().context("path")?])?;
        ensure!(installed.name.as_str() == way);
        appliance.ctl().run(&["agent", "start", way])?.success()?;
    }
    let eater = appliance.until("the kernel stops the eater", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let eater = agents.into_iter().find(|agent| agent.name.as_str() == "eat-memory");
        Ok(eater.and_then(|agent| agent.last_exit))
    })?;
    ensure!(eater.cause == ExitCause::OutOfMemory, "{eater:?}");
    appliance.until("one that always exits is quarantined", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let held = |agent: &Agent| agent.name.as_str() == "exit" && agent.state == AgentState::Quarantined;
        Ok(agents.iter().any(held).then_some(()))
    })?;
    ensure!(running(&appliance.ctl(), "echo")?.is_some(), "echo suffered for others");
    for way in ["exit", "eat-memory"] {
        appliance.ctl().run(&["agent", "stop", way])?.success()?;
        appliance.ctl().run(&["agent", "rm", way])?.success()?;
    }
    let agents: Vec<Agent> = appliance.ctl().json(&["agent", "ls"])?;
    ensure!(agents.len() == 1, "{agents:?}");
    Ok(())
}

/// Through all of the above, agentd's death included.
fn the_log_of_decisions_is_whole(appliance: &Appliance) -> Result<()> {
    let summary: Value = appliance.ctl().json(&["audit", "verify"])?;
    ensure!(summary["first_seq"] == 1 && summary["signed_seq"] == summary["last_seq"], "{summary}");
    let log = appliance.ctl().run(&["audit", "ls", "--limit", "200", "--json"])?.success()?;
    for action in ["audit.begin", "claim", "sign_in", "agent.install", "agent.remove", "api.use"] {
        ensure!(log.contains(&format!("\"action\":\"{action}\"")), "{action} is missing: {log}");
    }
    Ok(())
}

/// What an agent gets of the OpenAI-compatible API and of its memory, in the jail that it runs in.
fn agents_are_served(appliance: &mut Appliance) -> Result<()> {
    let folder = packages::visitor(&appliance.file("packages"))?;
    appliance.ctl().run(&["agent", "install", folder.to_str().context("path")?])?.success()?;
    appliance.ctl().run(&["agent", "start", "visitor"])?.success()?;
    let lines: Vec<LogLine> = appliance.until("the visitor has asked everything", BOOT, |ctl| {
        let log = ctl.run(&["agent", "logs", "visitor", "--json"])?.success()?;
        let lines: Vec<LogLine> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(lines.iter().any(|line| line.text.contains("the visit is over")).then_some(lines))
    })?;
    let answer = |name: &str, status: &str| -> Result<String> {
        let line = lines.iter().find(|line| line.text.starts_with(&format!("{name} ")));
        let text = &line.with_context(|| format!("no answer to {name}: {lines:?}"))?.text;
        let body = text.strip_prefix(&format!("{name} {status} ")).with_context(|| text.clone())?;
        Ok(body.to_owned())
    };
    let json = |name: &str| -> Result<Value> {
        let body = answer(name, "200")?;
        serde_json::from_str(&body).with_context(|| body)
    };
    ensure!(json("self")?["name"] == "visitor");
    let models = json("models")?;
    ensure!(models["data"].as_array().is_some_and(|models| models.len() >= 2), "{models}");
    let embeddings = json("embeddings")?;
    let coded = embeddings["data"][0]["embedding"].as_str().context("no vector")?;
    let bytes = BASE64_STANDARD.decode(coded)?;
    let numbers = bytes.chunks_exact(4).filter_map(|four| four.try_into().ok()).map(f32::from_le_bytes);
    let length: f32 = numbers.map(|x| x * x).sum();
    ensure!(bytes.len() == 384 * 4 && (length - 1.0).abs() < 1e-3, "{} bytes, {length}", bytes.len());

    let whole = json("chat")?["choices"][0]["message"]["content"].as_str().context("no words")?.to_owned();
    let stream = answer("stream", "200")?;
    let events: Vec<&str> = stream.split("\\n\\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    ensure!(events.last() == Some(&"[DONE]"), "{stream}");
    let piece = |event: &&str| -> Option<String> {
        let event: Value = serde_json::from_str(event).ok()?;
        Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())
    };
    let streamed: String = events.iter().filter_map(piece).collect();
    ensure!(!whole.is_empty() && streamed == whole, "streamed {streamed:?}, whole {whole:?}");

    ensure!(!json("remember")?["id"].is_null());
    let recalled = json("recall")?;
    ensure!(recalled["hits"][0]["text"].as_str().is_some_and(|text| text.contains("boiler")), "{recalled}");
    ensure!(recalled["words_only"] == false, "{recalled}");
    ensure!(answer("nobody", "404")?.contains("nobody"));
    ensure!(answer("forbidden", "403")?.contains("memory.remember.knowledge"));
    tools_run_in_groups_of_their_own(&json)
}

fn tools_run_in_groups_of_their_own(answer: &dyn Fn(&str) -> Result<Value>) -> Result<()> {
    let tool = answer("tool")?;
    ensure!(tool["cause"]["ended"] == serde_json::json!({ "kind": "exited", "code": 3 }), "{tool}");
    ensure!(tool["stdout"] == "read true: seven plums\n" && tool["truncated"] == false, "{tool}");
    // It was killed alone: its agent has gone on asking.
    let greedy = answer("greedy")?;
    ensure!(greedy["cause"]["ended"]["kind"] == "out_of_memory", "{greedy}");
    ensure!(greedy["memory_peak_bytes"].as_u64().is_some_and(|peak| peak <= 16 << 20), "{greedy}");
    let alone = answer("alone")?;
    ensure!(alone["stdout"].as_str().is_some_and(|said| said.contains("PermissionDenied")), "{alone}");
    Ok(())
}

/// Whatever the machine sent since it was switched on, with a chat and idleness in it.
fn silence(appliance: &mut Appliance, idle: Duration) -> Result<()> {
    let end =
        Capture::read(&appliance.capture_file())?.frames.last().map_or(Duration::ZERO, |last| last.0) + idle;
    chat(&appliance.ctl(), "Good morning, how are you today?")?;
    appliance.until("idleness", idle + Duration::from_secs(120), |ctl| {
        // Asking is the tester's own connection; it makes frames, so the capture's clock goes on.
        ctl.run(&["status"])?.success()?;
        let capture = Capture::read(&appliance_capture(ctl)?)?;
        Ok(capture.frames.last().is_some_and(|last| last.0 >= end).then_some(()))
    })?;
    let capture = Capture::read(&appliance.capture_file())?;
    let mut unexpected = Vec::new();
    for (when, traffic) in &capture.frames {
        match traffic {
            Traffic::Other(what) => unexpected.push(format!("{when:?} {what}")),
            Traffic::Dns(name) if !name.contains("ntp") => unexpected.push(format!("{when:?} DNS {name}")),
            _ => {}
        }
    }
    ensure!(unexpected.is_empty(), "the machine was not silent: {unexpected:#?}");
    let named = |wanted: &Traffic| capture.frames.iter().any(|(_, traffic)| traffic == wanted);
    ensure!(named(&Traffic::Dhcp) && named(&Traffic::Console), "the capture is not of this machine");
    println!("RESULT: silent for {} s and a chat, {} frames", idle.as_secs(), capture.frames.len());
    Ok(())
}

fn appliance_capture(ctl: &Ctl) -> Result<std::path::PathBuf> {
    Ok(ctl.home().join("uplink-1.pcap"))
}

fn told_facts_survive_the_plug(appliance: &mut Appliance, most: usize) -> Result<()> {
    let facts: Facts = toml::from_str(FACTS)?;
    let facts = facts.pair.get(..most).unwrap_or(&facts.pair);
    let (last, first) = facts.split_last().context("no facts")?;
    for pair in first {
        let notes = chat(&appliance.ctl(), &pair.fact)?;
        ensure!(notes.iter().any(|note| note.starts_with("remembered")), "not acknowledged: {notes:?}");
    }
    // The last one is told, and the plug is pulled while its answer is being given: after the acknowledgement,
    // before the end.
    let mut telling = appliance.ctl().spawn(&["chat", "echo", &last.fact, "--json"])?;
    telling.wait_for_line("remembered")?;
    appliance.power_off_hard()?;
    telling.kill();

    appliance.boot(&Start::default())?;
    appliance.login()?;
    appliance.until("echo runs again", BOOT, |ctl| running(ctl, "echo"))?;
    appliance.until("the engine is ready again", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        Ok(matches!(status.engine, EngineState::Ready { loading: false, .. }).then_some(()))
    })?;
    let mut right = 0;
    for pair in facts {
        let notes = chat(&appliance.ctl(), &pair.question)?;
        let first = notes.iter().find_map(|note| note.strip_prefix("recalled: ")).unwrap_or("nothing");
        if first.contains(pair.fact.as_str()) {
            right += 1;
        } else {
            println!("recall: {:?} brought {first:?} first", pair.question);
        }
    }
    println!("RESULT: after the plug, the right fact first for {right} of {} questions", facts.len());
    ensure!(right * OF >= RIGHT_LEAST * facts.len(), "the right fact first for {right} questions only");
    Ok(())
}

/// One message; the notes of the reply, in order.
pub(crate) fn chat(ctl: &Ctl, text: &str) -> Result<Vec<String>> {
    let notes = reply(ctl, text)?.into_iter().filter_map(|part| match part {
        ReplyPart::Note { text } => Some(text),
        _ => None,
    });
    Ok(notes.collect())
}

/// One message; all of its reply.
pub(crate) fn reply(ctl: &Ctl, text: &str) -> Result<Vec<ReplyPart>> {
    let said = ctl.run(&["chat", "echo", text, "--json"])?.success()?;
    let parts: Vec<ReplyPart> =
        said.lines().map(serde_json::from_str).collect::<Result<_, _>>().with_context(|| said.clone())?;
    ensure!(matches!(parts.last(), Some(ReplyPart::Done)), "the reply has no end: {said}");
    Ok(parts)
}
