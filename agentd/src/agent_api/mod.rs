//! What may a run ask of agentd on its own socket?
//!
//! In:    requests of exactly one run: who it is was decided when the launcher handed its listeners over.
//! Out:   answers; errors as [`Report`] with the status that belongs to them, below `/v1/` as OpenAI's.
//! Always: each route names the right it needs, and the right is looked up in the token that the run was started
//!         with, which must hold at that moment ([`Caller::may`]). Bodies are bounded. An answer to a `POST` with `Idempotency-Key` is kept for 24 hours. What a model
//!         was used for is entered, with a key before the answer's end is sent (`once.rs`).
//! Never:  a field of a request that says who is asking.
//! Threads: tasks of the data plane.

mod calls;
mod felt;
mod memory;
mod once;
mod own;
mod serve;

pub use serve::serve;

use crate::agents::Nerves;
use crate::audit::Audit;
use crate::children::Children;
use crate::engine::Engine;
use crate::gpu::{Gpu, Served};
use crate::inbox::Inbox;
use crate::memory::Memories;
use crate::store::Db;
use crate::tokens::Tokens;
use agentd_domain::agent_api::{Message, ReplyPart, SelfInfo};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::engine::Share;
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, AgentName, RunId};
use agentd_domain::rights::Request as Wish;
use agentd_domain::token::Verified;
use agentd_sandbox::client::Launcher;
use agentd_serving::{ApiError, Front};
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures::{Stream, StreamExt, stream};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// A memory's text has at most 32 KiB; escaped as JSON a few times that.
const BODY_MOST_BYTES: usize = 256 * 1024;
/// One part of a reply.
const LINE_MOST_BYTES: usize = 64 * 1024;
/// Proxies and clients give up after 30 s by custom.
const WAIT_MOST_S: u64 = 25;

/// What agentd offers to every run.
#[derive(Clone)]
pub struct Services {
    pub db: Db,
    pub inbox: Inbox,
    pub memories: Memories,
    pub engine: Engine,
    pub gpu: Gpu,
    pub audit: Audit,
    pub launcher: Launcher,
    pub tokens: Tokens,
    pub children: Children,
    pub nerves: Nerves,
}

/// One run, as its own requests see it.
#[derive(Clone)]
pub struct Caller {
    pub agent: AgentId,
    pub name: AgentName,
    pub run: RunId,
    pub held: Arc<Verified>,
    /// The token that this request was sent with, where it is not the run's own.
    pub shown: Option<Arc<str>>,
    pub services: Services,
}

/// One for all runs: who asks stands among a request's extensions, put there by whoever owns the run's listeners
/// (`serve.rs`). A router of its own would cost each run some sixty kilobytes.
pub fn router() -> Router {
    static ROUTER: LazyLock<Router> = LazyLock::new(routes);
    ROUTER.clone()
}

fn routes() -> Router {
    // The right is checked first: an answer that is kept is an answer of a model too.
    let models = agentd_serving::router()
        .route_layer(from_fn(fronted))
        .route_layer(from_fn(once::settled))
        .route_layer(from_fn(models_only));
    // Replies are streams and have their own end; everything else is answered once.
    let replies =
        Router::new().route("/agent/v1/messages/{id}/reply", post(reply)).layer(DefaultBodyLimit::disable());
    let own = Router::new()
        .route("/agent/v1/self", get(self_info))
        .route("/agent/v1/token", get(own::token))
        .route("/agent/v1/agents", get(own::children).post(own::start_child))
        .route("/agent/v1/agents/{id}", get(own::child).delete(own::remove_child))
        .route("/agent/v1/self/pain", post(felt::pain))
        .route("/agent/v1/self/progress", post(felt::progress))
        .route("/agent/v1/messages/next", get(next_message))
        .route("/agent/v1/calls", post(calls::call))
        .merge(memory::routes())
        .layer(DefaultBodyLimit::max(BODY_MOST_BYTES))
        // Of a limit of its own.
        .merge(memory::documents());
    let all = models.merge(own).merge(replies).fallback(nowhere).layer(from_fn(own::decided));
    // Outermost: what was refused counts too.
    all.layer(from_fn(felt::counted))
}

/// The engine as this caller sees it.
async fn fronted(Extension(caller): Extension<Caller>, mut request: Request, next: Next) -> Response {
    let Services { engine, gpu, db, .. } = caller.services.clone();
    let agent = caller.agent.to_string();
    // Agents of one owner share what they have in common.
    let salt = db.owner().to_string();
    let share = Share { account: agent.clone(), holder: agent.clone(), salt, ..Share::default() };
    let engine = Arc::new(Served { engine, gpu, db, agent: caller.agent });
    request.extensions_mut().insert(Front { engine, caller: agent, share });
    next.run(request).await
}

/// An error as an agent reads it.
struct Refused(Report);

impl From<Report> for Refused {
    fn from(report: Report) -> Self {
        Self(report)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

async fn self_info(Extension(caller): Extension<Caller>) -> Json<SelfInfo> {
    Json(SelfInfo {
        agent_id: caller.agent,
        name: caller.name.clone(),
        run_id: caller.run,
        rights: caller.held.rights.api.iter().cloned().collect(),
        model: caller.services.engine.view().default_chat.clone().unwrap_or_default(),
        appliance_version: crate::VERSION.to_owned(),
        health: caller.services.nerves.seen(caller.agent),
    })
}

#[derive(Deserialize)]
struct NextQuery {
    wait_s: Option<u64>,
}

async fn next_message(
    Extension(caller): Extension<Caller>,
    Query(query): Query<NextQuery>,
) -> Result<Response, Refused> {
    caller.may("messages")?;
    let wait = Duration::from_secs(query.wait_s.unwrap_or(0).min(WAIT_MOST_S));
    let message: Option<Message> = caller.services.inbox.next(caller.agent, caller.run, wait).await?;
    Ok(match message {
        Some(message) => {
            caller.services.nerves.beat(caller.agent).progress();
            Json(message).into_response()
        }
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

async fn reply(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, Refused> {
    caller.may("messages")?;
    let parts = Box::pin(parts_of(request.into_body()));
    caller.services.inbox.reply(caller.agent, caller.run, &id, parts).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The lines of a body as parts of a reply. Ends after the first line that is none.
fn parts_of(body: Body) -> impl Stream<Item = Result<ReplyPart, Report>> + Send {
    struct Lines {
        body: Body,
        rest: Vec<u8>,
        over: bool,
    }
    let lines = Lines { body, rest: Vec::new(), over: false };
    stream::unfold(lines, |mut lines| async move {
        loop {
            if let Some(end) = lines.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = lines.rest.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return Some((part_of(&line), lines));
            }
            if lines.over {
                let line = std::mem::take(&mut lines.rest);
                return (!line.trim_ascii().is_empty()).then(|| (part_of(&line), lines));
            }
            match lines.body.frame().await {
                Some(Ok(frame)) => {
                    lines.rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data.as_ref()))
                }
                // A connection that broke is a reply without its end.
                Some(Err(_)) | None => lines.over = true,
            }
            if lines.rest.len() > LINE_MOST_BYTES && !lines.rest.contains(&b'\n') {
                lines.over = true;
                lines.rest.clear();
                return Some((Err(line_too_long()), lines));
            }
        }
    })
    .scan(false, |failed, part: Result<ReplyPart, Report>| {
        let item = (!*failed).then(|| part.clone());
        *failed |= part.is_err();
        std::future::ready(item)
    })
}

fn part_of(line: &[u8]) -> Result<ReplyPart, Report> {
    serde_json::from_slice(line).map_err(|error| {
        Report::caller(
            "reply_malformed",
            "the reply was not taken",
            format!("a line is no part of a reply: {error}"),
            "send one JSON object per line, such as {\"type\":\"text\",\"text\":\"...\"}",
        )
    })
}

fn line_too_long() -> Report {
    Report::caller(
        "too_large",
        "the reply was not taken",
        format!("a line has more than {LINE_MOST_BYTES} bytes"),
        "send the text in several parts",
    )
}

async fn models_only(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    match caller.may("models") {
        Ok(()) => next.run(request).await,
        Err(report) => ApiError::from(report).into_response(),
    }
}

async fn nowhere() -> Refused {
    Refused(Report::caller(
        "not_found",
        "nothing was done",
        "agentd has nothing at this path",
        "see the agent API's table: /agent/v1/{self,token,agents,calls}, /agent/v1/memory/*, /agent/v1/messages/*, /v1/*",
    ))
}

impl Caller {
    /// Every look at a right is a decision, and is recorded.
    fn may(&self, right: &str) -> Result<(), Report> {
        let decided = self.services.tokens.may(&self.held, &Wish::Api(right.to_owned()));
        let has = matches!(decided, Ok(true));
        let verdict = if has { Verdict::Allowed } else { Verdict::Denied };
        let entry = Entry::new(Actor::Agent, "api.use", verdict).of_run(self.agent, self.run).by_right(right);
        let entry = match &decided {
            Err(report) => entry.detail(&report.code),
            Ok(_) => entry,
        };
        self.services.audit.report(entry);
        if decided? {
            return Ok(());
        }
        Err(Report::caller(
            "forbidden",
            "the request was refused",
            format!("the agent {} does not have the right `{right}`", self.name),
            "ask for it in `agent.toml` and install the agent again; `agentctl plan agent.toml` shows its rights",
        ))
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Report> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= 128 => Ok(Some(key.to_owned())),
        _ => Err(Report::caller(
            "idempotency_key_invalid",
            "the request was refused",
            "`Idempotency-Key` is empty, longer than 128 bytes or not plain text",
            "send a fresh UUID as the key",
        )),
    }
}

fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Report> {
    let what = "the request was refused";
    let bytes = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Report::caller(
            "too_large",
            what,
            rejection.body_text(),
            format!("keep the body within {BODY_MOST_BYTES} bytes"),
        ),
        _ => Report::caller("body_unreadable", what, rejection.body_text(), "send the request again"),
    })?;
    // A body that is no text is told so, and not as a mistake in column 0.
    if let Err(error) = std::str::from_utf8(&bytes) {
        return Err(Report::caller(
            "body_not_utf8",
            what,
            error.to_string(),
            "send JSON in UTF-8, as RFC 8259 says",
        ));
    }
    serde_json::from_slice(&bytes).map_err(|error| {
        Report::caller(
            "body_invalid",
            what,
            error.to_string(),
            "see the agent API's table for the body's shape",
        )
    })
}

#[cfg(test)]
mod tests;
