//! Writes the inputs that `gguf` begins with: `seeds FOLDER [MODEL.gguf]...`
//!
//! Compiled by `rustc` alone, without the coverage hooks: what they call is in libFuzzer only.
//!
//! Small heads of several kinds of models, as converters write them, and the heads of real files.

use std::fs;
use std::path::Path;

/// Of a real file: the heads of the models here are shorter but for their vocabularies.
const HEAD_BYTES: usize = 48 * 1024;

#[derive(Default)]
struct Head {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

impl Head {
    fn key(&mut self, name: &str, kind: u32) -> &mut Vec<u8> {
        text(&mut self.keys, name);
        self.keys.extend(kind.to_le_bytes());
        self.key_count += 1;
        &mut self.keys
    }

    fn word(&mut self, name: &str, value: &str) {
        let keys = self.key(name, 8);
        text(keys, value);
    }

    fn number(&mut self, name: &str, value: u32) {
        self.key(name, 4).extend(value.to_le_bytes());
    }

    fn real(&mut self, name: &str, value: f32) {
        self.key(name, 6).extend(value.to_le_bytes());
    }

    fn numbers(&mut self, name: &str, values: &[u32]) {
        let keys = self.key(name, 9);
        keys.extend(4u32.to_le_bytes());
        keys.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| keys.extend(value.to_le_bytes()));
    }

    fn words(&mut self, name: &str, values: &[&str]) {
        let keys = self.key(name, 9);
        keys.extend(8u32.to_le_bytes());
        keys.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| text(keys, value));
    }

    /// Of type F16.
    fn tensor(&mut self, name: &str, shape: &[u64]) {
        text(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| self.tensors.extend(size.to_le_bytes()));
        self.tensors.extend(1u32.to_le_bytes());
        self.tensors.extend(self.data_bytes.to_le_bytes());
        self.data_bytes = (self.data_bytes + 2 * shape.iter().product::<u64>()).next_multiple_of(32);
        self.tensor_count += 1;
    }

    fn input(&self) -> Vec<u8> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend(self.tensor_count.to_le_bytes());
        head.extend(self.key_count.to_le_bytes());
        head.extend(&self.keys);
        head.extend(&self.tensors);
        head.resize(head.len().next_multiple_of(32), 0);
        let length = head.len() as u64 + self.data_bytes;
        [length.to_le_bytes().to_vec(), head].concat()
    }
}

fn text(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u64).to_le_bytes());
    into.extend(text.as_bytes());
}

fn model(architecture: &str, more: impl FnOnce(&mut Head)) -> Head {
    let mut head = Head::default();
    let of = |name: &str| format!("{architecture}.{name}");
    head.word("general.architecture", architecture);
    head.number("general.alignment", 32);
    for (name, value) in [("block_count", 2), ("context_length", 512), ("embedding_length", 64)] {
        head.number(&of(name), value);
    }
    for (name, value) in [("feed_forward_length", 128), ("attention.head_count", 4)] {
        head.number(&of(name), value);
    }
    head.real(&of("attention.layer_norm_rms_epsilon"), 1e-5);
    head.word("tokenizer.ggml.model", "gpt2");
    head.words("tokenizer.ggml.tokens", &["a", "b", "ab", "<end>"]);
    head.numbers("tokenizer.ggml.token_type", &[1, 1, 1, 3]);
    head.tensor("token_embd.weight", &[64, 4]);
    for block in 0..2 {
        for (name, shape) in
            [("attn_q", [64, 64]), ("attn_k", [64, 32]), ("attn_v", [64, 32]), ("ffn_up", [64, 128])]
        {
            head.tensor(&format!("blk.{block}.{name}.weight"), &shape);
        }
    }
    head.tensor("output_norm.weight", &[64]);
    more(&mut head);
    head
}

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments.next().expect("usage: gguf-seeds FOLDER [MODEL.gguf]...");
    let folder = Path::new(&folder);
    fs::create_dir_all(folder)?;
    let heads = [
        ("llama", model("llama", |head| head.number("llama.attention.head_count_kv", 2))),
        ("qwen2", model("qwen2", |head| head.numbers("qwen2.attention.head_count_kv", &[2, 2]))),
        ("bert", model("bert", |head| head.number("bert.pooling_type", 1))),
        ("gemma3", model("gemma3", |head| head.number("gemma3.attention.sliding_window", 128))),
        (
            "experts",
            model("qwen3moe", |head| {
                head.number("qwen3moe.expert_count", 8);
                head.number("qwen3moe.expert_used_count", 2);
                head.number("qwen3moe.expert_feed_forward_length", 32);
                head.tensor("blk.0.ffn_up_exps.weight", &[64, 32, 8]);
            }),
        ),
        (
            "mamba",
            model("mamba", |head| {
                for (name, value) in
                    [("conv_kernel", 4), ("inner_size", 128), ("state_size", 16), ("time_step_rank", 4)]
                {
                    head.number(&format!("mamba.ssm.{name}"), value);
                }
                head.tensor("blk.0.ssm_in.weight", &[64, 256]);
            }),
        ),
        ("split", model("llama", |head| head.number("split.count", 3))),
    ];
    for (name, head) in heads {
        fs::write(folder.join(name), head.input())?;
    }
    for (number, path) in arguments.enumerate() {
        let file = fs::read(&path)?;
        let head = &file[..file.len().min(HEAD_BYTES)];
        fs::write(folder.join(format!("real-{number}")), [&(file.len() as u64).to_le_bytes()[..], head].concat())?;
    }
    Ok(())
}
