//! What may the owner order about partitions?
//!
//! Always: an order is recorded, is on disk before it holds, and changes nothing when it is refused.

use super::{Gpu, Planned, State};
use crate::appliance::{Machine, thread_lost};
use crate::audit::Order;
use agentd_domain::api::{AgentKey, ModelName};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, AgentName};
use agentd_domain::ledger::{Devices, ModelPlan, Partition, PartitionId, PlanOrder};
use agentd_gpu::admission::Refusal;
use agentd_gpu::ledger::Ledger;

impl Gpu {
    /// Defines a partition or changes one. Blocks.
    pub fn set(&self, new: Partition) -> Result<(), Report> {
        let what = format!("the partition {} was not set", new.id);
        self.change(&what, |state, after| {
            own(state, &new.id, &what)?;
            after.set_partition(new.clone()).map_err(|reports| joined(reports, &what))
        })
    }

    /// Blocks.
    pub fn remove(&self, id: &PartitionId) -> Result<(), Report> {
        let what = format!("the partition {id} was not removed");
        self.change(&what, |state, after| {
            own(state, id, &what)?;
            after.remove_partition(id).map_err(|refusal| refusal.report(&what))
        })
    }

    /// Blocks.
    pub fn assign(&self, agent: AgentId, to: &PartitionId) -> Result<(), Report> {
        let what = "the agent was not assigned";
        self.change(what, |state, after| {
            known(state, to, what)?;
            if state.by_configuration.contains(&agent) {
                let now = after.assigned().get(&agent).map_or("a partition", PartitionId::as_str);
                return Err(set_elsewhere(what, &format!("agentd.toml puts it into `{now}`")));
            }
            after.assign(agent, to).map_err(|refusal| refusal.report(what))
        })
    }

    /// Puts an agent that is being installed where the configuration says, else where its manifest says. Blocks.
    pub fn enter(&self, agent: AgentId, name: &AgentName, wish: Option<&PartitionId>) -> Result<(), Report> {
        let what = "the agent was not installed";
        {
            let mut state = self.state();
            if let Some(id) = state.by_name.get(name).cloned() {
                state.ledger.assign(agent, &id).map_err(|refusal| refusal.report(what))?;
                state.by_configuration.insert(agent);
                return Ok(());
            }
        }
        wish.map_or(Ok(()), |id| self.assign(agent, id))
    }

    /// Undoes it.
    pub fn leave(&self, agent: AgentId) {
        let to = PartitionId::default_partition();
        self.state().by_configuration.remove(&agent);
        if self.is_assigned(agent)
            && let Err(problem) = self.assign(agent, &to)
        {
            tracing::warn!(agent_id = %agent, %problem, "no agent is in a partition");
        }
    }

    /// Whether somebody defined it, in force or not.
    pub fn is_known(&self, id: &PartitionId, what: &str) -> Result<(), Report> {
        known(&self.state(), id, what)
    }

    /// One change: decided on a copy, written, then in force.
    fn change(
        &self,
        what: &str,
        decide: impl FnOnce(&State, &mut Ledger) -> Result<(), Report>,
    ) -> Result<(), Report> {
        let mut state = self.state();
        let mut after = state.ledger.clone();
        decide(&state, &mut after)?;
        let Some(db) = state.db.clone() else {
            let why = "the data partition is not open";
            let fix = "see its state on the local console";
            return Err(Report::environment("store_unusable", what, why, fix));
        };
        let own: Vec<Partition> =
            after.partitions().iter().filter(|one| !state.configured.contains(&one.id)).cloned().collect();
        let mut assigned = after.assigned().clone();
        assigned.retain(|agent, _| !state.by_configuration.contains(agent));
        db.here().set_partitions(&own, &assigned).map_err(|error| error.report(what))?;
        state.ledger = after;
        drop(state);
        // A guarantee holds for the engine that lives, where it can be held.
        self.0.changed.notify_one();
        Ok(())
    }
}

fn known(state: &State, id: &PartitionId, what: &str) -> Result<(), Report> {
    if id.is_default() || state.ledger.partitions().iter().any(|one| one.id == *id) {
        return Ok(());
    }
    Err(Refusal::UnknownPartition { partition: id.clone() }.report(what))
}

/// Not one of the configuration's.
fn own(state: &State, id: &PartitionId, what: &str) -> Result<(), Report> {
    if !state.configured.contains(id) {
        return Ok(());
    }
    Err(set_elsewhere(what, &format!("`{id}` is defined in agentd.toml")))
}

fn set_elsewhere(what: &str, why: &str) -> Report {
    Report::caller("partition_configured", what, why, "change it there and restart the appliance")
}

/// All mistakes as one report.
fn joined(reports: Vec<Report>, what: &str) -> Report {
    let all = |part: fn(&Report) -> &str| reports.iter().map(part).collect::<Vec<_>>().join("; ");
    let code = reports.first().map_or("partition_invalid", |report| report.code.as_str());
    Report { what: what.to_owned(), ..Report::caller(code, what, all(|one| &one.why), all(|one| &one.fix)) }
}

impl Machine {
    pub(crate) async fn devices_now(&self) -> Result<Devices, Report> {
        if let Ok(status) = self.engine.status().await {
            let gpu = self.gpu.clone();
            tokio::task::spawn_blocking(move || gpu.learn(&status))
                .await
                .map_err(|error| thread_lost(&error.to_string()))?;
        }
        Ok(self.shown_devices())
    }

    fn shown_devices(&self) -> Devices {
        let views = self.parts().ok().map(|parts| parts.agents.views());
        self.gpu.view(&|agent| Some(views.as_ref()?.get(&agent)?.row.name.clone()))
    }

    pub(crate) async fn partition_set(&self, new: Partition) -> Result<Devices, Report> {
        let order = Order { action: "partition.set", agent: None, about: new.id.to_string() };
        let gpu = self.gpu.clone();
        let work = blocking(move || gpu.set(new));
        self.audit.order(order, work, |(), _| {}).await?;
        self.devices_now().await
    }

    pub(crate) async fn partition_remove(&self, id: PartitionId) -> Result<Devices, Report> {
        let order = Order { action: "partition.remove", agent: None, about: id.to_string() };
        let gpu = self.gpu.clone();
        let work = blocking(move || gpu.remove(&id));
        self.audit.order(order, work, |(), _| {}).await?;
        self.devices_now().await
    }

    pub(crate) async fn partition_assign(&self, agent: AgentKey, to: PartitionId) -> Result<Devices, Report> {
        let known = self.find(&agent).ok().map(|(agent, _)| agent);
        let order = Order { action: "partition.assign", agent: known, about: format!("{agent} to {to}") };
        let gpu = self.gpu.clone();
        let work = async {
            let (agent, _) = self.find(&agent)?;
            blocking(move || gpu.assign(agent, &to)).await
        };
        self.audit.order(order, work, |(), _| {}).await?;
        self.devices_now().await
    }

    pub(crate) async fn device_grant(
        &self,
        agent: AgentKey,
        device: Option<String>,
    ) -> Result<Devices, Report> {
        let known = self.find(&agent).ok().map(|(agent, _)| agent);
        let about = format!("{} to {agent}", device.as_deref().unwrap_or("no device"));
        let order = Order { action: "device.grant", agent: known, about };
        let gpu = self.gpu.clone();
        let work = async {
            let (agent, _) = self.find(&agent)?;
            blocking(move || gpu.grant(agent, device.as_deref())).await
        };
        self.audit.order(order, work, |(), _| {}).await?;
        self.devices_now().await
    }

    pub(crate) async fn model_plan(
        &self,
        name: ModelName,
        context_tokens: u32,
        sequences: u32,
    ) -> Result<ModelPlan, Report> {
        let (summary, kind) = self.models.header(&name).await?;
        let planned = Planned::of_file(name.as_str(), &summary, kind).with(context_tokens, sequences);
        Ok(self.gpu.plan(&planned))
    }

    pub(crate) fn header_plan(&self, order: PlanOrder) -> ModelPlan {
        self.gpu.plan(&Planned::of_order(order))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Report> + Send + 'static,
) -> Result<T, Report> {
    tokio::task::spawn_blocking(work).await.map_err(|error| thread_lost(&error.to_string()))?
}
