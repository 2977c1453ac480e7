//! What does a client get back?
//!
//! Errors of the API are [`Report`]s as JSON, with the status that belongs to them. Streams are NDJSON: one JSON
//! value per line, as it happens.

use crate::appliance::{Flow, Pending};
use crate::auth::{Denied, whole_seconds};
use agentd_domain::fault::{Fault, Report};
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// For what reads state.
pub const SHORT: Duration = Duration::from_secs(20);
/// For what starts or stops processes: a stop waits for the agent's grace time.
pub const LONG: Duration = Duration::from_secs(90);

/// An error on its way to a client.
#[derive(Debug)]
pub struct Failure {
    pub report: Report,
    pub retry_after: Option<Duration>,
}

impl Failure {
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.report.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Sets what every error answer carries, whatever its body.
    pub fn dress(&self, mut response: Response) -> Response {
        *response.status_mut() = self.status();
        if let Some(wait) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, whole_seconds(wait).into());
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.report.fault == Fault::Bug {
            tracing::error!(code = %self.report.code, report = %self.report, "request failed");
        }
        response
    }
}

impl From<Report> for Failure {
    fn from(report: Report) -> Self {
        Self { report, retry_after: None }
    }
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Self {
        Self { report: denied.report(), retry_after: denied.retry_after() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = axum::Json(&self.report).into_response();
        self.dress(body)
    }
}

pub type Answer<T> = Result<T, Failure>;

/// Waits for the appliance, but not for ever: a call may hang in a driver, and the person must be told.
pub async fn within<T>(limit: Duration, call: Pending<'_, T>) -> Answer<T> {
    match timeout(limit, call).await {
        Ok(result) => result.map_err(Failure::from),
        Err(_) => Err(Report::environment(
            "timeout",
            "the appliance did not answer",
            format!("it has worked on the request for {} s and may still do so", limit.as_secs()),
            "look at the overview for what hangs, then try again",
        )
        .into()),
    }
}

/// One line of JSON per item, until the items or the session end.
pub fn ndjson<T: Serialize + Send + 'static>(items: Flow<T>, gone: CancellationToken) -> Response {
    let lines = items.take_until(gone.cancelled_owned()).map(|item| Ok::<_, Infallible>(line(&item)));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
        // Proxies must pass each line on at once (nginx's name for it).
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(lines)).into_response()
}

fn line<T: Serialize>(item: &T) -> Bytes {
    // The API's types hold no maps with odd keys, so this cannot fail; an empty line would be skipped.
    let mut bytes = serde_json::to_vec(item).unwrap_or_default();
    bytes.push(b'\n');
    bytes.into()
}
