//! What does agentd learn of an agent's health from its requests, and what does the agent say of it?
//!
//! Always: every request is counted. One that agentd works on is open until its answer has left, and an agent that
//!         waits for it is not blamed for that. Asking for messages, or about itself, is no progress.
//! Never:  a decision. Those are `agentd_domain::health`'s.

use super::{Caller, Refused, parse};
use agentd_domain::agent_api::ReportPain;
use agentd_domain::fault::Report;
use agentd_domain::health::Pain;
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use std::sync::Arc;

/// What kind of request it is to an agent's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Waiting for work, or looking at itself.
    Aside,
    /// The agent is at work while it sends this.
    Reply,
    /// agentd is at work until this is answered.
    Asked { model: bool },
}

fn kind(path: &str) -> Kind {
    match path {
        "/agent/v1/messages/next" => Kind::Aside,
        _ if path.starts_with("/agent/v1/self") => Kind::Aside,
        _ if path.starts_with("/agent/v1/messages/") => Kind::Reply,
        _ => Kind::Asked { model: path.starts_with("/v1/") },
    }
}

/// Around every route of an agent.
pub async fn counted(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    let beat = caller.services.nerves.beat(caller.agent);
    let kind = kind(request.uri().path());
    beat.called();
    let open = matches!(kind, Kind::Asked { .. }).then(|| beat.open());
    let request = match kind {
        Kind::Reply => {
            // Each part of a reply is progress, also when its end is far away.
            let beat = Arc::clone(&beat);
            request.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    beat.progress();
                    frame
                }))
            })
        }
        Kind::Aside | Kind::Asked { .. } => request,
    };
    let response = next.run(request).await;
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        beat.failed();
        if kind == (Kind::Asked { model: true }) && status == StatusCode::SERVICE_UNAVAILABLE {
            beat.model_was_away();
        }
    }
    // Held until the last frame has left: only then is it answered.
    match open {
        None => response,
        Some(open) => response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                open.progress();
                frame
            }))
        }),
    }
}

/// Every agent may say that it hurts: its owner sees it, and nothing else follows from it.
pub async fn pain(
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Refused> {
    let said: ReportPain = parse(body)?;
    let pain = Pain::of_agent(&said.kind, said.severity, &said.message, crate::clock::unix_ms());
    let pain = pain.map_err(|why| {
        let fix = "send {\"kind\":\"tool.broken\",\"severity\":\"high\",\"message\":\"...\"}";
        Report::caller("body_invalid", "the pain was not taken", why, fix)
    })?;
    caller.services.nerves.hurt(caller.agent, pain)?;
    Ok(StatusCode::NO_CONTENT)
}

/// A long piece of work goes on.
pub async fn progress(Extension(caller): Extension<Caller>) -> StatusCode {
    caller.services.nerves.beat(caller.agent).progress();
    StatusCode::NO_CONTENT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_for_work_is_not_work() {
        for (path, expected) in [
            ("/agent/v1/messages/next", Kind::Aside),
            ("/agent/v1/self", Kind::Aside),
            ("/agent/v1/self/pain", Kind::Aside),
            ("/agent/v1/messages/7/reply", Kind::Reply),
            ("/agent/v1/memory/recall", Kind::Asked { model: false }),
            ("/v1/chat/completions", Kind::Asked { model: true }),
        ] {
            assert_eq!(kind(path), expected, "{path}");
        }
    }
}
