//! Reading, keeping and checking the audit log.
//!
//! Always: what is checked is checked here, not by the appliance. The key that the log must be signed with is taken
//!         from the appliance once, over the pinned connection, and kept beside the pin with the newest head that was
//!         verified: a log that was cut back since is noticed too.

use super::{Failed, Outcome, Session};
use crate::cli;
use crate::client::{self, Client};
use crate::config::{self, Config};
use crate::show;
use agentd_audit::{Demands, FirstBad, Seen, Summary, verify};
use agentd_domain::audit::{Linked, PublicKey, SignedHead};
use agentd_domain::fault::Report;
use http_body_util::BodyExt;
use hyper::Method;
use serde::Serialize;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

/// The log has 16 MiB; more is no export.
const FILE_MOST_BYTES: u64 = 256 * 1024 * 1024;
/// The front of the log may be dropped while it is read.
const ATTEMPTS: usize = 3;

pub async fn run(session: &Session, command: cli::Audit) -> Outcome {
    match command {
        cli::Audit::Ls { agent, limit } => {
            let agent = agent.map(|agent| format!("&agent={agent}")).unwrap_or_default();
            let page = page(&session.client()?, &format!("limit={limit}{agent}")).await?;
            show::out(&if session.json { text(&page) } else { show::audit(&records(&page)) });
        }
        cli::Audit::Export { file } => {
            let export = fetch(&session.client()?).await?;
            fs::write(&file, &export).map_err(|error| unusable(&file, &error))?;
            let count = records(&export).len();
            show::out(&format!("{count} records are in {}\n", file.display()));
        }
        cli::Audit::Verify { file: Some(file), key } => from_file(session, &file, key)?,
        cli::Audit::Verify { file: None, key } => from_appliance(session, key).await?,
    }
    Ok(())
}

/// Where the key came from that the log was checked with.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyFrom {
    /// Named on the command line.
    Given,
    /// Kept since the appliance's log was first verified.
    Kept,
    /// The appliance's, now.
    Appliance,
    /// The file's own: that shows damage and no forgery.
    File,
}

#[derive(Serialize)]
pub struct Verified {
    #[serde(flatten)]
    pub summary: Summary,
    pub key_from: KeyFrom,
}

async fn from_appliance(session: &Session, given: Option<PublicKey>) -> Outcome {
    let client = session.client()?;
    let mut config = config::read()?;
    let host = client.host.to_string();
    let seen = config.appliances.get(&host).and_then(|known| known.audit.clone());
    let (key, key_from) = match (given, &seen) {
        (Some(key), _) => (key, KeyFrom::Given),
        (None, Some(seen)) => (seen.key, KeyFrom::Kept),
        (None, None) => (head(&client).await?.head.key, KeyFrom::Appliance),
    };
    let export = fetch(&client).await?;
    // A key that is named is what the owner has decided to believe from now on.
    let seen = seen.filter(|seen| seen.key == key);
    let summary = judged(session, verify(&export, &Demands { key: Some(key), seen: seen.as_ref() }))?;
    if let Some(known) = config.appliances.get_mut(&host) {
        known.audit = Some(Seen { key, seq: summary.signed_seq, hash: summary.signed_hash });
        config::write(&config)?;
    }
    session.show(&Verified { summary, key_from }, show::verified);
    Ok(())
}

fn from_file(session: &Session, file: &Path, given: Option<PublicKey>) -> Outcome {
    let export = read(file)?;
    let config = config::read()?;
    let seen = seen_of(session, &config);
    let key = given.or(seen.map(|seen| seen.key));
    let key_from = match (given, seen) {
        (Some(_), _) => KeyFrom::Given,
        (None, Some(_)) => KeyFrom::Kept,
        (None, None) => KeyFrom::File,
    };
    let judge = |seen| judged(session, verify(&export, &Demands { key, seen }));
    let mut summary = judge(None)?;
    // A file may be older than what was seen; one that is newer must hold it.
    if let Some(seen) = seen.filter(|seen| Some(seen.key) == key && seen.seq <= summary.last_seq) {
        summary = judge(Some(seen))?;
    }
    session.show(&Verified { summary, key_from }, show::verified);
    Ok(())
}

fn seen_of<'c>(session: &Session, config: &'c Config) -> Option<&'c Seen> {
    config.known(&session.host(config))?.audit.as_ref()
}

/// With `--json` the first bad record is told on standard output too, in fields.
fn judged(session: &Session, judged: Result<Summary, FirstBad>) -> Result<Summary, Failed> {
    judged.map_err(|bad| {
        if session.json {
            show::json(&bad);
        }
        let fix = "keep this export and earlier ones: `agentctl audit export FILE`; believe nothing from that record on";
        let why = format!("line {}: {bad}", bad.line);
        Report::environment("audit_broken", "the audit log is not as it was written", why, fix).into()
    })
}

/// The whole log, up to a head that vouches for all of it.
async fn fetch(client: &Client) -> Result<Vec<u8>, Report> {
    for _ in 0..ATTEMPTS {
        if let Some(export) = fetch_once(client).await? {
            return Ok(export);
        }
    }
    let why = "its oldest records were dropped while it was read";
    Err(Report::environment("audit_moving", "the audit log was not read", why, "try again"))
}

/// `None` when the front was dropped behind us.
async fn fetch_once(client: &Client) -> Result<Option<Vec<u8>>, Report> {
    let upto = head(client).await?.head.seq;
    let (mut export, mut after) = (Vec::new(), 0);
    loop {
        let page = page(client, &format!("after={after}&limit=1000")).await?;
        let (lines, first, last) = whole_records(&page);
        if first.is_some_and(|first| after > 0 && first > after + 1) {
            // Either they were dropped since, or they are missing: then that is for `verify` to say.
            if head(client).await?.head.first_seq > after + 1 {
                return Ok(None);
            }
        }
        export.extend_from_slice(lines);
        // Lines that are no records have no number to go on from: each counts for one.
        let unread = lines.split_inclusive(|&byte| byte == b'\n').count() as u64;
        after = last.unwrap_or(after + unread);
        if lines.is_empty() || after >= upto {
            return Ok(Some(export));
        }
    }
}

/// A page without what comes after its last readable record and its head: that comes again at the beginning of the
/// next one. With the numbers of the first and last record.
fn whole_records(page: &[u8]) -> (&[u8], Option<u64>, Option<u64>) {
    let (mut first, mut last, mut end, mut at) = (None, None, 0, 0);
    for line in page.split_inclusive(|&byte| byte == b'\n') {
        at += line.len();
        if let Ok(linked) = serde_json::from_slice::<Linked>(line) {
            first = first.or(Some(linked.record.seq));
            last = Some(linked.record.seq);
            end = at;
        } else if serde_json::from_slice::<SignedHead>(line).is_ok() {
            end = at;
        }
    }
    if last.is_none() { (page, None, None) } else { (&page[..end], first, last) }
}

async fn head(client: &Client) -> Result<SignedHead, Report> {
    client.get("/api/v1/audit/head").await
}

pub(super) async fn page(client: &Client, query: &str) -> Result<Vec<u8>, Report> {
    let answer = client.send(Method::GET, &format!("/api/v1/audit?{query}"), None, client::empty()).await?;
    let body = answer.into_body().collect().await;
    Ok(body.map_err(|error| client::connection_lost(&error.to_string()))?.to_bytes().to_vec())
}

pub(super) fn records(lines: &[u8]) -> Vec<Linked> {
    lines.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

fn text(lines: &[u8]) -> String {
    String::from_utf8_lossy(lines).into_owned()
}

fn read(file: &Path) -> Result<Vec<u8>, Report> {
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).and_then(|open| open.take(FILE_MOST_BYTES).read_to_end(&mut bytes));
    opened.map_err(|error| unusable(file, &error))?;
    Ok(bytes)
}

fn unusable(file: &Path, error: &io::Error) -> Report {
    Report::caller(
        "file_unusable",
        "the audit log was not taken",
        format!("{}: {error}", file.display()),
        "name another file",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_ends_with_a_record_or_its_head() {
        let export: &[u8] = include_bytes!("../../../audit/src/example.jsonl");
        let (lines, first, last) = whole_records(export);
        assert_eq!((lines, first, last), (export, Some(1), Some(1)));
        let spoiled = [export, b"{}\n"].concat();
        assert_eq!(whole_records(&spoiled).0, export);
        assert_eq!(whole_records(b"{}\n"), (&b"{}\n"[..], None, None));
        assert_eq!(whole_records(b""), (&b""[..], None, None));
    }
}
