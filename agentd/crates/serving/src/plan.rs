//! What exactly is asked of the engine, or why is the request refused?
//!
//! Pure: a request and the loaded models in, a [`Generate`] or an [`ApiError`] out.

use crate::error::ApiError;
use crate::handle::ServedModel;
use crate::request::{ChatRequest, Common, CompletionRequest, EmbeddingsRequest, Message, OneOrMany};
use agentd_domain::engine::{ChatMessage, Generate, ModelKind, Prompt, Sampling, Shape, Share};
use serde_json::Value;

/// OpenAI takes four; more is a mistake, and each costs a search per piece.
const MAX_STOPS: usize = 16;
/// One batch of texts; OpenAI allows 2048, which one slow CPU would work on for minutes.
pub const MAX_EMBED_INPUTS: usize = 256;
/// As many as run at once unless a model is loaded with more; OpenAI allows 128, which would only wait for each other.
const MAX_CHOICES: i64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Whole,
    Stream { usage: bool },
}

#[derive(Debug)]
pub struct Planned {
    pub generate: Generate,
    pub delivery: Delivery,
    /// Answers to the same prompt: `n`. The engine reads the prompt once.
    pub choices: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Float,
    Base64,
}

#[derive(Debug, PartialEq)]
pub struct PlannedEmbed {
    pub model: String,
    pub inputs: Vec<String>,
    pub encoding: Encoding,
    /// The length of vectors that the client asked for.
    pub dimensions: Option<i64>,
}

pub fn chat(request: ChatRequest, models: &[ServedModel], key: String) -> Result<Planned, ApiError> {
    let model = resolve(request.model.as_deref(), ModelKind::Chat, models)?;
    if request.messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages_empty",
            "`messages` must hold at least one message",
        ));
    }
    let messages = request.messages.into_iter().enumerate().map(message).collect::<Result<Vec<_>, _>>()?;
    let max_tokens = request.max_completion_tokens.or(request.common.max_tokens);
    finish(request.common, model, key, Prompt::Messages(messages), max_tokens)
}

pub fn completion(
    request: CompletionRequest,
    models: &[ServedModel],
    key: String,
) -> Result<Planned, ApiError> {
    let model = resolve(request.model.as_deref(), ModelKind::Chat, models)?;
    let prompt = match request.prompt {
        Value::String(text) => text,
        Value::Array(mut texts) if texts.len() == 1 => match texts.remove(0) {
            Value::String(text) => text,
            _ => return Err(ApiError::invalid("prompt", "prompt_kind", "`prompt` must be a text")),
        },
        _ => {
            return Err(ApiError::invalid("prompt", "prompt_kind", "`prompt` must be one text, not a batch"));
        }
    };
    if request.echo == Some(true) {
        return Err(unsupported("echo"));
    }
    if request.suffix.is_some_and(|text| !text.is_empty()) {
        return Err(unsupported("suffix"));
    }
    if request.best_of.is_some_and(|n| n != 1) {
        return Err(unsupported("best_of"));
    }
    // OpenAI's own default; without it a plain completion would run until the context is full.
    let max_tokens = request.common.max_tokens.or(Some(16));
    finish(request.common, model, key, Prompt::Text(prompt), max_tokens)
}

pub fn embeddings(request: EmbeddingsRequest, models: &[ServedModel]) -> Result<PlannedEmbed, ApiError> {
    let model = resolve(request.model.as_deref(), ModelKind::Embedding, models)?;
    let not_text = || ApiError::invalid("input", "input_kind", "`input` must be a text or a list of texts");
    let inputs = match request.input {
        Value::String(text) => vec![text],
        Value::Array(items) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                _ => Err(not_text()),
            })
            .collect::<Result<Vec<_>, _>>()?,
        _ => return Err(not_text()),
    };
    if inputs.is_empty() || inputs.len() > MAX_EMBED_INPUTS {
        let message = format!("`input` must hold 1 to {MAX_EMBED_INPUTS} texts, it holds {}", inputs.len());
        return Err(ApiError::invalid("input", "input_count", message));
    }
    // Of a model that was never loaded it shows with its first vector.
    if model.dimension > 0 {
        check_dimension(request.dimensions, &model.name, model.dimension as usize)?;
    }
    let encoding = match request.encoding_format.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            let message = format!("`encoding_format` is `float` or `base64`, not `{other}`");
            return Err(ApiError::invalid("encoding_format", "encoding_format", message));
        }
    };
    Ok(PlannedEmbed { model: model.name.clone(), inputs, encoding, dimensions: request.dimensions })
}

/// A model's vectors have one length.
pub fn check_dimension(wanted: Option<i64>, model: &str, dimension: usize) -> Result<(), ApiError> {
    match wanted {
        Some(wanted) if usize::try_from(wanted) != Ok(dimension) => {
            let message = format!("`{model}` gives vectors of {dimension} numbers, not {wanted}");
            Err(ApiError::invalid("dimensions", "dimensions_unsupported", message))
        }
        _ => Ok(()),
    }
}

/// The model of this kind that a request means; nothing and `default` mean the default one.
fn resolve<'a>(
    wanted: Option<&str>,
    kind: ModelKind,
    models: &'a [ServedModel],
) -> Result<&'a ServedModel, ApiError> {
    let of_kind = || models.iter().filter(|model| model.kind == kind);
    let found = match wanted {
        None | Some("" | "default") => of_kind().find(|model| model.default),
        Some(name) => of_kind().find(|model| model.name == name),
    };
    if let Some(model) = found {
        return Ok(model);
    }
    let names: Vec<_> = of_kind().map(|model| model.name.as_str()).collect();
    let what = match kind {
        ModelKind::Chat => "chat",
        ModelKind::Embedding => "embedding",
    };
    if names.is_empty() {
        return Err(ApiError {
            status: 503,
            message: format!("no {what} model is loaded: the engine is starting, or none could be loaded"),
            param: Some("model".to_owned()),
            code: "model_not_ready".to_owned(),
        });
    }
    Err(ApiError {
        status: 404,
        message: format!(
            "there is no {what} model `{}` here; use `default`, or one of: {}",
            wanted.unwrap_or("default"),
            names.join(", ")
        ),
        param: Some("model".to_owned()),
        code: "model_not_found".to_owned(),
    })
}

fn message((index, message): (usize, Message)) -> Result<ChatMessage, ApiError> {
    let param = format!("messages[{index}]");
    let role = match message.role.as_str() {
        // OpenAI's newer name for the same thing; no chat template knows it.
        "developer" => "system",
        known @ ("system" | "user" | "assistant" | "tool") => known,
        other => {
            let text = format!("the role `{other}` is none of system, developer, user, assistant, tool");
            return Err(ApiError::invalid(&param, "role_unknown", text));
        }
    };
    Ok(ChatMessage { role: role.to_owned(), content: content(&param, message.content)? })
}

fn content(param: &str, content: Value) -> Result<String, ApiError> {
    let refuse = |what: &str| {
        let text = format!("{what} in a message is not supported: send text only");
        ApiError::invalid(param, "content_unsupported", text)
    };
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let mut whole = String::new();
            for part in parts {
                match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some("text"), Some(text)) => whole.push_str(text),
                    (kind, _) => return Err(refuse(&format!("`{}`", kind.unwrap_or("this part")))),
                }
            }
            Ok(whole)
        }
        _ => Err(refuse("this content")),
    }
}

fn finish(
    common: Common,
    model: &ServedModel,
    key: String,
    prompt: Prompt,
    max_tokens: Option<i64>,
) -> Result<Planned, ApiError> {
    refuse_unsupported(&common)?;
    let delivery = match common.stream {
        Some(true) => Delivery::Stream {
            usage: common.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false),
        },
        _ => Delivery::Whole,
    };
    let max_tokens = match max_tokens {
        None => 0,
        Some(n) => u32::try_from(n)
            .ok()
            .filter(|&n| n > 0)
            .ok_or_else(|| ApiError::invalid("max_tokens", "max_tokens", "`max_tokens` must be 1 or more"))?,
    };
    let sampling = sampling(&common)?;
    let shape = shape(&common)?;
    let choices = choices(&common)?;
    let stop = common.stop.map(OneOrMany::into_vec).unwrap_or_default();
    if stop.len() > MAX_STOPS || stop.iter().any(String::is_empty) {
        let text = format!("`stop` takes up to {MAX_STOPS} texts, none of them empty");
        return Err(ApiError::invalid("stop", "stop", text));
    }
    let generate = Generate {
        model: model.name.clone(),
        key,
        prompt,
        sampling,
        max_tokens,
        stop,
        share: Share::default(),
        shape,
    };
    Ok(Planned { generate, delivery, choices })
}

fn sampling(common: &Common) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    let ranged = |name: &str, value: Option<f64>, low: f64, high: f64, default: f32| match value {
        None => Ok(default),
        Some(value) if (low..=high).contains(&value) => Ok(value as f32),
        Some(value) => {
            let text = format!("`{name}` must be {low} to {high}, it is {value}");
            Err(ApiError::invalid(name, "out_of_range", text))
        }
    };
    Ok(Sampling {
        temperature: ranged("temperature", common.temperature, 0.0, 2.0, default.temperature)?,
        top_p: ranged("top_p", common.top_p, 0.0, 1.0, default.top_p)?,
        min_p: ranged("min_p", common.min_p, 0.0, 1.0, default.min_p)?,
        repeat_penalty: ranged("repeat_penalty", common.repeat_penalty, 0.1, 10.0, default.repeat_penalty)?,
        top_k: match common.top_k {
            None => default.top_k,
            // -1 is how vLLM's clients write "off".
            Some(-1) => 0,
            Some(k) => u32::try_from(k)
                .map_err(|_| ApiError::invalid("top_k", "out_of_range", "`top_k` must be 0 or more"))?,
        },
        // OpenAI's seed has 64 bits, the sampler's 32: the lower half still makes equal seeds equal.
        seed: common.seed.map(|seed| seed as u64 as u32),
    })
}

fn refuse_unsupported(common: &Common) -> Result<(), ApiError> {
    let given = |value: &Option<Value>| match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if given(&common.tools) {
        return Err(unsupported("tools"));
    }
    if given(&common.functions) {
        return Err(unsupported("functions"));
    }
    if given(&common.logprobs) {
        return Err(unsupported("logprobs"));
    }
    Ok(())
}

fn choices(common: &Common) -> Result<u32, ApiError> {
    let n = common.n.unwrap_or(1);
    if !(1..=MAX_CHOICES).contains(&n) {
        let text = format!("`n` must be 1 to {MAX_CHOICES}, it is {n}");
        return Err(ApiError::invalid("n", "out_of_range", text));
    }
    Ok(n as u32)
}

/// `response_format` as OpenAI has it, `grammar` as llama.cpp's server has it. The engine says what is wrong inside.
fn shape(common: &Common) -> Result<Shape, ApiError> {
    let format = common.response_format.as_ref().filter(|format| !format.is_null());
    if let Some(grammar) = common.grammar.as_ref().filter(|grammar| !grammar.is_empty()) {
        if format.is_some() {
            let text = "`grammar` and `response_format` both say what the answer must be: send one of them";
            return Err(ApiError::invalid("grammar", "grammar_conflict", text));
        }
        return Ok(Shape::Grammar(grammar.clone()));
    }
    let Some(format) = format else { return Ok(Shape::Free) };
    match format.get("type").and_then(Value::as_str) {
        None | Some("text") => Ok(Shape::Free),
        Some("json_object") => Ok(Shape::JsonObject),
        Some("json_schema") => {
            let schema = format.get("json_schema").and_then(|outer| outer.get("schema"));
            let schema = schema.filter(|schema| schema.is_object()).ok_or_else(|| {
                let text = "`response_format.json_schema.schema` must be a JSON schema, an object";
                ApiError::invalid("response_format", "schema_missing", text)
            })?;
            Ok(Shape::JsonSchema(schema.to_string()))
        }
        Some(_) => Err(unsupported("response_format")),
    }
}

fn unsupported(param: &str) -> ApiError {
    ApiError::invalid(
        param,
        &format!("{param}_unsupported"),
        format!("`{param}` is not supported yet: leave it out"),
    )
}

#[cfg(test)]
mod tests;
