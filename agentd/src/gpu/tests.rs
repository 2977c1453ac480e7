use super::admit::{Count, Judged};
use super::*;
use crate::engine::{Ask, Asker, Choice, Holder, Verdict};
use crate::store::{AgentRow, Store};
use agentd_domain::device::DeviceEvent;
use agentd_domain::device::{MemoryPlan, PlannedDevice};
use agentd_domain::engine::{EngineStatus, GpuReadings, ModelKind};
use agentd_domain::fault::Report;
use agentd_domain::ledger::{Basis, DEFAULT_PARTITION};
use std::path::PathBuf;
use uuid::Uuid;

pub(super) const MIB: u64 = 1 << 20;

pub(super) struct Scene {
    folder: tempfile::TempDir,
    pub(super) gpu: Gpu,
}

impl Scene {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let scene = Self { gpu: Gpu::new(4096 * MIB), folder };
        scene.gpu.open(scene.db(), Configured::default()).expect("opened");
        scene
    }

    fn db(&self) -> Db {
        Db::new(Store::open(&self.folder.path().join("system.redb")).expect("a store"))
    }

    /// What an agentd that was started again has.
    pub(super) fn again(self, partitions: Vec<Partition>) -> Self {
        self.again_with(Configured { partitions, ..Configured::default() })
    }

    fn again_with(self, configured: Configured) -> Self {
        let Self { folder, gpu } = self;
        drop(gpu);
        let scene = Self { gpu: Gpu::new(4096 * MIB), folder };
        scene.gpu.open(scene.db(), configured).expect("opened");
        scene
    }

    /// A header of a decoder with so many mebibytes of weights behind it, which the file system need not store.
    pub(super) fn model(&self, name: &str, mebibytes: u64) -> Choice {
        let path: PathBuf = self.folder.path().join(format!("{name}.gguf"));
        let file = File::create(&path).expect("a file");
        file.write_all_at(&header_of(mebibytes), 0).expect("written");
        file.set_len(4096 + mebibytes * MIB).expect("as long as it says");
        Choice { name: name.to_owned(), path: path.to_string_lossy().into_owned(), kind: ModelKind::Chat }
    }

    /// The same with so many blocks of that size, each of one tensor.
    pub(super) fn layered(&self, name: &str, blocks: u32, mebibytes: u64) -> Choice {
        let path: PathBuf = self.folder.path().join(format!("{name}.gguf"));
        let file = File::create(&path).expect("a file");
        file.write_all_at(&header_with(blocks, mebibytes), 0).expect("written");
        file.set_len(8192 + u64::from(blocks) * mebibytes * MIB).expect("as long as it says");
        Choice { name: name.to_owned(), path: path.to_string_lossy().into_owned(), kind: ModelKind::Chat }
    }

    fn may_load(&self, choice: &Choice, loaded: &[LoadedModel]) -> Result<(), Report> {
        self.may_load_on(choice, &devices(), loaded)
    }

    /// As if no engine could be asked to count.
    fn may_load_on(&self, choice: &Choice, on: &[Device], loaded: &[LoadedModel]) -> Result<(), Report> {
        let ask = ask(choice, on, loaded, &[]);
        match self.gpu.judge(&ask, Count::Away("there is none".to_owned())) {
            Judged::Verdict(Verdict::Load(_)) => Ok(()),
            Judged::Verdict(Verdict::Refused(report)) => Err(report),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn view(&self) -> Devices {
        self.gpu.view(&|_| None)
    }
}

pub(super) fn ask(choice: &Choice, on: &[Device], loaded: &[LoadedModel], holders: &[Holder]) -> Ask {
    Ask {
        choice: choice.clone(),
        asker: None,
        status: status(on, 0),
        loaded: loaded.to_vec(),
        holders: holders.to_vec(),
    }
}

fn status(on: &[Device], rss_bytes: u64) -> EngineStatus {
    EngineStatus {
        devices: on.to_vec(),
        models: Vec::new(),
        backend: String::new(),
        backends: Vec::new(),
        running_sequences: 0,
        waiting_requests: 0,
        rss_bytes,
        uptime_ms: 1,
        usage: Vec::new(),
        gpus: Vec::new(),
    }
}

/// The header of a small decoder, whose one tensor is of its first block.
pub(crate) fn header_of(mebibytes: u64) -> Vec<u8> {
    header_made(4, &[mebibytes])
}

/// One tensor of each block.
fn header_with(blocks: u32, mebibytes: u64) -> Vec<u8> {
    header_made(blocks, &vec![mebibytes; blocks as usize])
}

fn header_made(blocks: u32, mebibytes: &[u64]) -> Vec<u8> {
    let text = |into: &mut Vec<u8>, text: &str| {
        into.extend((text.len() as u64).to_le_bytes());
        into.extend(text.as_bytes());
    };
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((mebibytes.len() as u64).to_le_bytes());
    let numbers = [
        ("llama.block_count", blocks),
        ("llama.embedding_length", 256),
        ("llama.context_length", 8192),
        ("llama.attention.head_count", 4),
    ];
    bytes.extend((numbers.len() as u64 + 1).to_le_bytes());
    text(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "llama");
    for (key, value) in numbers {
        text(&mut bytes, key);
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    // Bytes: type I8.
    let mut at: u64 = 0;
    for (block, mebibytes) in mebibytes.iter().enumerate() {
        text(&mut bytes, &format!("blk.{block}.ffn_up.weight"));
        bytes.extend(2u32.to_le_bytes());
        bytes.extend(MIB.to_le_bytes());
        bytes.extend(mebibytes.to_le_bytes());
        bytes.extend(24u32.to_le_bytes());
        bytes.extend(at.to_le_bytes());
        at += mebibytes * MIB;
    }
    bytes
}

pub(super) fn devices() -> Vec<Device> {
    vec![Device {
        name: "CPU".to_owned(),
        description: "a processor".to_owned(),
        kind: "cpu".to_owned(),
        memory_total_bytes: 8192 * MIB,
        memory_free_bytes: 8000 * MIB,
        gpu: None,
    }]
}

pub(super) fn loaded(choice: &Choice) -> LoadedModel {
    crate::engine::testing::loaded(&crate::engine::load(choice, None))
}

pub(super) fn partition(id: &str, mebibytes: u64) -> Partition {
    Partition {
        id: id.parse().expect("a name"),
        devices: vec!["CPU".to_owned()],
        bytes: mebibytes * MIB,
        priority: 70,
        weight: 100,
        sequences_most: 0,
        guaranteed: true,
    }
}

fn agent(number: u128) -> AgentId {
    AgentId(Uuid::from_u128(number))
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_the_engine_is_asked() {
    let scene = Scene::new();
    let (small, large) = (scene.model("small", 1000), scene.model("large", 4500));
    let report = scene.may_load(&large, &[]).expect_err("the engine may take 4 GiB");
    assert_eq!(report.code, "model_too_large", "{report}");
    scene.may_load(&small, &[]).expect("it fits");
    // It is held from then on, whether or not the engine has finished.
    let second = scene.model("second", 3500);
    let report = scene.may_load(&second, &[loaded(&small)]).expect_err("not beside it");
    assert_eq!((report.code.as_str(), report.http_status()), ("vram_budget_exceeded", 429), "{report}");
    // The engine has unloaded it.
    scene.may_load(&second, &[]).expect("in its place");
    assert_eq!(scene.view().models.len(), 1);
}

#[test]
fn what_nobody_can_judge_is_left_to_the_engine() {
    let scene = Scene::new();
    let nowhere = Choice { name: "x".to_owned(), path: "/nowhere".to_owned(), kind: ModelKind::Chat };
    scene.may_load(&nowhere, &[]).expect("the engine says that there is no such file");
    scene.may_load_on(&scene.model("m", 100_000), &[], &[]).expect("no device is known");
}

#[test]
fn an_engine_that_lived_on_is_taken_over() {
    let scene = Scene::new();
    let choice = scene.model("m", 1000);
    let other = scene.model("other", 3500);
    let report = scene.may_load(&other, &[loaded(&choice)]).expect_err("its memory is taken");
    assert_eq!(report.code, "vram_budget_exceeded");
    let view = scene.view();
    assert_eq!((view.models[0].model.as_str(), view.models[0].partition.as_str()), ("m", DEFAULT_PARTITION));
}

#[test]
fn partitions_outlive_agentd_and_so_does_who_is_in_them() {
    let scene = Scene::new();
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    scene.gpu.set(partition("chat", 1000)).expect("good");
    scene.gpu.assign(agent(1), &"chat".parse().expect("a name")).expect("known");
    let report = scene.gpu.set(partition("huge", 5000)).expect_err("too large");
    assert_eq!(report.code, "partition_too_large");
    let report = scene.gpu.assign(agent(2), &"nowhere".parse().expect("a name")).expect_err("unknown");
    assert_eq!(report.code, "not_found");
    let scene = scene.again(Vec::new());
    assert!(scene.gpu.is_assigned(agent(1)) && !scene.gpu.is_assigned(agent(2)));
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    let standing = scene.gpu.standing(agent(1), "m");
    assert_eq!((standing.priority, standing.weight, standing.cells_most), (70, 100, 0));
    assert_eq!(scene.gpu.standing(agent(2), "m").priority, 50);
    scene.gpu.remove(&"chat".parse().expect("a name")).expect("removed");
    let scene = scene.again(Vec::new());
    assert!(!scene.gpu.anybody_assigned());
}

/// What a manifest names must be there, in force or not.
#[test]
fn an_agent_is_not_put_into_a_partition_that_nobody_defined() {
    let scene = Scene::new();
    let (chat, nowhere) = ("chat".parse().expect("a name"), "nowhere".parse().expect("a name"));
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    scene.gpu.set(partition("chat", 1000)).expect("good");
    let report = scene.gpu.is_known(&nowhere, "the agent was not installed").expect_err("unknown");
    assert_eq!((report.code.as_str(), report.http_status()), ("not_found", 404));
    assert!(report.fix.contains("agentctl gpu partition set nowhere"), "{report}");
    // Before the new agentd's engine has said what there is, nothing is in force.
    let scene = scene.again(Vec::new());
    scene.gpu.is_known(&chat, "the agent was not installed").expect("it is defined");
    scene.gpu.assign(agent(1), &chat).expect("it waits with its partition");
    assert!(scene.gpu.assign(agent(2), &nowhere).is_err() && !scene.gpu.is_assigned(agent(2)));
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    assert_eq!(scene.gpu.standing(agent(1), "m").partition, chat);
}

#[test]
fn a_guarantee_leaves_less_to_models_and_bounds_cells() {
    let scene = Scene::new();
    let choice = scene.model("m", 100);
    scene.may_load(&choice, &[]).expect("it fits");
    scene.gpu.set(partition("few", 1)).expect("good");
    scene.gpu.assign(agent(1), &"few".parse().expect("a name")).expect("known");
    // 4 blocks of 256 numbers, key and value, in 32 bits: 8 KiB for each token, so 128 would be less than a block.
    assert_eq!(scene.gpu.standing(agent(1), "m").cells_most, 1);
    scene.gpu.set(partition("few", 4)).expect("good");
    assert_eq!(scene.gpu.standing(agent(1), "m").cells_most, 512);
    scene.gpu.set(partition("sure", 3500)).expect("good");
    let report =
        scene.may_load(&scene.model("large", 3600), &[loaded(&choice)]).expect_err("it is kept free");
    assert_eq!(report.code, "model_too_large");
    // The guarantee's owner is the one whose model that can be.
    scene.may_load(&scene.model("own", 3000), &[loaded(&choice)]).expect("in the partition `sure`");
    assert_eq!(
        scene.view().models.iter().find(|one| one.model == "own").expect("there").partition.as_str(),
        "sure"
    );
}

#[test]
fn the_configuration_defines_its_own_and_keeps_them() {
    let scene = Scene::new();
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    scene.gpu.set(partition("chat", 1000)).expect("good");
    let scene = scene.again(vec![partition("chat", 500)]);
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    let chat =
        scene.view().partitions.into_iter().find(|one| one.partition.id.as_str() == "chat").expect("there");
    assert_eq!((chat.partition.bytes, chat.configured), (500 * MIB, true));
    for refused in [scene.gpu.set(partition("chat", 600)), scene.gpu.remove(&chat.partition.id)] {
        assert_eq!(refused.expect_err("not from here").code, "partition_configured");
    }
}

#[test]
fn the_configuration_puts_agents_into_partitions_now_and_when_they_come() {
    let scene = Scene::new();
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    scene.gpu.set(partition("own", 100)).expect("good");
    let db = scene.gpu.state().db.clone().expect("open");
    db.here().add_agent(&row(&db, agent(1), "writer", None)).expect("added");
    // A child may be called what its parent likes.
    db.here().add_agent(&row(&db, agent(2), "mail", Some(agent(1)))).expect("added");
    drop(db);
    let (chat, own) = ("chat".parse().expect("a name"), "own".parse().expect("a name"));
    let name = |text: &str| text.parse::<AgentName>().expect("a name");
    let agents = [(name("writer"), PartitionId::clone(&chat)), (name("mail"), PartitionId::clone(&chat))];
    let written = || Configured {
        partitions: vec![partition("chat", 500)],
        agents: agents.clone().into(),
        ..Configured::default()
    };
    let scene = scene.again_with(written());
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    let of = |scene: &Scene, number| scene.gpu.standing(agent(number), "m").partition;
    assert_eq!((of(&scene, 1), of(&scene, 2)), (chat.clone(), PartitionId::default_partition()));
    let report = scene.gpu.assign(agent(1), &own).expect_err("the file says otherwise");
    assert!(report.code == "partition_configured" && report.why.contains("`chat`"), "{report}");
    // Its name counts before its manifest; one that the file does not name is where its manifest says.
    scene.gpu.enter(agent(3), &name("mail"), Some(&own)).expect("put");
    scene.gpu.enter(agent(4), &name("other"), Some(&own)).expect("put");
    scene.gpu.enter(agent(5), &name("plain"), None).expect("nowhere in particular");
    assert_eq!((of(&scene, 3), of(&scene, 4)), (chat.clone(), PartitionId::clone(&own)));
    assert!(!scene.gpu.is_assigned(agent(5)));
    scene.gpu.leave(agent(3));
    assert!(!scene.gpu.is_assigned(agent(3)));
    // What the file says is not stored: without it nobody is put there any more.
    let scene = scene.again(Vec::new());
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    assert_eq!((of(&scene, 1), of(&scene, 4)), (PartitionId::default_partition(), own));
    assert!(scene.view().partitions.iter().all(|one| one.partition.id != chat));
}

fn row(db: &Db, agent: AgentId, name: &str, parent: Option<AgentId>) -> AgentRow {
    AgentRow {
        v: 1,
        agent_id: agent,
        owner_id: db.owner(),
        name: name.parse().expect("a name"),
        version: String::new(),
        digest: String::new(),
        manifest: String::new(),
        uid: db.here().next_uid().expect("a uid"),
        wanted: false,
        bundled: false,
        restarts: 0,
        installed_unix_ms: 0,
        parent,
        arguments: Vec::new(),
    }
}

#[test]
fn a_plan_says_how_it_fits_each_partition() {
    let scene = Scene::new();
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    scene.gpu.set(partition("few", 50)).expect("good");
    let choice = scene.model("big", 2000);
    let summary = header(&choice.path).expect("a header");
    let plan = scene.gpu.plan(&Planned::of_file("big", &summary, choice.kind).with(8192, 4));
    assert_eq!((plan.need.cells, plan.need.sequences), (8192, 4));
    let codes: Vec<_> =
        plan.fits.iter().map(|fit| fit.refusal.as_ref().map(|report| report.code.as_str())).collect();
    assert_eq!(codes, [None, Some("model_too_large")]);
    assert_eq!((plan.fits[0].context_tokens_most, plan.fits[1].context_tokens_most), (8192, 0));
    assert_eq!(scene.view().models.len(), 1, "a plan holds nothing");
}

#[test]
fn a_device_that_its_driver_gave_up_takes_nothing_new() {
    let scene = Scene::new();
    let mut card = Device { name: "CUDA0".to_owned(), kind: "gpu".to_owned(), ..devices().remove(0) };
    let mut readings = GpuReadings::default();
    readings.health.step(DeviceEvent::Xid(79));
    card.gpu = Some(readings);
    let all = [devices(), vec![card]].concat();
    let report = scene.may_load_on(&scene.model("m", 100), &all, &[]).expect_err("it fell off the bus");
    assert_eq!((report.code.as_str(), report.http_status()), ("device_unhealthy", 503));
    assert!(report.why.contains("XID 79"), "{report}");
    let view = scene.view();
    assert!(view.devices[0].problem.is_none() && view.devices[1].problem.is_some());
}

#[test]
fn what_the_engine_uses_beyond_its_plan_is_shown_and_kept_free() {
    let scene = Scene::new();
    let choice = scene.model("m", 100);
    scene.may_load(&choice, &[]).expect("it fits");
    let planned = scene.view().devices[0].planned.total_bytes();
    scene.gpu.learn(&status(&devices(), planned + 50 * MIB));
    let device = scene.view().devices.remove(0);
    assert_eq!(device.difference_bytes, Some(50 * MIB as i64));
    assert_eq!(device.planned.overhead_bytes, 50 * MIB);
}

/// The engine's count of a model: so many mebibytes of weights on the host, 32 of cache, 8 for computing, 4 beside.
pub(super) fn count(choice: &Choice, weights_mib: u64) -> MemoryPlan {
    MemoryPlan {
        path: choice.path.clone(),
        architecture: "llama".to_owned(),
        context_tokens: 4096,
        sequences: 8,
        devices: vec![PlannedDevice {
            device: "host".to_owned(),
            memory_total_bytes: 8192 * MIB,
            memory_free_bytes: 8000 * MIB,
            model_bytes: weights_mib * MIB,
            context_bytes: 32 * MIB,
            compute_bytes: 8 * MIB,
        }],
        placement: None,
        row_bytes: 1024,
        rows_least: 1024,
        overhead_bytes: 2 * MIB,
        cells_bytes: MIB,
    }
}

#[test]
fn the_engines_count_is_held_and_known_the_next_time() {
    let scene = Scene::new();
    let choice = scene.model("m", 100);
    let asked = ask(&choice, &devices(), &[], &[]);
    assert!(matches!(scene.gpu.judge(&asked, Count::Unasked), Judged::Count(_)), "it fits: count it");
    assert!(scene.view().models.is_empty(), "nothing is held for a question");
    let exact = Count::Exact(Box::new(count(&choice, 90)));
    assert!(matches!(scene.gpu.judge(&asked, exact), Judged::Verdict(Verdict::Load(_))));
    let held = |scene: &Scene| {
        let need = scene.view().models[0].need.clone();
        (need.basis, need.devices[0].clone())
    };
    let (basis, need) = held(&scene);
    assert_eq!((basis, need.device.as_str()), (Basis::Engine, "CPU"));
    assert_eq!((need.weights_bytes, need.kv_bytes, need.compute_bytes), (90 * MIB, 32 * MIB, 12 * MIB));
    assert_eq!(scene.gpu.holds("m"), Some(134 * MIB));
    // It did not come after all.
    scene.gpu.not_loaded("m");
    assert_eq!((scene.view().models.len(), scene.gpu.holds("m")), (0, None));
    // Another agentd asks nobody: for a load, and for a model that an engine holds from before.
    let scene = scene.again(Vec::new());
    assert!(matches!(scene.gpu.judge(&asked, Count::Unasked), Judged::Verdict(Verdict::Load(_))));
    assert_eq!(held(&scene), (Basis::Engine, need.clone()));
    let scene = scene.again(Vec::new());
    let living = LoadedModel { context_tokens: 4096, sequences: 8, ..loaded(&choice) };
    let other = scene.model("other", 50);
    let _ = scene.gpu.judge(&ask(&other, &devices(), &[living], &[]), Count::Unasked);
    assert_eq!(held(&scene), (Basis::Engine, need));
    // Another file under that name is counted anew.
    let scene = scene.again(Vec::new());
    let larger = scene.model("m", 101);
    assert!(matches!(scene.gpu.judge(&ask(&larger, &devices(), &[], &[]), Count::Unasked), Judged::Count(_)));
}

#[test]
fn a_count_that_does_not_fit_is_refused_though_the_formula_did() {
    let scene = Scene::new();
    let choice = scene.model("m", 100);
    let asked = ask(&choice, &devices(), &[], &[]);
    let judged = scene.gpu.judge(&asked, Count::Exact(Box::new(count(&choice, 5000))));
    let Judged::Verdict(Verdict::Refused(report)) = judged else { panic!("{judged:?}") };
    assert_eq!(report.code, "model_too_large");
    assert!(scene.view().models.is_empty());
    // The formula alone refuses what can never fit, and nobody is asked.
    let huge = scene.model("huge", 5000);
    let judged = scene.gpu.judge(&ask(&huge, &devices(), &[], &[]), Count::Unasked);
    assert!(matches!(&judged, Judged::Verdict(Verdict::Refused(report)) if report.code == "model_too_large"));
}

#[test]
fn what_was_learned_of_a_device_outlives_agentd_and_is_believed_in_bounds() {
    let scene = Scene::new();
    let choice = scene.model("m", 100);
    scene.may_load(&choice, &[]).expect("it fits");
    let planned = scene.view().devices[0].planned.total_bytes();
    scene.gpu.learn(&status(&devices(), planned + 300 * MIB));
    // Less is no reason to promise it again.
    scene.gpu.learn(&status(&devices(), planned + 10 * MIB));
    let scene = scene.again(Vec::new());
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    let device = scene.view().devices.remove(0);
    assert_eq!((device.planned.overhead_bytes, device.difference_bytes), (300 * MIB, None));
    // Gigabytes that were somebody else's do not close the device for good.
    scene.gpu.learn(&status(&devices(), planned + 3900 * MIB));
    let scene = scene.again(Vec::new());
    scene.may_load(&scene.model("m", 100), &[]).expect("it fits");
    assert_eq!(scene.view().devices[0].planned.overhead_bytes, 1024 * MIB);
    // Another device of that name has its own.
    let scene = scene.again(Vec::new());
    let other = vec![Device { description: "another processor".to_owned(), ..devices().remove(0) }];
    scene.may_load_on(&scene.model("m", 100), &other, &[]).expect("it fits");
    assert_eq!(scene.view().devices[0].planned.overhead_bytes, 0);
}

pub(super) fn holder(choice: &Choice, idle_s: u64) -> Holder {
    Holder {
        model: choice.name.clone(),
        busy: false,
        pinned: false,
        idle: std::time::Duration::from_secs(idle_s),
        reload: std::time::Duration::from_secs(1),
    }
}

#[test]
fn room_is_made_by_the_idle_and_never_by_the_busy_or_the_pinned() {
    let scene = Scene::new();
    let all: Vec<Choice> =
        [("a", 1200), ("b", 1200), ("c", 1200)].map(|(name, size)| scene.model(name, size)).into();
    for at in 0..all.len() {
        let there: Vec<LoadedModel> = all[..at].iter().map(loaded).collect();
        scene.may_load(&all[at], &there).expect("all three fit");
    }
    let there: Vec<LoadedModel> = all.iter().map(loaded).collect();
    let new = scene.model("new", 1000);
    let judge = |holders: &[Holder], asker: Option<Asker>| {
        let ask = Ask { asker, ..ask(&new, &devices(), &there, holders) };
        match scene.gpu.judge(&ask, Count::Away(String::new())) {
            Judged::Verdict(verdict) => verdict,
            other => panic!("it was counted: {other:?}"),
        }
    };
    let idle = [holder(&all[0], 10), holder(&all[1], 600), holder(&all[2], 60)];
    let of = |names: &[&str]| Verdict::MakeRoom(names.iter().map(|name| (*name).to_owned()).collect());
    assert_eq!(judge(&idle, None), of(&["b"]));
    let pinned = [idle[0].clone(), Holder { pinned: true, ..idle[1].clone() }, idle[2].clone()];
    assert_eq!(judge(&pinned, None), of(&["c"]));
    let busy = idle.clone().map(|one| Holder { busy: true, ..one });
    let Verdict::Refused(report) = judge(&busy, None) else { panic!("nobody may go") };
    assert_eq!((report.code.as_str(), report.http_status()), ("vram_budget_exceeded", 429));
    // One that matters less than who has the room waits.
    let minor = Asker { priority: 40, ..Asker::default() };
    assert!(matches!(judge(&idle, Some(minor)), Verdict::Refused(_)));
    // What can never fit makes nobody go.
    let huge = scene.model("huge", 5000);
    let judged = scene.gpu.judge(&ask(&huge, &devices(), &there, &idle), Count::Unasked);
    let Judged::Verdict(Verdict::Refused(report)) = judged else { panic!("{judged:?}") };
    assert_eq!(report.code, "model_too_large");
    // A larger one takes two.
    let large = scene.model("large", 2500);
    let judged = scene.gpu.judge(&ask(&large, &devices(), &there, &idle), Count::Away(String::new()));
    let Judged::Verdict(Verdict::MakeRoom(models)) = judged else { panic!("{judged:?}") };
    assert_eq!(models.len(), 2);
}
