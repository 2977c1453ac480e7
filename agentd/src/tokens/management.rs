//! What may the owner do with tokens?
//!
//! Always: one audit record per order. A token that was replaced or revoked ends the runs under it before the owner has
//!         the answer: the launcher has been told by then.

use super::{Tokens, fresh};
use crate::appliance::{Machine, checked};
use crate::audit::Order;
use agentd_capability::token;
use agentd_domain::api::AgentKey;
use agentd_domain::audit::PublicKey;
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::token::{
    Attenuate, Key, Mint, Revocation, RevocationId, Revoke, Revoked, Shown, Target, Verified, Verify,
};
use std::str::FromStr;

/// Of a block: an Ed25519 signature, as hex.
const ID_CHARS: usize = 128;
const WHY_MOST_BYTES: usize = 256;

impl Machine {
    pub(crate) async fn token_of_agent(&self, key: AgentKey) -> Result<Shown, Report> {
        let (agent, _) = self.find(&key)?;
        shown(self.parts()?.tokens.text_of(agent).await?)
    }

    pub(crate) async fn mint(&self, mint: Mint) -> Result<Shown, Report> {
        let order = self.about_agent("token.mint", &mint.agent);
        let work = async {
            let parts = self.parts()?;
            let (agent, view) = self.named(&mint.agent)?;
            if view.row.parent.is_some() {
                return Err(Report::caller(
                    "conflict",
                    "no token was made",
                    format!("{} is a child, and has its token from its parent", view.row.name),
                    "revoke it, or have its parent start another child",
                ));
            }
            let manifest = checked(&view.row.manifest)?;
            let token = parts.tokens.minted(agent, &manifest, &mint.by)?;
            let text = token.token.clone();
            parts.tokens.replace(&view.row, token).await?;
            let _ = parts.agents.revoked().await;
            parts.agents.renewed(agent).await?;
            shown(text)
        };
        self.audit.order(order, work, |_, _| {}).await
    }

    pub(crate) fn attenuate(&self, body: &Attenuate) -> Result<Shown, Report> {
        shown(token::attenuate(&body.token, &body.by, &fresh()?)?)
    }

    pub(crate) async fn verify_token(&self, body: Verify) -> Result<Verified, Report> {
        let order = Order { action: "token.verify", agent: None, about: String::new() };
        let work = async {
            let tokens = &self.parts()?.tokens;
            let holder = token::genuine(&body.token, tokens.public())?.holder;
            let caller = match &body.agent {
                Some(agent) => self.named(agent)?.0,
                None => holder,
            };
            tokens.verify(&body.token, caller)
        };
        self.audit.order(order, work, |verified, order| order.agent = Some(verified.holder)).await
    }

    pub(crate) async fn revoke(&self, body: Revoke) -> Result<Revocation, Report> {
        let about = match &body.target {
            Target::Agent(agent) => agent.clone(),
            Target::Token(_) => "a token".to_owned(),
            Target::Id(id) => id.0.chars().take(16).collect(),
        };
        let order = Order { action: "token.revoke", agent: None, about };
        let work = async {
            let parts = self.parts()?;
            let why: String = body.why.chars().filter(|c| !c.is_control()).collect();
            if why.len() > WHY_MOST_BYTES {
                let fix = format!("say it in {WHY_MOST_BYTES} bytes");
                return Err(Report::caller(
                    "why_too_long",
                    "nothing was revoked",
                    "the reason is too long",
                    fix,
                ));
            }
            let id = self.revocation_id(&parts.tokens, &body.target).await?;
            let revoked = parts.tokens.revoke(id, "owner", &why).await?;
            let ended = parts.agents.revoked().await;
            Ok(Revocation { revoked, ended })
        };
        let agent = match &body.target {
            Target::Agent(agent) => self.named(agent).ok().map(|(agent, _)| agent),
            _ => None,
        };
        let learn = |revocation: &Revocation, order: &mut Order| {
            order.agent = agent.or(revocation.ended.first().copied());
        };
        self.audit.order(order, work, learn).await
    }

    pub(crate) async fn all_revoked(&self) -> Result<Vec<Revoked>, Report> {
        let revoked = self.parts()?.db.call(|store| store.revoked()).await;
        revoked.map_err(|error| error.report("the list was not read"))
    }

    pub(crate) fn key_of_tokens(&self) -> Result<Key, Report> {
        let bytes = self.parts()?.tokens.public().to_bytes();
        let key = bytes.try_into().map_err(|_| {
            Report::bug("token_key", "the key is not shown", "it has not 32 bytes", "update the appliance")
        })?;
        Ok(Key { key: PublicKey(key) })
    }

    async fn revocation_id(&self, tokens: &Tokens, target: &Target) -> Result<RevocationId, Report> {
        let says = match target {
            Target::Agent(agent) => tokens.says(self.named(agent)?.0).await?,
            Target::Token(text) => token::genuine(text, tokens.public())?,
            Target::Id(id) => {
                let good =
                    id.0.len() == ID_CHARS && id.0.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
                return if good { Ok(id.clone()) } else { Err(no_id()) };
            }
        };
        says.revocation_ids.into_iter().next_back().ok_or_else(no_id)
    }

    fn named(&self, agent: &str) -> Result<(AgentId, crate::agents::View), Report> {
        let key = AgentKey::from_str(agent).map_err(|why| {
            Report::caller(
                "agent_name_malformed",
                "no agent was looked up",
                why,
                "`agentctl agent ls` shows the names",
            )
        })?;
        self.find(&key)
    }

    fn about_agent(&self, action: &'static str, agent: &str) -> Order {
        let known = self.named(agent).ok().map(|(agent, _)| agent);
        Order { action, agent: known, about: agent.to_owned() }
    }
}

pub(crate) fn shown(token: String) -> Result<Shown, Report> {
    let says = token::inspect(&token)?;
    Ok(Shown { token, says })
}

fn no_id() -> Report {
    Report::caller(
        "revocation_id_malformed",
        "nothing was revoked",
        "this is not the id of a block",
        "`agentctl token inspect` shows the ids of a token's blocks",
    )
}
