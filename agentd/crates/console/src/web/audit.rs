//! What was allowed, denied and killed, and by which right?

use super::layout::{Section, page, pill, problem};
use super::units;
use agentd_domain::api::Agent;
use agentd_domain::audit::{Actor, Linked, Record, Verdict};
use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use maud::{Markup, html};

/// A page of the log as the console asks for it.
pub const PAGE_RECORDS: usize = 100;
/// On an agent's own page.
pub const TRAIL_RECORDS: usize = 20;

/// Lines of an export, newest first. A line that is neither a record nor a signed head is counted.
#[derive(Debug, Default)]
pub struct Trail {
    pub records: Vec<Record>,
    pub unreadable: usize,
}

impl Trail {
    pub fn read(lines: &[u8]) -> Self {
        let mut trail = Self::default();
        for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Linked>(line) {
                Ok(linked) => trail.records.push(linked.record),
                Err(_) if serde_json::from_slice::<agentd_domain::audit::SignedHead>(line).is_ok() => {}
                Err(_) => trail.unreadable += 1,
            }
        }
        trail.records.reverse();
        trail
    }
}

/// What the page was asked for.
pub struct Filter<'a> {
    pub agent: Option<&'a str>,
    pub after: Option<u64>,
}

pub fn log(trail: &Trail, filter: &Filter<'_>, agents: &[Agent], health: Health) -> Markup {
    let last = trail.records.first().map(|record| record.seq);
    let full = trail.records.len() == PAGE_RECORDS;
    let link = |after: u64| match filter.agent {
        Some(agent) => format!("/audit?agent={agent}&after={after}"),
        None => format!("/audit?after={after}"),
    };
    page(
        "Audit",
        Section::Audit,
        health,
        &html! {
            h1 { "Audit" }
            p.dim {
                "What agentd allowed and denied, by which right, and what the kernel killed. "
                code { "agentctl audit verify" } " checks that nothing was changed or left out."
            }
            form.filter method="get" action="/audit" {
                label for="agent" { "Agent" }
                select #agent name="agent" {
                    option value="" { "everybody" }
                    @for agent in agents {
                        option value=(agent.name) selected[filter.agent == Some(agent.name.as_str())] { (agent.name) }
                    }
                }
                button type="submit" { "Show" }
            }
            (table(trail, agents))
            nav.actions aria-label="Pages of the log" {
                @if filter.after.is_some() || full { a href=(link(0)) { "From the beginning" } }
                @if let (Some(_), Some(last), true) = (filter.after, last, full) { a href=(link(last)) { "Later" } }
                @if filter.after.is_some() { a href={ "/audit" @if let Some(agent) = filter.agent { "?agent=" (agent) } } { "Newest" } }
            }
        },
    )
}

/// On an agent's own page.
pub fn trail(agent: &Agent, trail: &Result<Trail, Report>) -> Markup {
    html! {
        section.card #agent-audit data-live aria-labelledby="audit-title" {
            div.split {
                h2 #audit-title { "Audit trail " span.dim { "times in UTC" } }
                a href={ "/audit?agent=" (agent.name) } { "All of it" }
            }
            @match trail {
                Ok(trail) => (table(trail, std::slice::from_ref(agent))),
                Err(report) => (problem(report)),
            }
        }
    }
}

fn table(trail: &Trail, agents: &[Agent]) -> Markup {
    html! {
        @if trail.unreadable > 0 {
            p.problem.warn role="alert" { (trail.unreadable) " lines cannot be read: run " code { "agentctl audit verify" } }
        }
        @if trail.records.is_empty() { p.dim { "Nothing yet." } }
        @else {
            div.scroll { table {
                thead { tr {
                    th { "Record" } th { "Time (UTC)" } th { "Verdict" } th { "Who" } th { "What" } th { "Right" } th { "Times" } th { "Detail" }
                } }
                tbody { @for record in &trail.records { (row(record, agents)) } }
            } }
        }
    }
}

fn row(record: &Record, agents: &[Agent]) -> Markup {
    let name = agents.iter().find(|agent| Some(agent.agent_id) == record.agent_id).map(|agent| &agent.name);
    html! {
        tr {
            td { (record.seq) }
            td.short { time { (units::moment(record.unix_ms)) } }
            td { (verdict(record.verdict)) }
            td {
                (actor(record.actor))
                @match (name, record.agent_id) {
                    (Some(name), _) => { " " strong { (name) } },
                    // One that is gone, or is not asked for here.
                    (None, Some(id)) => { " " code { (id) } },
                    (None, None) => {},
                }
            }
            td { code { (record.action) } }
            td { @if let Some(right) = &record.right { code { (right) } } }
            td { (record.count) }
            td { (record.detail) }
        }
    }
}

fn verdict(verdict: Verdict) -> Markup {
    match verdict {
        Verdict::Allowed => pill("good", "allowed"),
        Verdict::Denied => pill("warn", "denied"),
        Verdict::Killed => pill("bad", "killed"),
    }
}

fn actor(actor: Actor) -> &'static str {
    match actor {
        Actor::Agent => "agent",
        Actor::Owner => "owner",
        Actor::Stranger => "stranger",
        Actor::Appliance => "appliance",
    }
}
