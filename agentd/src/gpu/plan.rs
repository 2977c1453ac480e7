//! What does a model need here, and where does it go?
//!
//! Pure but for nothing: headers and readings in, needs and decisions out.

use agentd_domain::device::{MemoryPlan, Placement, PlannedDevice};
use agentd_domain::engine::{Device, GpuReadings, LoadedModel, ModelKind};
use agentd_domain::gguf::{Shape, Summary};
use agentd_domain::ledger::{Basis, DeviceNeed, Enforcement, Fit, ModelPlan, Need, PartitionId, PlanOrder};
use agentd_gpu::ledger::{self, Ledger, When};
use agentd_gpu::place;
use agentd_gpu::plan::{self, Layout, Sizes};
use std::collections::BTreeMap;

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
    /// By device, what the engine counted more than the formula says.
    beyond: Beyond,
}

pub(super) type Beyond = BTreeMap<String, u64>;

/// Whether a part of a model may be computed on the processor where there are devices for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spill {
    Never,
    /// What devices cannot hold, were they empty.
    Allowed,
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
            beyond: Beyond::new(),
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
            beyond: Beyond::new(),
        }
    }

    pub(super) fn beyond(&self) -> &Beyond {
        &self.beyond
    }

    pub(super) fn counting(self, beyond: Beyond) -> Self {
        Self { beyond, ..self }
    }

    /// For the default partition.
    pub fn need(&self, ledger: &Ledger) -> Need {
        self.need_for(ledger, &PartitionId::default_partition())
    }

    fn need_for(&self, ledger: &Ledger, id: &PartitionId) -> Need {
        let layout = self.placed(ledger, id, Spill::Allowed);
        self.need_in(ledger, &layout.unwrap_or_else(|| Layout::host_alone(ledger.host())))
    }

    /// Where it goes for this partition: to the room that devices have now, else to what they have once others are gone.
    pub(super) fn placed(&self, ledger: &Ledger, id: &PartitionId, spill: Spill) -> Option<Layout> {
        if !has_accelerators(ledger) {
            return Some(Layout::host_alone(ledger.host()));
        }
        let (layers, host) = (self.layers(), ledger.host());
        let need = |layout: &Layout| self.need_in(ledger, layout);
        let whole = |when| place::whole(layers, host, &ledger.rooms_for(id, when), &need);
        if let Some(layout) = whole(When::Now).or_else(|| whole(When::Alone)) {
            return Some(layout);
        }
        let rooms = ledger.rooms_for(id, When::Alone);
        // A partition of host memory alone, or what is too large for its devices.
        let may = spill == Spill::Allowed || rooms.is_empty();
        may.then(|| place::spilled(layers, host, &rooms, &need))
    }

    /// What the engine is told; nothing on a machine where there is nothing to choose.
    pub(super) fn placement(layout: &Layout, ledger: &Ledger) -> Option<Placement> {
        has_accelerators(ledger).then(|| layout.placement())
    }

    /// The need of a model that lies there already.
    pub(super) fn need_at(&self, ledger: &Ledger, placement: &Placement) -> Need {
        self.need_in(ledger, &Layout::of_placement(ledger.host(), placement))
    }

    fn layers(&self) -> u32 {
        u32::try_from(self.shape.blocks.len()).unwrap_or(u32::MAX).saturating_add(1)
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// The need with the engine's own numbers in the place of the formula's.
    pub fn counted(&self, plan: &MemoryPlan, ledger: &Ledger) -> Need {
        let formula = self.need_in(ledger, &Layout::host_alone(ledger.host()));
        let host = ledger.host();
        let part = |on: &PlannedDevice| {
            let on_host = on.device == HOST;
            // Vocabulary, tables, what is kept of cells and rows of logits lie in host memory, whoever computes.
            let beside = if on_host { plan.bytes_on(HOST, 0).saturating_sub(on.sum_bytes()) } else { 0 };
            DeviceNeed {
                device: if on_host { host.to_owned() } else { on.device.clone() },
                weights_bytes: on.model_bytes,
                kv_bytes: on.context_bytes,
                compute_bytes: on.compute_bytes.saturating_add(beside),
                ..DeviceNeed::default()
            }
        };
        let devices = plan.devices.iter().map(part).filter(|part| part.total_bytes() > 0).collect();
        Need { devices, basis: Basis::Engine, assumed: Vec::new(), ..formula }
    }

    pub(super) fn need_in(&self, ledger: &Ledger, layout: &Layout) -> Need {
        let sizes = Sizes::of_engine(
            &self.shape,
            self.kind,
            self.context_length,
            self.context_tokens,
            self.sequences,
        );
        let mut need = plan::need(&self.shape, &self.architecture, &sizes, layout, &|device| {
            ledger.overhead_due(device)
        });
        for part in &mut need.devices {
            let more = self.beyond.get(&part.device).copied().unwrap_or(0);
            part.compute_bytes = part.compute_bytes.saturating_add(more);
        }
        let on_host = u64::from(self.layers()).saturating_sub(layout.offloaded.unwrap_or(u64::MAX));
        if on_host > 0 && has_accelerators(ledger) {
            let all = self.layers();
            need.assumed.push(format!(
                "{on_host} of {all} layers are computed on the processor: the devices have no room for more"
            ));
        }
        need
    }

    /// The longest context, up to what the model was trained for, that `fits` a partition which has all to itself. In host
    /// memory are only those parts for which devices have no room in any case.
    pub(super) fn longest(&self, ledger: &Ledger, id: &PartitionId, fits: &dyn Fn(&Need) -> bool) -> u64 {
        let most = self.context_length.unwrap_or(plan::engine::CONTEXT_TOKENS_MOST);
        let least = Self { context_tokens: 1, ..self.clone() };
        let spill = match least.placed(ledger, id, Spill::Never) {
            Some(_) => Spill::Never,
            None => Spill::Allowed,
        };
        let need_of = |cells: u64| {
            let longer = Self { context_tokens: cells.max(1), ..self.clone() };
            let layout = longer.placed(ledger, id, spill);
            // What has no room at all is asked about where it has none.
            let on_first = || Layout {
                host: ledger.host().to_owned(),
                devices: ledger.rooms_for(id, When::Alone).into_iter().take(1).collect(),
                offloaded: None,
            };
            longer.need_in(ledger, &layout.unwrap_or_else(on_first))
        };
        plan::longest_context(most, &need_of, fits)
    }

    pub fn answer(&self, ledger: &Ledger) -> ModelPlan {
        let fits = ledger.view(&|_| None).partitions.into_iter().map(|one| {
            let id = one.partition.id;
            let need = self.need_for(ledger, &id);
            let longest = |fits: &dyn Fn(&Need) -> bool| self.longest(ledger, &id, fits);
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
            need: self.need(ledger),
        }
    }
}

fn is_accelerator(device: &ledger::Device) -> bool {
    matches!(device.kind.as_str(), "gpu" | "igpu")
}

fn has_accelerators(ledger: &Ledger) -> bool {
    ledger.devices().iter().any(is_accelerator)
}

/// A model whose file cannot be read any more: its size is what is known.
pub(super) fn unknown(model: &LoadedModel, ledger: &Ledger) -> Need {
    let accelerator = ledger.devices().iter().find(|device| is_accelerator(device));
    let device = accelerator.map_or_else(|| ledger.host().to_owned(), |device| device.name.clone());
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
