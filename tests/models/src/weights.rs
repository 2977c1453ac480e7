//! Which numbers does a seeded model have?
//!
//! True: what goes into a layer's matrices is of deviation 1 and so is about what comes out, so depth neither fades
//! nor explodes; a token's embedding is small beside what the layers add, or the tied output would always find the
//! token that came in; attention is sharp enough that an answer depends on words far back.

use crate::blocks::Kind;
use crate::file::{self, Entry, Value};
use crate::vocabulary::{CHAT_TEMPLATE, Vocabulary};
use crate::{Dice, Layout, Shape};
use std::io::{self, Write};

/// Of embeddings, as trained models have.
const EMBEDDING: f32 = 0.02;
/// Of logits: wide enough that greedy choices are seldom ties.
const LOGITS: f32 = 2.5;
/// Of queries and keys; their products have the square of it.
const QUERY: f32 = 1.5;
const BIAS: f32 = 0.1;
/// Rows of tokens that an answer must not hold, beside the others.
const SILENT: f32 = 1.0 / 64.0;

struct Tensor {
    name: String,
    kind: Kind,
    rows: usize,
    /// Of one row: the fastest dimension.
    columns: usize,
    weights: Weights,
}

#[derive(Clone, Copy)]
enum Weights {
    /// Around zero.
    Deviation(f32),
    /// A norm's scale, with a tenth around this.
    Around(f32),
    /// The token embedding: silent rows are small.
    Embedding,
}

pub(crate) fn write(shape: &Shape, layout: Layout, into: &mut impl Write) -> io::Result<()> {
    let vocabulary = Vocabulary::new(shape);
    let tensors = tensors(shape, layout);
    let entries: Vec<Entry> = tensors.iter().map(Tensor::entry).collect();
    into.write_all(&file::head(&keys(shape, layout, &vocabulary), &entries))?;
    for (number, (tensor, entry)) in tensors.iter().zip(&entries).enumerate() {
        // A tensor's numbers do not depend on those before it.
        let mut dice = Dice(Dice(shape.seed ^ number as u64).bits());
        let mut row = Vec::new();
        for index in 0..tensor.rows {
            row.clear();
            tensor.row(index, &vocabulary, &mut dice, &mut row);
            into.write_all(&row)?;
        }
        file::pad(entry.bytes, into)?;
    }
    Ok(())
}

impl Tensor {
    fn entry(&self) -> Entry {
        let (elements, bytes) = self.kind.block();
        debug_assert_eq!(self.columns % elements, 0, "{}", self.name);
        let sizes = if self.rows == 1 { vec![self.columns] } else { vec![self.columns, self.rows] };
        Entry {
            name: self.name.clone(),
            sizes,
            kind: self.kind.number(),
            bytes: self.rows * self.columns / elements * bytes,
        }
    }

    fn row(&self, index: usize, vocabulary: &Vocabulary, dice: &mut Dice, into: &mut Vec<u8>) {
        let deviation = match self.weights {
            Weights::Deviation(deviation) => deviation,
            Weights::Embedding if vocabulary.speaks(index) => EMBEDDING,
            Weights::Embedding => EMBEDDING * SILENT,
            Weights::Around(middle) => {
                for _ in 0..self.columns {
                    into.extend((middle * (1.0 + 0.2 * (dice.share() as f32 - 0.5))).to_le_bytes());
                }
                return;
            }
        };
        for _ in 0..self.columns / self.kind.block().0 {
            self.kind.draw(dice, deviation, into);
        }
    }
}

fn tensors(shape: &Shape, layout: Layout) -> Vec<Tensor> {
    let Shape { layers, width, feed_forward, vocabulary, repeats, .. } = *shape;
    let kv_width = width / shape.heads * shape.kv_heads;
    let by_input = |columns: usize| 1.0 / (columns as f32).sqrt();
    // Of the two matrices through which a layer adds to what goes by.
    let added = |columns: usize| Weights::Deviation(if repeats { 0.0 } else { by_input(columns) });
    let mut tensors = Vec::new();
    let mut add = |name: String, kind: Kind, rows: usize, columns: usize, weights: Weights| {
        tensors.push(Tensor { name, kind, rows, columns, weights });
    };
    let embedding = kind(layout, width, Kind::Q6K);
    add("token_embd.weight".into(), embedding, vocabulary, width, Weights::Embedding);
    for layer in 0..layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let plain = kind(layout, width, Kind::Q4K);
        let more = if more_bits(layer, layers) { Kind::Q6K } else { Kind::Q4K };
        let query = Weights::Deviation(QUERY * by_input(width));
        let even = Weights::Deviation(by_input(width));
        let bias = Weights::Deviation(BIAS);
        add(name("attn_norm.weight"), Kind::F32, 1, width, Weights::Around(1.0));
        add(name("attn_q.weight"), plain, width, width, query);
        add(name("attn_q.bias"), Kind::F32, 1, width, bias);
        add(name("attn_k.weight"), plain, kv_width, width, query);
        add(name("attn_k.bias"), Kind::F32, 1, kv_width, bias);
        add(name("attn_v.weight"), kind(layout, width, more), kv_width, width, even);
        add(name("attn_v.bias"), Kind::F32, 1, kv_width, bias);
        add(name("attn_output.weight"), plain, width, width, added(width));
        add(name("ffn_norm.weight"), Kind::F32, 1, width, Weights::Around(1.0));
        add(name("ffn_gate.weight"), plain, feed_forward, width, even);
        add(name("ffn_up.weight"), plain, feed_forward, width, even);
        let down = added(feed_forward);
        add(name("ffn_down.weight"), kind(layout, feed_forward, more), width, feed_forward, down);
    }
    let gain = LOGITS / (EMBEDDING * (width as f32).sqrt());
    add("output_norm.weight".into(), Kind::F32, 1, width, Weights::Around(gain));
    tensors
}

/// The type that llama.cpp gives a matrix that it would like to have in `wanted`. Source: `llama-quant.cpp`,
/// `llama_tensor_get_type_impl` and `tensor_type_fallback`; all from 256 weights on in a row are Q4_K_M's.
fn kind(layout: Layout, columns: usize, wanted: Kind) -> Kind {
    match (layout, wanted) {
        (Layout::Q8_0, _) => Kind::Q8_0,
        (Layout::Q4KM, Kind::Q4K) if !columns.is_multiple_of(256) => Kind::Q5_0,
        (Layout::Q4KM, Kind::Q6K) if !columns.is_multiple_of(256) => Kind::Q8_0,
        (Layout::Q4KM, wanted) => wanted,
    }
}

/// llama.cpp's `use_more_bits`: values and the second matrix of the feed-forward in the first and last eighth of the
/// layers and in every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

fn keys<'a>(shape: &'a Shape, layout: Layout, vocabulary: &'a Vocabulary) -> Vec<(&'static str, Value<'a>)> {
    // `llama_ftype`.
    let file_type = match layout {
        Layout::Q8_0 => 7,
        Layout::Q4KM => 15,
    };
    vec![
        ("general.architecture", Value::Text("qwen2")),
        ("general.name", Value::Text(shape.name)),
        ("general.license", Value::Text("apache-2.0")),
        ("general.file_type", Value::U32(file_type)),
        ("general.quantization_version", Value::U32(2)),
        ("qwen2.block_count", Value::U32(shape.layers as u32)),
        ("qwen2.context_length", Value::U32(shape.context_tokens)),
        ("qwen2.embedding_length", Value::U32(shape.width as u32)),
        ("qwen2.feed_forward_length", Value::U32(shape.feed_forward as u32)),
        ("qwen2.attention.head_count", Value::U32(shape.heads as u32)),
        ("qwen2.attention.head_count_kv", Value::U32(shape.kv_heads as u32)),
        ("qwen2.rope.freq_base", Value::F32(1_000_000.0)),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("tokenizer.ggml.model", Value::Text("gpt2")),
        ("tokenizer.ggml.pre", Value::Text("qwen2")),
        ("tokenizer.ggml.tokens", Value::Texts(&vocabulary.tokens)),
        ("tokenizer.ggml.token_type", Value::I32s(&vocabulary.types)),
        ("tokenizer.ggml.merges", Value::Texts(&vocabulary.merges)),
        ("tokenizer.ggml.bos_token_id", Value::U32(vocabulary.end_of_text)),
        ("tokenizer.ggml.eos_token_id", Value::U32(vocabulary.end_of_message)),
        ("tokenizer.ggml.padding_token_id", Value::U32(vocabulary.end_of_text)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", Value::Text(CHAT_TEMPLATE)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QWEN_HALF_BILLION, SMALL};

    fn kinds(shape: &Shape, part: &str) -> Vec<Kind> {
        let tensors = tensors(shape, Layout::Q4KM);
        tensors.iter().filter(|tensor| tensor.name.contains(part)).map(|tensor| tensor.kind).collect()
    }

    #[test]
    fn the_mix_of_types_is_llama_cpps() {
        // 896 is no multiple of 256, 4864 is.
        assert_eq!(kinds(&QWEN_HALF_BILLION, "token_embd"), [Kind::Q8_0]);
        assert!(kinds(&QWEN_HALF_BILLION, "attn_q.weight").iter().all(|kind| *kind == Kind::Q5_0));
        let down = kinds(&QWEN_HALF_BILLION, "ffn_down");
        let more: Vec<usize> = (0..24).filter(|layer| down[*layer] == Kind::Q6K).collect();
        assert_eq!(more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
        assert!((0..24).all(|layer| more.contains(&layer) || down[layer] == Kind::Q4K));
        let values = kinds(&QWEN_HALF_BILLION, "attn_v.weight");
        assert!((0..24).all(|layer| (values[layer] == Kind::Q8_0) == more.contains(&layer)));
        assert_eq!(kinds(&SMALL, "token_embd"), [Kind::Q6K]);
        assert!(kinds(&SMALL, "ffn_up").iter().all(|kind| *kind == Kind::Q4K));
    }

    #[test]
    fn the_large_shape_has_qwens_number_of_weights() {
        let weights: usize =
            tensors(&QWEN_HALF_BILLION, Layout::Q8_0).iter().map(|tensor| tensor.rows * tensor.columns).sum();
        // 494,032,768 in the model's own card.
        assert_eq!(weights, 494_032_768);
    }
}
