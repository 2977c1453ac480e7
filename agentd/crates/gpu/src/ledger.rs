//! Who holds what, and does one more thing fit?
//!
//! Owns:  devices with their reserves, loaded models, leases of cells, partitions, who is in which.
//! In:    what the engine has and says; what is asked for. Out: yes, or a [`Refusal`]; a view of all.
//!
//! ```text
//! load ──▶ held ── exact: the engine's own numbers ──▶ held ── unload, device gone, engine lost ──▶ nothing
//!                     └── lease ──▶ cells ── release, unload, engine lost ──▶ free
//! ```
//!
//! Always (tests/`properties`): on each device reserve, models and overhead together are at most what it has; a model's
//! leases are at most its cells; a partition's models and its agents' cells elsewhere are at most its bytes; what is
//! guaranteed to others is left free by a load; when all is unloaded and released, nothing is held.
//! A model's weights are counted once, whoever uses it, and charged to the partition it was loaded for. Shares that are
//! shown to the partitions that use it are cut out of that charge, so their sum is exact.
//! Never: what a device reports. That is shown beside the plan; only what exceeds the plan is learned.

#[cfg(test)]
mod tests;
mod view;

use crate::admission::Refusal;
use crate::partition::{self, Room};
use agentd_domain::device::DeviceAction;
use agentd_domain::engine::{GpuReadings, HolderUsage, ModelUsage};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::ledger::{BLOCK_CELLS, DeviceNeed, Enforcement, Held, Need, Partition, PartitionId};
use std::collections::BTreeMap;

/// Agents that others started, at work at the same time.
const BENEATH_MOST: usize = 4096;

/// Asked with what fits, says which context would: [`crate::plan::longest_context`] with a plan's numbers.
pub type Longest<'a> = &'a dyn Fn(&dyn Fn(&Need) -> bool) -> u64;

/// Room on devices: beside what they hold, or were all else gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Now,
    Alone,
}

/// A device as the engine reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    pub name: String,
    pub description: String,
    pub kind: String,
    pub total_bytes: u64,
    pub reserve_bytes: u64,
    pub reported_free_bytes: u64,
    pub enforcement: Enforcement,
    /// Why nothing new is put on it.
    pub problem: Option<String>,
    pub gpu: Option<GpuReadings>,
}

impl Device {
    /// Host memory, as llama.cpp calls it.
    pub fn is_host(&self) -> bool {
        self.kind == "cpu"
    }
}

#[derive(Debug, Clone, Default)]
pub struct Ledger {
    devices: Vec<Device>,
    /// Learned: what the device's runtime takes besides the models, and what was seen last.
    overhead: BTreeMap<String, u64>,
    used: BTreeMap<String, u64>,
    partitions: Vec<Partition>,
    assigned: BTreeMap<AgentId, PartitionId>,
    /// Agents that stand where another does: those that it started.
    beneath: BTreeMap<AgentId, AgentId>,
    models: BTreeMap<String, Instance>,
    /// Shares of agents' own programs, by the name of what holds one: a run.
    strangers: BTreeMap<String, Stranger>,
}

/// A share that a program of an agent drives by itself, held to it by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    pub agent: AgentId,
    pub device: String,
    pub bytes: u64,
}

#[derive(Debug, Clone)]
struct Instance {
    partition: PartitionId,
    /// Without overhead, which is the device's.
    need: Need,
    /// What agents hold of its cells.
    leases: BTreeMap<AgentId, u64>,
    /// What the engine said of them when it was asked last. Shown in the place of leases, and decides nothing.
    seen: Option<Seen>,
}

#[derive(Debug, Clone)]
struct Seen {
    agents: BTreeMap<AgentId, HolderUsage>,
    usage: ModelUsage,
}

impl Instance {
    fn bytes_on(&self, devices: &[String]) -> u64 {
        let on = self.need.devices.iter().filter(|need| devices.contains(&need.device));
        on.fold(0, |sum: u64, need| sum.saturating_add(need.total_bytes()))
    }

    fn held_cells(&self) -> u64 {
        self.leases.values().fold(0, |sum: u64, cells| sum.saturating_add(blocks(*cells)))
    }

    fn lease_bytes(&self, cells: u64) -> u64 {
        blocks(cells).saturating_mul(self.need.kv_bytes_per_cell)
    }
}

/// Cells are given away in blocks.
fn blocks(cells: u64) -> u64 {
    cells.checked_next_multiple_of(BLOCK_CELLS).unwrap_or(u64::MAX)
}

impl Ledger {
    /// What the engine has. Models on a device that is gone are gone with it.
    pub fn set_devices(&mut self, devices: Vec<Device>) {
        let names = |devices: &[Device]| devices.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
        if names(&self.devices) != names(&devices) {
            // Other devices come with another engine: what sequences held of the old one's cells is gone.
            self.models.values_mut().for_each(|instance| instance.leases.clear());
        }
        self.devices = devices;
        let devices = &self.devices;
        let is_there = |name: &str| devices.iter().any(|device| device.name == name);
        self.models.retain(|_, instance| instance.need.devices.iter().all(|need| is_there(&need.device)));
        self.used.retain(|name, _| is_there(name));
        // A partition that lost a device is not in force; what it has left is the default's.
        let gone: Vec<String> = self
            .models
            .iter()
            .filter(|(_, one)| !one.partition.is_default() && !self.in_force(&one.partition))
            .map(|(model, _)| model.clone())
            .collect();
        for model in gone {
            if let Some(instance) = self.models.get_mut(&model) {
                instance.partition = PartitionId::default_partition();
            }
        }
        // A device may have become smaller: what does not fit any more was lost by it.
        while let Some(name) = self.overfull() {
            let last = self.models.iter().rev().find(|(_, instance)| instance.need.on(&name).is_some());
            let Some(model) = last.map(|(model, _)| model.clone()) else { break };
            self.models.remove(&model);
        }
    }

    fn overfull(&self) -> Option<String> {
        let over = |device: &&Device| {
            let planned = self.planned_on(&device.name);
            let taken = device.reserve_bytes.saturating_add(self.strangers_on(&device.name));
            taken.saturating_add(planned) > device.total_bytes && planned > 0
        };
        self.devices.iter().find(over).map(|device| device.name.clone())
    }

    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    pub fn partitions(&self) -> &[Partition] {
        &self.partitions
    }

    /// As they are stored: checked when they were set, perhaps with other devices. What does not hold now is not in
    /// force.
    pub fn restore(&mut self, partitions: Vec<Partition>, assigned: BTreeMap<AgentId, PartitionId>) {
        self.partitions = partitions;
        self.assigned = assigned;
    }

    /// Defines a partition, or changes it.
    pub fn set_partition(&mut self, new: Partition) -> Result<(), Vec<Report>> {
        let mut after = self.clone();
        after.partitions.retain(|old| old.id != new.id);
        after.partitions.push(new.clone());
        after.partitions.sort_by(|a, b| a.id.cmp(&b.id));
        let mut wrong = partition::check(&new, &self.partitions, &self.rooms(), &|id| after.charged(id));
        if wrong.is_empty() && new.guaranteed {
            let sum = |of: &dyn Fn(&String) -> u64| new.devices.iter().map(of).fold(0, u64::saturating_add);
            let free_bytes = sum(&|device| after.free_on(device));
            let promised = after
                .partitions_in_force()
                .into_iter()
                .filter(|one| one.guaranteed && partition::shares(one, &new.devices));
            let unused = promised.fold(0, |sum: u64, one| {
                sum.saturating_add(one.bytes.saturating_sub(after.charged(&one.id)))
            });
            if unused > free_bytes {
                let report = Refusal::BudgetExceeded {
                    partition: new.id.clone(),
                    short_bytes: unused - free_bytes,
                    device: new.devices.first().cloned(),
                    held: new.devices.first().map(|device| after.held_on(device)).unwrap_or_default(),
                    guaranteed_bytes: unused,
                };
                wrong.push(report.report(&format!("the partition {} was not set", new.id)));
            }
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        *self = after;
        Ok(())
    }

    /// Its agents are in the default partition from then on, and so are its models.
    pub fn remove_partition(&mut self, id: &PartitionId) -> Result<(), Refusal> {
        if !self.partitions.iter().any(|one| one.id == *id) {
            return Err(Refusal::UnknownPartition { partition: id.clone() });
        }
        let default = PartitionId::default_partition();
        let bytes = |ledger: &Self| ledger.partition(&default).map_or(0, |one| one.bytes);
        let mut after = self.clone();
        after.partitions.retain(|one| one.id != *id);
        after.assigned.retain(|_, of| of != id);
        for instance in after.models.values_mut().filter(|instance| instance.partition == *id) {
            instance.partition = default.clone();
        }
        // Its bytes become the default's only where they were guaranteed.
        let (has, holds) = (bytes(&after), after.charged(&default));
        if holds > has {
            return Err(after.exceeded(&default, holds - has, None));
        }
        *self = after;
        Ok(())
    }

    /// Which partition an agent is in from now on. Its cells move with it if they fit there. One that is not in force has
    /// the agent as soon as it is; until then the agent is in the default one.
    pub fn assign(&mut self, agent: AgentId, to: &PartitionId) -> Result<(), Refusal> {
        let unknown = || Refusal::UnknownPartition { partition: to.clone() };
        if !to.is_default() && !self.partitions.iter().any(|one| one.id == *to) {
            return Err(unknown());
        }
        let now = if self.in_force(to) { to.clone() } else { PartitionId::default_partition() };
        let partition = self.partition(&now).ok_or_else(unknown)?;
        let mut after = self.clone();
        if to.is_default() {
            after.assigned.remove(&agent);
        } else {
            after.assigned.insert(agent, to.clone());
        }
        let holds = after.charged(&now);
        if holds > partition.bytes {
            return Err(after.exceeded(&now, holds - partition.bytes, None));
        }
        // Where it was it may have used cells of the partition's own models for nothing.
        *self = after;
        Ok(())
    }

    pub fn forget(&mut self, agent: AgentId) {
        self.assigned.remove(&agent);
        self.beneath.remove(&agent);
        self.models.values_mut().for_each(|instance| {
            instance.leases.remove(&agent);
        });
    }

    /// Where nobody assigned an agent, it is where `above` is.
    pub fn put_beneath(&mut self, agent: AgentId, above: AgentId) {
        self.beneath.insert(agent, above);
        // Ids sort by their age: of those that ended long ago nobody asks any more.
        if self.beneath.len() > BENEATH_MOST {
            self.beneath.pop_first();
        }
    }

    pub fn partition_of(&self, agent: AgentId) -> PartitionId {
        let above = || self.assigned.get(self.beneath.get(&agent)?);
        let set = self.assigned.get(&agent).or_else(above).filter(|id| self.in_force(id));
        set.cloned().unwrap_or_else(PartitionId::default_partition)
    }

    pub fn assigned(&self) -> &BTreeMap<AgentId, PartitionId> {
        &self.assigned
    }

    fn in_force(&self, id: &PartitionId) -> bool {
        self.partitions_in_force().iter().any(|one| one.id == *id)
    }

    fn partitions_in_force(&self) -> Vec<&Partition> {
        partition::in_force(&self.partitions, &self.rooms())
    }

    /// One that is in force, the default included.
    pub fn partition(&self, id: &PartitionId) -> Option<Partition> {
        if id.is_default() {
            return Some(partition::default_partition(&self.partitions, &self.rooms()));
        }
        self.partitions_in_force().into_iter().find(|one| one.id == *id).cloned()
    }

    pub fn rooms(&self) -> Vec<Room> {
        let room = |device: &Device| Room {
            device: device.name.clone(),
            bytes: device.total_bytes.saturating_sub(device.reserve_bytes),
        };
        self.devices.iter().map(room).collect()
    }

    /// llama.cpp's name of host memory.
    pub fn host(&self) -> &str {
        self.devices.iter().find(|device| device.is_host()).map_or("CPU", |device| device.name.as_str())
    }

    /// Devices that a model of this partition may be placed on, in the engine's order, with the bytes it may have there.
    /// Those with memory of their own; where there are none, those that compute in the host's. One that is ill takes
    /// nothing new, unless all are: then a load is refused for that.
    pub fn rooms_for(&self, id: &PartitionId, when: When) -> Vec<(String, u64)> {
        let Some(partition) = self.partition(id) else { return Vec::new() };
        let of_kind = |kind: &str| {
            let of =
                self.devices.iter().filter(|one| one.kind == kind && partition.devices.contains(&one.name));
            of.collect::<Vec<_>>()
        };
        let own = of_kind("gpu");
        let mut devices = if own.is_empty() { of_kind("igpu") } else { own };
        if devices.iter().any(|device| device.problem.is_none()) {
            devices.retain(|device| device.problem.is_none());
        }
        // After a bad link nothing is put on both of its ends: the first stands for those that are left.
        let linked = |device: &Device| {
            device.gpu.as_ref().is_none_or(|gpu| gpu.health.action != DeviceAction::AvoidSplit)
        };
        if devices.len() > 1 && !devices.iter().all(|device| linked(device)) {
            let any = devices.first().copied();
            devices.retain(|device| linked(device));
            if devices.is_empty() {
                devices.extend(any);
            }
        }
        let room = |device: &Device| {
            let name = device.name.as_str();
            match when {
                When::Alone => self.room_alone(&partition, name),
                When::Now => self
                    .free_on(name)
                    .saturating_sub(self.overhead_due(name))
                    .saturating_sub(self.kept_for_others(id, name))
                    .min(partition.bytes.saturating_sub(self.charged(id))),
            }
        };
        devices.into_iter().map(|device| (device.name.clone(), room(device).min(partition.bytes))).collect()
    }

    /// What would have to be paid for a device's runtime by a model that is its first.
    pub fn overhead_due(&self, device: &str) -> u64 {
        let first = !self.models.values().any(|instance| instance.need.on(device).is_some());
        if first { self.overhead.get(device).copied().unwrap_or(0) } else { 0 }
    }

    /// Whether a model of this need may be loaded for this partition. `longest` says which context would fit so many
    /// bytes by device, for the refusal.
    pub fn admit(
        &self,
        model: &str,
        id: &PartitionId,
        need: &Need,
        longest: Longest<'_>,
    ) -> Result<(), Refusal> {
        let Some(partition) = self.partition(id) else {
            return Err(Refusal::UnknownPartition { partition: id.clone() });
        };
        for part in &need.devices {
            let device = self.devices.iter().find(|device| device.name == part.device);
            let why = match device {
                None => Some("it is not there".to_owned()),
                Some(device) => device.problem.clone(),
            };
            if let Some(why) = why {
                return Err(Refusal::DeviceUnhealthy { device: part.device.clone(), why });
            }
        }
        let others = self.without(model);
        let too_large = |needs_bytes, budget_bytes, device: Option<&str>| Refusal::ModelTooLarge {
            model: model.to_owned(),
            partition: id.clone(),
            needs_bytes,
            budget_bytes,
            device: device.map(str::to_owned),
            context_tokens_most: longest(&|need| self.fits_alone(&partition, need)),
        };
        let wants = within(need, &partition.devices);
        if wants > partition.bytes {
            return Err(too_large(wants, partition.bytes, None));
        }
        for part in &need.devices {
            let room = self.room_alone(&partition, &part.device);
            if whole(part) > room {
                return Err(too_large(whole(part), room, Some(&part.device)));
            }
        }
        let held = others.charged(id);
        if held.saturating_add(wants) > partition.bytes {
            return Err(others.exceeded(id, held.saturating_add(wants) - partition.bytes, None));
        }
        for part in &need.devices {
            let free = others.free_on(&part.device).saturating_sub(others.kept_for_others(id, &part.device));
            let due = others.overhead_due(&part.device);
            let wants = whole(part).saturating_add(due);
            if wants > free {
                return Err(others.exceeded(id, wants - free, Some(&part.device)));
            }
        }
        Ok(())
    }

    /// The longest context for this partition on an otherwise empty machine; 0 where the partition is not in force.
    pub fn longest_alone(&self, id: &PartitionId, longest: Longest<'_>) -> u64 {
        self.partition(id).map_or(0, |partition| longest(&|need| self.fits_alone(&partition, need)))
    }

    /// Admits and holds. A model of the same name is replaced, and its leases with it.
    pub fn load(
        &mut self,
        model: &str,
        id: &PartitionId,
        need: Need,
        longest: Longest<'_>,
    ) -> Result<(), Refusal> {
        self.admit(model, id, &need, longest)?;
        self.hold(model, id, need);
        Ok(())
    }

    fn hold(&mut self, model: &str, id: &PartitionId, mut need: Need) {
        need.devices.iter_mut().for_each(|part| part.overhead_bytes = 0);
        let instance = Instance { partition: id.clone(), need, leases: BTreeMap::new(), seen: None };
        self.models.insert(model.to_owned(), instance);
    }

    /// A model that the engine holds already, because agentd was restarted: it is there, whatever a plan says. Where the
    /// plan is larger than what the device has beside guarantees it is cut, first where it is an estimate.
    pub fn adopt(&mut self, model: &str, need: Need) {
        let id = PartitionId::default_partition();
        self.models.remove(model);
        let mut need = need;
        need.devices.retain(|part| self.devices.iter().any(|device| device.name == part.device));
        let mut budget = self.partition(&id).map_or(0, |one| one.bytes).saturating_sub(self.charged(&id));
        for part in &mut need.devices {
            part.overhead_bytes = 0;
            let kept = self.kept_for_others(&id, &part.device);
            let room = self.room_left(&part.device).saturating_sub(kept).min(budget);
            cut(part, room);
            budget = budget.saturating_sub(part.total_bytes());
        }
        self.hold(model, &id, need);
    }

    /// The engine's own breakdown takes the place of the plan, if it fits; otherwise the plan stands and the caller
    /// unloads the model.
    pub fn exact(&mut self, model: &str, need: Need) -> Result<(), Refusal> {
        let Some(instance) = self.models.get(model) else {
            return Err(Refusal::UnknownModel { model: model.to_owned() });
        };
        // A breakdown comes before the first request. Leases of other cells than these were nobody's.
        let same = |new: &Need| {
            new.cells == instance.need.cells && new.kv_bytes_per_cell == instance.need.kv_bytes_per_cell
        };
        let (id, leases) = (instance.partition.clone(), instance.leases.clone());
        let keeps = same(&need);
        self.load(model, &id, need, &|_| 0)?;
        if let Some(instance) = self.models.get_mut(model).filter(|_| keeps) {
            instance.leases = leases;
        }
        Ok(())
    }

    /// Holds a share for an agent's own program, in place of what the same holder had. It is charged to the agent's
    /// partition where that is on the device, and leaves what was guaranteed to others.
    pub fn admit_stranger(&mut self, holder: &str, wants: Stranger) -> Result<(), Refusal> {
        let mut after = self.clone();
        after.strangers.remove(holder);
        let ill = |why: String| Refusal::DeviceUnhealthy { device: wants.device.clone(), why };
        let Some(device) = after.devices.iter().find(|device| device.name == wants.device) else {
            return Err(ill("it is not there".to_owned()));
        };
        if let Some(why) = &device.problem {
            return Err(ill(why.clone()));
        }
        let id = after.partition_of(wants.agent);
        let partition = after.partition(&id).filter(|one| one.devices.contains(&wants.device));
        let Some(partition) = partition else { return Err(Refusal::UnknownPartition { partition: id }) };
        let held = after.charged(&id).saturating_add(wants.bytes);
        if held > partition.bytes {
            return Err(after.exceeded(&id, held - partition.bytes, None));
        }
        let kept = after.kept_for_others(&id, &wants.device);
        let free = after.free_on(&wants.device).saturating_sub(kept);
        if wants.bytes > free {
            return Err(after.exceeded(&id, wants.bytes - free, Some(&wants.device)));
        }
        after.strangers.insert(holder.to_owned(), wants);
        *self = after;
        Ok(())
    }

    /// One that runs already, because agentd was restarted: it has its share, whatever else there is.
    pub fn adopt_stranger(&mut self, holder: &str, has: Stranger) {
        self.strangers.insert(holder.to_owned(), has);
    }

    pub fn release_stranger(&mut self, holder: &str) {
        self.strangers.remove(holder);
    }

    /// What agents' own programs have of a device.
    pub fn strangers_on(&self, device: &str) -> u64 {
        let on = self.strangers.values().filter(|one| one.device == device);
        on.fold(0, |sum: u64, one| sum.saturating_add(one.bytes))
    }

    fn charged_strangers(&self, partition: &Partition) -> u64 {
        let of = self.strangers.values().filter(|one| {
            partition.devices.contains(&one.device) && self.partition_of(one.agent) == partition.id
        });
        of.fold(0, |sum: u64, one| sum.saturating_add(one.bytes))
    }

    pub fn unload(&mut self, model: &str) {
        self.models.remove(model);
    }

    /// The process is gone, and all that it held with it. What was learned of its devices stays.
    pub fn engine_lost(&mut self) {
        self.models.clear();
        self.used.clear();
    }

    pub fn models(&self) -> impl Iterator<Item = &str> {
        self.models.keys().map(String::as_str)
    }

    pub fn need(&self, model: &str) -> Option<&Need> {
        self.models.get(model).map(|instance| &instance.need)
    }

    /// What was seen to be used of a device by the engine. What exceeds the plan is its runtime's, and is kept free for
    /// it from now on: CUDA's pool grows with load and never shrinks while the process lives.
    pub fn learn(&mut self, device: &str, used_bytes: u64) {
        if !self.devices.iter().any(|one| one.name == device) {
            return;
        }
        self.used.insert(device.to_owned(), used_bytes);
        let beyond = used_bytes.saturating_sub(self.planned_on(device));
        if self.planned_on(device) > 0 && beyond > self.overhead.get(device).copied().unwrap_or(0) {
            self.overhead.insert(device.to_owned(), beyond);
        }
    }

    /// What the engine says of its models' caches. Holders that are no agents belong to no partition.
    pub fn saw(&mut self, usages: &[ModelUsage]) {
        for (model, instance) in &mut self.models {
            let usage = usages.iter().find(|usage| usage.model == *model);
            instance.seen = usage.map(|usage| {
                let agent = |one: &HolderUsage| Some((one.holder.parse().ok()?, one.clone()));
                let agents = usage.holders.iter().filter_map(agent).collect();
                Seen { agents, usage: ModelUsage { holders: Vec::new(), ..usage.clone() } }
            });
        }
    }

    /// What was learned of a device: what it takes besides its models.
    pub fn overhead(&self, device: &str) -> u64 {
        self.overhead.get(device).copied().unwrap_or(0)
    }

    /// What an earlier life has learned; what this one knows better stays.
    pub fn restore_overhead(&mut self, learned: &BTreeMap<String, u64>) {
        for (device, bytes) in learned {
            let known = self.overhead.entry(device.clone()).or_default();
            *known = (*known).max(*bytes);
        }
    }

    /// The partition that a model was loaded for.
    pub fn loaded_for(&self, model: &str) -> Option<PartitionId> {
        self.models.get(model).map(|instance| instance.partition.clone())
    }

    /// How many cells of a model an agent may hold, all it holds now included.
    pub fn cells_most(&self, model: &str, agent: AgentId) -> u64 {
        let Some(instance) = self.models.get(model) else { return 0 };
        let id = self.partition_of(agent);
        if instance.partition == id {
            return instance.need.cells;
        }
        let bytes = self.partition(&id).map_or(0, |one| one.bytes);
        let own = instance.leases.get(&agent).map_or(0, |cells| instance.lease_bytes(*cells));
        let left = bytes.saturating_sub(self.charged(&id).saturating_sub(own));
        let cells = left.checked_div(instance.need.kv_bytes_per_cell).unwrap_or(instance.need.cells);
        cells.min(instance.need.cells) / BLOCK_CELLS * BLOCK_CELLS
    }

    /// Whether a request can ever run: prompt and answer within what the agent may hold.
    pub fn admit_request(
        &self,
        model: &str,
        agent: AgentId,
        prompt_cells: u64,
        answer_cells: u64,
    ) -> Result<(), Refusal> {
        if !self.models.contains_key(model) {
            return Err(Refusal::UnknownModel { model: model.to_owned() });
        }
        let (needs_cells, has_cells) =
            (prompt_cells.saturating_add(answer_cells), self.cells_most(model, agent));
        if needs_cells > has_cells {
            let partition = self.partition_of(agent);
            return Err(Refusal::ContextExceedsBudget { partition, needs_cells, has_cells, prompt_cells });
        }
        Ok(())
    }

    /// Gives an agent so many cells of a model, in place of what it had. More than it may have, or than are free, is
    /// refused and changes nothing.
    pub fn lease(&mut self, model: &str, agent: AgentId, cells: u64) -> Result<(), Refusal> {
        let most = self.cells_most(model, agent);
        let partition = self.partition_of(agent);
        let Some(instance) = self.models.get_mut(model) else {
            return Err(Refusal::UnknownModel { model: model.to_owned() });
        };
        if blocks(cells) > most {
            return Err(Refusal::ContextExceedsBudget {
                partition,
                needs_cells: cells,
                has_cells: most,
                prompt_cells: cells,
            });
        }
        let had = instance.leases.get(&agent).copied().map_or(0, blocks);
        let others = instance.held_cells() - had;
        let free = instance.need.cells.saturating_sub(others);
        if blocks(cells) > free {
            let short_bytes = (blocks(cells) - free).saturating_mul(instance.need.kv_bytes_per_cell);
            return Err(self.exceeded(&partition, short_bytes, None));
        }
        if cells == 0 {
            instance.leases.remove(&agent);
        } else {
            instance.leases.insert(agent, cells);
        }
        Ok(())
    }

    pub fn release(&mut self, model: &str, agent: AgentId) {
        if let Some(instance) = self.models.get_mut(model) {
            instance.leases.remove(&agent);
        }
    }

    /// What counts against a partition's bytes: models that were loaded for it, on its devices, and cells that its
    /// agents hold of others' models there.
    pub fn charged(&self, id: &PartitionId) -> u64 {
        let Some(partition) = self.partition(id) else { return 0 };
        self.models.values().fold(self.charged_strangers(&partition), |sum: u64, instance| {
            let bytes = if instance.partition == *id {
                instance.bytes_on(&partition.devices)
            } else {
                self.leased_by(instance, id)
            };
            sum.saturating_add(bytes)
        })
    }

    fn leased_by(&self, instance: &Instance, id: &PartitionId) -> u64 {
        let of = instance.leases.iter().filter(|(agent, _)| self.partition_of(**agent) == *id);
        of.fold(0, |sum: u64, (_, cells)| sum.saturating_add(instance.lease_bytes(*cells)))
    }

    /// Of all models on a device, without its runtime's overhead.
    fn planned_on(&self, device: &str) -> u64 {
        let parts = self.models.values().filter_map(|instance| instance.need.on(device));
        parts.fold(0, |sum: u64, part| sum.saturating_add(part.total_bytes()))
    }

    fn room_left(&self, device: &str) -> u64 {
        let room = self.rooms().into_iter().find(|room| room.device == device).map_or(0, |room| room.bytes);
        room.saturating_sub(self.planned_on(device)).saturating_sub(self.strangers_on(device))
    }

    /// What is charged for a device's runtime: what was learned, as far as there is room for it.
    fn overhead_on(&self, device: &str) -> u64 {
        if self.overhead_due(device) > 0 {
            return 0;
        }
        self.overhead.get(device).copied().unwrap_or(0).min(self.room_left(device))
    }

    pub fn free_on(&self, device: &str) -> u64 {
        self.room_left(device).saturating_sub(self.overhead_on(device))
    }

    /// What a device has for one model of this partition when nothing else is loaded.
    fn room_alone(&self, partition: &Partition, device: &str) -> u64 {
        let room = self.rooms().into_iter().find(|room| room.device == device).map_or(0, |room| room.bytes);
        let overhead = self.overhead.get(device).copied().unwrap_or(0);
        let guaranteed = self.guarantees(&partition.id, device, &|one| one.bytes);
        let strangers = self.strangers_on(device);
        room.saturating_sub(overhead).saturating_sub(guaranteed).saturating_sub(strangers)
    }

    fn fits_alone(&self, partition: &Partition, need: &Need) -> bool {
        within(need, &partition.devices) <= partition.bytes
            && need.devices.iter().all(|part| whole(part) <= self.room_alone(partition, &part.device))
    }

    /// Bytes of a device that a load for `id` must leave: what others were guaranteed and do not use yet.
    fn kept_for_others(&self, id: &PartitionId, device: &str) -> u64 {
        self.guarantees(id, device, &|one| one.bytes.saturating_sub(self.charged(&one.id)))
    }

    /// Over several devices nobody can say yet where a guaranteed partition will want its bytes, so each of its devices
    /// keeps as many as it has at most.
    fn guarantees(&self, id: &PartitionId, device: &str, bytes: &dyn Fn(&Partition) -> u64) -> u64 {
        let of = self
            .partitions_in_force()
            .into_iter()
            .filter(|one| one.guaranteed && one.id != *id && one.devices.iter().any(|name| name == device));
        of.fold(0, |sum: u64, one| sum.saturating_add(bytes(one)))
    }

    fn without(&self, model: &str) -> Self {
        let mut others = self.clone();
        others.models.remove(model);
        others
    }

    fn exceeded(&self, id: &PartitionId, short_bytes: u64, device: Option<&str>) -> Refusal {
        let held = match device {
            None => self.held(id),
            Some(device) => self.held_on(device),
        };
        Refusal::BudgetExceeded {
            partition: id.clone(),
            short_bytes,
            device: device.map(str::to_owned),
            held,
            guaranteed_bytes: device.map_or(0, |device| self.kept_for_others(id, device)),
        }
    }

    /// All models on a device, by class.
    fn held_on(&self, device: &str) -> Held {
        let mut held = Held::default();
        for part in self.models.values().filter_map(|instance| instance.need.on(device)) {
            held.weights_bytes = held.weights_bytes.saturating_add(part.weights_bytes);
            held.kv_bytes = held.kv_bytes.saturating_add(part.kv_bytes);
            held.compute_bytes = held.compute_bytes.saturating_add(computing(part));
        }
        held.compute_bytes = held.compute_bytes.saturating_add(self.overhead_on(device));
        held
    }
}

/// All that is neither weights nor keys and values.
fn computing(part: &DeviceNeed) -> u64 {
    part.compute_bytes.saturating_add(part.recurrent_bytes).saturating_add(part.overhead_bytes)
}

/// Without overhead: that is the device's.
fn whole(part: &DeviceNeed) -> u64 {
    part.total_bytes().saturating_sub(part.overhead_bytes)
}

fn within(need: &Need, devices: &[String]) -> u64 {
    let on = need.devices.iter().filter(|part| devices.contains(&part.device));
    on.fold(0, |sum: u64, part| sum.saturating_add(whole(part)))
}

/// Makes a part no larger than `most`, taking first from what is only estimated.
fn cut(part: &mut DeviceNeed, most: u64) {
    let mut over = part.total_bytes().saturating_sub(most);
    for bytes in
        [&mut part.compute_bytes, &mut part.recurrent_bytes, &mut part.kv_bytes, &mut part.weights_bytes]
    {
        let less = over.min(*bytes);
        *bytes -= less;
        over -= less;
    }
}
