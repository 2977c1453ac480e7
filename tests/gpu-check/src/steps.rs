//! What is checked, the most telling first.
//!
//! A step passes with the numbers it measured, fails with the two that differ, or is skipped with what is missing.

use crate::card::{self, Card};
use crate::engine::Engine;
use crate::progress::Outcome;
use agentd_domain::device::{MemoryMeasured, MemoryPlan, PlannedDevice};
use agentd_domain::engine::GpuReadings;
use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Scene {
    pub card: Card,
    pub engine: PathBuf,
    /// The engine's own back ends and CUDA's.
    pub backends: PathBuf,
    pub model: PathBuf,
}

#[derive(Clone, Copy)]
pub struct Step {
    pub name: &'static str,
    pub run: fn(&Scene) -> Result<Outcome>,
}

pub const ALL: [Step; 5] = [
    Step { name: "memory-plan", run: memory_plan },
    Step { name: "parity", run: parity },
    Step { name: "shared-prefixes", run: shared_prefixes },
    Step { name: "readings", run: readings },
    Step { name: "limits", run: limits },
];

/// E17.
const ERROR_MOST: f64 = 0.02;
const SMALL_CONTEXT: u32 = 2048;
const LARGE_CONTEXT: u32 = 32_768;
const ANSWER_TOKENS: u32 = 128;
const PROMPTS: [&str; 4] = [
    "The quick brown fox",
    "In a hole in the ground there lived",
    "1 2 3 4 5 6 7 8",
    "Dear Sir or Madam, I am writing to you because",
];
/// Answers at once over one long beginning.
const AGENTS: usize = 8;

/// Buffers must be what was counted; the driver's number for our process grows by the plan's difference between two
/// contexts, in which what CUDA takes for itself is in both.
fn memory_plan(scene: &Scene) -> Result<Outcome> {
    let context = LARGE_CONTEXT.to_string();
    let plan: MemoryPlan = scene.once(&["--context", &context])?;
    let real: MemoryMeasured = scene.once(&["--context", &context, "--real"])?;
    let of_card = |devices: &[PlannedDevice]| -> Result<(String, u64)> {
        let on = devices.iter().find(|device| device.device.starts_with("CUDA"));
        let on = on.context("nothing of the model is on the card")?;
        Ok((on.device.clone(), on.sum_bytes()))
    };
    let ((device, planned), (_, taken)) = (of_card(&plan.devices)?, of_card(&real.devices)?);
    let buffers = difference(planned, taken);
    let small: MemoryPlan = scene.once(&["--context", &SMALL_CONTEXT.to_string()])?;
    let (_, planned_small) = of_card(&small.devices)?;
    let mut engine = scene.with_cuda()?;
    let mut used = Vec::new();
    for context in [SMALL_CONTEXT, LARGE_CONTEXT] {
        engine.load(&scene.model, context, 0)?;
        engine.greedy(&[PROMPTS[0].to_owned()], 8)?;
        used.push(own_bytes(&mut engine)?);
        engine.unload()?;
    }
    let grew = used[1].saturating_sub(used[0]);
    let said = format!(
        "{device}: planned {} MiB, buffers {} MiB (off {:.2} %); {LARGE_CONTEXT} instead of {SMALL_CONTEXT} cells: \
         planned {} MiB more, the driver counts {} MiB more; beside the plan the process holds {} MiB",
        planned >> 20,
        taken >> 20,
        buffers * 100.0,
        planned.saturating_sub(planned_small) >> 20,
        grew >> 20,
        used[1].saturating_sub(planned) >> 20,
    );
    let within =
        buffers <= ERROR_MOST && planned.abs_diff(planned_small + grew) as f64 <= planned as f64 * ERROR_MOST;
    Ok(if within { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

/// The same greedy tokens as on the processor. Other sums in another order may once choose another of two words that are
/// as good; the step tells where, and passes while three answers of four are the same to their end.
fn parity(scene: &Scene) -> Result<Outcome> {
    let prompts: Vec<String> = PROMPTS.iter().map(|prompt| (*prompt).to_owned()).collect();
    let answers = |mut engine: Engine| -> Result<Vec<String>> {
        engine.load(&scene.model, SMALL_CONTEXT, 1)?;
        let one =
            |prompt: &String| Ok(engine.greedy(std::slice::from_ref(prompt), ANSWER_TOKENS)?.remove(0).text);
        prompts.iter().map(one).collect()
    };
    let own = scene.engine.parent().context("the engine's folder")?.join("backends");
    let on_processor = answers(Engine::start(&scene.engine, &own)?)?;
    let on_card = answers(scene.with_cuda()?)?;
    let same = on_card.iter().zip(&on_processor).filter(|(card, processor)| card == processor).count();
    let parts: Vec<String> = on_card
        .iter()
        .zip(&on_processor)
        .filter(|(card, processor)| card != processor)
        .map(|(card, processor)| {
            let at = card.bytes().zip(processor.bytes()).take_while(|(one, other)| one == other).count();
            format!("one answer differs from byte {at} of {} on", processor.len())
        })
        .collect();
    let said = format!(
        "{same} of {} answers of {ANSWER_TOKENS} tokens are the same; {}",
        PROMPTS.len(),
        parts.join(", ")
    );
    let said = said.trim_end_matches("; ").to_owned();
    Ok(if same * 4 >= PROMPTS.len() * 3 { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

/// Agents that arrive together with the same long beginning: each answers as it does alone, and the last does not wait
/// as long as if each had to read it all.
fn shared_prefixes(scene: &Scene) -> Result<Outcome> {
    let shared = "The rules of this house are many, and each of them has its reason. ".repeat(120);
    let prompts: Vec<String> = (0..AGENTS).map(|agent| format!("{shared}Agent {agent} asks:")).collect();
    let mut engine = scene.with_cuda()?;
    engine.load(&scene.model, LARGE_CONTEXT, AGENTS as u32)?;
    // What is compiled or tuned at the first use is not measured.
    engine.greedy(&["Warm up".to_owned()], 4)?;
    let alone = engine.greedy(&prompts[..1], 32)?.remove(0);
    engine.unload()?;
    engine.load(&scene.model, LARGE_CONTEXT, AGENTS as u32)?;
    let together = engine.greedy(&prompts, 32)?;
    let last = together.iter().map(|answer| answer.first).max().unwrap_or_default();
    let all = together.iter().map(|answer| answer.took).max().unwrap_or_default();
    let tokens: u32 = together.iter().map(|answer| answer.tokens).sum();
    let said = format!(
        "first words alone after {} ms, of the last of {AGENTS} after {} ms ({:.1} times); {tokens} tokens in {} ms; \
         the first agent's answer is {}",
        alone.first.as_millis(),
        last.as_millis(),
        last.as_secs_f64() / alone.first.as_secs_f64().max(1e-6),
        all.as_millis(),
        if together[0].text == alone.text { "the same as alone" } else { "another than alone" },
    );
    // Without sharing the last one's first word comes after all prompts were read.
    let shares = last < alone.first * (AGENTS as u32 / 2);
    Ok(if shares { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

/// Our readings are the ones of `nvidia-smi`.
fn readings(scene: &Scene) -> Result<Outcome> {
    let mut engine = scene.with_cuda()?;
    let gpu = own_card(&mut engine, &scene.card)?;
    let theirs = card::numbers("memory.total,temperature.gpu,power.draw,clocks.gr,clocks.mem")
        .map_err(anyhow::Error::msg)?;
    let ours = [
        gpu.memory_total_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)),
        gpu.temperature_celsius.map(f64::from),
        gpu.power_milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
        gpu.graphics_clock_mhz.map(f64::from),
        gpu.memory_clock_mhz.map(f64::from),
    ];
    let names = ["memory MiB", "°C", "W", "MHz", "memory MHz"];
    // Between the two questions the card lives on; its memory does not change.
    let most = [0.001, 0.2, 0.5, 1.0, 1.0];
    let mut told = Vec::new();
    let mut wrong = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let (our, their) = (ours[index], theirs.get(index).copied().flatten());
        told.push(format!("{name} {our:?}/{their:?}"));
        match (our, their) {
            (Some(our), Some(their)) if (our - their).abs() > their.abs().max(1.0) * most[index] => {
                wrong.push(*name)
            }
            (Some(_), None) | (None, Some(_)) => wrong.push(*name),
            _ => {}
        }
    }
    let said = format!(
        "ours/nvidia-smi: {}; events {}",
        told.join(", "),
        if gpu.health.watched { "watched" } else { "not given" }
    );
    let listed =
        engine.devices.iter().any(|device| device.gpu.as_ref().is_some_and(|on| on.uuid == gpu.uuid));
    ensure!(listed, "llama.cpp's device was not brought together with the driver's: {:?}", engine.devices);
    Ok(if wrong.is_empty() {
        Outcome::Passed(said)
    } else {
        Outcome::Failed(format!("{said}; wrong: {wrong:?}"))
    })
}

/// The driver's limit of a cgroup, where it has one: set, seen by a process in it, and cleared.
fn limits(scene: &Scene) -> Result<Outcome> {
    let root = Path::new("/sys/fs/cgroup");
    if !root.join("cgroup.controllers").exists() {
        return Ok(Outcome::Skipped("this machine has no cgroup v2".to_owned()));
    }
    let group = root.join(format!("agentd-gpu-check-{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(&group) {
        return Ok(Outcome::Skipped(format!("{}: {error}; run it as root", group.display())));
    }
    let outcome = limited(scene, &group);
    let _ = scene.limit("clear", &group, None);
    let _ = std::fs::remove_dir(&group);
    outcome
}

fn limited(scene: &Scene, group: &Path) -> Result<Outcome> {
    let bytes = (scene.card.memory_total_mib << 20) / 2;
    let (well, printed) = scene.limit("set", group, Some(bytes))?;
    if !well {
        let why = printed["why"].as_str().unwrap_or_default().to_owned();
        return Ok(Outcome::Skipped(format!("not in force: {why} (driver {})", scene.card.driver)));
    }
    let mut engine = scene.with_cuda()?;
    // Entered late, which is why the devices are asked for again below: a real engine is in its group from the start.
    std::fs::write(group.join("cgroup.procs"), engine.pid().to_string())?;
    let gpu = own_card(&mut engine, &scene.card)?;
    drop(engine);
    let total = gpu.memory_total_bytes.unwrap_or(u64::MAX);
    let said = format!("limit {} MiB, seen inside {} MiB", bytes >> 20, total >> 20);
    Ok(if total <= bytes { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

impl Scene {
    fn with_cuda(&self) -> Result<Engine> {
        let engine = Engine::start(&self.engine, &self.backends)?;
        ensure!(
            engine.devices.iter().any(|device| device.name.starts_with("CUDA")),
            "the engine sees no CUDA device, only {:?}",
            engine.devices.iter().map(|device| &device.name).collect::<Vec<_>>()
        );
        Ok(engine)
    }

    /// `agentd-engine plan`.
    fn once<T: DeserializeOwned>(&self, more: &[&str]) -> Result<T> {
        let output = Command::new(&self.engine)
            .arg("plan")
            .arg(&self.model)
            .arg("--backends")
            .arg(&self.backends)
            .args(more)
            .output()?;
        if !output.status.success() {
            bail!("plan {more:?}: {}", String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn limit(&self, what: &str, group: &Path, bytes: Option<u64>) -> Result<(bool, serde_json::Value)> {
        let mut command = Command::new(&self.engine);
        command.args(["limit", what, "--device", &self.card.uuid, "--cgroup"]).arg(group);
        if let Some(bytes) = bytes {
            command.args(["--bytes", &bytes.to_string()]);
        }
        let output = command.output()?;
        Ok((output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default()))
    }
}

fn own_card(engine: &mut Engine, card: &Card) -> Result<GpuReadings> {
    let gpus = engine.status()?.gpus;
    gpus.into_iter()
        .find(|gpu| gpu.uuid.as_deref() == Some(&card.uuid))
        .context("the engine does not know the card")
}

/// What the driver says that the engine's process holds.
fn own_bytes(engine: &mut Engine) -> Result<u64> {
    let pid = engine.pid();
    let gpus = engine.status()?.gpus;
    let processes = gpus.iter().flat_map(|gpu| gpu.processes.iter().flatten());
    let mine = processes.filter(|process| process.pid == pid).filter_map(|process| process.used_bytes).max();
    mine.context("the driver lists no memory of the engine's process (in a container it has another number)")
}

fn difference(planned: u64, real: u64) -> f64 {
    planned.abs_diff(real) as f64 / (real as f64).max(1.0)
}
