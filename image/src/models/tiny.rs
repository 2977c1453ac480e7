//! What is the model that stands in when the owner has given none?
//!
//! A real llama-architecture model with a real tokenizer and chat template, whose weights are seeded noise:
//! its words mean nothing, its mathematics can be checked to the last digit against a reference.
//!
//! True: 32-bit weights, so that a forward pass elsewhere agrees within rounding; grouped-query attention, so
//! that the path real models take is the one under test; the special tokens' output rows are zero, so a
//! greedy answer never ends by chance.

use super::bpe::{self, Vocabulary};
use super::gguf::{Storage, Tensor, Value, Writer};
use anyhow::Result;

const LAYERS: usize = 2;
const WIDTH: usize = 32;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_WIDTH: usize = WIDTH / HEADS;
const FEED_FORWARD: usize = 64;
const CONTEXT_TOKENS: u32 = 4096;
const SEED: u64 = 0x6167_656e_7464_6f73;
/// Standard deviation of logits: wide enough that greedy choices are not ties.
const LOGIT_SPREAD: f32 = 2.5;

/// ChatML's: end of text, start and end of a message. Their ids are 0, 1 and 2.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const END_OF_MESSAGE: u32 = 2;
/// Token types of GGUF.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
    + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The file's bytes.
pub(super) fn build() -> Result<Vec<u8>> {
    let vocabulary = bpe::learn();
    let mut writer = Writer::default();
    keys(&mut writer, &vocabulary);
    weights(&mut writer, SPECIAL.len() + vocabulary.tokens.len());
    Ok(writer.finish())
}

fn keys(writer: &mut Writer, vocabulary: &Vocabulary) {
    let tokens: Vec<String> =
        SPECIAL.iter().map(|token| (*token).to_owned()).chain(vocabulary.tokens.iter().cloned()).collect();
    let mut types = vec![NORMAL; tokens.len()];
    types[..SPECIAL.len()].fill(CONTROL);
    writer.key("general.architecture", Value::Text("llama"));
    writer.key("general.name", Value::Text("agentd OS tiny: seeded noise for tests"));
    writer.key("general.license", Value::Text("apache-2.0"));
    writer.key("general.file_type", Value::U32(0));
    writer.key("llama.vocab_size", Value::U32(tokens.len() as u32));
    writer.key("llama.context_length", Value::U32(CONTEXT_TOKENS));
    writer.key("llama.embedding_length", Value::U32(WIDTH as u32));
    writer.key("llama.block_count", Value::U32(LAYERS as u32));
    writer.key("llama.feed_forward_length", Value::U32(FEED_FORWARD as u32));
    writer.key("llama.rope.dimension_count", Value::U32(HEAD_WIDTH as u32));
    writer.key("llama.rope.freq_base", Value::F32(10_000.0));
    writer.key("llama.attention.head_count", Value::U32(HEADS as u32));
    writer.key("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32));
    writer.key("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    writer.key("tokenizer.ggml.model", Value::Text("gpt2"));
    writer.key("tokenizer.ggml.pre", Value::Text("gpt-2"));
    writer.key("tokenizer.ggml.tokens", Value::Texts(tokens));
    writer.key("tokenizer.ggml.token_type", Value::I32s(types));
    writer.key("tokenizer.ggml.merges", Value::Texts(vocabulary.merges.clone()));
    writer.key("tokenizer.ggml.bos_token_id", Value::U32(0));
    writer.key("tokenizer.ggml.eos_token_id", Value::U32(END_OF_MESSAGE));
    writer.key("tokenizer.ggml.padding_token_id", Value::U32(0));
    writer.key("tokenizer.ggml.add_bos_token", Value::Bool(false));
    writer.key("tokenizer.chat_template", Value::Text(CHAT_TEMPLATE));
}

fn weights(writer: &mut Writer, vocabulary: usize) {
    let mut noise = Noise { state: SEED };
    let mut matrix = |name: String, rows: usize, columns: usize, spread: f32| {
        let data = (0..rows * columns).map(|_| noise.next() * spread).collect();
        Tensor { name, shape: vec![rows, columns], storage: Storage::F32, data }
    };
    let by_input = |columns: usize| 1.0 / (columns as f32).sqrt();
    let kv_width = KV_HEADS * HEAD_WIDTH;
    writer.tensor(matrix("token_embd.weight".into(), vocabulary, WIDTH, 1.0));
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let norms = matrix(name("attn_norm"), 2, WIDTH, 0.1);
        let (attention, feed_forward) = norms.data.split_at(WIDTH);
        writer.tensor(norm(name("attn_norm"), attention));
        writer.tensor(matrix(name("attn_q"), WIDTH, WIDTH, by_input(WIDTH)));
        writer.tensor(matrix(name("attn_k"), kv_width, WIDTH, by_input(WIDTH)));
        writer.tensor(matrix(name("attn_v"), kv_width, WIDTH, by_input(WIDTH)));
        writer.tensor(matrix(name("attn_output"), WIDTH, WIDTH, by_input(WIDTH)));
        writer.tensor(norm(name("ffn_norm"), feed_forward));
        writer.tensor(matrix(name("ffn_gate"), FEED_FORWARD, WIDTH, by_input(WIDTH)));
        writer.tensor(matrix(name("ffn_up"), FEED_FORWARD, WIDTH, by_input(WIDTH)));
        writer.tensor(matrix(name("ffn_down"), WIDTH, FEED_FORWARD, by_input(FEED_FORWARD)));
    }
    let last = matrix("output_norm.weight".into(), 1, WIDTH, 0.1);
    writer.tensor(norm("output_norm.weight".into(), &last.data));
    let mut output = matrix("output.weight".into(), vocabulary, WIDTH, LOGIT_SPREAD * by_input(WIDTH));
    output.data[..SPECIAL.len() * WIDTH].fill(0.0);
    writer.tensor(output);
}

/// A scale around one, as trained models have.
fn norm(name: String, noise: &[f32]) -> Tensor {
    let data = noise.iter().map(|x| 1.0 + x).collect();
    Tensor { name, shape: vec![WIDTH], storage: Storage::F32, data }
}

/// Numbers of mean 0 and variance 1, the same on every machine: sums of twelve uniform numbers, made with
/// whole numbers and one division, because the rounding of `ln` and `cos` is the C library's own.
/// Source: splitmix64, Steele et al. 2014.
struct Noise {
    state: u64,
}

impl Noise {
    fn next(&mut self) -> f32 {
        // Each of 12 numbers has 24 random bits, so the sum is exact in f32's 24 bits only after the shift.
        let sum: u64 = (0..12).map(|_| self.bits() >> 40).sum();
        (sum as f64 / f64::from(1u32 << 24) - 6.0) as f32
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_mean_zero_and_variance_one() {
        let mut noise = Noise { state: SEED };
        let sample: Vec<f64> = (0..20_000).map(|_| f64::from(noise.next())).collect();
        let mean = sample.iter().sum::<f64>() / sample.len() as f64;
        let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / sample.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "mean {mean}, variance {variance}");
    }
}
