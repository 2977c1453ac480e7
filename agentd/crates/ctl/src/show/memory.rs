//! How do memories look in a terminal?

use super::{harmless, moment, pairs, table};
use agentd_domain::agent_api::{Explain, Recalled};
use agentd_domain::human;
use agentd_domain::memory_api::{
    Access, Checked, Collection, Deed, History, Journal, Record, Records, Usage,
};
use serde_json::Value;
use std::fmt::Write as _;

/// Of a text in a table.
const GLIMPSE_CHARS: usize = 60;

pub fn usage(usage: &Usage) -> String {
    let rows = usage.tiers.iter().map(|tier| {
        let most = tier.records_most.map_or_else(|| "no limit".to_owned(), |most| most.to_string());
        vec![
            tier.tier.name().to_owned(),
            tier.records.to_string(),
            most,
            human::bytes(tier.bytes),
            human::bytes(tier.bytes_most),
            tier.forgotten.to_string(),
        ]
    });
    let mut text = table(&["TIER", "RECORDS", "MOST", "BYTES", "MOST", "FORGOTTEN"], rows);
    if usage.pending > 0 {
        let _ = writeln!(text, "{} wait for their vector: found by words only", usage.pending);
    }
    if let Some(by) = usage.rewrite_by_unix_ms {
        let _ = writeln!(text, "something was purged: written anew under another key by {} UTC", moment(by));
    }
    text
}

pub fn records(records: &Records) -> String {
    let mut text = table(
        &["ID", "TIER", "KIND", "TOLD (UTC)", "FROM", "PRESENT", "MARKS", "TEXT"],
        records.records.iter().map(|record| {
            vec![
                record.id.to_string(),
                record.tier.name().to_owned(),
                harmless(&record.role),
                moment(record.recorded_unix_ms),
                harmless(&record.source.kind),
                hundredths(record.presence),
                marks(record),
                glimpse(&record.text),
            ]
        }),
    );
    if let Some(before) = records.before {
        let _ = writeln!(text, "more: --before {before}");
    }
    text
}

pub fn recalled(found: &Recalled) -> String {
    let mut text = String::new();
    if found.words_only {
        text.push_str("the embedding model is away: found by words alone\n");
    }
    if found.hits.is_empty() {
        text.push_str("nothing was found\n");
    }
    for hit in &found.hits {
        let _ = writeln!(
            text,
            "{}  {:.3}  {}  {}",
            hit.id,
            hit.score,
            hit.tier.name(),
            moment(hit.recorded_unix_ms)
        );
        let reference =
            hit.source.reference.as_deref().map(|text| format!(" ({})", line(text))).unwrap_or_default();
        let _ = writeln!(text, "    {}", line(&hit.text));
        let _ = writeln!(text, "    from {}{reference}", line(&hit.source.kind));
        if let Some(why) = hit.explain.as_ref().map(why).filter(|why| !why.is_empty()) {
            let _ = writeln!(text, "    because {why}");
        }
    }
    text
}

/// Each signal by its own name: whatever the ranking knows is shown.
fn why(explain: &Explain) -> String {
    let Ok(Value::Object(all)) = serde_json::to_value(explain) else { return String::new() };
    let shown = all.into_iter().filter_map(|(name, value)| match value {
        Value::Null => None,
        Value::Number(number) => Some(format!("{name} {:.3}", number.as_f64().unwrap_or_default())),
        Value::Array(all) if all.is_empty() => None,
        Value::Array(all) => {
            // A signal with its share of the score, if it had one.
            let words = all.iter().filter_map(|one| match (one["signal"].as_str(), one["share"].as_f64()) {
                (Some(signal), Some(share)) => (share != 0.0).then(|| format!("{signal} {share:+.2}")),
                _ => Some(one.as_str().map_or_else(|| one.to_string(), str::to_owned)),
            });
            Some(format!("{name} {}", words.collect::<Vec<_>>().join(",")))
        }
        Value::String(text) => Some(format!("{name} {text}")),
        other => Some(format!("{name} {other}")),
    });
    line(&shown.collect::<Vec<_>>().join("; "))
}

pub fn record(record: &Record) -> String {
    let mut text = pairs(&[
        ("id", record.id.to_string()),
        ("tier", format!("{}, {}", record.tier.name(), harmless(&record.role))),
        ("state", format!("{}{}", record.state.name(), if record.pinned { ", pinned" } else { "" })),
        ("from", from(record)),
        ("told", format!("{} UTC", moment(record.recorded_unix_ms))),
        ("happened", format!("{} UTC", moment(record.event_unix_ms))),
        ("present", presence(record)),
    ]);
    let mut more = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&pairs(&[(name, value)]));
        }
    };
    more("run", record.session.as_deref().map(line));
    more("true until", record.valid_to_unix_ms.map(|until| format!("{} UTC", moment(until))));
    more(
        "says",
        record.claim.as_ref().map(|claim| line(&format!("{} - {}", claim.subject, claim.predicate))),
    );
    more("replaces", record.supersedes.map(|id| id.to_string()));
    let evidence: Vec<String> = record.evidence.iter().map(ToString::to_string).collect();
    more("drawn from", (!evidence.is_empty()).then(|| evidence.join(" ")));
    let _ = write!(text, "\n{}\n", harmless(&record.text));
    text
}

fn from(record: &Record) -> String {
    let reference = record.source.reference.as_deref().map(|text| format!(" ({})", line(text)));
    format!(
        "{}{}, believed {} of 100",
        line(&record.source.kind),
        reference.unwrap_or_default(),
        record.trust
    )
}

fn presence(record: &Record) -> String {
    let fades = match record.half_life_days {
        Some(days) => format!("half of it is gone in {days} days"),
        None => "does not fade".to_owned(),
    };
    format!("{}, recalled {} times, {fades}", hundredths(record.presence), record.uses)
}

/// A memory as it stands among what it was and became.
pub fn history(history: &History) -> String {
    let mut text = String::new();
    if history.chain.len() > 1 {
        let chain = Records { records: history.chain.clone(), before: None };
        let _ = write!(text, "\nwhat it was, and became\n{}", records(&chain));
    }
    if !history.deeds.is_empty() {
        let _ = write!(text, "\nwhat happened to it\n{}", deeds(&history.deeds));
    }
    text
}

pub fn journal(journal: &Journal) -> String {
    let mut text = deeds(&journal.deeds);
    if let Some(before) = journal.before {
        let _ = writeln!(text, "more: --before {before}");
    }
    text
}

fn deeds(deeds: &[Deed]) -> String {
    let rows = deeds.iter().map(|deed| {
        vec![
            moment(deed.at_unix_ms),
            harmless(&deed.deed),
            harmless(&deed.why),
            if deed.number == 0.0 { "-".to_owned() } else { format!("{:.2}", deed.number) },
            deed.tier.name().to_owned(),
            if deed.id.0.is_nil() { "-".to_owned() } else { deed.id.to_string() },
            deed.other.map_or_else(|| "-".to_owned(), |other| other.to_string()),
        ]
    });
    table(&["TIME (UTC)", "WHAT", "WHY", "BY", "TIER", "ID", "OTHER"], rows)
}

pub fn checked(name: &str, checked: &Checked) -> String {
    format!(
        "{name}: whole; {} records ({} forgotten), {} vectors, {} to come, {} postings, {} blocks, {} entries, {} in {} ms\n",
        checked.records,
        checked.forgotten,
        checked.vectors,
        checked.pending,
        checked.postings,
        checked.blocks,
        checked.entries,
        human::bytes(checked.file_bytes),
        checked.elapsed_ms
    )
}

pub fn collections(all: &[Collection]) -> String {
    let rows = all.iter().map(|one| {
        let grants = one.grants.iter().map(|(agent, access)| match access {
            Access::Read => format!("{agent} reads"),
            Access::ReadWrite => format!("{agent} reads and writes"),
        });
        let grants: Vec<String> = grants.collect();
        vec![
            one.name.to_string(),
            one.records.to_string(),
            one.quota.records.to_string(),
            human::bytes(one.bytes),
            human::bytes(one.quota.bytes),
            if grants.is_empty() { "nobody".to_owned() } else { grants.join(", ") },
        ]
    });
    table(&["NAME", "RECORDS", "MOST", "BYTES", "MOST", "WHO"], rows)
}

fn marks(record: &Record) -> String {
    let pinned = record.pinned.then_some("pinned");
    let state = Some(record.state.name()).filter(|state| *state != "live");
    let marks: Vec<&str> = state.into_iter().chain(pinned).collect();
    if marks.is_empty() { "-".to_owned() } else { marks.join(",") }
}

fn hundredths(share: f32) -> String {
    format!("{:.0}%", share * 100.0)
}

fn glimpse(text: &str) -> String {
    let one = line(text);
    let mut short: String = one.chars().take(GLIMPSE_CHARS).collect();
    if short.len() < one.len() {
        short.push('…');
    }
    short
}

fn line(text: &str) -> String {
    harmless(text).replace(['\n', '\t'], " ")
}
