//! Which blocks keep keys and values, and which of them for a window only?
//!
//! The one place that knows architectures by name. What is not listed here has full attention in every block, which is
//! the most that llama.cpp keeps for any.
//! Source: `create_memory` in `llama-model.cpp`, `load_arch_hparams` in each of `src/models/*.cpp`.

use super::Sizes;
use agentd_domain::engine::ModelKind;
use agentd_domain::gguf::{Block, Shape, WindowPattern};

/// Architectures for which llama.cpp makes no cache at all.
const NO_CACHE: [&str; 15] = [
    "bert",
    "clef",
    "dream",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "llada",
    "llada-moe",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "rnd1",
    "wavtokenizer-dec",
];

/// Where the one block with full attention stands in each group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dense {
    First,
    Last,
}

/// Architectures with windows: name, window unless the header says, group size unless the header says, place.
const WINDOWED: [(&str, Option<u64>, u64, Dense); 16] = [
    ("afmoe", None, 4, Dense::Last),
    ("cohere2", None, 4, Dense::Last),
    ("cohere2moe", None, 4, Dense::First),
    ("exaone-moe", Some(128), 4, Dense::Last),
    ("exaone4", Some(4096), 4, Dense::Last),
    ("gemma2", Some(4096), 2, Dense::Last),
    ("gemma3", None, 6, Dense::Last),
    ("gemma3n", None, 5, Dense::Last),
    ("gpt-oss", None, 2, Dense::Last),
    ("laguna", None, 4, Dense::First),
    ("llama4", Some(8192), 4, Dense::Last),
    ("mellum", None, 4, Dense::Last),
    ("muse-glimmer", None, 4, Dense::Last),
    ("olmo2", None, 4, Dense::Last),
    ("plamo3", None, 8, Dense::Last),
    ("smallthinker", Some(4096), 4, Dense::First),
];
/// Architectures whose header must name each block with a window.
const WINDOWED_BY_HEADER: [&str; 6] = ["gemma4", "granite_swa", "maple", "mimo2", "spark2_5", "step35"];
/// EXAONE 4 has windows in its 32B variant only, which llama.cpp knows by its layers.
const EXAONE4_BLOCKS: usize = 64;
/// gemma3n's first blocks with keys and values of their own.
const GEMMA3N_OWN: usize = 20;
/// Caches that are more than keys, values, index rows and states.
const MORE_CACHES: [&str; 3] = ["deepseek4", "dflash", "qwen4exp"];

pub(super) struct Attention {
    /// Whether there is a cache of keys and values.
    pub(super) keeps: bool,
    /// Whether it makes logits: encoders have no output layer.
    pub(super) generates: bool,
    hybrid: bool,
    windows: Vec<bool>,
    pub(super) window_tokens: u64,
    /// Blocks from this one on keep none.
    own: usize,
    pub(super) assumed: Vec<String>,
}

impl Attention {
    pub(super) fn windowed(&self, index: usize) -> bool {
        self.windows.get(index).copied().unwrap_or(false)
    }

    pub(super) fn keeps_kv(&self, block: &Block, index: usize) -> bool {
        // Without recurrent blocks llama.cpp makes a cache for every block, whatever tensors it has.
        self.keeps && index < self.own && (!self.hybrid || block.attention)
    }
}

pub(super) fn attention(shape: &Shape, architecture: &str, sizes: &Sizes) -> Attention {
    let mut assumed = Vec::new();
    let count = shape.blocks.len();
    let recurrent = shape.blocks.iter().any(|block| block.recurrent);
    let attends = shape.blocks.iter().any(|block| block.attention);
    let keeps = !NO_CACHE.contains(&architecture) && (!recurrent || attends);
    let mut attention = Attention {
        keeps,
        generates: !(architecture.contains("bert") || architecture == "gemma-embedding"),
        hybrid: recurrent,
        windows: Vec::new(),
        window_tokens: shape.window_tokens.unwrap_or(0),
        own: own_blocks(shape, architecture),
        assumed: Vec::new(),
    };
    if MORE_CACHES.contains(&architecture) {
        assumed.push(format!("{architecture} keeps further caches that the header does not describe: the engine's own plan is larger"));
    }
    if sizes.kind == ModelKind::Chat && !keeps {
        assumed.push(format!("{architecture} keeps no keys and values between tokens"));
    }
    let known = WINDOWED.iter().find(|(name, ..)| *name == architecture);
    let known = known.filter(|_| architecture != "exaone4" || count == EXAONE4_BLOCKS);
    let tokens = shape.window_tokens.or(known.and_then(|(_, tokens, ..)| *tokens)).unwrap_or(0);
    let by_header = known.is_some() || WINDOWED_BY_HEADER.contains(&architecture);
    match (&shape.window_pattern, known) {
        _ if tokens == 0 => {}
        (WindowPattern::Blocks(windows), _) if by_header => attention.windows.clone_from(windows),
        (WindowPattern::Period(period), Some((.., dense))) => {
            attention.windows = windows(count, *period, *dense);
        }
        (_, Some((_, _, period, dense))) => attention.windows = windows(count, *period, *dense),
        _ if shape.window_tokens.is_some() && !sizes.full_windows => {
            assumed.push(format!(
                "every block of {architecture} keeps the whole context, although its header names a window"
            ));
        }
        _ => {}
    }
    attention.window_tokens = tokens;
    attention.assumed = assumed;
    attention
}

/// `llama_hparams::set_swa_pattern`.
fn windows(count: usize, period: u64, dense: Dense) -> Vec<bool> {
    let windowed = |index: usize| match (index as u64).checked_rem(period) {
        None => true,
        Some(place) => match dense {
            Dense::First => place != 0,
            Dense::Last => place < period - 1,
        },
    };
    (0..count).map(windowed).collect()
}

/// `has_kv` in `llama-hparams.cpp`, and blocks that only guess, which the main context leaves out.
fn own_blocks(shape: &Shape, architecture: &str) -> usize {
    let count = shape.blocks.len();
    let less = |blocks: u64| count.saturating_sub(usize::try_from(blocks).unwrap_or(count));
    let sharing = match architecture {
        "gemma3n" => GEMMA3N_OWN.min(count),
        "gemma4" => less(shape.shared_kv_blocks),
        _ => count,
    };
    // A model of such blocks alone has a cache for each (`create_memory`).
    let trunk = less(shape.guessing_blocks);
    if trunk == 0 { sharing } else { sharing.min(trunk) }
}
