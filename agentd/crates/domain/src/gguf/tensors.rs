//! Does every tensor lie inside the file, one after the other?

use super::GgufError;
use super::cursor::Cursor;
use super::metadata::MAX_LAYERS;
use std::collections::HashSet;

/// `GGML_MAX_NAME` less its final zero byte.
const MAX_NAME_BYTES: u64 = 63;
/// `GGML_MAX_DIMS`.
const MAX_DIMENSIONS: u32 = 4;
/// No tensor of a real model comes near: the largest has about 2^33 elements.
const MAX_ELEMENTS: u64 = 1 << 40;

#[derive(Default)]
pub(super) struct Tensors {
    pub(super) count: u64,
    pub(super) elements: u64,
    pub(super) bytes: u64,
    /// By the number in `blk.<number>.`; at most [`MAX_LAYERS`].
    pub(super) blocks: Vec<BlockTensors>,
    pub(super) input_bytes: u64,
    pub(super) output_bytes: u64,
    pub(super) other_bytes: u64,
    pub(super) token_embedding_bytes: u64,
    pub(super) token_embedding_type: u32,
    /// Whether the output has weights of its own.
    pub(super) has_output: bool,
}

/// The tensors of one block.
#[derive(Clone, Copy, Default)]
pub(super) struct BlockTensors {
    pub(super) bytes: u64,
    attention: bool,
    fused: bool,
    pub(super) recurrent: bool,
}

/// Parts of tensors' names that only layers with keys and values have, and only recurrent ones.
/// Source: `LLM_TENSOR_NAMES` in `src/llama-arch.cpp`.
const ATTENTION: [&str; 4] = ["attn_k.", "attn_kv_a_mqa.", "attn_kv_a.", "attn_kv."];
/// In a recurrent layer these make its own rows.
const ATTENTION_UNLESS_RECURRENT: &str = "attn_qkv.";
const RECURRENT: [&str; 3] = ["ssm_", "time_mix_", "shortconv."];
/// Tensors of the input and of the output layer. Source: `LLM_TENSOR_INFOS`, same file.
const INPUT: [&str; 6] = [
    "token_embd.weight",
    "position_embd.weight",
    "token_types.weight",
    "per_layer_token_embd.weight",
    "token_embd_norm.weight",
    "token_embd_norm.bias",
];
const OUTPUT: [&str; 3] = ["output.", "output_norm.", "cls."];

struct Tensor {
    name: String,
    kind: u32,
    elements: u64,
    bytes: u64,
}

/// Reads the tensor table at the cursor and checks that the data it describes is there.
pub(super) fn read(cursor: &mut Cursor<'_>, count: u64, alignment: u64) -> Result<Tensors, GgufError> {
    let mut names = HashSet::new();
    let mut table = Vec::new();
    let mut expected_offset: u64 = 0;
    for _ in 0..count {
        let at = cursor.position();
        let tensor = read_one(cursor, expected_offset)?;
        expected_offset = padded(expected_offset.saturating_add(tensor.bytes), alignment);
        if !names.insert(tensor.name.clone()) {
            return Err(corrupt(at, format!("tensor `{}` is there twice", tensor.name)));
        }
        table.push(tensor);
    }
    let data_start = padded(cursor.position(), alignment);
    let mut offset: u64 = 0;
    for tensor in &table {
        let needs_bytes = data_start.saturating_add(offset).saturating_add(tensor.bytes);
        if needs_bytes > cursor.file_bytes() {
            let what = format!("tensor `{}`", tensor.name);
            return Err(GgufError::Truncated { what, needs_bytes, has_bytes: cursor.file_bytes() });
        }
        offset = padded(offset.saturating_add(tensor.bytes), alignment);
    }
    let mut tensors = Tensors { count, ..Tensors::default() };
    table.iter().for_each(|tensor| tensors.add(tensor));
    Ok(tensors)
}

impl Tensors {
    fn add(&mut self, tensor: &Tensor) {
        let name = tensor.name.as_str();
        self.elements = self.elements.saturating_add(tensor.elements);
        self.bytes = self.bytes.saturating_add(tensor.bytes);
        if let Some((index, rest)) = block_of(name) {
            if self.blocks.len() <= index {
                self.blocks.resize(index + 1, BlockTensors::default());
            }
            if let Some(block) = self.blocks.get_mut(index) {
                block.add(rest, tensor.bytes);
            }
            return;
        }
        if name == "token_embd.weight" {
            self.token_embedding_bytes = tensor.bytes;
            self.token_embedding_type = tensor.kind;
        }
        self.has_output |= name == "output.weight";
        let place = if INPUT.contains(&name) {
            &mut self.input_bytes
        } else if OUTPUT.iter().any(|start| name.starts_with(start)) {
            &mut self.output_bytes
        } else {
            &mut self.other_bytes
        };
        *place = place.saturating_add(tensor.bytes);
    }
}

impl BlockTensors {
    /// Whether it makes keys and values. Order of the tensors does not matter.
    pub(super) fn attends(self) -> bool {
        self.attention || (self.fused && !self.recurrent)
    }

    fn add(&mut self, name: &str, bytes: u64) {
        let is = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
        self.bytes = self.bytes.saturating_add(bytes);
        self.recurrent |= is(&RECURRENT);
        self.attention |= is(&ATTENTION);
        self.fused |= is(&[ATTENTION_UNLESS_RECURRENT]);
    }
}

/// `blk.12.attn_k.weight` is `attn_k.weight` of block 12.
fn block_of(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let index = number.parse::<usize>().ok()?;
    ((index as u64) < MAX_LAYERS).then_some((index, rest))
}

fn read_one(cursor: &mut Cursor<'_>, expected_offset: u64) -> Result<Tensor, GgufError> {
    let at = cursor.position();
    let name = cursor.string("a tensor's name", MAX_NAME_BYTES)?;
    let dimensions = cursor.u32("a tensor's number of dimensions")?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(corrupt(at, format!("tensor `{name}` has {dimensions} dimensions")));
    }
    let mut elements: u64 = 1;
    let mut row: u64 = 0;
    for index in 0..dimensions {
        let size = cursor.u64("a tensor's dimension")?;
        if index == 0 {
            row = size;
        }
        elements = elements.saturating_mul(size);
        if size == 0 || elements > MAX_ELEMENTS {
            return Err(corrupt(at, format!("tensor `{name}` has a dimension of {size}")));
        }
    }
    let kind = cursor.u32("a tensor's type")?;
    let Some((block_elements, block_bytes)) = block(kind) else {
        return Err(corrupt(at, format!("tensor `{name}` has the unknown type {kind}")));
    };
    if !row.is_multiple_of(block_elements) {
        let what =
            format!("tensor `{name}` has rows of {row}, not a multiple of its type's {block_elements}");
        return Err(corrupt(at, what));
    }
    let offset = cursor.u64("a tensor's offset")?;
    if offset != expected_offset {
        let what = format!("tensor `{name}` is at offset {offset}, expected {expected_offset}");
        return Err(corrupt(at, what));
    }
    // No overflow: at most 2^40 elements of at most 8 bytes.
    Ok(Tensor { name, kind, elements, bytes: elements / block_elements * block_bytes })
}

fn corrupt(at: u64, what: String) -> GgufError {
    GgufError::Corrupt { at, what }
}

/// The next multiple of `alignment`, a power of two.
fn padded(offset: u64, alignment: u64) -> u64 {
    offset.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
}

/// Elements and bytes of one block of a `ggml_type`. Numbers that are missing were removed upstream.
/// Source: `ggml/include/ggml.h` and the static assertions of `ggml/src/ggml-common.h`.
fn block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 | 26 => (1, 4),      // F32, I32
        1 | 25 | 30 => (1, 2), // F16, I16, BF16
        2 => (32, 18),         // Q4_0
        3 => (32, 20),         // Q4_1
        6 => (32, 22),         // Q5_0
        7 => (32, 24),         // Q5_1
        8 => (32, 34),         // Q8_0
        9 => (32, 36),         // Q8_1
        10 => (256, 84),       // Q2_K
        11 => (256, 110),      // Q3_K
        12 => (256, 144),      // Q4_K
        13 => (256, 176),      // Q5_K
        14 => (256, 210),      // Q6_K
        15 => (256, 292),      // Q8_K
        16 => (256, 66),       // IQ2_XXS
        17 => (256, 74),       // IQ2_XS
        18 => (256, 98),       // IQ3_XXS
        19 => (256, 50),       // IQ1_S
        20 => (32, 18),        // IQ4_NL
        21 => (256, 110),      // IQ3_S
        22 => (256, 82),       // IQ2_S
        23 => (256, 136),      // IQ4_XS
        24 => (1, 1),          // I8
        27 | 28 => (1, 8),     // I64, F64
        29 => (256, 56),       // IQ1_M
        34 => (256, 54),       // TQ1_0
        35 => (256, 66),       // TQ2_0
        39 => (32, 17),        // MXFP4
        40 => (64, 36),        // NVFP4
        41 => (128, 18),       // Q1_0
        42 => (64, 18),        // Q2_0
        _ => return None,
    })
}
