//! How is an agent, what hurts it, and what was done about it?

use super::agents::last_exit;
use super::layout::{bar, fact, pill};
use super::units;
use agentd_domain::api::Agent;
use agentd_domain::health::{Pain, PainFrom, Pressure, Severity, Throttle};
use maud::{Markup, html};

pub fn card(agent: &Agent) -> Markup {
    let health = &agent.health;
    html! {
        section.card #agent-health data-live aria-labelledby="health-title" {
            h2 #health-title { "Health" }
            dl.facts {
                (fact("State", html! {
                    (super::agents::state_pill(agent.state)) " "
                    @if !health.reason.is_empty() { (health.reason) }
                }))
                (fact("Restarts", html! { (agent.restarts) }))
                @if health.throttle != Throttle::None {
                    (fact("Throttled", html! { (throttle(health.throttle)) }))
                }
            }
            @match &health.pressure {
                Some(pressure) => (pressures(pressure)),
                None => p.dim { "No pressure is read while it does not run." },
            }
        }
    }
}

fn pressures(pressure: &Pressure) -> Markup {
    let rows = [
        ("Waiting for memory", pressure.memory_some_permille),
        ("All of it waiting for memory", pressure.memory_full_permille),
        ("Waiting for a processor", pressure.cpu_some_permille),
        ("Waiting for the disk", pressure.io_some_permille),
    ];
    html! {
        p.dim { "Share of the last ten seconds" }
        @for (name, permille) in rows {
            div.gauge {
                div { span { (name) } span.numbers { (percent(permille)) } }
                (bar(u64::from(permille), 1000))
            }
        }
        @if pressure.memory_high_events > 0 {
            p.dim { "Held back over its soft memory limit " (pressure.memory_high_events) " times in this run" }
        }
    }
}

/// Pain, what was done, and the last ends: empty parts are left out.
pub fn past(agent: &Agent) -> Markup {
    let health = &agent.health;
    html! {
        section.card #agent-past data-live aria-labelledby="past-title" {
            h2 #past-title { "What happened " span.dim { "times in UTC" } }
            @if health.pains.is_empty() && health.notes.is_empty() && health.exits.is_empty() {
                p.dim { "Nothing but work." }
            }
            @if !health.pains.is_empty() {
                h3 { "Pain" }
                ul.rows { @for pain in health.pains.iter().rev() { li { (one_pain(pain)) } } }
            }
            @if !health.notes.is_empty() {
                h3 { "What was done" }
                ul.rows { @for note in health.notes.iter().rev() {
                    li { time { (units::moment(note.unix_ms)) } " " (note.text) }
                } }
            }
            @if !health.exits.is_empty() {
                h3 { "Last ends" }
                ol.rows { @for exit in &health.exits { li { (last_exit(exit)) } } }
            }
        }
    }
}

fn one_pain(pain: &Pain) -> Markup {
    html! {
        (severity(pain.severity)) " " strong { (pain.kind) } " "
        time.dim { (units::moment(pain.at_unix_ms)) }
        @if pain.count > 1 { span.dim { ", " (pain.count) " times" } }
        @if pain.over { span.dim { ", over" } }
        div {
            span.dim { (match pain.from { PainFrom::Agent => "it says: ", PainFrom::Appliance => "seen: " }) }
            (pain.message)
        }
    }
}

/// Below an agent's state in a list.
pub fn brief(agent: &Agent) -> Markup {
    html! {
        @if !agent.health.reason.is_empty() { div.dim { (agent.health.reason) } }
        @if let Some(pain) = &agent.health.pain { div { (severity(pain.severity)) " " (pain.kind) } }
    }
}

fn severity(severity: Severity) -> Markup {
    let class = match severity {
        Severity::Low => "quiet",
        Severity::Medium => "calm",
        Severity::High => "warn",
        Severity::Critical => "bad",
    };
    pill(class, severity.name())
}

fn throttle(throttle: Throttle) -> &'static str {
    match throttle {
        Throttle::None => "not",
        Throttle::Half => "to half of its processor time",
        Throttle::Quarter => "to a quarter of its processor time",
    }
}

/// `1.5 %`.
fn percent(permille: u32) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}
