//! How does an OpenAI client see that something went wrong?

use agentd_domain::fault::Report;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// `{"error": {"message", "type", "param", "code"}}` with its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: u16,
    pub message: String,
    /// The parameter that is to blame.
    pub param: Option<String>,
    pub code: String,
}

impl ApiError {
    /// The request cannot be served as it is: 400.
    pub fn invalid(param: &str, code: &str, message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into(), param: Some(param.to_owned()), code: code.to_owned() }
    }

    pub fn body(&self) -> Value {
        // The types that OpenAI documents; clients map the status, people read the type.
        let kind = match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<Report> for ApiError {
    fn from(report: Report) -> Self {
        let status = report.http_status();
        Self { status, message: report.to_string(), param: None, code: report.code }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.body())).into_response();
        if matches!(self.status, 429 | 503) {
            // OpenAI's clients honour it; an engine that restarts needs about this long.
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
