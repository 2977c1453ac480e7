//! How does what an agent's rules allow get out, and who says so?
//!
//! Owns:  the world around `agentd-egress`: the resolver and the dialler (`world.rs`), the sockets of each run
//!        (`serve.rs`), what is written down (`record.rs`), what was moved today (`budgets.rs`), the authority that ends
//!        TLS (`authority.rs`), the owner's secrets (`secrets.rs`).
//! In:    the sockets that the launcher hands over with a run, and the rules that run was started with; what the owner
//!        grants in `agentd.toml`; secrets.
//! Always: a run without rules has none of this. Rules are those of the plan the run was started with, also after a
//!         restart of agentd. What is missing (an authority, a secret) closes what needs it and nothing else.
//! Never:  a decision: `agentd_egress` decides, this carries it out.
//! Threads: tasks of the data plane.

mod authority;
mod budgets;
mod orders;
mod owner;
mod record;
mod secrets;
mod serve;
mod world;

use crate::agents::Nerves;
use crate::audit::Audit;
use crate::health::{Board, Weight};
use crate::places::Places;
use crate::store::Db;
use crate::tokens::Tokens;
use agentd_domain::config::{self, EgressSettings, PrivateHost};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::net::{EgressRules, Pattern, Reach, Rule};
use agentd_domain::plan::ceiling;
use agentd_domain::rights::Rights;
use agentd_egress::{Budgets, Ending, Policy};
use agentd_sandbox::client::EgressSockets;
use budgets::Book;
use secrets::Secrets;
use std::fs;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use world::Resolver;

/// On the board.
const PLACE: &str = "egress";

/// The egress for everybody else. Cheap to clone.
#[derive(Clone)]
pub struct Egress(Arc<Shared>);

struct Shared {
    audit: Audit,
    private: Vec<PrivateHost>,
    resolver: Arc<Resolver>,
    ending: Option<Ending>,
    book: Book,
    secrets: Secrets,
    db: Db,
    tokens: Tokens,
}

/// A run whose sockets are served.
pub struct Run {
    pub agent: AgentId,
    pub run: RunId,
    pub sockets: EgressSockets,
    pub over: CancellationToken,
}

impl Egress {
    /// Reads what is on the disk. Blocks. Call it on the data plane's runtime.
    pub fn open(
        places: &Places,
        settings: EgressSettings,
        audit: Audit,
        (db, tokens): (Db, Tokens),
        nerves: Nerves,
        board: &Board,
    ) -> Self {
        let ending = authority::open(places, &settings.private);
        let secrets = Secrets::open(places.secrets());
        let problem = ending.as_ref().err().or(secrets.problem());
        match problem {
            Some(report) => board.set(PLACE, Weight::Degraded, report.clone()),
            None => board.clear(PLACE),
        }
        let resolver = Arc::new(Resolver::new(&settings.private));
        let ending = ending.ok();
        let book = Book::start(db.clone(), nerves);
        let private = settings.private;
        Self(Arc::new(Shared { audit, private, resolver, ending, book, secrets, db, tokens }))
    }

    pub fn secrets(&self) -> &Secrets {
        &self.0.secrets
    }

    /// Spawns everything that belongs to a run's way out, until the run is over. Call it on the data plane.
    pub fn serve(&self, run: Run) {
        let egress = self.clone();
        tokio::spawn(async move { serve::serve(egress, run).await });
    }

    /// Writes what was moved and not written yet.
    pub async fn close(&self) {
        self.0.book.close().await;
    }

    /// The agents above this one, the nearest first, with what their tokens give.
    async fn family(&self, agent: AgentId) -> Result<Vec<(AgentId, Rights)>, Report> {
        const WHAT: &str = "nothing of it goes out";
        let mut family = Vec::new();
        let mut below = agent;
        for _ in 0..=ceiling::DEPTH_MAX {
            let row = self.0.db.call(move |store| store.agent(below)).await;
            let Some(parent) = row.map_err(|error| error.report(WHAT))?.and_then(|row| row.parent) else {
                break;
            };
            family.push((parent, self.0.tokens.says(parent).await?.rights));
            below = parent;
        }
        Ok(family)
    }

    /// All that decides for a run now.
    fn policy(&self, agent: AgentId, rules: &EgressRules, budgets: &Budgets) -> Policy {
        let rules = granted(rules, &self.0.private);
        let of = |(number, rule): (usize, &Rule)| {
            let secret = rule.secret.as_ref()?;
            Some((number, self.0.secrets.find(agent, &secret.name, &rule.host)?))
        };
        let secrets = rules.as_slice().iter().enumerate().filter_map(of).collect();
        Policy { rules, budgets: budgets.clone(), own: Vec::new(), secrets }
    }
}

/// The rules with what the owner grants: a host of a private network, exactly as it is named there.
fn granted(rules: &EgressRules, private: &[PrivateHost]) -> EgressRules {
    let mut list: Vec<Rule> = rules.clone().into();
    for rule in &mut list {
        let is_granted =
            |host: &PrivateHost| matches!(&rule.host, Pattern::Exact(exact) if *exact == host.host);
        if private.iter().any(is_granted) {
            rule.reach = Reach::Private;
        }
    }
    // All rules of one host get the same; were they not accepted, nothing would be granted.
    EgressRules::new(list).unwrap_or_else(|_| rules.clone())
}

/// What the owner grants. Read it before agentd shuts itself in: the file is init's. What is wrong with it is init's to
/// report too.
pub fn settings(places: &Places) -> EgressSettings {
    let owner = init_sys::twofile::TwoFile::new(&places.config).read().ok().flatten();
    let text = owner.or_else(|| fs::read(&places.config_default).ok()).unwrap_or_default();
    config::parse(&String::from_utf8_lossy(&text)).0.egress
}

fn unusable(code: &str, what: &str, why: impl std::fmt::Display) -> Report {
    Report::environment(
        code,
        what,
        why.to_string(),
        "reboot; if it stays, the partition is damaged: see its state on the local console",
    )
}

#[cfg(test)]
pub(crate) mod tests;
