//! Where models go on a machine with several devices: the ledger's room decides, partition by partition.

use super::admit::{Count, Judged};
use super::tests::{MIB, Scene, ask, count, devices, holder, loaded};
use super::*;
use crate::engine::{Ask, Asker, Choice, Verdict};
use agentd_domain::device::{MemoryPlan, Placement, PlannedDevice};
use agentd_domain::fault::Report;

/// Two cards of so many mebibytes, and the host with 4 GiB for the engine.
fn cards(first_mib: u64, second_mib: u64) -> Vec<Device> {
    let card = |name: &str, mebibytes: u64| Device {
        name: name.to_owned(),
        kind: "gpu".to_owned(),
        memory_total_bytes: mebibytes * MIB,
        memory_free_bytes: mebibytes * MIB,
        ..devices().remove(0)
    };
    [vec![card("GPU0", first_mib), card("GPU1", second_mib)], devices()].concat()
}

fn at(text: &str) -> Option<Placement> {
    Some(text.parse().expect("a placement"))
}

/// The formula's word where the engine would be asked, and what is held without it.
fn placed(scene: &Scene, choice: &Choice, on: &[Device]) -> Result<Option<Placement>, Report> {
    let asked = ask(choice, on, &[], &[]);
    let counted = match scene.gpu.judge(&asked, Count::Unasked) {
        Judged::Count(placement) => placement,
        Judged::Verdict(Verdict::Refused(report)) => return Err(report),
        other => panic!("{other:?}"),
    };
    match scene.gpu.judge(&asked, Count::Away("there is none".to_owned())) {
        Judged::Verdict(Verdict::Load(placement)) => {
            assert_eq!(placement, counted, "it is loaded as it was counted");
            Ok(placement)
        }
        other => panic!("{other:?}"),
    }
}

fn held(scene: &Scene, device: &str) -> u64 {
    let of = scene.view().devices.into_iter().find(|one| one.name == device).expect("there");
    of.planned.total_bytes() - of.planned.overhead_bytes
}

fn partition(id: &str, device: &str, mebibytes: u64) -> Partition {
    Partition { devices: vec![device.to_owned()], ..super::tests::partition(id, mebibytes) }
}

#[test]
fn a_model_goes_to_one_device_then_over_several_and_the_rest_to_host_memory() {
    // Twelve layers of 100 MiB. A quarter of such small cards is their reserve.
    let on = |first, second| (Scene::new(), cards(first, second));
    let model = |scene: &Scene| scene.layered("m", 12, 100);
    let (scene, cards) = on(1000, 3000);
    assert_eq!(placed(&scene, &model(&scene), &cards).expect("it fits"), at("GPU1:13"));
    assert_eq!(held(&scene, "GPU0"), 0);
    let (scene, cards) = on(1200, 1200);
    let split = placed(&scene, &model(&scene), &cards).expect("it fits");
    assert_eq!(split, at("GPU0:6,GPU1:7"), "both are filled alike");
    // A lease over devices: each has its own part, within its room.
    for device in ["GPU0", "GPU1"] {
        assert!(
            (600 * MIB..=900 * MIB).contains(&held(&scene, device)),
            "{device}: {}",
            held(&scene, device)
        );
    }
    let (scene, cards) = on(600, 800);
    let spilled = placed(&scene, &model(&scene), &cards).expect("it fits").expect("placed");
    assert_eq!(spilled.stretches.len(), 2);
    assert!((5..13).contains(&spilled.layers()), "{spilled}");
    assert!(held(&scene, "CPU") >= u64::from(13 - spilled.layers() - 1) * 100 * MIB);
    let need = scene.view().models.remove(0).need;
    assert!(need.assumed.iter().any(|line| line.contains("on the processor")), "{:?}", need.assumed);
    // Too large for all of them together.
    let huge = scene.layered("huge", 12, 600);
    assert_eq!(placed(&Scene::new(), &huge, &cards).expect_err("7 GiB").code, "model_too_large");
}

#[test]
fn who_holds_a_device_now_is_waited_for_and_no_reason_for_host_memory() {
    let (scene, cards) = (Scene::new(), cards(2000, 400));
    let (first, second) = (scene.layered("first", 10, 120), scene.layered("second", 10, 120));
    assert_eq!(placed(&scene, &first, &cards).expect("it fits"), at("GPU0:11"));
    let there = LoadedModel { placement: at("GPU0:11"), ..loaded(&first) };
    let judge = |holders: &[crate::engine::Holder]| {
        scene.gpu.judge(&ask(&second, &cards, std::slice::from_ref(&there), holders), Count::Unasked)
    };
    let judged = judge(&[holder(&first, 60)]);
    assert!(matches!(&judged, Judged::Verdict(Verdict::MakeRoom(gone)) if *gone == ["first"]), "{judged:?}");
    let busy = crate::engine::Holder { busy: true, ..holder(&first, 60) };
    let judged = judge(&[busy]);
    let Judged::Verdict(Verdict::Refused(report)) = judged else { panic!("{judged:?}") };
    assert_eq!((report.code.as_str(), report.http_status()), ("vram_budget_exceeded", 429));
}

#[test]
fn a_guaranteed_device_is_its_partitions_and_a_bad_link_is_not_crossed() {
    let (scene, cards) = (Scene::new(), cards(2000, 2000));
    placed(&scene, &scene.layered("m", 2, 10), &cards).expect("the devices are known");
    scene.gpu.set(partition("chat", "GPU0", 1400)).expect("good");
    let choice = scene.layered("big", 10, 120);
    // Whoever asks, it goes where nothing is promised; what is too much for that goes to whom it was promised.
    assert_eq!(placed(&scene, &choice, &cards).expect("it fits"), at("GPU1:11"));
    scene.gpu.set(partition("other", "GPU1", 1400)).expect_err("it is taken");
    let scene = scene.again(Vec::new());
    placed(&scene, &scene.layered("m", 2, 10), &cards).expect("the devices are known");
    scene.gpu.set(partition("other", "GPU1", 1400)).expect("good");
    let asker = Asker { priority: 70, partition: "chat".parse().expect("a name") };
    let asked = Ask { asker: Some(asker), ..ask(&choice, &cards, &[], &[]) };
    let judged = scene.gpu.judge(&asked, Count::Unasked);
    assert!(matches!(&judged, Judged::Count(placement) if *placement == at("GPU0:11")), "{judged:?}");
    // XID 74: a link between devices is bad.
    let scene = Scene::new();
    let mut linked = self::cards(900, 900);
    let mut readings = agentd_domain::engine::GpuReadings::default();
    readings.health.step(agentd_domain::device::DeviceEvent::Xid(74));
    linked[1].gpu = Some(readings);
    let placement = placed(&scene, &choice, &linked).expect("it fits").expect("placed");
    assert_eq!(placement.stretches.iter().map(|one| one.device.as_str()).collect::<Vec<_>>(), ["GPU0"]);
}

/// The engine's word by device: as many mebibytes of weights, and of room for computing.
fn counted(choice: &Choice, placement: &Placement, computing_mib: u64) -> MemoryPlan {
    let mut plan = count(choice, 0);
    let on = |device: &str, layers: u64, computing_mib: u64| PlannedDevice {
        device: device.to_owned(),
        memory_total_bytes: 0,
        memory_free_bytes: 0,
        model_bytes: layers * 100 * MIB,
        context_bytes: 0,
        compute_bytes: computing_mib * MIB,
    };
    plan.devices = placement
        .stretches
        .iter()
        .map(|one| on(&one.device, one.layers.into(), computing_mib))
        .chain([on("host", 0, 8)])
        .collect();
    plan.placement = Some(placement.clone());
    plan
}

#[test]
fn what_the_engine_counts_beyond_the_formula_places_it_anew_and_a_count_is_of_one_placement() {
    let (scene, cards) = (Scene::new(), cards(1200, 1200));
    let choice = scene.layered("m", 12, 100);
    let asked = ask(&choice, &cards, &[], &[]);
    let Judged::Count(Some(first)) = scene.gpu.judge(&asked, Count::Unasked) else { panic!("it fits") };
    // 150 MiB for computing on each of them: seven layers and those are more than a card has.
    let exact = Count::Exact(Box::new(counted(&choice, &first, 250)));
    let judged = scene.gpu.judge(&asked, exact);
    let Judged::Beyond(beyond, report) = judged else { panic!("{judged:?}") };
    assert_eq!(report.code, "model_too_large");
    let judged = scene.gpu.judge_beyond(&asked, Count::Unasked, beyond.clone());
    let Judged::Count(Some(second)) = judged else { panic!("{judged:?}") };
    assert!(second.layers() < first.layers(), "{second} after {first}");
    let exact = Count::Exact(Box::new(counted(&choice, &second, 250)));
    let judged = scene.gpu.judge_beyond(&asked, exact, beyond);
    assert!(matches!(&judged, Judged::Verdict(Verdict::Load(Some(at))) if *at == second), "{judged:?}");
    assert_eq!(held(&scene, "GPU0"), u64::from(second.stretches[0].layers) * 100 * MIB + 250 * MIB);
    // Another agentd finds the engine with it, and holds the same.
    let before = held(&scene, "GPU1");
    let scene = scene.again(Vec::new());
    let living =
        LoadedModel { placement: Some(second), context_tokens: 4096, sequences: 8, ..loaded(&choice) };
    let _ = scene.gpu.judge(&ask(&scene.layered("n", 1, 1), &cards, &[living], &[]), Count::Unasked);
    assert_eq!(held(&scene, "GPU1"), before);
}
