//! What does a person share among agents, and with whom?

use super::layout::{Section, bar, page, pill};
use super::{Done, Page, Shown, confirmed, units};
use crate::answer::{Failure, LONG, within};
use crate::api::{Machine, key};
use crate::appliance::Appliance;
use crate::input::{Fields, Name};
use crate::memory::collection;
use agentd_domain::api::{Agent, AgentKey};
use agentd_domain::fault::Report;
use agentd_domain::human::parse_bytes;
use agentd_domain::initctl::Health;
use agentd_domain::memory_api::{Access, Collection, Document, KnowledgeOrder, KnowledgeOutcome, Quota};
use axum::extract::State;
use axum::response::Redirect;
use maud::{Markup, html};
use serde::Deserialize;

pub async fn list(State(appliance): Machine) -> Shown {
    let (found, agents) = tokio::join!(
        within(LONG, appliance.knowledge(KnowledgeOrder::List)),
        within(LONG, appliance.agents())
    );
    match found? {
        KnowledgeOutcome::Collections(all) => {
            Ok(shown(&all, &agents.unwrap_or_default(), appliance.health()))
        }
        KnowledgeOutcome::Added(_) => Err(Page::from(strange())),
    }
}

/// Empty fields are the usual.
#[derive(Deserialize)]
pub struct Making {
    name: String,
    #[serde(default)]
    bytes: String,
    #[serde(default)]
    records: String,
}

pub async fn set(State(appliance): Machine, form: Result<Fields<Making>, Failure>) -> Done {
    let Fields(form) = form?;
    let mut quota = Quota::default();
    let wrong = |field: &str, why: String, fix: &str| {
        Report::caller("quota_malformed", "the collection was not set", format!("{field}: {why}"), fix)
    };
    if !form.bytes.trim().is_empty() {
        quota.bytes =
            parse_bytes(form.bytes.trim()).map_err(|why| wrong("bytes", why, "write `64M` or `2G`"))?;
    }
    if !form.records.trim().is_empty() {
        let records = form.records.trim().parse();
        quota.records =
            records.map_err(|_| wrong("records", "it is no number".to_owned(), "write a whole number"))?;
    }
    ordered(&*appliance, KnowledgeOrder::Set(collection(form.name.trim())?, quota)).await
}

pub async fn remove(State(appliance): Machine, Name(name): Name) -> Done {
    ordered(&*appliance, KnowledgeOrder::Remove(collection(&name)?)).await
}

#[derive(Deserialize)]
pub struct Granting {
    agent: String,
    /// `read`, `read_write`, or empty to take it back.
    #[serde(default)]
    access: String,
}

pub async fn grant(
    State(appliance): Machine,
    Name(name): Name,
    form: Result<Fields<Granting>, Failure>,
) -> Done {
    let Fields(form) = form?;
    let (name, agent) = (collection(&name)?, key(&form.agent)?);
    let order = match form.access.as_str() {
        "read" => KnowledgeOrder::Grant(name, agent, Access::Read),
        "read_write" => KnowledgeOrder::Grant(name, agent, Access::ReadWrite),
        "" => KnowledgeOrder::Revoke(name, agent),
        other => {
            let why = format!("`{}` is not an access", other.escape_debug());
            let fix = "choose one on the page";
            return Err(Report::caller("access_unknown", "nothing was granted", why, fix).into());
        }
    };
    ordered(&*appliance, order).await
}

#[derive(Deserialize)]
pub struct Adding {
    title: String,
    text: String,
}

pub async fn add(State(appliance): Machine, Name(name): Name, form: Result<Fields<Adding>, Failure>) -> Done {
    let Fields(Adding { title, text }) = form?;
    let document = Document { title, text: text.replace("\r\n", "\n"), source: None, event_unix_ms: None };
    ordered(&*appliance, KnowledgeOrder::Add(collection(&name)?, document)).await
}

async fn ordered(appliance: &dyn Appliance, order: KnowledgeOrder) -> Done {
    within(LONG, appliance.knowledge(order)).await?;
    Ok(Redirect::to("/knowledge"))
}

fn shown(all: &[Collection], agents: &[Agent], health: Health) -> Markup {
    page(
        "Knowledge",
        Section::Knowledge,
        health,
        &html! {
            h1 { "Knowledge" }
            p.dim {
                "Documents and facts that agents share. An agent reads or writes a collection when it was granted here, and its "
                code { "agent.toml" } " asks for " code { "knowledge" } " below " code { "[memory]" } "."
            }
            @if all.is_empty() { p.dim { "There is none yet." } }
            @for one in all { (card(one, agents)) }
            section.card {
                h2 { "Make a collection, or change its limits" }
                form.filter method="post" action="/knowledge" {
                    label for="name" { "Name" } input #name name="name" required pattern="[a-z0-9-]{1,64}";
                    label for="bytes" { "Bytes" } input #bytes name="bytes" placeholder="512M";
                    label for="records" { "Records" } input #records name="records" placeholder="500000" inputmode="numeric";
                    button.primary type="submit" { "Set" }
                }
            }
        },
    )
}

fn card(one: &Collection, agents: &[Agent]) -> Markup {
    let base = format!("/knowledge/{}", one.name);
    html! {
        section.card {
            div.split {
                h2 { (one.name) }
                (confirmed(&format!("{base}/remove"), "Remove", "Remove this collection with all that is in it? Its key is destroyed; this cannot be undone."))
            }
            div.gauge {
                div { span { (one.records) " of " (one.quota.records) " records" } span.numbers { (units::bytes(one.bytes)) " of " (units::bytes(one.quota.bytes)) } }
                (bar(one.bytes, one.quota.bytes))
            }
            ul.rows {
                @for (id, access) in &one.grants {
                    @let name = agents.iter().find(|agent| agent.agent_id == *id).map(|agent| agent.name.to_string());
                    li {
                        strong { (name.unwrap_or_else(|| AgentKey::Id(*id).to_string())) } " "
                        @match access { Access::Read => (pill("calm", "reads")), Access::ReadWrite => (pill("good", "reads and writes")) }
                        form method="post" action={ (base) "/grant" } {
                            input type="hidden" name="agent" value=(id);
                            button.ghost type="submit" { "Take back" }
                        }
                    }
                }
            }
            form.filter method="post" action={ (base) "/grant" } {
                select name="agent" aria-label="Agent" { @for agent in agents { option value=(agent.name) { (agent.name) } } }
                select name="access" aria-label="Access" { option value="read" { "reads" } option value="read_write" { "reads and writes" } }
                button type="submit" { "Grant" }
            }
            details {
                summary { "Add a document" }
                form.stack method="post" action={ (base) "/documents" } {
                    input name="title" required maxlength="500" placeholder="Title" aria-label="Title";
                    textarea name="text" rows="6" required aria-label="Text" {}
                    button.primary type="submit" { "Add" }
                }
            }
        }
    }
}

fn strange() -> Report {
    Report::bug("answer_strange", "nothing was shown", "the store answered something else", "try again")
}
