//! How large is it, on disk and in memory?
//!
//! Memory is what the guest itself says, some minutes after its first agent runs and with nobody asking for
//! anything meanwhile. The smallest guest has to work for it: an agent is installed and started, and `echo` is told
//! something that it acknowledges.

use crate::report::result;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{Agent, ApplianceStatus, EngineState};
use anyhow::{Context, Result, ensure};
use image::build;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests_qemu::{Appliance, BOOT, Ctl, Start, setup};
use tests_tidy::promises::{Bench, Row};

const MIB: f64 = 1024.0 * 1024.0;

/// What a usual machine has, and what the smallest one that is promised to work has.
const USUAL_MIB: u32 = 1024;
const SMALLEST_MIB: u32 = 512;

/// By the guest's own clock. By then the boot, the claim's hash and the reading of the models are long over, under
/// emulation too.
const IDLE_MS: u64 = 3 * 60_000;

pub fn measure() -> Result<Bench> {
    let setup = setup();
    let mut models = 0;
    for path in build::model_entries(&setup.cache)?.iter().filter_map(|entry| entry.source()) {
        models += std::fs::metadata(path)?.len();
    }
    let kernel = std::fs::metadata(&setup.built.kernel.image)?.len();
    let root = setup.built.root.about.bytes.saturating_sub(models);
    let mut rows = vec![
        Row::new("kernel", kernel as f64 / MIB, "MiB").at_most(8.0),
        Row::new("root without models", root as f64 / MIB, "MiB").at_most(80.0),
    ];
    rows.extend(memory(&idle()?)?);
    rows.push(
        Row::new("smallest guest that took an agent and answered a message", f64::from(smallest()?), "MiB")
            .at_most(f64::from(SMALLEST_MIB)),
    );
    Ok(result("size", rows))
}

/// MemTotal less MemAvailable. Model files are mapped: their pages are clean copies of a file, which the kernel can
/// drop, so MemAvailable counts them as free and they are not in the figure, MiniLM's included. What the engine
/// allocates for models (contexts, buffers, weights that it keeps in another order) cannot be told apart from its own
/// heap from outside. All of it counts as ours: the figure is at least what is promised to be small. The row below
/// says how much that can be.
fn memory(status: &ApplianceStatus) -> Result<Vec<Row>> {
    let EngineState::Ready { models, private_bytes, .. } = &status.engine else {
        anyhow::bail!("the engine is not ready: {:?}", status.engine)
    };
    ensure!(
        *private_bytes > 0 && status.agentd_rss_bytes > 0,
        "the guest does not say its memory: {status:?}"
    );
    let names: Vec<&str> = models.iter().map(|model| model.model.as_str()).collect();
    let used = status.memory_total_bytes.saturating_sub(status.memory_available_bytes);
    let before = (f64::from(USUAL_MIB) * MIB) - status.memory_total_bytes as f64;
    Ok(vec![
        Row::new(
            "idle memory in use besides model files (MemTotal less MemAvailable, with the engine's buffers)",
            used as f64 / MIB,
            "MiB",
        )
        .at_most(128.0),
        Row::new("agentd idle, resident", status.agentd_rss_bytes as f64 / MIB, "MiB").at_most(40.0),
        Row::new(
            format!(
                "of the idle memory, allocated by the engine: its own heap, and for {}",
                names.join(", ")
            ),
            *private_bytes as f64 / MIB,
            "MiB",
        ),
        Row::new(
            format!("of {USUAL_MIB} MiB, kept by the kernel before it counts (not in MemTotal)"),
            before / MIB,
            "MiB",
        ),
    ])
}

/// The status of a usual machine that has had nothing to do for a while.
fn idle() -> Result<ApplianceStatus> {
    let (mut appliance, status) = ready(USUAL_MIB)?;
    let due_ms = status.uptime_ms + IDLE_MS;
    let mut left_ms = IDLE_MS;
    // Asking would be work, so it is done when the time should be over and not before.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(left_ms));
        let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
        left_ms = due_ms.saturating_sub(status.uptime_ms);
        if left_ms == 0 {
            appliance.power_off()?;
            return Ok(status);
        }
    }
    anyhow::bail!("the guest's clock stands; {}", appliance.guest()?.scene())
}

/// How much memory the smallest guest was given, when it did all that is asked of it.
fn smallest() -> Result<u32> {
    let (mut appliance, _) = ready(SMALLEST_MIB).context("a guest of 512 MiB does not start")?;
    let package = second_echo(&appliance.file("package"))?;
    let ctl = appliance.ctl();
    let installed: Agent = ctl.json(&["agent", "install", package.to_str().context("path")?])?;
    ctl.run(&["agent", "start", installed.name.as_str()])?.success()?;
    both_run(&mut appliance)?;
    let said =
        ctl.run(&["chat", "echo", "The spare key hangs behind the blue door.", "--json"])?.success()?;
    let parts: Vec<ReplyPart> =
        said.lines().map(serde_json::from_str).collect::<Result<_, _>>().with_context(|| said.clone())?;
    let acknowledged =
        parts.iter().any(|part| matches!(part, ReplyPart::Note { text } if text.starts_with("remembered")));
    ensure!(acknowledged && matches!(parts.last(), Some(ReplyPart::Done)), "echo did not take it: {said}");
    // Nobody was killed for it.
    both_run(&mut appliance)?;
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    ensure!(agents.iter().all(|agent| agent.restarts == 0 && agent.last_exit.is_none()), "{agents:?}");
    appliance.power_off()?;
    Ok(SMALLEST_MIB)
}

fn both_run(appliance: &mut Appliance) -> Result<()> {
    appliance.until("two agents run and the engine is ready", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let running = agents.iter().filter(|agent| agent.state.is_running()).count();
        Ok((running == 2 && engine_is_ready(ctl)?.is_some()).then_some(()))
    })
}

/// A package that is `echo` under another name.
fn second_echo(folder: &Path) -> Result<PathBuf> {
    let setup = setup();
    let program = setup.cache.path("programs-target/x86_64-unknown-linux-gnu/release/echo-agent");
    let manifest = setup.built.checkout.path("rootfs/agents/echo/agent.toml");
    let manifest = std::fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
    let renamed = manifest.replace("name = \"echo\"", "name = \"second\"");
    ensure!(renamed != manifest, "echo's manifest does not name it as expected");
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(&program, folder.join("bin/echo-agent")).with_context(|| program.display().to_string())?;
    std::fs::write(folder.join("agent.toml"), renamed)?;
    Ok(folder.to_owned())
}

/// A new appliance whose engine is ready, with its default models, and whose first agent runs.
fn ready(memory_mib: u32) -> Result<(Appliance, ApplianceStatus)> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { memory_mib, ..Start::default() })?;
    appliance.claim()?;
    let status = appliance.until("engine ready and the first agent running", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let runs = agents.iter().any(|agent| agent.state.is_running());
        Ok(engine_is_ready(ctl)?.filter(|_| runs))
    })?;
    Ok((appliance, status))
}

/// The status, when both models that the image carries are loaded: one speaks, one embeds.
fn engine_is_ready(ctl: &Ctl) -> Result<Option<ApplianceStatus>> {
    let status: ApplianceStatus = ctl.json(&["status"])?;
    let ready = matches!(&status.engine, EngineState::Ready { models, .. } if models.len() >= 2);
    Ok(ready.then_some(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(engine: EngineState) -> ApplianceStatus {
        serde_json::from_value(serde_json::json!({
            "version": "0", "slot": "a", "uptime_ms": 1, "health": "green", "problems": [],
            "memory_total_bytes": 980u64 << 20, "memory_available_bytes": 870u64 << 20,
            "agentd_rss_bytes": 41u64 << 20, "data_total_bytes": 0, "data_available_bytes": 0, "devices": [],
            "clock": "sntp", "now_unix_ms": 0, "addresses": [], "engine": engine, "milestones": [],
        }))
        .unwrap()
    }

    #[test]
    fn what_the_engine_allocated_counts_as_ours() {
        let backend = "cpu".to_owned();
        let engine = |private_bytes| EngineState::Ready {
            backend: backend.clone(),
            backends: vec![],
            models: vec![],
            rss_bytes: 1 << 30,
            private_bytes,
            uptime_ms: 1,
            loading: false,
        };
        let rows = memory(&status(engine(30 << 20))).unwrap();
        let values: Vec<f64> = rows.iter().map(|row| row.value).collect();
        assert_eq!(values, [110.0, 41.0, 30.0, 44.0]);
        let reached: Vec<bool> =
            rows.iter().filter_map(|row| row.goal.as_ref()).map(|goal| goal.reached).collect();
        assert_eq!(reached, [true, false]);
        assert!(memory(&status(engine(0))).is_err(), "what was not told is not zero");
        assert!(memory(&status(EngineState::Starting)).is_err());
    }
}
