//! What is done when a device's driver reports trouble?
//!
//! In:     what the engine reads of its devices, every few seconds where there are any with a driver that speaks.
//! Out:    an engine on a lost device is ended and begins anew without it, its leases free; one on a device that needs a
//!         reset finishes what it has begun within [`DRAIN_MOST`] and makes way for one that cannot open the device; each
//!         step a record of the audit log and a problem on the board.
//! Always: what was said of a device is on disk before it is acted on (`device_trouble`), and stays until the device is
//!         well again ([`super::ill`] says when). An engine is ended once for each trouble.
//! Where:  which event asks for what is `agentd_domain::device`'s; a program's own fault ends that program, and an engine
//!         is started again by the launcher; how an engine makes way, `crate::engine`'s `drain.rs`.

use super::Gpu;
use super::ill::Act;
use crate::audit::Audit;
use crate::engine::{Drained, Engine, Stage};
use crate::health::{Board, Weight};
use agentd_domain::audit::{Actor, Entry, Verdict};
use agentd_domain::engine::EngineStatus;
use agentd_domain::fault::Report;
use agentd_sandbox::client::Launcher;
use std::sync::Arc;
use std::time::Duration;

/// Between looks; an event of a driver waits for the next. Without a device that has readings nobody looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What an engine may finish before it makes way. An answer takes seconds; a device with uncorrected errors is not to be
/// trusted with more than that (NVIDIA's guide: applications are to be ended, then the device is reset).
const DRAIN_MOST: Duration = Duration::from_secs(30);

impl Gpu {
    /// What follows from these readings; the ledger has them, and the disk, when this returns. Blocks.
    pub(super) fn tend_once(&self, status: &EngineStatus) -> Vec<Act> {
        let (acts, db, troubles) = {
            let mut state = self.state();
            let mut ill = std::mem::take(&mut state.ill);
            let holds = |device: &str| -> Vec<String> {
                let on =
                    |model: &&str| state.ledger.need(model).is_some_and(|need| need.on(device).is_some());
                state.ledger.models().filter(on).map(str::to_owned).collect()
            };
            let acts = ill.step(status, crate::clock::unix_ms(), &holds);
            state.ill = ill;
            if acts.is_empty() {
                return acts;
            }
            self.take_over(&mut state, &status.devices, &status.models);
            // A fault of a program's own says nothing of the device.
            let kept = state.ill.all().iter().filter(|(_, known)| !known.action.takes_work());
            let kept = kept.map(|(id, known)| (id.clone(), known.clone())).collect();
            (acts, state.db.clone(), kept)
        };
        if let Some(db) = db
            && let Err(error) = db.here().set_troubles(&troubles)
        {
            tracing::warn!(%error, "what was said of devices was not kept");
        }
        acts
    }

    /// Of devices that no engine is started on.
    fn out(&self) -> Vec<(String, Report)> {
        let state = self.state();
        let shown = |(id, known): (&String, &super::Trouble)| {
            let what = format!("{} takes no new work", known.device.called(id));
            let report = Report::environment("gpu_unhealthy", what, known.why.clone(), known.action.advice());
            (id.clone(), report)
        };
        state.ill.out().map(shown).collect()
    }

    /// Looks after the devices as long as there is an engine.
    pub async fn tend(self, engine: Engine, launcher: Launcher, board: Arc<Board>, audit: Audit) {
        let mut view = engine.watch();
        loop {
            for (id, report) in self.out() {
                board.set(&place(&id), Weight::Degraded, report);
            }
            let stage = view.borrow_and_update().stage.clone();
            let mut readings = false;
            if matches!(stage, Stage::Loading | Stage::Ready)
                && let Ok(status) = engine.status().await
            {
                let speaks = |gpu: Option<&agentd_domain::engine::GpuReadings>| {
                    gpu.is_some_and(|gpu| gpu.uuid.is_some())
                };
                readings = !status.gpus.is_empty()
                    || status.devices.iter().any(|device| speaks(device.gpu.as_ref()));
                let this = self.clone();
                let acts = tokio::task::spawn_blocking(move || this.tend_once(&status)).await;
                for act in acts.unwrap_or_default() {
                    carry_out(act, &engine, &launcher, &board, &audit).await;
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
                () = self.0.changed.notified() => self.make_way(&engine, &audit).await,
                changed = view.changed() => if changed.is_err() { return },
            }
        }
    }

    /// What the engine is to see, or to be held to, has changed. Where it sees a device that is to be an agent's own, it
    /// makes way as for one that is to be reset.
    async fn make_way(&self, engine: &Engine, audit: &Audit) {
        match self.granted_and_seen() {
            Some(device) => {
                let why = Report::environment(
                    "engine_begins_anew",
                    "the engine begins anew",
                    format!("{device} is granted to an agent for itself"),
                    "send the request again in a moment: the next engine is there in a second or two",
                );
                drain(engine.clone(), device, why, audit.clone());
            }
            None => engine.reconsider().await,
        }
    }

    pub(super) fn granted_and_seen(&self) -> Option<String> {
        let state = self.state();
        let granted = |device: &&agentd_gpu::ledger::Device| {
            let id = device.gpu.as_ref().and_then(super::ill::id_of);
            id.is_some_and(|id| state.grants.values().any(|grant| grant.id == id))
        };
        state.ledger.devices().iter().find(granted).map(|device| device.name.clone())
    }
}

fn place(device: &str) -> String {
    format!("device {device}")
}

async fn carry_out(act: Act, engine: &Engine, launcher: &Launcher, board: &Board, audit: &Audit) {
    match act {
        Act::Tell { device, action, why } => {
            tracing::warn!(device, ?action, why, "a device is in trouble");
            let verdict = if action.takes_work() { Verdict::Allowed } else { Verdict::Denied };
            let entry = Entry::new(Actor::Appliance, "device.event", verdict);
            audit.report(entry.detail(&format!("{device}: {why}")));
        }
        Act::Show { device, report } => board.set(&place(&device), Weight::Degraded, report),
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
        Act::Drain { device, why } => {
            let again = Report::environment(
                "device_unhealthy",
                "the engine begins anew",
                format!("{device}: {why}"),
                "send the request again in a moment: the next engine does without this device",
            );
            drain(engine.clone(), device, again, audit.clone());
        }
        Act::Well { device, why } => {
            tracing::info!(device, why, "a device takes work again");
            board.clear(&place(&device));
            let entry = Entry::new(Actor::Appliance, "device.event", Verdict::Allowed);
            audit.report(entry.detail(&format!("{device} takes work again: {why}")));
        }
    }
}

/// Aside: the devices are looked after meanwhile, and may be lost before the time is over.
fn drain(engine: Engine, device: String, why: Report, audit: Audit) {
    tokio::spawn(async move {
        let begun = Entry::new(Actor::Appliance, "device.drain", Verdict::Allowed);
        audit.report(begun.detail(&format!(
            "{device}: {}; the engine has {} s",
            why.why,
            DRAIN_MOST.as_secs()
        )));
        let drained = engine.drain(DRAIN_MOST, why).await;
        let outcome = match drained {
            Ok(Drained { broken_off: 0 }) => "all that it had begun is done".to_owned(),
            Ok(Drained { broken_off }) => format!("{broken_off} requests were told to come again"),
            // It went by itself meanwhile.
            Err(_) => "it had ended".to_owned(),
        };
        let entry = Entry::new(Actor::Appliance, "engine.end", Verdict::Killed);
        audit.report(entry.detail(&format!("{device} is left by the engine: {outcome}")));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::ill::tests::card;
    use agentd_domain::device::DeviceEvent;

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

    /// A card that needs a reset: its engine makes way, the next one cannot open it, and a new agentd knows it at once.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_engine_leaves_a_device_that_needs_a_reset_and_none_comes_back_until_it_is_well() {
        use crate::engine::testing::{FakeEngine, Seen, fake_launcher};
        use crate::engine::{Choice, Links, Planner, Wanted, start};
        use crate::gpu::AtTheDoor;
        use crate::gpu::ill::Ill;
        use crate::store::{Db, Store};
        use agentd_domain::engine::ModelKind;
        use agentd_domain::launcher::Request;
        use std::sync::Mutex;

        let folder = tempfile::tempdir().expect("a folder");
        let db = Db::new(Store::open(&folder.path().join("system.redb")).expect("a store"));
        let seen: Arc<Mutex<Seen>> = Arc::default();
        seen.lock().expect("unpoisoned").devices = vec![card(&[])];
        let fake = FakeEngine::start(folder.path(), Arc::clone(&seen));
        let path = folder.path().join("launcher.sock");
        let (asked, launcher) = (fake_launcher(&path), Launcher::at(&path));
        let (gpu, board, audit) = (Gpu::new(1 << 30), Arc::new(Board::default()), Audit::default());
        gpu.open_devices(&db).expect("opened");
        let gate = |gpu: &Gpu| {
            let planner = Planner::new(launcher.clone(), folder.path().to_owned(), 1 << 30);
            let (board, cgroup_root) = (Arc::clone(&board), folder.path().to_owned());
            Arc::new(AtTheDoor { gpu: gpu.clone(), planner, board, cgroup_root })
        };
        let links = |gpu: &Gpu| Links {
            launcher: launcher.clone(),
            sockets: folder.path().to_owned(),
            memory_max_bytes: 1 << 30,
            load_patience: Duration::from_secs(2),
            gate: gate(gpu),
        };
        let engine = start(links(&gpu), std::future::ready(()));
        let choice = Choice { name: "m".to_owned(), path: "/m".to_owned(), kind: ModelKind::Chat };
        let wanted = Wanted { chat: vec![choice], ..Wanted::default() };
        engine.want(wanted.clone());
        engine.watch().wait_for(|view| view.stage == Stage::Ready).await.expect("ready");
        let following = tokio::spawn(gpu.clone().follow(engine.clone()));
        let tending = tokio::spawn(gpu.clone().tend(
            engine.clone(),
            launcher.clone(),
            Arc::clone(&board),
            audit.clone(),
        ));
        let hidden = || -> Option<Vec<String>> {
            let asked = asked.lock().expect("unpoisoned");
            let stop = asked.iter().rposition(|ask| matches!(ask, Request::StopEngine { .. }))?;
            asked[stop..].iter().find_map(|ask| match ask {
                Request::StartEngine(spec) if spec.set == "host" => Some(spec.hidden.clone()),
                _ => None,
            })
        };
        seen.lock().expect("unpoisoned").devices = vec![card(&[DeviceEvent::Xid(95)])];
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while hidden().is_none_or(|hidden| hidden.is_empty()) {
            assert!(std::time::Instant::now() < deadline, "{:?}", asked.lock().expect("unpoisoned"));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(hidden(), Some(vec!["/dev/nvidia0".to_owned()]));
        let mut told: Vec<String> = Vec::new();
        while told.len() < 3 {
            assert!(std::time::Instant::now() < deadline, "{told:?}");
            told.extend(audit.reported().into_iter().map(|(entry, _)| entry.action));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(told, ["device.event", "device.drain", "engine.end"]);
        assert!(board.problems().iter().any(|report| report.code == "gpu_unhealthy"));
        // The engine that cannot open it does not list it: it is shown all the same, with why.
        seen.lock().expect("unpoisoned").devices = Vec::new();
        drop(fake);
        let fake = FakeEngine::start(folder.path(), Arc::clone(&seen));
        let gone =
            || gpu.view(&|_| None).devices.iter().all(|one| one.free_bytes == 0 && one.problem.is_some());
        while !gone() || gpu.view(&|_| None).devices.len() != 1 {
            assert!(std::time::Instant::now() < deadline, "{:?}", gpu.view(&|_| None));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let shown = gpu.view(&|_| None).devices.remove(0);
        assert_eq!(shown.name, "CUDA0");
        assert!(shown.problem.is_some_and(|report| report.why.contains("95")));
        tending.abort();
        following.abort();
        drop((engine, fake));
        // The next agentd, in the same start of the machine: from its first order on no engine gets the device.
        let next = Gpu::new(1 << 30);
        next.open_devices(&db).expect("opened");
        assert_eq!(next.hidden(), ["/dev/nvidia0"]);
        assert_eq!(next.view(&|_| None).devices.len(), 1);
        // After the machine was started again: an engine looks, nothing is put on it, and it is well.
        let later = Gpu::new(1 << 30);
        later.state().ill = Ill::new("another start".to_owned());
        later.open_devices(&db).expect("opened");
        assert_eq!(later.hidden(), Vec::<String>::new());
        later.take_over(&mut later.state(), &[card(&[])], &[]);
        assert!(later.state().ledger.devices()[0].problem.is_some(), "not before it was looked at");
        let acts = later.tend_once(&crate::gpu::ill::tests::status(card(&[])));
        assert!(matches!(acts.as_slice(), [Act::Well { .. }]), "{acts:?}");
        assert!(later.state().ledger.devices()[0].problem.is_none(), "it takes work again");
        assert!(db.here().troubles().expect("read").is_empty(), "and nothing is kept of it");
    }
}
