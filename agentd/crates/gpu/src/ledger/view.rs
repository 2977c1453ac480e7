//! Who holds how much of what, as it is shown.
//!
//! Cells are the engine's word, where it has said one, else what was leased.
//! Always: the shares of a model's weights sum up to its weights exactly, and no share makes a partition's sum exceed its
//! bytes.

use super::{Device, Instance, Ledger, blocks, computing};
use crate::partition;
use agentd_domain::engine::ModelUsage;
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, AgentName};
use agentd_domain::ledger::{
    AgentHold, DeviceNeed, DeviceView, Devices, Enforcement, Held, ModelView, PartitionId, PartitionView,
};
use std::collections::{BTreeMap, BTreeSet};

impl Ledger {
    /// What a partition holds, by class.
    pub fn held(&self, id: &PartitionId) -> Held {
        self.shares().remove(id).unwrap_or_default()
    }

    /// All of it. `names` gives agents their names.
    pub fn view(&self, names: &dyn Fn(AgentId) -> Option<AgentName>) -> Devices {
        let shares = self.shares();
        let default = PartitionId::default_partition();
        let mut partitions: Vec<PartitionView> = self
            .partition(&default)
            .into_iter()
            .map(|one| self.show_partition(one, &shares, names))
            .collect();
        partitions.extend(self.partitions.iter().map(|one| self.show_partition(one.clone(), &shares, names)));
        Devices {
            devices: self.devices.iter().map(|device| self.show_device(device)).collect(),
            partitions,
            models: self.models.iter().map(|(model, instance)| show_model(model, instance)).collect(),
        }
    }

    fn show_device(&self, device: &Device) -> DeviceView {
        let mut planned = DeviceNeed { device: device.name.clone(), ..DeviceNeed::default() };
        for part in self.models.values().filter_map(|instance| instance.need.on(&device.name)) {
            for (sum, bytes) in [
                (&mut planned.weights_bytes, part.weights_bytes),
                (&mut planned.kv_bytes, part.kv_bytes),
                (&mut planned.recurrent_bytes, part.recurrent_bytes),
                (&mut planned.compute_bytes, part.compute_bytes),
            ] {
                *sum = sum.saturating_add(bytes);
            }
        }
        let used = self.used.get(&device.name).copied();
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let before_overhead = planned.total_bytes();
        planned.overhead_bytes = self.overhead_on(&device.name);
        DeviceView {
            name: device.name.clone(),
            description: device.description.clone(),
            kind: device.kind.clone(),
            total_bytes: device.total_bytes,
            reserve_bytes: device.reserve_bytes,
            free_bytes: self.free_on(&device.name),
            planned,
            reported_free_bytes: device.reported_free_bytes,
            used_bytes: used,
            difference_bytes: used.map(|used| signed(used).saturating_sub(signed(before_overhead))),
            programs_bytes: self.strangers_on(&device.name),
            granted_to: None,
            enforcement: device.enforcement,
            problem: device.problem.as_ref().map(|why| ill(&device.name, why)),
            gpu: device.gpu.clone(),
        }
    }

    fn show_partition(
        &self,
        one: agentd_domain::ledger::Partition,
        shares: &BTreeMap<PartitionId, Held>,
        names: &dyn Fn(AgentId) -> Option<AgentName>,
    ) -> PartitionView {
        let in_force = self.partition(&one.id).is_some();
        let rooms = self.rooms();
        let missing: Vec<&str> = one
            .devices
            .iter()
            .filter(|device| !rooms.iter().any(|room| room.device == **device))
            .map(String::as_str)
            .collect();
        let limits: Vec<Enforcement> = self
            .devices
            .iter()
            .filter(|device| one.devices.contains(&device.name))
            .map(|device| device.enforcement)
            .collect();
        let devices_free = one.devices.iter().map(|device| self.free_on(device)).fold(0, u64::saturating_add);
        let left = one.bytes.saturating_sub(self.charged(&one.id));
        PartitionView {
            builtin: one.id.is_default(),
            configured: false,
            enforcement: partition::enforcement(&limits),
            held: shares.get(&one.id).copied().unwrap_or_default(),
            free_bytes: if in_force { left.min(devices_free) } else { 0 },
            agents: self.agents_of(&one.id, names),
            problem: (!in_force).then(|| not_in_force(&one.id, &missing)),
            partition: one,
        }
    }

    /// Those that were assigned, and those that hold cells or wait for some.
    fn agents_of(&self, id: &PartitionId, names: &dyn Fn(AgentId) -> Option<AgentName>) -> Vec<AgentHold> {
        let holding = self.models.values().flat_map(Instance::holders);
        let assigned = self.assigned.iter().filter(|(_, of)| *of == id).map(|(agent, _)| *agent);
        let agents: BTreeSet<AgentId> =
            holding.filter(|agent| self.partition_of(*agent) == *id).chain(assigned).collect();
        let hold = |agent: AgentId| {
            let start = AgentHold::nothing(agent, names(agent));
            self.models.values().fold(start, |hold, instance| instance.add_to(hold))
        };
        agents.into_iter().map(hold).collect()
    }

    /// What each partition holds. Who uses a model that was loaded for another is shown a share of it by weight, as far
    /// as its own bytes reach; the rest is the owner's, who was admitted with all of it.
    pub(super) fn shares(&self) -> BTreeMap<PartitionId, Held> {
        let mut shares: BTreeMap<PartitionId, Held> = BTreeMap::new();
        let mut left: BTreeMap<PartitionId, u64> = BTreeMap::new();
        for instance in self.models.values() {
            let owner = self.partition(&instance.partition);
            let devices = owner.as_ref().map(|one| one.devices.clone()).unwrap_or_default();
            let on = instance.need.devices.iter().filter(|part| devices.contains(&part.device));
            let (mut weights, mut kv, mut compute) = (0_u64, 0_u64, 0_u64);
            for part in on {
                weights = weights.saturating_add(part.weights_bytes);
                kv = kv.saturating_add(part.kv_bytes);
                compute = compute.saturating_add(computing(part));
            }
            let users: BTreeSet<PartitionId> = instance
                .holders()
                .map(|agent| self.partition_of(agent))
                .filter(|id| *id != instance.partition)
                .collect();
            let weight = |id: &PartitionId| self.partition(id).map_or(0, |one| u64::from(one.weight));
            let all = users.iter().map(weight).sum::<u64>() + weight(&instance.partition);
            let (whole_weights, whole_compute) = (weights, compute);
            for user in users {
                let free = left.entry(user.clone()).or_insert_with(|| {
                    let bytes = self.partition(&user).map_or(0, |one| one.bytes);
                    bytes.saturating_sub(self.charged(&user)).saturating_sub(self.seen_elsewhere(&user))
                });
                let share = |bytes: u64| {
                    let part = u128::from(bytes) * u128::from(weight(&user));
                    u64::try_from(part.checked_div(u128::from(all)).unwrap_or(0)).unwrap_or(u64::MAX)
                };
                let held = shares.entry(user.clone()).or_default();
                let of_weights = share(whole_weights).min(*free);
                *free -= of_weights;
                let of_compute = share(whole_compute).min(*free);
                *free -= of_compute;
                let cells = self.held_by(instance, &user);
                held.weights_bytes = held.weights_bytes.saturating_add(of_weights);
                held.compute_bytes = held.compute_bytes.saturating_add(of_compute);
                held.kv_bytes = held.kv_bytes.saturating_add(cells);
                weights -= of_weights;
                compute -= of_compute;
                kv = kv.saturating_sub(cells);
            }
            let held = shares.entry(instance.partition.clone()).or_default();
            held.weights_bytes = held.weights_bytes.saturating_add(weights);
            held.kv_bytes = held.kv_bytes.saturating_add(kv);
            held.compute_bytes = held.compute_bytes.saturating_add(compute);
        }
        shares
    }
}

impl Ledger {
    /// Bytes of a model's cells that a partition's agents hold.
    fn held_by(&self, instance: &Instance, id: &PartitionId) -> u64 {
        let Some(seen) = &instance.seen else { return self.leased_by(instance, id) };
        let of = seen.agents.iter().filter(|(agent, _)| self.partition_of(**agent) == *id);
        let cells = of.fold(0, |sum: u64, (_, held)| sum.saturating_add(held.cells.into()));
        cells.saturating_mul(instance.need.kv_bytes_per_cell)
    }

    /// What it was seen to hold of models that were loaded for others, and is not charged for.
    fn seen_elsewhere(&self, id: &PartitionId) -> u64 {
        let others = self.models.values().filter(|one| one.partition != *id && one.seen.is_some());
        others.fold(0, |sum: u64, instance| {
            sum.saturating_add(self.held_by(instance, id).saturating_sub(self.leased_by(instance, id)))
        })
    }
}

impl Instance {
    /// Agents with a request, or with a lease.
    fn holders(&self) -> impl Iterator<Item = AgentId> + '_ {
        let seen = self.seen.as_ref().map(|seen| seen.agents.keys());
        let leased = self.seen.is_none().then(|| self.leases.keys());
        seen.into_iter().flatten().chain(leased.into_iter().flatten()).copied()
    }

    /// With what an agent holds of this model.
    fn add_to(&self, mut hold: AgentHold) -> AgentHold {
        let bytes = |cells: u64| cells.saturating_mul(self.need.kv_bytes_per_cell);
        let Some(seen) = &self.seen else {
            let cells = self.leases.get(&hold.agent_id).copied().unwrap_or(0);
            hold.cells = hold.cells.saturating_add(cells);
            hold.kv_bytes = hold.kv_bytes.saturating_add(self.lease_bytes(cells));
            return hold;
        };
        let Some(held) = seen.agents.get(&hold.agent_id) else { return hold };
        for (sum, more) in [
            (&mut hold.cells, u64::from(held.cells)),
            (&mut hold.kv_bytes, bytes(held.cells.into())),
            (&mut hold.cells_shared, held.cells_shared.into()),
            (&mut hold.cells_promised, held.cells_promised.into()),
            (&mut hold.running, held.running.into()),
            (&mut hold.waiting, held.waiting.into()),
            (&mut hold.put_aside, held.put_aside.into()),
            (&mut hold.aside_bytes, bytes(held.aside_tokens.into())),
        ] {
            *sum = sum.saturating_add(more);
        }
        hold
    }
}

fn show_model(model: &str, instance: &Instance) -> ModelView {
    let usage = instance.seen.as_ref().map(|seen| seen.usage.clone());
    let leased = || instance.leases.values().map(|cells| blocks(*cells)).fold(0, u64::saturating_add);
    let at_work = |usage: &ModelUsage| {
        let used = u64::from(usage.cells_private) + u64::from(usage.cells_shared);
        used.saturating_sub(usage.cells_cached.into())
    };
    ModelView {
        model: model.to_owned(),
        partition: instance.partition.clone(),
        need: instance.need.clone(),
        cells_held: usage.as_ref().map_or_else(leased, at_work),
        evictable: instance.holders().next().is_none(),
        usage,
    }
}

fn ill(device: &str, why: &str) -> Report {
    Report::environment(
        "device_unhealthy",
        format!("nothing new is put on {device}"),
        why,
        "restart the appliance; if it says so again, look at the device's cooling and power",
    )
}

fn not_in_force(id: &PartitionId, missing: &[&str]) -> Report {
    let why = match missing {
        [] => "it is larger than what its devices have besides their reserve and other guarantees".to_owned(),
        missing => format!("there is no device {}", missing.join(", ")),
    };
    let fix = format!("put the device back, or define it anew: `agentctl gpu partition set {id} ...`");
    Report::environment("partition_not_in_force", format!("the partition {id} is not in force"), why, fix)
}
