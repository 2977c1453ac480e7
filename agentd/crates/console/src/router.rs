//! Which path leads where?
//!
//! Invariant: everything is behind the session gate, but for the few routes in [`open`]. A test asks for each
//! route without a session.

use crate::appliance::Appliance;
use crate::auth::Auth;
use crate::web::assets;
use crate::{api, gate, headers, input, memory, secrets, web};
use axum::Router;
use axum::extract::{FromRef, Request};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use std::sync::Arc;

#[derive(Clone)]
struct Shared {
    appliance: Arc<dyn Appliance>,
    auth: Arc<Auth>,
}

impl FromRef<Shared> for Arc<dyn Appliance> {
    fn from_ref(shared: &Shared) -> Self {
        Arc::clone(&shared.appliance)
    }
}

impl FromRef<Shared> for Arc<Auth> {
    fn from_ref(shared: &Shared) -> Self {
        Arc::clone(&shared.auth)
    }
}

/// The management API and the web console. Routes of other crates may be merged in; they bring their own gate
/// ([`gate::guard`]) and must not bring a fallback.
pub fn router(appliance: Arc<dyn Appliance>, auth: Arc<Auth>) -> Router {
    let api = api_routes().route_layer(from_fn_with_state(Arc::clone(&auth), gate::api));
    let web = web_routes().route_layer(from_fn_with_state(Arc::clone(&auth), gate::web));
    let ordinary = open().merge(api).merge(web).layer(from_fn(input::refuse_large));
    let uploads = uploads().route_layer(from_fn_with_state(Arc::clone(&auth), gate::api));
    ordinary
        .merge(uploads)
        .fallback(nowhere)
        .method_not_allowed_fallback(api::method_not_allowed)
        .layer(from_fn(gate::same_origin))
        .layer(from_fn(headers::strict))
        .with_state(Shared { appliance, auth })
}

/// For anybody.
fn open() -> Router<Shared> {
    Router::new()
        .route("/healthz", get(api::healthz))
        .route("/assets/{hash}/{name}", get(assets::serve))
        .route("/claim", get(web::claim_page).post(web::claim))
        .route("/sign-in", get(web::sign_in_page).post(web::sign_in))
        .route("/api/v1/claim", post(api::claim))
        .route("/api/v1/login", post(api::login))
}

fn memory_routes() -> Router<Shared> {
    Router::new()
        .route("/api/v1/agents/{name}/memory", get(memory::usage))
        .route("/api/v1/agents/{name}/memory/records", get(memory::list))
        .route("/api/v1/agents/{name}/memory/search", post(memory::search))
        .route("/api/v1/agents/{name}/memory/records/{id}", get(memory::show))
        .route("/api/v1/agents/{name}/memory/records/{id}/history", get(memory::history))
        .route("/api/v1/agents/{name}/memory/records/{id}/correct", post(memory::correct))
        .route("/api/v1/agents/{name}/memory/records/{id}/pin", post(memory::pin))
        .route("/api/v1/agents/{name}/memory/records/{id}/forget", post(memory::forget))
        .route("/api/v1/agents/{name}/memory/records/{id}/purge", post(memory::purge))
        .route("/api/v1/agents/{name}/memory/records/{id}/restore", post(memory::restore))
        .route("/api/v1/agents/{name}/memory/journal", get(memory::journal))
        .route("/api/v1/agents/{name}/memory/blocks", get(memory::blocks))
        .route("/api/v1/agents/{name}/memory/blocks/{key}", put(memory::write_block))
        .route("/api/v1/agents/{name}/memory/blocks/{key}", delete(memory::remove_block))
        .route("/api/v1/agents/{name}/memory/check", post(memory::check))
        .route("/api/v1/knowledge", get(memory::collections))
        .route("/api/v1/knowledge/{name}", put(memory::set_collection).delete(memory::remove_collection))
        .route("/api/v1/knowledge/{name}/grants/{agent}", put(memory::grant).delete(memory::revoke))
        .route("/api/v1/knowledge/{name}/documents", post(memory::add_document))
        .route("/api/v1/knowledge/{name}/documents/{id}", delete(memory::remove_document))
}

fn api_routes() -> Router<Shared> {
    Router::new()
        .merge(memory_routes())
        .route("/api/v1/logout", post(api::logout))
        .route("/api/v1/status", get(api::status))
        .route("/api/v1/plan", post(api::plan))
        .route("/api/v1/agents", get(api::agents))
        .route("/api/v1/agents/{name}", get(api::agent).delete(api::remove))
        .route("/api/v1/agents/{name}/start", post(api::start))
        .route("/api/v1/agents/{name}/stop", post(api::stop))
        .route("/api/v1/agents/{name}/logs", get(api::logs))
        .route("/api/v1/agents/{name}/chat", post(api::chat))
        .route("/api/v1/agents/{name}/token", get(api::agent_token))
        .route("/api/v1/tokens/mint", post(api::mint_token))
        .route("/api/v1/tokens/attenuate", post(api::attenuate_token))
        .route("/api/v1/tokens/inspect", post(api::inspect_token))
        .route("/api/v1/tokens/verify", post(api::verify_token))
        .route("/api/v1/tokens/revoke", post(api::revoke_token))
        .route("/api/v1/tokens/revoked", get(api::revoked_tokens))
        .route("/api/v1/tokens/key", get(api::token_key))
        .route("/api/v1/devices", get(api::devices))
        .route("/api/v1/partitions/{name}", put(api::set_partition).delete(api::remove_partition))
        .route("/api/v1/agents/{name}/partition", put(api::assign_partition))
        .route("/api/v1/agents/{name}/device", put(api::grant_device))
        .route("/api/v1/models/{name}/plan", get(api::plan_model))
        .route("/api/v1/models/{name}/pull", post(api::pull_model))
        .route("/api/v1/models/{name}/pin", put(api::pin_model).delete(api::unpin_model))
        .route("/api/v1/plan-model", post(api::plan_header))
        .route("/api/v1/models", get(api::models))
        .route("/api/v1/models/{name}", delete(api::remove_model))
        .route("/api/v1/secrets", get(secrets::list).post(secrets::set))
        .route("/api/v1/secrets/{name}", delete(secrets::remove))
        .route("/api/v1/audit", get(api::audit))
        .route("/api/v1/audit/head", get(api::audit_head))
        .route("/api/v1/reboot", post(api::reboot))
        .route("/api/v1/poweroff", post(api::poweroff))
}

/// Bodies here may be larger than memory.
fn uploads() -> Router<Shared> {
    Router::new()
        .route("/api/v1/agents", post(api::install))
        .route("/api/v1/models/{name}", put(api::add_model))
}

fn web_routes() -> Router<Shared> {
    Router::new()
        .route("/", get(web::overview))
        .route("/agents", get(web::agents))
        .route("/agents/{name}", get(web::agent))
        .route("/agents/{name}/start", post(web::start))
        .route("/agents/{name}/stop", post(web::stop))
        .route("/agents/{name}/remove", post(web::remove))
        .route("/agents/{name}/chat", get(web::to_agent).post(web::chat))
        .route("/agents/{name}/memory", get(web::memory::browse).post(web::memory::search))
        .route("/agents/{name}/memory/journal", get(web::memory::journal))
        .route("/agents/{name}/memory/records/{id}", get(web::memory::show))
        .route("/agents/{name}/memory/records/{id}/{deed}", post(web::memory::change))
        .route("/agents/{name}/memory/check", post(web::memory::check))
        .route("/knowledge", get(web::knowledge::list).post(web::knowledge::set))
        .route("/knowledge/{name}/remove", post(web::knowledge::remove))
        .route("/knowledge/{name}/grant", post(web::knowledge::grant))
        .route("/knowledge/{name}/documents", post(web::knowledge::add))
        .route("/devices", get(web::devices))
        .route("/devices/partitions", post(web::partitions::set))
        .route("/devices/partitions/{name}/remove", post(web::partitions::remove))
        .route("/devices/assign", post(web::partitions::assign))
        .route("/devices/grant", post(web::partitions::grant))
        .route("/models", get(web::models))
        .route("/models/{name}/remove", post(web::remove_model))
        .route("/models/{name}/pin", post(web::pin_model))
        .route("/models/{name}/unpin", post(web::unpin_model))
        .route("/audit", get(web::audit))
        .route("/reboot", post(web::reboot))
        .route("/poweroff", post(web::poweroff))
        .route("/sign-out", post(web::sign_out))
}

async fn nowhere(request: Request) -> Response {
    if request.uri().path().starts_with("/api/") {
        api::not_found().await.into_response()
    } else {
        web::not_found().await.into_response()
    }
}
