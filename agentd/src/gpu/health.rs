//! What is done when a device's driver reports trouble?
//!
//! In:     what the engine reads of its devices, every few seconds where there are any with a driver that speaks.
//! Out:    an engine on a lost device is ended and begins anew without it, its leases free; a device that needs a reset
//!         takes nothing new; each step a record of the audit log and a problem on the board.
//! Always: what was said of a device stays until the machine is started again: an engine that was started since was not
//!         told. An engine is ended once for each trouble, and only when it holds something there.
//! Where:  which event asks for what is `agentd_domain::device`'s; a program's own fault ends that program, and an engine
//!         is started again by the launcher.

use super::Gpu;
use crate::audit::Audit;
use crate::engine::{Engine, Stage};
use crate::health::{Board, Weight};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::device::DeviceAction;
use agentd_domain::engine::{EngineStatus, GpuReadings};
use agentd_domain::fault::Report;
use agentd_sandbox::client::Launcher;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Between looks; an event of a driver waits for the next. Without a device that has readings nobody looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What is known to be wrong, by the device's id.
#[derive(Debug, Clone, Default)]
pub(super) struct Ill(BTreeMap<String, Trouble>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Trouble {
    action: DeviceAction,
    why: String,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Say it: something new is wrong with a device.
    Tell { device: String, action: DeviceAction, why: String },
    /// A person must act.
    Show { device: String, report: Report },
    /// These models are on a device that is gone.
    EndEngine { device: String, models: Vec<String> },
}

impl Ill {
    /// What follows from what the engine says now. `holds` names the models on a device.
    pub(super) fn step(&mut self, status: &EngineStatus, holds: &dyn Fn(&str) -> Vec<String>) -> Vec<Act> {
        let named =
            status.devices.iter().filter_map(|device| Some((Some(&device.name), device.gpu.as_ref()?)));
        let others = status.gpus.iter().map(|gpu| (None, gpu));
        let mut acts = Vec::new();
        for (name, gpu) in named.chain(others) {
            let action = gpu.health.action;
            let Some(id) = id_of(gpu).filter(|_| action != DeviceAction::None) else { continue };
            if self.0.get(&id).is_some_and(|known| known.action >= action) {
                continue;
            }
            let why = gpu.health.sentence().unwrap_or_else(|| action.advice().to_owned());
            self.0.insert(id.clone(), Trouble { action, why: why.clone() });
            acts.push(Act::Tell { device: id.clone(), action, why });
            acts.extend(gpu.problem().map(|report| Act::Show { device: id.clone(), report }));
            let models = name.map(|name| holds(name)).unwrap_or_default();
            if action == DeviceAction::Lost && !models.is_empty() {
                acts.push(Act::EndEngine { device: id, models });
            }
        }
        acts
    }

    /// Why nothing new goes to this device.
    pub(super) fn problem(&self, gpu: &GpuReadings) -> Option<String> {
        let trouble = self.0.get(&id_of(gpu)?)?;
        (!trouble.action.takes_work()).then(|| trouble.why.clone())
    }
}

/// What stays the same from one engine to the next.
fn id_of(gpu: &GpuReadings) -> Option<String> {
    gpu.uuid.clone().or_else(|| gpu.pci_address.clone())
}

impl Gpu {
    /// What follows from these readings; the ledger has them when this returns.
    pub(super) fn tend_once(&self, status: &EngineStatus) -> Vec<Act> {
        let mut state = self.state();
        let mut ill = std::mem::take(&mut state.ill);
        let holds = |device: &str| -> Vec<String> {
            let on = |model: &&str| state.ledger.need(model).is_some_and(|need| need.on(device).is_some());
            state.ledger.models().filter(on).map(str::to_owned).collect()
        };
        let acts = ill.step(status, &holds);
        state.ill = ill;
        if !acts.is_empty() {
            self.take_over(&mut state, &status.devices, &status.models);
        }
        acts
    }

    /// Looks after the devices as long as there is an engine.
    pub async fn tend(self, engine: Engine, launcher: Launcher, board: Arc<Board>, audit: Audit) {
        let mut view = engine.watch();
        loop {
            let stage = view.borrow_and_update().stage.clone();
            let mut readings = false;
            if matches!(stage, Stage::Loading | Stage::Ready)
                && let Ok(status) = engine.status().await
            {
                readings =
                    !status.gpus.is_empty() || status.devices.iter().any(|device| device.gpu.is_some());
                let this = self.clone();
                let acts = tokio::task::spawn_blocking(move || this.tend_once(&status)).await;
                for act in acts.unwrap_or_default() {
                    carry_out(act, &launcher, &board, &audit).await;
                }
            }
            let over = async {
                match readings {
                    true => tokio::time::sleep(LOOK_EVERY).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => {}
                changed = view.changed() => if changed.is_err() { return },
            }
        }
    }
}

async fn carry_out(act: Act, launcher: &Launcher, board: &Board, audit: &Audit) {
    match act {
        Act::Tell { device, action, why } => {
            tracing::warn!(device, ?action, why, "a device is in trouble");
            let verdict = if action.takes_work() { Verdict::Allowed } else { Verdict::Denied };
            let entry = Entry::new(Actor::Appliance, "device.event", verdict);
            audit.report(entry.detail(&format!("{device}: {why}")));
        }
        Act::Show { device, report } => board.set(&format!("device {device}"), Weight::Degraded, report),
        Act::EndEngine { device, models } => {
            let launcher = launcher.clone();
            let ended = tokio::task::spawn_blocking(move || launcher.stop_engine(crate::engine::SET)).await;
            let outcome = match ended {
                Ok(Ok(())) => "the engine was ended and begins anew",
                // It ended by itself: that is what was wanted.
                _ => "the engine had ended",
            };
            let entry = Entry::new(Actor::Appliance, "engine.end", Verdict::Killed);
            audit.report(entry.detail(&format!("{device} is lost with {}: {outcome}", models.join(", "))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::device::DeviceEvent;
    use agentd_domain::engine::Device;

    fn card(events: &[DeviceEvent]) -> Device {
        let mut gpu = GpuReadings { uuid: Some("GPU-1".to_owned()), ..GpuReadings::default() };
        events.iter().for_each(|event| gpu.health.step(*event));
        Device {
            name: "CUDA0".to_owned(),
            description: "a card".to_owned(),
            kind: "gpu".to_owned(),
            memory_total_bytes: 8 << 30,
            memory_free_bytes: 8 << 30,
            gpu: Some(gpu),
        }
    }

    fn status(device: Device) -> EngineStatus {
        EngineStatus {
            devices: vec![device],
            models: Vec::new(),
            backend: String::new(),
            running_sequences: 0,
            waiting_requests: 0,
            rss_bytes: 1,
            uptime_ms: 1,
            usage: Vec::new(),
            gpus: Vec::new(),
        }
    }

    fn words(acts: &[Act]) -> Vec<&'static str> {
        let word = |act: &Act| match act {
            Act::Tell { .. } => "tell",
            Act::Show { .. } => "show",
            Act::EndEngine { .. } => "end",
        };
        acts.iter().map(word).collect()
    }

    #[test]
    fn each_trouble_is_acted_on_once_and_worse_ones_again() {
        let mut ill = Ill::default();
        let holds = |_: &str| vec!["m".to_owned()];
        let none: &[&str] = &[];
        assert_eq!(words(&ill.step(&status(card(&[])), &holds)), none);
        let own_fault = card(&[DeviceEvent::Xid(31)]);
        assert_eq!(words(&ill.step(&status(own_fault.clone()), &holds)), ["tell"]);
        assert_eq!(words(&ill.step(&status(own_fault.clone()), &holds)), none);
        assert_eq!(ill.problem(own_fault.gpu.as_ref().expect("readings")), None, "the device is well");
        let drains = card(&[DeviceEvent::Xid(95)]);
        assert_eq!(words(&ill.step(&status(drains.clone()), &holds)), ["tell", "show"]);
        assert!(ill.problem(drains.gpu.as_ref().expect("readings")).is_some_and(|why| why.contains("95")));
        let lost = card(&[DeviceEvent::Lost]);
        assert_eq!(words(&ill.step(&status(lost.clone()), &holds)), ["tell", "show", "end"]);
        assert_eq!(words(&ill.step(&status(lost), &holds)), none, "an engine is not ended again and again");
        // The next engine was not told of anything.
        assert_eq!(words(&ill.step(&status(card(&[])), &holds)), none);
        assert!(ill.problem(card(&[]).gpu.as_ref().expect("readings")).is_some(), "it stays lost");
    }

    #[test]
    fn an_engine_with_nothing_on_the_device_goes_on() {
        let mut ill = Ill::default();
        let lost = status(card(&[DeviceEvent::Xid(79)]));
        assert_eq!(words(&ill.step(&lost, &|_| Vec::new())), ["tell", "show"]);
        // One that no back end can use is told of too.
        let mut other = status(card(&[]));
        other.gpus = vec![GpuReadings { uuid: Some("GPU-2".to_owned()), ..GpuReadings::default() }];
        other.gpus[0].health.step(DeviceEvent::EccUncorrected);
        assert_eq!(words(&ill.step(&other, &|_| Vec::new())), ["tell", "show"]);
    }

    /// From the driver's word to the end of the engine: a fake engine and launcher, everything between is real.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_engine_on_a_lost_device_is_ended_and_its_leases_are_free() {
        use crate::engine::testing::{FakeEngine, Seen, fake_launcher, open_gate};
        use crate::engine::{Choice, Links, Wanted, start};
        use agentd_domain::engine::ModelKind;
        use agentd_domain::launcher::Request;
        use agentd_domain::ledger::{Basis, DeviceNeed, Need};
        use std::sync::Mutex;

        let folder = tempfile::tempdir().expect("a folder");
        let seen: Arc<Mutex<Seen>> = Arc::default();
        seen.lock().expect("unpoisoned").devices = vec![card(&[])];
        let fake = FakeEngine::start(folder.path(), Arc::clone(&seen));
        let path = folder.path().join("launcher.sock");
        let (asked, launcher) = (fake_launcher(&path), Launcher::at(&path));
        let links = Links {
            launcher: launcher.clone(),
            sockets: folder.path().to_owned(),
            memory_max_bytes: 1 << 30,
            load_patience: Duration::from_secs(2),
            gate: open_gate(),
        };
        let engine = start(links, std::future::ready(()));
        let choice = Choice { name: "m".to_owned(), path: "/m".to_owned(), kind: ModelKind::Chat };
        engine.want(Wanted { chat: vec![choice], ..Wanted::default() });
        engine.watch().wait_for(|view| view.stage == Stage::Ready).await.expect("ready");
        let (gpu, board, audit) = (Gpu::new(1 << 30), Arc::new(Board::default()), Audit::default());
        // Where the fake's file cannot be read, the test says where its model lies.
        {
            let mut state = gpu.state();
            gpu.take_over(&mut state, &[card(&[])], &engine.view().models);
            let part =
                DeviceNeed { device: "CUDA0".to_owned(), weights_bytes: 1 << 20, ..DeviceNeed::default() };
            let need = Need {
                devices: vec![part],
                basis: Basis::Engine,
                kv_bytes_per_cell: 1024,
                cells: 512,
                sequences: 1,
                assumed: Vec::new(),
            };
            state.ledger.adopt("m", need);
            state
                .ledger
                .lease("m", agentd_domain::ids::AgentId(uuid::Uuid::from_u128(1)), 256)
                .expect("cells");
        }
        // A lost card, as a driver tells it.
        seen.lock().expect("unpoisoned").devices = vec![card(&[DeviceEvent::Lost])];
        let tending =
            tokio::spawn(gpu.clone().tend(engine.clone(), launcher, Arc::clone(&board), audit.clone()));
        let stopped = || {
            let asked = asked.lock().expect("unpoisoned");
            asked.iter().filter(|ask| matches!(ask, Request::StopEngine { set } if set == "host")).count()
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while stopped() == 0 {
            assert!(std::time::Instant::now() < deadline, "{:?}", asked.lock().expect("unpoisoned"));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The launcher has killed it.
        drop(fake);
        tokio::spawn(gpu.clone().follow(engine.clone()));
        let mut view = engine.watch();
        view.wait_for(|view| matches!(view.stage, Stage::Down(_))).await.expect("alive");
        while gpu.holds("m").is_some() {
            assert!(std::time::Instant::now() < deadline, "its leases are held");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(stopped(), 1);
        assert!(
            board.problems().iter().any(|report| report.code == "gpu_unhealthy"),
            "{:?}",
            board.problems()
        );
        let told: Vec<String> = audit.reported().into_iter().map(|(entry, _)| entry.action).collect();
        assert_eq!(told, ["device.event", "engine.end"]);
        // The next engine's readings say nothing of it, and it takes nothing all the same.
        let mut state = gpu.state();
        gpu.take_over(&mut state, &[card(&[])], &[]);
        assert!(state.ledger.devices()[0].problem.is_some());
        tending.abort();
    }
}
