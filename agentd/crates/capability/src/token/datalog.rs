//! Which Datalog says what a grant or a narrowing means?
//!
//! A request is one fact `asks(kind, what, amount)`. Each check is about that fact and lets other kinds pass.

use super::{Grant, Later, keypair, not_made};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::rights::Request;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use biscuit_auth::builder::{Term, date, fact, int, string};
use biscuit_auth::datalog::SymbolTable;
use biscuit_auth::{
    Algorithm, AuthorizerBuilder, Biscuit, BiscuitBuilder, BlockBuilder, KeyPair, PrivateKey, error,
};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const API: &str = "api";
const READ: &str = "read";
const CALLS: &str = "calls";
const LIMIT: &str = "limit";
const NET: &str = "net";

/// The first fact of each block: its meaning as JSON in base64url (RFC 4648, 5), which needs no escapes.
const MEANS: &str = "means";

/// The block that the appliance signs.
pub fn authority(grant: &Grant) -> Result<BiscuitBuilder, Report> {
    let build = || -> Result<BiscuitBuilder, error::Token> {
        let mut builder = BiscuitBuilder::new()
            .fact(fact(MEANS, &[string(&encoded(grant))]))?
            .fact(fact("holder", &[string(&grant.holder.to_string())]))?;
        let rights = &grant.rights;
        for (kind, names) in
            [(API, &rights.api), (READ, &rights.read), (CALLS, &rights.calls), (NET, &rights.net)]
        {
            for name in names {
                builder = builder.fact(fact("right", &[string(kind), string(name)]))?;
            }
        }
        for (limit, value) in &rights.limits {
            builder = builder.fact(fact("limit", &[string(limit.name()), int(number(*value))]))?;
        }
        builder =
            builder.code("check if caller($agent), holder($agent) or holder($agent), handed_on($agent)")?;
        match grant.expires_unix_s {
            Some(end) => builder.code_with_params(BEFORE, HashMap::from([end_param(end)]), HashMap::new()),
            None => Ok(builder),
        }
    };
    build().map_err(not_made)
}

const BEFORE: &str = "check if time($now), $now < {end}";

/// A block that takes away, and may name another holder.
pub fn later(block: &Later) -> Result<BlockBuilder, Report> {
    let by = &block.by;
    let build = || -> Result<BlockBuilder, error::Token> {
        let mut builder = BlockBuilder::new().fact(fact(MEANS, &[string(&encoded(block))]))?;
        if let Some(to) = block.to {
            let params = HashMap::from([("to".to_owned(), string(&to.to_string()))]);
            let check = "check if caller({to}) or handed_on({to})";
            builder = builder.code_with_params(check, params, HashMap::new())?;
        }
        for (kind, names) in [(API, &by.api), (CALLS, &by.calls), (READ, &by.read), (NET, &by.net)] {
            if let Some(names) = names {
                builder = only(builder, kind, names)?;
            }
        }
        for (limit, value) in &by.limits {
            let check = "check if asks($kind, $what, $amount), $kind != {kind} || $what != {limit} || $amount <= {most}";
            let params =
                [("kind", string(LIMIT)), ("limit", string(limit.name())), ("most", int(number(*value)))];
            let params = params.map(|(name, term)| (name.to_owned(), term)).into();
            builder = builder.code_with_params(check, params, HashMap::new())?;
        }
        match by.expires_unix_s {
            Some(end) => builder.code_with_params(BEFORE, HashMap::from([end_param(end)]), HashMap::new()),
            None => Ok(builder),
        }
    };
    build().map_err(not_made)
}

/// The request, and when it is allowed at all. Of the holders the last may use the token; that the others have handed
/// it on is a fact that only who asks can state, so no block can.
pub fn question(
    mut builder: AuthorizerBuilder,
    holders: &[AgentId],
    caller: AgentId,
    now_unix_s: i64,
    request: &Request,
) -> Result<AuthorizerBuilder, error::Token> {
    let (kind, what, amount) = match request {
        Request::Api(right) => (API, right.as_str(), 0),
        Request::Read(path) => (READ, path.as_str(), 0),
        Request::Calls(group) => (CALLS, group.as_str(), 0),
        Request::Net(rule) => (NET, rule.as_str(), 0),
        Request::Limit(limit, value) => (LIMIT, limit.name(), number(*value)),
    };
    if let Some((last, earlier)) = holders.split_last() {
        let params = HashMap::from([("last".to_owned(), string(&last.to_string()))]);
        builder = builder.code_with_params("check if caller({last})", params, HashMap::new())?;
        for holder in earlier {
            builder = builder.fact(fact("handed_on", &[string(&holder.to_string())]))?;
        }
    }
    builder
        .fact(fact("caller", &[string(&caller.to_string())]))?
        .fact(fact("time", &[date(&time(now_unix_s))]))?
        .fact(fact("asks", &[string(kind), string(what), int(amount)]))?
        .code(
            "allow if asks(\"limit\", $what, $amount), limit($what, $most), $amount <= $most;
             allow if asks(\"read\", $what, $amount), right(\"read\", $folder),
                 $what == $folder || $what.starts_with($folder + \"/\");
             allow if asks($kind, $what, $amount), right($kind, $what), $kind != \"read\";
             deny if true;",
        )
}

/// The meaning that a printed block begins with.
pub fn said(printed: &str) -> Option<Vec<u8>> {
    let (text, _) = printed.strip_prefix(MEANS)?.strip_prefix("(\"")?.split_once('"')?;
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// A block as Biscuit prints it: the later one if there is one. The keys matter to nobody.
pub fn printed(authority: BiscuitBuilder, later: Option<BlockBuilder>) -> Result<String, Report> {
    let key = keypair(&[1; 32])?;
    let printed = match later {
        None => authority
            .build_with_key_pair(&key, SymbolTable::default(), &key)
            .and_then(|token| token.print_block_source(0)),
        Some(later) => match &*EMPTY {
            Ok(empty) => empty.append_with_keypair(&key, later).and_then(|token| token.print_block_source(1)),
            Err(error) => Err(error.clone()),
        },
    };
    printed.map_err(not_made)
}

/// A token without content, to print later blocks behind it.
static EMPTY: LazyLock<Result<Biscuit, error::Token>> = LazyLock::new(|| {
    let key = PrivateKey::from_bytes(&[1; 32], Algorithm::Ed25519)?;
    let key = KeyPair::from(&key);
    BiscuitBuilder::new().build_with_key_pair(&key, SymbolTable::default(), &key)
});

/// Of this kind only these; of folders also what lies below. An alternative for each, and not one set: the order in
/// a set depends on the blocks before it.
fn only(builder: BlockBuilder, kind: &str, names: &BTreeSet<String>) -> Result<BlockBuilder, error::Token> {
    let mut check = "check if asks($kind, $what, $amount), $kind != {kind}".to_owned();
    let mut params = HashMap::from([("kind".to_owned(), string(kind))]);
    for (index, name) in names.iter().enumerate() {
        check.push_str(&format!(" || $what == {{n{index}}}"));
        params.insert(format!("n{index}"), string(name));
        if kind == READ {
            check.push_str(&format!(" || $what.starts_with({{b{index}}})"));
            params.insert(format!("b{index}"), string(&format!("{name}/")));
        }
    }
    builder.code_with_params(check, params, HashMap::new())
}

fn encoded(meaning: &impl Serialize) -> String {
    // A value of maps, lists, texts and numbers always has a JSON text; were it empty, no reader would take the block.
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(meaning).unwrap_or_default())
}

fn end_param(end: i64) -> (String, Term) {
    ("end".to_owned(), date(&time(end)))
}

/// Before 1970 is 1970: dates in Biscuit are unsigned.
fn time(unix_s: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_s).unwrap_or(0))
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
