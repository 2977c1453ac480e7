//! What does this program do besides serving?
//!
//! `plan` counts what a model would take, and loads nothing; `limit` sets, clears or shows the driver's limit of a
//! cgroup. Each prints one JSON object and ends: 0, or 1 with a report in place of the object, or what an abort of
//! llama.cpp gives.
//!
//! Who starts it: a person or a script; `limit` the launcher, as root, before it puts an engine into its group.

use crate::{devices, forecast, limits, nvml};
use agentd_domain::device::Placement;
use agentd_domain::engine::{LoadModel, ModelKind};
use agentd_domain::fault::Report;
use agentd_domain::paths;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(crate) enum Once {
    /// Print what a model file would take, by device and kind.
    Plan(PlanArguments),
    /// Set, clear or print NVIDIA's limit of a cgroup's memory on one device.
    Limit(LimitArguments),
}

#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    file: PathBuf,
    /// An embedding model.
    #[arg(long)]
    embedding: bool,
    /// Cells of the KV cache; without it, what a load without a wish gets.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    context: u32,
    #[arg(long, value_name = "N", default_value_t = 0)]
    sequences: u32,
    /// Where its layers go, the output layer as the last one: `CUDA0:12,CUDA1:9`, the rest to host memory; `host` for all
    /// of it there. Without it llama.cpp decides.
    #[arg(long, value_name = "DEVICE:LAYERS,...")]
    placement: Option<Placement>,
    /// Load it, fill its context, and print what that took instead.
    #[arg(long)]
    real: bool,
    /// The folder with llama.cpp's back ends.
    #[arg(long, value_name = "DIR", default_value = paths::BACKENDS)]
    backends: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct LimitArguments {
    what: What,
    /// The device's id, `GPU-...`.
    #[arg(long, value_name = "UUID")]
    device: String,
    /// The group's folder.
    #[arg(long, value_name = "DIR")]
    cgroup: PathBuf,
    /// The most that its processes get together. For `set`; the share is theirs alone, so the soft limit is the same.
    #[arg(long, value_name = "BYTES", required_if_eq("what", "set"))]
    bytes: Option<u64>,
    #[arg(long, value_name = "PATH", default_value = nvml::LIBRARY)]
    nvml: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Set,
    Clear,
    Get,
}

pub(crate) fn run(once: &Once) -> ExitCode {
    let printed = match once {
        Once::Plan(arguments) => plan_of(arguments),
        Once::Limit(arguments) => limit(arguments).map(|limits| json(&limits)),
    };
    match printed {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(report) => {
            println!("{}", json(&report));
            ExitCode::FAILURE
        }
    }
}

fn plan_of(arguments: &PlanArguments) -> Result<String, Report> {
    let (backend, _) = crate::backends::load(&arguments.backends).map_err(|why| {
        Report::environment("engine_no_backend", "the model was not planned", why, "give --backends")
    })?;
    let path = arguments.file.to_string_lossy().into_owned();
    let request = LoadModel {
        model: arguments.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        path,
        kind: if arguments.embedding { ModelKind::Embedding } else { ModelKind::Chat },
        context_tokens: arguments.context,
        sequences: arguments.sequences,
        placement: arguments.placement.clone(),
    };
    let printed = if arguments.real {
        forecast::measure(&request, devices::physical_cores() as u32).map(|measured| json(&measured))
    } else {
        forecast::plan(&request).map(|plan| json(&plan))
    };
    drop(backend);
    printed
}

fn limit(arguments: &LimitArguments) -> Result<limits::Limits, Report> {
    let asked = || {
        let nvml = limits::library(arguments.nvml.as_os_str())?;
        let limited = limits::Limited::new(&nvml, &arguments.device, &arguments.cgroup)?;
        let bytes = arguments.bytes.unwrap_or(u64::MAX);
        match arguments.what {
            What::Set => limited.set(bytes, bytes),
            What::Clear => limited.clear(),
            What::Get => limited.get(),
        }
    };
    asked().map_err(|error: limits::LimitError| {
        Report::environment(
            "device_limit_failed",
            format!("the limit of {} on {} is not in force", arguments.cgroup.display(), arguments.device),
            error.to_string(),
            "use a partition whose limit the engine keeps, or install a driver that has limits for cgroups",
        )
    })
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
}
