//! How large is it, on disk and in memory?

use crate::report::{Bench, Row, machine};
use agentd_domain::api::{ApplianceStatus, EngineState};
use anyhow::{Context, Result};
use image::build;
use tests_qemu::{Appliance, BOOT, Start, setup};

const MIB: f64 = 1024.0 * 1024.0;

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
    let status = idle(1024)?;
    let used = status.memory_total_bytes.saturating_sub(status.memory_available_bytes);
    let EngineState::Ready { models: loaded, rss_bytes, .. } = &status.engine else {
        anyhow::bail!("the engine is not ready: {:?}", status.engine)
    };
    // The files are mapped, so their pages count as available; what the engine allocated for them does not.
    let names: Vec<&str> = loaded.iter().map(|model| model.model.as_str()).collect();
    rows.push(
        Row::new("idle memory in use, engine and its buffers included", used as f64 / MIB, "MiB")
            .at_most(128.0),
    );
    rows.push(Row::new(
        format!("of it mapped or allocated by the engine with {}", names.join(", ")),
        *rss_bytes as f64 / MIB,
        "MiB",
    ));
    let smallest = idle(512).context("a guest of 512 MiB does not work")?;
    rows.push(
        Row::new(
            "smallest guest that was shown to work",
            smallest.memory_total_bytes as f64 / MIB,
            "MiB of MemTotal",
        )
        .at_most(512.0),
    );
    Ok(Bench {
        name: "size".to_owned(),
        command: "scripts/bench size".to_owned(),
        commit: setup.built.checkout.version.clone(),
        machine: machine("memory figures from the guest"),
        rows,
    })
}

/// A new appliance with its first agent running and nothing to do.
fn idle(memory_mib: u32) -> Result<ApplianceStatus> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { memory_mib, ..Start::default() })?;
    appliance.claim()?;
    appliance.until("engine ready and the first agent running", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let ready = matches!(status.engine, EngineState::Ready { .. });
        let runs = status.milestones.iter().any(|(name, _)| name.contains("agent running"));
        Ok((ready && runs).then_some(status))
    })
}
