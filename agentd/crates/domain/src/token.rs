//! What does a capability token say, and what may be asked about one?
//!
//! Owns:  the plain values of tokens, and the bodies of the management API's routes below `/api/v1/tokens`. Their
//!        text, signatures and Datalog are `agentd-capability`'s.
//! Always: [`Verified::may`] is a look-up: it decides each call of an agent, without cryptography, a clock or a disk.

use crate::fault::Report;
use crate::ids::AgentId;
use crate::rights::{Narrowing, Request, Rights};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;

/// The name of one block of one token: to revoke it ends the token and all that were derived from it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RevocationId(pub String);

impl fmt::Display for RevocationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

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

/// A block after the first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Later {
    /// Whose the token is from here on. Only the appliance can sign such a block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<AgentId>,
    #[serde(default)]
    pub by: Narrowing,
}

/// What a token says, its signatures not yet checked against a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspected {
    pub grant: Grant,
    pub later: Vec<Later>,
    /// The last of all whom it was handed to.
    pub holder: AgentId,
    /// What is left at the end.
    pub rights: Rights,
    /// The earliest of all blocks.
    pub expires_unix_s: Option<i64>,
    /// One per block, the authority's first.
    pub revocation_ids: Vec<RevocationId>,
}

impl Inspected {
    /// All whose token it was, the present holder last.
    pub fn holders(&self) -> Vec<AgentId> {
        std::iter::once(self.grant.holder).chain(self.later.iter().filter_map(|block| block.to)).collect()
    }
}

/// A token that held when it was looked at, for the caller who showed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    pub holder: AgentId,
    pub rights: Rights,
    pub expires_unix_s: Option<i64>,
    pub revocation_ids: Vec<RevocationId>,
}

impl Verified {
    /// Whether it still holds: since it was verified it may have expired, or been revoked.
    pub fn in_force(&self, now_unix_s: i64, revoked: &HashSet<RevocationId>) -> Result<(), Report> {
        if !revoked.is_empty()
            && let Some(id) = self.revocation_ids.iter().find(|id| revoked.contains(id))
        {
            return Err(revoked_report(id));
        }
        if self.expires_unix_s.is_some_and(|end| now_unix_s >= end) {
            return Err(expired_report());
        }
        Ok(())
    }

    /// Whether this may be done now.
    pub fn may(
        &self,
        request: &Request,
        now_unix_s: i64,
        revoked: &HashSet<RevocationId>,
    ) -> Result<bool, Report> {
        self.in_force(now_unix_s, revoked)?;
        Ok(self.rights.allows(request))
    }
}

pub fn revoked_report(id: &RevocationId) -> Report {
    let short: String = id.0.chars().take(16).collect();
    refused(
        "token_revoked",
        format!("its block {short}... was revoked"),
        "`agentctl token revoked` shows when and why; `agentctl token mint NAME` gives the agent a new one",
    )
}

pub fn expired_report() -> Report {
    refused(
        "token_expired",
        "its time is over, by this machine's clock",
        "`agentctl token mint NAME` gives the agent a new one; a child's comes from its parent",
    )
}

fn refused(code: &str, why: impl Into<String>, fix: &str) -> Report {
    Report::caller(code, "the token was refused", why, fix)
}

// --- the management API ----------------------------------------------------------------------------------

/// A token and what it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    pub token: String,
    pub says: Inspected,
}

/// A new token for an agent, in place of the one it has: all that its manifest asks for, narrowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mint {
    /// Its name or id.
    pub agent: String,
    #[serde(default)]
    pub by: Narrowing,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attenuate {
    pub token: String,
    pub by: Narrowing,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inspect {
    pub token: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verify {
    pub token: String,
    /// As if this agent had shown it (name or id); without, its own holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

/// What is to be revoked. Of an agent or a token it is the last block: what it was narrowed from stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The token that the agent has now (name or id).
    Agent(String),
    Token(String),
    Id(RevocationId),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    pub target: Target,
    #[serde(default)]
    pub why: String,
}

/// An entry of the list of what was revoked. Nothing leaves that list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    pub id: RevocationId,
    pub unix_ms: i64,
    /// `owner`, or `appliance` where a new token took the place of an old one.
    pub by: String,
    pub why: String,
}

/// What came of it. When it is answered, the id is on the disk and no call under it is allowed any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    pub revoked: Revoked,
    /// Whose runs are being ended by it.
    pub ended: Vec<AgentId>,
}

/// What tokens of the appliance are checked with: 32 bytes of Ed25519 (RFC 8032), hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub key: crate::audit::PublicKey,
}
