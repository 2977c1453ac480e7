//! What may a run do with its agent's memory, and with what was shared with it?
//!
//! In:    requests below `/agent/v1/memory/`; the table is in [`agentd_domain::memory_api`].
//! Always: whose memory it is follows from the socket. A record's tier decides by which right it may be read or changed,
//!         and is looked up in the store. Forgetting here can be taken back by the owner for seven days.
//! Never:  a path, a header or a body that names an agent or a run.

use super::{Caller, Refused, idempotency_key, parse};
use crate::memory::{DOCUMENT_MOST_BYTES, NotWritten, Teller, Writer};
use agentd_domain::agent_api::{Recall, Recalled, Remembered, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::RecordId;
use agentd_domain::memory_api::{
    Block, Blocks, Collection, CollectionName, Conflict, Correct, Document, DocumentAdded, History, Journal,
    List, Pin, Prompt, Record, Records, Standing, Told, Usage, WriteBlock,
};
use agentd_memory::{ForgetMode, SourceKind};
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

type Body = Result<Bytes, BytesRejection>;
type Answer<T> = Result<Json<T>, Refused>;
type Asked<T> = Result<Query<T>, QueryRejection>;

pub(super) fn routes() -> Router {
    Router::new()
        .route("/agent/v1/memory/remember", post(remember))
        .route("/agent/v1/memory/recall", post(recall))
        .route("/agent/v1/memory/working", get(working))
        .route("/agent/v1/memory/blocks", get(blocks))
        .route("/agent/v1/memory/blocks/{key}", get(block).put(write_block).delete(remove_block))
        .route("/agent/v1/memory/prompt", get(prompt))
        .route("/agent/v1/memory/records", get(list))
        .route("/agent/v1/memory/records/{id}", get(show))
        .route("/agent/v1/memory/records/{id}/history", get(history))
        .route("/agent/v1/memory/records/{id}/correct", post(correct))
        .route("/agent/v1/memory/records/{id}/pin", post(pin))
        .route("/agent/v1/memory/records/{id}/forget", post(forget))
        .route("/agent/v1/memory/records/{id}/restore", post(restore))
        .route("/agent/v1/memory/journal", get(journal))
        .route("/agent/v1/memory/usage", get(usage))
        .route("/agent/v1/memory/knowledge", get(knowledge))
        .route("/agent/v1/memory/knowledge/{name}/documents/{id}", delete(remove_document))
}

/// A document is larger than any other body: escaped as JSON up to twice its size.
pub(super) fn documents() -> Router {
    Router::new()
        .route("/agent/v1/memory/knowledge/{name}/documents", post(add_document))
        .layer(DefaultBodyLimit::max(2 * DOCUMENT_MOST_BYTES))
}

/// What may be done in a tier.
#[derive(Clone, Copy)]
enum Deed {
    Recall,
    Remember,
    Correct,
    Forget,
}

impl Caller {
    fn may_in(&self, deed: Deed, tier: Tier) -> Result<(), Report> {
        let deed = match deed {
            Deed::Recall => "recall",
            Deed::Remember => "remember",
            Deed::Correct => "correct",
            Deed::Forget => "forget",
        };
        self.may(&format!("memory.{deed}.{}", tier.name()))
    }

    /// The record of the caller's own memory, if it may do this in its tier.
    async fn record(&self, deed: Deed, id: &str) -> Result<Record, Report> {
        let id = id_of(id)?;
        // Without any right on memories nothing is looked up.
        let any = self.held.rights.api.iter().any(|right| right.starts_with("memory."));
        if !any {
            self.may_in(deed, Tier::Spirit)?;
        }
        let record = self.services.memories.show(self.agent, id).await?;
        self.may_in(deed, record.tier)?;
        Ok(record)
    }

    fn teller(&self) -> Teller {
        Teller { agent: self.agent, run: self.run }
    }
}

async fn remember(
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Remembered> {
    let told: Told = parse(body)?;
    caller.may_in(Deed::Remember, told.tier)?;
    let key = idempotency_key(&headers)?;
    Ok(Json(caller.services.memories.remember(caller.teller(), told, key).await?))
}

async fn recall(Extension(caller): Extension<Caller>, body: Body) -> Answer<Recalled> {
    let Question { mut request, as_of_unix_ms, collections } = Question::read(parse(body)?)?;
    if request.tiers.is_empty() {
        request.tiers.push(Tier::Spirit);
    }
    for &tier in &request.tiers {
        caller.may_in(Deed::Recall, tier)?;
    }
    let memories = &caller.services.memories;
    Ok(Json(memories.recall(caller.agent, request, as_of_unix_ms, collections).await?))
}

/// What `recall` takes besides [`Recall`], which the store reads.
struct Question {
    request: Recall,
    as_of_unix_ms: Option<i64>,
    collections: Option<Vec<CollectionName>>,
}

impl Question {
    fn read(mut body: Value) -> Result<Self, Report> {
        let mut own = |name: &str| body.as_object_mut().and_then(|object| object.remove(name));
        let (as_of, collections) = (own("as_of_unix_ms"), own("collections"));
        Ok(Self {
            as_of_unix_ms: read(as_of.unwrap_or_default())?,
            collections: read(collections.unwrap_or_default())?,
            request: read(body)?,
        })
    }
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, Report> {
    serde_json::from_value(value).map_err(|error| {
        let fix = "see the agent API's table for the body's shape";
        Report::caller("body_invalid", "the request was refused", error.to_string(), fix)
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfLog {
    before: Option<RecordId>,
    limit: Option<u32>,
    #[serde(default)]
    run: WhichRun,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum WhichRun {
    #[default]
    This,
    All,
}

async fn working(Extension(caller): Extension<Caller>, asked: Asked<OfLog>) -> Answer<Records> {
    let OfLog { before, limit, run } = query(asked)?;
    caller.may_in(Deed::Recall, Tier::Working)?;
    let run = match run {
        WhichRun::This => Some(caller.run.to_string()),
        WhichRun::All => None,
    };
    Ok(Json(caller.services.memories.log_of_run(caller.agent, run, before, limit).await?))
}

async fn blocks(Extension(caller): Extension<Caller>) -> Answer<Blocks> {
    caller.may_in(Deed::Recall, Tier::Active)?;
    Ok(Json(caller.services.memories.blocks(caller.agent).await?))
}

async fn block(Extension(caller): Extension<Caller>, Path(key): Path<String>) -> Answer<Block> {
    caller.may_in(Deed::Recall, Tier::Active)?;
    Ok(Json(caller.services.memories.block(caller.agent, key).await?))
}

async fn prompt(Extension(caller): Extension<Caller>) -> Answer<Prompt> {
    caller.may_in(Deed::Recall, Tier::Active)?;
    let Blocks { blocks } = caller.services.memories.blocks(caller.agent).await?;
    Ok(Json(Prompt::of(&blocks)))
}

async fn write_block(
    Extension(caller): Extension<Caller>,
    Path(key): Path<String>,
    body: Body,
) -> Result<Json<Block>, Response> {
    let write: WriteBlock = parse(body).map_err(refusal)?;
    caller.may_in(Deed::Remember, Tier::Active).map_err(refusal)?;
    let written = caller.services.memories.write_block(caller.agent, key, write).await;
    written.map(Json).map_err(not_written)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Version {
    version: u64,
}

async fn remove_block(
    Extension(caller): Extension<Caller>,
    Path(key): Path<String>,
    asked: Asked<Version>,
) -> Result<StatusCode, Response> {
    let Version { version } = query(asked).map_err(refusal)?;
    caller.may_in(Deed::Forget, Tier::Active).map_err(refusal)?;
    let removed = caller.services.memories.remove_block(caller.agent, key, version).await;
    removed.map(|()| StatusCode::NO_CONTENT).map_err(not_written)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfTier {
    /// Default: spirit.
    tier: Option<Tier>,
    state: Option<Standing>,
    before: Option<RecordId>,
    limit: Option<u32>,
}

async fn list(Extension(caller): Extension<Caller>, asked: Asked<OfTier>) -> Answer<Records> {
    let OfTier { tier, state, before, limit } = query(asked)?;
    let tier = tier.unwrap_or(Tier::Spirit);
    caller.may_in(Deed::Recall, tier)?;
    let list = List { tier: Some(tier), state, before, limit };
    Ok(Json(caller.services.memories.list(caller.agent, list).await?))
}

async fn show(Extension(caller): Extension<Caller>, Path(id): Path<String>) -> Answer<Record> {
    Ok(Json(caller.record(Deed::Recall, &id).await?))
}

async fn history(Extension(caller): Extension<Caller>, Path(id): Path<String>) -> Answer<History> {
    let id = id_of(&id)?;
    caller.may_in(Deed::Recall, Tier::Spirit)?;
    let mut history = caller.services.memories.history(caller.agent, id).await?;
    // A chain stays in its tier; what it was promoted from may be in one that the caller may not read.
    for tier in [Tier::Working, Tier::Active] {
        if history.chain.iter().any(|record| record.tier == tier) {
            caller.may_in(Deed::Recall, tier)?;
        }
    }
    history.chain.retain(|record| record.tier != Tier::Knowledge);
    Ok(Json(history))
}

async fn correct(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<Remembered> {
    let Correct { text } = parse(body)?;
    let record = caller.record(Deed::Correct, &id).await?;
    let memories = &caller.services.memories;
    Ok(Json(memories.correct(caller.agent, SourceKind::Agent, record.id, text).await?))
}

async fn pin(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Result<StatusCode, Refused> {
    let Pin { pinned } = parse(body)?;
    let record = caller.record(Deed::Correct, &id).await?;
    caller.services.memories.pin(caller.agent, record.id, pinned).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn forget(Extension(caller): Extension<Caller>, Path(id): Path<String>) -> Result<StatusCode, Refused> {
    let record = caller.record(Deed::Forget, &id).await?;
    caller.services.memories.forget(caller.agent, record.id, ForgetMode::Tombstone).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn restore(
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refused> {
    let record = caller.record(Deed::Forget, &id).await?;
    caller.services.memories.restore(caller.agent, record.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfJournal {
    before: Option<u64>,
    limit: Option<u32>,
}

async fn journal(Extension(caller): Extension<Caller>, asked: Asked<OfJournal>) -> Answer<Journal> {
    let OfJournal { before, limit } = query(asked)?;
    caller.may_in(Deed::Recall, Tier::Spirit)?;
    Ok(Json(caller.services.memories.journal(caller.agent, before, limit).await?))
}

/// Numbers of its own memory are no secret from an agent that has one.
async fn usage(Extension(caller): Extension<Caller>) -> Answer<Usage> {
    if !caller.held.rights.api.iter().any(|right| right.starts_with("memory.")) {
        caller.may_in(Deed::Recall, Tier::Spirit)?;
    }
    Ok(Json(caller.services.memories.usage(caller.agent).await?))
}

async fn knowledge(Extension(caller): Extension<Caller>) -> Answer<Vec<Collection>> {
    caller.may_in(Deed::Recall, Tier::Knowledge)?;
    Ok(Json(caller.services.memories.granted(caller.agent).await?))
}

async fn add_document(
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer<DocumentAdded> {
    caller.may_in(Deed::Remember, Tier::Knowledge)?;
    let document: Document = parse(body)?;
    let (name, key) = (collection(&name)?, idempotency_key(&headers)?);
    let by = Writer::Agent(caller.teller());
    Ok(Json(caller.services.memories.add_document(by, name, document, key).await?))
}

async fn remove_document(
    Extension(caller): Extension<Caller>,
    Path((name, id)): Path<(String, String)>,
) -> Result<StatusCode, Refused> {
    caller.may_in(Deed::Forget, Tier::Knowledge)?;
    let by = Writer::Agent(caller.teller());
    caller.services.memories.remove_document(by, collection(&name)?, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn query<T>(asked: Asked<T>) -> Result<T, Report> {
    let Query(asked) = asked.map_err(|error| {
        let fix = "see the table of the agent API for what may follow the `?`";
        Report::caller("query_malformed", "the request was refused", error.body_text(), fix)
    })?;
    Ok(asked)
}

fn id_of(text: &str) -> Result<RecordId, Report> {
    text.parse().map_err(|_| {
        let why = format!("`{}` is not the id of a record", text.escape_debug());
        Report::caller(
            "not_found",
            "nothing was done",
            why,
            "`GET /agent/v1/memory/records` lists them with their ids",
        )
    })
}

fn collection(text: &str) -> Result<CollectionName, Report> {
    text.parse().map_err(|why: String| {
        let fix = "`GET /agent/v1/memory/knowledge` lists those that were granted";
        Report::caller("not_found", "nothing was done", why, fix)
    })
}

fn refusal(report: Report) -> Response {
    Refused(report).into_response()
}

fn not_written(error: NotWritten) -> Response {
    match error {
        NotWritten::Refused(report) => refusal(report),
        NotWritten::Changed(report, current) => {
            (StatusCode::CONFLICT, Json(Conflict { report, current })).into_response()
        }
    }
}

#[cfg(test)]
mod tests;
