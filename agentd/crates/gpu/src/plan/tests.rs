use super::*;
use agentd_domain::gguf::{self, Summary};
use proptest::prelude::*;

/// A header as a converter writes it. The data behind it is claimed and never read.
#[derive(Clone, Default)]
struct Header {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

impl Header {
    fn new(architecture: &str) -> Self {
        let mut header = Self::default();
        header.key("general.architecture", 8);
        text(&mut header.keys, architecture);
        header
    }

    fn key(&mut self, name: &str, kind: u32) {
        text(&mut self.keys, name);
        self.keys.extend(kind.to_le_bytes());
        self.key_count += 1;
    }

    fn number(mut self, name: &str, value: u32) -> Self {
        self.key(name, 4);
        self.keys.extend(value.to_le_bytes());
        self
    }

    fn numbers(mut self, name: &str, values: &[u32]) -> Self {
        self.key(name, 9);
        self.keys.extend(4u32.to_le_bytes());
        self.keys.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.keys.extend(value.to_le_bytes()));
        self
    }

    fn tokens(mut self, count: u64) -> Self {
        self.key("tokenizer.ggml.tokens", 9);
        self.keys.extend(8u32.to_le_bytes());
        self.keys.extend(count.to_le_bytes());
        (0..count).for_each(|_| text(&mut self.keys, ""));
        self
    }

    /// Of type F16.
    fn tensor(mut self, name: &str, shape: &[u64]) -> Self {
        text(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| self.tensors.extend(size.to_le_bytes()));
        self.tensors.extend(1u32.to_le_bytes());
        self.tensors.extend(self.data_bytes.to_le_bytes());
        self.data_bytes = (self.data_bytes + 2 * shape.iter().product::<u64>()).next_multiple_of(32);
        self.tensor_count += 1;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.key_count.to_le_bytes());
        bytes.extend(&self.keys);
        bytes.extend(&self.tensors);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes
    }

    fn read(&self) -> Summary {
        checked(&self.bytes(), self.data_bytes).expect("an honest header")
    }
}

fn checked(bytes: &[u8], data_bytes: u64) -> Result<Summary, gguf::GgufError> {
    gguf::check(bytes.len() as u64 + data_bytes, &mut |at, into: &mut [u8]| {
        for (index, byte) in into.iter_mut().enumerate() {
            *byte = usize::try_from(at).ok().and_then(|at| bytes.get(at + index)).copied().unwrap_or(0);
        }
        Ok(())
    })
}

fn text(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u64).to_le_bytes());
    into.extend(text.as_bytes());
}

/// A decoder with full attention: architecture, blocks, width, heads, heads of keys, size of a head, feed-forward.
fn decoder(architecture: &str, [blocks, width, heads, kv_heads, head, feed_forward]: [u32; 6]) -> Header {
    let of = |name: &str| format!("{architecture}.{name}");
    let mut header = Header::new(architecture)
        .number(&of("block_count"), blocks)
        .number(&of("context_length"), 32_768)
        .number(&of("embedding_length"), width)
        .number(&of("feed_forward_length"), feed_forward)
        .number(&of("attention.head_count"), heads)
        .number(&of("attention.head_count_kv"), kv_heads)
        .tokens(1000)
        .tensor("token_embd.weight", &[width.into(), 1000]);
    if heads * head != width {
        header = header.number(&of("attention.key_length"), head).number(&of("attention.value_length"), head);
    }
    for block in 0..blocks {
        let (width, head) = (u64::from(width), u64::from(head));
        let name = |tensor: &str| format!("blk.{block}.{tensor}.weight");
        header = header
            .tensor(&name("attn_q"), &[width, head * u64::from(heads)])
            .tensor(&name("attn_k"), &[width, head * u64::from(kv_heads)])
            .tensor(&name("attn_v"), &[width, head * u64::from(kv_heads)])
            .tensor(&name("ffn_up"), &[width, feed_forward.into()]);
    }
    header.tensor("output_norm.weight", &[width.into()])
}

fn sizes(cells: u64) -> Sizes {
    Sizes {
        kind: ModelKind::Chat,
        cells,
        sequences: 8,
        ids: 8,
        batch_tokens: 256,
        outputs: 256,
        outputs_kept: 8,
        key: Cache::F16,
        value: Cache::F16,
        flash_attention: true,
        unified: true,
        full_windows: false,
    }
}

fn planned(summary: &Summary, sizes: &Sizes, layout: &Layout) -> Need {
    need(&summary.shape, &summary.architecture, sizes, layout, &|_| 0)
}

fn on_host(header: &Header, cells: u64) -> Need {
    planned(&header.read(), &sizes(cells), &Layout::host_alone("CPU"))
}

/// From the models' published configurations.
#[test]
fn a_token_costs_what_it_does_in_models_that_are_known() {
    let known = [
        ("Qwen2.5-0.5B", "qwen2", [24, 896, 14, 2, 64, 4864], 12 * 1024),
        ("SmolLM2-135M", "llama", [30, 576, 9, 3, 64, 1536], 23_040),
        ("Qwen2.5-1.5B", "qwen2", [28, 1536, 12, 2, 128, 8960], 28 * 1024),
        ("Qwen3-0.6B", "qwen3", [28, 1024, 16, 8, 128, 3072], 112 * 1024),
        ("Llama-3.1-8B", "llama", [32, 4096, 32, 8, 128, 14_336], 128 * 1024),
        ("Qwen3-8B", "qwen3", [36, 4096, 32, 8, 128, 12_288], 144 * 1024),
    ];
    for (name, architecture, numbers, bytes) in known {
        let need = on_host(&decoder(architecture, numbers), 4096);
        assert_eq!(need.kv_bytes_per_cell, bytes, "{name}");
        assert_eq!(need.devices.len(), 1, "{name}");
        assert_eq!(need.devices[0].kv_bytes, 4096 * bytes, "{name}");
        assert_eq!(need.assumed, Vec::<String>::new(), "{name}");
    }
}

#[test]
fn weights_are_the_tensors_and_their_alignment() {
    let summary = decoder("qwen2", [24, 896, 14, 2, 64, 4864]).read();
    let need = planned(&summary, &sizes(256), &Layout::host_alone("CPU"));
    let tensors = 24 * 4 + 2;
    assert_eq!(need.devices[0].weights_bytes, summary.tensor_bytes + tensors * 128);
}

#[test]
fn a_context_is_padded_as_llama_cpp_pads_it() {
    let header = decoder("llama", [2, 64, 1, 1, 64, 128]);
    assert_eq!(on_host(&header, 1).cells, 256);
    assert_eq!(on_host(&header, 257).cells, 512);
    let apart = Sizes { unified: false, ..sizes(1000) };
    // 1024 for eight sequences: 128 each, padded to 256.
    let need = planned(&header.read(), &apart, &Layout::host_alone("CPU"));
    assert_eq!((need.cells, need.devices[0].kv_bytes), (2048, 2048 * 2 * 2 * 64 * 2));
}

#[test]
fn quantised_caches_cost_their_blocks() {
    for (cache, bytes) in [(Cache::F32, 4.0), (Cache::F16, 2.0), (Cache::Q8_0, 1.0625), (Cache::Q4_0, 0.5625)]
    {
        assert_eq!(cache.row_bytes(128) as f64, 128.0 * bytes, "{cache:?}");
    }
    let summary = decoder("llama", [32, 4096, 32, 8, 128, 14_336]).read();
    let mixed = Sizes { key: Cache::Q8_0, value: Cache::Q4_0, ..sizes(256) };
    let need = planned(&summary, &mixed, &Layout::host_alone("CPU"));
    assert_eq!(need.kv_bytes_per_cell, 32 * (1088 + 576));
}

#[test]
fn a_window_bounds_the_cells_of_its_blocks() {
    // Every sixth block of gemma3 sees everything.
    let header = decoder("gemma3", [12, 64, 1, 1, 64, 128]).number("gemma3.attention.sliding_window", 512);
    let row = 2 * 64 * 2;
    let need = on_host(&header, 32_768);
    let window = (512 * 8 + 256u64).next_multiple_of(256);
    assert_eq!(need.devices[0].kv_bytes, row * (2 * 32_768 + 10 * window));
    assert_eq!(need.kv_bytes_per_cell, 2 * row);
    // As our engine makes it today: llama.cpp's default keeps all.
    let full = Sizes { full_windows: true, ..sizes(32_768) };
    let need = planned(&header.read(), &full, &Layout::host_alone("CPU"));
    assert_eq!(need.devices[0].kv_bytes, row * 12 * 32_768);
    // phi3 names a window that llama.cpp ignores.
    let ignored = decoder("phi3", [4, 64, 1, 1, 64, 128]).number("phi3.attention.sliding_window", 512);
    let need = on_host(&ignored, 32_768);
    assert_eq!(need.devices[0].kv_bytes, row * 4 * 32_768);
    assert!(need.assumed[0].contains("names a window"), "{:?}", need.assumed);
}

#[test]
fn a_header_may_name_the_windows_block_by_block() {
    let header = decoder("gemma4", [4, 64, 1, 1, 64, 128])
        .number("gemma4.attention.sliding_window", 256)
        .numbers("gemma4.attention.sliding_window_pattern", &[1, 1, 0, 1])
        .number("gemma4.attention.shared_kv_layers", 1);
    // The last block uses an earlier one's.
    let need = on_host(&header, 32_768);
    assert_eq!(need.devices[0].kv_bytes, 256 * (32_768 + 2 * 2304));
}

#[test]
fn heads_may_differ_from_block_to_block() {
    let header = Header::new("deci")
        .number("deci.block_count", 3)
        .number("deci.embedding_length", 256)
        .numbers("deci.attention.head_count", &[4, 0, 4])
        .numbers("deci.attention.head_count_kv", &[4, 0, 2])
        .numbers("deci.feed_forward_length", &[64, 64, 512])
        .tensor("blk.0.attn_k.weight", &[256, 256]);
    let need = on_host(&header, 256);
    assert_eq!(need.kv_bytes_per_cell, (4 + 2) * 64 * 2 * 2);
}

#[test]
fn latent_attention_keeps_one_row() {
    let header = Header::new("deepseek2")
        .number("deepseek2.block_count", 2)
        .number("deepseek2.embedding_length", 2048)
        .number("deepseek2.attention.head_count", 16)
        .number("deepseek2.attention.head_count_kv", 1)
        .number("deepseek2.attention.key_length", 576)
        .number("deepseek2.attention.value_length", 512)
        .number("deepseek2.attention.key_length_mla", 192)
        .number("deepseek2.attention.value_length_mla", 128)
        .tensor("blk.0.attn_kv_a_mqa.weight", &[2048, 576]);
    assert_eq!(on_host(&header, 256).kv_bytes_per_cell, 2 * 576 * 2);
}

#[test]
fn a_hybrid_keeps_a_state_or_keys_and_values() {
    // In the shape of Qwen3-Next: three of four blocks are recurrent, with a fused tensor named like attention's.
    let mut header = Header::new("qwen3next")
        .number("qwen3next.block_count", 4)
        .number("qwen3next.embedding_length", 2048)
        .number("qwen3next.attention.head_count", 16)
        .number("qwen3next.attention.head_count_kv", 2)
        .number("qwen3next.attention.key_length", 256)
        .number("qwen3next.attention.value_length", 256)
        .number("qwen3next.ssm.conv_kernel", 4)
        .number("qwen3next.ssm.inner_size", 4096)
        .number("qwen3next.ssm.state_size", 128)
        .number("qwen3next.ssm.group_count", 16);
    for block in 0..3 {
        header = header
            .tensor(&format!("blk.{block}.attn_qkv.weight"), &[64, 64])
            .tensor(&format!("blk.{block}.ssm_conv1d.weight"), &[4, 64]);
    }
    let need = on_host(&header.tensor("blk.3.attn_k.weight", &[64, 64]), 4096);
    assert_eq!(need.kv_bytes_per_cell, 2 * 256 * 2 * 2);
    let state = 3 * (4096 + 2 * 16 * 128) + 128 * 4096;
    assert_eq!(need.devices[0].recurrent_bytes, 3 * 8 * state * 4);
}

#[test]
fn a_recurrent_model_pays_for_sequences_and_not_for_tokens() {
    let header = Header::new("mamba")
        .number("mamba.block_count", 2)
        .number("mamba.embedding_length", 768)
        .number("mamba.ssm.conv_kernel", 4)
        .number("mamba.ssm.inner_size", 1536)
        .number("mamba.ssm.state_size", 16)
        .tensor("blk.0.ssm_in.weight", &[64, 64])
        .tensor("blk.1.ssm_in.weight", &[64, 64]);
    let need = on_host(&header, 1_000_000);
    assert_eq!((need.cells, need.kv_bytes_per_cell, need.devices[0].kv_bytes), (0, 0, 0));
    assert_eq!(need.devices[0].recurrent_bytes, 2 * 8 * (3 * 1536 + 16 * 1536) * 4);
}

#[test]
fn an_encoder_keeps_nothing_between_texts() {
    let summary = decoder("bert", [6, 384, 12, 12, 32, 1536]).read();
    let sizes = Sizes::of_engine(&summary.shape, ModelKind::Embedding, Some(512), 0, 0);
    let need = planned(&summary, &sizes, &Layout::host_alone("CPU"));
    assert_eq!(need.devices[0].kv_bytes, 0);
    assert_eq!(need.devices[0].weights_bytes, summary.tensor_bytes + summary.shape.tensors * 128);
}

#[test]
fn layers_go_where_llama_cpp_puts_them() {
    let layout = |devices: &[u64], offloaded| Layout {
        host: "CPU".to_owned(),
        devices: devices.iter().enumerate().map(|(at, share)| (format!("CUDA{at}"), *share)).collect(),
        offloaded,
    };
    let counts = |layout: Layout| {
        let places = layout.places(24);
        (0..3).map(|place| places.iter().filter(|at| **at == place).count()).collect::<Vec<_>>()
    };
    assert_eq!(counts(layout(&[], None)), [25, 0, 0]);
    assert_eq!(counts(layout(&[7], None)), [0, 25, 0]);
    assert_eq!(counts(layout(&[1, 1], None)), [0, 13, 12]);
    assert_eq!(counts(layout(&[3, 1], None)), [0, 19, 6]);
    // The last ten units, the output among them.
    let places = layout(&[1], Some(10)).places(24);
    assert_eq!(places.iter().rposition(|at| *at == 0), Some(14));
    assert_eq!(counts(layout(&[1], Some(1000))), [0, 25, 0]);
}

#[test]
fn on_a_device_tied_embeddings_are_there_twice() {
    let summary = decoder("qwen2", [24, 896, 14, 2, 64, 4864]).read();
    let layout = Layout {
        host: "CPU".to_owned(),
        devices: vec![("CUDA0".to_owned(), 1), ("CUDA1".to_owned(), 1)],
        offloaded: None,
    };
    let need = need(&summary.shape, "qwen2", &sizes(4096), &layout, &|device| {
        if device == "CPU" { 0 } else { 7 }
    });
    let weights: u64 = need.devices.iter().map(|device| device.weights_bytes).sum();
    let embeddings = 896 * 1000 * 2;
    let alignment = 3 * summary.shape.tensors * 128;
    assert_eq!(weights, summary.tensor_bytes + embeddings + alignment);
    assert_eq!(need.on("CPU").expect("the input layer").kv_bytes, 0);
    assert_eq!(need.on("CUDA0").expect("half of it").kv_bytes, 13 * 512 * 4096);
    assert_eq!(need.on("CUDA1").expect("the rest").kv_bytes, 11 * 512 * 4096);
    assert_eq!(need.on("CUDA1").expect("the rest").overhead_bytes, 7);
}

#[test]
fn the_longest_context_is_the_last_that_fits() {
    let header = decoder("llama", [2, 64, 1, 1, 64, 128]).read();
    let of = |cells| planned(&header, &sizes(cells), &Layout::host_alone("CPU"));
    for limit in [0, of(256).total_bytes() - 1, of(256).total_bytes(), of(10_240).total_bytes() + 5] {
        let longest = longest_context(1 << 20, &of, &|need| need.total_bytes() <= limit);
        assert_eq!(longest % 256, 0);
        assert!(longest == 0 || of(longest).total_bytes() <= limit);
        assert!(of(longest + 256).total_bytes() > limit);
    }
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let number = || prop_oneof![Just(0), 0u64..1000, any::<u64>()];
    let block = (number(), number(), number(), number(), any::<bool>(), any::<bool>()).prop_map(
        |(tensor_bytes, heads, kv_heads, feed_forward_length, attention, recurrent)| Block {
            tensor_bytes,
            heads,
            kv_heads,
            feed_forward_length,
            attention,
            recurrent,
        },
    );
    let blocks = prop::collection::vec(block, 0..20);
    (blocks, prop::collection::vec(number(), 20), any::<bool>(), prop::collection::vec(any::<bool>(), 0..20))
        .prop_map(|(blocks, n, latent_attention, windows)| Shape {
            blocks,
            input_bytes: n[0],
            output_bytes: n[1],
            tied_output_bytes: n[2],
            token_embedding_type: 12,
            other_bytes: n[3],
            tensors: n[4],
            embedding_length: n[5],
            vocabulary: n[6],
            key_length: n[7],
            value_length: n[8],
            key_length_window: n[9],
            value_length_window: n[10],
            latent_attention,
            window_tokens: Some(n[11]),
            window_pattern: if n[12] % 2 == 0 {
                WindowPattern::Period(n[12])
            } else {
                WindowPattern::Blocks(windows)
            },
            shared_kv_blocks: n[13],
            guessing_blocks: n[14],
            index_length: n[15],
            experts: n[16],
            experts_used: n[17],
            expert_feed_forward_length: n[18],
            recurrent_convolution: n[19],
            recurrent_state: n[19],
        })
}

use agentd_domain::gguf::WindowPattern;

proptest! {
    /// Numbers that no file has, as they may come over the wire: an answer, never an overflow.
    #[test]
    fn no_shape_is_too_wild(
        shape in any_shape(),
        architecture in prop::sample::select(vec!["llama", "gemma3", "gemma4", "gemma3n", "bert", "qwen3next", "mamba", "?"]),
        cells: u64,
        sequences: u64,
        unified: bool,
        full_windows: bool,
        shares in prop::collection::vec(any::<u64>(), 0..4),
        offloaded in prop::option::of(any::<u64>()),
    ) {
        let sizes = Sizes { cells, sequences, ids: sequences, unified, full_windows, ..sizes(0) };
        let devices = shares.into_iter().enumerate().map(|(at, share)| (format!("GPU{at}"), share)).collect();
        let layout = Layout { host: "CPU".to_owned(), devices, offloaded };
        let need = need(&shape, architecture, &sizes, &layout, &|_| u64::MAX);
        prop_assert!(need.devices.len() <= layout.devices.len() + 1);
        let _ = Sizes::of_engine(&shape, ModelKind::Chat, Some(cells), cells, sequences);
    }

    /// The search for a longest context rests on this.
    #[test]
    fn more_context_never_costs_less(a in 0u64..100_000, more in 0u64..100_000, windows: bool) {
        let header = decoder("gemma3", [6, 64, 1, 1, 64, 128]).number("gemma3.attention.sliding_window", 512).read();
        let of = |cells| planned(&header, &Sizes { full_windows: windows, ..sizes(cells) }, &Layout::host_alone("CPU"));
        prop_assert!(of(a).total_bytes() <= of(a + more).total_bytes());
    }

    /// Wherever the layers go, all weights are somewhere, once.
    #[test]
    fn no_weight_is_lost_in_a_split(shares in prop::collection::vec(1u64..1000, 1..5), offloaded in prop::option::of(0u64..30)) {
        let summary = decoder("llama", [12, 64, 1, 1, 64, 128]).tensor("output.weight", &[64, 1000]).read();
        let devices = shares.into_iter().enumerate().map(|(at, share)| (format!("GPU{at}"), share)).collect();
        let layout = Layout { host: "CPU".to_owned(), devices, offloaded };
        let need = planned(&summary, &sizes(4096), &layout);
        let aligned = need.devices.iter().filter(|device| device.weights_bytes > 0).count() as u64;
        let weights: u64 = need.devices.iter().map(|device| device.weights_bytes).sum();
        prop_assert_eq!(weights, summary.tensor_bytes + aligned * summary.shape.tensors * 128);
        let kv: u64 = need.devices.iter().map(|device| device.kv_bytes).sum();
        prop_assert_eq!(kv, 4096 * need.kv_bytes_per_cell);
    }

    /// Any damage to an honest header: refused or read, and what was read can be planned. Never a panic.
    #[test]
    fn a_damaged_header_is_refused_or_planned(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let header = decoder("gemma4", [4, 64, 2, 1, 32, 128])
            .number("gemma4.attention.sliding_window", 256)
            .numbers("gemma4.attention.sliding_window_pattern", &[1, 1, 0, 1]);
        let mut bytes = header.bytes();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(summary) = checked(&bytes, header.data_bytes) {
            prop_assert!(summary.shape.blocks.len() <= 512);
            let sizes = Sizes::of_engine(&summary.shape, ModelKind::Chat, summary.context_length, 0, 0);
            let need = planned(&summary, &sizes, &Layout::host_alone("CPU"));
            prop_assert!(need.devices.len() <= 1);
        }
    }
}
