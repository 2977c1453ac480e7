//! What will the kernel enforce?

use super::{Failed, Outcome, Session};
use crate::client;
use crate::show;
use agentd_capability::{Difference, Subject, compile, difference, parse_manifest};
use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::manifest::Manifest;
use agentd_domain::plan::SandboxPlan;
use hyper::Method;
use std::fs;
use std::path::Path;

/// Compiled here, by the code that the appliance uses. Id and user id are placeholders: the appliance gives an
/// agent its own when it is installed.
pub fn local(path: &Path, json: bool) -> Outcome {
    let manifest = manifest(path)?;
    print(&compile(&manifest, &Subject::nobody()), json);
    Ok(())
}

pub async fn remote(session: &Session, path: &Path) -> Result<(), Report> {
    let text = read(path)?;
    let client = session.client()?;
    let answer = client.send(Method::POST, "/api/v1/plan", Some("text/plain"), client::full(text)).await?;
    print(&client::parse(answer).await?, session.json);
    Ok(())
}

/// Compared as what the kernel would enforce, not as texts.
pub fn diff(session: &Session, before: &Path, after: &Path) -> Outcome {
    session.show(&difference(&manifest(before)?, &manifest(after)?), changes);
    Ok(())
}

fn changes(difference: &Difference) -> String {
    let lines: Vec<String> = [
        ("WIDER    ", &difference.wider),
        ("narrower ", &difference.narrower),
        ("other    ", &difference.other),
    ]
    .into_iter()
    .flat_map(|(mark, lines)| lines.iter().map(move |line| format!("{mark}{line}\n")))
    .collect();
    if lines.is_empty() { "the same is allowed\n".to_owned() } else { lines.concat() }
}

/// The checked manifest, or all that is wrong with it.
pub fn manifest(path: &Path) -> Result<Manifest, Failed> {
    parse_manifest(&read(path)?).map_err(Failed)
}

fn read(path: &Path) -> Result<String, Report> {
    fs::read_to_string(path).map_err(|error| {
        Report::caller(
            "manifest_unreadable",
            format!("{} was not read", path.display()),
            error.to_string(),
            "name a readable agent.toml",
        )
    })
}

/// What a plan of no run cannot say yet, as a comment of TOML.
fn device(plan: &SandboxPlan) -> String {
    let Some(wish) = &plan.device else { return String::new() };
    let (what, who) = match wish.memory_bytes {
        Some(bytes) => (
            format!("at most {} of an accelerator", human::bytes(bytes)),
            "hardware (MIG) or kernel (NVIDIA's driver 615, dmem) hold the program to it",
        ),
        None => ("a whole accelerator".to_owned(), "its owner has granted one to this agent alone"),
    };
    format!(
        "\n# device: {what}, chosen when a run starts, and only where {who}; else no run is started.\n\
         # The run then has that device's nodes in /dev, their driver's ioctls, and no other device.\n"
    )
}

/// A plan is one value with names and numbers only; TOML shows it whole and readable.
fn print(plan: &SandboxPlan, json: bool) {
    if json {
        return show::json(plan);
    }
    match toml::to_string_pretty(plan) {
        Ok(text) => show::out(&format!("{text}{}", device(plan))),
        Err(_) => show::json(plan),
    }
}
