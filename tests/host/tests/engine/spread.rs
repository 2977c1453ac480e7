//! Does a model lie on several devices and in host memory as the ledger placed it, and does it answer the same (E8)?
//!
//! Two devices are Mesa's lavapipe twice, each with memory of its own kind: `scripts/test long vulkan` builds the back end
//! and names its folder. How large they are says the test: a ledger with less than they have places as on smaller ones. What
//! the engine counts, and what is then taken, is compared device by device; logits with the processor's own back end.

use crate::client::{Client, Engine, greedy, programs};
use crate::sharing::tokens;
use crate::vulkan::{ROUNDED_TOLERANCE, folder, root_mean_square};
use agentd_domain::device::{MemoryMeasured, MemoryPlan, Placement};
use agentd_domain::engine::{Event, LoadModel, ModelKind, Prompt, Request};
use agentd_domain::gguf;
use agentd_domain::ledger::{Enforcement, Need, PartitionId};
use agentd_gpu::ledger::{Device, Ledger, When};
use agentd_gpu::place;
use agentd_gpu::plan::{Layout, Sizes, need};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests_models::{Layout as Weights, SMALL, Shape};

/// The same physical device under two names.
const TWICE: &str = "0,0";
const MIB: u64 = 1 << 20;
const CELLS: u32 = 512;
const SEQUENCES: u32 = 4;
/// E17: of a device's buffers.
const ERROR_MOST: f64 = 0.02;
/// With all layers on several devices llama.cpp keeps so many copies of what goes from one to the next (`GGML_SCHED_MAX_COPIES`
/// of ggml's build), and counts them where a load then does without.
const COPIES: u64 = 4;

/// Enough layers to be cut in several places.
fn shape() -> Shape {
    Shape { name: "spread", layers: 12, feed_forward: 2048, ..SMALL }
}

struct Model {
    file: PathBuf,
    summary: gguf::Summary,
}

impl Model {
    fn make() -> Self {
        let cache = tests_models::cache().expect("a cache");
        let file = tests_models::ensure(&cache, &shape(), Weights::Q8_0).expect("a model");
        let opened = File::open(&file).expect("a file");
        let bytes = opened.metadata().expect("its length").len();
        let mut read =
            |at, into: &mut [u8]| opened.read_exact_at(into, at).map_err(|error| error.to_string());
        let summary = gguf::check(bytes, &mut read).expect("an honest file");
        Self { file, summary }
    }

    fn layers(&self) -> u32 {
        self.summary.shape.blocks.len() as u32 + 1
    }

    fn need(&self, layout: &Layout) -> Need {
        let (cells, sequences) = (u64::from(CELLS), u64::from(SEQUENCES));
        let of = &self.summary;
        let sizes = Sizes::of_engine(&of.shape, ModelKind::Chat, of.context_length, cells, sequences);
        need(&of.shape, &of.architecture, &sizes, layout, &|_| 0)
    }

    /// Placed by a ledger whose devices have so many bytes.
    fn placed(&self, bytes: [u64; 2]) -> Layout {
        let device = |name: &str, kind: &str, total_bytes: u64| Device {
            name: name.to_owned(),
            description: String::new(),
            kind: kind.to_owned(),
            total_bytes,
            reserve_bytes: 0,
            reported_free_bytes: total_bytes,
            enforcement: Enforcement::Engine,
            problem: None,
            gpu: None,
        };
        let mut ledger = Ledger::default();
        ledger.set_devices(vec![
            device("Vulkan0", "gpu", bytes[0]),
            device("Vulkan1", "gpu", bytes[1]),
            device("CPU", "cpu", 4096 * MIB),
        ]);
        let rooms = ledger.rooms_for(&PartitionId::default_partition(), When::Now);
        let need = |layout: &Layout| self.need(layout);
        let whole = place::whole(self.layers(), "host", &rooms, &need);
        let layout = whole.unwrap_or_else(|| place::spilled(self.layers(), "host", &rooms, &need));
        // A lease is a vector over devices, and the ledger takes it.
        let mut lease = self.need(&layout);
        lease
            .devices
            .iter_mut()
            .filter(|part| part.device == "host")
            .for_each(|part| part.device = "CPU".to_owned());
        ledger
            .load("spread", &PartitionId::default_partition(), lease, &|_| 0)
            .expect("it was placed to fit");
        for (name, most) in [("Vulkan0", bytes[0]), ("Vulkan1", bytes[1])] {
            let on = ledger.need("spread").expect("held").on(name).map_or(0, |part| part.total_bytes());
            assert!(on <= most, "{name}: {on} of {most}");
        }
        layout
    }

    fn run(&self, backends: &Path, placement: &Placement, real: bool) -> Vec<u8> {
        let (program, _, _) = programs().expect("they were there before");
        let mut command = Command::new(program);
        command.arg("plan").arg(&self.file).arg("--backends").arg(backends);
        command.args(["--context", &CELLS.to_string(), "--sequences", &SEQUENCES.to_string()]);
        command.args(["--placement", &placement.to_string()]);
        if real {
            command.arg("--real");
        }
        let output = command.env("GGML_VK_VISIBLE_DEVICES", TWICE).output().expect("the engine");
        assert!(output.status.success(), "{placement}: {output:?}");
        output.stdout
    }
}

/// Planned by the formula, counted by the engine, taken by a load: by device.
fn compare(model: &Model, backends: &Path, layout: &Layout) {
    let placement = layout.placement();
    let plan: MemoryPlan = serde_json::from_slice(&model.run(backends, &placement, false)).expect("a plan");
    let real: MemoryMeasured =
        serde_json::from_slice(&model.run(backends, &placement, true)).expect("a load");
    assert_eq!(plan.placement.as_ref(), Some(&placement));
    let formula = model.need(layout);
    let crossing = COPIES * 512 * shape().width as u64 * 4;
    for counted in &plan.devices {
        let name = counted.device.as_str();
        let taken = real.devices.iter().find(|on| on.device == name).expect("the same devices");
        let off = counted.sum_bytes().abs_diff(taken.sum_bytes());
        let most = ((taken.sum_bytes() as f64 * ERROR_MOST) as u64).max(crossing);
        let ours = formula.on(name).map_or(0, |part| part.total_bytes());
        println!(
            "RESULT: {placement} on {name}: formula {} KiB, counted {} KiB, taken {} KiB",
            ours >> 10,
            counted.sum_bytes() >> 10,
            taken.sum_bytes() >> 10
        );
        assert!(off <= most, "{name}: counted {counted:?}, taken {taken:?}");
        assert!(counted.sum_bytes() + 1024 >= taken.sum_bytes(), "a load never takes more than was counted");
        assert_eq!(counted.context_bytes, taken.context_bytes, "{name}: keys and values");
        if name != "host" {
            let on = formula.on(name).expect("placed there");
            assert_eq!(on.kv_bytes, counted.context_bytes, "{name}: the layers that were placed there");
            // What a back end's graph takes, and copies of what crosses, are in the engine's count alone: that is what is held.
            assert!(on.weights_bytes >= counted.model_bytes, "{name}: {on:?}, counted {counted:?}");
        }
    }
}

fn load(client: &mut Client, model: &Model, placement: Option<Placement>) {
    let path = model.file.to_str().expect("a plain path").to_owned();
    let (kind, context_tokens, sequences) = (ModelKind::Chat, CELLS, SEQUENCES);
    let order = LoadModel {
        model: "tiny".to_owned(),
        path,
        kind,
        context_tokens,
        sequences,
        placement: placement.clone(),
    };
    match client.ask(Request::Load(order)) {
        Event::Loaded(info) => assert_eq!(info.placement, placement),
        other => panic!("expected a loaded model, got {other:?}"),
    }
}

#[test]
fn on_vulkan_a_model_is_spread_over_devices_and_host_memory_as_the_ledger_placed_it() {
    let Some(backends) = folder() else { return };
    let start = || {
        Engine::start_on(&backends, |command, _| {
            command.env("GGML_VK_VISIBLE_DEVICES", TWICE);
        })
    };
    let Some(engine) = start() else { return };
    let mut client = engine.connect();
    let listed = client.status().devices;
    assert_eq!(listed.iter().filter(|device| device.kind == "gpu").count(), 2, "{listed:?}");
    let model = Model::make();
    let all = Layout { host: "host".to_owned(), devices: vec![("Vulkan0".to_owned(), 1)], offloaded: None };
    let bytes = model.need(&all).on("Vulkan0").expect("all of it").total_bytes();
    let layers = model.layers();
    let cases = [
        ("one device", [bytes + MIB, bytes / 2], 1, layers..=layers),
        ("two devices", [bytes * 8 / 10, bytes * 8 / 10], 2, layers..=layers),
        ("two devices and the host", [bytes * 55 / 100, bytes * 50 / 100], 2, 4..=layers - 1),
        ("a device that is too small", [bytes * 65 / 100, 0], 1, 3..=layers - 1),
    ];
    let Some(processor) = Engine::start() else { return };
    let mut on_processor = processor.connect();
    load(&mut on_processor, &model, None);
    for (case, rooms, devices, on_devices) in cases {
        let layout = model.placed(rooms);
        let placement = layout.placement();
        assert_eq!(placement.stretches.len(), devices, "{case}: {placement}");
        assert!(on_devices.contains(&placement.layers()), "{case}: {placement}");
        compare(&model, &backends, &layout);
        load(&mut client, &model, Some(placement.clone()));
        let mut part: f32 = 0.0;
        for length in [1, 40, 120] {
            let prompt = tokens(length, length);
            let (ours, theirs) = (client.logits("tiny", &prompt), on_processor.logits("tiny", &prompt));
            assert!(ours.iter().any(|logit| logit.abs() > 0.1), "logits are not all zero");
            let differences: Vec<f32> =
                ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
            part = part.max(root_mean_square(&differences) / root_mean_square(&theirs));
        }
        println!(
            "RESULT: {case}, {placement}: logits differ by {:.2} % of their standard deviation",
            part * 100.0
        );
        assert!(part <= ROUNDED_TOLERANCE, "{case}: {part}");
        let answer = client.generate(greedy(case, Prompt::Tokens(tokens(7, 40)), 16));
        assert_eq!(answer.end.expect("an end").completion_tokens, 16, "{case}");
        assert!(matches!(client.ask(Request::Unload { model: "tiny".to_owned() }), Event::Unloaded { .. }));
    }
}

#[test]
fn on_vulkan_a_placement_that_cannot_be_is_refused_and_nothing_is_loaded() {
    let Some(backends) = folder() else { return };
    let Some(engine) = Engine::start_on(&backends, |command, _| {
        command.env("GGML_VK_VISIBLE_DEVICES", TWICE);
    }) else {
        return;
    };
    let mut client = engine.connect();
    let path = engine.tiny().to_str().expect("a plain path").to_owned();
    for (placement, why) in [("Vulkan7:1", "no device Vulkan7"), ("Vulkan0:900", "more layers than it has")] {
        let placement = Some(placement.parse().expect("a placement"));
        let kind = ModelKind::Chat;
        let order = LoadModel {
            model: "m".to_owned(),
            path: path.clone(),
            kind,
            context_tokens: 0,
            sequences: 0,
            placement,
        };
        match client.ask(Request::Load(order)) {
            Event::Error(report) => {
                assert!(report.code == "placement_wrong" && report.why.contains(why), "{report}")
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
    assert!(client.status().models.is_empty());
}
