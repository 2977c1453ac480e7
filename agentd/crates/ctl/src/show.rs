//! How does an answer look in a terminal?
//!
//! Tables are aligned, without lines, so that `grep` and `awk` work on them; `--json` is for programs.

pub mod memory;

use crate::commands::{KeyFrom, Verified};
use agentd_domain::api::{Agent, ApplianceStatus, EngineState, LogLine, Model};
use agentd_domain::audit::{Actor, Linked, Verdict};
use agentd_domain::engine::ModelKind;
use agentd_domain::fault::Report;
use agentd_domain::health::{PainFrom, Throttle};
use agentd_domain::human;
use agentd_domain::initctl::{Clock, Health};
use agentd_domain::launcher::ExitCause;
use agentd_domain::ledger::{Basis, Devices, ModelPlan};
use agentd_domain::secret::SecretInfo;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{self, Write};

/// Writes to standard output. A reader that has gone (`| head`) ends the program quietly, as `cat` would.
pub fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

pub fn json(value: &impl Serialize) {
    // The API's types hold no maps with keys that are not text.
    out(&format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default()));
}

/// To standard error: what, why, and how to fix it.
pub fn report(report: &Report, json: bool) {
    if json {
        eprintln!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        eprintln!("agentctl: {}", report.what);
        eprintln!("  why: {}", report.why);
        eprintln!("  fix: {}", report.fix);
    }
}

pub fn status(status: &ApplianceStatus) -> String {
    let used = |total: u64, free: u64| {
        format!("{} of {}", human::bytes(total.saturating_sub(free)), human::bytes(total))
    };
    // An older appliance does not say it.
    let known = |bytes: u64| if bytes == 0 { "unknown".to_owned() } else { human::bytes(bytes) };
    let mut text = pairs(&[
        ("version", status.version.clone()),
        ("variant", if status.variant.is_empty() { "unknown".to_owned() } else { status.variant.clone() }),
        ("slot", status.slot.clone()),
        ("health", colour(status.health).to_owned()),
        ("up for", human::span_ms(status.uptime_ms)),
        ("clock", format!("{} UTC, {}", moment(status.now_unix_ms), clock(status.clock))),
        ("memory", used(status.memory_total_bytes, status.memory_available_bytes)),
        ("agentd", known(status.agentd_rss_bytes)),
        ("data", used(status.data_total_bytes, status.data_available_bytes)),
        (
            "addresses",
            if status.addresses.is_empty() { "none".to_owned() } else { status.addresses.join(" ") },
        ),
        ("engine", engine(&status.engine)),
    ]);
    for device in &status.devices {
        let free = human::bytes(device.memory_free_bytes);
        let _ = writeln!(text, "device     {} {}, {free} free", device.name, device.description);
    }
    if let EngineState::Ready { backends, .. } = &status.engine {
        for back_end in backends {
            let _ = writeln!(text, "back end   {}", back_end.line());
        }
    }
    for gpu in &status.gpus {
        let name = gpu.name.as_deref().unwrap_or("GPU");
        let _ = writeln!(text, "gpu        {name}: {}", gpu.facts().join(", "));
        if let Some(sentence) = gpu.health.sentence() {
            let _ = writeln!(text, "           {sentence}");
        }
    }
    for region in &status.regions {
        let (name, all) = (&region.name, human::bytes(region.capacity_bytes));
        let (engines, agents) = (human::bytes(region.engines_bytes), human::bytes(region.agents_bytes));
        let _ = writeln!(text, "region     {name}: engines {engines}, agents {agents}, of {all}");
    }
    if let EngineState::Ready { models, .. } = &status.engine {
        for model in models {
            let parameters = human::count(model.parameters);
            let _ =
                writeln!(text, "model      {} ({}, {parameters} parameters)", model.model, kind(model.kind));
        }
    }
    for problem in &status.problems {
        let _ = writeln!(text, "\nproblem: {}\n  why: {}\n  fix: {}", problem.what, problem.why, problem.fix);
    }
    text
}

pub fn devices(devices: &Devices) -> String {
    let rows = devices.devices.iter().map(|one| {
        let planned = &one.planned;
        let computing = planned.compute_bytes.saturating_add(planned.recurrent_bytes);
        vec![
            one.name.clone(),
            human::bytes(one.total_bytes),
            human::bytes(planned.weights_bytes),
            human::bytes(planned.kv_bytes),
            human::bytes(computing),
            human::bytes(planned.overhead_bytes),
            human::bytes(one.programs_bytes),
            human::bytes(one.reserve_bytes),
            human::bytes(one.free_bytes),
            human::bytes(one.reported_free_bytes),
            one.used_bytes.map_or_else(|| "-".to_owned(), human::bytes),
            one.unknown_bytes().map_or_else(|| "-".to_owned(), human::bytes),
            one.enforcement.name().to_owned(),
        ]
    });
    let head = [
        "DEVICE",
        "BYTES",
        "WEIGHTS",
        "KV",
        "COMPUTING",
        "LEARNED",
        "PROGRAMS",
        "RESERVE",
        "FREE",
        "REPORTS FREE",
        "USES",
        "UNKNOWN",
        "KEPT BY",
    ];
    let mut text = table(&head, rows);
    for one in &devices.devices {
        if let Some(agent) = &one.granted_to {
            let _ = writeln!(text, "\n{} is granted to {agent} alone: no engine is put on it", one.name);
        }
        if let Some(problem) = &one.problem {
            let _ =
                writeln!(text, "\nproblem: {}\n  why: {}\n  fix: {}", problem.what, problem.why, problem.fix);
        }
    }
    let models = devices.models.iter().flat_map(|model| {
        model.need.devices.iter().map(|part| {
            vec![
                model.model.clone(),
                model.partition.to_string(),
                part.device.clone(),
                human::bytes(part.weights_bytes),
                human::bytes(part.kv_bytes),
                human::bytes(part.compute_bytes.saturating_add(part.recurrent_bytes)),
                format!("{} of {}", model.cells_held, model.need.cells),
            ]
        })
    });
    let head = ["MODEL", "LOADED FOR", "DEVICE", "WEIGHTS", "KV", "COMPUTING", "CELLS"];
    let _ = write!(text, "\n{}\n{}{}", table(&head, models), caches(devices), partitions(devices));
    text
}

/// How the caches of chat models are used, and what sharing has saved.
fn caches(devices: &Devices) -> String {
    let usages = devices.models.iter().filter_map(|model| model.usage.as_ref());
    let mut rows = usages
        .map(|usage| {
            vec![
                usage.model.clone(),
                usage.running.to_string(),
                usage.waiting.to_string(),
                usage.cells_private.to_string(),
                usage.cells_shared.to_string(),
                usage.cells_cached.to_string(),
                usage.cells_free.to_string(),
                usage.computed_prompt_tokens.to_string(),
                usage.cached_prompt_tokens.to_string(),
                usage.recomputed_tokens.to_string(),
                usage.preemptions.to_string(),
                format!("{}/{}", usage.swapped_out, usage.swapped_in),
                human::bytes(usage.swap_memory_bytes.saturating_add(usage.swap_disk_bytes)),
            ]
        })
        .peekable();
    if rows.peek().is_none() {
        return String::new();
    }
    let head = [
        "CACHE",
        "RUNNING",
        "WAITING",
        "PRIVATE",
        "SHARED",
        "KEPT",
        "FREE",
        "COMPUTED",
        "FROM CACHE",
        "AGAIN",
        "GAVE WAY",
        "SWAPPED",
        "ASIDE",
    ];
    table(&head, rows) + "\n"
}

pub fn partitions(devices: &Devices) -> String {
    let rows = devices.partitions.iter().map(|one| {
        let partition = &one.partition;
        vec![
            partition.id.to_string(),
            partition.devices.join(","),
            human::bytes(partition.bytes),
            human::bytes(one.held.weights_bytes),
            human::bytes(one.held.kv_bytes),
            human::bytes(one.held.compute_bytes),
            human::bytes(one.free_bytes),
            partition.priority.to_string(),
            partition.weight.to_string(),
            if partition.guaranteed { "yes" } else { "no" }.to_owned(),
            one.enforcement.name().to_owned(),
            one.agents.len().to_string(),
        ]
    });
    let head = [
        "PARTITION",
        "DEVICES",
        "BYTES",
        "WEIGHTS",
        "KV",
        "COMPUTING",
        "FREE",
        "PRIORITY",
        "WEIGHT",
        "GUARANTEED",
        "KEPT BY",
        "AGENTS",
    ];
    let mut text = table(&head, rows);
    let agents = devices.partitions.iter().flat_map(|one| one.agents.iter().map(move |agent| (one, agent)));
    let mut rows = agents
        .map(|(one, agent)| {
            vec![
                agent.agent.as_ref().map_or_else(|| agent.agent_id.to_string(), ToString::to_string),
                one.partition.id.to_string(),
                agent.cells.to_string(),
                agent.cells_shared.to_string(),
                agent.cells_promised.to_string(),
                human::bytes(agent.kv_bytes),
                agent.running.to_string(),
                agent.waiting.to_string(),
                agent.put_aside.to_string(),
                human::bytes(agent.aside_bytes),
                // Between agents of one engine nobody else keeps a limit.
                one.enforcement.name().to_owned(),
            ]
        })
        .peekable();
    if rows.peek().is_some() {
        let head = [
            "AGENT",
            "PARTITION",
            "CELLS",
            "SHARED",
            "PROMISED",
            "KV",
            "RUNNING",
            "WAITING",
            "GAVE WAY",
            "ASIDE",
            "KEPT BY",
        ];
        let _ = write!(text, "\n{}", table(&head, rows));
    }
    for problem in devices.partitions.iter().filter_map(|one| one.problem.as_ref()) {
        let _ = writeln!(text, "\nproblem: {}\n  why: {}\n  fix: {}", problem.what, problem.why, problem.fix);
    }
    text
}

pub fn model_plan(plan: &ModelPlan) -> String {
    let need = &plan.need;
    let mut text = pairs(&[
        ("model", plan.model.clone()),
        ("architecture", plan.architecture.clone()),
        ("context", format!("{} tokens of {} sequences together", need.cells, need.sequences)),
        ("per token", human::bytes(need.kv_bytes_per_cell)),
        ("in all", human::bytes(need.total_bytes())),
    ]);
    let parts = need.devices.iter().map(|part| {
        vec![
            part.device.clone(),
            human::bytes(part.weights_bytes),
            human::bytes(part.kv_bytes),
            human::bytes(part.recurrent_bytes),
            human::bytes(part.compute_bytes),
            human::bytes(part.overhead_bytes),
        ]
    });
    let head = ["DEVICE", "WEIGHTS", "KV", "STATES", "COMPUTING", "LEARNED"];
    let _ = write!(text, "\n{}", table(&head, parts));
    if need.basis == Basis::Header {
        text.push_str("Room for computing is an upper estimate: the file's header does not say it.\n");
    }
    for assumed in &need.assumed {
        let _ = writeln!(text, "Assumed: {assumed}.");
    }
    let fits = plan.fits.iter().map(|fit| {
        vec![
            fit.partition.to_string(),
            human::bytes(fit.bytes),
            human::bytes(fit.free_bytes),
            fit.refusal.as_ref().map_or("yes", |refusal| refusal.code.as_str()).to_owned(),
            fit.context_tokens_most.to_string(),
        ]
    });
    let head = ["PARTITION", "BYTES", "FREE", "FITS", "LONGEST CONTEXT"];
    let _ = write!(text, "\n{}", table(&head, fits));
    for refusal in plan.fits.iter().filter_map(|fit| fit.refusal.as_ref()) {
        let _ = writeln!(text, "\n{}\n  why: {}\n  fix: {}", refusal.what, refusal.why, refusal.fix);
    }
    text
}

pub fn agents(agents: &[Agent]) -> String {
    let rows = agents.iter().map(|agent| {
        let run = agent.run.as_ref();
        let of = |used: Option<String>, most: String| {
            used.map_or_else(|| format!("- of {most}"), |u| format!("{u} of {most}"))
        };
        vec![
            agent.name.to_string(),
            agent.state.name().to_owned(),
            of(run.map(|r| human::bytes(r.memory_bytes)), human::bytes(agent.limits.memory_max_bytes)),
            of(run.map(|r| r.pids.to_string()), agent.limits.pids.to_string()),
            run.map_or_else(|| "-".to_owned(), |r| human::span_ms(r.cpu_ms)),
            run.map_or_else(|| "-".to_owned(), |r| human::span_ms(r.uptime_ms)),
            agent.restarts.to_string(),
        ]
    });
    table(&["NAME", "STATE", "MEMORY", "PROCESSES", "CPU TIME", "UP FOR", "RESTARTS"], rows)
}

pub fn agent(agent: &Agent) -> String {
    let mut text = agents(std::slice::from_ref(agent));
    if let Some(problem) = &agent.problem {
        let _ = writeln!(text, "\nproblem: {}\n  why: {}\n  fix: {}", problem.what, problem.why, problem.fix);
    }
    text
}

pub fn agent_with_health(one: &Agent) -> String {
    format!("{}{}", agent(one), health(one))
}

/// How it is, what hurts it, what was done about it, and how its last runs ended.
fn health(agent: &Agent) -> String {
    let health = &agent.health;
    let mut lines = vec![("reason", harmless(&health.reason))];
    if let Some(pressure) = &health.pressure {
        let percent = |permille: u32| format!("{}.{} %", permille / 10, permille % 10);
        lines.push((
            "pressure",
            format!(
                "memory {} (all of it {}), processor {}, disk {}; over its soft memory limit {} times",
                percent(pressure.memory_some_permille),
                percent(pressure.memory_full_permille),
                percent(pressure.cpu_some_permille),
                percent(pressure.io_some_permille),
                pressure.memory_high_events,
            ),
        ));
    }
    match health.throttle {
        Throttle::None => {}
        Throttle::Half => lines.push(("throttled", "to half of its processor time".to_owned())),
        Throttle::Quarter => lines.push(("throttled", "to a quarter of its processor time".to_owned())),
    }
    lines.push(("restarts", agent.restarts.to_string()));
    let mut text = format!("\n{}", pairs(&lines));
    for pain in health.pains.iter().rev() {
        let from = if pain.from == PainFrom::Agent { "it says" } else { "seen" };
        let over = if pain.over { ", over" } else { "" };
        let message = harmless(&pain.message).replace(['\n', '\t'], " ");
        let _ = writeln!(
            text,
            "pain       {} {} {} ({} times{over}), {from}: {message}",
            moment(pain.at_unix_ms),
            pain.severity,
            harmless(&pain.kind),
            pain.count,
        );
    }
    for note in health.notes.iter().rev() {
        let _ = writeln!(text, "note       {} {}", moment(note.unix_ms), harmless(&note.text));
    }
    for exit in &health.exits {
        let life = human::span_ms(exit.ended_boot_ms.saturating_sub(exit.started_boot_ms));
        let _ = writeln!(text, "end        {}, after {life}", cause(&exit.cause));
    }
    text
}

fn cause(cause: &ExitCause) -> String {
    match cause {
        ExitCause::Exited { code } => format!("by itself with code {code}"),
        ExitCause::Signalled { signal } => format!("signal {signal}"),
        ExitCause::OutOfMemory => "over its memory limit".to_owned(),
        ExitCause::Seccomp { syscall: Some(call) } => {
            format!("seccomp: the forbidden system call {}", harmless(call))
        }
        ExitCause::Seccomp { syscall: None } => "seccomp: a forbidden system call".to_owned(),
        ExitCause::Pressure => "pressure: it only waited for memory".to_owned(),
        ExitCause::Stuck => "stuck: nothing came of the work in its hand".to_owned(),
        ExitCause::WallFailed { why } => format!("never started: {}", harmless(why)),
        ExitCause::Stopped => "stopped".to_owned(),
    }
}

pub fn models(models: &[Model]) -> String {
    let rows = models.iter().map(|model| {
        let state = model.problem.as_ref().map_or_else(|| model.state(), |problem| problem.why.clone());
        let name = if model.default { format!("{} (default)", model.name) } else { model.name.clone() };
        vec![
            name,
            kind(model.kind).to_owned(),
            model.architecture.clone(),
            human::bytes(model.bytes),
            model.held_bytes.map(human::bytes).unwrap_or_default(),
            model.origin.clone(),
            model.last_used_unix_ms.map(moment).unwrap_or_default(),
            state,
        ]
    });
    table(&["NAME", "KIND", "ARCHITECTURE", "SIZE", "MEMORY", "FROM", "LAST USED", "STATE"], rows)
}

pub fn secrets(secrets: &[SecretInfo]) -> String {
    let rows = secrets.iter().map(|secret| {
        let agent = match (&secret.agent, secret.agent_id) {
            (Some(name), _) => name.to_string(),
            (None, Some(id)) => id.to_string(),
            (None, None) => "every agent".to_owned(),
        };
        let hosts: Vec<String> = secret.hosts.iter().map(ToString::to_string).collect();
        let hosts = if hosts.is_empty() { "as its rules say".to_owned() } else { hosts.join(", ") };
        vec![secret.name.to_string(), agent, hosts]
    });
    table(&["NAME", "AGENT", "HOSTS"], rows)
}

pub fn audit(records: &[Linked]) -> String {
    let rows = records.iter().map(|linked| {
        let record = &linked.record;
        vec![
            record.seq.to_string(),
            moment(record.unix_ms),
            verdict(record.verdict).to_owned(),
            actor(record.actor).to_owned(),
            record.agent_id.map_or_else(|| "-".to_owned(), |agent| agent.to_string()),
            harmless(&record.action),
            record.right.as_deref().map_or_else(|| "-".to_owned(), harmless),
            record.count.to_string(),
            harmless(&record.detail).replace(['\n', '\t'], " "),
        ]
    });
    table(&["RECORD", "TIME (UTC)", "VERDICT", "WHO", "AGENT", "ACTION", "RIGHT", "TIMES", "DETAIL"], rows)
}

pub fn verified(verified: &Verified) -> String {
    let summary = &verified.summary;
    let records = summary.last_seq + 1 - summary.first_seq;
    let dropped = match summary.first_seq {
        1 => "none".to_owned(),
        first => format!("those before {first}, as a signed head says"),
    };
    let from = match verified.key_from {
        KeyFrom::Given => "given on the command line",
        KeyFrom::Kept => "kept since the log was first verified here",
        KeyFrom::Appliance => "the appliance's; kept from now on",
        KeyFrom::File => "the file's own, which shows damage and no forgery: name it with `--key`",
    };
    let unsigned = match summary.last_seq - summary.signed_seq {
        0 => "all of them".to_owned(),
        _ => format!("up to {}", summary.signed_seq),
    };
    let tally = &summary.decisions;
    pairs(&[
        ("whole", format!("{records} records, up to {}", summary.last_seq)),
        ("signed", unsigned),
        ("dropped", dropped),
        ("allowed", tally.allowed.to_string()),
        ("denied", tally.denied.to_string()),
        ("killed", tally.killed.to_string()),
        ("key", format!("{} ({from})", summary.key)),
    ])
}

pub fn log_line(line: &LogLine) -> String {
    format!("{} {:<6} {}\n", moment(line.unix_ms), line.stream, harmless(&line.text))
}

/// What an agent wrote, without the control characters by which it could steer the terminal.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|&name| name.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn pairs(pairs: &[(&str, String)]) -> String {
    pairs.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
}

fn engine(state: &EngineState) -> String {
    match state {
        EngineState::Ready { backend, rss_bytes, uptime_ms, loading, .. } => {
            let word = if *loading { "loading" } else { "ready" };
            let (memory, up) = (human::bytes(*rss_bytes), human::span_ms(*uptime_ms));
            format!("{word}, {backend}, {memory}, up {up}")
        }
        EngineState::Starting => "starting".to_owned(),
        EngineState::Down { report } => format!("down: {}", report.why),
    }
}

pub fn moment(unix_ms: i64) -> String {
    match jiff::Timestamp::from_millisecond(unix_ms) {
        Ok(moment) => moment.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => format!("{unix_ms} ms"),
    }
}

fn colour(health: Health) -> &'static str {
    match health {
        Health::Green => "green",
        Health::Yellow => "yellow",
        Health::Red => "red",
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Denied => "denied",
        Verdict::Killed => "killed",
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

fn clock(clock: Clock) -> &'static str {
    match clock {
        Clock::Unconfirmed => "not confirmed",
        Clock::Sntp => "from the network",
        Clock::Owner => "set by the owner",
    }
}

fn kind(kind: ModelKind) -> &'static str {
    match kind {
        ModelKind::Chat => "chat",
        ModelKind::Embedding => "embedding",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_cleanly() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["längst".to_owned(), String::new()]];
        assert_eq!(table(&["NAME", "N"], rows.into_iter()), "NAME    N\na       1\nlängst\n");
    }

    #[test]
    fn an_agent_cannot_steer_the_terminal() {
        assert_eq!(harmless("a\u{1b}[2Jb\rc\td\u{7}\u{9b}"), "a\u{fffd}[2Jb\u{fffd}c\td\u{fffd}\u{fffd}");
    }
}
