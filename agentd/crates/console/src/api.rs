//! What does the management API do? See the table in [`agentd_domain::api`].
//!
//! Each handler checks its input, asks the [`Appliance`], and passes the answer on.

use crate::answer::{Answer, Failure, LONG, SHORT, ndjson, within};
use crate::appliance::{Appliance, AuditQuery, Follow, LogQuery, Residence};
use crate::auth::Auth;
use crate::gate::SignedIn;
use crate::input::{self, Json, Name, PACKAGE_LIMIT_BYTES, Text};
use crate::serve::Peer;
use agentd_domain::api::{
    Agent, AgentKey, ApplianceStatus, ChatRequest, Claim, Liveness, Login, Model, ModelName, PullModel,
    Session,
};
use agentd_domain::audit::SignedHead;
use agentd_domain::fault::Report;
use agentd_domain::ledger::{Assign, Devices, GrantDevice, ModelPlan, Partition, PartitionId, PlanOrder};
use agentd_domain::plan::SandboxPlan;
use agentd_domain::token::{
    Attenuate, Inspect, Key, Mint, Revocation, Revoke, Revoked, Shown, Verified, Verify,
};
use axum::Json as Out;
use axum::extract::{Extension, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// As many as the console shows, and enough to see what went wrong.
pub const LOG_LINES_DEFAULT: usize = 200;
const LOG_LINES_MOST: usize = 10_000;
/// A page of the audit log is made in memory.
const AUDIT_RECORDS_DEFAULT: usize = 200;
const AUDIT_RECORDS_MOST: usize = 1000;
/// A person does not type more; a document belongs into an agent's memory, piece by piece.
pub const CHAT_LIMIT_BYTES: usize = 64 * 1024;
/// A package is written to disk while it arrives: this is for a slow line and a slow disk together.
const INSTALL: Duration = Duration::from_secs(30 * 60);
/// A model of 40 GB over 100 Mbit/s takes an hour.
const ADD_MODEL: Duration = Duration::from_secs(6 * 3600);

pub type Machine = State<Arc<dyn Appliance>>;

pub async fn healthz(State(appliance): Machine) -> Out<Liveness> {
    Out(Liveness { health: appliance.health() })
}

pub async fn claim(
    State(auth): State<Arc<Auth>>,
    peer: Option<Extension<Peer>>,
    Json(claim): Json<Claim>,
) -> Answer<Out<Session>> {
    Ok(Out(auth.claim(claim, address(peer)).await?))
}

pub async fn login(
    State(auth): State<Arc<Auth>>,
    peer: Option<Extension<Peer>>,
    Json(login): Json<Login>,
) -> Answer<Out<Session>> {
    Ok(Out(auth.login(login.password, address(peer)).await?))
}

pub async fn logout(State(auth): State<Arc<Auth>>, Extension(session): Extension<SignedIn>) -> StatusCode {
    auth.logout(&session.token);
    StatusCode::NO_CONTENT
}

pub async fn status(State(appliance): Machine) -> Answer<Out<ApplianceStatus>> {
    within(SHORT, appliance.status()).await.map(Out)
}

pub async fn plan(State(appliance): Machine, Text(manifest): Text) -> Answer<Out<SandboxPlan>> {
    within(SHORT, appliance.plan(manifest)).await.map(Out)
}

pub async fn agents(State(appliance): Machine) -> Answer<Out<Vec<Agent>>> {
    within(SHORT, appliance.agents()).await.map(Out)
}

pub async fn agent(State(appliance): Machine, Name(name): Name) -> Answer<Out<Agent>> {
    within(SHORT, appliance.agent(key(&name)?)).await.map(Out)
}

pub async fn install(State(appliance): Machine, request: Request) -> Answer<Out<Agent>> {
    let package = input::upload(request, Some(PACKAGE_LIMIT_BYTES))?;
    within(INSTALL, appliance.install(package)).await.map(Out)
}

pub async fn start(State(appliance): Machine, Name(name): Name) -> Answer<Out<Agent>> {
    within(LONG, appliance.start(key(&name)?)).await.map(Out)
}

pub async fn stop(State(appliance): Machine, Name(name): Name) -> Answer<Out<Agent>> {
    within(LONG, appliance.stop(key(&name)?)).await.map(Out)
}

pub async fn remove(State(appliance): Machine, Name(name): Name) -> Answer<StatusCode> {
    within(LONG, appliance.remove(key(&name)?)).await.map(|()| StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogParameters {
    #[serde(default)]
    lines: Option<usize>,
    #[serde(default)]
    follow: bool,
}

pub async fn logs(
    State(appliance): Machine,
    Extension(session): Extension<SignedIn>,
    Name(name): Name,
    parameters: Result<Query<LogParameters>, axum::extract::rejection::QueryRejection>,
) -> Answer<Response> {
    let Query(parameters) = parameters.map_err(|e| {
        Report::caller("query_malformed", "no log was read", e.body_text(), "write `?lines=200&follow=false`")
    })?;
    let query = LogQuery {
        lines: parameters.lines.unwrap_or(LOG_LINES_DEFAULT).min(LOG_LINES_MOST),
        follow: if parameters.follow { Follow::Yes } else { Follow::No },
    };
    let lines = within(SHORT, appliance.logs(key(&name)?, query)).await?;
    Ok(ndjson(lines, session.grant.gone))
}

pub async fn chat(
    State(appliance): Machine,
    Extension(session): Extension<SignedIn>,
    Name(name): Name,
    headers: HeaderMap,
    Json(mut message): Json<ChatRequest>,
) -> Answer<Response> {
    if message.idempotency_key.is_none() {
        let key = headers.get("idempotency-key").and_then(|value| value.to_str().ok());
        message.idempotency_key = key.map(str::to_owned);
    }
    check_message(&message)?;
    let parts = within(SHORT, appliance.chat(key(&name)?, message)).await?;
    Ok(ndjson(parts, session.grant.gone))
}

pub async fn models(State(appliance): Machine) -> Answer<Out<Vec<Model>>> {
    within(SHORT, appliance.models()).await.map(Out)
}

pub async fn add_model(State(appliance): Machine, Name(name): Name, request: Request) -> Answer<Out<Model>> {
    let name = model_name(&name)?;
    let file = input::upload(request, None)?;
    within(ADD_MODEL, appliance.add_model(name, file)).await.map(Out)
}

pub async fn pull_model(
    State(appliance): Machine,
    Extension(session): Extension<SignedIn>,
    Name(name): Name,
    Json(from): Json<PullModel>,
) -> Answer<Response> {
    let parts = within(SHORT, appliance.pull_model(model_name(&name)?, from)).await?;
    Ok(ndjson(parts, session.grant.gone))
}

pub async fn remove_model(State(appliance): Machine, Name(name): Name) -> Answer<StatusCode> {
    within(LONG, appliance.remove_model(model_name(&name)?)).await.map(|()| StatusCode::NO_CONTENT)
}

pub async fn pin_model(State(appliance): Machine, Name(name): Name) -> Answer<Out<Model>> {
    within(SHORT, appliance.pin_model(model_name(&name)?, Residence::Pinned)).await.map(Out)
}

pub async fn unpin_model(State(appliance): Machine, Name(name): Name) -> Answer<Out<Model>> {
    within(SHORT, appliance.pin_model(model_name(&name)?, Residence::OnDemand)).await.map(Out)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanParameters {
    #[serde(default)]
    context_tokens: u32,
    #[serde(default)]
    sequences: u32,
}

pub async fn plan_model(
    State(appliance): Machine,
    Name(name): Name,
    parameters: Result<Query<PlanParameters>, axum::extract::rejection::QueryRejection>,
) -> Answer<Out<ModelPlan>> {
    let Query(wanted) = parameters.map_err(|e| {
        let fix = "write `?context_tokens=4096&sequences=8`, or leave both out";
        Report::caller("query_malformed", "nothing was planned", e.body_text(), fix)
    })?;
    let name = model_name(&name)?;
    within(SHORT, appliance.plan_model(name, wanted.context_tokens, wanted.sequences)).await.map(Out)
}

pub async fn plan_header(State(appliance): Machine, Json(order): Json<PlanOrder>) -> Answer<Out<ModelPlan>> {
    within(SHORT, appliance.plan_header(order)).await.map(Out)
}

pub async fn devices(State(appliance): Machine) -> Answer<Out<Devices>> {
    within(SHORT, appliance.devices()).await.map(Out)
}

pub async fn set_partition(
    State(appliance): Machine,
    Name(name): Name,
    Json(partition): Json<Partition>,
) -> Answer<Out<Devices>> {
    let id = partition_id(&name)?;
    if partition.id != id {
        let why = format!("the path names `{id}`, the body `{}`", partition.id);
        let fix = "write the same name in both";
        return Err(Report::caller("partition_name_differs", "no partition was set", why, fix).into());
    }
    within(SHORT, appliance.set_partition(partition)).await.map(Out)
}

pub async fn remove_partition(State(appliance): Machine, Name(name): Name) -> Answer<Out<Devices>> {
    within(SHORT, appliance.remove_partition(partition_id(&name)?)).await.map(Out)
}

pub async fn assign_partition(
    State(appliance): Machine,
    Name(name): Name,
    Json(order): Json<Assign>,
) -> Answer<Out<Devices>> {
    within(SHORT, appliance.assign_partition(key(&name)?, order.partition)).await.map(Out)
}

pub async fn grant_device(
    State(appliance): Machine,
    Name(name): Name,
    Json(order): Json<GrantDevice>,
) -> Answer<Out<Devices>> {
    within(SHORT, appliance.grant_device(key(&name)?, order.device)).await.map(Out)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditParameters {
    #[serde(default)]
    after: Option<u64>,
    #[serde(default)]
    limit: Option<usize>,
    #[serde(default)]
    agent: Option<String>,
}

pub async fn audit(
    State(appliance): Machine,
    parameters: Result<Query<AuditParameters>, axum::extract::rejection::QueryRejection>,
) -> Answer<Response> {
    let Query(parameters) = parameters.map_err(|e| {
        let fix = "write `?after=0&limit=200&agent=NAME`";
        Report::caller("query_malformed", "the audit log was not read", e.body_text(), fix)
    })?;
    let query = AuditQuery {
        after: parameters.after,
        most: parameters.limit.unwrap_or(AUDIT_RECORDS_DEFAULT).clamp(1, AUDIT_RECORDS_MOST),
        agent: parameters.agent.as_deref().map(key).transpose()?,
    };
    let lines = within(SHORT, appliance.audit(query)).await?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response())
}

pub async fn audit_head(State(appliance): Machine) -> Answer<Out<SignedHead>> {
    within(SHORT, appliance.audit_head()).await.map(Out)
}

pub async fn agent_token(State(appliance): Machine, Name(name): Name) -> Answer<Out<Shown>> {
    within(SHORT, appliance.token(key(&name)?)).await.map(Out)
}

pub async fn mint_token(State(appliance): Machine, Json(body): Json<Mint>) -> Answer<Out<Shown>> {
    within(LONG, appliance.mint_token(body)).await.map(Out)
}

pub async fn attenuate_token(State(appliance): Machine, Json(body): Json<Attenuate>) -> Answer<Out<Shown>> {
    within(SHORT, appliance.attenuate_token(body)).await.map(Out)
}

pub async fn inspect_token(State(appliance): Machine, Json(body): Json<Inspect>) -> Answer<Out<Shown>> {
    within(SHORT, appliance.inspect_token(body)).await.map(Out)
}

pub async fn verify_token(State(appliance): Machine, Json(body): Json<Verify>) -> Answer<Out<Verified>> {
    within(SHORT, appliance.verify_token(body)).await.map(Out)
}

pub async fn revoke_token(State(appliance): Machine, Json(body): Json<Revoke>) -> Answer<Out<Revocation>> {
    within(LONG, appliance.revoke_token(body)).await.map(Out)
}

pub async fn revoked_tokens(State(appliance): Machine) -> Answer<Out<Vec<Revoked>>> {
    within(SHORT, appliance.revoked_tokens()).await.map(Out)
}

pub async fn token_key(State(appliance): Machine) -> Answer<Out<Key>> {
    within(SHORT, appliance.token_key()).await.map(Out)
}

pub async fn reboot(State(appliance): Machine) -> Answer<StatusCode> {
    within(SHORT, appliance.reboot()).await.map(|()| StatusCode::NO_CONTENT)
}

pub async fn poweroff(State(appliance): Machine) -> Answer<StatusCode> {
    within(SHORT, appliance.poweroff()).await.map(|()| StatusCode::NO_CONTENT)
}

pub fn key(text: &str) -> Result<AgentKey, Failure> {
    AgentKey::from_str(text).map_err(|why| {
        let fix = "`agentctl agent ls` shows the names";
        Report::caller("agent_name_malformed", "no agent was looked up", why, fix).into()
    })
}

pub fn model_name(text: &str) -> Result<ModelName, Failure> {
    ModelName::from_str(text).map_err(|why| {
        let fix = "rename the file; `agentctl model ls` shows the names in use";
        Report::caller("model_name_malformed", "no model was touched", why, fix).into()
    })
}

pub fn partition_id(text: &str) -> Result<PartitionId, Failure> {
    PartitionId::from_str(text).map_err(|why| {
        let fix = "`agentctl gpu partition ls` shows the names";
        Report::caller("partition_name_malformed", "no partition was touched", why, fix).into()
    })
}

pub fn check_message(message: &ChatRequest) -> Result<(), Report> {
    let what = "the message was not sent";
    if message.text.trim().is_empty() {
        return Err(Report::caller("message_empty", what, "it is empty", "write something"));
    }
    if message.text.len() > CHAT_LIMIT_BYTES {
        let why = format!("it is longer than {} KiB", CHAT_LIMIT_BYTES / 1024);
        return Err(Report::caller("too_large", what, why, "send it in pieces"));
    }
    if message.idempotency_key.as_ref().is_some_and(|key| key.is_empty() || key.len() > 128) {
        let why = "its idempotency key is empty or longer than 128 bytes";
        return Err(Report::caller("key_malformed", what, why, "use a random key of 16 to 64 characters"));
    }
    Ok(())
}

/// Requests without a connection, in tests, are all one client.
pub fn address(peer: Option<Extension<Peer>>) -> IpAddr {
    peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Extension(Peer(address))| address)
}

pub async fn not_found() -> Failure {
    Report::caller(
        "not_found",
        "nothing was done",
        "there is no such path",
        "the console is at /, the API below /api/v1/",
    )
    .into()
}

pub async fn method_not_allowed() -> (StatusCode, Out<Report>) {
    let report = Report::caller(
        "method_not_allowed",
        "nothing was done",
        "this path does not take this method",
        "the API's table in `agentd/crates/domain/src/api.rs` lists what it takes",
    );
    (StatusCode::METHOD_NOT_ALLOWED, Out(report))
}
