//! Which rights does this token carry, for whom, and until when?
//!
//! In:     rights and a key; or the text of a token. Out: the text of a token; or what it says, checked.
//! Always: a right is a fact of the authority block, which only the appliance's key can sign; every later block only
//!         takes away. What is not one of our two kinds of block is refused whole.
//! Never:  a clock or a random number: the caller brings both.
//!
//! A token is a Biscuit (<https://doc.biscuitsec.org/reference/specifications>) under a strict profile. Biscuit's own
//! attenuation is free Datalog: sound for a yes or no, but it cannot be turned into kernel policy. So a block says what
//! it means as JSON in its first fact, and holds besides exactly the Datalog that follows from that. Both ways to
//! decide are the same: [`Verified::rights`] for plans, [`authorize`] for anybody who has the token and Biscuit alone.

mod datalog;

use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::rights::{Narrowing, Request, Rights};
use biscuit_auth::datalog::RunLimits;
use biscuit_auth::{
    Algorithm, AuthorizerBuilder, Biscuit, BiscuitBuilder, KeyPair, PrivateKey, UnverifiedBiscuit, error,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::Duration;

/// Longer texts are refused unread. A token of an agent with every right takes two kilobytes.
pub const TOKEN_MAX_BYTES: usize = 32 * 1024;
/// Blocks of a token, the authority's included: so deep may agents delegate.
pub const BLOCKS_MAX: usize = 16;
/// Biscuit's own limit of 1 ms is wall-clock time, and refuses good tokens on a busy machine
/// (<https://github.com/nervosnetwork/fiber/pull/1563>); facts and iterations bound the work.
const LIMITS: RunLimits =
    RunLimits { max_facts: 10_000, max_iterations: 100, max_time: Duration::from_secs(5) };

/// What the appliance signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Who may use the token: whoever calls over this agent's own socket, and nobody else.
    pub holder: AgentId,
    pub rights: Rights,
    /// From this second since 1970 on nothing is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_unix_s: Option<i64>,
}

/// The appliance's key for tokens (Ed25519, RFC 8032).
pub struct RootKey(KeyPair);

/// What a token of that key is checked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootPublic(biscuit_auth::PublicKey);

/// Thirty-two random bytes, used once: the key of a block, which dies with the next one.
pub struct Fresh(pub [u8; 32]);

impl RootKey {
    pub fn from_secret(secret: &[u8; 32]) -> Result<Self, Report> {
        keypair(secret).map(Self)
    }

    pub fn public(&self) -> RootPublic {
        RootPublic(self.0.public())
    }
}

impl RootPublic {
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, Report> {
        let key = biscuit_auth::PublicKey::from_bytes(bytes, Algorithm::Ed25519);
        key.map(Self).map_err(|error| {
            refused("token_key", error.to_string(), "use the 32 bytes of `agentctl token key`")
        })
    }

    pub fn to_bytes(self) -> Vec<u8> {
        self.0.to_bytes()
    }
}

/// The name of one block of one token: to revoke it ends the token and all that were derived from it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RevocationId(pub String);

/// What a token says, its signatures not yet checked against a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspected {
    pub grant: Grant,
    pub narrowings: Vec<Narrowing>,
    /// What is left at the end.
    pub rights: Rights,
    /// The earliest of all blocks.
    pub expires_unix_s: Option<i64>,
    /// One per block, the authority's first.
    pub revocation_ids: Vec<RevocationId>,
}

/// A token that holds here, now and for this caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub holder: AgentId,
    pub rights: Rights,
    pub expires_unix_s: Option<i64>,
    pub revocation_ids: Vec<RevocationId>,
}

/// Where and when a token is shown.
pub struct Circumstances<'a> {
    /// Whose socket it came over. Nobody else's word counts.
    pub caller: AgentId,
    pub now_unix_s: i64,
    pub revoked: &'a dyn Fn(&RevocationId) -> bool,
}

/// A new token.
pub fn mint(key: &RootKey, grant: &Grant, fresh: &Fresh) -> Result<String, Report> {
    let all = Narrowing { limits: grant.rights.limits.clone(), ..Narrowing::default() };
    all.check()?;
    // Rules that hide each other would allow more with one taken away.
    grant.rights.network().map_err(|why| {
        let fix = "correct the rules; `agentctl plan agent.toml` checks them";
        Report::caller("rights_contradict", "no token was made", why, fix)
    })?;
    let next = keypair(&fresh.0)?;
    let token = datalog::authority(grant)?
        .build_with_key_pair(&key.0, biscuit_auth::datalog::SymbolTable::default(), &next)
        .map_err(not_made)?;
    short_enough(token.to_base64().map_err(not_made)?)
}

/// The same token with less in it. Needs no key: whoever holds a token may hand on a narrower one.
pub fn attenuate(token: &str, by: &Narrowing, fresh: &Fresh) -> Result<String, Report> {
    by.check()?;
    let inspected = inspect(token)?;
    if inspected.revocation_ids.len() >= BLOCKS_MAX {
        return Err(too_deep(inspected.revocation_ids.len() + 1));
    }
    let next = keypair(&fresh.0)?;
    let token = UnverifiedBiscuit::from_base64(token).map_err(|error| unreadable(&error))?;
    let token = token.append_with_keypair(&next, datalog::attenuation(by)?).map_err(not_made)?;
    short_enough(token.to_base64().map_err(not_made)?)
}

/// Reads a token without a key.
pub fn inspect(token: &str) -> Result<Inspected, Report> {
    if token.len() > TOKEN_MAX_BYTES {
        let why = format!("it has {} bytes", token.len());
        return Err(refused("token_too_large", why, "a token is at most 32 KiB of text: send it alone"));
    }
    let token = UnverifiedBiscuit::from_base64(token).map_err(|error| unreadable(&error))?;
    let blocks = token.block_count();
    if blocks > BLOCKS_MAX {
        return Err(too_deep(blocks));
    }
    if token.external_public_keys().iter().any(Option::is_some) {
        return Err(not_ours("a block of a third party".to_owned()));
    }
    let grant: Grant = meaning(&token, 0)?;
    let mut rights = grant.rights.clone();
    let mut expires_unix_s = grant.expires_unix_s;
    let mut narrowings = Vec::new();
    for index in 1..blocks {
        let narrowing: Narrowing = meaning(&token, index)?;
        narrowing.check()?;
        rights = rights.narrowed(&narrowing);
        expires_unix_s = [expires_unix_s, narrowing.expires_unix_s].into_iter().flatten().min();
        narrowings.push(narrowing);
    }
    let revocation_ids =
        token.revocation_identifiers().iter().map(|id| RevocationId(hex::encode(id))).collect();
    Ok(Inspected { grant, narrowings, rights, expires_unix_s, revocation_ids })
}

/// Checks everything: signatures, profile, holder, time, revocation.
pub fn verify(token: &str, key: RootPublic, at: &Circumstances<'_>) -> Result<Verified, Report> {
    let inspected = inspect(token)?;
    signed(token, key)?;
    if let Some(id) = inspected.revocation_ids.iter().find(|id| (at.revoked)(id)) {
        let why = format!("block {} was revoked", id.0);
        return Err(refused("token_revoked", why, "ask whoever gave you the token for a new one"));
    }
    if inspected.expires_unix_s.is_some_and(|end| at.now_unix_s >= end) {
        let why = "its time is over, by this machine's clock".to_owned();
        return Err(refused("token_expired", why, "ask whoever gave you the token for a new one"));
    }
    let holder = inspected.grant.holder;
    if holder != at.caller {
        let why = format!("it is bound to the agent {holder}, and was shown by {}", at.caller);
        return Err(refused("token_stolen", why, "use the token that was given to this agent"));
    }
    Ok(Verified {
        holder,
        rights: inspected.rights,
        expires_unix_s: inspected.expires_unix_s,
        revocation_ids: inspected.revocation_ids,
    })
}

/// What Biscuit's own authorizer says of one request. Revocation is not part of a token; [`verify`] checks it.
pub fn authorize(
    token: &str,
    key: RootPublic,
    caller: AgentId,
    now_unix_s: i64,
    request: &Request,
) -> Result<bool, Report> {
    let token = signed(token, key)?;
    let decided = datalog::question(AuthorizerBuilder::new(), caller, now_unix_s, request)
        .and_then(|builder| builder.set_limits(LIMITS).build(&token))
        .and_then(|mut authorizer| authorizer.authorize_with_limits(LIMITS));
    match decided {
        Ok(_) => Ok(true),
        Err(error::Token::FailedLogic(_)) => Ok(false),
        Err(error) => Err(unreadable(&error)),
    }
}

fn signed(token: &str, key: RootPublic) -> Result<Biscuit, Report> {
    Biscuit::from_base64(token, key.0).map_err(|error| match error {
        error::Token::Format(error::Format::Signature(_)) => refused(
            "token_foreign",
            "this appliance did not sign it, or it was changed since".to_owned(),
            "use a token of this appliance: `agentctl token mint`",
        ),
        other => unreadable(&other),
    })
}

/// What a block means, if it holds exactly the Datalog that follows from what it says.
fn meaning<T: Meaning>(token: &UnverifiedBiscuit, index: usize) -> Result<T, Report> {
    let found = token.print_block_source(index).map_err(|error| unreadable(&error))?;
    let said =
        datalog::said(&found).ok_or_else(|| not_ours(format!("block {index} does not say what it means")))?;
    let value: T = serde_json::from_slice(&said)
        .map_err(|error| not_ours(format!("block {index} says what this version cannot read: {error}")))?;
    if value.source()? != found {
        return Err(not_ours(format!("block {index} holds other Datalog than it says")));
    }
    Ok(value)
}

/// A block's content as a value.
trait Meaning: DeserializeOwned + Serialize {
    /// The Datalog of such a block, as Biscuit prints it.
    fn source(&self) -> Result<String, Report>;
}

impl Meaning for Grant {
    fn source(&self) -> Result<String, Report> {
        datalog::printed(datalog::authority(self)?, None)
    }
}

impl Meaning for Narrowing {
    fn source(&self) -> Result<String, Report> {
        datalog::printed(BiscuitBuilder::new(), Some(datalog::attenuation(self)?))
    }
}

fn short_enough(token: String) -> Result<String, Report> {
    if token.len() <= TOKEN_MAX_BYTES {
        return Ok(token);
    }
    Err(Report::caller(
        "token_too_large",
        "no token was made",
        format!("it would have {} bytes, and {TOKEN_MAX_BYTES} are the most", token.len()),
        "name fewer folders, or hand on a token with fewer blocks",
    ))
}

fn keypair(secret: &[u8; 32]) -> Result<KeyPair, Report> {
    let key = PrivateKey::from_bytes(secret, Algorithm::Ed25519).map_err(|error| not_made(error.into()))?;
    Ok(KeyPair::from(&key))
}

fn refused(code: &str, why: String, fix: &str) -> Report {
    Report::caller(code, "the token was refused", why, fix)
}

fn unreadable(error: &error::Token) -> Report {
    refused("token_unreadable", error.to_string(), "send the token as it was given, without a change")
}

fn too_deep(blocks: usize) -> Report {
    let why = format!("it has {blocks} blocks, and {BLOCKS_MAX} are the most");
    refused("token_too_deep", why, "narrow a token that was handed on fewer times")
}

fn not_ours(why: String) -> Report {
    refused("token_profile", why, "narrow tokens with `agentctl token attenuate` or over the agent API")
}

fn not_made(error: error::Token) -> Report {
    Report::bug("token_not_made", "no token was made", error.to_string(), "report this")
}

#[cfg(test)]
mod tests;
