//! How is a request's body read without trusting it?
//!
//! Every body has a limit in bytes and in time. Ordinary ones are at most [`BODY_LIMIT_BYTES`] and are held in
//! memory; uploads are passed on piece by piece and never held. An announced length over the limit is refused
//! before a byte of the body is read.

use crate::answer::Failure;
use crate::appliance::Upload;
use agentd_domain::fault::Report;
use axum::body::{Body, HttpBody};
use axum::extract::{Form, FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use std::io;
use std::time::Duration;
use tokio::time::timeout;

/// The largest honest one is a chat message or a manifest.
pub const BODY_LIMIT_BYTES: u64 = 8 * 1024 * 1024;
/// Agents are programs with their libraries; a root file system of an OCI image fits.
pub const PACKAGE_LIMIT_BYTES: u64 = 1024 * 1024 * 1024;

/// Between two pieces of a body. A phone that changes its network needs some seconds.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);
/// For an ordinary body as a whole: 8 MiB at 1 Mbit/s, twice.
const BODY_TIMEOUT: Duration = Duration::from_secs(130);

/// A JSON body.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        if !is(request.headers(), "application/json") {
            return Err(malformed("the content type is not application/json").into());
        }
        let bytes = whole(request.into_body()).await?;
        let value = serde_json::from_slice(&bytes).map_err(|e| malformed(&e.to_string()))?;
        Ok(Self(value))
    }
}

/// A form as a browser sends it.
pub struct Fields<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Fields<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let bytes = whole(body).await?;
        let again = Request::from_parts(parts, Body::from(bytes));
        let Form(value) = Form::from_request(again, state).await.map_err(|e| malformed(&e.body_text()))?;
        Ok(Self(value))
    }
}

/// Text in UTF-8.
pub struct Text(pub String);

impl<S: Send + Sync> FromRequest<S> for Text {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        let bytes = whole(request.into_body()).await?;
        String::from_utf8(bytes.into()).map(Self).map_err(|_| malformed("the text is not UTF-8").into())
    }
}

/// The name in a path like `/agents/{name}`, decoded but not checked.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let name = Path::<String>::from_request_parts(parts, state).await;
        name.map(|Path(name)| Self(name)).map_err(|e| malformed(&e.body_text()).into())
    }
}

/// The names in a path like `/agents/{name}/memory/records/{id}`, decoded but not checked.
pub struct Names<const N: usize>(pub [String; N]);

impl<const N: usize, S: Send + Sync> FromRequestParts<S> for Names<N> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let names = Path::<Vec<String>>::from_request_parts(parts, state).await;
        let Path(names) = names.map_err(|e| malformed(&e.body_text()))?;
        names.try_into().map(Self).map_err(|_| malformed("the path has other parts").into())
    }
}

/// Turns a body into an [`Upload`] that ends with an error when it exceeds `limit_bytes` or stalls.
pub fn upload(request: Request, limit_bytes: Option<u64>) -> Result<Upload, Report> {
    let length_bytes = announced(request.headers());
    if let (Some(length), Some(limit)) = (length_bytes, limit_bytes)
        && length > limit
    {
        return Err(too_large(limit));
    }
    let data = request.into_body().into_data_stream();
    let mut left = limit_bytes;
    let pieces = tokio_stream::StreamExt::timeout(data, PIECE_TIMEOUT).map(move |piece| {
        let piece = match piece {
            Ok(piece) => piece.map_err(io::Error::other)?,
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped sending")),
        };
        if let Some(left) = &mut left {
            *left = left.checked_sub(piece.len() as u64).ok_or_else(|| {
                io::Error::new(io::ErrorKind::FileTooLarge, "the upload is larger than this route takes")
            })?;
        }
        Ok(piece)
    });
    Ok(Upload { length_bytes, pieces: Box::pin(pieces) })
}

/// Refuses what announces more than an ordinary body, before anything else looks at the request. For every
/// route but uploads.
pub async fn refuse_large(request: Request, next: Next) -> Response {
    match announced(request.headers()) {
        Some(length) if length > BODY_LIMIT_BYTES => {
            Failure::from(too_large(BODY_LIMIT_BYTES)).into_response()
        }
        _ => next.run(request).await,
    }
}

async fn whole(body: Body) -> Result<Bytes, Report> {
    timeout(BODY_TIMEOUT, collect(body)).await.unwrap_or_else(|_| Err(too_slow()))
}

async fn collect(body: Body) -> Result<Bytes, Report> {
    if body.size_hint().lower() > BODY_LIMIT_BYTES {
        return Err(too_large(BODY_LIMIT_BYTES));
    }
    let mut bytes = BytesMut::new();
    let mut data = body.into_data_stream();
    while let Some(piece) = timeout(PIECE_TIMEOUT, data.next()).await.map_err(|_| too_slow())? {
        let piece = piece.map_err(|e| malformed(&format!("the body broke off: {e}")))?;
        if (bytes.len() + piece.len()) as u64 > BODY_LIMIT_BYTES {
            return Err(too_large(BODY_LIMIT_BYTES));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn is(headers: &HeaderMap, media_type: &str) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case(media_type))
}

fn malformed(why: &str) -> Report {
    Report::caller(
        "request_malformed",
        "the request was not understood",
        why,
        "send what the API's table in `agentd/crates/domain/src/api.rs` says, or use agentctl of the same version",
    )
}

fn too_large(limit_bytes: u64) -> Report {
    Report::caller(
        "too_large",
        "the request was not read",
        format!("its body is larger than the {} MiB that this route takes", limit_bytes >> 20),
        "send less; models go to PUT /api/v1/models/<name> (`agentctl model add FILE`)",
    )
}

fn too_slow() -> Report {
    Report::caller(
        "request_too_slow",
        "the request was not read",
        "its body came too slowly",
        "send it again",
    )
}
