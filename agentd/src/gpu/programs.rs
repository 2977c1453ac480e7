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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::store::Store;
    use agentd_domain::device::{Mig, MigInstance};
    use agentd_domain::enforcement::Enforcement;
    use agentd_domain::engine::Device;
    use agentd_domain::ledger::DeviceView;
    use std::collections::BTreeSet;
    use uuid::Uuid;

    const GIB: u64 = 1 << 30;

    fn agent(number: u128) -> AgentId {
        AgentId(Uuid::from_u128(number))
    }

    fn run(number: u128) -> RunId {
        RunId(Uuid::from_u128(number))
    }

    /// A card of 8 GiB, of which a reserve of 1 is nobody's.
    pub(crate) fn card() -> Device {
        let mut card = super::super::ill::tests::card(&[]);
        card.gpu.as_mut().expect("readings").pci_address = Some("0000:c1:00.0".to_owned());
        card
    }

    fn regions() -> BTreeSet<String> {
        ["nvidia/0000:c1:00.0/vidmem".to_owned()].into()
    }

    /// With a store, and an engine on this device.
    pub(crate) fn with_engine_on(db: &Db, card: &Device) -> Gpu {
        let gpu = Gpu::new(GIB);
        gpu.open_devices(db).expect("opened");
        see(&gpu, std::slice::from_ref(card));
        gpu
    }

    fn see(gpu: &Gpu, devices: &[Device]) {
        let terms = gpu.terms(devices, &regions());
        gpu.limited(&terms.limits);
        gpu.take_over(&mut gpu.state(), devices, &[]);
    }

    fn store(folder: &tempfile::TempDir) -> Db {
        Db::new(Store::open(&folder.path().join("system.redb")).expect("a store"))
    }

    fn shown(gpu: &Gpu) -> DeviceView {
        gpu.view(&|_| Some("painter".parse().expect("a name"))).devices.remove(0)
    }

    fn code(result: Result<Given, Report>) -> Result<u64, String> {
        result.map(|given| given.limit().map_or(0, |limit| limit.bytes)).map_err(|report| report.code)
    }

    #[test]
    fn a_share_is_nobody_else_s_from_its_lease_to_its_end_whoever_restarts() {
        let folder = tempfile::tempdir().expect("a folder");
        let db = store(&folder);
        let gpu = with_engine_on(&db, &card());
        assert_eq!(code(gpu.lease(agent(1), run(1), Some(4 * GIB))), Ok(4 * GIB));
        assert_eq!((shown(&gpu).programs_bytes, shown(&gpu).free_bytes), (4 * GIB, 3 * GIB));
        assert_eq!(code(gpu.lease(agent(2), run(2), Some(4 * GIB))), Err("device_not_enforced".to_owned()));
        // The engine is held to what is left of it, from now on.
        let limits = gpu.terms(&[card()], &regions()).limits;
        assert_eq!(limits.iter().map(|limit| limit.bytes).collect::<Vec<_>>(), [3 * GIB]);
        // The next agentd, before it has seen any run.
        let next = with_engine_on(&db, &card());
        assert_eq!(shown(&next).programs_bytes, 4 * GIB);
        assert_eq!(code(next.lease(agent(2), run(2), Some(4 * GIB))), Err("device_not_enforced".to_owned()));
        next.release_others(&|living| living == run(1));
        assert_eq!(shown(&next).programs_bytes, 4 * GIB, "its run lives");
        next.release_others(&|_| false);
        assert_eq!((shown(&next).programs_bytes, next.has_leases()), (0, false));
        assert!(db.here().device_leases().expect("read").is_empty());
        assert!(next.terms(&[card()], &regions()).limits.is_empty(), "nobody is to be kept from anything");
    }

    #[test]
    fn a_share_leaves_what_was_guaranteed_to_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let db = store(&folder);
        let gpu = with_engine_on(&db, &card());
        gpu.open(db, super::super::Configured::default()).expect("opened");
        let chat = agentd_domain::ledger::Partition {
            id: "chat".parse().expect("a name"),
            devices: vec!["CUDA0".to_owned()],
            bytes: 5 * GIB,
            priority: 50,
            weight: 100,
            sequences_most: 0,
            guaranteed: true,
        };
        gpu.set(chat).expect("set");
        assert!(gpu.lease(agent(1), run(1), Some(3 * GIB)).is_err(), "2 GiB are left");
        assert_eq!(code(gpu.lease(agent(1), run(1), Some(2 * GIB))), Ok(2 * GIB));
        // Its own partition's bytes are its own.
        gpu.assign(agent(2), &"chat".parse().expect("a name")).expect("assigned");
        assert_eq!(code(gpu.lease(agent(2), run(2), Some(5 * GIB))), Ok(5 * GIB));
        assert!(gpu.lease(agent(2), run(3), Some(GIB)).is_err(), "it is full");
    }

    #[test]
    fn a_granted_device_is_left_by_the_engine_and_then_one_agent_s() {
        let folder = tempfile::tempdir().expect("a folder");
        let db = store(&folder);
        let gpu = with_engine_on(&db, &card());
        assert_eq!(code(gpu.lease(agent(1), run(1), None)), Err("device_not_granted".to_owned()));
        let refused = |result: Result<(), Report>| result.expect_err("refused").code;
        assert_eq!(refused(gpu.grant(agent(1), Some("CUDA7"))), "not_found");
        gpu.grant(agent(1), Some("CUDA0")).expect("granted");
        assert_eq!(gpu.hidden(), ["/dev/nvidia0"]);
        assert_eq!(gpu.granted_and_seen().as_deref(), Some("CUDA0"), "the engine is to make way");
        assert_eq!(code(gpu.lease(agent(1), run(1), None)), Err("device_in_use".to_owned()));
        assert_eq!(refused(gpu.grant(agent(2), Some("CUDA0"))), "conflict");
        // The next engine does not see it.
        see(&gpu, &[]);
        assert_eq!(gpu.granted_and_seen(), None);
        let one = shown(&gpu);
        assert_eq!(
            (one.name.as_str(), one.granted_to.map(String::from)),
            ("CUDA0", Some("painter".to_owned()))
        );
        let given = gpu.lease(agent(1), run(1), None).expect("given");
        assert_eq!((given.hold, given.nodes.len()), (Hold::Whole, 3));
        assert_eq!(code(gpu.lease(agent(2), run(2), None)), Err("device_not_granted".to_owned()));
        assert_eq!(refused(gpu.grant(agent(1), None)), "conflict", "it runs with it");
        // All of this is on disk.
        let next = with_engine_on(&db, &card());
        assert_eq!((next.hidden(), next.has_leases()), (vec!["/dev/nvidia0".to_owned()], true));
        next.release(run(1));
        next.grant(agent(1), None).expect("taken back");
        assert!(next.hidden().is_empty() && db.here().device_grants().expect("read").is_empty());
    }

    #[test]
    fn an_engine_is_on_one_instance_and_programs_are_on_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let db = store(&folder);
        let mut cut = card();
        let instance = |number: u64, gib: u64| MigInstance {
            uuid: format!("MIG-{number}"),
            memory_total_bytes: Some(gib * GIB),
            memory_used_bytes: None,
            nodes: [2 * number, 2 * number + 1]
                .map(|minor| format!("/dev/nvidia-caps/nvidia-cap{minor}"))
                .into(),
        };
        let instances = vec![instance(10, 2), instance(20, 4), instance(30, 1)];
        cut.gpu.as_mut().expect("readings").mig = Some(Mig { enabled: true, pending: None, instances });
        let gpu = with_engine_on(&db, &cut);
        let terms = gpu.terms(std::slice::from_ref(&cut), &regions());
        let by: Vec<_> = terms.limits.iter().map(|limit| (&limit.by, limit.bytes)).collect();
        assert_eq!(by, [(&LimitBy::Mig { uuid: "MIG-20".to_owned() }, 4 * GIB)], "the largest");
        let caps = [20, 21, 60, 61].map(|minor| format!("/dev/nvidia-caps/nvidia-cap{minor}"));
        assert_eq!(terms.hidden, caps);
        // The ledger counts the instance, and says who keeps it.
        let one = shown(&gpu);
        assert_eq!((one.total_bytes, one.enforcement), (4 * GIB, Enforcement::Hardware));
        let given = gpu.lease(agent(1), run(1), Some(8 * GIB)).expect("another one");
        assert_eq!(given.limit().map(|limit| &limit.by), Some(&LimitBy::Mig { uuid: "MIG-10".to_owned() }));
        assert_eq!(code(gpu.lease(agent(2), run(2), Some(8 * GIB))), Ok(GIB));
        assert_eq!(code(gpu.lease(agent(3), run(3), Some(8 * GIB))), Err("device_not_enforced".to_owned()));
        assert_eq!(shown(&gpu).programs_bytes, 0, "nothing of the engine's own instance");
        // The next engine is on the same, though its driver lists it alone, and nothing is asked of it again and again.
        cut.memory_total_bytes = 4 * GIB;
        cut.gpu
            .as_mut()
            .and_then(|gpu| gpu.mig.as_mut())
            .expect("cut up")
            .instances
            .retain(|one| one.uuid == "MIG-20");
        assert_eq!(gpu.terms(std::slice::from_ref(&cut), &regions()), terms);
        assert_eq!(gpu.terms_now(), terms);
    }

    /// Within a limit a driver says that the device has no more than that.
    #[test]
    fn a_limit_is_of_the_whole_device_however_little_of_it_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let gpu = with_engine_on(&store(&folder), &card());
        gpu.lease(agent(1), run(1), Some(2 * GIB)).expect("given");
        let bytes = |seen: u64| {
            let held = Device { memory_total_bytes: seen, ..card() };
            let terms = gpu.terms(std::slice::from_ref(&held), &regions());
            terms.limits.iter().map(|limit| limit.bytes).collect::<Vec<_>>()
        };
        for seen in [8 * GIB, 5 * GIB, 4 * GIB, 8 * GIB] {
            assert_eq!(bytes(seen), [5 * GIB], "{seen}");
        }
    }
}
