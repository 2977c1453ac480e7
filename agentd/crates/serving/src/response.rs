//! What do OpenAI's clients read?

use crate::plan::Encoding;
use agentd_domain::engine::{Done, FinishReason};
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
    pub fn whole(&self, text: &str, done: &Done) -> Value {
        let reason = finish_reason(done.reason);
        let (object, choice) = match self.api {
            Api::Chat => (
                "chat.completion",
                json!({ "index": 0, "message": { "role": "assistant", "content": text, "refusal": null },
                        "logprobs": null, "finish_reason": reason }),
            ),
            Api::Completion => (
                "text_completion",
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason }),
            ),
        };
        json!({ "id": self.id, "object": object, "created": self.created_unix_s, "model": self.model,
                "choices": [choice], "usage": usage(done) })
    }

    /// The first chunk of a chat stream: clients take the role from it.
    pub fn opening(&self) -> Option<Value> {
        match self.api {
            Api::Chat => Some(self.chunk(json!([{
                "index": 0, "delta": { "role": "assistant", "content": "" }, "logprobs": null, "finish_reason": null,
            }]))),
            Api::Completion => None,
        }
    }

    pub fn piece(&self, text: &str) -> Value {
        self.chunk(match self.api {
            Api::Chat => {
                json!([{ "index": 0, "delta": { "content": text }, "logprobs": null, "finish_reason": null }])
            }
            Api::Completion => json!([{ "index": 0, "text": text, "logprobs": null, "finish_reason": null }]),
        })
    }

    pub fn closing(&self, done: &Done) -> Value {
        let reason = finish_reason(done.reason);
        self.chunk(match self.api {
            Api::Chat => json!([{ "index": 0, "delta": {}, "logprobs": null, "finish_reason": reason }]),
            Api::Completion => json!([{ "index": 0, "text": "", "logprobs": null, "finish_reason": reason }]),
        })
    }

    /// Asked for with `stream_options.include_usage`: a last chunk without choices.
    pub fn usage(&self, done: &Done) -> Value {
        let mut chunk = self.chunk(json!([]));
        chunk["usage"] = usage(done);
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

fn usage(done: &Done) -> Value {
    json!({ "prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens,
            "total_tokens": done.prompt_tokens + done.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": done.cached_tokens } })
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        // A cancelled generation has no reader left; OpenAI has no word for it.
        FinishReason::Stop | FinishReason::Cancelled => "stop",
    }
}
