//! Looking into an agent's memory, putting it right, and sharing knowledge.

use super::{Failed, Outcome, Session};
use crate::client::{self, Client};
use crate::{cli, show};
use agentd_domain::agent_api::{Recalled, Remembered};
use agentd_domain::api::{Agent, AgentKey};
use agentd_domain::fault::Report;
use agentd_domain::memory_api::{
    Checked, Collection, Correct, Document, DocumentAdded, Grant, History, Journal, Pin, Quota, Record,
    Records, Search, Usage,
};
use hyper::Method;
use serde::Serialize;
use std::path::Path;

/// As the appliance takes it.
const DOCUMENT_MOST_BYTES: usize = 4 * 1024 * 1024;

pub async fn run(session: &Session, command: cli::Memory) -> Outcome {
    let client = session.client()?;
    match command {
        cli::Memory::Ls { name, tier, state, before, limit } => {
            let all = match tier {
                None if state.is_none() && before.is_none() => {
                    let usage: Usage = client.get(&at(&name, "")).await?;
                    if !session.json {
                        show::out(&format!("{}\n", show::memory::usage(&usage)));
                    }
                    String::new()
                }
                None => String::new(),
                Some(tier) => format!("&tier={}", tier.name()),
            };
            let state = state.map(|state| format!("&state={}", state.name())).unwrap_or_default();
            let before = before.map(|id| format!("&before={id}")).unwrap_or_default();
            let records: Records =
                client.get(&at(&name, &format!("/records?limit={limit}{all}{state}{before}"))).await?;
            session.show(&records, show::memory::records);
        }
        cli::Memory::Search { name, query, tiers, k, as_of } => {
            let as_of_unix_ms = as_of.map(|moment| moment.0);
            let search = Search { query: query.join(" "), k: Some(k), tiers, signals: None, as_of_unix_ms };
            let found: Recalled = client.post(&at(&name, "/search"), &search).await?;
            session.show(&found, show::memory::recalled);
        }
        cli::Memory::Show { name, id } => {
            let history: History = client.get(&at(&name, &format!("/records/{id}/history"))).await?;
            if session.json {
                show::json(&history);
            } else {
                // Of one that was purged only what happened to it is left.
                if let Some(record) = history.chain.iter().find(|record: &&Record| record.id == id) {
                    show::out(&show::memory::record(record));
                }
                show::out(&show::memory::history(&history));
            }
        }
        cli::Memory::Correct { name, id, text } => {
            let path = at(&name, &format!("/records/{id}/correct"));
            let told: Remembered = client.post(&path, &Correct { text: text.join(" ") }).await?;
            session.show(&told, |told| format!("{}\n", told.id));
        }
        cli::Memory::Pin { name, id } => pin(&client, &name, &id.to_string(), true).await?,
        cli::Memory::Unpin { name, id } => pin(&client, &name, &id.to_string(), false).await?,
        cli::Memory::Forget { name, id } => order(&client, &name, &format!("/records/{id}/forget")).await?,
        cli::Memory::Restore { name, id } => order(&client, &name, &format!("/records/{id}/restore")).await?,
        cli::Memory::Purge { name, id } => order(&client, &name, &format!("/records/{id}/purge")).await?,
        cli::Memory::Journal { name, before, limit } => {
            let before = before.map(|number| format!("&before={number}")).unwrap_or_default();
            let journal: Journal = client.get(&at(&name, &format!("/journal?limit={limit}{before}"))).await?;
            session.show(&journal, show::memory::journal);
        }
        cli::Memory::Doctor { name } => doctor(session, &client, name).await?,
    }
    Ok(())
}

fn at(name: &AgentKey, rest: &str) -> String {
    format!("/api/v1/agents/{name}/memory{rest}")
}

async fn order(client: &Client, name: &AgentKey, rest: &str) -> Result<(), Report> {
    client.order(Method::POST, &at(name, rest)).await
}

async fn pin(client: &Client, name: &AgentKey, id: &str, pinned: bool) -> Result<(), Report> {
    client.post_json(&at(name, &format!("/records/{id}/pin")), &Pin { pinned }).await.map(drop)
}

#[derive(Serialize)]
struct Examined {
    agent: String,
    /// None: it has remembered nothing yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    found: Option<Checked>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<Report>,
}

/// One store, or all. What is damaged is named, and the others are read all the same.
async fn doctor(session: &Session, client: &Client, name: Option<AgentKey>) -> Outcome {
    let names: Vec<String> = match name {
        Some(name) => vec![name.to_string()],
        None => {
            let agents: Vec<Agent> = client.get("/api/v1/agents").await?;
            agents.iter().map(|agent| agent.name.to_string()).collect()
        }
    };
    let (mut examined, mut problems) = (Vec::new(), Vec::new());
    for agent in names {
        let path = format!("/api/v1/agents/{agent}/memory/check");
        // A large store is read for minutes.
        let answer = client.send_slowly(Method::POST, &path, None, client::empty()).await;
        let read = match answer {
            Ok(answer) => client::parse::<Checked>(answer).await,
            Err(report) => Err(report),
        };
        let (found, problem) = match read {
            Ok(found) => (Some(found), None),
            Err(report) if report.why.contains("not remembered anything yet") => (None, None),
            Err(report) => (None, Some(report)),
        };
        problems.extend(problem.clone());
        examined.push(Examined { agent, found, problem });
    }
    session.show(&examined, |all| {
        let lines = all.iter().map(|one| match (&one.found, &one.problem) {
            (Some(found), _) => show::memory::checked(&one.agent, found),
            (None, None) => format!("{}: has remembered nothing yet\n", one.agent),
            (None, Some(report)) => format!("{}: {}\n", one.agent, show::harmless(&report.why)),
        });
        lines.collect()
    });
    if problems.is_empty() { Ok(()) } else { Err(Failed(problems)) }
}

pub async fn knowledge(session: &Session, command: cli::Knowledge) -> Outcome {
    let client = session.client()?;
    let base = "/api/v1/knowledge";
    let all: Vec<Collection> = match command {
        cli::Knowledge::Ls => client.get(base).await?,
        cli::Knowledge::Set { collection, bytes, records } => {
            let now: Vec<Collection> = client.get(base).await?;
            let now = now.iter().find(|one| one.name == collection).map(|one| one.quota).unwrap_or_default();
            let quota = Quota { bytes: bytes.unwrap_or(now.bytes), records: records.unwrap_or(now.records) };
            put(&client, &format!("{base}/{collection}"), &quota).await?
        }
        cli::Knowledge::Rm { collection } => delete(&client, &format!("{base}/{collection}")).await?,
        cli::Knowledge::Grant { collection, agent, write } => {
            use agentd_domain::memory_api::Access;
            let access = if write { Access::ReadWrite } else { Access::Read };
            put(&client, &format!("{base}/{collection}/grants/{agent}"), &Grant { access }).await?
        }
        cli::Knowledge::Revoke { collection, agent } => {
            delete(&client, &format!("{base}/{collection}/grants/{agent}")).await?
        }
        cli::Knowledge::Add { collection, file, title } => {
            let document = read(&file, title)?;
            let path = format!("{base}/{collection}/documents");
            let added: DocumentAdded = client.post(&path, &document).await?;
            session.show(&added, |added| format!("{} in {} parts\n", added.document, added.parts));
            return Ok(());
        }
        cli::Knowledge::RmDocument { collection, document } => {
            delete(&client, &format!("{base}/{collection}/documents/{document}")).await?
        }
    };
    session.show(all.as_slice(), show::memory::collections);
    Ok(())
}

async fn put(client: &Client, path: &str, body: &impl Serialize) -> Result<Vec<Collection>, Report> {
    // Our own types hold no maps with keys that are not text.
    let body = client::full(serde_json::to_vec(body).unwrap_or_default());
    client::parse(client.send(Method::PUT, path, Some("application/json"), body).await?).await
}

async fn delete(client: &Client, path: &str) -> Result<Vec<Collection>, Report> {
    client::parse(client.send(Method::DELETE, path, None, client::empty()).await?).await
}

fn read(file: &Path, title: Option<String>) -> Result<Document, Report> {
    let what = "the document was not sent";
    let bytes = std::fs::read(file).map_err(|error| {
        let why = format!("{}: {error}", file.display());
        Report::caller("document_unreadable", what, why, "name a file that you may read")
    })?;
    if bytes.len() > DOCUMENT_MOST_BYTES {
        let why = format!("{} has {} bytes", file.display(), bytes.len());
        let fix = format!("split it into files of at most {DOCUMENT_MOST_BYTES} bytes");
        return Err(Report::caller("too_large", what, why, fix));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let why = format!("{} is not text in UTF-8: {error}", file.display());
        Report::caller(
            "document_not_text",
            what,
            why,
            "convert it to plain text first, with pdftotext for example",
        )
    })?;
    let name = || file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Document { title: title.unwrap_or_else(name), text, source: None, event_unix_ms: None })
}
