//! Which numbers decide how much memory the model takes besides its weights?
//!
//! Owns:  the sizes as the header has them, one entry per block. The formula over them, and what llama.cpp makes of
//!        them for each architecture, is `agentd-gpu`'s.
//! True:  at most [`super::metadata::MAX_LAYERS`] blocks; every number is within the bounds of the header's check. A
//!        shape that came over a wire is anybody's: who computes with it must not overflow.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub blocks: Vec<Block>,
    /// Tensors of the input layer: token embeddings and what stands beside them. They stay in host memory.
    pub input_bytes: u64,
    /// Tensors of the output layer, as far as the file has them.
    pub output_bytes: u64,
    /// The token embeddings, when the file has no `output.weight`: they are the output's weights too, and a second copy
    /// where the output layer is not in host memory.
    pub tied_output_bytes: u64,
    /// `ggml_type` of the token embeddings.
    pub token_embedding_type: u32,
    /// Tensors of neither: of an encoder, of another modality, with names that nobody knows.
    pub other_bytes: u64,
    pub tensors: u64,
    pub embedding_length: u64,
    pub vocabulary: u64,
    /// Numbers of one head's key and value, in blocks with full attention and in those with a window.
    pub key_length: u64,
    pub value_length: u64,
    pub key_length_window: u64,
    pub value_length_window: u64,
    /// Keys and values are kept as one compressed row (multi-head latent attention).
    pub latent_attention: bool,
    /// `attention.sliding_window`; absent where the file does not say.
    pub window_tokens: Option<u64>,
    pub window_pattern: WindowPattern,
    /// Blocks at the end that use the keys and values of earlier ones.
    pub shared_kv_blocks: u64,
    /// Blocks at the end that only guess further tokens; they are loaded and keep no keys and values of their own.
    pub guessing_blocks: u64,
    /// Numbers of an index row that some models keep beside each key.
    pub index_length: u64,
    /// Experts that one token goes through, and the width of one.
    pub experts: u64,
    pub experts_used: u64,
    pub expert_feed_forward_length: u64,
    /// Numbers of the state of one sequence in one recurrent block: of its convolution, and of the rest.
    pub recurrent_convolution: u64,
    pub recurrent_state: u64,
}

/// One of the layers that repeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    pub tensor_bytes: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub feed_forward_length: u64,
    /// It has weights that make keys and values.
    pub attention: bool,
    /// It has weights of a recurrent layer: a state space, a linear attention, a short convolution.
    pub recurrent: bool,
}

/// `attention.sliding_window_pattern`: which blocks see a window only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowPattern {
    /// The architecture's own.
    #[default]
    Unsaid,
    /// Of so many blocks one has full attention.
    Period(u64),
    Blocks(Vec<bool>),
}
