//! What does the management API do with secrets? See the table in [`agentd_domain::secret`].
//!
//! Never: a value in an answer; what a person sent wrongly is not quoted back either.

use crate::answer::{Answer, LONG, SHORT, within};
use crate::api::{Machine, key};
use crate::input::{Name, Text};
use agentd_domain::fault::Report;
use agentd_domain::net::rule::SecretName;
use agentd_domain::secret::{SecretInfo, SecretOrder};
use axum::Json as Out;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;

pub async fn list(State(appliance): Machine) -> Answer<Out<Vec<SecretInfo>>> {
    within(SHORT, appliance.secrets()).await.map(Out)
}

pub async fn set(State(appliance): Machine, Text(body): Text) -> Answer<StatusCode> {
    // The parser's own words could hold a part of the value.
    let order: SecretOrder = serde_json::from_str(&body).map_err(|_| {
        Report::caller(
            "secret_malformed",
            "the secret was not set",
            "the body is not a secret with a name, a value, and an agent or hosts",
            "use `agentctl secret set NAME`",
        )
    })?;
    within(LONG, appliance.set_secret(order)).await.map(|()| StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    #[serde(default)]
    agent: Option<String>,
}

pub async fn remove(
    State(appliance): Machine,
    Name(name): Name,
    parameters: Result<Query<Parameters>, axum::extract::rejection::QueryRejection>,
) -> Answer<StatusCode> {
    let what = "no secret was removed";
    let Query(parameters) = parameters
        .map_err(|e| Report::caller("query_malformed", what, e.body_text(), "write `?agent=NAME`"))?;
    let name = SecretName::try_from(name)
        .map_err(|why| Report::caller("not_found", what, why, "`agentctl secret ls` shows the names"))?;
    let agent = parameters.agent.as_deref().map(key).transpose()?;
    within(LONG, appliance.remove_secret(name, agent)).await.map(|()| StatusCode::NO_CONTENT)
}
