//! What do OpenAI's clients send?
//!
//! Only what this front looks at is named here; unknown keys are tolerated, as OpenAI does with ours.

use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<Message>,
    pub max_completion_tokens: Option<i64>,
    #[serde(flatten)]
    pub common: Common,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CompletionRequest {
    pub model: Option<String>,
    pub prompt: Value,
    pub echo: Option<bool>,
    pub suffix: Option<String>,
    pub best_of: Option<i64>,
    #[serde(flatten)]
    pub common: Common,
}

/// What chat and plain completions share.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Common {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// Not OpenAI's; llama.cpp's and vLLM's servers take them under these names.
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repeat_penalty: Option<f64>,
    pub seed: Option<i64>,
    pub max_tokens: Option<i64>,
    pub stop: Option<OneOrMany>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub n: Option<i64>,
    /// A number for plain completions, a bool for chat.
    pub logprobs: Option<Value>,
    pub tools: Option<Value>,
    pub functions: Option<Value>,
    pub response_format: Option<Value>,
    /// Not OpenAI's; llama.cpp's server takes it under this name.
    pub grammar: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub struct Message {
    pub role: String,
    /// Text, a list of parts, or null (an assistant that only called tools).
    #[serde(default)]
    pub content: Value,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct EmbeddingsRequest {
    pub model: Option<String>,
    pub input: Value,
    /// `float`, or `base64`, which the `openai` package asks for by itself.
    pub encoding_format: Option<String>,
    pub dimensions: Option<i64>,
}
