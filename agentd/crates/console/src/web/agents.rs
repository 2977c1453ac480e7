//! What are the agents doing, and what do they say?

use super::layout::{Section, bar, fact, page, pill, problem};
use super::units;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{Agent, AgentState, LogLine, Run};
use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use agentd_domain::launcher::{ExitCause, ExitRecord};
use maud::{Markup, html};

/// One message and what came back, for people without JavaScript.
pub struct Exchange {
    pub asked: String,
    pub reply: Vec<ReplyPart>,
}

pub fn list(agents: &[Agent], health: Health) -> Markup {
    page(
        "Agents",
        Section::Agents,
        health,
        &html! {
            h1 { "Agents" }
            div #agents data-live {
                @if agents.is_empty() {
                    p.dim { "None is installed. From a terminal: " code { "agentctl agent install DIR" } }
                } @else {
                    div.scroll { table {
                        thead { tr {
                            th { "Name" } th { "State" } th { "Memory" } th { "Processes" } th { "Processor time" } th { "Up for" }
                        } }
                        tbody { @for agent in agents { (row(agent)) } }
                    } }
                }
            }
        },
    )
}

fn row(agent: &Agent) -> Markup {
    let run = agent.run.as_ref();
    html! {
        tr {
            td { a href={ "/agents/" (agent.name) } { strong { (agent.name) } } div.dim { (agent.description) } }
            td { (state_pill(agent.state)) @if agent.restarts > 0 { div.dim { (agent.restarts) " restarts" } } }
            td.wide { (run.map_or_else(dash, |run| used_bytes(run.memory_bytes, agent.limits.memory_max_bytes))) }
            td.wide { (run.map_or_else(dash, |run| html! {
                span.numbers { (run.pids) " of " (agent.limits.pids) }
                (bar(u64::from(run.pids), u64::from(agent.limits.pids)))
            })) }
            td.short { (run.map_or_else(dash, |run| html! { (units::span_ms(run.cpu_ms)) })) }
            td.short { (run.map_or_else(dash, |run| html! { (units::span_ms(run.uptime_ms)) })) }
        }
    }
}

pub fn agent(
    agent: &Agent,
    log: &Result<Vec<LogLine>, Report>,
    exchange: Option<&Exchange>,
    health: Health,
) -> Markup {
    page(
        agent.name.as_str(),
        Section::Agents,
        health,
        &html! {
            div.title {
                div {
                    h1 { (agent.name) }
                    p.dim { (agent.description) }
                }
                div #state .actions data-live { (state_pill(agent.state)) (controls(agent)) }
            }
            div #agent-problem data-live { @if let Some(report) = &agent.problem { (problem(report)) } }
            div.grid {
                (usage(agent))
                (about(agent))
            }
            @if agent.messages { (chat(agent, exchange)) }
            (log_view(agent, log))
        },
    )
}

fn controls(agent: &Agent) -> Markup {
    let base = format!("/agents/{}", agent.name);
    // An agent that is wanted and does not run can be tried again at once, or given up.
    let waits = matches!(agent.state, AgentState::BackingOff | AgentState::Quarantined | AgentState::Refused);
    html! {
        @if !agent.wanted || waits {
            form method="post" action={ (base) "/start" } {
                button.primary type="submit" { @if waits { "Start again" } @else { "Start" } }
            }
        }
        @if agent.wanted {
            form method="post" action={ (base) "/stop" } { button type="submit" { "Stop" } }
        }
        @if !agent.bundled {
            (super::confirmed(&format!("{base}/remove"), "Remove", "Remove this agent with its files and its memory? This cannot be undone."))
        }
    }
}

fn usage(agent: &Agent) -> Markup {
    let limits = &agent.limits;
    let run = agent.run.as_ref();
    html! {
        section.card #usage data-live {
            h2 { "Use and limits" }
            (limit("Memory", run.map(|r| (r.memory_bytes, limits.memory_max_bytes)), &units::bytes(limits.memory_max_bytes), units::bytes))
            (limit("Processes", run.map(|r| (u64::from(r.pids), u64::from(limits.pids))), &limits.pids.to_string(), |n| n.to_string()))
            dl.facts {
                (fact("Processor", html! {
                    @if let Some(run) = run { (units::span_ms(run.cpu_ms)) " used, " }
                    "at most " (limits.cpu_percent) " % of one core"
                }))
                (fact("Disk", html! { "at most " (units::bytes(limits.disk_bytes)) ", " (limits.inodes) " files" }))
                (fact("Open files", html! { "at most " (limits.open_files) }))
                (fact("/tmp", html! { "at most " (units::bytes(limits.tmp_bytes)) }))
            }
        }
    }
}

fn limit(name: &str, used: Option<(u64, u64)>, most: &str, show: impl Fn(u64) -> String) -> Markup {
    html! {
        div.gauge {
            div { span { (name) } span.numbers {
                @match used { Some((part, _)) => { (show(part)) " of " (most) }, None => { "at most " (most) } }
            } }
            (used.map_or_else(|| bar(0, 1), |(part, whole)| bar(part, whole)))
        }
    }
}

fn about(agent: &Agent) -> Markup {
    html! {
        section.card #about data-live {
            h2 { "Run" }
            dl.facts {
                @match &agent.run {
                    Some(run) => (running(run)),
                    None => (fact("Now", html! { span.dim { "no process" } })),
                }
                (fact("Restarts", html! { (agent.restarts) }))
                (fact("Last end", agent.last_exit.as_ref().map_or_else(dash, last_exit)))
                (fact("Version", html! { (agent.version) @if agent.bundled { " " (pill("calm", "bundled")) } }))
                (fact("Id", html! { code { (agent.agent_id) } }))
                (fact("Package", html! { code title=(agent.digest) { (agent.digest.get(..16).unwrap_or(&agent.digest)) "…" } }))
            }
        }
    }
}

fn running(run: &Run) -> Markup {
    html! {
        (fact("Up for", html! { (units::span_ms(run.uptime_ms)) }))
        (fact("Process", html! { (run.pid) }))
    }
}

fn last_exit(exit: &ExitRecord) -> Markup {
    let life = exit.ended_boot_ms.saturating_sub(exit.started_boot_ms);
    html! {
        (cause(&exit.cause)) ", after " (units::span_ms(life))
        @if exit.memory_peak_bytes > 0 { ", peak " (units::bytes(exit.memory_peak_bytes)) }
    }
}

/// How a run ended, in words.
pub fn cause(cause: &ExitCause) -> String {
    match cause {
        ExitCause::Exited { code } => format!("ended by itself with code {code}"),
        ExitCause::Signalled { signal } => format!("killed by signal {signal}"),
        ExitCause::OutOfMemory => "killed for going over its memory limit".to_owned(),
        ExitCause::Seccomp => "killed for a forbidden system call".to_owned(),
        ExitCause::WallFailed { why } => format!("never started: {why}"),
        ExitCause::Stopped => "stopped on request".to_owned(),
    }
}

fn chat(agent: &Agent, exchange: Option<&Exchange>) -> Markup {
    html! {
        section.card.chat data-chat=(agent.name) {
            h2 { "Chat" }
            div #talk .talk role="log" aria-live="polite" aria-label={ "Conversation with " (agent.name) } {
                @if let Some(exchange) = exchange {
                    div.bubble.me { (exchange.asked) }
                    @for part in &exchange.reply { (reply_part(part)) }
                }
            }
            form.say method="post" action={ "/agents/" (agent.name) "/chat" } {
                textarea name="text" rows="2" required placeholder={ "Write to " (agent.name) } aria-label="Message" {}
                button.primary type="submit" { "Send" }
            }
        }
    }
}

fn reply_part(part: &ReplyPart) -> Markup {
    match part {
        ReplyPart::Text { text } => html! { div.bubble.them { (text) } },
        ReplyPart::Note { text } => html! { div.note { (text) } },
        ReplyPart::Failed { report } => problem(report),
        ReplyPart::Done => html! {},
    }
}

fn log_view(agent: &Agent, log: &Result<Vec<LogLine>, Report>) -> Markup {
    html! {
        section.card {
            div.split {
                h2 { "Log" }
                label.check hidden { input #follow type="checkbox" checked; " follow" }
            }
            @match log {
                Ok(lines) => {
                    div #log .log data-log=(agent.name) tabindex="0" role="log" aria-label="Log, times in UTC" {
                        @if lines.is_empty() { div.dim { "Nothing yet." } }
                        @for line in lines { (log_line(line)) }
                    }
                }
                Err(report) => (problem(report)),
            }
        }
    }
}

fn log_line(line: &LogLine) -> Markup {
    let class = match line.stream.as_str() {
        "err" => "line err",
        "agentd" => "line agentd",
        _ => "line",
    };
    html! { div class=(class) { time { (units::clock_time(line.unix_ms)) } span { (line.text) } } }
}

pub fn state_pill(state: AgentState) -> Markup {
    match state {
        AgentState::Stopped => pill("quiet", "Stopped"),
        AgentState::Starting => pill("calm", "Starting"),
        AgentState::Running => pill("good", "Running"),
        AgentState::BackingOff => pill("warn", "Waiting to restart"),
        AgentState::Quarantined => pill("bad", "Quarantined"),
        AgentState::Refused => pill("bad", "Refused"),
    }
}

fn used_bytes(part: u64, whole: u64) -> Markup {
    html! { span.numbers { (units::bytes(part)) " of " (units::bytes(whole)) } (bar(part, whole)) }
}

fn dash() -> Markup {
    html! { span.dim { "–" } }
}
