//! May a model be loaded, and who goes for it?
//!
//! The engine's task asks before each load, with what the engine says of itself at that moment; who keeps the ledger
//! answers (`crate::gpu`). The answer may take seconds: it is waited for aside.

use super::plan::Choice;
use super::waiting::Asker;
use agentd_domain::device::Placement;
use agentd_domain::enforcement::DeviceLimit;
use agentd_domain::engine::{Device, EngineStatus, LoadedModel};
use agentd_domain::fault::Report;
use futures::future::BoxFuture;
use std::time::Duration;

/// A model that somebody wants.
#[derive(Debug, Clone)]
pub struct Ask {
    pub choice: Choice,
    /// The most important of those who wait for it; `None` where nobody does and it is to be there all the same.
    pub asker: Option<Asker>,
    /// The engine's own words: devices as they are, what is used.
    pub status: EngineStatus,
    pub loaded: Vec<LoadedModel>,
    pub holders: Vec<Holder>,
}

/// A loaded model as one that may have to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub model: String,
    pub busy: bool,
    /// It never gives way.
    pub pinned: bool,
    pub idle: Duration,
    /// What loading it took; zero where nobody knows.
    pub reload: Duration,
}

/// What an engine's process gets of devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    pub limits: Vec<DeviceLimit>,
    /// Nodes that it cannot open.
    pub hidden: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its memory is held for it, there.
    Load(Option<Placement>),
    /// These go first, in this order; then ask again.
    MakeRoom(Vec<String>),
    Refused(Report),
}

pub trait Gate: Send + Sync {
    fn admit(&self, ask: Ask) -> BoxFuture<'static, Verdict>;

    /// A model that was let through did not come: what is held for it is free.
    fn not_loaded(&self, model: &str);

    /// How an engine that says these devices are its own is to be started.
    fn terms(&self, _devices: &[Device]) -> Terms {
        Terms::default()
    }

    /// Nodes that no engine is to open, as far as that is known without one.
    fn hidden(&self) -> Vec<String> {
        Vec::new()
    }

    /// Which limits are in force, or why those that were asked for are not.
    fn limited(&self, _by: Result<&[DeviceLimit], &Report>) {}
}
