use super::*;
use agentd_domain::ledger::{Basis, DeviceNeed};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn device(name: &str, mebibytes: u64) -> Device {
    Device {
        name: name.to_owned(),
        description: String::new(),
        kind: if name == "CPU" { "cpu" } else { "gpu" }.to_owned(),
        total_bytes: mebibytes * MIB,
        reserve_bytes: 64 * MIB,
        reported_free_bytes: 0,
        enforcement: Enforcement::Engine,
        problem: None,
        gpu: None,
    }
}

fn machine() -> Ledger {
    let mut ledger = Ledger::default();
    ledger.set_devices(vec![device("CPU", 4096), device("GPU0", 8192)]);
    ledger
}

/// One kibibyte for each cell.
fn need(device: &str, weights_mib: u64, cells: u64) -> Need {
    Need {
        devices: vec![DeviceNeed {
            device: device.to_owned(),
            weights_bytes: weights_mib * MIB,
            kv_bytes: cells * 1024,
            compute_bytes: 10 * MIB,
            ..DeviceNeed::default()
        }],
        basis: Basis::Header,
        kv_bytes_per_cell: 1024,
        cells,
        sequences: 8,
        assumed: Vec::new(),
    }
}

fn agent(number: u128) -> AgentId {
    AgentId(uuid::Uuid::from_u128(number))
}

fn id(name: &str) -> PartitionId {
    name.parse().expect("a name")
}

fn partition(name: &str, device: &str, mebibytes: u64, guaranteed: bool) -> Partition {
    Partition {
        id: id(name),
        devices: vec![device.to_owned()],
        bytes: mebibytes * MIB,
        priority: 50,
        weight: 100,
        sequences_most: 0,
        guaranteed,
    }
}

fn load(ledger: &mut Ledger, model: &str, of: &str, need: Need) -> Result<(), Refusal> {
    ledger.load(model, &id(of), need, &|_| 0)
}

#[test]
fn without_configuration_everything_is_the_default_partitions() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("CPU", 100, 4096)).expect("it fits");
    assert_eq!(ledger.partition_of(agent(1)), id("default"));
    assert_eq!(ledger.cells_most("m", agent(1)), 4096);
    ledger.lease("m", agent(1), 300).expect("cells");
    let view = ledger.view(&|_| None);
    assert_eq!(view.partitions.len(), 1);
    assert_eq!(view.partitions[0].held.weights_bytes, 100 * MIB);
    assert_eq!(view.partitions[0].held.kv_bytes, 4 * MIB, "the pool, whoever has its cells");
    assert_eq!(
        (view.partitions[0].agents[0].cells, view.partitions[0].agents[0].kv_bytes),
        (300, 512 * 1024)
    );
    assert_eq!(view.devices[0].free_bytes, (4096 - 64 - 114) * MIB);
}

#[test]
fn too_large_says_which_context_would_do() {
    let mut ledger = machine();
    ledger.set_partition(partition("small", "CPU", 200, false)).expect("good");
    let of = |cells| need("CPU", 100, cells);
    let longest =
        |fits: &dyn Fn(&Need) -> bool| crate::plan::longest_context(1 << 20, &of, &|need| fits(need));
    let refused = ledger.load("m", &id("small"), of(1 << 20), &longest).expect_err("1 GiB of cells");
    let Refusal::ModelTooLarge { context_tokens_most, needs_bytes, budget_bytes, .. } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((needs_bytes, budget_bytes), ((100 + 1024 + 10) * MIB, 200 * MIB));
    assert_eq!(context_tokens_most, 90 * 1024, "what is left beside weights and computing");
    ledger.load("m", &id("small"), of(context_tokens_most), &longest).expect("as it said");
}

#[test]
fn what_fits_when_others_end_names_the_holders() {
    let mut ledger = machine();
    load(&mut ledger, "a", "default", need("CPU", 3000, 1024)).expect("it fits");
    let refused = load(&mut ledger, "b", "default", need("CPU", 2000, 1024)).expect_err("not beside it");
    let Refusal::BudgetExceeded { short_bytes, held, device, .. } = refused else { panic!("{refused:?}") };
    assert_eq!((device.as_deref(), held.weights_bytes), (Some("CPU"), 3000 * MIB));
    assert_eq!(short_bytes, (3011 + 2011 - 4032) * MIB);
    ledger.unload("a");
    load(&mut ledger, "b", "default", need("CPU", 2000, 1024)).expect("now it does");
}

#[test]
fn a_guarantee_is_kept_free_and_is_its_owners() {
    let mut ledger = machine();
    ledger.set_partition(partition("sure", "CPU", 1000, true)).expect("good");
    let refused =
        load(&mut ledger, "a", "default", need("CPU", 3500, 256)).expect_err("it would take the guarantee");
    assert!(matches!(refused, Refusal::ModelTooLarge { .. }), "{refused:?}");
    load(&mut ledger, "a", "default", need("CPU", 3000, 256)).expect("beside the guarantee");
    load(&mut ledger, "b", "sure", need("CPU", 900, 256)).expect("it is its own");
    // What it does not use of it stays free.
    assert!(load(&mut ledger, "c", "default", need("CPU", 50, 256)).is_err());
}

#[test]
fn a_guarantee_over_what_others_hold_is_not_given() {
    let mut ledger = machine();
    ledger.set_partition(partition("loose", "CPU", 3500, false)).expect("good");
    load(&mut ledger, "a", "loose", need("CPU", 3000, 256)).expect("it fits");
    let reports = ledger.set_partition(partition("sure", "CPU", 2000, true)).expect_err("it is taken");
    assert_eq!(reports[0].code, "vram_budget_exceeded");
    ledger.unload("a");
    ledger.set_partition(partition("sure", "CPU", 2000, true)).expect("now it is free");
}

#[test]
fn cells_of_anothers_model_count_against_ones_own_bytes() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("CPU", 100, 8192)).expect("it fits");
    ledger.set_partition(partition("few", "CPU", 2, false)).expect("good");
    ledger.assign(agent(1), &id("few")).expect("known");
    assert_eq!(ledger.cells_most("m", agent(1)), 2048);
    let refused = ledger.lease("m", agent(1), 2049).expect_err("a block too many");
    assert!(matches!(refused, Refusal::ContextExceedsBudget { has_cells: 2048, .. }), "{refused:?}");
    let refused = ledger.admit_request("m", agent(1), 2000, 100).expect_err("prompt and answer");
    assert!(refused.report("no").fix.contains("at most 48 tokens"), "{refused:?}");
    ledger.lease("m", agent(1), 1024).expect("half of it");
    let held = ledger.held(&id("few"));
    assert_eq!(held.kv_bytes, MIB);
    // Half of the weights would be its fair share; its bytes end the share that it is shown.
    assert_eq!((held.weights_bytes, held.total_bytes()), (MIB, 2 * MIB));
    assert_eq!(ledger.held(&id("default")).weights_bytes, 99 * MIB);
}

#[test]
fn one_who_leaves_the_defaults_models_must_fit_its_new_partition() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("CPU", 100, 8192)).expect("it fits");
    ledger.set_partition(partition("few", "CPU", 2, false)).expect("good");
    ledger.lease("m", agent(1), 4096).expect("in the default it may");
    assert!(ledger.assign(agent(1), &id("few")).is_err());
    ledger.lease("m", agent(1), 1024).expect("less");
    ledger.assign(agent(1), &id("few")).expect("now it fits");
    assert!(matches!(ledger.assign(agent(1), &id("nowhere")), Err(Refusal::UnknownPartition { .. })));
}

#[test]
fn what_the_engine_says_of_cells_is_shown_and_decides_nothing() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("CPU", 100, 8192)).expect("it fits");
    ledger.set_partition(partition("few", "CPU", 2, false)).expect("good");
    ledger.assign(agent(1), &id("few")).expect("known");
    // One that another started is where that one is.
    ledger.put_beneath(agent(2), agent(1));
    let holder = |number: u128, cells: u32, shared: u32| HolderUsage {
        holder: agent(number).to_string(),
        running: 1,
        waiting: 1,
        put_aside: 1,
        cells,
        cells_shared: shared,
        cells_promised: 10,
        aside_tokens: 100,
    };
    let stranger = HolderUsage { holder: "no agent".to_owned(), cells: 7, ..HolderUsage::default() };
    let usage = ModelUsage {
        model: "m".to_owned(),
        cells_private: 1500,
        cells_shared: 500,
        cells_cached: 93,
        holders: vec![holder(1, 600, 100), holder(2, 300, 100), holder(3, 1000, 300), stranger],
        ..ModelUsage::default()
    };
    ledger.saw(std::slice::from_ref(&usage));
    let view = ledger.view(&|_| None);
    let few = &view.partitions[1];
    let held: Vec<_> = few.agents.iter().map(|one| (one.agent_id, one.cells, one.kv_bytes)).collect();
    assert_eq!(held, [(agent(1), 600, 600 * 1024), (agent(2), 300, 300 * 1024)]);
    assert_eq!((few.agents[0].cells_shared, few.agents[0].cells_promised), (100, 10));
    assert_eq!((few.agents[0].running, few.agents[0].waiting, few.agents[0].put_aside), (1, 1, 1));
    assert_eq!(few.agents[0].aside_bytes, 100 * 1024);
    // Its agents' cells, and as much of the weights as its bytes leave.
    assert_eq!((few.held.kv_bytes, few.held.total_bytes()), (900 * 1024, 2 * MIB));
    assert_eq!(view.partitions[0].agents[0].cells, 1000);
    let weights: u64 = view.partitions.iter().map(|one| one.held.weights_bytes).sum();
    assert_eq!(weights, 100 * MIB);
    let model = &view.models[0];
    assert_eq!((model.cells_held, model.evictable), (1907, false));
    let shown = model.usage.as_ref().expect("it was told");
    assert!(shown.holders.is_empty() && shown.cells_cached == 93, "agents stand with their partitions");
    // What may be held is what it was.
    assert_eq!(ledger.cells_most("m", agent(1)), 2048);
    ledger.saw(&[ModelUsage { holders: Vec::new(), ..usage }]);
    let view = ledger.view(&|_| None);
    assert_eq!(view.partitions[1].agents.iter().map(|one| one.cells).sum::<u64>(), 0);
    assert!(view.models[0].evictable);
}

#[test]
fn one_put_into_a_partition_that_waits_is_in_it_as_soon_as_it_holds() {
    let mut ledger = machine();
    ledger.set_partition(partition("vision", "GPU0", 4000, false)).expect("good");
    ledger.set_devices(vec![device("CPU", 4096)]);
    ledger.assign(agent(1), &id("vision")).expect("somebody defined it");
    assert_eq!(ledger.partition_of(agent(1)), id("default"));
    ledger.set_devices(vec![device("CPU", 4096), device("GPU0", 8192)]);
    assert_eq!(ledger.partition_of(agent(1)), id("vision"));
}

#[test]
fn what_a_device_takes_beyond_the_plan_is_learned_and_kept_free() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("GPU0", 1000, 1024)).expect("it fits");
    ledger.learn("GPU0", 1500 * MIB);
    let view = ledger.view(&|_| None);
    let gpu = &view.devices[1];
    assert_eq!((gpu.planned.overhead_bytes, gpu.difference_bytes), (489 * MIB, Some(489 * MIB as i64)));
    assert_eq!(gpu.free_bytes, (8192 - 64 - 1500) * MIB);
    // Less use later is no reason to promise it again.
    ledger.learn("GPU0", 1100 * MIB);
    assert_eq!(ledger.view(&|_| None).devices[1].planned.overhead_bytes, 489 * MIB);
    // The first model of a new engine pays it at once.
    ledger.engine_lost();
    assert_eq!(ledger.overhead_due("GPU0"), 489 * MIB);
    assert!(load(&mut ledger, "m", "default", need("GPU0", 7700, 256)).is_err());
    load(&mut ledger, "m", "default", need("GPU0", 7500, 256)).expect("beside the overhead");
}

#[test]
fn an_ill_device_takes_nothing_new() {
    let mut ledger = machine();
    let ill = Device { problem: Some("XID 79: it fell off the bus".to_owned()), ..device("GPU0", 8192) };
    ledger.set_devices(vec![device("CPU", 4096), ill]);
    let refused = load(&mut ledger, "m", "default", need("GPU0", 10, 256)).expect_err("ill");
    assert_eq!(refused.report("no").code, "device_unhealthy");
    load(&mut ledger, "m", "default", need("CPU", 10, 256)).expect("the other one is well");
}

#[test]
fn a_device_that_disappears_takes_its_models_with_it_and_its_partitions_wait() {
    let mut ledger = machine();
    ledger.set_partition(partition("vision", "GPU0", 4000, true)).expect("good");
    ledger.assign(agent(1), &id("vision")).expect("known");
    load(&mut ledger, "m", "vision", need("GPU0", 1000, 1024)).expect("it fits");
    ledger.lease("m", agent(1), 256).expect("cells");
    ledger.set_devices(vec![device("CPU", 4096)]);
    assert_eq!(ledger.models().count(), 0);
    assert_eq!(ledger.partition_of(agent(1)), id("default"));
    let view = ledger.view(&|_| None);
    let waits = view.partitions[1].problem.as_ref().expect("it is not in force");
    assert!(waits.why.contains("GPU0"), "{waits}");
    ledger.set_devices(vec![device("CPU", 4096), device("GPU0", 8192)]);
    assert_eq!(ledger.partition_of(agent(1)), id("vision"));
}

#[test]
fn a_model_that_is_there_already_is_taken_as_it_is() {
    let mut ledger = machine();
    ledger.adopt("huge", need("CPU", 10_000, 1024));
    let view = ledger.view(&|_| None);
    assert_eq!((view.devices[0].free_bytes, view.devices[0].planned.weights_bytes), (0, 4032 * MIB));
}

#[test]
fn the_engines_own_numbers_take_the_plans_place() {
    let mut ledger = machine();
    load(&mut ledger, "m", "default", need("CPU", 100, 1024)).expect("it fits");
    ledger.lease("m", agent(1), 512).expect("cells");
    let exact = Need { basis: Basis::Engine, ..need("CPU", 101, 1024) };
    ledger.exact("m", exact.clone()).expect("it fits");
    assert_eq!(ledger.need("m"), Some(&exact));
    assert_eq!(ledger.view(&|_| None).models[0].cells_held, 512);
    assert!(ledger.exact("m", need("CPU", 5000, 1024)).is_err());
    assert_eq!(ledger.need("m"), Some(&exact), "a breakdown that does not fit changes nothing");
}

#[derive(Debug, Clone)]
enum Op {
    Load {
        model: usize,
        of: usize,
        device: usize,
        weights_mib: u64,
        cells: u64,
    },
    Adopt {
        model: usize,
        device: usize,
        weights_mib: u64,
    },
    Exact {
        model: usize,
        device: usize,
        weights_mib: u64,
    },
    Unload(usize),
    Lost,
    Lease {
        model: usize,
        agent: u128,
        cells: u64,
    },
    Release {
        model: usize,
        agent: u128,
    },
    Set {
        name: usize,
        device: usize,
        mebibytes: u64,
        guaranteed: bool,
    },
    Remove(usize),
    Assign {
        agent: u128,
        to: usize,
    },
    Learn {
        device: usize,
        mebibytes: u64,
    },
    Gpu(bool),
    /// An agent's own program gets a share of a device, or ends.
    Stranger {
        holder: usize,
        agent: u128,
        device: usize,
        mebibytes: u64,
    },
    StrangerEnds(usize),
    /// agentd begins anew, with what it has on disk; the engine and its models live on, or are gone too.
    Restart {
        engine_lives: bool,
    },
}

const DEVICES: [&str; 2] = ["CPU", "GPU0"];
const NAMES: [&str; 4] = ["default", "a", "b", "c"];

fn op() -> impl Strategy<Value = Op> {
    let (model, device, name) = (|| 0usize..4, || 0usize..2, || 0usize..4);
    let agent = || 0u128..5;
    prop_oneof![
        4 => (model(), name(), device(), 0u64..5000, 0u64..40).prop_map(|(model, of, device, weights_mib, blocks)| Op::Load { model, of, device, weights_mib, cells: blocks * 256 }),
        1 => (model(), device(), 0u64..9000).prop_map(|(model, device, weights_mib)| Op::Adopt { model, device, weights_mib }),
        1 => (model(), device(), 0u64..5000).prop_map(|(model, device, weights_mib)| Op::Exact { model, device, weights_mib }),
        2 => model().prop_map(Op::Unload),
        1 => Just(Op::Lost),
        6 => (model(), agent(), 0u64..9000).prop_map(|(model, agent, cells)| Op::Lease { model, agent, cells }),
        2 => (model(), agent()).prop_map(|(model, agent)| Op::Release { model, agent }),
        3 => (name(), device(), 0u64..6000, any::<bool>()).prop_map(|(name, device, mebibytes, guaranteed)| Op::Set { name, device, mebibytes, guaranteed }),
        1 => name().prop_map(Op::Remove),
        2 => (agent(), name()).prop_map(|(agent, to)| Op::Assign { agent, to }),
        2 => (device(), 0u64..12_000).prop_map(|(device, mebibytes)| Op::Learn { device, mebibytes }),
        1 => any::<bool>().prop_map(Op::Gpu),
        3 => (model(), agent(), device(), 0u64..6000).prop_map(|(holder, agent, device, mebibytes)| Op::Stranger { holder, agent, device, mebibytes }),
        1 => model().prop_map(Op::StrangerEnds),
        2 => any::<bool>().prop_map(|engine_lives| Op::Restart { engine_lives }),
    ]
}

fn apply(ledger: &mut Ledger, op: Op) {
    let model = |at: usize| format!("m{at}");
    match op {
        Op::Load { model: at, of, device, weights_mib, cells } => {
            let _ = load(ledger, &model(at), NAMES[of], need(DEVICES[device], weights_mib, cells));
        }
        Op::Adopt { model: at, device, weights_mib } => {
            ledger.adopt(&model(at), need(DEVICES[device], weights_mib, 512))
        }
        Op::Exact { model: at, device, weights_mib } => {
            let _ = ledger.exact(&model(at), need(DEVICES[device], weights_mib, 512));
        }
        Op::Unload(at) => ledger.unload(&model(at)),
        Op::Lost => ledger.engine_lost(),
        Op::Lease { model: at, agent: who, cells } => {
            let _ = ledger.lease(&model(at), agent(who), cells);
        }
        Op::Release { model: at, agent: who } => ledger.release(&model(at), agent(who)),
        Op::Set { name, device, mebibytes, guaranteed } => {
            let _ = ledger.set_partition(partition(NAMES[name], DEVICES[device], mebibytes, guaranteed));
        }
        Op::Remove(name) => {
            let _ = ledger.remove_partition(&id(NAMES[name]));
        }
        Op::Assign { agent: who, to } => {
            let _ = ledger.assign(agent(who), &id(NAMES[to]));
        }
        Op::Learn { device, mebibytes } => ledger.learn(DEVICES[device], mebibytes * MIB),
        Op::Gpu(there) => {
            let mut devices = vec![device("CPU", 4096)];
            devices.extend(there.then(|| device("GPU0", 8192)));
            ledger.set_devices(devices);
        }
        Op::Stranger { holder, agent: number, device, mebibytes } => {
            let wants =
                Stranger { agent: agent(number), device: DEVICES[device].to_owned(), bytes: mebibytes * MIB };
            let _ = ledger.admit_stranger(&format!("run{holder}"), wants);
        }
        Op::StrangerEnds(holder) => ledger.release_stranger(&format!("run{holder}")),
        Op::Restart { engine_lives } => *ledger = restarted(ledger, engine_lives),
    }
}

/// What an agentd that begins has of the one before: partitions, who is in them, what was learned; and of the engine, if
/// that lives, its devices and models.
fn restarted(before: &Ledger, engine_lives: bool) -> Ledger {
    let mut after = Ledger::default();
    after.restore(before.partitions().to_vec(), before.assigned().clone());
    after.set_devices(before.devices().to_vec());
    let learned = DEVICES.iter().map(|device| ((*device).to_owned(), before.overhead(device))).collect();
    after.restore_overhead(&learned);
    // Their runs are the launcher's and live on; what they have is on disk.
    for (holder, has) in &before.strangers {
        after.adopt_stranger(holder, has.clone());
    }
    if engine_lives {
        for model in before.models() {
            after.adopt(model, before.need(model).expect("held").clone());
        }
    }
    after
}

/// Everything that the module's head promises.
fn holds(ledger: &Ledger) {
    let view = ledger.view(&|_| None);
    for device in &view.devices {
        let taken = device.planned.total_bytes() + device.programs_bytes;
        let sum = device.reserve_bytes + taken + device.free_bytes;
        assert_eq!(sum, device.total_bytes, "{device:?}");
    }
    for instance in ledger.models.values() {
        assert!(instance.held_cells() <= instance.need.cells, "{instance:?}");
    }
    let in_force = view.partitions.iter().filter(|one| one.problem.is_none());
    for one in in_force.clone() {
        let (charged, bytes) = (ledger.charged(&one.partition.id), one.partition.bytes);
        // What an engine holds already was not admitted by anybody; the default has it.
        assert!(charged <= bytes, "{:?} holds {charged} of {bytes}", one.partition);
        assert!(one.held.total_bytes() <= bytes, "{one:?}");
    }
    for device in DEVICES {
        let sure =
            in_force.clone().filter(|one| one.partition.guaranteed && one.partition.devices == [device]);
        let promised: u64 = sure.map(|one| one.partition.bytes).sum();
        let room = ledger.rooms().into_iter().find(|room| room.device == device).map_or(0, |room| room.bytes);
        assert!(promised <= room, "{device}: {promised} promised of {room}");
    }
    // Each partition's devices hold the model's weights here, so all of them are somebody's.
    let weights: u64 =
        view.models.iter().flat_map(|model| &model.need.devices).map(|part| part.weights_bytes).sum();
    let outside: u64 = ledger
        .models
        .values()
        .map(|instance| {
            let devices = ledger.partition(&instance.partition).map(|one| one.devices).unwrap_or_default();
            instance
                .need
                .devices
                .iter()
                .filter(|part| !devices.contains(&part.device))
                .map(|part| part.weights_bytes)
                .sum::<u64>()
        })
        .sum();
    let shared: u64 = view.partitions.iter().map(|one| one.held.weights_bytes).sum();
    assert_eq!(shared + outside, weights, "shares sum up to the weights exactly");
}

proptest! {
    /// A crash forgets what was held and nothing that was learned; who comes after is admitted beside it.
    #[test]
    fn what_was_learned_survives_agentd_and_engine(
        ops in prop::collection::vec(op(), 1..30), engine_lives: bool, weights_mib in 0u64..9000,
    ) {
        let mut ledger = machine();
        ops.into_iter().for_each(|op| apply(&mut ledger, op));
        let learned: Vec<u64> = DEVICES.iter().map(|device| ledger.overhead(device)).collect();
        let mut after = restarted(&ledger, engine_lives);
        holds(&after);
        let kept: Vec<u64> = DEVICES.iter().map(|device| after.overhead(device)).collect();
        prop_assert_eq!(&learned, &kept);
        if engine_lives {
            prop_assert!(ledger.models().eq(after.models()));
        } else {
            prop_assert_eq!(after.models().count(), 0);
        }
        if load(&mut after, "new", "default", need("CPU", weights_mib, 256)).is_ok() && !engine_lives {
            let view = after.view(&|_| None);
            let cpu = &view.devices[0];
            prop_assert_eq!(cpu.planned.overhead_bytes, learned[0]);
            prop_assert!(cpu.planned.total_bytes() + cpu.reserve_bytes <= cpu.total_bytes);
        }
        holds(&after);
    }

    /// Whatever happens in whatever order.
    #[test]
    fn memory_is_never_promised_twice(ops in prop::collection::vec(op(), 1..60)) {
        let mut ledger = machine();
        for op in ops {
            apply(&mut ledger, op);
            holds(&ledger);
        }
        // Nothing leaks: without models and partitions the machine is as it was, but for what was learned.
        for model in ledger.models().map(str::to_owned).collect::<Vec<_>>() {
            ledger.unload(&model);
        }
        for holder in ledger.strangers.keys().cloned().collect::<Vec<_>>() {
            ledger.release_stranger(&holder);
        }
        for device in ledger.view(&|_| None).devices {
            prop_assert_eq!(device.free_bytes, device.total_bytes - device.reserve_bytes);
        }
        for one in ledger.view(&|_| None).partitions {
            prop_assert_eq!(one.held.total_bytes(), 0);
            prop_assert!(one.agents.iter().all(|hold| hold.cells == 0));
        }
    }

    /// A refusal changes nothing.
    #[test]
    fn who_is_refused_leaves_no_trace(ops in prop::collection::vec(op(), 1..30), weights_mib in 0u64..9000, cells in 0u64..9000) {
        let mut ledger = machine();
        ops.into_iter().for_each(|op| apply(&mut ledger, op));
        let before = ledger.view(&|_| None);
        if load(&mut ledger, "new", "default", need("CPU", weights_mib, 256)).is_err() {
            prop_assert_eq!(&before, &ledger.view(&|_| None));
        }
        let before = ledger.view(&|_| None);
        if ledger.lease("m0", agent(1), cells).is_err() {
            prop_assert_eq!(&before, &ledger.view(&|_| None));
        }
    }
}
