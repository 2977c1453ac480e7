//! Does this request repeat one that was answered?
//!
//! A `POST` below `/v1/` with `Idempotency-Key` is answered once in 24 hours; whoever asks again with the same key
//! and body gets the same answer. Answers are collected while they are sent, streams too, and stored at their end:
//! one that broke off is made again. The engine itself joins two requests with one key that overlap.
//! (`remember` keeps its keys in the memory's own transaction, and a message's reply is kept with the message.)

use super::{Caller, idempotency_key};
use crate::clock;
use crate::store::{Db, Kept};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_serving::ApiError;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

/// A longer answer is sent and not kept.
const ANSWER_MOST_BYTES: usize = 256 * 1024;
/// As the front's own limit: the body must be read here to know whether it is the same.
const REQUEST_MOST_BYTES: usize = 4 * 1024 * 1024;

pub(super) async fn kept(State(caller): State<Caller>, request: Request, next: Next) -> Response {
    let key = match idempotency_key(request.headers()) {
        Ok(Some(key)) if request.method() == Method::POST => key,
        Ok(_) => return next.run(request).await,
        Err(report) => return ApiError::from(report).into_response(),
    };
    let place = format!("POST {}/{key}", request.uri().path());
    let (head, body) = request.into_parts();
    let body = match axum::body::to_bytes(body, REQUEST_MOST_BYTES).await {
        Ok(body) => body,
        Err(error) => return ApiError::from(too_large(&error.to_string())).into_response(),
    };
    let digest = hex::encode(Sha256::digest(&body));
    match look_up(&caller, place.clone()).await {
        Ok(Some(kept)) if kept.request == digest => return again(kept),
        Ok(Some(_)) => return ApiError::from(other_request()).into_response(),
        Ok(None) => {}
        Err(report) => return ApiError::from(report).into_response(),
    }
    let response = next.run(Request::from_parts(head, Body::from(body))).await;
    if response.status() != StatusCode::OK {
        return response;
    }
    keep_at_end(response, caller.services.db.clone(), caller.agent, place, digest)
}

async fn look_up(caller: &Caller, place: String) -> Result<Option<Kept>, Report> {
    let agent = caller.agent;
    let found = caller.services.db.call(move |store| store.kept(agent, &place, clock::unix_ms())).await;
    found.map_err(|error| error.report("the request was not taken"))
}

fn again(kept: Kept) -> Response {
    let status = StatusCode::from_u16(kept.status).unwrap_or(StatusCode::OK);
    let mut response = (status, kept.body).into_response();
    if let Ok(content_type) = HeaderValue::from_str(&kept.content_type) {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}

fn keep_at_end(response: Response, db: Db, agent: AgentId, place: String, request: String) -> Response {
    let (head, body) = response.into_parts();
    let content_type = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kept = Kept {
        v: 1,
        unix_ms: clock::unix_ms(),
        request,
        status: head.status.as_u16(),
        content_type: content_type.unwrap_or_default().to_owned(),
        body: String::new(),
    };
    let state = (body, Some(kept), Vec::<u8>::new(), db, place);
    let pieces = stream::unfold(state, move |(mut body, mut kept, mut so_far, db, place)| async move {
        match body.frame().await {
            Some(Ok(frame)) => {
                let data = frame.into_data().unwrap_or_default();
                so_far.extend_from_slice(&data);
                if so_far.len() > ANSWER_MOST_BYTES {
                    kept = None;
                    so_far.clear();
                }
                Some((Ok::<Bytes, axum::Error>(data), (body, kept, so_far, db, place)))
            }
            Some(Err(error)) => Some((Err(error), (Body::empty(), None, Vec::new(), db, place))),
            None => {
                if let Some(kept) = kept
                    && let Ok(text) = String::from_utf8(so_far)
                    && !failed_midway(&kept, &text)
                {
                    let kept = Kept { body: text, ..kept };
                    if let Err(error) = db.call(move |store| store.keep(agent, &place, &kept)).await {
                        tracing::warn!(agent_id = %agent, %error, "an answer was not kept for a retry");
                    }
                }
                None
            }
        }
    });
    Response::from_parts(head, Body::from_stream(pieces.boxed()))
}

/// A stream's status is sent before its end is known: without the closing mark it failed, and is not kept.
fn failed_midway(kept: &Kept, text: &str) -> bool {
    kept.content_type.starts_with("text/event-stream") && !text.trim_end().ends_with("data: [DONE]")
}

fn too_large(why: &str) -> Report {
    Report::caller(
        "too_large",
        "the request was refused",
        why,
        format!("keep the body within {REQUEST_MOST_BYTES} bytes"),
    )
}

fn other_request() -> Report {
    Report::caller(
        "conflict",
        "the request was refused",
        "this `Idempotency-Key` was used with another body",
        "send a fresh UUID as the key of each new request",
    )
}
