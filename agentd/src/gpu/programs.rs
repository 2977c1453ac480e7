//! Which runs have a device of their own, and which whole devices are granted to which agents?
//!
//! Always: a grant or a lease is on disk before it holds, and so is its end; a lease ends with its run, whoever sees that.
//!         What an earlier agentd gave is held from the first moment on ([`Gpu::open_devices`]), before a model is loaded.
//! Where:  who gets what is `lease.rs`'s; the run's plan, `agents/run/tokens.rs`.

use super::ill::{Shown, id_of};
use super::lease::{self, Grant, Lease, Scene};
use super::{Gpu, State};
use crate::store::{Db, StoreError};
use agentd_domain::enforcement::LimitBy;
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::nodes::{Given, Hold};
use agentd_gpu::ledger::Stranger;
use std::collections::BTreeSet;

impl Gpu {
    /// Takes over what is stored of devices: to be called before a run is started. Blocks.
    pub fn open_devices(&self, db: &Db) -> Result<(), StoreError> {
        let (troubles, grants, leases) =
            (db.here().troubles()?, db.here().device_grants()?, db.here().device_leases()?);
        let mut state = self.state();
        state.ill.restore(troubles);
        state.grants = grants;
        for (run, lease) in leases {
            hold(&mut state, run, lease);
        }
        state.db.get_or_insert_with(|| db.clone());
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }

    /// A device for a run of this agent, held for it from now on. Blocks.
    pub fn lease(&self, agent: AgentId, run: RunId, asked: Option<u64>) -> Result<Given, Report> {
        let what = "the agent was not started";
        let mut state = self.state();
        let Some(db) = state.db.clone() else { return Err(closed(what)) };
        let taken = instances(&state);
        let room = |device: &agentd_gpu::ledger::Device| {
            let wants = |bytes| Stranger { agent, device: device.name.clone(), bytes };
            let fits = |bytes| state.ledger.clone().admit_stranger(&run.to_string(), wants(bytes)).is_ok();
            // The whole wish or nothing: what is free beside it is only for the refusal.
            match asked.filter(|bytes| fits(*bytes)) {
                Some(bytes) => bytes,
                None => state.ledger.free_on(&device.name).min(asked.unwrap_or(0).saturating_sub(1)),
            }
        };
        let scene = Scene {
            devices: state.ledger.devices(),
            room: &room,
            regions: &state.regions,
            taken: &taken,
            grant: state.grants.get(&agent),
        };
        let (id, given) = lease::choose(asked, &scene)?;
        let in_use = state.leases.iter().any(|(other, lease)| {
            *other != run && lease.id == id && (lease.given.hold == Hold::Whole || given.hold == Hold::Whole)
        });
        if in_use {
            let why = format!("another run has {} for itself", given.device);
            return Err(Report::environment("device_in_use", what, why, "stop that agent first"));
        }
        let lease = Lease { agent, id, given: given.clone() };
        db.here().set_device_lease(run, Some(&lease)).map_err(|error| error.report(what))?;
        hold(&mut state, run, lease);
        drop(state);
        self.0.changed.notify_one();
        Ok(given)
    }

    /// The run has ended, or was not started. Blocks.
    pub fn release(&self, run: RunId) {
        let mut state = self.state();
        if state.leases.remove(&run).is_none() {
            return;
        }
        state.ledger.release_stranger(&run.to_string());
        if let Some(db) = state.db.clone()
            && let Err(error) = db.here().set_device_lease(run, None)
        {
            // It is found again at the next start, and goes with the first list that does not have its run.
            tracing::warn!(run_id = %run, %error, "that a run has no device any more was not stored");
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// Of runs that are not among these, as of [`Self::release`]. Blocks.
    pub fn release_others(&self, lives: &dyn Fn(RunId) -> bool) {
        let gone: Vec<RunId> = self.state().leases.keys().copied().filter(|run| !lives(*run)).collect();
        gone.into_iter().for_each(|run| self.release(run));
    }

    pub fn has_leases(&self) -> bool {
        !self.state().leases.is_empty()
    }

    /// Gives a whole device to one agent, or takes it back. Blocks.
    pub fn grant(&self, agent: AgentId, device: Option<&str>) -> Result<(), Report> {
        let what = "the device was not granted";
        let mut state = self.state();
        let Some(db) = state.db.clone() else { return Err(closed(what)) };
        if state.leases.values().any(|lease| lease.agent == agent && lease.given.hold == Hold::Whole) {
            let why = "the agent runs with the device that it has";
            return Err(Report::caller(
                "conflict",
                what,
                why,
                "stop the agent first: `agentctl agent stop NAME`",
            ));
        }
        let grant = device.map(|name| wanted(&state, agent, name)).transpose()?;
        db.here().set_device_grant(agent, grant.as_ref()).map_err(|error| error.report(what))?;
        match grant {
            Some(grant) => drop(state.grants.insert(agent, grant)),
            None => drop(state.grants.remove(&agent)),
        }
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }
}

/// The device of this name, if it may be one agent's alone.
fn wanted(state: &State, agent: AgentId, name: &str) -> Result<Grant, Report> {
    let what = "the device was not granted";
    let refused = |code: &str, why: String, fix: &str| Report::caller(code, what, why, fix);
    let before = state.grants.iter().find(|(_, grant)| grant.device.name == name);
    if let Some((other, grant)) = before {
        if *other != agent {
            let why = format!("{name} is granted to another agent");
            return Err(refused("conflict", why, "take it back first: `agentctl gpu revoke AGENT`"));
        }
        return Ok(grant.clone());
    }
    let found = state.ledger.devices().iter().find(|device| device.name == name);
    let Some(device) = found else {
        let fix = "`agentctl gpu ls` lists devices";
        return Err(refused("not_found", format!("there is no device {name}"), fix));
    };
    let id = device.gpu.as_ref().and_then(id_of);
    let nodes: Vec<String> = device.gpu.iter().flat_map(|gpu| lease::own(&gpu.nodes)).collect();
    let (Some(id), false) = (id, nodes.is_empty()) else {
        let why = format!("nothing says which nodes are {name}'s");
        return Err(refused("device_unknown", why, "grant an accelerator whose driver says so"));
    };
    if state.leases.values().any(|lease| lease.id == id) {
        let why = format!("programs of agents have shares of {name}");
        return Err(refused("conflict", why, "stop them first"));
    }
    let shown = Shown {
        name: device.name.clone(),
        description: device.description.clone(),
        kind: device.kind.clone(),
        total_bytes: device.total_bytes,
        nodes,
    };
    Ok(Grant { id, device: shown })
}

fn hold(state: &mut State, run: RunId, lease: Lease) {
    if let Some(limit) = lease.given.limit()
        && !matches!(limit.by, LimitBy::Mig { .. })
    {
        let (device, bytes) = (lease.given.device.clone(), limit.bytes);
        state.ledger.adopt_stranger(&run.to_string(), Stranger { agent: lease.agent, device, bytes });
    }
    state.leases.insert(run, lease);
}

/// Instances that have a user: the engine, or a run.
fn instances(state: &State) -> BTreeSet<String> {
    let of_engine = state.limits.iter().map(|(_, limit)| &limit.by);
    let of_runs = state.leases.values().filter_map(|lease| Some(&lease.given.limit()?.by));
    let uuid = |by: &LimitBy| match by {
        LimitBy::Mig { uuid } => Some(uuid.clone()),
        _ => None,
    };
    of_engine.chain(of_runs).filter_map(uuid).collect()
}

fn closed(what: &str) -> Report {
    let fix = "see its state on the local console";
    Report::environment("store_unusable", what, "the data partition is not open", fix)
}
