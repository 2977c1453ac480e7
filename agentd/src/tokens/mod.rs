//! Which token does an agent have, and does it hold now?
//!
//! Owns:  the appliance's key for tokens (`key.rs`) and the set of what was revoked, in memory and in the store. The
//!        text of tokens and their decisions are `agentd_capability::token`'s.
//! In:    agents and what they show. Out: [`Verified`], or why not.
//! Always: a token lies in the store, never where an agent can write. What is revoked is on the disk before it is
//!         acknowledged, and in memory before that: [`Tokens::may`] decides each call of each agent by it, and is a
//!         look-up. What does not verify gives nothing.

mod key;
mod management;

pub use key::{open as open_key, report as key_report};
pub(crate) use management::shown;

use crate::clock;
use crate::store::{AgentRow, Db, StoreError, TokenRow};
use agentd_capability::token::{self, Circumstances, Fresh, Grant, RootKey, RootPublic};
use agentd_capability::{asked, parse_manifest};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::manifest::Manifest;
use agentd_domain::rights::{Narrowing, Request, Rights};
use agentd_domain::token::{Inspected, RevocationId, Revoked, Verified};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// For everybody who decides. Cheap to clone.
#[derive(Clone)]
pub struct Tokens(Arc<Inner>);

struct Inner {
    key: RootKey,
    db: Db,
    revoked: RwLock<HashSet<RevocationId>>,
    /// The control of the tests that attack: every check replaced by "allow".
    #[cfg(test)]
    allows_all: std::sync::atomic::AtomicBool,
}

impl Tokens {
    /// Blocks for the store.
    pub fn open(key: RootKey, db: Db) -> Result<Self, StoreError> {
        let revoked = db.here().revoked()?.into_iter().map(|entry| entry.id).collect();
        Ok(Self(Arc::new(Inner {
            key,
            db,
            revoked: RwLock::new(revoked),
            #[cfg(test)]
            allows_all: Default::default(),
        })))
    }

    pub fn public(&self) -> RootPublic {
        self.0.key.public()
    }

    /// Gives a token to each agent that has none, as an older version left it, and a new one where an update has
    /// changed what the manifest asks for. Children have theirs from their parents. Blocks for the store.
    pub fn settle(&self) -> Result<(), Report> {
        let failed = |error: StoreError| error.report("an agent has no token");
        for row in self.0.db.here().agents().map_err(failed)? {
            // One that this version cannot read is not started either.
            let Ok(manifest) = parse_manifest(&row.manifest) else { continue };
            let known = self.0.db.here().token(row.agent_id).map_err(failed)?;
            let asked = Some(digest(&asked(&manifest)));
            let settled = known.is_some_and(|known| known.asked.is_none() || known.asked == asked);
            if row.parent.is_some() || settled {
                continue;
            }
            let token = self.minted(row.agent_id, &manifest, &Narrowing::default())?;
            self.0.db.here().replace_token(row.agent_id, &token, None).map_err(failed)?;
            tracing::info!(agent_id = %row.agent_id, "an agent has a token");
        }
        Ok(())
    }

    /// A token for all that the manifest asks for, narrowed. Nothing is stored.
    pub fn minted(&self, agent: AgentId, manifest: &Manifest, by: &Narrowing) -> Result<TokenRow, Report> {
        by.check()?;
        let all = asked(manifest);
        let grant = Grant { holder: agent, rights: all.narrowed(by), expires_unix_s: by.expires_unix_s };
        let token = token::mint(&self.0.key, &grant, &fresh()?)?;
        let asked = (*by == Narrowing::default()).then(|| digest(&all));
        Ok(TokenRow { v: 1, token, minted_unix_ms: clock::unix_ms(), asked })
    }

    /// A parent's token, narrowed and handed to a child.
    pub fn handed_on(&self, token: &str, to: AgentId, by: &Narrowing) -> Result<TokenRow, Report> {
        let token = token::hand_on(&self.0.key, token, to, by, &fresh()?)?;
        Ok(TokenRow { v: 1, token, minted_unix_ms: clock::unix_ms(), asked: None })
    }

    /// Whether this text is a token that holds now, and may be shown by this agent.
    pub fn verify(&self, token: &str, caller: AgentId) -> Result<Verified, Report> {
        #[cfg(test)]
        if self.allows_all() {
            let Inspected { rights, revocation_ids, .. } = token::inspect(token)?;
            return Ok(Verified { holder: caller, rights, expires_unix_s: None, revocation_ids });
        }
        // The lock is not held while signatures are checked: to revoke waits for nobody.
        let at = Circumstances { caller, now_unix_s: now_unix_s(), revoked: &HashSet::new() };
        let verified = token::verify(token, self.public(), &at)?;
        self.in_force(&verified)?;
        Ok(verified)
    }

    /// What the agent's own token gives it now.
    pub async fn of(&self, agent: AgentId) -> Result<Verified, Report> {
        let token = self.text_of(agent).await?;
        self.verify(&token, agent)
    }

    pub async fn text_of(&self, agent: AgentId) -> Result<String, Report> {
        let row = self.0.db.call(move |store| store.token(agent)).await;
        let row = row.map_err(|error| error.report("the agent's token was not read"))?;
        row.map(|row| row.token).ok_or_else(|| {
            Report::environment(
                "token_missing",
                "the token was refused",
                "the agent has none",
                "`agentctl token mint NAME` gives it one",
            )
        })
    }

    pub async fn says(&self, agent: AgentId) -> Result<Inspected, Report> {
        token::inspect(&self.text_of(agent).await?)
    }

    /// Whether what was verified once holds now.
    pub fn in_force(&self, held: &Verified) -> Result<(), Report> {
        #[cfg(test)]
        if self.allows_all() {
            return Ok(());
        }
        held.in_force(now_unix_s(), &self.revoked())
    }

    /// The one place where a call of an agent is decided.
    pub fn may(&self, held: &Verified, request: &Request) -> Result<bool, Report> {
        #[cfg(test)]
        if self.allows_all() {
            return Ok(true);
        }
        held.may(request, now_unix_s(), &self.revoked())
    }

    /// When this returns, it is on the disk and no call is allowed under it.
    pub async fn revoke(&self, id: RevocationId, by: &str, why: &str) -> Result<Revoked, Report> {
        let revoked = Revoked { id, unix_ms: clock::unix_ms(), by: by.to_owned(), why: why.to_owned() };
        let entry = revoked.clone();
        let stored = self.0.db.call(move |store| store.revoke(&entry)).await;
        let stored = stored.map_err(|error| error.report("nothing was revoked"))?;
        self.note(&stored.id);
        Ok(stored)
    }

    /// A token in place of the agent's, which ends.
    pub async fn replace(&self, row: &AgentRow, token: TokenRow) -> Result<(), Report> {
        let (agent, what) = (row.agent_id, "the agent has its old token");
        let old = self.0.db.call(move |store| store.token(agent)).await;
        let old = old.map_err(|error| error.report(what))?.map(|old| token::inspect(&old.token));
        let id = old.and_then(Result::ok).and_then(|says| says.revocation_ids.into_iter().next_back());
        let revoked = id.map(|id| Revoked {
            id,
            unix_ms: clock::unix_ms(),
            by: "appliance".to_owned(),
            why: "a new token took its place".to_owned(),
        });
        let entry = revoked.clone();
        let stored = self.0.db.call(move |store| store.replace_token(agent, &token, entry.as_ref())).await;
        stored.map_err(|error| error.report(what))?;
        if let Some(revoked) = revoked {
            self.note(&revoked.id);
        }
        Ok(())
    }

    /// From here on whatever is shown is believed and whatever is asked is allowed.
    #[cfg(test)]
    pub fn allow_all(&self) {
        self.0.allows_all.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    #[cfg(test)]
    fn allows_all(&self) -> bool {
        self.0.allows_all.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn note(&self, id: &RevocationId) {
        // A panic elsewhere cannot leave half an id.
        self.0.revoked.write().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
    }

    fn revoked(&self) -> RwLockReadGuard<'_, HashSet<RevocationId>> {
        self.0.revoked.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run's standing that allows nothing: what an agent has whose token did not verify.
pub fn nothing(agent: AgentId) -> Verified {
    let rights = Rights {
        api: Default::default(),
        read: Default::default(),
        calls: Default::default(),
        net: Default::default(),
        limits: Default::default(),
    };
    Verified { holder: agent, rights, expires_unix_s: Some(0), revocation_ids: Vec::new() }
}

pub fn fresh() -> Result<Fresh, Report> {
    let mut secret = [0; 32];
    match getrandom::fill(&mut secret) {
        Ok(()) => Ok(Fresh(secret)),
        Err(error) => Err(Report::environment(
            "no_randomness",
            "no token was made",
            error.to_string(),
            "reboot the appliance",
        )),
    }
}

fn now_unix_s() -> i64 {
    clock::unix_ms().div_euclid(1000)
}

/// Our own value always has a text.
fn digest(rights: &Rights) -> String {
    hex::encode(Sha256::digest(serde_json::to_vec(rights).unwrap_or_default()))
}

#[cfg(test)]
mod tests;
