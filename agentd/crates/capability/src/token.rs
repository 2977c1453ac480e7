//! Which rights does this token carry, for whom, and until when?
//!
//! In:     rights and a key; or the text of a token. Out: the text of a token; or what it says, checked.
//! Always: a right is a fact of the authority block, which only the appliance's key can sign; every later block only
//!         takes away. What is not one of our three kinds of block is refused whole.
//! Never:  a clock or a random number: the caller brings both.
//!
//! A token is a Biscuit (<https://doc.biscuitsec.org/reference/specifications>) under a strict profile. Biscuit's own
//! attenuation is free Datalog: sound for a yes or no, but it cannot be turned into kernel policy. So a block says what
//! it means as JSON in its first fact, and holds besides exactly the Datalog that follows from that. Both ways to
//! decide are the same: [`Verified::rights`] for plans, [`authorize`] for anybody who has the token and Biscuit alone.
//!
//! ```text
//! block 0   a grant: rights and holder       signed by the appliance
//! block n   a narrowing                      made by whoever has the text, no key needed
//! block n   a narrowing for another holder   the same, signed by the appliance too (Biscuit's third-party block)
//! ```
//! Who may use a token is the holder that its last such block names. Whoever has a token's text could append a block;
//! one that names himself only the appliance can make, for a child that it starts.

mod checks;
mod datalog;

use self::checks::{Check, stands};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::rights::{Narrowing, Request};
pub use agentd_domain::token::{Grant, Inspected, Later, RevocationId, Verified};
use biscuit_auth::datalog::RunLimits;
use biscuit_auth::{
    Algorithm, AuthorizerBuilder, Biscuit, BiscuitBuilder, KeyPair, PrivateKey, UnverifiedBiscuit, error,
};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::HashSet;
use std::time::Duration;

/// Longer texts are refused unread. A token of an agent with every right takes two kilobytes.
pub const TOKEN_MAX_BYTES: usize = 32 * 1024;
/// Blocks of a token, the authority's included: so deep may agents delegate.
pub const BLOCKS_MAX: usize = 16;
/// Biscuit's own limit of 1 ms is wall-clock time, and refuses good tokens on a busy machine
/// (<https://github.com/nervosnetwork/fiber/pull/1563>); facts and iterations bound the work.
const LIMITS: RunLimits =
    RunLimits { max_facts: 10_000, max_iterations: 100, max_time: Duration::from_secs(5) };

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

/// Where and when a token is shown.
pub struct Circumstances<'a> {
    /// Whose socket it came over. Nobody else's word counts.
    pub caller: AgentId,
    pub now_unix_s: i64,
    pub revoked: &'a HashSet<RevocationId>,
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

/// The same token with less in it. Needs no key: whoever holds a token may narrow it, and stays its holder.
pub fn attenuate(token: &str, by: &Narrowing, fresh: &Fresh) -> Result<String, Report> {
    by.check()?;
    room_for_another(&inspect(token)?)?;
    let next = keypair(&fresh.0)?;
    let token = UnverifiedBiscuit::from_base64(token).map_err(|error| unreadable(&error))?;
    let block = datalog::later(&Later { to: None, by: by.clone() })?;
    let token = token.append_with_keypair(&next, block).map_err(not_made)?;
    short_enough(token.to_base64().map_err(not_made)?)
}

/// The same token for another agent, with less in it. Whoever held it before cannot use the new one, and the new
/// holder not the old. Needs the appliance's key: otherwise whoever stole a token could hand it to himself.
pub fn hand_on(
    key: &RootKey,
    token: &str,
    to: AgentId,
    by: &Narrowing,
    fresh: &Fresh,
) -> Result<String, Report> {
    by.check()?;
    let inspected = inspect(token)?;
    signed(token, key.public())?;
    room_for_another(&inspected)?;
    if inspected.holders().contains(&to) {
        return Err(not_ours(format!("it was {to}'s already")));
    }
    let next = keypair(&fresh.0)?;
    let token = UnverifiedBiscuit::from_base64(token).map_err(|error| unreadable(&error))?;
    let block = datalog::later(&Later { to: Some(to), by: by.clone() })?;
    let block = token
        .third_party_request()
        .and_then(|request| request.create_block(&key.0.private(), block))
        .and_then(|block| block.serialize())
        .map_err(not_made)?;
    let token = token.append_third_party_with_keypair(&block, next).map_err(not_made)?;
    short_enough(token.to_base64().map_err(not_made)?)
}

/// Reads a token without a key.
pub fn inspect(token: &str) -> Result<Inspected, Report> {
    if token.len() > TOKEN_MAX_BYTES && stands(Check::Size) {
        let why = format!("it has {} bytes", token.len());
        return Err(refused("token_too_large", why, "a token is at most 32 KiB of text: send it alone"));
    }
    let token = UnverifiedBiscuit::from_base64(token).map_err(|error| unreadable(&error))?;
    let blocks = token.block_count();
    if blocks > BLOCKS_MAX && stands(Check::Depth) {
        return Err(too_deep(blocks));
    }
    let grant: Grant = meaning(&token, 0)?;
    let mut said = Inspected {
        holder: grant.holder,
        rights: grant.rights.clone(),
        expires_unix_s: grant.expires_unix_s,
        revocation_ids: revocation_ids(&token),
        later: Vec::new(),
        grant,
    };
    for (index, signer) in token.external_public_keys().into_iter().enumerate().skip(1) {
        let block: Later = meaning(&token, index)?;
        block.by.check()?;
        // Whose signature it is, `verify` looks at.
        if signer.is_some() != block.to.is_some() && stands(Check::Kind) {
            return Err(not_ours(format!("block {index} is not signed as its kind is")));
        }
        if block.to.is_some_and(|to| said.holders().contains(&to)) {
            return Err(not_ours(format!("block {index} hands it back")));
        }
        said.holder = block.to.unwrap_or(said.holder);
        said.rights = said.rights.narrowed(&block.by);
        said.expires_unix_s = [said.expires_unix_s, block.by.expires_unix_s].into_iter().flatten().min();
        #[cfg(test)]
        checks::believe(&mut said, &block.by);
        said.later.push(block);
    }
    Ok(said)
}

fn revocation_ids(token: &UnverifiedBiscuit) -> Vec<RevocationId> {
    token.revocation_identifiers().iter().map(|id| RevocationId(hex::encode(id))).collect()
}

/// Reads a token of this key, whoever shows it and whenever.
pub fn genuine(token: &str, key: RootPublic) -> Result<Inspected, Report> {
    let inspected = inspect(token)?;
    if stands(Check::Signature) {
        signed(token, key)?;
    }
    Ok(inspected)
}

/// Checks everything: signatures, profile, holder, time, revocation.
pub fn verify(token: &str, key: RootPublic, at: &Circumstances<'_>) -> Result<Verified, Report> {
    let Inspected { holder, rights, expires_unix_s, revocation_ids, .. } = genuine(token, key)?;
    let verified = Verified { holder, rights, expires_unix_s, revocation_ids };
    if stands(Check::InForce) {
        verified.in_force(at.now_unix_s, at.revoked)?;
    }
    if holder != at.caller && stands(Check::Holder) {
        let why = format!("it is bound to the agent {holder}, and was shown by {}", at.caller);
        return Err(refused("token_stolen", why, "use the token that was given to this agent"));
    }
    Ok(verified)
}

/// What Biscuit's own authorizer says of one request. Revocation is not part of a token; [`verify`] checks it.
pub fn authorize(
    token: &str,
    key: RootPublic,
    caller: AgentId,
    now_unix_s: i64,
    request: &Request,
) -> Result<bool, Report> {
    let holders = inspect(token)?.holders();
    let token = signed(token, key)?;
    let decided = datalog::question(AuthorizerBuilder::new(), &holders, caller, now_unix_s, request)
        .and_then(|builder| builder.set_limits(LIMITS).build(&token))
        .and_then(|mut authorizer| authorizer.authorize_with_limits(LIMITS));
    match decided {
        Ok(_) => Ok(true),
        Err(error::Token::FailedLogic(_)) => Ok(false),
        Err(error) => Err(unreadable(&error)),
    }
}

/// All blocks hold together, the first is the appliance's, and so is each that names another holder: its signature
/// covers that of the block before it, so it fits no other token.
fn signed(token: &str, key: RootPublic) -> Result<Biscuit, Report> {
    let foreign = |why: &str| {
        refused("token_foreign", why.to_owned(), "use a token of this appliance: `agentctl token mint`")
    };
    let token = Biscuit::from_base64(token, key.0).map_err(|error| match error {
        error::Token::Format(error::Format::Signature(_)) => {
            foreign("this appliance did not sign it, or it was changed since")
        }
        other => unreadable(&other),
    })?;
    if token.external_public_keys().into_iter().flatten().any(|signer| signer != key.0)
        && stands(Check::Signer)
    {
        return Err(foreign("somebody else than this appliance has handed it on"));
    }
    Ok(token)
}

/// What a block means, if it holds exactly the Datalog that follows from what it says.
fn meaning<T: Meaning>(token: &UnverifiedBiscuit, index: usize) -> Result<T, Report> {
    let found = token.print_block_source(index).map_err(|error| unreadable(&error))?;
    let said =
        datalog::said(&found).ok_or_else(|| not_ours(format!("block {index} does not say what it means")))?;
    let value: T = serde_json::from_slice(&said)
        .map_err(|error| not_ours(format!("block {index} says what this version cannot read: {error}")))?;
    if value.source()? != found && stands(Check::Profile) {
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

impl Meaning for Later {
    fn source(&self) -> Result<String, Report> {
        datalog::printed(BiscuitBuilder::new(), Some(datalog::later(self)?))
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

fn room_for_another(inspected: &Inspected) -> Result<(), Report> {
    let blocks = inspected.revocation_ids.len();
    if blocks < BLOCKS_MAX { Ok(()) } else { Err(too_deep(blocks + 1)) }
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
