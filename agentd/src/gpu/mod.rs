//! What do the devices hold, and may one more model be loaded?
//!
//! Owns:  the one [`Ledger`]; which partitions are defined and who is in them.
//! In:    what the engine has, at each load and each change; the owner's orders; headers of model files.
//! Out:   yes or no before a load, plans, the view of devices, what the engine is told of who asks.
//! Always: an order is on disk before it holds. A model that the engine has already is in the ledger, whatever a plan
//!         says. Without a device that is known nothing is judged: the engine then refuses by itself.
//! Threads: what reads a file or the store blocks, and is called on threads that may; the rest is arithmetic under a lock.
//! Where:  before each load `admit.rs`, who goes for it `room.rs`, what is learned and kept `learned.rs`. Devices in
//!         trouble `ill.rs`, what is done about them `health.rs`; how an engine is started `limits.rs`; agents' own programs
//!         on devices `lease.rs`, `programs.rs`.

mod admit;
mod health;
mod ill;
mod learned;
mod lease;
mod limits;
mod orders;
#[cfg(test)]
mod placing;
mod plan;
pub(crate) mod programs;
mod room;
mod served;
#[cfg(test)]
pub(crate) mod tests;

pub use admit::AtTheDoor;
pub use ill::Trouble;
pub use learned::{Counted, Overhead};
pub use lease::{Grant, Lease};
pub use plan::Planned;
pub use served::Served;

use crate::engine::{Choice, Engine, Stage};
use crate::places::Places;
use crate::store::{Db, StoreError};
use agentd_domain::config;
use agentd_domain::enforcement::{DeviceLimit, Enforcement};
use agentd_domain::engine::{Device, LoadedModel, ModelKind};
use agentd_domain::fault::Report;
use agentd_domain::gguf;
use agentd_domain::ids::{AgentId, AgentName, RunId};
use agentd_domain::ledger::{self as words, Devices, Need, Partition, PartitionId};
use agentd_gpu::admission::Refusal;
use agentd_gpu::ledger::Ledger;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, OwnedSemaphorePermit};

/// All devices of the machine. Cheap to clone.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    /// Of the engine's cgroup: what it may take of host memory.
    engine_memory_bytes: u64,
    state: Mutex<State>,
    /// What the engine is to be held to may be something else.
    changed: Notify,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    /// A model that was let through and is not in the engine's list yet.
    coming: Option<String>,
    /// What was stored of devices, and of files by their paths.
    overhead: BTreeMap<String, Overhead>,
    counts: BTreeMap<String, Counted>,
    /// Defined in `agentd.toml`; not to be changed from elsewhere.
    configured: BTreeSet<PartitionId>,
    /// Who is in which of them, and who of these is installed.
    by_name: BTreeMap<AgentName, PartitionId>,
    by_configuration: BTreeSet<AgentId>,
    /// What their drivers have said of devices.
    ill: ill::Ill,
    /// What the engine is to be held to, by device, and the devices where it is, with by what.
    limits: Vec<(String, DeviceLimit)>,
    limited: BTreeMap<String, Enforcement>,
    /// Regions of devices that the kernel accounts for.
    regions: BTreeSet<String>,
    /// Of each device's memory the most that it was seen to have: within a limit it says less.
    sizes: BTreeMap<String, u64>,
    /// Nodes of instances that the engine is not on.
    others_instances: BTreeSet<String>,
    /// Whole devices of agents, and what runs have.
    grants: BTreeMap<AgentId, Grant>,
    leases: BTreeMap<RunId, Lease>,
    db: Option<Db>,
    places: served::Places,
}

/// What the engine is told of who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub partition: PartitionId,
    /// Sequences of the partition's agents at once; 0 is no limit.
    pub sequences_most: u32,
    pub priority: u8,
    pub weight: u32,
    /// Most cells of a model's cache; 0 is no limit.
    pub cells_most: u32,
}

impl Gpu {
    pub fn new(engine_memory_bytes: u64) -> Self {
        // Where it cannot be read every start of agentd looks like one of the same start of the machine: what was said
        // of a device then stays.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let state = State { ill: ill::Ill::new(boot.trim().to_owned()), ..State::default() };
        Self(Arc::new(Inner { engine_memory_bytes, state: Mutex::new(state), changed: Notify::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what is stored, and what the configuration says in its place. Blocks.
    pub fn open(&self, db: Db, configured: Configured) -> Result<(), StoreError> {
        let stored = db.here().partitions()?;
        let mut assigned = db.here().assigned_partitions()?;
        let (overhead, counts) = (db.here().overhead()?, db.here().counts()?);
        let names: BTreeSet<PartitionId> = configured.partitions.iter().map(|one| one.id.clone()).collect();
        let mut all: Vec<Partition> = stored.into_iter().filter(|one| !names.contains(&one.id)).collect();
        all.extend(configured.partitions);
        all.sort_by(|a, b| a.id.cmp(&b.id));
        let mut put = BTreeSet::new();
        // Children have names of their parents' making.
        for row in db.here().agents()?.into_iter().filter(|row| row.parent.is_none()) {
            if let Some(id) = configured.agents.get(&row.name) {
                assigned.insert(row.agent_id, id.clone());
                put.insert(row.agent_id);
            }
        }
        let mut state = self.state();
        state.ledger.restore(all, assigned);
        let believed = learned::believed(&overhead, state.ledger.devices());
        state.ledger.restore_overhead(&believed);
        // What was learned before the store was open is newer.
        let State { overhead: known, counts: counted, .. } = &mut *state;
        for (device, row) in overhead {
            known.entry(device).or_insert(row);
        }
        for (path, row) in counts {
            counted.entry(path).or_insert(row);
        }
        state.configured = names;
        state.by_name = configured.agents;
        state.by_configuration = put;
        state.db = Some(db);
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }

    /// Brings the ledger to what the engine has.
    fn take_over(&self, state: &mut State, devices: &[Device], loaded: &[LoadedModel]) {
        let mut devices = plan::devices(devices, self.0.engine_memory_bytes);
        state.full_sizes(&mut devices);
        for device in &mut devices {
            let known = device.gpu.as_ref().and_then(|gpu| state.ill.problem(gpu));
            device.problem = known.or_else(|| device.problem.take());
            if let Some(by) = state.limited.get(&device.name) {
                device.enforcement = *by;
            }
        }
        let fresh = state.ledger.devices().is_empty() && !devices.is_empty();
        state.ledger.set_devices(devices);
        if fresh {
            let believed = learned::believed(&state.overhead, state.ledger.devices());
            state.ledger.restore_overhead(&believed);
        }
        let State { ledger, coming, counts, .. } = state;
        coming.take_if(|name| loaded.iter().any(|model| model.model == *name));
        let kept =
            |name: &str| coming.as_deref() == Some(name) || loaded.iter().any(|model| model.model == name);
        let gone: Vec<String> = ledger.models().filter(|name| !kept(name)).map(str::to_owned).collect();
        gone.iter().for_each(|name| ledger.unload(name));
        for model in loaded {
            if ledger.need(&model.model).is_none() {
                ledger.adopt(&model.model, need_of_loaded(model, ledger, counts));
            }
        }
    }

    /// Follows the engine as long as there is one.
    pub async fn follow(self, engine: Engine) {
        let mut view = engine.watch();
        loop {
            let now = view.borrow_and_update().clone();
            match &now.stage {
                Stage::Starting => {}
                Stage::Down(_) => {
                    let mut state = self.state();
                    state.coming = None;
                    state.ledger.engine_lost();
                }
                Stage::Loading | Stage::Ready => {
                    let (this, engine, settled) = (self.clone(), engine.clone(), now.stage == Stage::Ready);
                    let done = tokio::task::spawn_blocking(move || {
                        let mut state = this.state();
                        state.coming.take_if(|name| now.failed.contains_key(name));
                        this.take_over(&mut state, &now.devices, &now.models);
                    });
                    // It cannot fail but by a panic, which is in the log already.
                    let _ = done.await;
                    if settled && let Ok(status) = engine.status().await {
                        let this = self.clone();
                        let _ = tokio::task::spawn_blocking(move || this.learn(&status)).await;
                    }
                }
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    }

    pub fn view(&self, names: &dyn Fn(AgentId) -> Option<AgentName>) -> Devices {
        let state = self.state();
        let mut view = state.ledger.view(names);
        for one in &mut view.partitions {
            one.configured = state.configured.contains(&one.partition.id);
        }
        view.devices.extend(state.unseen(names));
        view
    }

    /// What a loaded model holds of its devices.
    pub fn holds(&self, model: &str) -> Option<u64> {
        let state = self.state();
        let need = state.ledger.need(model)?;
        Some(need.devices.iter().map(|part| part.total_bytes()).fold(0, u64::saturating_add))
    }

    /// How a model of this header fits each partition.
    pub fn plan(&self, planned: &Planned) -> words::ModelPlan {
        let ledger = self.state().ledger.clone();
        planned.answer(&ledger)
    }

    /// Where an agent stands with this model.
    pub fn standing(&self, agent: AgentId, model: &str) -> Standing {
        let state = self.state();
        let id = state.ledger.partition_of(agent);
        let own = state.ledger.partition(&id);
        let cells = state.ledger.cells_most(model, agent);
        let all = state.ledger.need(model).map_or(0, |need| need.cells);
        Standing {
            partition: id,
            sequences_most: own.as_ref().map_or(0, |one| one.sequences_most),
            priority: own.as_ref().map_or(50, |one| one.priority),
            weight: own.as_ref().map_or(100, |one| one.weight),
            // An agent that may have all of them has no limit of its own; one that may have none has one cell, which is
            // too few for anything and is refused by the engine with its reason.
            cells_most: if cells >= all { 0 } else { u32::try_from(cells).unwrap_or(u32::MAX).max(1) },
        }
    }

    /// Its requests are the partition's of the agent above it, and so is what they hold.
    fn put_beneath(&self, agent: AgentId, above: AgentId) {
        self.state().ledger.put_beneath(agent, above);
    }

    pub fn forget(&self, agent: AgentId) {
        let mut state = self.state();
        state.ledger.forget(agent);
        state.grants.remove(&agent);
        state.by_configuration.remove(&agent);
    }

    /// A place among those that a partition lets work at once; `None` where it has no limit.
    async fn place(
        &self,
        partition: &PartitionId,
        most: u32,
    ) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
        if most == 0 {
            return Ok(None);
        }
        let room = self.state().places.room(partition, most);
        room.enter().await.map(Some)
    }

    fn anybody_assigned(&self) -> bool {
        !self.state().ledger.assigned().is_empty()
    }

    fn is_assigned(&self, agent: AgentId) -> bool {
        self.state().ledger.assigned().contains_key(&agent)
    }
}

/// `[[gpu.partition]]` of `agentd.toml`.
#[derive(Debug, Clone, Default)]
pub struct Configured {
    pub partitions: Vec<Partition>,
    pub agents: BTreeMap<AgentName, PartitionId>,
    /// `[gpu] software`.
    pub software_devices: bool,
}

/// What the owner wrote down. What is wrong with the file init has said.
pub fn configured(places: &Places) -> Configured {
    let owner = init_sys::twofile::TwoFile::new(&places.config).read().ok().flatten();
    let text = owner.or_else(|| std::fs::read(&places.config_default).ok()).unwrap_or_default();
    let config = config::parse(&String::from_utf8_lossy(&text)).0;
    let software_devices = config.software_devices;
    Configured { partitions: config.partitions, agents: config.agents_in_partitions, software_devices }
}

impl State {
    /// Devices that no engine sees because of what was said of them, or because they are an agent's own.
    fn unseen(&self, names: &dyn Fn(AgentId) -> Option<AgentName>) -> Vec<words::DeviceView> {
        let ill = self.ill.out().map(|(id, known)| {
            let what = format!("nothing new is put on {}", known.device.called(id));
            let report =
                Report::environment("device_unhealthy", what, known.why.clone(), known.action.advice());
            (id, &known.device, Some(report), None)
        });
        let granted =
            self.grants.iter().map(|(agent, grant)| (&grant.id, &grant.device, None, names(*agent)));
        let seen = |id: &String| {
            let of = |device: &agentd_gpu::ledger::Device| device.gpu.as_ref().and_then(ill::id_of);
            self.ledger.devices().iter().any(|device| of(device).as_ref() == Some(id))
        };
        let shown = |(id, device, problem, granted_to): (&String, &ill::Shown, _, _)| words::DeviceView {
            name: device.called(id),
            description: device.description.clone(),
            kind: device.kind.clone(),
            total_bytes: device.total_bytes,
            reserve_bytes: device.total_bytes,
            planned: words::DeviceNeed::default(),
            free_bytes: 0,
            reported_free_bytes: 0,
            used_bytes: None,
            difference_bytes: None,
            programs_bytes: 0,
            granted_to,
            // Nobody else is on it: there is nothing to hold anybody to.
            enforcement: Enforcement::Hardware,
            problem,
            gpu: None,
        };
        ill.chain(granted).filter(|one| !seen(one.0)).map(shown).collect()
    }
}

/// What is known of a model that the engine has: what the engine counted of its file, its header, or that it is there.
fn need_of_loaded(model: &LoadedModel, ledger: &Ledger, counts: &BTreeMap<String, Counted>) -> Need {
    let Some(summary) = header(&model.path) else { return plan::unknown(model, ledger) };
    let planned = Planned::of_loaded(model, &summary);
    let choice = Choice { name: model.model.clone(), path: model.path.clone(), kind: model.kind };
    // A count is of the engine's own defaults, as agentd loads.
    let of_it = |counted: &&Counted| {
        let same =
            counted.kind == ModelKind::Embedding || counted.plan.context_tokens == model.context_tokens;
        same && counted.plan.placement == model.placement && counted.holds(&choice, ledger)
    };
    match (counts.get(&model.path).filter(of_it), &model.placement) {
        (Some(counted), _) => planned.counted(&counted.plan, ledger),
        (None, Some(placement)) => planned.need_at(ledger, placement),
        (None, None) => planned.need(ledger),
    }
}

/// A file's header, or nothing where the file or the header is bad.
fn header(path: &str) -> Option<gguf::Summary> {
    let file = File::open(Path::new(path)).ok()?;
    let bytes = file.metadata().ok()?.len();
    gguf::check(bytes, &mut |at, into| file.read_exact_at(into, at).map_err(|error| error.to_string())).ok()
}
