//! What are the agents doing, and what do they say?

use super::audit::{self, Trail};
use super::layout::{Section, bar, fact, page, pill, problem};
use super::{health, units};
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{Agent, AgentState, LogLine, Run};
use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use agentd_domain::launcher::{ExitCause, ExitRecord};
use maud::{Markup, html};

/// One message and what has come back, for people without JavaScript.
pub struct Exchange {
    pub asked: String,
    pub reply: Vec<ReplyPart>,
    /// The message's key, while its reply is not whole: with it the page asks for the same reply again.
    pub unfinished: Option<String>,
}

/// What an agent's page shows beside the agent.
pub struct Shown<'a> {
    pub log: &'a Result<Vec<LogLine>, Report>,
    pub trail: &'a Result<Trail, Report>,
    pub exchange: Option<&'a Exchange>,
    /// A new key for the next message: sent twice, by a second click or a reload, it is delivered once.
    pub next_key: &'a str,
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
            td {
                (state_pill(agent.state)) (health::brief(agent))
                @if agent.restarts > 0 { div.dim { (agent.restarts) " restarts" } }
            }
            td.wide { (share(
                run.map(|run| (run.memory_bytes, agent.limits.memory_max_bytes)),
                &units::bytes(agent.limits.memory_max_bytes),
                units::bytes,
            )) }
            td.wide { (share(
                run.map(|run| (u64::from(run.pids), u64::from(agent.limits.pids))),
                &agent.limits.pids.to_string(),
                |n| n.to_string(),
            )) }
            td.wide {
                @if let Some(run) = run { (units::span_ms(run.cpu_ms)) }
                div.dim { "at most " (agent.limits.cpu_percent) " % of one core" }
            }
            td.short { (run.map_or_else(dash, |run| html! { (units::span_ms(run.uptime_ms)) })) }
        }
    }
}

pub fn agent(agent: &Agent, shown: &Shown<'_>, health: Health) -> Markup {
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
                div.actions {
                    a href={ "/agents/" (agent.name) "/memory" } { "Memory" }
                    div #state .actions data-live { (state_pill(agent.state)) (controls(agent)) }
                }
            }
            div #agent-problem data-live { @if let Some(report) = &agent.problem { (problem(report)) } }
            div.grid {
                (usage(agent))
                (health::card(agent))
                (about(agent))
            }
            (health::past(agent))
            @if agent.messages { (chat(agent, shown)) }
            (audit::trail(agent, shown.trail))
            (log_view(agent, shown.log))
        },
    )
}

fn controls(agent: &Agent) -> Markup {
    let base = format!("/agents/{}", agent.name);
    // An agent that is wanted and does not run can be tried again at once, or given up.
    let waits = matches!(agent.state, AgentState::Crashed | AgentState::Quarantined | AgentState::Refused);
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
            div { span { (name) } span.numbers { (of(used, most, show)) } }
            (used.map_or_else(|| bar(0, 1), |(part, whole)| bar(part, whole)))
        }
    }
}

/// `23 MiB of 256 MiB`, or the limit alone while nothing runs.
fn of(used: Option<(u64, u64)>, most: &str, show: impl Fn(u64) -> String) -> Markup {
    html! { @match used { Some((part, _)) => { (show(part)) " of " (most) }, None => { "at most " (most) } } }
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

pub fn last_exit(exit: &ExitRecord) -> Markup {
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
        ExitCause::Seccomp { syscall: Some(call) } => {
            format!("killed by seccomp for the forbidden system call {call}")
        }
        ExitCause::Seccomp { syscall: None } => "killed by seccomp for a forbidden system call".to_owned(),
        ExitCause::Pressure => "killed by the pressure watchdog: it only waited for memory".to_owned(),
        ExitCause::Stuck => "killed because it was stuck with work in hand".to_owned(),
        ExitCause::WallFailed { why } => format!("never started: {why}"),
        ExitCause::Stopped => "stopped on request".to_owned(),
    }
}

fn chat(agent: &Agent, shown: &Shown<'_>) -> Markup {
    // The place on the page: whoever sent a message sees what came of it without scrolling.
    let action = format!("/agents/{}/chat#chat", agent.name);
    html! {
        section #chat .card.chat data-chat=(agent.name) {
            h2 { "Chat" }
            div #talk .talk role="log" aria-live="polite" aria-label={ "Conversation with " (agent.name) } {
                @if let Some(exchange) = shown.exchange {
                    div.bubble.me { (exchange.asked) }
                    @for part in &exchange.reply { (reply_part(part)) }
                    @if let Some(key) = &exchange.unfinished { (look_again(&action, &exchange.asked, key)) }
                }
            }
            form.say method="post" action=(action) {
                input type="hidden" name="key" value=(shown.next_key);
                textarea name="text" rows="2" required placeholder={ "Write to " (agent.name) } aria-label="Message" {}
                button.primary type="submit" { "Send" }
            }
        }
    }
}

/// The same message with the same key brings the same reply, as far as it has come by then.
fn look_again(action: &str, asked: &str, key: &str) -> Markup {
    html! {
        form.again method="post" action=(action) {
            input type="hidden" name="key" value=(key);
            input type="hidden" name="text" value=(asked);
            p.note { "The reply is not whole yet. It goes on without this page." }
            button type="submit" { "Look again" }
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
                h2 { "Log " span.dim { "times in UTC" } }
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
        AgentState::Ready => pill("good", "Ready"),
        AgentState::Busy => pill("good", "Busy"),
        AgentState::Idle => pill("good", "Idle"),
        AgentState::Stuck => pill("bad", "Stuck"),
        AgentState::Throttled => pill("warn", "Throttled"),
        AgentState::Crashed => pill("warn", "Crashed"),
        AgentState::Quarantined => pill("bad", "Quarantined"),
        AgentState::Refused => pill("bad", "Refused"),
    }
}

fn share(used: Option<(u64, u64)>, most: &str, show: impl Fn(u64) -> String) -> Markup {
    html! {
        span.numbers { (of(used, most, show)) }
        @if let Some((part, whole)) = used { (bar(part, whole)) }
    }
}

fn dash() -> Markup {
    html! { span.dim { "–" } }
}
