//! What will a model take, before it takes it?
//!
//! In:     a request to load, as for a real load.
//! Out:    bytes by device and kind, counted by llama.cpp with the parameters that the load would have.
//! Always: the header is checked in Rust first, as for a load.
//!         A model whose cache cannot be shared shows that only when it is loaded: its load has fewer sequence ids
//!         than its plan, and takes less.
//! Where:  in a process that has nothing to lose. llama.cpp answers a file whose content lies with `abort()`, and no
//!         handler brings a process back from that.

use crate::ggml::{Allocation, Buffer, Memory, Split};
use crate::model::{self, Settings};
use crate::{chat, devices, embed};
use agentd_domain::device::{MemoryMeasured, MemoryPlan, PlannedDevice};
use agentd_domain::engine::{LoadModel, ModelKind};
use agentd_domain::fault::Report;
use agentd_domain::gguf::{self, Summary};
use llama_cpp_2::LlamaBackendDeviceType;
use llama_cpp_2::context::params::LlamaContextParams;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A row of logits has one of these for each token of the vocabulary.
const LOGIT_BYTES: u64 = 4;

/// llama.cpp keeps two ordered sets of the cells in use (src/llama-kv-cells.h: `used` and `seq_pos`), with a node of 40
/// bytes each, for which the allocator takes 48.
const CELL_BYTES: u64 = 2 * 48;

pub(crate) fn plan(request: &LoadModel) -> Result<MemoryPlan, Report> {
    let (summary, settings, parameters) = examine(request)?;
    let split = model::split(request, &summary)?;
    let before = devices::anonymous_bytes();
    let memory = open(request, split.as_ref(), settings, &parameters, Allocation::Counted)?;
    let grown_bytes = devices::anonymous_bytes().saturating_sub(before);
    let row_bytes = u64::from(memory.vocabulary()) * LOGIT_BYTES;
    // llama.cpp makes these at once, also where nothing else is taken.
    let rows_least = u64::from(parameters.n_seq_max());
    Ok(MemoryPlan {
        path: request.path.clone(),
        architecture: summary.architecture,
        context_tokens: tokens(request, &parameters),
        sequences: settings.sequences,
        devices: named(memory.buffers()),
        placement: request.placement.clone(),
        row_bytes,
        rows_least,
        overhead_bytes: grown_bytes.saturating_sub(rows_least * row_bytes),
        cells_bytes: match request.kind {
            ModelKind::Chat => u64::from(tokens(request, &parameters)) * CELL_BYTES,
            ModelKind::Embedding => 0,
        },
    })
}

/// Loads it without mapping its file, fills its context and says what that took: what plans are compared with. Only in
/// a process that has loaded nothing before, whose memory grows by this alone.
pub(crate) fn measure(request: &LoadModel, threads: u32) -> Result<MemoryMeasured, Report> {
    let (summary, settings, parameters) = examine(request)?;
    let split = model::split(request, &summary)?;
    let threads = i32::try_from(threads).unwrap_or(1);
    let parameters = parameters.with_n_threads(threads).with_n_threads_batch(threads);
    let before = devices::anonymous_bytes();
    let mut memory = open(request, split.as_ref(), settings, &parameters, Allocation::Taken)?;
    let rows = memory.fill(tokens(request, &parameters)).map_err(|why| refused(request, &why))?;
    let grown_bytes = devices::anonymous_bytes().saturating_sub(before);
    Ok(MemoryMeasured { devices: named(memory.buffers()), rows, grown_bytes })
}

/// The checks and parameters of a load.
fn examine(request: &LoadModel) -> Result<(Summary, Settings, LlamaContextParams), Report> {
    let (file, file_bytes) = model::open(Path::new(&request.path))?;
    let summary = gguf::check(file_bytes, &mut |at, into| {
        file.read_exact_at(into, at).map_err(|error| error.to_string())
    })
    .map_err(|error| error.report(&request.path))?;
    model::check_kind(request, &summary)?;
    let settings = model::sizes(request, &summary);
    let parameters = match request.kind {
        ModelKind::Chat => chat::parameters(settings),
        ModelKind::Embedding => embed::parameters(settings, summary.pooling_type),
    };
    Ok((summary, settings, parameters))
}

/// Cells of the KV cache; for an embedding model, the tokens of one text.
fn tokens(request: &LoadModel, parameters: &LlamaContextParams) -> u32 {
    match request.kind {
        ModelKind::Chat => parameters.n_ctx().map_or(0, std::num::NonZeroU32::get),
        ModelKind::Embedding => parameters.n_ubatch(),
    }
}

fn open(
    request: &LoadModel,
    split: Option<&Split>,
    settings: Settings,
    parameters: &LlamaContextParams,
    allocation: Allocation,
) -> Result<Memory, Report> {
    let _older = crate::logging::take_error();
    let outputs = match request.kind {
        ModelKind::Chat => chat::outputs(settings),
        ModelKind::Embedding => 0,
    };
    Memory::open(Path::new(&request.path), split, parameters, outputs, allocation).map_err(|why| {
        let why = crate::logging::take_error().map_or_else(|| why.clone(), |error| format!("{why}: {error}"));
        refused(request, &why)
    })
}

fn refused(request: &LoadModel, why: &str) -> Report {
    Report::caller(
        "model_refused",
        format!("the model {} was not planned", request.model),
        why,
        "take a model of an architecture that llama.cpp knows, a smaller context, or fetch the file again",
    )
}

/// Host memory, and those devices that have something of it.
fn named(buffers: Vec<Buffer>) -> Vec<PlannedDevice> {
    let known = llama_cpp_2::list_llama_ggml_backend_devices();
    let planned = |buffer: Buffer| {
        let device = usize::try_from(buffer.device).ok()?.checked_sub(1).and_then(|index| known.get(index));
        let on_host = device.is_none_or(|device| matches!(device.device_type, LlamaBackendDeviceType::Cpu));
        let (total, free) = match device {
            Some(device) if !on_host => (device.memory_total as u64, device.memory_free as u64),
            _ => devices::host_memory().unwrap_or((0, 0)),
        };
        let name = if on_host { "host".to_owned() } else { device?.name.clone() };
        Some(PlannedDevice {
            device: name,
            memory_total_bytes: total,
            memory_free_bytes: free,
            model_bytes: buffer.model_bytes,
            context_bytes: buffer.context_bytes,
            compute_bytes: buffer.compute_bytes,
        })
    };
    let host = buffers.iter().filter(|buffer| buffer.device == 0);
    let others = buffers.iter().filter(|buffer| {
        buffer.device != 0 && buffer.model_bytes + buffer.context_bytes + buffer.compute_bytes > 0
    });
    host.chain(others).copied().filter_map(planned).collect()
}
