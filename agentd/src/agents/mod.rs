//! Which agents are there, and what do they do?
//!
//! Owns:  every agent's state, in one loop (`run.rs`) over decisions without I/O (`plan.rs` for all of them,
//!        `agentd_domain::health` for each); the thread that reads the kernel's counters (`vitals.rs`); what is noticed
//!        of an agent's own requests (`nerves.rs`).
//! In:    wishes of the owner through [`Agents`]; what the launcher says.
//! Out:   [`Views`] for everybody who watches; orders to the launcher; a served API per living run.
//! Always: one run per agent at most (`plan.rs` and its tests).

mod archive;
pub mod nerves;
pub mod package;
pub mod plan;
mod run;
mod vitals;
mod words;

pub use nerves::Nerves;
pub use run::{Links, Serve, start};

use crate::store::AgentRow;
use agentd_domain::api::{AgentHealth, AgentState};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::ExitRecord;
use agentd_domain::manifest::Manifest;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Wishes and answers on their way to the loop.
const QUEUE: usize = 64;

/// What everybody may know of an agent.
#[derive(Debug, Clone)]
pub struct View {
    /// Shared with the loop: a thousand of them are shown anew whenever one changes.
    pub row: Arc<AgentRow>,
    /// `None` when this version cannot read it; then `problem` says why.
    pub manifest: Option<Arc<Manifest>>,
    pub state: AgentState,
    pub run: Option<LivingRun>,
    pub restarts: u32,
    pub health: AgentHealth,
    pub last_exit: Option<ExitRecord>,
    pub problem: Option<Report>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivingRun {
    pub run_id: RunId,
    pub pid: i32,
    pub started_boot_ms: u64,
}

pub type Views = Arc<BTreeMap<AgentId, View>>;

/// The loop for everybody else. Cheap to clone.
#[derive(Clone)]
pub struct Agents {
    wishes: mpsc::Sender<run::Input>,
    views: watch::Receiver<Views>,
}

impl Agents {
    pub fn views(&self) -> Views {
        self.views.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Views> {
        self.views.clone()
    }

    /// Answers when the wish is stored and has been acted on.
    pub async fn want(&self, agent: AgentId, wanted: bool) -> Result<(), Report> {
        self.ask(|answer| run::Input::Want { agent, wanted, answer }).await
    }

    /// An agent that is in the store now.
    pub async fn installed(&self, row: AgentRow) -> Result<(), Report> {
        self.ask(|answer| run::Input::Installed { row: Box::new(row), answer }).await
    }

    /// Answers when nothing of it is left.
    pub async fn remove(&self, agent: AgentId) -> Result<(), Report> {
        self.ask(|answer| run::Input::Remove { agent, answer }).await
    }

    /// Ends the runs whose token holds no more. Answers when the launcher has been told, with whose they are.
    pub async fn revoked(&self) -> Vec<AgentId> {
        let (answer, answered) = oneshot::channel();
        match self.wishes.send(run::Input::Revoked { answer }).await {
            Ok(()) => answered.await.unwrap_or_default(),
            // The loop ends with agentd; the next one starts nothing under what is revoked.
            Err(_) => Vec::new(),
        }
    }

    /// An agent has another token now.
    pub async fn renewed(&self, agent: AgentId) -> Result<(), Report> {
        self.ask(|answer| run::Input::Renewed { agent, answer }).await
    }

    async fn ask(
        &self,
        input: impl FnOnce(oneshot::Sender<Result<(), Report>>) -> run::Input,
    ) -> Result<(), Report> {
        let (answer, answered) = oneshot::channel();
        let gone = || {
            Report::bug("agents_loop", "it was not done", "agentd is shutting down", "try again in a moment")
        };
        self.wishes.send(input(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
