//! What is known to be wrong with which device, and when is it well again?
//!
//! Pure. In: readings of devices, what was stored. Out: what is to be done ([`Act`]), rows to store.
//!
//! ```text
//! well ── XID, ECC, lost ──▶ in trouble ── an engine sees it ──▶ drained: no engine is started on it
//!   ▲                            │                                   │
//!   └── answers, no errors, and its counters began anew, or the machine ─┘
//! ```
//!
//! Always: what was said of a device stays, whoever was told it: the next engine's driver, and an agentd that was
//!         started since, are told nothing of it. It is well again when it answers, has no uncorrected error, and one of
//!         two has happened: the machine was started again, or the driver's counters show that the device was reset.
//! Source: NVIDIA, "GPU Memory Error Management" (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt): an uncontained
//!         error, a row remapping and a page retirement take effect with the next reset of the device; "Xid Errors"
//!         (docs.nvidia.com/deploy/xid-errors): what an XID asks for; NVML API reference: volatile ECC counts "are reset
//!         each time the driver loads", `nvmlDeviceGetTotalEnergyConsumption` counts "since the driver was last
//!         reloaded". One of these that is lower than it was has begun anew.

use agentd_domain::device::DeviceAction;
use agentd_domain::engine::{EngineStatus, GpuReadings};
use agentd_domain::fault::Report;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Devices that are remembered: more than any machine has, and an end for those that were taken out.
const KEPT_MOST: usize = 64;

/// What is known to be wrong, by the device's id.
#[derive(Debug, Clone, Default)]
pub(super) struct Ill {
    known: BTreeMap<String, Trouble>,
    /// This start of the machine.
    boot: String,
}

/// What was said of a device, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    pub action: DeviceAction,
    pub why: String,
    pub since_unix_ms: i64,
    /// The machine's start in which it was said (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The driver's counters then.
    pub energy_millijoules: Option<u64>,
    pub uncorrected: Option<u64>,
    pub device: Shown,
    /// Its engine was told to make way in this life of agentd.
    #[serde(skip)]
    pub drained: bool,
}

/// How a device is shown that no engine sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// As it was called last; empty for one that no back end could use.
    pub name: String,
    pub description: String,
    pub kind: String,
    pub total_bytes: u64,
    pub nodes: Vec<String>,
}

impl Shown {
    /// For people.
    pub(super) fn called(&self, id: &str) -> String {
        if self.name.is_empty() { id.to_owned() } else { self.name.clone() }
    }
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
    /// An engine is on a device that is to be reset: it finishes what it has begun, and makes way.
    Drain { device: String, why: String },
    /// It is well again.
    Well { device: String, why: &'static str },
}

impl Ill {
    pub(super) fn new(boot: String) -> Self {
        Self { known: BTreeMap::new(), boot }
    }

    /// What an earlier agentd was told; what this one was told is newer.
    pub(super) fn restore(&mut self, stored: BTreeMap<String, Trouble>) {
        for (id, trouble) in stored {
            self.known.entry(id).or_insert(trouble);
        }
    }

    pub(super) fn all(&self) -> &BTreeMap<String, Trouble> {
        &self.known
    }

    /// What follows from what the engine says now. `holds` names the models on a device.
    pub(super) fn step(
        &mut self,
        status: &EngineStatus,
        now_unix_ms: i64,
        holds: &dyn Fn(&str) -> Vec<String>,
    ) -> Vec<Act> {
        let of_engine = status.devices.iter().filter_map(|device| {
            let shown = Shown {
                name: device.name.clone(),
                description: device.description.clone(),
                kind: device.kind.clone(),
                total_bytes: device.memory_total_bytes,
                nodes: device.gpu.as_ref()?.nodes.clone(),
            };
            Some((shown, device.gpu.as_ref()?))
        });
        let named = |gpu: &&GpuReadings| {
            let same = |of: Option<&GpuReadings>| of.is_some_and(|of| id_of(of) == id_of(gpu));
            !status.devices.iter().any(|device| same(device.gpu.as_ref()))
        };
        let others = status.gpus.iter().filter(named).map(|gpu| {
            let description = gpu.name.clone().unwrap_or_default();
            (Shown { description, nodes: gpu.nodes.clone(), ..Shown::default() }, gpu)
        });
        let mut acts = Vec::new();
        for (shown, gpu) in of_engine.chain(others) {
            let Some(id) = id_of(gpu) else { continue };
            let models = if shown.name.is_empty() { Vec::new() } else { holds(&shown.name) };
            self.of_one(&id, shown, gpu, now_unix_ms, models, &mut acts);
        }
        acts
    }

    fn of_one(
        &mut self,
        id: &str,
        shown: Shown,
        gpu: &GpuReadings,
        now_unix_ms: i64,
        models: Vec<String>,
        acts: &mut Vec<Act>,
    ) {
        let action = gpu.health.action;
        let device = id.to_owned();
        if let Some(why) = self.known.get(id).and_then(|known| well_again(known, gpu, &self.boot)) {
            self.known.remove(id);
            acts.push(Act::Well { device, why });
            return;
        }
        let seen = !shown.name.is_empty();
        // What was said before the machine was started again is said anew by the driver, or is over.
        let before = self.known.get(id).filter(|known| known.boot == self.boot || action.takes_work());
        let news = before.map_or(DeviceAction::None, |known| known.action) < action;
        if news {
            let why = gpu.health.sentence().unwrap_or_else(|| action.advice().to_owned());
            let trouble = Trouble {
                action,
                why: why.clone(),
                since_unix_ms: now_unix_ms,
                boot: self.boot.clone(),
                energy_millijoules: gpu.energy_millijoules,
                uncorrected: gpu.ecc.map(|ecc| ecc.uncorrected),
                device: shown,
                drained: false,
            };
            self.known.insert(device.clone(), trouble);
            self.forget_oldest();
            acts.push(Act::Tell { device: device.clone(), action, why });
            acts.extend(gpu.problem().map(|report| Act::Show { device: device.clone(), report }));
        }
        let boot = self.boot.clone();
        let Some(known) = self.known.get_mut(id).filter(|known| !known.action.takes_work()) else { return };
        if news && action == DeviceAction::Lost && !models.is_empty() {
            known.drained = true;
            acts.push(Act::EndEngine { device, models });
        } else if seen && known.action == DeviceAction::DrainAndReset && known.boot == boot && !known.drained
        {
            known.drained = true;
            acts.push(Act::Drain { device, why: known.why.clone() });
        }
    }

    /// Of those that were taken out nobody will say that they are well.
    fn forget_oldest(&mut self) {
        while self.known.len() > KEPT_MOST {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.since_unix_ms);
            let Some(id) = oldest.map(|(id, _)| id.clone()) else { return };
            self.known.remove(&id);
        }
    }

    /// Why nothing new goes to this device.
    pub(super) fn problem(&self, gpu: &GpuReadings) -> Option<String> {
        let trouble = self.known.get(&id_of(gpu)?)?;
        (!trouble.action.takes_work()).then(|| trouble.why.clone())
    }

    /// Devices that no engine is to be started on. One of which was said something before the machine was started
    /// again is not among them: an engine must look at it, and nothing is put on it before that.
    pub(super) fn out(&self) -> impl Iterator<Item = (&String, &Trouble)> {
        self.known.iter().filter(|(_, known)| !known.action.takes_work() && known.boot == self.boot)
    }
}

/// By what a device shows that it is well, if it is.
fn well_again(known: &Trouble, gpu: &GpuReadings, boot: &str) -> Option<&'static str> {
    let answers = gpu.memory_total_bytes.is_some() || gpu.energy_millijoules.is_some();
    let uncorrected = gpu.ecc.map(|ecc| ecc.uncorrected);
    if !answers || !gpu.health.action.takes_work() || uncorrected.is_some_and(|errors| errors > 0) {
        return None;
    }
    if known.boot != boot {
        return Some("the machine was started again, and its driver reports no error");
    }
    // What only its program had to do with ends with that program's process, and is worth no row.
    let lower =
        |now: Option<u64>, then: Option<u64>| matches!((now, then), (Some(now), Some(then)) if now < then);
    let anew =
        lower(gpu.energy_millijoules, known.energy_millijoules) || lower(uncorrected, known.uncorrected);
    anew.then_some("its driver's counters began anew: it was reset")
}

/// What stays the same from one engine to the next.
pub(super) fn id_of(gpu: &GpuReadings) -> Option<String> {
    gpu.uuid.clone().or_else(|| gpu.pci_address.clone())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use agentd_domain::device::{DeviceEvent, EccCounters};
    use agentd_domain::engine::Device;

    pub(in crate::gpu) fn card(events: &[DeviceEvent]) -> Device {
        let mut gpu = GpuReadings {
            uuid: Some("GPU-1".to_owned()),
            memory_total_bytes: Some(8 << 30),
            energy_millijoules: Some(1000),
            ecc: Some(EccCounters::default()),
            nodes: vec!["/dev/nvidia0".to_owned()],
            ..GpuReadings::default()
        };
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

    pub(in crate::gpu) fn status(device: Device) -> EngineStatus {
        EngineStatus {
            devices: vec![device],
            models: Vec::new(),
            backend: String::new(),
            backends: Vec::new(),
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
            Act::Drain { .. } => "drain",
            Act::Well { .. } => "well",
        };
        acts.iter().map(word).collect()
    }

    const NONE: &[&str] = &[];

    fn boot(name: &str) -> Ill {
        Ill::new(name.to_owned())
    }

    #[test]
    fn each_trouble_is_acted_on_once_and_worse_ones_again() {
        let mut ill = boot("1");
        let mut step = |device: Device| words(&ill.step(&status(device), 1, &|_| vec!["m".to_owned()]));
        let own_fault = card(&[DeviceEvent::Xid(31)]);
        let drains = card(&[DeviceEvent::Xid(95)]);
        let lost = card(&[DeviceEvent::Lost]);
        assert_eq!(step(card(&[])), NONE);
        assert_eq!(step(own_fault.clone()), ["tell"]);
        assert_eq!(step(own_fault.clone()), NONE);
        assert_eq!(step(drains.clone()), ["tell", "show", "drain"]);
        assert_eq!(step(drains.clone()), NONE, "an engine is not drained again and again");
        assert_eq!(step(lost.clone()), ["tell", "show", "end"]);
        assert_eq!(step(lost), NONE);
        // The next engine was not told of anything.
        assert_eq!(step(card(&[])), NONE);
        assert!(ill.problem(card(&[]).gpu.as_ref().expect("readings")).is_some(), "it stays lost");
        assert_eq!(ill.out().count(), 1);
    }

    #[test]
    fn a_fault_of_a_program_keeps_nobody_away() {
        let mut ill = boot("1");
        let _ = ill.step(&status(card(&[DeviceEvent::Xid(31)])), 1, &|_| Vec::new());
        assert_eq!(ill.problem(card(&[]).gpu.as_ref().expect("readings")), None, "the device is well");
        assert_eq!(ill.out().count(), 0);
    }

    #[test]
    fn an_engine_with_nothing_on_a_lost_device_goes_on() {
        let mut ill = boot("1");
        let lost = status(card(&[DeviceEvent::Xid(79)]));
        assert_eq!(words(&ill.step(&lost, 1, &|_| Vec::new())), ["tell", "show"]);
        // One that no back end can use is told of too, and no engine is on it.
        let mut other = status(card(&[]));
        other.gpus = vec![GpuReadings { uuid: Some("GPU-2".to_owned()), ..GpuReadings::default() }];
        other.gpus[0].health.step(DeviceEvent::EccUncorrected);
        assert_eq!(words(&ill.step(&other, 1, &|_| Vec::new())), ["tell", "show"]);
    }

    /// An agentd that begins reads what the one before was told, and its engine may not have been ended yet.
    #[test]
    fn what_was_said_outlives_agentd_and_is_acted_on_by_the_next() {
        let mut first = boot("1");
        let _ = first.step(&status(card(&[DeviceEvent::Xid(48)])), 7, &|_| Vec::new());
        let text = serde_json::to_string(first.all()).expect("text");
        let stored: BTreeMap<String, Trouble> = serde_json::from_str(&text).expect("read");
        let mut next = boot("1");
        next.restore(stored);
        let gpu = card(&[]).gpu.expect("readings");
        assert!(next.problem(&gpu).is_some_and(|why| why.contains("48")));
        let (_, out) = next.out().next().expect("one is out");
        assert_eq!(
            (out.device.name.as_str(), out.device.nodes.as_slice()),
            ("CUDA0", &["/dev/nvidia0".to_owned()][..])
        );
        assert_eq!(words(&next.step(&status(card(&[])), 8, &|_| Vec::new())), ["drain"]);
    }

    #[test]
    fn it_is_well_again_when_it_shows_that_it_was_reset_and_not_before() {
        let with = |change: &dyn Fn(&mut GpuReadings)| {
            let mut device = card(&[]);
            change(device.gpu.as_mut().expect("readings"));
            status(device)
        };
        let told = || {
            let mut ill = boot("1");
            let mut ecc = card(&[DeviceEvent::EccUncorrected]);
            ecc.gpu.as_mut().expect("readings").ecc = Some(EccCounters { corrected: 0, uncorrected: 2 });
            let _ = ill.step(&status(ecc), 1, &|_| Vec::new());
            ill
        };
        let again = |ill: &mut Ill, now: &EngineStatus| words(&ill.step(now, 2, &|_| Vec::new()));
        let same = |gpu: &mut GpuReadings| gpu.ecc = Some(EccCounters { corrected: 0, uncorrected: 2 });
        assert_eq!(again(&mut told(), &with(&same)), NONE, "the next engine of the same start");
        assert_eq!(
            again(&mut told(), &with(&|_| ())),
            ["well"],
            "its errors are gone: the driver was loaded again"
        );
        // Without counters of errors the energy tells.
        let mut plain = boot("1");
        let xid = with(&|gpu| gpu.ecc = None);
        let mut first = xid.clone();
        first.devices[0].gpu.as_mut().expect("readings").health.step(DeviceEvent::Xid(119));
        let _ = plain.step(&first, 1, &|_| Vec::new());
        assert_eq!(again(&mut plain, &xid), NONE);
        let less = with(&|gpu| (gpu.ecc, gpu.energy_millijoules) = (None, Some(12)));
        assert_eq!(again(&mut plain, &less), ["well"]);
        assert!(plain.all().is_empty());
        // Another start of the machine.
        let restarted = |now: &EngineStatus| {
            let mut next = boot("2");
            next.restore(told().all().clone());
            assert_eq!(next.out().count(), 0, "an engine must look at it");
            assert!(
                next.problem(now.devices[0].gpu.as_ref().expect("readings")).is_some(),
                "nothing before that"
            );
            again(&mut next, now)
        };
        assert_eq!(restarted(&with(&|_| ())), ["well"]);
        assert_eq!(restarted(&with(&same)), NONE, "it has errors again");
        let silent = |gpu: &mut GpuReadings| (gpu.memory_total_bytes, gpu.energy_millijoules) = (None, None);
        assert_eq!(restarted(&with(&silent)), NONE, "it does not answer");
        let ill_again = with(&|gpu| gpu.health.step(DeviceEvent::Xid(95)));
        assert_eq!(restarted(&ill_again), ["tell", "show", "drain"]);
    }

    #[test]
    fn devices_that_were_taken_out_are_forgotten_at_last() {
        let mut ill = boot("1");
        for index in 0..200_i64 {
            let mut device = card(&[DeviceEvent::Xid(62)]);
            device.gpu.as_mut().expect("readings").uuid = Some(format!("GPU-{index}"));
            let _ = ill.step(&status(device), index, &|_| Vec::new());
        }
        assert_eq!(ill.all().len(), KEPT_MOST);
        assert!(ill.all().contains_key("GPU-199") && !ill.all().contains_key("GPU-0"));
    }
}
