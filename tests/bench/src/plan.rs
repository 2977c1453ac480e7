//! Is what the engine plans for a model what it then takes? (E17)
//!
//! One process counts, another one loads the same file without mapping it, fills its context to the end and says by how
//! much its own memory grew. The models have the shape of Qwen2.5-0.5B and seeded weights (`tests/models`).

use crate::report;
use agentd_domain::device::{MemoryMeasured, MemoryPlan, PlannedDevice};
use anyhow::{Context, Result, bail, ensure};
use image::cache::Cache;
use image::programs;
use image::source::Checkout;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests_models::{Layout, QWEN_HALF_BILLION};
use tests_tidy::promises::{Bench, Row};

const MIB: f64 = 1024.0 * 1024.0;
const CELLS: [u32; 2] = [2048, 4096];

pub fn measure() -> Result<Bench> {
    let checkout = Checkout::find()?;
    let cache = Cache::from_env()?;
    let engine = engine(&cache, &checkout)?;
    let mut rows = Vec::new();
    for layout in [Layout::Q8_0, Layout::Q4KM] {
        let model = tests_models::ensure(&cache.path(""), &QWEN_HALF_BILLION, layout)?;
        for cells in CELLS {
            rows.extend(pair(&engine, &model, layout, cells)?);
        }
    }
    Ok(report::here("plan", rows, &checkout))
}

/// Named by the environment, as for the tests of `tests/host`, or built now.
fn engine(cache: &Cache, checkout: &Checkout) -> Result<PathBuf> {
    if let Some(engine) = std::env::var_os("AGENTD_ENGINE_BIN") {
        return Ok(engine.into());
    }
    let built = programs::build(cache, checkout)?;
    let found = built.programs.iter().find(|program| program.built.ends_with("agentd-engine"));
    Ok(found.context("no program agentd-engine")?.built.clone())
}

fn pair(engine: &Path, model: &Path, layout: Layout, cells: u32) -> Result<[Row; 2]> {
    let cells_word = cells.to_string();
    let plan: MemoryPlan = ask(engine, model, &["--context", &cells_word])?;
    let real: MemoryMeasured = ask(engine, model, &["--context", &cells_word, "--real"])?;
    let buffers = |devices: &[PlannedDevice]| -> Vec<_> {
        devices.iter().map(|on| (on.model_bytes, on.context_bytes, on.compute_bytes)).collect()
    };
    let (counted, taken) = (buffers(&plan.devices), buffers(&real.devices));
    ensure!(counted == taken, "buffers differ: planned {counted:?}, taken {taken:?}");
    let planned = plan.bytes_on("host", real.rows);
    let off = planned.abs_diff(real.grown_bytes) as f64 * 100.0 / real.grown_bytes as f64;
    let name = format!("{} {}, {cells} cells", QWEN_HALF_BILLION.name, layout.name());
    println!("{name}: planned {planned} bytes, grew {} bytes", real.grown_bytes);
    Ok([
        Row::new(format!("memory planned against taken, {name}: off by"), off, "%").at_most(2.0),
        Row::new(format!("taken, {name}"), real.grown_bytes as f64 / MIB, "MiB").detail(),
    ])
}

fn ask<T: DeserializeOwned>(engine: &Path, model: &Path, more: &[&str]) -> Result<T> {
    let backends = engine.parent().context("the engine's folder")?.join("backends");
    let mut command = Command::new(engine);
    command.arg("plan").arg(model).arg("--backends").arg(backends).args(more);
    let output = command.output().with_context(|| engine.display().to_string())?;
    if !output.status.success() {
        bail!("plan {more:?}: {}", String::from_utf8_lossy(&output.stdout).trim());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
