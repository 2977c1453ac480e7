//! What do OpenAI's clients read?

use crate::meter::Used;
use crate::plan::Encoding;
use agentd_domain::engine::FinishReason;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completion,
}

/// What every chunk and the whole answer of one generation repeat.
#[derive(Debug, Clone)]
pub struct Head {
    pub api: Api,
    pub id: String,
    pub created_unix_s: u64,
    pub model: String,
}

impl Head {
    /// Texts in the order of their choices, each with how it ended.
    pub fn whole(&self, said: &[(String, FinishReason)], used: &Used) -> Value {
        let choice = |(index, (text, reason)): (usize, &(String, FinishReason))| {
            let reason = finish_reason(*reason);
            match self.api {
                Api::Chat => {
                    json!({ "index": index, "message": { "role": "assistant", "content": text, "refusal": null },
                            "logprobs": null, "finish_reason": reason })
                }
                Api::Completion => {
                    json!({ "index": index, "text": text, "logprobs": null, "finish_reason": reason })
                }
            }
        };
        let object = match self.api {
            Api::Chat => "chat.completion",
            Api::Completion => "text_completion",
        };
        let choices: Vec<Value> = said.iter().enumerate().map(choice).collect();
        json!({ "id": self.id, "object": object, "created": self.created_unix_s, "model": self.model,
                "choices": choices, "usage": usage(used) })
    }

    /// The first chunk of a choice in a chat stream: clients take the role from it.
    pub fn opening(&self, index: usize) -> Option<Value> {
        match self.api {
            Api::Chat => Some(self.chunk(json!([{
                "index": index, "delta": { "role": "assistant", "content": "" }, "logprobs": null,
                "finish_reason": null,
            }]))),
            Api::Completion => None,
        }
    }

    pub fn piece(&self, index: usize, text: &str) -> Value {
        self.chunk(match self.api {
            Api::Chat => {
                json!([{ "index": index, "delta": { "content": text }, "logprobs": null, "finish_reason": null }])
            }
            Api::Completion => {
                json!([{ "index": index, "text": text, "logprobs": null, "finish_reason": null }])
            }
        })
    }

    pub fn closing(&self, index: usize, reason: FinishReason) -> Value {
        let reason = finish_reason(reason);
        self.chunk(match self.api {
            Api::Chat => json!([{ "index": index, "delta": {}, "logprobs": null, "finish_reason": reason }]),
            Api::Completion => {
                json!([{ "index": index, "text": "", "logprobs": null, "finish_reason": reason }])
            }
        })
    }

    /// Asked for with `stream_options.include_usage`: a last chunk without choices.
    pub fn usage(&self, used: &Used) -> Value {
        let mut chunk = self.chunk(json!([]));
        chunk["usage"] = usage(used);
        chunk
    }

    fn chunk(&self, choices: Value) -> Value {
        let object = match self.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion => "text_completion",
        };
        json!({ "id": self.id, "object": object, "created": self.created_unix_s, "model": self.model,
                "choices": choices })
    }
}

pub fn embeddings(model: &str, vectors: &[Vec<f32>], tokens: u32, encoding: Encoding) -> Value {
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = match encoding {
                Encoding::Float => json!(vector),
                Encoding::Base64 => {
                    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                    json!(STANDARD.encode(bytes))
                }
            };
            json!({ "object": "embedding", "index": index, "embedding": embedding })
        })
        .collect();
    json!({ "object": "list", "data": data, "model": model,
            "usage": { "prompt_tokens": tokens, "total_tokens": tokens } })
}

fn usage(used: &Used) -> Value {
    json!({ "prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": used.cached_tokens } })
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        // A cancelled generation has no reader left; OpenAI has no word for it.
        FinishReason::Stop | FinishReason::Cancelled => "stop",
    }
}
