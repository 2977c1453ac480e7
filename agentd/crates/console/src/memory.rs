//! What does the management API do with memories? See the tables in [`agentd_domain::memory_api`].
//!
//! Never: a question or a text in an address, where a proxy or a browser would keep it.

use crate::answer::{Answer, LONG, SHORT, within};
use crate::api::{Machine, key};
use crate::input::{Json, Name, Names};
use agentd_domain::agent_api::Tier;
use agentd_domain::api::AgentKey;
use agentd_domain::fault::Report;
use agentd_domain::ids::RecordId;
use agentd_domain::memory_api::{
    CollectionName, Correct, Document, Grant, KnowledgeOrder, KnowledgeOutcome, List, Order, Outcome, Pin,
    Quota, Search, Standing, WriteBlock,
};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use std::time::Duration;

/// A whole reading of a store of 250,000 records.
const CHECK: Duration = Duration::from_secs(10 * 60);

async fn done(appliance: Machine, agent: &str, order: Order) -> Answer<Response> {
    let State(appliance) = appliance;
    // An embedder that is starting is waited for.
    let patience = if matches!(order, Order::Check) { CHECK } else { LONG };
    let outcome = within(patience, appliance.memory(key(agent)?, order)).await?;
    Ok(match outcome {
        Outcome::Done => StatusCode::NO_CONTENT.into_response(),
        outcome => axum::Json(outcome).into_response(),
    })
}

pub async fn usage(appliance: Machine, Name(agent): Name) -> Answer<Response> {
    done(appliance, &agent, Order::Usage).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfTier {
    tier: Option<Tier>,
    state: Option<Standing>,
    before: Option<RecordId>,
    limit: Option<u32>,
}

pub async fn list(
    appliance: Machine,
    Name(agent): Name,
    asked: Result<Query<OfTier>, QueryRejection>,
) -> Answer<Response> {
    let Query(OfTier { tier, state, before, limit }) = asked.map_err(malformed)?;
    done(appliance, &agent, Order::List(List { tier, state, before, limit })).await
}

pub async fn search(appliance: Machine, Name(agent): Name, Json(search): Json<Search>) -> Answer<Response> {
    done(appliance, &agent, Order::Search(search)).await
}

pub async fn show(appliance: Machine, Names([agent, id]): Names<2>) -> Answer<Response> {
    done(appliance, &agent, Order::Show(record(&id)?)).await
}

pub async fn history(appliance: Machine, Names([agent, id]): Names<2>) -> Answer<Response> {
    done(appliance, &agent, Order::History(record(&id)?)).await
}

pub async fn correct(
    appliance: Machine,
    Names([agent, id]): Names<2>,
    Json(Correct { text }): Json<Correct>,
) -> Answer<Response> {
    done(appliance, &agent, Order::Correct(record(&id)?, text)).await
}

pub async fn pin(
    appliance: Machine,
    Names([agent, id]): Names<2>,
    Json(Pin { pinned }): Json<Pin>,
) -> Answer<Response> {
    done(appliance, &agent, Order::Pin(record(&id)?, pinned)).await
}

pub async fn forget(appliance: Machine, Names([agent, id]): Names<2>) -> Answer<Response> {
    done(appliance, &agent, Order::Forget(record(&id)?)).await
}

pub async fn purge(appliance: Machine, Names([agent, id]): Names<2>) -> Answer<Response> {
    done(appliance, &agent, Order::Purge(record(&id)?)).await
}

pub async fn restore(appliance: Machine, Names([agent, id]): Names<2>) -> Answer<Response> {
    done(appliance, &agent, Order::Restore(record(&id)?)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfJournal {
    before: Option<u64>,
    limit: Option<u32>,
}

pub async fn journal(
    appliance: Machine,
    Name(agent): Name,
    asked: Result<Query<OfJournal>, QueryRejection>,
) -> Answer<Response> {
    let Query(OfJournal { before, limit }) = asked.map_err(malformed)?;
    done(appliance, &agent, Order::Journal { before, limit }).await
}

pub async fn blocks(appliance: Machine, Name(agent): Name) -> Answer<Response> {
    done(appliance, &agent, Order::Blocks).await
}

pub async fn write_block(
    appliance: Machine,
    Names([agent, block]): Names<2>,
    Json(write): Json<WriteBlock>,
) -> Answer<Response> {
    done(appliance, &agent, Order::WriteBlock(block, write)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    version: u64,
}

pub async fn remove_block(
    appliance: Machine,
    Names([agent, block]): Names<2>,
    asked: Result<Query<Version>, QueryRejection>,
) -> Answer<Response> {
    let Query(Version { version }) = asked.map_err(malformed)?;
    done(appliance, &agent, Order::RemoveBlock(block, version)).await
}

pub async fn check(appliance: Machine, Name(agent): Name) -> Answer<Response> {
    done(appliance, &agent, Order::Check).await
}

async fn shared(appliance: Machine, order: KnowledgeOrder) -> Answer<axum::Json<KnowledgeOutcome>> {
    let State(appliance) = appliance;
    let patience = if matches!(order, KnowledgeOrder::List) { SHORT } else { LONG };
    within(patience, appliance.knowledge(order)).await.map(axum::Json)
}

type Shared = Answer<axum::Json<KnowledgeOutcome>>;

pub async fn collections(appliance: Machine) -> Shared {
    shared(appliance, KnowledgeOrder::List).await
}

pub async fn set_collection(appliance: Machine, Name(name): Name, Json(quota): Json<Quota>) -> Shared {
    shared(appliance, KnowledgeOrder::Set(collection(&name)?, quota)).await
}

pub async fn remove_collection(appliance: Machine, Name(name): Name) -> Shared {
    shared(appliance, KnowledgeOrder::Remove(collection(&name)?)).await
}

pub async fn grant(
    appliance: Machine,
    Names([name, agent]): Names<2>,
    Json(Grant { access }): Json<Grant>,
) -> Shared {
    shared(appliance, KnowledgeOrder::Grant(collection(&name)?, agent_key(&agent)?, access)).await
}

pub async fn revoke(appliance: Machine, Names([name, agent]): Names<2>) -> Shared {
    shared(appliance, KnowledgeOrder::Revoke(collection(&name)?, agent_key(&agent)?)).await
}

pub async fn add_document(appliance: Machine, Name(name): Name, Json(document): Json<Document>) -> Shared {
    shared(appliance, KnowledgeOrder::Add(collection(&name)?, document)).await
}

pub async fn remove_document(appliance: Machine, Names([name, document]): Names<2>) -> Shared {
    shared(appliance, KnowledgeOrder::RemoveDocument(collection(&name)?, document)).await
}

pub fn record(text: &str) -> Result<RecordId, Report> {
    text.parse().map_err(|_| {
        let why = format!("`{}` is not the id of a memory", text.escape_debug());
        Report::caller("not_found", "nothing was done", why, "`agentctl memory ls NAME` shows the ids")
    })
}

pub fn collection(text: &str) -> Result<CollectionName, Report> {
    text.parse().map_err(|why: String| {
        Report::caller(
            "collection_malformed",
            "nothing was done",
            why,
            "`agentctl knowledge ls` shows the names",
        )
    })
}

fn agent_key(text: &str) -> Result<AgentKey, crate::answer::Failure> {
    key(text)
}

fn malformed(error: QueryRejection) -> Report {
    let fix = "the table in `agentd/crates/domain/src/memory_api.rs` lists what may follow the `?`";
    Report::caller("query_malformed", "nothing was read", error.body_text(), fix)
}
