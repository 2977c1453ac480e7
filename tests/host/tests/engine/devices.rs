//! What does the engine say of NVIDIA's devices, and does it live on when one goes?
//!
//! The library is `tests/nvml-mock`, given to the engine as a driver's would be: by its path. What the engine says is
//! read through its socket, as agentd reads it.

use crate::client::{Client, Engine, greedy, programs, text};
use agentd_domain::device::{DeviceAction, EccCounters, GpuProcess, MigInstance};
use agentd_domain::engine::{GpuReadings, ModelKind};
use nvml_mock::{Device, Event, Instance, Process, State};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GIB: u64 = 1 << 30;
const XID: u64 = 8;
const ECC_DOUBLE: u64 = 2;
const MIG_CHANGE: u64 = 256;
/// For what another thread has to notice; a hang fails.
const DEADLINE: Duration = Duration::from_secs(60);

/// A card on which everything works.
fn card() -> Device {
    Device {
        uuid: "GPU-8f1c2d3e-0000-1111-2222-333344445555".to_owned(),
        minor: Some(3),
        name: "Mock 80GB".to_owned(),
        pci: "00000000:C1:00.0".to_owned(),
        utilisation: Some((37, 12)),
        temperature: Some(54),
        power: Some(123_456),
        power_limit: Some(350_000),
        energy: Some(987_654_321),
        clocks: Some((1410, 1593)),
        memory: Some((80 * GIB, GIB, 60 * GIB, 19 * GIB)),
        processes: Some(vec![
            Process { pid: 4242, used: Some(7 * GIB), gpu_instance: None },
            Process { pid: 4243, used: None, gpu_instance: Some(3) },
        ]),
        // Software power cap and hardware thermal slowdown.
        throttle: Some(0x4 | 0x40),
        ecc: Some((5, 1)),
        mig: Some((false, false)),
        event_kinds: Some(XID | ECC_DOUBLE | MIG_CHANGE | 1),
        ..Device::default()
    }
}

struct Machine {
    engine: Engine,
    client: Client,
    state: PathBuf,
    _folder: TempDir,
}

impl Machine {
    fn start(devices: Vec<Device>) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = folder.path().join("state.json");
        write(&state, devices);
        let engine = Engine::start_from(|command, _| {
            command.arg("--nvml").arg(nvml_mock::library()).env("NVML_MOCK_STATE", &state);
        })?;
        let client = engine.connect();
        Some(Self { engine, client, state, _folder: folder })
    }

    fn gpu(&mut self) -> GpuReadings {
        let mut gpus = self.client.status().gpus;
        assert_eq!(gpus.len(), 1, "{gpus:?}");
        gpus.remove(0)
    }

    /// The first readings that are as wanted.
    fn gpu_when(&mut self, wanted: impl Fn(&GpuReadings) -> bool) -> GpuReadings {
        let begun = Instant::now();
        loop {
            let gpu = self.gpu();
            if wanted(&gpu) {
                return gpu;
            }
            assert!(begun.elapsed() < DEADLINE, "still {gpu:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn write(state: &Path, devices: Vec<Device>) {
    let state_now = State { driver: "615.71.09".to_owned(), devices, ..State::default() };
    state_now.write(state).expect("writing the mock's state");
}

#[test]
fn a_card_is_shown_with_all_that_it_says() {
    let Some(mut machine) = Machine::start(vec![card()]) else { return };
    let gpu = machine.gpu_when(|gpu| gpu.health.watched);
    assert!(machine.engine.threads().contains(&"nvml-0".to_owned()));
    assert_eq!(gpu.uuid.as_deref(), Some("GPU-8f1c2d3e-0000-1111-2222-333344445555"));
    assert_eq!(gpu.name.as_deref(), Some("Mock 80GB"));
    assert_eq!(gpu.pci_address.as_deref(), Some("0000:c1:00.0"));
    assert_eq!(gpu.nodes, ["/dev/nvidia3"]);
    assert_eq!((gpu.utilisation_percent, gpu.memory_utilisation_percent), (Some(37), Some(12)));
    assert_eq!(gpu.temperature_celsius, Some(54));
    assert_eq!((gpu.power_milliwatts, gpu.power_limit_milliwatts), (Some(123_456), Some(350_000)));
    assert_eq!(gpu.energy_millijoules, Some(987_654_321));
    assert_eq!((gpu.graphics_clock_mhz, gpu.memory_clock_mhz), (Some(1410), Some(1593)));
    let memory =
        (gpu.memory_total_bytes, gpu.memory_reserved_bytes, gpu.memory_free_bytes, gpu.memory_used_bytes);
    assert_eq!(memory, (Some(80 * GIB), Some(GIB), Some(60 * GIB), Some(19 * GIB)));
    // Memory that the driver calls unavailable is absent, and says nothing of the other process.
    let known =
        GpuProcess { pid: 4242, used_bytes: Some(7 * GIB), gpu_instance: None, compute_instance: None };
    let unknown = GpuProcess { pid: 4243, used_bytes: None, gpu_instance: Some(3), compute_instance: None };
    assert_eq!(gpu.processes, Some(vec![known, unknown]));
    assert_eq!(gpu.throttle, Some(vec!["sw_power_cap".to_owned(), "hw_thermal_slowdown".to_owned()]));
    assert_eq!(gpu.ecc, Some(EccCounters { corrected: 5, uncorrected: 1 }));
    assert!(gpu.mig.is_some_and(|mig| !mig.enabled && mig.pending.is_none() && mig.instances.is_empty()));
    assert_eq!(gpu.health.action, DeviceAction::None);
}

/// One value after the other is taken from the card. That one alone is absent then, and none turns into zero.
#[test]
fn what_a_card_does_not_support_is_absent_and_not_zero() {
    let Some(mut machine) = Machine::start(vec![card()]) else { return };
    let all = values(&machine.gpu_when(|gpu| gpu.health.watched));
    /// What is taken, and which values go with it.
    type Case = (fn(&mut Device), &'static [&'static str]);
    let cases: [Case; 12] = [
        (|card| card.utilisation = None, &["utilisation_percent", "memory_utilisation_percent"]),
        (|card| card.temperature = None, &["temperature_celsius"]),
        (|card| card.power = None, &["power_milliwatts"]),
        (|card| card.power_limit = None, &["power_limit_milliwatts"]),
        (|card| card.energy = None, &["energy_millijoules"]),
        (|card| card.clocks = None, &["graphics_clock_mhz", "memory_clock_mhz"]),
        (
            |card| card.memory = None,
            &["memory_total_bytes", "memory_used_bytes", "memory_free_bytes", "memory_reserved_bytes"],
        ),
        (|card| card.processes = None, &["processes"]),
        (|card| card.throttle = None, &["throttle"]),
        (|card| card.ecc = None, &["ecc"]),
        (|card| card.mig = None, &["mig"]),
        (|card| card.processes = Some(Vec::new()), &[]),
    ];
    for (take, gone) in cases {
        let mut device = card();
        take(&mut device);
        write(&machine.state, vec![device]);
        let left = values(&machine.gpu());
        for (name, value) in all.as_object().expect("an object") {
            let now = &left[name.as_str()];
            if gone.contains(&name.as_str()) {
                assert!(!value.is_null() && now.is_null(), "{name} is {now} without support");
            } else if gone.is_empty() && name == "processes" {
                assert_eq!(*now, Value::Array(Vec::new()), "no process is an empty list");
            } else {
                assert_eq!(now, value, "{name} changed without {gone:?}");
            }
        }
    }
}

fn values(gpu: &GpuReadings) -> Value {
    serde_json::to_value(gpu).expect("JSON")
}

#[test]
fn without_a_library_or_its_driver_there_is_no_gpu_and_all_else_works() {
    let Some((_, _, models)) = programs() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let state = folder.path().join("state.json");
    State { init: 9, devices: vec![card()], ..State::default() }.write(&state).expect("writing");
    let not_a_library = folder.path().join("text.so");
    std::fs::write(&not_a_library, "not a library").expect("writing");
    for library in [Path::new("/nowhere/libnvidia-ml.so.1"), &not_a_library, &nvml_mock::library()] {
        let engine = Engine::start_from(|command, _| {
            command.arg("--nvml").arg(library).env("NVML_MOCK_STATE", &state);
        });
        let engine = engine.expect("an engine");
        let mut client = engine.connect();
        let status = client.status();
        assert!(status.gpus.is_empty(), "{}: {:?}", library.display(), status.gpus);
        assert!(status.devices.iter().any(|device| device.kind == "cpu"));
        let threads = engine.threads();
        assert!(!threads.iter().any(|name| name.starts_with("nvml-")), "who waits for a card? {threads:?}");
        client.load("tiny", &models.join("tiny.gguf"), ModelKind::Chat).expect("a load");
    }
}

/// A library of another age: one function after the other is not in it.
#[test]
fn a_library_without_a_function_gives_what_is_left() {
    let Some((program, backends, _)) = programs() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let state = folder.path().join("state.json");
    write(&state, vec![card()]);
    let whole = std::fs::read(nvml_mock::library()).expect("the mock");
    let probe = |library: &Path| {
        let output = Command::new(&program)
            .args(["--probe", "--backends"])
            .arg(&backends)
            .arg("--nvml")
            .arg(library)
            .env("NVML_MOCK_STATE", &state)
            .output()
            .expect("the engine");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut probed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(!probed["devices"].as_array().expect("devices").is_empty());
        probed["gpus"].take()
    };
    let all = probe(&nvml_mock::library());
    assert_eq!(all[0]["power_milliwatts"], 123_456);
    let cases = [
        ("nvmlDeviceGetPowerUsage", Some("power_milliwatts")),
        ("nvmlDeviceGetTotalEnergyConsumption", Some("energy_millijoules")),
        ("nvmlDeviceGetMigMode", Some("mig")),
        ("nvmlDeviceGetComputeRunningProcesses_v3", Some("processes")),
        ("nvmlDeviceGetMemoryInfo_v2", Some("memory_total_bytes")),
        ("nvmlDeviceGetUUID", Some("uuid")),
        ("nvmlEventSetWait_v2", None),
        ("nvmlDeviceGetSupportedEventTypes", None),
    ];
    for (function, value) in cases {
        let library = folder.path().join(format!("without-{function}.so"));
        std::fs::write(&library, without(&whole, function)).expect("writing");
        let left = probe(&library);
        match value {
            Some(value) => {
                assert!(left[0][value].is_null(), "{function}: {}", left[0][value]);
                assert!(!left[0]["name"].is_null() && !left[0]["clocks"].is_string());
            }
            None => assert_eq!(left[0]["power_milliwatts"], all[0]["power_milliwatts"], "{function}"),
        }
    }
    for function in ["nvmlInit_v2", "nvmlDeviceGetCount_v2"] {
        let library = folder.path().join(format!("without-{function}.so"));
        std::fs::write(&library, without(&whole, function)).expect("writing");
        assert_eq!(probe(&library), Value::Array(Vec::new()), "{function}");
    }
}

/// The library with another name in the place of this one: a lookup by hash and name no longer finds it.
fn without(library: &[u8], function: &str) -> Vec<u8> {
    let name = [&[0], function.as_bytes(), &[0]].concat();
    let mut changed = library.to_vec();
    let mut found = 0;
    for at in 0..library.len() - name.len() {
        if library[at..at + name.len()] == name[..] {
            changed[at + name.len() - 2] = b'~';
            found += 1;
        }
    }
    assert!(found > 0, "{function} is not in the library");
    changed
}

#[test]
fn a_card_that_disappears_is_lost_and_the_engine_goes_on() {
    let Some(mut machine) = Machine::start(vec![card()]) else { return };
    let tiny = machine.engine.tiny();
    machine.client.load("tiny", &tiny, ModelKind::Chat).expect("the tiny model loads");
    let before = machine.client.generate(greedy("before", text("Hello"), 8)).text;
    let devices = machine.client.status().devices;
    write(&machine.state, vec![Device { lost: true, ..card() }]);
    let gpu = machine.gpu_when(|gpu| gpu.health.action == DeviceAction::Lost);
    // Its name stays, its values do not: half of them would look like a card that lives.
    assert_eq!(gpu.name.as_deref(), Some("Mock 80GB"));
    assert_eq!((gpu.memory_used_bytes, gpu.temperature_celsius, &gpu.processes), (None, None, &None));
    assert!(!gpu.health.action.takes_work());
    assert_eq!(machine.client.generate(greedy("after", text("Hello"), 8)).text, before);
    let names = |devices: &[agentd_domain::engine::Device]| {
        devices.iter().map(|device| device.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&machine.client.status().devices), names(&devices));
    // A card that answers again is not trusted by an engine that saw it go.
    write(&machine.state, vec![card()]);
    let again = machine.gpu_when(|gpu| gpu.temperature_celsius == Some(54));
    assert_eq!(again.health.action, DeviceAction::Lost);
}

#[test]
fn events_become_what_is_to_be_done() {
    let Some(mut machine) = Machine::start(vec![card()]) else { return };
    machine.gpu_when(|gpu| gpu.health.watched);
    let mut device = card();
    let steps = [
        (Event { kind: XID, data: 74 }, DeviceAction::AvoidSplit),
        (Event { kind: XID, data: 31 }, DeviceAction::RestartProcess),
        (Event { kind: MIG_CHANGE, data: 0 }, DeviceAction::Reread),
        (Event { kind: ECC_DOUBLE, data: 0 }, DeviceAction::DrainAndReset),
        (Event { kind: XID, data: 79 }, DeviceAction::Lost),
    ];
    for (event, action) in steps {
        device.events.push(event);
        write(&machine.state, vec![device.clone()]);
        machine.gpu_when(|gpu| gpu.health.action == action);
    }
    // Its last event is one more of a kind that was there before.
    device.events.push(Event { kind: XID, data: 31 });
    write(&machine.state, vec![device]);
    let gpu = machine.gpu_when(|gpu| gpu.health.xids.contains(&(31, 2)));
    assert_eq!(gpu.health.xids, [(74, 1), (31, 2), (79, 1)]);
    assert_eq!((gpu.health.ecc_uncorrected_events, gpu.health.mig_changes), (1, 1));
}

/// The driver reports without an end. The engine counts a bounded number a second and answers as before.
#[test]
fn a_storm_of_xids_takes_neither_the_processor_nor_the_engine() {
    let storm = Some(Event { kind: XID, data: 13 });
    let Some(mut machine) = Machine::start(vec![Device { storm, ..card() }]) else { return };
    let tiny = machine.engine.tiny();
    machine.client.load("tiny", &tiny, ModelKind::Chat).expect("the tiny model loads");
    let count = |gpu: &GpuReadings| gpu.health.xids.first().map_or(0, |(_, count)| *count);
    let first = count(&machine.gpu_when(|gpu| count(gpu) > 0));
    let begun = Instant::now();
    let mut answers = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let end = machine.client.generate(greedy(&format!("storm-{answers}"), text("Hello"), 4)).end;
        assert!(end.is_ok(), "{end:?}");
        answers += 1;
    }
    let counted = count(&machine.gpu()) - first;
    // 64 each 200 ms, and one more burst on either side.
    let most = 64 * (begun.elapsed().as_millis() as u64 / 200 + 2);
    assert!(counted > 0 && counted <= most, "{counted} in {:?}, at most {most}", begun.elapsed());
    assert!(answers > 0);
    assert_eq!(machine.gpu().health.action, DeviceAction::RestartProcess);
}

#[test]
fn a_card_that_is_cut_up_anew_shows_its_new_instances() {
    let instance = |number: u64, used: u64| Instance {
        uuid: format!("MIG-{number}"),
        total: 10 * GIB,
        used,
        ..Instance::default()
    };
    let mut device = card();
    device.mig = Some((true, true));
    device.instances = vec![instance(1, GIB), instance(2, 0)];
    let Some(mut machine) = Machine::start(vec![device.clone()]) else { return };
    let shown = |number: u64, used: u64| MigInstance {
        uuid: format!("MIG-{number}"),
        memory_total_bytes: Some(10 * GIB),
        memory_used_bytes: Some(used),
        // Without a driver nothing says which nodes open them, and none is guessed.
        nodes: Vec::new(),
    };
    let gpu = machine.gpu_when(|gpu| gpu.health.watched);
    assert_eq!(gpu.mig.expect("MIG").instances, [shown(1, GIB), shown(2, 0)]);
    device.instances = vec![instance(3, 2 * GIB)];
    device.events.push(Event { kind: MIG_CHANGE, data: 0 });
    write(&machine.state, vec![device.clone()]);
    let gpu = machine.gpu_when(|gpu| gpu.health.mig_changes == 1);
    assert_eq!(gpu.mig.expect("MIG").instances, [shown(3, 2 * GIB)]);
    assert_eq!(gpu.health.action, DeviceAction::Reread);
    // Switched off at the next reset.
    device.mig = Some((true, false));
    write(&machine.state, vec![device]);
    assert_eq!(machine.gpu().mig.and_then(|mig| mig.pending), Some(false));
}

/// A number of a process says who held memory when it was read. Another process that gets the number later gets
/// nothing of the first one's.
#[test]
fn a_number_that_another_process_gets_carries_nothing_over() {
    let Some(mut machine) = Machine::start(vec![card()]) else { return };
    let with = |used: Option<u64>| Device {
        processes: Some(vec![Process { pid: 4242, used, gpu_instance: None }]),
        ..card()
    };
    for used in [Some(5 * GIB), Some(3), None, Some(GIB)] {
        write(&machine.state, vec![with(used)]);
        let processes = machine.gpu().processes.expect("processes");
        assert_eq!(processes.len(), 1);
        assert_eq!((processes[0].pid, processes[0].used_bytes), (4242, used));
    }
    write(&machine.state, vec![Device { processes: Some(Vec::new()), ..card() }]);
    assert_eq!(machine.gpu().processes, Some(Vec::new()));
}
