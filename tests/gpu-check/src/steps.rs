//! What is checked, the most telling first.
//!
//! A step passes with the numbers it measured, fails with the two that differ, or is skipped with what is missing.

use crate::Backend;
use crate::card::{self, Card};
use crate::engine::Engine;
use crate::progress::Outcome;
use agentd_domain::device::{MemoryMeasured, MemoryPlan, PlannedDevice};
use agentd_domain::engine::GpuReadings;
use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

pub struct Scene {
    pub card: Card,
    pub engine: PathBuf,
    /// The engine's own back ends and the card's.
    pub backends: PathBuf,
    pub model: PathBuf,
    pub sizes: Sizes,
    /// The end of the step that runs.
    pub until: Instant,
}

/// How much is computed.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    small_context: u32,
    large_context: u32,
    answer_tokens: u32,
    /// Of the long beginning that agents share, in sentences.
    shared_sentences: usize,
}

pub const REAL: Sizes =
    Sizes { small_context: 2048, large_context: 32_768, answer_tokens: 128, shared_sentences: 120 };
/// A software device reads some hundred tokens a second.
pub const REHEARSED: Sizes =
    Sizes { small_context: 512, large_context: 1024, answer_tokens: 16, shared_sentences: 8 };

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
/// The root of the mean square of the differences of logits, as a part of the logits' standard deviation. Where weights are
/// in 8 bits or less the processor rounds what it multiplies with them to 8 bits (`vec_dot_type` in ggml's `ggml-cpu.c`), a
/// back end may multiply in 16 bits: the same bound as `tests/host/tests/engine/vulkan.rs` has, which measures it.
const LOGITS_MOST: f64 = 0.1;
/// After so many places of each answer logits are compared.
const PLACES: usize = 8;
const PROMPTS: [&str; 4] = [
    "The quick brown fox",
    "In a hole in the ground there lived",
    "1 2 3 4 5 6 7 8",
    "Dear Sir or Madam, I am writing to you because",
];
/// Answers at once over one long beginning.
const AGENTS: usize = 8;

/// Buffers must be what was counted; the driver's number for our process grows by the plan's difference between two
/// contexts, in which what CUDA takes for itself is in both. Vulkan's drivers have no such number: there it is the first.
fn memory_plan(scene: &Scene) -> Result<Outcome> {
    let Sizes { small_context, large_context, .. } = scene.sizes;
    let context = large_context.to_string();
    let plan: MemoryPlan = scene.once(&["--context", &context])?;
    let real: MemoryMeasured = scene.once(&["--context", &context, "--real"])?;
    let of_card = |devices: &[PlannedDevice]| -> Result<(String, u64)> {
        let on = devices.iter().find(|device| device.device.starts_with(scene.card.backend.prefix()));
        let on = on.context("nothing of the model is on the card")?;
        Ok((on.device.clone(), on.sum_bytes()))
    };
    let ((device, planned), (_, taken)) = (of_card(&plan.devices)?, of_card(&real.devices)?);
    let buffers = difference(planned, taken);
    let told = format!(
        "{device}: planned {} MiB, buffers {} MiB (off {:.2} %)",
        planned >> 20,
        taken >> 20,
        buffers * 100.0
    );
    if scene.card.backend == Backend::Vulkan {
        return Ok(if buffers <= ERROR_MOST { Outcome::Passed(told) } else { Outcome::Failed(told) });
    }
    let small: MemoryPlan = scene.once(&["--context", &small_context.to_string()])?;
    let (_, planned_small) = of_card(&small.devices)?;
    let mut engine = scene.with_card()?;
    let mut used = Vec::new();
    for context in [small_context, large_context] {
        engine.load(&scene.model, context, 0)?;
        engine.greedy(&[PROMPTS[0].to_owned()], 8)?;
        used.push(own_bytes(&mut engine)?);
        engine.unload()?;
    }
    let grew = used[1].saturating_sub(used[0]);
    let said = format!(
        "{told}; {large_context} instead of {small_context} cells: planned {} MiB more, the driver counts {} MiB more; \
         beside the plan the process holds {} MiB",
        planned.saturating_sub(planned_small) >> 20,
        grew >> 20,
        used[1].saturating_sub(planned) >> 20,
    );
    let within =
        buffers <= ERROR_MOST && planned.abs_diff(planned_small + grew) as f64 <= planned as f64 * ERROR_MOST;
    Ok(if within { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

/// The same logits as on the processor, within what rounding explains, at places all along the processor's own greedy
/// answers; and the same choice there, unless the processor itself sees two tokens as good: apart by less than the bound.
/// Whole answers that are the same are told, and decide nothing: after one near-tie all words may be others.
fn parity(scene: &Scene) -> Result<Outcome> {
    let own = scene.engine.parent().context("the engine's folder")?.join("backends");
    let mut on_processor = Engine::start(&scene.engine, &own, scene.until)?;
    let mut on_card = scene.with_card()?;
    let (mut same, mut places, mut chosen, mut ties, mut worst) = (0, 0, 0, 0, 0.0_f64);
    for engine in [&mut on_processor, &mut on_card] {
        engine.load(&scene.model, scene.sizes.small_context, 1)?;
    }
    for prompt in PROMPTS.map(str::to_owned) {
        let most = scene.sizes.answer_tokens;
        let theirs = on_processor.greedy(std::slice::from_ref(&prompt), most)?.remove(0).text;
        let ours = on_card.greedy(std::slice::from_ref(&prompt), most)?.remove(0).text;
        same += usize::from(ours == theirs);
        let (begun, all) =
            (on_processor.tokenize(&prompt)?.len(), on_processor.tokenize(&format!("{prompt}{theirs}"))?);
        for place in 0..PLACES {
            let length = begun + all.len().saturating_sub(begun) * place / PLACES;
            let known = &all[..length.clamp(1, all.len())];
            let apart = apart(&on_card.logits(known)?, &on_processor.logits(known)?)?;
            worst = worst.max(apart.differ);
            places += 1;
            match apart.choice {
                Choice::Same => chosen += 1,
                Choice::NearTie => ties += 1,
                Choice::Another => {}
            }
        }
    }
    let said = format!(
        "at {places} places of {} answers logits differ by {:.2} % of their standard deviation at most (bound {:.0} %), \
         {chosen} choices are the same and {ties} are near-ties; {same} answers of {} tokens are the same",
        PROMPTS.len(),
        worst * 100.0,
        LOGITS_MOST * 100.0,
        scene.sizes.answer_tokens,
    );
    let well = worst <= LOGITS_MOST && chosen + ties == places;
    Ok(if well { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

struct Apart {
    /// Parts of the standard deviation of theirs.
    differ: f64,
    choice: Choice,
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Same,
    NearTie,
    Another,
}

fn apart(ours: &[f32], theirs: &[f32]) -> Result<Apart> {
    ensure!(!ours.is_empty() && ours.len() == theirs.len(), "other vocabularies");
    let count = theirs.len() as f64;
    let mean = theirs.iter().map(|logit| f64::from(*logit)).sum::<f64>() / count;
    let root = |sum: f64| (sum / count).sqrt();
    let deviation = root(theirs.iter().map(|logit| (f64::from(*logit) - mean).powi(2)).sum());
    let squares = ours.iter().zip(theirs).map(|(one, other)| f64::from(one - other).powi(2));
    let best = |logits: &[f32]| {
        let places = logits.iter().enumerate().max_by(|one, other| one.1.total_cmp(other.1));
        places.map_or(0, |(place, _)| place)
    };
    let (one, other) = (best(ours), best(theirs));
    let gap = f64::from(theirs[other] - theirs[one]);
    let choice = match one == other {
        true => Choice::Same,
        false if gap <= LOGITS_MOST * deviation => Choice::NearTie,
        false => Choice::Another,
    };
    Ok(Apart { differ: root(squares.sum()) / deviation.max(f64::MIN_POSITIVE), choice })
}

/// Agents that arrive together with the same long beginning: each answers as it does alone, and the last does not wait
/// as long as if each had to read it all.
fn shared_prefixes(scene: &Scene) -> Result<Outcome> {
    let shared = "The rules of this house are many, and each of them has its reason. "
        .repeat(scene.sizes.shared_sentences);
    let prompts: Vec<String> = (0..AGENTS).map(|agent| format!("{shared}Agent {agent} asks:")).collect();
    let mut engine = scene.with_card()?;
    engine.load(&scene.model, scene.sizes.large_context, AGENTS as u32)?;
    // What is compiled or tuned at the first use is not measured.
    engine.greedy(&["Warm up".to_owned()], 4)?;
    let alone = engine.greedy(&prompts[..1], 32)?.remove(0);
    engine.unload()?;
    engine.load(&scene.model, scene.sizes.large_context, AGENTS as u32)?;
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
    if scene.card.backend == Backend::Vulkan {
        return Ok(Outcome::Skipped("readings are NVIDIA's library's; Vulkan has none".to_owned()));
    }
    let mut engine = scene.with_card()?;
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
    if scene.card.backend == Backend::Vulkan {
        return Ok(Outcome::Skipped("limits of a cgroup are NVIDIA's driver's; Vulkan has none".to_owned()));
    }
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
    let mut engine = scene.with_card()?;
    // Entered late, which is why the devices are asked for again below: a real engine is in its group from the start.
    std::fs::write(group.join("cgroup.procs"), engine.pid().to_string())?;
    let gpu = own_card(&mut engine, &scene.card)?;
    drop(engine);
    let total = gpu.memory_total_bytes.unwrap_or(u64::MAX);
    let said = format!("limit {} MiB, seen inside {} MiB", bytes >> 20, total >> 20);
    Ok(if total <= bytes { Outcome::Passed(said) } else { Outcome::Failed(said) })
}

impl Scene {
    fn with_card(&self) -> Result<Engine> {
        let engine = Engine::start(&self.engine, &self.backends, self.until)?;
        let prefix = self.card.backend.prefix();
        ensure!(
            engine.devices.iter().any(|device| device.name.starts_with(prefix)),
            "the engine sees no {prefix} device, only {:?}",
            engine.devices.iter().map(|device| &device.name).collect::<Vec<_>>()
        );
        Ok(engine)
    }

    /// `agentd-engine plan`.
    fn once<T: DeserializeOwned>(&self, more: &[&str]) -> Result<T> {
        let left = self.until.saturating_duration_since(Instant::now()).as_secs().max(1);
        let output = Command::new("timeout")
            .arg(left.to_string())
            .arg(&self.engine)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_the_same_or_a_near_tie_or_another() {
        let theirs = [0.0, 4.0, 3.99, -4.0, 1.0];
        let of = |ours: [f32; 5]| apart(&ours, &theirs).unwrap();
        let same = of(theirs);
        assert_eq!((same.differ, same.choice), (0.0, Choice::Same));
        assert_eq!(of([0.0, 3.98, 4.0, -4.0, 1.0]).choice, Choice::NearTie);
        let other = of([0.0, 3.9, 3.9, -4.0, 5.0]);
        assert!(other.choice == Choice::Another && other.differ > LOGITS_MOST, "{}", other.differ);
        assert!(apart(&[], &[]).is_err() && apart(&[1.0], &[1.0, 2.0]).is_err());
    }
}
