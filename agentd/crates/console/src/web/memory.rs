//! What does a person see of an agent's memory, and what may they do with it?
//!
//! Pages: what it holds by tier; what a question finds, with why each hit was found; one memory with where it came from
//! and what became of it; what was forgotten, when and why.
//! Always: a text is shown as text. A question is sent in a body and stands in no address. Deleting for good asks once
//!         more.

use super::layout::{Section, bar, fact, page, pill};
use super::{Done, Page, Shown, confirmed, units};
use crate::answer::{Failure, LONG, within};
use crate::api::{Machine, key};
use crate::appliance::Appliance;
use crate::input::{Fields, Name, Names};
use crate::memory::record as record_id;
use agentd_domain::agent_api::{Explain, Hit, Recalled, Tier};
use agentd_domain::api::{Agent, AgentKey};
use agentd_domain::fault::Report;
use agentd_domain::ids::RecordId;
use agentd_domain::initctl::Health;
use agentd_domain::memory_api::{
    Block, Blocks, Deed, History, Journal, List, Order, Outcome, Record, Records, Search, Standing, Usage,
};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Redirect;
use maud::{Markup, html};
use serde::Deserialize;
use std::time::Duration;

const PAGE_RECORDS: u32 = 50;
const HITS: u32 = 20;
const CHECK: Duration = Duration::from_secs(10 * 60);
/// Of a text in a list; its own page has all of it.
const GLIMPSE_CHARS: usize = 280;

const TIERS: [(Tier, &str); 3] = [
    (Tier::Spirit, "long memory"),
    (Tier::Working, "log of its runs"),
    (Tier::Active, "always in the prompt"),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Browsing {
    #[serde(default)]
    tier: Option<Tier>,
    #[serde(default)]
    state: Option<Standing>,
    #[serde(default)]
    before: Option<RecordId>,
}

pub async fn browse(
    State(appliance): Machine,
    Name(name): Name,
    asked: Result<Query<Browsing>, QueryRejection>,
) -> Shown {
    let Query(asked) = asked.map_err(malformed)?;
    let agent = agent_of(&*appliance, &name).await?;
    let tier = asked.tier.unwrap_or(Tier::Spirit);
    let usage = usage_of(&*appliance, &agent).await?;
    let inner = match tier {
        Tier::Active => match order(&*appliance, &agent, Order::Blocks).await? {
            Outcome::Blocks(Blocks { blocks }) => block_list(&blocks),
            _ => return Err(strange().into()),
        },
        _ => {
            let list = List {
                tier: Some(tier),
                state: asked.state,
                before: asked.before,
                limit: Some(PAGE_RECORDS),
            };
            match order(&*appliance, &agent, Order::List(list)).await? {
                Outcome::Records(records) => record_list(&agent, tier, asked.state, &records),
                _ => return Err(strange().into()),
            }
        }
    };
    Ok(frame(&agent, &usage, tier, "", &inner, appliance.health()))
}

#[derive(Deserialize)]
pub struct Asking {
    query: String,
    #[serde(default)]
    tier: Option<Tier>,
    /// A date, or empty for now.
    #[serde(default)]
    as_of: String,
}

pub async fn search(
    State(appliance): Machine,
    Name(name): Name,
    asked: Result<Fields<Asking>, Failure>,
) -> Shown {
    let Fields(asked) = asked?;
    let agent = agent_of(&*appliance, &name).await?;
    let usage = usage_of(&*appliance, &agent).await?;
    let search = Search {
        query: asked.query.clone(),
        k: Some(HITS),
        tiers: asked.tier.into_iter().collect(),
        signals: None,
        as_of_unix_ms: end_of_day(&asked.as_of)?,
    };
    let found = match order(&*appliance, &agent, Order::Search(search)).await? {
        Outcome::Recalled(found) => found,
        _ => return Err(strange().into()),
    };
    let tier = asked.tier.unwrap_or(Tier::Spirit);
    Ok(frame(&agent, &usage, tier, &asked.query, &hits(&agent, &found), appliance.health()))
}

pub async fn show(State(appliance): Machine, Names([name, id]): Names<2>) -> Shown {
    let agent = agent_of(&*appliance, &name).await?;
    let id = record_id(&id)?;
    let history = match order(&*appliance, &agent, Order::History(id)).await? {
        Outcome::History(history) => history,
        _ => return Err(strange().into()),
    };
    Ok(one(&agent, id, &history, appliance.health()))
}

#[derive(Deserialize)]
pub struct Changing {
    #[serde(default)]
    text: String,
}

/// Where a form of a memory's page leads.
pub async fn change(
    State(appliance): Machine,
    Names([name, id, deed]): Names<3>,
    form: Result<Fields<Changing>, Failure>,
) -> Done {
    let agent = agent_of(&*appliance, &name).await?;
    let id = record_id(&id)?;
    let wanted = match deed.as_str() {
        // A form ends the lines of a text with CR LF.
        "correct" => Order::Correct(id, form?.0.text.replace("\r\n", "\n")),
        "pin" => Order::Pin(id, true),
        "unpin" => Order::Pin(id, false),
        "forget" => Order::Forget(id),
        "restore" => Order::Restore(id),
        "purge" => Order::Purge(id),
        _ => return Err(crate::api::not_found().await.into()),
    };
    let shown = match order(&*appliance, &agent, wanted).await? {
        Outcome::Remembered(new) => new.id,
        _ => id,
    };
    Ok(Redirect::to(&format!("/agents/{}/memory/records/{shown}", agent.name)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    #[serde(default)]
    before: Option<u64>,
}

pub async fn journal(
    State(appliance): Machine,
    Name(name): Name,
    asked: Result<Query<Past>, QueryRejection>,
) -> Shown {
    let Query(Past { before }) = asked.map_err(malformed)?;
    let agent = agent_of(&*appliance, &name).await?;
    let journal = match order(&*appliance, &agent, Order::Journal { before, limit: Some(100) }).await? {
        Outcome::Journal(journal) => journal,
        _ => return Err(strange().into()),
    };
    Ok(past(&agent, &journal, appliance.health()))
}

pub async fn check(State(appliance): Machine, Name(name): Name) -> Shown {
    let agent = agent_of(&*appliance, &name).await?;
    let checked = within(CHECK, appliance.memory(AgentKey::Id(agent.agent_id), Order::Check)).await?;
    let Outcome::Checked(found) = checked else { return Err(strange().into()) };
    Ok(page(
        "Memory checked",
        Section::Agents,
        appliance.health(),
        &html! {
            h1 { "The memory of " (agent.name) " is whole" }
            section.card {
                dl.facts {
                    (fact("Memories", html! { (found.records) ", " (found.forgotten) " of them forgotten" }))
                    (fact("Vectors", html! { (found.vectors) ", " (found.pending) " to come" }))
                    (fact("Words", html! { (found.postings) " entries of the index" }))
                    (fact("Blocks", html! { (found.blocks) }))
                    (fact("Journal", html! { (found.entries) " entries" }))
                    (fact("File", html! { (units::bytes(found.file_bytes)) ", read in " (units::span_ms(found.elapsed_ms)) }))
                }
            }
            p { a href={ "/agents/" (agent.name) "/memory" } { "Back to the memory" } }
        },
    ))
}

async fn agent_of(appliance: &dyn Appliance, name: &str) -> Result<Agent, Failure> {
    within(LONG, appliance.agent(key(name)?)).await
}

async fn order(appliance: &dyn Appliance, agent: &Agent, order: Order) -> Result<Outcome, Failure> {
    within(LONG, appliance.memory(AgentKey::Id(agent.agent_id), order)).await
}

async fn usage_of(appliance: &dyn Appliance, agent: &Agent) -> Result<Usage, Page> {
    match order(appliance, agent, Order::Usage).await? {
        Outcome::Usage(usage) => Ok(usage),
        _ => Err(strange().into()),
    }
}

fn frame(agent: &Agent, usage: &Usage, tier: Tier, query: &str, inner: &Markup, health: Health) -> Markup {
    let base = format!("/agents/{}/memory", agent.name);
    page(
        &format!("Memory of {}", agent.name),
        Section::Agents,
        health,
        &html! {
            div.title {
                div {
                    h1 { "Memory of " a href={ "/agents/" (agent.name) } { (agent.name) } }
                    p.dim { "Nobody else sees it. Each look at it is in the audit log, without its words." }
                }
                div.actions {
                    a href={ (base) "/journal" } { "What was forgotten, and why" }
                    form method="post" action={ (base) "/check" } { button type="submit" { "Check" } }
                }
            }
            (held(usage))
            form.filter method="post" action=(base) {
                label for="query" { "Search" }
                input #query type="search" name="query" value=(query) required maxlength="8000";
                input type="hidden" name="tier" value=(if tier == Tier::Active { "spirit" } else { tier.name() });
                label for="as_of" { "as of" }
                input #as_of type="date" name="as_of";
                button type="submit" { "Find" }
            }
            nav.actions aria-label="Tiers" {
                @for (one, name) in TIERS {
                    a href={ (base) "?tier=" (one.name()) } aria-current=[(one == tier && query.is_empty()).then_some("page")] { (name) }
                }
                a href={ (base) "?state=forgotten" } { "forgotten" }
            }
            (inner)
        },
    )
}

fn held(usage: &Usage) -> Markup {
    html! {
        section.card #usage {
            h2 { "Use and limits" }
            @if usage.tiers.is_empty() { p.dim { "It has remembered nothing yet." } }
            @for tier in &usage.tiers {
                div.gauge {
                    div {
                        span { (tier.tier.name()) " " span.dim { (tier.records) @if let Some(most) = tier.records_most { " of " (most) } } }
                        span.numbers { (units::bytes(tier.bytes)) " of " (units::bytes(tier.bytes_most)) }
                    }
                    (bar(tier.bytes, tier.bytes_most))
                }
            }
            @if usage.pending > 0 { p.note { (usage.pending) " are found by words only until the embedding model has read them." } }
            @if let Some(by) = usage.rewrite_by_unix_ms {
                p.note { "Something was deleted for good. By " (units::moment(by)) " (UTC) the file is written anew and its old key destroyed." }
            }
        }
    }
}

fn record_list(agent: &Agent, tier: Tier, state: Option<Standing>, records: &Records) -> Markup {
    let base = format!("/agents/{}/memory", agent.name);
    html! {
        @if records.records.is_empty() { p.dim { "Nothing here." } }
        @else {
            div.scroll { table #memories {
                thead { tr { th { "Memory" } th { "Kind" } th { "Told (UTC)" } th { "From" } th { "Present" } } }
                tbody { @for record in &records.records { (row(&base, record)) } }
            } }
        }
        @if let Some(before) = records.before {
            nav.actions aria-label="More" {
                a href={ (base) "?tier=" (tier.name()) @if let Some(state) = state { "&state=" (state.name()) } "&before=" (before) } { "Earlier" }
            }
        }
    }
}

fn row(base: &str, record: &Record) -> Markup {
    html! {
        tr {
            td { a href={ (base) "/records/" (record.id) } { (glimpse(&record.text)) } }
            td { (record.role) " " (marks(record)) }
            td.short { time { (units::moment(record.recorded_unix_ms)) } }
            td { (from(record)) }
            td.short { (hundredths(record.presence)) }
        }
    }
}

fn marks(record: &Record) -> Markup {
    html! {
        @match record.state {
            Standing::Live => {},
            Standing::Superseded => { (pill("quiet", "superseded")) },
            Standing::Forgotten => { (pill("warn", "forgotten")) },
        }
        @if record.pinned { " " (pill("calm", "pinned")) }
    }
}

fn from(record: &Record) -> Markup {
    html! {
        (record.source.kind)
        @if let Some(reference) = &record.source.reference { div.dim { (reference) } }
    }
}

fn block_list(blocks: &[Block]) -> Markup {
    html! {
        @if blocks.is_empty() { p.dim { "Nothing is always in its prompt." } }
        @for block in blocks {
            section.card {
                div.split {
                    h2 { (block.key) @if block.pinned { " " (pill("calm", "pinned")) } }
                    span.dim { "version " (block.version) ", " (units::moment(block.changed_unix_ms)) " UTC" }
                }
                pre.text { (block.text) }
            }
        }
    }
}

fn hits(agent: &Agent, found: &Recalled) -> Markup {
    let base = format!("/agents/{}/memory", agent.name);
    html! {
        @if found.words_only { p.note { "The embedding model is away: found by words alone." } }
        @if found.hits.is_empty() { p.dim { "Nothing was found." } }
        @for hit in &found.hits {
            section.card.hit {
                div.split {
                    a href={ (base) "/records/" (hit.id) } { (glimpse(&hit.text)) }
                    span.numbers { "score " (format!("{:.3}", hit.score)) }
                }
                p.dim { (hit.tier.name()) ", " (hit.role) ", told " (units::moment(hit.recorded_unix_ms)) " UTC by " (hit.source.kind) @if let Some(reference) = &hit.source.reference { " (" (reference) ")" } }
                (why(hit))
            }
        }
    }
}

/// Each signal with what it brought, by its own name: whatever the ranking knows is shown.
fn why(hit: &Hit) -> Markup {
    let signals = hit.explain.as_ref().map(signals).unwrap_or_default();
    html! {
        @if !signals.is_empty() {
            dl.facts.why { @for (name, value) in signals { (fact(&name, html! { (value) })) } }
        }
    }
}

fn signals(explain: &Explain) -> Vec<(String, String)> {
    let Ok(serde_json::Value::Object(all)) = serde_json::to_value(explain) else { return Vec::new() };
    let shown = |value: serde_json::Value| match value {
        serde_json::Value::Null => None,
        serde_json::Value::Number(number) => Some(format!("{:.3}", number.as_f64().unwrap_or_default())),
        serde_json::Value::String(text) => Some(text),
        serde_json::Value::Array(all) if all.is_empty() => None,
        serde_json::Value::Array(all) => {
            // A signal with its share of the score, if it had one.
            let each = |one: &serde_json::Value| match (one["signal"].as_str(), one["share"].as_f64()) {
                (Some(signal), Some(share)) => (share != 0.0).then(|| format!("{signal} {share:+.2}")),
                _ => Some(one.as_str().map_or_else(|| one.to_string(), str::to_owned)),
            };
            Some(all.iter().filter_map(each).collect::<Vec<_>>().join(", "))
        }
        other => Some(other.to_string()),
    };
    all.into_iter().filter_map(|(name, value)| Some((name.replace('_', " "), shown(value)?))).collect()
}

fn one(agent: &Agent, id: RecordId, history: &History, health: Health) -> Markup {
    let base = format!("/agents/{}/memory", agent.name);
    let record = history.chain.iter().find(|record| record.id == id);
    page(
        "A memory",
        Section::Agents,
        health,
        &html! {
            div.title {
                h1 { "A memory of " a href=(base) { (agent.name) } }
                @if let Some(record) = record { div.actions { (controls(&base, record)) } }
            }
            @match record {
                Some(record) => (details(&base, record)),
                None => section.card { p { "It was deleted for good. What is left is that it was." } },
            }
            @if history.chain.len() > 1 {
                section.card {
                    h2 { "What it was, and became" }
                    ul.rows { @for other in &history.chain {
                        li {
                            time.dim { (units::moment(other.valid_from_unix_ms)) } " "
                            @if other.id == id { strong { (glimpse(&other.text)) } }
                            @else { a href={ (base) "/records/" (other.id) } { (glimpse(&other.text)) } }
                            " " (marks(other))
                        }
                    } }
                }
            }
            section.card {
                h2 { "What happened to it " span.dim { "times in UTC" } }
                @if history.deeds.is_empty() { p.dim { "Nothing since it was told." } }
                @else { (deeds(&base, &history.deeds)) }
            }
        },
    )
}

fn details(base: &str, record: &Record) -> Markup {
    html! {
        section.card {
            pre.text { (record.text) }
            p { (marks(record)) }
            dl.facts {
                (fact("Kind", html! { (record.role) " in the tier " (record.tier.name()) }))
                (fact("From", html! { (record.source.kind) @if let Some(reference) = &record.source.reference { ", " (reference) } ", believed " (record.trust) " of 100" }))
                (fact("Happened", html! { (units::moment(record.event_unix_ms)) " UTC" }))
                (fact("Told", html! { (units::moment(record.recorded_unix_ms)) " UTC" @if let Some(session) = &record.session { ", in run " code { (session) } } }))
                (fact("True", html! { "from " (units::moment(record.valid_from_unix_ms)) @if let Some(until) = record.valid_to_unix_ms { " to " (units::moment(until)) } " UTC" }))
                (fact("Present", html! { (hundredths(record.presence)) ", recalled " (record.uses) " times, " @match record.half_life_days { Some(days) => { "half of it is gone in " (days) " days" }, None => "does not fade" } }))
                @if let Some(claim) = &record.claim { (fact("Says", html! { (claim.subject) " – " (claim.predicate) })) }
                @if let Some(before) = record.supersedes { (fact("In place of", html! { a href={ (base) "/records/" (before) } { code { (before) } } })) }
                @if !record.evidence.is_empty() {
                    (fact("Drawn from", html! { @for id in &record.evidence { a href={ (base) "/records/" (id) } { code { (id) } } " " } }))
                }
                (fact("Id", html! { code { (record.id) } }))
            }
        }
        @if record.state == Standing::Live {
            section.card {
                h2 { "Correct it" }
                form.stack method="post" action={ (base) "/records/" (record.id) "/correct" } {
                    textarea name="text" rows="4" required aria-label="What is right" { (record.text) }
                    p.hint { "Your word is believed most and does not fade. What stood here before is kept for questions about then." }
                    button.primary type="submit" { "Correct" }
                }
            }
        }
    }
}

fn controls(base: &str, record: &Record) -> Markup {
    let at = format!("{base}/records/{}", record.id);
    let (pin, word) = if record.pinned { ("unpin", "Unpin") } else { ("pin", "Pin") };
    html! {
        @match record.state {
            Standing::Forgotten => form method="post" action={ (at) "/restore" } { button type="submit" { "Restore" } },
            Standing::Live | Standing::Superseded => {
                form method="post" action={ (at) "/" (pin) } { button type="submit" { (word) } }
                form method="post" action={ (at) "/forget" } { button type="submit" { "Forget" } }
            }
        }
        (confirmed(&format!("{at}/purge"), "Delete for good", "Delete this memory for good? Nothing can bring it back; within a day not even the disk."))
    }
}

fn past(agent: &Agent, journal: &Journal, health: Health) -> Markup {
    let base = format!("/agents/{}/memory", agent.name);
    page(
        "What was forgotten",
        Section::Agents,
        health,
        &html! {
            h1 { "What became of memories of " a href=(base) { (agent.name) } }
            p.dim { "What was forgotten, replaced, kept of a run or deleted, when and why. No words are kept of what was deleted." }
            @if journal.deeds.is_empty() { p.dim { "Nothing yet." } }
            @else { (deeds(&base, &journal.deeds)) }
            @if let Some(before) = journal.before {
                nav.actions aria-label="More" { a href={ (base) "/journal?before=" (before) } { "Earlier" } }
            }
        },
    )
}

fn deeds(base: &str, deeds: &[Deed]) -> Markup {
    html! {
        div.scroll { table {
            thead { tr { th { "Time (UTC)" } th { "What" } th { "Why" } th { "Tier" } th { "Memory" } } }
            tbody { @for deed in deeds {
                tr {
                    td.short { time { (units::moment(deed.at_unix_ms)) } }
                    td { (deed.deed) }
                    td { (reason(&deed.why)) @if deed.number != 0.0 { " (" (format!("{:.2}", deed.number)) ")" } }
                    td { (deed.tier.name()) }
                    td {
                        @if !deed.id.0.is_nil() { a href={ (base) "/records/" (deed.id) } { code { (deed.id) } } }
                        @if let Some(other) = deed.other { " → " a href={ (base) "/records/" (other) } { code { (other) } } }
                    }
                }
            } }
        } }
    }
}

/// The journal's words as a person says them.
fn reason(why: &str) -> &str {
    match why {
        "asked" => "somebody asked for it",
        "budget" => "its tier was full, and it was least present",
        "room" => "the room of its tombstone was needed",
        "time_over" => "seven days after it was forgotten",
        "run_over" => "a day after its run ended",
        "later_claim" => "something later was said of the same",
        "corrected" => "it was corrected",
        "source_rolled_back" => "everything of its source was taken back",
        "evidence_gone" => "what it rested on is gone",
        "duplicate" => "it was known already",
        "salient" => "it was worth keeping",
        other => other,
    }
}

fn glimpse(text: &str) -> String {
    let mut short: String = text.chars().take(GLIMPSE_CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn hundredths(share: f32) -> String {
    format!("{:.0} %", share * 100.0)
}

/// The last moment of a day of UTC, as a browser's field of a date sends it.
fn end_of_day(date: &str) -> Result<Option<i64>, Report> {
    if date.is_empty() {
        return Ok(None);
    }
    let day: jiff::civil::Date = date.parse().map_err(|error: jiff::Error| {
        let fix = "write a date such as 2026-11-22, or leave it empty";
        Report::caller("date_malformed", "nothing was searched", error.to_string(), fix)
    })?;
    let end = day.at(23, 59, 59, 999_000_000).to_zoned(jiff::tz::TimeZone::UTC);
    Ok(end.ok().map(|end| end.timestamp().as_millisecond()))
}

fn malformed(error: QueryRejection) -> Report {
    let fix = "follow the links of the page";
    Report::caller("query_malformed", "nothing was shown", error.body_text(), fix)
}

fn strange() -> Report {
    Report::bug("answer_strange", "nothing was shown", "the memory answered something else", "try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_ends_before_the_next() {
        assert_eq!(end_of_day("1970-01-01").expect("a date"), Some(86_399_999));
        assert_eq!(end_of_day("").expect("none"), None);
        assert!(end_of_day("1970-02-30").is_err() && end_of_day("soon").is_err());
    }

    #[test]
    fn every_signal_is_shown_by_its_name() {
        let explain: Explain = serde_json::from_value(serde_json::json!({
            "words": 0.5, "meaning": 0.25, "matched": ["ship", "sea"], "why": ["Ana says it"],
            "signals": [
                { "signal": "speaker", "value": 1.0, "weight": 1.13, "share": 1.13 },
                { "signal": "time", "value": 0.0, "weight": 2.48, "share": 0.0 },
            ],
        }))
        .expect("an explanation");
        let shown = signals(&explain);
        for one in [
            ("words", "0.500"),
            ("meaning", "0.250"),
            ("matched", "ship, sea"),
            ("why", "Ana says it"),
            ("signals", "speaker +1.13"),
        ] {
            assert!(shown.contains(&(one.0.to_owned(), one.1.to_owned())), "{shown:?}");
        }
    }
}
