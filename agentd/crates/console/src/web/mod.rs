//! What does a person see in a browser?
//!
//! Pages are rendered here, on the server, and work without JavaScript; the one script makes them live. A
//! page's parts that carry `data-live` and an id are fetched again every few seconds while the tab is visible,
//! so each part has one rendering only.

mod agents;
pub mod assets;
mod audit;
mod devices;
mod health;
pub mod knowledge;
mod layout;
pub mod memory;
mod models;
mod overview;
pub mod partitions;
mod sign_in;
mod units;

use crate::answer::{Answer, Failure, LONG, SHORT, within};
use crate::api::{Machine, address, check_message, key, model_name};
use crate::appliance::{Appliance, AuditQuery, Flow, Follow, LogQuery, Residence};
use crate::auth::Auth;
use crate::gate::{self, SignedIn};
use crate::input::{Fields, Name};
use crate::serve::Peer;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{AgentKey, ChatRequest, Claim, LogLine, Session};
use agentd_domain::fault::Report;
use agents::Exchange;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use futures::StreamExt;
use maud::{Markup, html};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Without JavaScript a reply is waited for so long; then the page shows what has come, with a button for the rest.
/// A person who sees an empty page for longer gives up.
const REPLY_PATIENCE: Duration = Duration::from_secs(20);

/// An error as a page.
pub struct Page(Failure);

impl<F: Into<Failure>> From<F> for Page {
    fn from(failure: F) -> Self {
        Self(failure.into())
    }
}

impl IntoResponse for Page {
    fn into_response(self) -> Response {
        let page = layout::error_page(&self.0.report).into_response();
        self.0.dress(page)
    }
}

type Shown = Result<Markup, Page>;
type Done = Result<Redirect, Page>;

pub async fn overview(State(appliance): Machine) -> Shown {
    let (status, agents) = tokio::join!(within(SHORT, appliance.status()), within(SHORT, appliance.agents()));
    let mut status = status?;
    let agents = agents.unwrap_or_else(|failure| {
        status.problems.push(failure.report);
        Vec::new()
    });
    Ok(overview::overview(&status, &agents))
}

pub async fn agents(State(appliance): Machine) -> Shown {
    let agents = within(SHORT, appliance.agents()).await?;
    Ok(agents::list(&agents, appliance.health()))
}

pub async fn agent(State(appliance): Machine, Name(name): Name) -> Shown {
    agent_page(&*appliance, key(&name)?, None).await
}

pub async fn start(State(appliance): Machine, Name(name): Name) -> Done {
    let agent = within(LONG, appliance.start(key(&name)?)).await?;
    Ok(Redirect::to(&format!("/agents/{}", agent.name)))
}

pub async fn stop(State(appliance): Machine, Name(name): Name) -> Done {
    let agent = within(LONG, appliance.stop(key(&name)?)).await?;
    Ok(Redirect::to(&format!("/agents/{}", agent.name)))
}

pub async fn remove(State(appliance): Machine, Name(name): Name) -> Done {
    within(LONG, appliance.remove(key(&name)?)).await?;
    Ok(Redirect::to("/agents"))
}

#[derive(Deserialize)]
pub struct Saying {
    text: String,
    /// Without one, as from a page of an earlier version, a second sending is a second message.
    #[serde(default)]
    key: Option<String>,
}

pub async fn chat(
    State(appliance): Machine,
    Name(name): Name,
    saying: Result<Fields<Saying>, Failure>,
) -> Shown {
    let Fields(saying) = saying?;
    let agent = key(&name)?;
    // A form ends the lines of a text with CR LF; an agent should see what was typed.
    let text = saying.text.replace("\r\n", "\n");
    let message = ChatRequest { text: text.clone(), idempotency_key: saying.key.clone() };
    check_message(&message)?;
    let parts = within(SHORT, appliance.chat(agent.clone(), message)).await?;
    let (reply, whole) = what_has_come(parts).await;
    let unfinished = saying.key.filter(|_| !whole);
    agent_page(&*appliance, agent, Some(Exchange { asked: text, reply, unfinished })).await
}

/// The page of a sent message, asked for by its address.
pub async fn to_agent(Name(name): Name) -> Done {
    Ok(Redirect::to(&format!("/agents/{}", key(&name)?)))
}

pub async fn models(State(appliance): Machine) -> Shown {
    let models = within(SHORT, appliance.models()).await?;
    Ok(models::list(&models, appliance.health()))
}

pub async fn devices(State(appliance): Machine) -> Shown {
    let (devices, agents) =
        tokio::join!(within(SHORT, appliance.devices()), within(SHORT, appliance.agents()));
    // Without agents there is nobody to assign; the devices are shown all the same.
    Ok(devices::list(&devices?, &agents.unwrap_or_default(), appliance.health()))
}

pub async fn remove_model(State(appliance): Machine, Name(name): Name) -> Done {
    within(LONG, appliance.remove_model(model_name(&name)?)).await?;
    Ok(Redirect::to("/models"))
}

pub async fn pin_model(State(appliance): Machine, Name(name): Name) -> Done {
    within(LONG, appliance.pin_model(model_name(&name)?, Residence::Pinned)).await?;
    Ok(Redirect::to("/models"))
}

pub async fn unpin_model(State(appliance): Machine, Name(name): Name) -> Done {
    within(LONG, appliance.pin_model(model_name(&name)?, Residence::OnDemand)).await?;
    Ok(Redirect::to("/models"))
}

#[derive(Deserialize)]
pub struct AuditPage {
    #[serde(default)]
    after: Option<u64>,
    #[serde(default)]
    agent: Option<String>,
}

/// The log of all, or of one agent. The form sends an empty name for everybody.
pub async fn audit(
    State(appliance): Machine,
    asked: Result<Query<AuditPage>, axum::extract::rejection::QueryRejection>,
) -> Shown {
    let Query(asked) = asked.map_err(|error| {
        let fix = "choose an agent on the page, or write `/audit?agent=NAME&after=0`";
        Report::caller("query_malformed", "the audit log was not read", error.body_text(), fix)
    })?;
    let name = asked.agent.filter(|name| !name.is_empty());
    let agent = name.as_deref().map(key).transpose()?;
    let shown = agent.as_ref().map(ToString::to_string);
    let query = AuditQuery { after: asked.after, most: audit::PAGE_RECORDS, agent };
    let (lines, agents) =
        tokio::join!(within(SHORT, appliance.audit(query)), within(SHORT, appliance.agents()));
    let trail = audit::Trail::read(&lines?);
    let filter = audit::Filter { agent: shown.as_deref(), after: asked.after };
    Ok(audit::log(&trail, &filter, &agents.unwrap_or_default(), appliance.health()))
}

pub async fn reboot(State(appliance): Machine) -> Shown {
    within(SHORT, appliance.reboot()).await?;
    Ok(layout::bare_page(
        "Restarting",
        &html! {
            h1 { "The appliance restarts" }
            p { "Sign in again in a moment: " a href="/" { "to the overview" } "." }
        },
    ))
}

pub async fn poweroff(State(appliance): Machine) -> Shown {
    within(SHORT, appliance.poweroff()).await?;
    Ok(layout::bare_page(
        "Shutting down",
        &html! {
            h1 { "The appliance shuts down" }
            p { "It starts again with its power button." }
        },
    ))
}

pub async fn claim_page(State(auth): State<Arc<Auth>>) -> Response {
    if auth.is_claimed() {
        Redirect::to("/sign-in").into_response()
    } else {
        sign_in::claim(None, "").into_response()
    }
}

pub async fn sign_in_page(State(auth): State<Arc<Auth>>, headers: HeaderMap) -> Response {
    if !auth.is_claimed() {
        Redirect::to("/claim").into_response()
    } else if gate::signed_in(&auth, &headers).is_some() {
        Redirect::to("/").into_response()
    } else {
        sign_in::sign_in(None).into_response()
    }
}

#[derive(Deserialize)]
pub struct ClaimForm {
    code: String,
    password: String,
    again: String,
}

pub async fn claim(
    State(auth): State<Arc<Auth>>,
    peer: Option<Extension<Peer>>,
    form: Result<Fields<ClaimForm>, Failure>,
) -> Response {
    let typed = form.as_ref().map(|Fields(form)| form.code.clone()).unwrap_or_default();
    let attempt = async {
        let Fields(form) = form?;
        if form.password != form.again {
            return Err(typed_differently().into());
        }
        let claim = Claim { code: form.code, password: form.password };
        Ok(auth.claim(claim, address(peer)).await?)
    };
    enter(attempt.await, |report| sign_in::claim(Some(report), &typed))
}

#[derive(Deserialize)]
pub struct SignInForm {
    password: String,
}

pub async fn sign_in(
    State(auth): State<Arc<Auth>>,
    peer: Option<Extension<Peer>>,
    form: Result<Fields<SignInForm>, Failure>,
) -> Response {
    let attempt = async {
        let Fields(form) = form?;
        Ok(auth.login(form.password, address(peer)).await?)
    };
    enter(attempt.await, |report| sign_in::sign_in(Some(report)))
}

pub async fn sign_out(State(auth): State<Arc<Auth>>, Extension(session): Extension<SignedIn>) -> Response {
    auth.logout(&session.token);
    ([(header::SET_COOKIE, gate::clear_cookie())], Redirect::to("/sign-in")).into_response()
}

pub async fn not_found() -> Page {
    Page(crate::api::not_found().await)
}

/// A button that asks once more, with or without JavaScript.
fn confirmed(action: &str, word: &str, question: &str) -> Markup {
    html! {
        details.confirm {
            summary { (word) }
            form method="post" action=(action) {
                p { (question) }
                button.danger type="submit" { (word) }
            }
        }
    }
}

fn enter(attempt: Answer<Session>, page: impl Fn(&Report) -> Markup) -> Response {
    match attempt {
        Ok(session) => match gate::set_cookie(&session.token) {
            Some(cookie) => ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response(),
            None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        },
        Err(failure) => {
            let shown = page(&failure.report).into_response();
            failure.dress(shown)
        }
    }
}

async fn agent_page(appliance: &dyn Appliance, agent: AgentKey, exchange: Option<Exchange>) -> Shown {
    let found = within(SHORT, appliance.agent(agent.clone())).await?;
    let log = recent_log(appliance, agent).await.map_err(|failure| failure.report);
    let next_key = random_key().map_err(no_randomness)?;
    let own =
        AuditQuery { after: None, most: audit::TRAIL_RECORDS, agent: Some(AgentKey::Id(found.agent_id)) };
    let trail = within(SHORT, appliance.audit(own)).await;
    let trail = trail.map(|lines| audit::Trail::read(&lines)).map_err(|failure| failure.report);
    let shown = agents::Shown { log: &log, trail: &trail, exchange: exchange.as_ref(), next_key: &next_key };
    Ok(agents::agent(&found, &shown, appliance.health()))
}

fn random_key() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(hex::encode(bytes))
}

fn no_randomness(error: getrandom::Error) -> Report {
    let why = format!("the kernel gave no randomness: {error}");
    Report::environment("no_randomness", "the page was not made", why, "restart the appliance")
}

async fn recent_log(appliance: &dyn Appliance, agent: AgentKey) -> Answer<Vec<LogLine>> {
    let query = LogQuery { lines: crate::api::LOG_LINES_DEFAULT, follow: Follow::No };
    let lines = within(SHORT, appliance.logs(agent, query)).await?;
    Ok(timeout(SHORT, lines.collect()).await.unwrap_or_default())
}

/// The parts of a reply until its end or the end of patience, and whether it is whole.
async fn what_has_come(mut parts: Flow<ReplyPart>) -> (Vec<ReplyPart>, bool) {
    let mut reply = Vec::new();
    let end = Instant::now() + REPLY_PATIENCE;
    while let Ok(part) = timeout_at(end, parts.next()).await {
        match part {
            Some(part) => reply.push(part),
            None => return (joined(reply), true),
        }
    }
    (joined(reply), false)
}

/// Pieces of text become one, so that the page shows one bubble.
fn joined(parts: Vec<ReplyPart>) -> Vec<ReplyPart> {
    let mut whole: Vec<ReplyPart> = Vec::new();
    for part in parts {
        if let ReplyPart::Text { text } = &part
            && let Some(ReplyPart::Text { text: before }) = whole.last_mut()
        {
            before.push_str(text);
        } else {
            whole.push(part);
        }
    }
    whole
}

fn typed_differently() -> Report {
    Report::caller(
        "passwords_differ",
        "the appliance was not claimed",
        "the two passwords differ",
        "type the same one twice",
    )
}
