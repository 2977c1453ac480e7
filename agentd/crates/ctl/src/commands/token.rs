//! Making, reading, narrowing, checking and revoking capability tokens.
//!
//! Always: reading and narrowing need no appliance, and checking needs none when its key is named: whoever has a token
//!         can find out what it is worth, and can hand on less.

use super::{Outcome, Session};
use crate::cli;
use crate::show;
use agentd_capability::token::{self, Circumstances, Fresh, RootPublic};
use agentd_domain::audit::PublicKey;
use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::rights::{Limit, Narrowing, Rights, UNLIMITED};
use agentd_domain::token::{
    Inspected, Key, Mint, Revocation, RevocationId, Revoke, Revoked, Shown, Target, Verified, Verify,
};
use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// More is no token, and is not read.
const FILE_MOST_BYTES: u64 = token::TOKEN_MAX_BYTES as u64 + 2;

pub async fn run(session: &Session, command: cli::Token) -> Outcome {
    match command {
        cli::Token::Key => {
            let key: Key = session.client()?.get("/api/v1/tokens/key").await?;
            session.show(&key, |key| format!("{}\n", key.key));
        }
        cli::Token::Mint { agent, less } => {
            let body = Mint { agent: agent.to_string(), by: narrowing(&less)? };
            let shown: Shown = session.client()?.post("/api/v1/tokens/mint", &body).await?;
            session.show(&shown, |shown| format!("{}\n", shown.token));
        }
        cli::Token::Inspect { token: Some(file), agent: None } => {
            let token = read(&file)?;
            let says = token::inspect(&token)?;
            session.show(&Shown { token, says }, |shown| described(&shown.says));
        }
        cli::Token::Inspect { agent: Some(agent), .. } => {
            let shown: Shown = session.client()?.get(&format!("/api/v1/agents/{agent}/token")).await?;
            session.show(&shown, |shown| described(&shown.says));
        }
        cli::Token::Inspect { .. } => return Err(nothing_named("read").into()),
        cli::Token::Attenuate { token: file, less } => {
            let token = token::attenuate(&read(&file)?, &narrowing(&less)?, &fresh()?)?;
            let says = token::inspect(&token)?;
            session.show(&Shown { token, says }, |shown| format!("{}\n", shown.token));
        }
        cli::Token::Verify { token: file, key: Some(key), agent } => {
            let verified = verified_here(&read(&file)?, &key, agent.as_deref())?;
            session.show(&verified, holds);
        }
        cli::Token::Verify { token: file, key: None, agent } => {
            let body = Verify { token: read(&file)?, agent };
            let verified: Verified = session.client()?.post("/api/v1/tokens/verify", &body).await?;
            session.show(&verified, holds);
        }
        cli::Token::Revoke { agent, token, id, why } => {
            let target = match (agent, token, id) {
                (Some(agent), None, None) => Target::Agent(agent.to_string()),
                (None, Some(file), None) => Target::Token(read(&file)?),
                (None, None, Some(id)) => Target::Id(RevocationId(id)),
                _ => return Err(nothing_named("revoked").into()),
            };
            let body = Revoke { target, why: why.unwrap_or_default() };
            let done: Revocation = session.client()?.post("/api/v1/tokens/revoke", &body).await?;
            session.show(&done, |done| {
                format!("{} is revoked, {} runs are ended\n", done.revoked.id, done.ended.len())
            });
        }
        cli::Token::Revoked => {
            let all: Vec<Revoked> = session.client()?.get("/api/v1/tokens/revoked").await?;
            session.show(all.as_slice(), list);
        }
    }
    Ok(())
}

fn verified_here(text: &str, key: &PublicKey, agent: Option<&str>) -> Result<Verified, Report> {
    let key = RootPublic::from_bytes(&key.0)?;
    let caller = match agent {
        Some(agent) => agent.parse().map_err(|_| {
            let fix =
                "write the agent's id, as `agentctl token inspect` shows it; only an appliance knows names";
            Report::caller("agent_id_needed", "the token was not checked", "`--agent` is not an id", fix)
        })?,
        None => token::genuine(text, key)?.holder,
    };
    // What was revoked only the appliance knows.
    token::verify(text, key, &Circumstances { caller, now_unix_s: now_unix_s(), revoked: &HashSet::new() })
}

fn narrowing(less: &cli::Less) -> Result<Narrowing, Report> {
    let set = |list: &Option<Vec<String>>| -> Option<BTreeSet<String>> {
        let list = list.as_ref()?;
        Some(list.iter().filter(|name| !name.is_empty()).cloned().collect())
    };
    let mut by = Narrowing {
        api: set(&less.api),
        read: set(&less.read),
        calls: set(&less.calls),
        expires_unix_s: less.expires_in.map(|span| now_unix_s().saturating_add(span.0)),
        ..Narrowing::default()
    };
    for text in &less.limits {
        let (limit, value) = limit(text)?;
        by.limits.insert(limit, value);
    }
    // The hard limit alone is a mistake in a token, and clear enough on a command line.
    if let Some(max) = by.limits.get(&Limit::MemoryMax).copied() {
        by.limits.entry(Limit::MemoryHigh).or_insert(max);
    }
    by.check()?;
    Ok(by)
}

/// `pids=16`, `memory.max=64M`.
fn limit(text: &str) -> Result<(Limit, u64), Report> {
    let bad = || {
        let names: Vec<&str> = Limit::ALL.into_iter().map(Limit::name).collect();
        let why = format!("`{}` is no limit with a value", text.escape_debug());
        let fix = format!(
            "write for example `--limit pids=16` or `--limit memory.max=64M`; the names are {}",
            names.join(", ")
        );
        Report::caller("limit_malformed", "no token was made", why, fix)
    };
    let (name, value) = text.split_once('=').ok_or_else(bad)?;
    let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name).ok_or_else(bad)?;
    let (digits, factor) = match value.as_bytes().last() {
        Some(b'K') => (&value[..value.len() - 1], 1 << 10),
        Some(b'M') => (&value[..value.len() - 1], 1 << 20),
        Some(b'G') => (&value[..value.len() - 1], 1 << 30),
        _ => (value, 1),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    Ok((limit, number.checked_mul(factor).ok_or_else(bad)?))
}

fn read(file: &Path) -> Result<String, Report> {
    let unreadable = |why: String| {
        let fix = "name a file that holds the token alone, or `-` for standard input";
        Report::caller("token_unreadable", format!("{} was not read", file.display()), why, fix)
    };
    let mut text = String::new();
    let result = if file == Path::new("-") {
        std::io::stdin().take(FILE_MOST_BYTES).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(FILE_MOST_BYTES).read_to_string(&mut text))
    };
    result.map_err(|error| unreadable(error.to_string()))?;
    Ok(text.trim().to_owned())
}

pub fn described(says: &Inspected) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "holder     {}", says.holder);
    let _ = writeln!(text, "expires    {}", end(says.expires_unix_s));
    text.push_str(&rights(&says.rights));
    let made =
        std::iter::once(format!("granted to {}", says.grant.holder)).chain(says.later.iter().map(|block| {
            match block.to {
                Some(to) => format!("handed on to {to}"),
                None => "narrowed".to_owned(),
            }
        }));
    for (index, (id, made)) in says.revocation_ids.iter().zip(made).enumerate() {
        let _ = writeln!(text, "block {index:<4} {made}, revocation id {id}");
    }
    text
}

fn rights(rights: &Rights) -> String {
    let mut text = String::new();
    let list = |set: &BTreeSet<String>| {
        if set.is_empty() { "nothing".to_owned() } else { set.iter().cloned().collect::<Vec<_>>().join(" ") }
    };
    for (name, set) in [("api", &rights.api), ("read", &rights.read), ("calls", &rights.calls)] {
        let _ = writeln!(text, "{name:<10} {}", list(set));
    }
    for rule in &rights.net {
        let _ = writeln!(text, "net        {rule}");
    }
    for limit in Limit::ALL {
        let value = rights.limit(limit);
        let shown = match limit {
            _ if value >= UNLIMITED => "no limit".to_owned(),
            Limit::MemoryHigh
            | Limit::MemoryMax
            | Limit::DiskBytes
            | Limit::TmpBytes
            | Limit::IoBytes
            | Limit::NetBytes => human::bytes(value),
            _ => value.to_string(),
        };
        let _ = writeln!(text, "limit      {limit} {shown}");
    }
    text
}

fn holds(verified: &Verified) -> String {
    let mut text = "the token holds\n".to_owned();
    let _ = writeln!(text, "holder     {}", verified.holder);
    let _ = writeln!(text, "expires    {}", end(verified.expires_unix_s));
    text + &rights(&verified.rights)
}

fn list(all: &[Revoked]) -> String {
    let lines = all.iter().map(|entry| {
        let short: String = entry.id.0.chars().take(16).collect();
        format!("{}  {short}...  {}  {}\n", show::moment(entry.unix_ms), entry.by, entry.why)
    });
    lines.collect()
}

fn end(unix_s: Option<i64>) -> String {
    unix_s.map_or_else(|| "never".to_owned(), |at| format!("{} UTC", show::moment(at.saturating_mul(1000))))
}

fn fresh() -> Result<Fresh, Report> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| {
        Report::environment("no_randomness", "no token was made", error.to_string(), "try again")
    })?;
    Ok(Fresh(secret))
}

fn now_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn nothing_named(what: &str) -> Report {
    Report::caller(
        "token_not_named",
        format!("nothing was {what}"),
        "no token is named, or more than one",
        "name one: `--agent NAME`, or a file (`agentctl token --help`)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_as_people_write_them() {
        assert_eq!(limit("pids=16"), Ok((Limit::Pids, 16)));
        assert_eq!(limit("memory.max=64M"), Ok((Limit::MemoryMax, 64 << 20)));
        for bad in
            ["pids", "pids=", "pids=-1", "pids=é", "pid=1", "memory.max=M", "memory.max=99999999999999999G"]
        {
            assert_eq!(limit(bad).expect_err(bad).code, "limit_malformed", "{bad}");
        }
    }
}
