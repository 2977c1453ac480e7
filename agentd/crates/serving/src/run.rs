//! Carries requests to the engine and answers back.
//!
//! A client that goes away drops the stream, and with it the generation, unless it gave a key with which it may come
//! back. A stream that fails midway says so in a last `data:` line with an `error`, which OpenAI's clients raise; it
//! then ends without `[DONE]`. With a key the answer's `id` follows from it: a repeated answer is the same one.

use crate::choices::{self, Said};
use crate::error::ApiError;
use crate::handle::{EngineHandle, Leaving, Piece};
use crate::meter::{Meter, Used};
use crate::plan::{self, Delivery, Planned};
use crate::request::{ChatRequest, CompletionRequest, EmbeddingsRequest};
use crate::response::{self, Api, Head};
use agentd_domain::engine::{Generate, Share};
use agentd_domain::fault::Report;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path};
use axum::http::HeaderMap;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures::{StreamExt, stream};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// The longest context anyone serves is about 0.5 MB of text per 100,000 tokens.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;

/// One caller's view of the engine: each request carries it as an extension, so that one router is enough for all.
#[derive(Clone)]
pub struct Front {
    pub engine: Arc<dyn EngineHandle>,
    /// Goes before each idempotency key, so that callers never meet in one generation.
    pub caller: String,
    /// What the engine is told of who asks.
    pub share: Share,
}

/// Every request must have a [`Front`] among its extensions; without one the answer is 500.
pub fn router() -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

async fn chat(
    Extension(front): Extension<Front>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(body)?;
    let (key, leaving) = front.key(&headers);
    let planned = plan::chat(request, &front.engine.models(), key)?;
    front.answer(planned, Api::Chat, leaving).await
}

async fn completions(
    Extension(front): Extension<Front>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = parse(body)?;
    let (key, leaving) = front.key(&headers);
    let planned = plan::completion(request, &front.engine.models(), key)?;
    front.answer(planned, Api::Completion, leaving).await
}

async fn embeddings(
    Extension(front): Extension<Front>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: EmbeddingsRequest = parse(body)?;
    let planned = plan::embeddings(request, &front.engine.models())?;
    let got = front.engine.embed(planned.model.clone(), planned.inputs).await?;
    if let Some(vector) = got.vectors.first() {
        plan::check_dimension(planned.dimensions, &planned.model, vector.len())?;
    }
    let answer = response::embeddings(&planned.model, &got.vectors, got.tokens, planned.encoding);
    let meter = Meter::default();
    meter.fill(Used {
        model: planned.model,
        prompt_tokens: got.tokens,
        completion_tokens: 0,
        cached_tokens: 0,
    });
    Ok(metered(Json(answer).into_response(), meter))
}

async fn models(Extension(front): Extension<Front>) -> Json<Value> {
    let data: Vec<Value> = front.engine.models().iter().map(|model| model_card(&model.name)).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(
    Extension(front): Extension<Front>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if front.engine.models().iter().any(|model| model.name == name) {
        return Ok(Json(model_card(&name)));
    }
    Err(ApiError {
        status: 404,
        message: format!("there is no model `{name}` here; GET /v1/models lists them"),
        param: Some("model".to_owned()),
        code: "model_not_found".to_owned(),
    })
}

fn model_card(name: &str) -> Value {
    // `created` is required by OpenAI's schema; no model here has a date that means anything.
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "agentd" })
}

impl Front {
    fn key(&self, headers: &HeaderMap) -> (String, Leaving) {
        let given = headers.get("idempotency-key").and_then(|value| value.to_str().ok());
        match given.filter(|key| !key.is_empty() && key.len() <= 200) {
            Some(key) => (format!("{}/{key}", self.caller), Leaving::MayReturn),
            None => (format!("{}//{}", self.caller, Uuid::now_v7()), Leaving::Cancels),
        }
    }

    async fn answer(&self, planned: Planned, api: Api, leaving: Leaving) -> Result<Response, ApiError> {
        let prefix = match api {
            Api::Chat => "chatcmpl",
            Api::Completion => "cmpl",
        };
        let head = Head {
            api,
            id: format!("{prefix}-{}", &hex::encode(Sha256::digest(&planned.generate.key))[..32]),
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            model: planned.generate.model.clone(),
        };
        let generate = Generate { share: self.share.clone(), ..planned.generate };
        let mut all = Vec::new();
        for index in 0..planned.choices as usize {
            all.push(self.engine.generate(choices::one(&generate, index), leaving).await?);
        }
        let said = Said::new(head.model.clone(), all);
        match planned.delivery {
            Delivery::Whole => whole(head, said).await,
            Delivery::Stream { usage } => Ok(streamed(head, said, usage)),
        }
    }
}

async fn whole(head: Head, mut said: Said) -> Result<Response, ApiError> {
    let mut texts = vec![String::new(); said.count()];
    while let Some((index, piece)) = said.next().await? {
        if let Piece::Text(more) = piece {
            texts[index].push_str(&more);
        }
        if let Some(used) = said.used() {
            let ended: Vec<_> = texts.into_iter().zip(said.reasons()).collect();
            let answer = Json(head.whole(&ended, &used)).into_response();
            let meter = Meter::default();
            meter.fill(used);
            return Ok(metered(answer, meter));
        }
    }
    Err(cut_short().into())
}

fn metered(mut response: Response, meter: Meter) -> Response {
    response.extensions_mut().insert(meter);
    response
}

fn streamed(head: Head, said: Said, usage: bool) -> Response {
    let opening: Vec<Event> = (0..said.count()).filter_map(|index| head.opening(index)).map(data).collect();
    let meter = Meter::default();
    let state = Some((head, said, meter.clone()));
    let rest = stream::unfold(state, move |state| async move {
        let (head, mut said, meter) = state?;
        let lines = match said.next().await {
            Ok(Some((index, Piece::Text(text)))) => {
                let line = data(head.piece(index, &text));
                return Some((vec![line], Some((head, said, meter))));
            }
            Ok(Some((index, Piece::Done(done)))) => {
                let mut lines = vec![data(head.closing(index, done.reason))];
                let Some(used) = said.used() else {
                    return Some((lines, Some((head, said, meter))));
                };
                meter.fill(used.clone());
                if usage {
                    lines.push(data(head.usage(&used)));
                }
                lines.push(Event::default().data("[DONE]"));
                lines
            }
            Ok(None) => vec![data(ApiError::from(cut_short()).body())],
            Err(report) => vec![data(ApiError::from(report).body())],
        };
        Some((lines, None))
    });
    let lines = rest.flat_map(stream::iter);
    metered(Sse::new(stream::iter(opening).chain(lines).map(Ok::<_, Infallible>)).into_response(), meter)
}

fn data(value: Value) -> Event {
    // JSON text holds no raw line break, so one value is one `data:` line.
    Event::default().data(value.to_string())
}

fn cut_short() -> Report {
    Report::environment(
        "generation_cut_short",
        "the answer was not finished",
        "the engine ended before it",
        "send the request again with the same Idempotency-Key",
    )
}

fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, ApiError> {
    let bytes = body.map_err(|rejection| ApiError {
        status: rejection.status().as_u16(),
        message: format!("{}; a request may have {MAX_BODY_BYTES} bytes", rejection.body_text()),
        param: None,
        code: "body_rejected".to_owned(),
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError { param: None, ..ApiError::invalid("", "body_invalid", error.to_string()) })
}

#[cfg(test)]
mod tests;
