//! What may a run do with its own token, and with its children?

use super::{Caller, Refused, idempotency_key, parse};
use crate::children::Parent;
use crate::tokens::shown;
use agentd_domain::agent_api::{Child, StartChild, TOKEN_HEADER};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::rights::START_AGENTS;
use agentd_domain::token::{Shown, Verified};
use agentd_serving::ApiError;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Request};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use std::sync::Arc;

/// Before anything else: a run whose token holds no more is answered nothing. A request that brings a narrower token
/// of this agent is decided by that one.
pub(super) async fn decided(
    Extension(caller): Extension<Caller>,
    mut request: Request,
    next: Next,
) -> Response {
    if let Err(report) = caller.services.tokens.in_force(&caller.held) {
        caller.note("token.use", &report.code, "");
        return refused(&request, report);
    }
    let Some(header) = request.headers_mut().remove(TOKEN_HEADER) else { return next.run(request).await };
    match presented(&caller, &header) {
        Ok(narrower) => {
            request.extensions_mut().insert(narrower);
            next.run(request).await
        }
        Err(report) => {
            caller.note("token.use", &report.code, &report.why);
            refused(&request, report)
        }
    }
}

/// In the words of the path's API.
fn refused(request: &Request, report: Report) -> Response {
    if request.uri().path().starts_with("/v1/") {
        return ApiError::from(report).into_response();
    }
    Refused(report).into_response()
}

/// The caller with the rights of the token that it shows, within those of its run.
fn presented(caller: &Caller, header: &HeaderValue) -> Result<Caller, Report> {
    let text = header.to_str().map_err(|_| {
        let fix = "send the token as it was given, without a change";
        Report::caller("token_unreadable", "the token was refused", "it is not plain text", fix)
    })?;
    let shown = caller.services.tokens.verify(text, caller.agent)?;
    let own = &caller.held;
    let mut rights = shown.rights;
    rights.api.retain(|right| own.rights.api.contains(right));
    let expires = [own.expires_unix_s, shown.expires_unix_s].into_iter().flatten().min();
    let ids = own.revocation_ids.iter().chain(&shown.revocation_ids).cloned().collect();
    let held = Verified { holder: caller.agent, rights, expires_unix_s: expires, revocation_ids: ids };
    Ok(Caller { held: Arc::new(held), shown: Some(text.into()), ..caller.clone() })
}

pub(super) async fn token(Extension(caller): Extension<Caller>) -> Result<Json<Shown>, Refused> {
    let text = match &caller.shown {
        Some(text) => text.to_string(),
        None => caller.services.tokens.text_of(caller.agent).await?,
    };
    Ok(Json(shown(text)?))
}

pub(super) async fn start_child(
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Child>, Refused> {
    caller.may(START_AGENTS)?;
    let request: StartChild = parse(body)?;
    let key = idempotency_key(&headers)?;
    Ok(Json(caller.services.children.start(caller.parent(), request, key).await?))
}

pub(super) async fn children(Extension(caller): Extension<Caller>) -> Result<Json<Vec<Child>>, Refused> {
    caller.may(START_AGENTS)?;
    Ok(Json(caller.services.children.list(caller.agent).await?))
}

pub(super) async fn child(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Child>, Refused> {
    caller.may(START_AGENTS)?;
    Ok(Json(caller.services.children.one(caller.agent, id_of(&id)?).await?))
}

pub(super) async fn remove_child(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refused> {
    caller.may(START_AGENTS)?;
    caller.services.children.remove(&caller.parent(), id_of(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Caller {
    fn parent(&self) -> Parent {
        Parent { agent: self.agent, run: self.run, shown: self.shown.clone() }
    }

    fn note(&self, action: &str, code: &str, why: &str) {
        let entry = Entry::new(Actor::Agent, action, Verdict::Denied).of_run(self.agent, self.run);
        let detail = if why.is_empty() { code.to_owned() } else { format!("{code}: {why}") };
        self.services.audit.report(entry.detail(&detail));
    }
}

fn id_of(text: &str) -> Result<AgentId, Report> {
    text.parse().map_err(|_| {
        let fix = "`GET /agent/v1/agents` lists the children with their ids";
        Report::caller("not_found", "nothing was done", "this is not the id of an agent", fix)
    })
}
