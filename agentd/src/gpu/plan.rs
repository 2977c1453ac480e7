//! What does a model need here, and where does it go?
//!
//! Pure but for nothing: headers and readings in, needs and decisions out.

use agentd_domain::device::{MemoryPlan, PlannedDevice};
use agentd_domain::engine::{Device, GpuReadings, LoadedModel, ModelKind};
use agentd_domain::gguf::{Shape, Summary};
use agentd_domain::ledger::{Basis, DeviceNeed, Enforcement, Fit, ModelPlan, Need, PlanOrder};
use agentd_gpu::ledger::{self, Ledger};
use agentd_gpu::plan::{self, Sizes};

/// Of host memory: the engine wants so much left after a load, for itself and its requests.
const HOST_RESERVE_BYTES: u64 = 32 * 1024 * 1024;
/// Of a GPU: what llama.cpp's own fitting leaves (`--fit-margin`), at most a quarter of a small one.
const GPU_RESERVE_BYTES: u64 = 1024 * 1024 * 1024;

/// What the engine's count calls host memory.
const HOST: &str = "host";

/// A header with how it is to be loaded.
#[derive(Debug, Clone)]
pub struct Planned {
    model: String,
    architecture: String,
    context_length: Option<u64>,
    shape: Shape,
    kind: ModelKind,
    context_tokens: u64,
    sequences: u64,
}

impl Planned {
    /// As it is loaded when nobody says otherwise.
    pub fn of_file(model: &str, summary: &Summary, kind: ModelKind) -> Self {
        Self {
            model: model.to_owned(),
            architecture: summary.architecture.clone(),
            context_length: summary.context_length,
            shape: summary.shape.clone(),
            kind,
            context_tokens: 0,
            sequences: 0,
        }
    }

    pub fn of_loaded(model: &LoadedModel, summary: &Summary) -> Self {
        let (context_tokens, sequences) = (model.context_tokens.into(), model.sequences.into());
        Self { context_tokens, sequences, ..Self::of_file(&model.model, summary, model.kind) }
    }

    pub fn with(self, context_tokens: u32, sequences: u32) -> Self {
        Self { context_tokens: context_tokens.into(), sequences: sequences.into(), ..self }
    }

    pub fn of_order(order: PlanOrder) -> Self {
        Self {
            model: order.model,
            architecture: order.architecture,
            context_length: order.context_length,
            shape: order.shape,
            kind: order.kind,
            context_tokens: order.context_tokens.into(),
            sequences: order.sequences.into(),
        }
    }

    pub fn need(&self, ledger: &Ledger) -> Need {
        self.need_with(ledger, self.context_tokens)
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// The need with the engine's own numbers in the place of the formula's.
    pub fn counted(&self, plan: &MemoryPlan, ledger: &Ledger) -> Need {
        let formula = self.need(ledger);
        let host = ledger.layout().host;
        let part = |on: &PlannedDevice| {
            let on_host = on.device == HOST;
            // Vocabulary, tables, what is kept of cells and rows of logits lie in host memory, whoever computes.
            let beside = if on_host { plan.bytes_on(HOST, 0).saturating_sub(on.sum_bytes()) } else { 0 };
            DeviceNeed {
                device: if on_host { host.clone() } else { on.device.clone() },
                weights_bytes: on.model_bytes,
                kv_bytes: on.context_bytes,
                compute_bytes: on.compute_bytes.saturating_add(beside),
                ..DeviceNeed::default()
            }
        };
        let devices = plan.devices.iter().map(part).filter(|part| part.total_bytes() > 0).collect();
        Need { devices, basis: Basis::Engine, assumed: Vec::new(), ..formula }
    }

    fn need_with(&self, ledger: &Ledger, context_tokens: u64) -> Need {
        let sizes =
            Sizes::of_engine(&self.shape, self.kind, self.context_length, context_tokens, self.sequences);
        plan::need(&self.shape, &self.architecture, &sizes, &ledger.layout(), &|device| {
            ledger.overhead_due(device)
        })
    }

    /// The longest context, up to what the model was trained for, that `fits`.
    pub(super) fn longest(&self, ledger: &Ledger, fits: &dyn Fn(&Need) -> bool) -> u64 {
        let most = self.context_length.unwrap_or(plan::engine::CONTEXT_TOKENS_MOST);
        plan::longest_context(most, &|cells| self.need_with(ledger, cells.max(1)), fits)
    }

    pub fn answer(&self, ledger: &Ledger) -> ModelPlan {
        let need = self.need(ledger);
        let fits = ledger.view(&|_| None).partitions.into_iter().map(|one| {
            let id = one.partition.id;
            let longest = |fits: &dyn Fn(&Need) -> bool| self.longest(ledger, fits);
            let refused = ledger.admit(&self.model, &id, &need, &longest).err();
            Fit {
                context_tokens_most: ledger.longest_alone(&id, &longest),
                bytes: one.partition.bytes,
                free_bytes: one.free_bytes,
                refusal: refused.map(|refusal| refusal.report(&format!("{} does not fit now", self.model))),
                partition: id,
            }
        });
        ModelPlan {
            model: self.model.clone(),
            architecture: self.architecture.clone(),
            context_length: self.context_length,
            fits: fits.collect(),
            need,
        }
    }
}

/// A model whose file cannot be read any more: its size is what is known.
pub(super) fn unknown(model: &LoadedModel, ledger: &Ledger) -> Need {
    let layout = ledger.layout();
    let device = layout.devices.first().map_or(layout.host, |(name, _)| name.clone());
    Need {
        devices: vec![DeviceNeed { device, weights_bytes: model.file_bytes, ..DeviceNeed::default() }],
        basis: Basis::Header,
        kv_bytes_per_cell: 0,
        cells: 0,
        sequences: model.sequences.into(),
        assumed: vec!["its file cannot be read any more: its size is what is known".to_owned()],
    }
}

/// The engine's devices as the ledger counts them.
pub(super) fn devices(devices: &[Device], engine_memory_bytes: u64) -> Vec<ledger::Device> {
    let device = |device: &Device| {
        let host = device.kind == "cpu";
        let total_bytes =
            if host { device.memory_total_bytes.min(engine_memory_bytes) } else { device.memory_total_bytes };
        let reserve = if host { HOST_RESERVE_BYTES } else { GPU_RESERVE_BYTES };
        ledger::Device {
            name: device.name.clone(),
            description: device.description.clone(),
            kind: device.kind.clone(),
            total_bytes,
            reserve_bytes: reserve.min(total_bytes / 4),
            reported_free_bytes: device.memory_free_bytes,
            // Host memory has the engine's cgroup around it. A GPU has a limit only where somebody set one.
            enforcement: if host { Enforcement::Kernel } else { Enforcement::Engine },
            problem: device.gpu.as_ref().and_then(ill),
            gpu: device.gpu.clone(),
        }
    };
    // An accelerator without memory of its own computes in the host's.
    devices.iter().filter(|one| one.memory_total_bytes > 0 && one.kind != "accelerator").map(device).collect()
}

/// Why nothing new goes to a device, by what its driver has told.
fn ill(readings: &GpuReadings) -> Option<String> {
    let health = &readings.health;
    if health.action.takes_work() {
        return None;
    }
    Some(health.sentence().unwrap_or_else(|| health.action.advice().to_owned()))
}

/// What the engine takes of a device: of host memory what is resident, of a GPU what its driver calls used.
pub(super) fn used_bytes(device: &Device, rss_bytes: u64) -> Option<u64> {
    if device.kind == "cpu" {
        return (rss_bytes > 0).then_some(rss_bytes);
    }
    device.gpu.as_ref().and_then(|readings| readings.memory_used_bytes)
}
