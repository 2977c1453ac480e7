//! What does a GGUF file need, device by device, before anybody opens it with llama.cpp?
//!
//! In:    the header's [`Shape`], how the engine will make its context ([`Sizes`]), where layers go ([`Layout`]).
//! Out:   a [`Need`] whose weights, cache and states are llama.cpp's own arithmetic, and whose room for computing is an
//!        upper estimate: the real one is the peak of a graph that only llama.cpp lays out. The engine's breakdown
//!        replaces it ([`Basis::Engine`]).
//! Always: what the header leaves open is counted as the larger, and named in `assumed`; no arithmetic overflows,
//!        whatever numbers a hostile header holds.
//! Source: llama.cpp as vendored in `llama-cpp-sys-2` 0.1.161; each function names its file.

mod architecture;
#[cfg(test)]
mod tests;

use agentd_domain::device::{Placement, Stretch};
use agentd_domain::engine::ModelKind;
use agentd_domain::gguf::{Block, Shape};
use agentd_domain::ledger::{BLOCK_CELLS, Basis, DeviceNeed, Need};
use architecture::Attention;

/// The type of numbers in the cache of keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    F32,
    F16,
    Q8_0,
    Q4_0,
}

impl Cache {
    /// `ggml_row_size`: blocks of 32 numbers where it is quantised. A row that is no multiple is refused by llama.cpp.
    pub fn row_bytes(self, numbers: u64) -> u64 {
        let blocks = numbers.div_ceil(32);
        match self {
            Self::F32 => numbers.saturating_mul(4),
            Self::F16 => numbers.saturating_mul(2),
            Self::Q8_0 => blocks.saturating_mul(34),
            Self::Q4_0 => blocks.saturating_mul(18),
        }
    }
}

/// How the engine makes a model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    pub kind: ModelKind,
    /// `n_ctx`: cells of all sequences together.
    pub cells: u64,
    /// Sequences that work at once.
    pub sequences: u64,
    /// `n_seq_max`: ids also for those that stepped aside and for what is cached.
    pub ids: u64,
    /// `n_ubatch`
    pub batch_tokens: u64,
    /// Rows of logits that the graph is laid out for (`n_outputs_max`), and that are kept at once.
    pub outputs: u64,
    pub outputs_kept: u64,
    pub key: Cache,
    pub value: Cache,
    pub flash_attention: bool,
    /// One pool of cells for all sequences (`kv_unified`).
    pub unified: bool,
    /// Layers with a window keep as many cells as the others (`swa_full`, on in llama.cpp's C interface).
    pub full_windows: bool,
}

/// What the engine takes when a request says nothing, and the bounds of what it takes: its own numbers, so that what is
/// planned here is what it does.
pub mod engine {
    pub const CONTEXT_TOKENS: u64 = 4096;
    pub const SEQUENCES: u64 = 8;
    /// `LLAMA_MAX_SEQ` of llama.cpp is 256; more than this slows everybody on any machine this is for.
    pub const SEQUENCES_MOST: u64 = 64;
    pub const CONTEXT_TOKENS_LEAST: u64 = 64;
    /// Longer contexts than any model has; bounds what a request can make llama.cpp allocate.
    pub const CONTEXT_TOKENS_MOST: u64 = 4 * 1024 * 1024;
    pub const BATCH_TOKENS: u64 = 512;
    /// llama.cpp reserves logits for every sequence id: ids beyond what running requests need may cost so much.
    pub const OUTPUT_BYTES: u64 = 32 * 1024 * 1024;
    pub const IDS_MOST: u64 = 128;
    /// Of a model whose cache is shared: one sequence has so many.
    pub const IDS_LEAST: u64 = 32;
    pub const EMBED_BATCH_TOKENS: u64 = 512;
    pub const EMBED_SEQUENCES: u64 = 16;
    /// A cache in 32-bit numbers up to this size. 16-bit numbers would halve it, but a small model's cache is small, and
    /// exactness makes its results comparable with a reference.
    pub const EXACT_CACHE_BYTES: u64 = 32 * 1024 * 1024;

    /// Sequence ids: for who works, who stepped aside, what is cached, and one that copies go through. A power of two, so
    /// that a batch divides evenly among them where llama.cpp reserves its memory.
    pub fn ids(sequences: u64, vocabulary: u64) -> u64 {
        let mut ids = (2 * sequences + 16).next_power_of_two();
        while ids < IDS_MOST && (2 * ids).saturating_mul(vocabulary).saturating_mul(4) <= OUTPUT_BYTES {
            ids *= 2;
        }
        ids
    }
}

impl Sizes {
    /// As the engine decides today; 0 of a number takes its default.
    pub fn of_engine(
        shape: &Shape,
        kind: ModelKind,
        context_length: Option<u64>,
        context_tokens: u64,
        sequences: u64,
    ) -> Self {
        if kind == ModelKind::Embedding {
            return Self {
                kind,
                cells: engine::EMBED_BATCH_TOKENS,
                sequences: engine::EMBED_SEQUENCES,
                ids: engine::EMBED_SEQUENCES,
                batch_tokens: engine::EMBED_BATCH_TOKENS,
                outputs: engine::EMBED_BATCH_TOKENS,
                outputs_kept: engine::EMBED_BATCH_TOKENS,
                key: Cache::F16,
                value: Cache::F16,
                flash_attention: true,
                unified: true,
                full_windows: true,
            };
        }
        let cells = match context_tokens {
            0 => context_length.unwrap_or(engine::CONTEXT_TOKENS).min(engine::CONTEXT_TOKENS),
            wanted => wanted.clamp(engine::CONTEXT_TOKENS_LEAST, engine::CONTEXT_TOKENS_MOST),
        };
        let sequences = match sequences {
            0 => engine::SEQUENCES,
            wanted => wanted.min(engine::SEQUENCES_MOST),
        };
        // A cache that cannot be cut at any token is not shared, and needs no ids for that.
        let shared = !shape.blocks.iter().any(|block| block.recurrent)
            && shape.window_tokens.unwrap_or(0) == 0
            && shape.index_length == 0;
        let ids = if shared { engine::ids(sequences, shape.vocabulary) } else { sequences };
        let widest = [2, shape.embedding_length, shape.blocks.len() as u64, cells, 4]
            .into_iter()
            .fold(1, u64::saturating_mul);
        let exact = widest <= engine::EXACT_CACHE_BYTES;
        let cache = if exact { Cache::F32 } else { Cache::F16 };
        Self {
            kind,
            cells,
            sequences,
            ids,
            batch_tokens: engine::BATCH_TOKENS,
            outputs: ids,
            outputs_kept: ids,
            key: cache,
            value: cache,
            flash_attention: !exact,
            unified: true,
            full_windows: true,
        }
    }

    /// `n_ctx` as llama.cpp pads it, and of one stream (`llama-context.cpp`, constructor).
    fn padded(self) -> (u64, u64) {
        let pad = |cells: u64| cells.checked_next_multiple_of(BLOCK_CELLS).unwrap_or(u64::MAX);
        let cells = pad(self.cells.max(1));
        if self.unified {
            return (cells, cells);
        }
        let each = pad((cells / self.ids.max(1)).max(1));
        (each.saturating_mul(self.ids.max(1)), each)
    }
}

/// Where layers go: the last `offloaded` of the blocks and the output layer to the devices, the rest to host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// llama.cpp's name of host memory.
    pub host: String,
    /// In llama.cpp's order, each with its share: free bytes unless somebody says otherwise (`tensor_split`).
    pub devices: Vec<(String, u64)>,
    /// `n_gpu_layers`; absent for all.
    pub offloaded: Option<u64>,
}

impl Layout {
    pub fn host_alone(host: &str) -> Self {
        Self { host: host.to_owned(), devices: Vec::new(), offloaded: None }
    }

    pub fn of_placement(host: &str, placement: &Placement) -> Self {
        let stretches = placement.stretches.iter();
        Self {
            host: host.to_owned(),
            devices: stretches.map(|one| (one.device.clone(), one.layers.into())).collect(),
            offloaded: Some(placement.layers().into()),
        }
    }

    /// Where shares are numbers of layers, as [`crate::place`] makes them.
    pub fn placement(&self) -> Placement {
        let stretch = |(device, layers): &(String, u64)| Stretch {
            device: device.clone(),
            layers: u32::try_from(*layers).unwrap_or(u32::MAX),
        };
        Placement { stretches: self.devices.iter().map(stretch).collect() }
    }

    fn name(&self, place: usize) -> &str {
        match place {
            0 => &self.host,
            _ => self.devices.get(place - 1).map_or(self.host.as_str(), |(name, _)| name),
        }
    }

    /// For each block and, last, for the output layer: 0 for the host, n for the n-th device. `load_tensors` in
    /// `llama-model.cpp`, with its 32-bit fractions: another rounding would put a layer elsewhere.
    fn places(&self, blocks: usize) -> Vec<usize> {
        let units = blocks + 1;
        let wanted = self.offloaded.map_or(units, |count| usize::try_from(count).unwrap_or(units).min(units));
        let offloaded = if self.devices.is_empty() { 0 } else { wanted };
        let first = units - offloaded;
        let mut sum = 0.0_f32;
        let mut ends: Vec<f32> = self
            .devices
            .iter()
            .map(|(_, share)| {
                sum += *share as f32;
                sum
            })
            .collect();
        if sum > 0.0 {
            ends.iter_mut().for_each(|end| *end /= sum);
        }
        let place = |unit: usize| {
            if unit < first || offloaded == 0 {
                return 0;
            }
            let at = (unit - first) as f32 / offloaded as f32;
            let device = ends.iter().take_while(|end| **end <= at).count();
            1 + device.min(self.devices.len().saturating_sub(1))
        };
        (0..units).map(place).collect()
    }
}

/// Bytes that a buffer's alignment may cost each tensor (128 on CUDA, less elsewhere).
const ALIGNMENT_BYTES: u64 = 128;

/// `ggml_type`s that the CPU back end keeps in another order on x86-64 with AVX2 (`repack.cpp`): a copy of its own of
/// what is read in the file's order as well.
const REPACKED: [u32; 4] = [2, 12, 20, 39];

/// The need of a model. `overhead` is what the ledger has learned for a device and would have to be paid now.
pub fn need(
    shape: &Shape,
    architecture: &str,
    sizes: &Sizes,
    layout: &Layout,
    overhead: &dyn Fn(&str) -> u64,
) -> Need {
    let attention = architecture::attention(shape, architecture, sizes);
    let places = layout.places(shape.blocks.len());
    let output_place = places.last().copied().unwrap_or(0);
    let mut parts = vec![DeviceNeed::default(); layout.devices.len() + 1];
    let mut add = |place: usize, change: &dyn Fn(&mut DeviceNeed)| {
        if let Some(part) = parts.get_mut(place) {
            change(part);
        }
    };
    let (cells, stream_cells) = sizes.padded();
    let streams = cells.checked_div(stream_cells).unwrap_or(1).max(1);
    let window_cells = window_cells(&attention, sizes, stream_cells).saturating_mul(streams);
    let mut kv_bytes_per_cell: u64 = 0;
    for (index, block) in shape.blocks.iter().enumerate() {
        let place = places.get(index).copied().unwrap_or(0);
        let row = row_bytes(shape, block, index, &attention, sizes);
        let windowed = attention.windowed(index);
        let kept = if windowed { window_cells } else { cells };
        if !windowed {
            kv_bytes_per_cell = kv_bytes_per_cell.saturating_add(row);
        }
        let state = state_bytes(shape, block, sizes);
        add(place, &|part| {
            plus(&mut part.weights_bytes, block.tensor_bytes);
            plus(&mut part.kv_bytes, row.saturating_mul(kept));
            plus(&mut part.recurrent_bytes, state);
        });
    }
    let mut assumed = attention.assumed.clone();
    add(0, &|part| plus(&mut part.weights_bytes, shape.input_bytes));
    let doubled =
        attention.generates && (output_place != 0 || REPACKED.contains(&shape.token_embedding_type));
    if doubled && output_place == 0 && shape.tied_output_bytes > 0 {
        assumed.push("the processor keeps a second copy of the token embeddings in another order".to_owned());
    }
    let tied = if doubled { shape.tied_output_bytes } else { 0 };
    let output = shape.output_bytes.saturating_add(tied).saturating_add(shape.other_bytes);
    add(output_place, &|part| plus(&mut part.weights_bytes, output));

    // Small beside the rest; where a device's tensors are few it is a little too much.
    let used: Vec<bool> = (0..parts.len()).map(|place| places.contains(&place)).collect();
    for (place, part) in parts.iter_mut().enumerate() {
        let has_layers = used.get(place).copied().unwrap_or(false);
        if part.weights_bytes > 0 {
            plus(&mut part.weights_bytes, shape.tensors.saturating_mul(ALIGNMENT_BYTES));
        }
        part.compute_bytes = compute_bytes(
            shape,
            sizes,
            &attention,
            cells,
            Work { layers: has_layers, output: place == output_place, host: place == 0 },
        );
        part.device = layout.name(place).to_owned();
    }
    for part in &mut parts {
        if part.total_bytes() > 0 {
            part.overhead_bytes = overhead(&part.device);
        }
    }
    Need {
        devices: parts.into_iter().filter(|part| part.total_bytes() > 0).collect(),
        basis: Basis::Header,
        kv_bytes_per_cell,
        cells: if attention.keeps { cells } else { 0 },
        sequences: sizes.sequences,
        assumed,
    }
}

/// The longest context, in tokens of all sequences together, whose need `fits` calls good; 0 when none is. `need_of`
/// must grow with its argument.
pub fn longest_context(most: u64, need_of: &dyn Fn(u64) -> Need, fits: &dyn Fn(&Need) -> bool) -> u64 {
    let blocks = most.min(engine::CONTEXT_TOKENS_MOST) / BLOCK_CELLS;
    // Invariant: `low` fits (0 as nothing), `high` does not.
    let (mut low, mut high) = (0, blocks + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(&need_of(middle * BLOCK_CELLS)) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low * BLOCK_CELLS
}

/// Bytes of one cell in one block. Constructor in `llama-kv-cache.cpp`; the index rows of sparse attention:
/// `llama-kv-cache-dsa.cpp`.
fn row_bytes(shape: &Shape, block: &Block, index: usize, attention: &Attention, sizes: &Sizes) -> u64 {
    if !attention.keeps_kv(block, index) {
        return 0;
    }
    let (key, value) = if attention.windowed(index) {
        (shape.key_length_window, shape.value_length_window)
    } else {
        (shape.key_length, shape.value_length)
    };
    let keys = sizes.key.row_bytes(key.saturating_mul(block.kv_heads));
    let values =
        if shape.latent_attention { 0 } else { sizes.value.row_bytes(value.saturating_mul(block.kv_heads)) };
    let indices = sizes.key.row_bytes(shape.index_length);
    keys.saturating_add(values).saturating_add(indices)
}

/// Cells of one stream in a layer with a window. `llama-kv-cache-iswa.cpp`, constructor.
fn window_cells(attention: &Attention, sizes: &Sizes, stream_cells: u64) -> u64 {
    if sizes.full_windows {
        return stream_cells;
    }
    let windows = if sizes.unified { sizes.ids } else { 1 };
    let seen = attention.window_tokens.saturating_mul(windows).saturating_add(sizes.batch_tokens);
    stream_cells.min(seen).checked_next_multiple_of(BLOCK_CELLS).unwrap_or(u64::MAX)
}

/// States of all sequences in one recurrent block, in 32-bit numbers. `llama-memory-recurrent.cpp`, constructor.
fn state_bytes(shape: &Shape, block: &Block, sizes: &Sizes) -> u64 {
    if !block.recurrent {
        return 0;
    }
    let numbers = shape.recurrent_convolution.saturating_add(shape.recurrent_state);
    numbers.saturating_mul(4).saturating_mul(sizes.ids.max(1))
}

/// What is computed on one device.
struct Work {
    layers: bool,
    output: bool,
    host: bool,
}

/// The larger of what attention, the feed-forward part and the output keep at once, beside what lives through all of
/// them. Upper estimate: ggml reuses some of it.
fn compute_bytes(shape: &Shape, sizes: &Sizes, attention: &Attention, cells: u64, work: Work) -> u64 {
    let product = |factors: &[u64]| factors.iter().copied().fold(1, u64::saturating_mul);
    let sum = |terms: &[u64]| terms.iter().copied().fold(0, u64::saturating_add);
    let most = |of: &dyn Fn(&Block) -> u64| shape.blocks.iter().map(of).max().unwrap_or(0);
    let tokens = sizes.batch_tokens.min(cells);
    let width = shape.embedding_length;
    let heads = most(&|block| block.heads);
    let kv_heads = most(&|block| block.kv_heads);
    let seen = if attention.keeps { cells } else { tokens };
    // Embeddings of the tokens on their way in; a mask of what each token sees, in
    // 16 bits for flash attention (`build_kq_mask` in `llama-graph.cpp`).
    let mask = product(&[seen, tokens, if sizes.flash_attention { 2 } else { 4 }]);
    let arriving = sum(&[product(&[tokens, width, 4]), product(&[tokens, 64])]);
    // Without flash attention values lie across: each number of them has a place of its own, in 64 bits
    // (`build_input_v_idxs` in `llama-kv-cache.cpp`).
    let widest_value = product(&[kv_heads, shape.value_length]);
    let places =
        if sizes.flash_attention || !attention.keeps { 0 } else { product(&[tokens, widest_value, 8]) };
    let mut total: u64 = 0;
    if work.host {
        total = sum(&[total, arriving]);
        // The rows that are read afterwards lie in host memory, wherever they were made; there is room for logits even
        // where a model makes none (`output_reserve` in `llama-context.cpp`).
        let vector = if sizes.kind == ModelKind::Embedding { width } else { 0 };
        total = sum(&[total, product(&[sizes.outputs_kept, sum(&[shape.vocabulary, vector]), 4])]);
    }
    if work.layers {
        let scores = if sizes.flash_attention { 0 } else { product(&[tokens, seen, heads, 4]) };
        let vectors = product(&[
            tokens,
            sum(&[
                product(&[heads, sum(&[shape.key_length, product(&[2, shape.value_length])])]),
                product(&[kv_heads, sum(&[shape.key_length, shape.value_length])]),
            ]),
            4,
        ]);
        let attending = sum(&[scores, vectors]);
        let dense = product(&[tokens, most(&|block| block.feed_forward_length), 3, 4]);
        let routed = product(&[
            tokens,
            sum(&[
                product(&[
                    shape.experts_used,
                    sum(&[product(&[3, shape.expert_feed_forward_length]), product(&[2, width])]),
                ]),
                product(&[3, shape.experts]),
            ]),
            4,
        ]);
        let state = sum(&[shape.recurrent_convolution, shape.recurrent_state]);
        let recurring = if shape.blocks.iter().any(|block| block.recurrent) {
            sum(&[
                product(&[sizes.ids, state, 2, 4]),
                product(&[tokens, sum(&[width, shape.recurrent_convolution]), 8, 4]),
            ])
        } else {
            0
        };
        let outgoing = if work.output && attention.generates {
            product(&[sizes.outputs.min(tokens), sum(&[shape.vocabulary, product(&[2, width])]), 4])
        } else {
            0
        };
        let peak = [attending, sum(&[dense, routed]), recurring, outgoing].into_iter().max().unwrap_or(0);
        // Four vectors per token live on beside it: the residual, its norm, what was added last, what comes next.
        total = sum(&[total, mask, places, product(&[tokens, width, 4, 4]), peak]);
    }
    total
}

fn plus(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}
