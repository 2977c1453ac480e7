//! Does this request repeat one that was answered, and what did it use?
//!
//! A `POST` below `/v1/` with `Idempotency-Key` is answered once in 24 hours; whoever asks again with the same key
//! and body gets the same answer. Answers are collected while they are sent, streams too. At the end one transaction
//! enters the request in the record and keeps the answer, and only then the end is sent: an agent that has seen it may
//! forget its key, one that has not asks again. An answer that broke off is neither entered nor kept; the engine goes
//! on with it for a while, so a retry reads the same one from its beginning, and joins it when the first attempt is
//! still being answered.
//! Without a key nobody can ask for the same again: the request is entered too, behind the answer's end, so that a
//! slow disk delays no answer; a kill in that moment loses the row.
//! (`remember` keeps its keys in the memory's own transaction, and a message's reply is kept with the message.)

use super::{Caller, idempotency_key};
use crate::clock;
use crate::store::{Db, Kept, RequestRow, Settled};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_serving::{ApiError, Meter, Used};
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::stream;
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

/// A longer answer is sent and not kept.
const ANSWER_MOST_BYTES: usize = 256 * 1024;
/// Requests without a key that wait to be entered, of all agents. When the disk is that far behind, answers wait.
const BEHIND_MOST: usize = 64;
static BEHIND: Semaphore = Semaphore::const_new(BEHIND_MOST);
/// As the front's own limit: the body must be read here to know whether it is the same.
const REQUEST_MOST_BYTES: usize = 4 * 1024 * 1024;

pub(super) async fn settled(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let key = match idempotency_key(request.headers()) {
        Ok(key) => key,
        Err(report) => return ApiError::from(report).into_response(),
    };
    let path = request.uri().path().to_owned();
    let (request, keyed) = match key {
        None => (request, None),
        Some(key) => {
            let place = format!("POST {path}/{key}");
            let (head, body) = request.into_parts();
            let body = match axum::body::to_bytes(body, REQUEST_MOST_BYTES).await {
                Ok(body) => body,
                Err(error) => return ApiError::from(too_large(&error.to_string())).into_response(),
            };
            let digest = hex::encode(Sha256::digest(&body));
            match look_up(&caller, place.clone()).await {
                Ok(Some(kept)) if kept.request != digest => {
                    return ApiError::from(other_request()).into_response();
                }
                Ok(Some(Kept { status, content_type, body: Some(body), .. })) => {
                    return again(status, &content_type, body);
                }
                // Too long to have been kept: it is made again, and is not entered again.
                Ok(Some(_) | None) => {}
                Err(report) => return ApiError::from(report).into_response(),
            }
            (Request::from_parts(head, Body::from(body)), Some(Keyed { key, place, digest }))
        }
    };
    let response = next.run(request).await;
    match response.extensions().get::<Meter>().cloned() {
        Some(meter) if response.status() == StatusCode::OK => {
            let ledger = Ledger { db: caller.services.db.clone(), agent: caller.agent, path, keyed };
            ledger.settle_at_end(response, meter).await
        }
        _ => response,
    }
}

async fn look_up(caller: &Caller, place: String) -> Result<Option<Kept>, Report> {
    let agent = caller.agent;
    let found = caller.services.db.call(move |store| store.kept(agent, &place, clock::unix_ms())).await;
    found.map_err(|error| error.report("the request was not taken"))
}

fn again(status: u16, content_type: &str, body: String) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    let mut response = (status, body).into_response();
    if let Ok(content_type) = HeaderValue::from_str(content_type) {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}

/// The key of a request, and where its answer is kept.
struct Keyed {
    key: String,
    place: String,
    /// Of the request's body.
    digest: String,
}

/// Where one request is entered.
struct Ledger {
    db: Db,
    agent: AgentId,
    path: String,
    keyed: Option<Keyed>,
}

/// An answer on its way out.
struct Outgoing {
    body: Body,
    meter: Meter,
    content_type: String,
    /// What was sent; `None` once it is too long to be kept.
    so_far: Option<Vec<u8>>,
    ledger: Ledger,
}

impl Ledger {
    async fn settle_at_end(self, response: Response, meter: Meter) -> Response {
        let (head, body) = response.into_parts();
        let content_type = content_type(&head.headers);
        let so_far = self.keyed.is_some().then(Vec::new);
        let outgoing = Outgoing { body, meter, content_type, so_far, ledger: self };
        if outgoing.meter.used().is_none() {
            let pieces = stream::unfold(Some(outgoing), |outgoing| async move { outgoing?.next().await });
            return Response::from_parts(head, Body::from_stream(pieces));
        }
        // All of it is the end: a failure can still be a status.
        match outgoing.end(Bytes::new()).await {
            Ok(body) => Response::from_parts(head, Body::from(body)),
            Err(error) => error.into_response(),
        }
    }

    async fn enter(self, used: Used, content_type: String, body: Option<Vec<u8>>) -> Result<(), ApiError> {
        let Self { db, agent, path, keyed } = self;
        let unix_ms = clock::unix_ms();
        let key = keyed.as_ref().map(|keyed| keyed.key.clone());
        let Used { model, prompt_tokens, completion_tokens, .. } = used;
        let row = RequestRow { v: 1, unix_ms, path, key, model, prompt_tokens, completion_tokens };
        let entered = db.call(move |store| match keyed {
            None => store.settle(agent, &row, None),
            Some(Keyed { place, digest, .. }) => {
                let status = StatusCode::OK.as_u16();
                let body = body.and_then(|body| String::from_utf8(body).ok());
                let kept = Kept { v: 1, unix_ms, request: digest, status, content_type, body };
                store.settle(agent, &row, Some((&place, &kept)))
            }
        });
        match entered.await {
            Ok(Settled::Now | Settled::Before) => Ok(()),
            Err(error) => {
                tracing::warn!(agent_id = %agent, %error, "a request was not entered");
                Err(error.report("the answer was not finished").into())
            }
        }
    }
}

impl Outgoing {
    /// The next bytes to send. The end comes in one piece, after it was entered.
    async fn next(mut self) -> Option<(Result<Bytes, axum::Error>, Option<Self>)> {
        let data = match self.body.frame().await? {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return Some((Err(error), None)),
        };
        if self.meter.used().is_none() {
            self.remember(&data);
            return Some((Ok(data), Some(self)));
        }
        let end = self.end(data).await.unwrap_or_else(|error| {
            // As the front itself says that a stream has failed: without the closing mark.
            Bytes::from(format!("data: {}\n\n", error.body()))
        });
        Some((Ok(end), None))
    }

    /// `first` and what follows it, once a request with a key was entered.
    async fn end(mut self, first: Bytes) -> Result<Bytes, ApiError> {
        let rest = self.body.collect().await.map_err(|error| ApiError::from(unfinished(&error)))?;
        let end: Bytes = [first, rest.to_bytes()].concat().into();
        self.body = Body::empty();
        self.remember(&end);
        // It was filled before the end was begun.
        if let Some(used) = self.meter.used().cloned() {
            let behind = self.ledger.keyed.is_none();
            let entering = self.ledger.enter(used, self.content_type, self.so_far);
            if behind {
                // The semaphore is never closed.
                let place = BEHIND.acquire().await.ok();
                tokio::spawn(async move {
                    // What went wrong was said.
                    let _ = entering.await;
                    drop(place);
                });
            } else {
                entering.await?;
            }
        }
        Ok(end)
    }

    fn remember(&mut self, data: &[u8]) {
        if let Some(so_far) = &mut self.so_far {
            so_far.extend_from_slice(data);
            if so_far.len() > ANSWER_MOST_BYTES {
                self.so_far = None;
            }
        }
    }
}

fn content_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

fn too_large(why: &str) -> Report {
    Report::caller(
        "too_large",
        "the request was refused",
        why,
        format!("keep the body within {REQUEST_MOST_BYTES} bytes"),
    )
}

fn unfinished(error: &axum::Error) -> Report {
    Report::bug(
        "answer_cut_short",
        "the answer was not finished",
        error.to_string(),
        "send the request again",
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
