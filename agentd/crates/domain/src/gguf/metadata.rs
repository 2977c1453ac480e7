//! What do the file's keys say, and are the values that llama.cpp relies on within bounds?

use super::GgufError;
use super::cursor::Cursor;
use super::shape::{Block, Shape, WindowPattern};
use super::tensors::Tensors;
use crate::engine::ModelKind;
use std::collections::{HashMap, HashSet};

const MAX_KEY_BYTES: u64 = 256;
/// Chat templates are the longest strings that are kept; the longest known has about 20 kB.
const MAX_STRING_BYTES: u64 = 1024 * 1024;
/// The largest vocabularies have about 300,000 tokens and as many merges.
const MAX_ARRAY_ELEMENTS: u64 = 4 * 1024 * 1024;
/// `general.alignment`, when the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// `LLAMA_MAX_LAYERS` of llama.cpp.
pub(super) const MAX_LAYERS: u64 = 512;
/// Keys that may hold one number for each layer; of all other arrays no element is kept.
const PER_LAYER: [&str; 6] = [
    ".attention.head_count",
    ".attention.head_count_kv",
    ".attention.sliding_window_pattern",
    ".feed_forward_length",
    ".expert_feed_forward_length",
    ".expert_used_count",
];

/// What is worth knowing of a model before it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub version: u32,
    /// `general.architecture`: `llama`, `qwen3`, `bert`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// `general.license`, as the file says.
    pub license: Option<String>,
    /// Elements of all tensors together.
    pub parameters: u64,
    pub tensor_bytes: u64,
    /// Tokens the model was trained for.
    pub context_length: Option<u64>,
    pub embedding_length: Option<u64>,
    pub block_count: Option<u64>,
    pub vocabulary: u64,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `<architecture>.pooling_type`: 1 mean, 2 first token, 3 last token, 4 rank.
    pub pooling_type: Option<u64>,
    /// What its memory is computed from.
    pub shape: Shape,
}

impl Summary {
    /// What the model is for: encoders have a pooling, generators have none.
    pub fn kind(&self) -> ModelKind {
        let encoder = self.architecture.contains("bert") || self.architecture == "t5encoder";
        // 0 is `none` in llama.cpp's enumeration of poolings.
        if encoder || self.pooling_type.is_some_and(|pooling| pooling != 0) {
            ModelKind::Embedding
        } else {
            ModelKind::Chat
        }
    }
}

/// Values of single keys; of an array its length, and its numbers where they are one per layer.
#[derive(Debug)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float,
    Bool(bool),
    Text(String),
    Array { elements: u64, per_layer: Vec<u64> },
}

pub(super) struct Metadata {
    pub(super) alignment: u64,
    values: HashMap<String, Value>,
    /// Where the table of keys ended: the position that its findings name.
    end: u64,
}

pub(super) fn read(cursor: &mut Cursor<'_>, count: u64) -> Result<Metadata, GgufError> {
    let mut values = HashMap::new();
    let mut seen = HashSet::new();
    for _ in 0..count {
        let at = cursor.position();
        let key = cursor.string("a key", MAX_KEY_BYTES)?;
        if key.is_empty() || !seen.insert(key.clone()) {
            return Err(GgufError::Corrupt { at, what: format!("key `{key}` is empty or there twice") });
        }
        let kind = cursor.u32("a value's type")?;
        let value = read_value(cursor, &key, kind)?;
        values.insert(key, value);
    }
    let mut metadata = Metadata { alignment: DEFAULT_ALIGNMENT, values, end: cursor.position() };
    if let Some(alignment) = metadata.number("general.alignment")? {
        if !alignment.is_power_of_two() || !(8..=65_536).contains(&alignment) {
            return Err(metadata.corrupt(format!("general.alignment is {alignment}")));
        }
        metadata.alignment = alignment;
    }
    let part = metadata.number("split.no")?.unwrap_or(0);
    match metadata.number("split.count")? {
        Some(parts) if parts > 1 => Err(GgufError::Split { part: part.saturating_add(1), parts }),
        _ => Ok(metadata),
    }
}

fn read_value(cursor: &mut Cursor<'_>, key: &str, kind: u32) -> Result<Value, GgufError> {
    let at = cursor.position();
    Ok(match kind {
        0 => Value::Unsigned(cursor.u8(key)?.into()),
        1 => Value::Signed(i64::from(cursor.u8(key)?.cast_signed())),
        2 => Value::Unsigned(cursor.u16(key)?.into()),
        3 => Value::Signed(i64::from(cursor.u16(key)?.cast_signed())),
        4 => Value::Unsigned(cursor.u32(key)?.into()),
        5 => Value::Signed(i64::from(cursor.u32(key)?.cast_signed())),
        6 => {
            cursor.skip(key, 4)?;
            Value::Float
        }
        7 => match cursor.u8(key)? {
            value @ (0 | 1) => Value::Bool(value == 1),
            other => {
                return Err(GgufError::Corrupt { at, what: format!("`{key}` is the truth value {other}") });
            }
        },
        8 => Value::Text(cursor.string(key, MAX_STRING_BYTES)?),
        9 => read_array(cursor, key)?,
        10 => Value::Unsigned(cursor.u64(key)?),
        11 => Value::Signed(cursor.u64(key)?.cast_signed()),
        12 => {
            cursor.skip(key, 8)?;
            Value::Float
        }
        other => {
            return Err(GgufError::Corrupt { at, what: format!("`{key}` has the unknown type {other}") });
        }
    })
}

fn read_array(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, GgufError> {
    let at = cursor.position();
    let element_kind = cursor.u32(key)?;
    let elements = cursor.u64(key)?;
    if elements > MAX_ARRAY_ELEMENTS {
        return Err(GgufError::Corrupt { at, what: format!("`{key}` has {elements} elements") });
    }
    if elements <= MAX_LAYERS && PER_LAYER.iter().any(|name| key.ends_with(name)) {
        return read_per_layer(cursor, key, element_kind, elements);
    }
    let element_bytes = match element_kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => {
            for _ in 0..elements {
                cursor.skip_string(key)?;
            }
            0
        }
        other => {
            return Err(GgufError::Corrupt { at, what: format!("`{key}` is an array of type {other}") });
        }
    };
    cursor.skip(key, elements * element_bytes)?;
    Ok(Value::Array { elements, per_layer: Vec::new() })
}

/// At most [`MAX_LAYERS`] whole numbers or truth values.
fn read_per_layer(cursor: &mut Cursor<'_>, key: &str, kind: u32, elements: u64) -> Result<Value, GgufError> {
    if !matches!(kind, 0..=5 | 7 | 10 | 11) {
        let at = cursor.position();
        return Err(GgufError::Corrupt { at, what: format!("`{key}` is an array of type {kind}") });
    }
    let mut per_layer = Vec::new();
    for _ in 0..elements {
        let at = cursor.position();
        per_layer.push(match read_value(cursor, key, kind)? {
            Value::Unsigned(value) => value,
            Value::Signed(value) => u64::try_from(value)
                .map_err(|_| GgufError::Corrupt { at, what: format!("`{key}` holds {value}") })?,
            Value::Bool(value) => value.into(),
            _ => return Err(GgufError::Corrupt { at, what: format!("`{key}` holds no whole numbers") }),
        });
    }
    Ok(Value::Array { elements, per_layer })
}

impl Metadata {
    pub(super) fn summary(
        &self,
        version: u32,
        file_bytes: u64,
        tensors: &Tensors,
    ) -> Result<Summary, GgufError> {
        let Some(architecture) = self.text("general.architecture")? else {
            return Err(self.corrupt("general.architecture is missing".to_owned()));
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if architecture.is_empty() || architecture.len() > 64 || !architecture.chars().all(plain) {
            return Err(self.corrupt(format!("general.architecture is {architecture:?}")));
        }
        let of = |name: &str| format!("{architecture}.{name}");
        // llama.cpp divides by the heads and allocates by the rest.
        let block_count = self.within(&of("block_count"), 1, MAX_LAYERS)?;
        let embedding_length = self.within(&of("embedding_length"), 1, 1 << 20)?;
        let context_length = self.within(&of("context_length"), 1, 1 << 30)?;
        self.within(&of("feed_forward_length"), 0, 1 << 24)?;
        // Zero heads: recurrent models such as Mamba.
        let heads = self.within(&of("attention.head_count"), 0, 1 << 16)?;
        let kv_heads = self.within(&of("attention.head_count_kv"), 0, 1 << 16)?;
        if let (Some(heads), Some(kv_heads)) = (heads, kv_heads)
            && kv_heads > 0
            && !heads.is_multiple_of(kv_heads)
        {
            return Err(self.corrupt(format!("{heads} attention heads do not divide among {kv_heads}")));
        }
        for name in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            self.within(&of(name), 0, 1 << 16)?;
        }
        for name in ["expert_count", "expert_used_count"] {
            self.within(&of(name), 0, 4096)?;
        }
        debug_assert!(tensors.bytes <= file_bytes);
        let vocabulary = self.vocabulary()?;
        let shape = self.shape(&of, block_count, embedding_length, vocabulary, tensors)?;
        Ok(Summary {
            version,
            name: self.text("general.name")?.map(str::to_owned),
            license: self.text("general.license")?.map(str::to_owned),
            parameters: tensors.elements,
            tensor_bytes: tensors.bytes,
            context_length,
            embedding_length,
            block_count,
            vocabulary,
            chat_template: self.text("tokenizer.chat_template")?.map(str::to_owned),
            pooling_type: self.within(&of("pooling_type"), 0, 4)?,
            shape,
            architecture: architecture.to_owned(),
        })
    }

    /// As `llama_model_base::load_hparams` (`src/llama-model.cpp`) reads them, defaults included.
    fn shape(
        &self,
        of: &dyn Fn(&str) -> String,
        block_count: Option<u64>,
        embedding_length: Option<u64>,
        vocabulary: u64,
        tensors: &Tensors,
    ) -> Result<Shape, GgufError> {
        let layers = block_count.unwrap_or(0);
        let width = embedding_length.unwrap_or(0);
        let each = |name: &str, most: u64| self.per_layer(&of(name), layers, most);
        let one = |name: &str, most: u64| self.within(&of(name), 0, most);
        let heads = each("attention.head_count", 1 << 16)?.unwrap_or_default();
        let kv_heads = each("attention.head_count_kv", 1 << 16)?.unwrap_or_else(|| heads.clone());
        let feed_forward = each("feed_forward_length", 1 << 24)?.unwrap_or_default();
        let expert_widths = each("expert_feed_forward_length", 1 << 24)?.unwrap_or_default();
        let experts_used = each("expert_used_count", 4096)?.unwrap_or_default();
        let at = |list: &[u64], index: usize| list.get(index).copied().unwrap_or(0);
        let blocks = (0..usize::try_from(layers).unwrap_or(0)).map(|index| {
            let found = tensors.blocks.get(index).copied().unwrap_or_default();
            Block {
                tensor_bytes: found.bytes,
                heads: at(&heads, index),
                kv_heads: at(&kv_heads, index),
                feed_forward_length: at(&feed_forward, index),
                attention: found.attends(),
                recurrent: found.recurrent,
            }
        });
        let most_heads = heads.iter().copied().max().unwrap_or(0);
        // As llama.cpp: the first layer's heads, or any where the first has none (hybrid models).
        let first_heads = heads.first().copied().filter(|heads| *heads > 0).unwrap_or(most_heads);
        let head = width.checked_div(first_heads).unwrap_or(0);
        let key_length = one("attention.key_length", 1 << 16)?.unwrap_or(head);
        let value_length = one("attention.value_length", 1 << 16)?.unwrap_or(head);
        let latent = one("attention.key_length_mla", 1 << 16)?.unwrap_or(0) > 0
            && one("attention.value_length_mla", 1 << 16)?.unwrap_or(0) > 0;
        let (recurrent_convolution, recurrent_state) = self.recurrent(of, width, first_heads)?;
        let pattern_key = of("attention.sliding_window_pattern");
        let window_pattern = match self.values.get(&pattern_key) {
            Some(Value::Array { per_layer, .. }) => {
                WindowPattern::Blocks(per_layer.iter().map(|value| *value != 0).collect())
            }
            _ => {
                self.within(&pattern_key, 0, MAX_LAYERS)?.map_or(WindowPattern::Unsaid, WindowPattern::Period)
            }
        };
        // Tensors of blocks past the last one are loaded by nobody, and counted all the same.
        let beyond = tensors.blocks.iter().skip(usize::try_from(layers).unwrap_or(0));
        let beyond = beyond.fold(0, |sum: u64, block| sum.saturating_add(block.bytes));
        Ok(Shape {
            blocks: blocks.collect(),
            input_bytes: tensors.input_bytes,
            output_bytes: tensors.output_bytes,
            tied_output_bytes: if tensors.has_output { 0 } else { tensors.token_embedding_bytes },
            token_embedding_type: tensors.token_embedding_type,
            other_bytes: tensors.other_bytes.saturating_add(beyond),
            tensors: tensors.count,
            embedding_length: width,
            vocabulary,
            key_length,
            value_length,
            key_length_window: one("attention.key_length_swa", 1 << 16)?.unwrap_or(key_length),
            value_length_window: one("attention.value_length_swa", 1 << 16)?.unwrap_or(value_length),
            latent_attention: latent,
            window_tokens: one("attention.sliding_window", 1 << 30)?,
            window_pattern,
            shared_kv_blocks: one("attention.shared_kv_layers", MAX_LAYERS)?.unwrap_or(0),
            guessing_blocks: one("nextn_predict_layers", MAX_LAYERS)?.unwrap_or(0),
            index_length: one("attention.indexer.key_length", 1 << 16)?.unwrap_or(0),
            experts: one("expert_count", 4096)?.unwrap_or(0),
            experts_used: experts_used.into_iter().max().unwrap_or(0),
            expert_feed_forward_length: expert_widths.into_iter().max().unwrap_or(0),
            recurrent_convolution,
            recurrent_state,
        })
    }

    /// Numbers of a recurrent block's two states. Source: `llama_hparams::n_embd_r` and `n_embd_s`
    /// (`src/llama-hparams.cpp`); the keys' order is theirs.
    fn recurrent(
        &self,
        of: &dyn Fn(&str) -> String,
        width: u64,
        heads: u64,
    ) -> Result<(u64, u64), GgufError> {
        let one = |name: &str| self.within(&of(name), 0, 1 << 24).map(Option::unwrap_or_default);
        let (kernel, inner) = (one("ssm.conv_kernel")?, one("ssm.inner_size")?);
        let (state, groups) = (one("ssm.state_size")?, one("ssm.group_count")?);
        let (wkv, shift) = (one("wkv.head_size")?, self.within(&of("token_shift_count"), 0, 16)?);
        let (short, kda) = (one("shortconv.l_cache")?, one("kda.head_dim")?);
        let product = |a: u64, b: u64| a.saturating_mul(b);
        if wkv > 0 {
            return Ok((product(shift.unwrap_or(2), width), product(width, wkv)));
        }
        if short > 0 {
            return Ok((product(width, short - 1), product(state, inner)));
        }
        if kda > 0 {
            let taps = if kernel > 0 { kernel - 1 } else { 3 };
            return Ok((product(3 * taps, product(heads, kda)), product(product(kda, kda), heads)));
        }
        let channels = inner.saturating_add(product(2, product(groups, state)));
        Ok((product(kernel.saturating_sub(1), channels), product(state, inner)))
    }

    /// One number for each layer, from an array or from one number for all.
    fn per_layer(&self, key: &str, layers: u64, most: u64) -> Result<Option<Vec<u64>>, GgufError> {
        let Some(Value::Array { elements, per_layer }) = self.values.get(key) else {
            let all = self.within(key, 0, most)?;
            return Ok(all.map(|value| vec![value; usize::try_from(layers).unwrap_or(0)]));
        };
        // llama.cpp refuses the file as well.
        if *elements != layers {
            return Err(self.corrupt(format!("`{key}` has {elements} elements for {layers} layers")));
        }
        match per_layer.iter().find(|value| **value > most) {
            Some(value) => Err(self.corrupt(format!("`{key}` holds {value}, expected 0 to {most}"))),
            None => Ok(Some(per_layer.clone())),
        }
    }

    /// The number of tokens, after a check of the arrays that run beside it. Ids of special tokens that point
    /// past the end occur in honest files; llama.cpp warns and takes its default.
    fn vocabulary(&self) -> Result<u64, GgufError> {
        let Some(tokens) = self.length("tokenizer.ggml.tokens")? else {
            return Ok(0);
        };
        if tokens == 0 {
            return Err(self.corrupt("tokenizer.ggml.tokens is empty".to_owned()));
        }
        for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
            match self.length(key)? {
                Some(length) if length != tokens => {
                    return Err(self.corrupt(format!("`{key}` has {length} elements for {tokens} tokens")));
                }
                _ => {}
            }
        }
        Ok(tokens)
    }

    fn corrupt(&self, what: String) -> GgufError {
        GgufError::Corrupt { at: self.end, what }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.corrupt(format!("`{key}` is not text"))),
        }
    }

    /// A whole number; absent also when the key holds one number per layer.
    fn number(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.values.get(key) {
            None | Some(Value::Array { .. }) => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) => match u64::try_from(*value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.corrupt(format!("`{key}` is {value}"))),
            },
            Some(Value::Float | Value::Bool(_) | Value::Text(_)) => {
                Err(self.corrupt(format!("`{key}` is not a whole number")))
            }
        }
    }

    fn within(&self, key: &str, low: u64, high: u64) -> Result<Option<u64>, GgufError> {
        match self.number(key)? {
            Some(value) if !(low..=high).contains(&value) => {
                Err(self.corrupt(format!("`{key}` is {value}, expected {low} to {high}")))
            }
            other => Ok(other),
        }
    }

    fn length(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array { elements, .. }) => Ok(Some(*elements)),
            Some(_) => Err(self.corrupt(format!("`{key}` is not an array"))),
        }
    }
}
