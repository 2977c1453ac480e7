//! How is a device, and what follows from what its driver reports?
//!
//! In:     readings of a driver, and its events one by one ([`DeviceHealth::step`]).
//! Out:    what a device is good for now ([`DeviceAction`]), in words for a person too.
//! Always: a value that a driver does not give is absent, never zero. An action only gets worse: a device that was
//!         said to be lost is not trusted again by the process that was told so. Its next process begins anew.
//! Source: NVIDIA's "Xid Errors" catalogue (docs.nvidia.com/deploy/xid-errors) and the NVML API reference.

use crate::engine::GpuReadings;
use crate::fault::Report;
use crate::human;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A process that holds memory of a device. A number of a process may be another's a moment later: this says who held
/// what when it was read, and nothing about earlier or later readings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProcess {
    pub pid: u32,
    /// Absent where the driver does not say (`Unavailable`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_instance: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_instance: Option<u32>,
}

/// Multi-Instance GPU: a device that the hardware cuts into smaller ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mig {
    pub enabled: bool,
    /// What it will be after the next reset, where that is something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<bool>,
    pub instances: Vec<MigInstance>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigInstance {
    /// What `CUDA_VISIBLE_DEVICES` takes: `MIG-...`.
    pub uuid: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_total_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_used_bytes: Option<u64>,
    /// What opens it besides its device's own nodes: `/dev/nvidia-caps/...`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
}

/// Errors of the device's memory since its driver was loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EccCounters {
    pub corrected: u64,
    pub uncorrected: u64,
}

/// What a driver tells of its own accord.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent {
    Xid(u64),
    EccCorrected,
    EccUncorrected,
    MigChanged,
    /// A call was answered with "the GPU is lost".
    Lost,
}

/// What is to be done about a device; later ones are worse and stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceAction {
    #[default]
    None,
    /// A link between devices is bad: no model over several of them.
    AvoidSplit,
    /// The process whose work failed starts again; the device is well.
    RestartProcess,
    /// The device was cut up anew: what is known of its memory is old.
    Reread,
    /// No new work; the device is reset when the rest is done.
    DrainAndReset,
    /// The device is gone until the machine is started again.
    Lost,
}

impl DeviceAction {
    /// Whether new models and requests may go to the device.
    pub fn takes_work(self) -> bool {
        self < Self::DrainAndReset
    }

    /// What a person can do.
    pub fn advice(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::AvoidSplit => "keep models on one device each until the link was checked",
            Self::RestartProcess => {
                "nothing: a process that was hit ends, and an engine starts again by itself"
            }
            Self::Reread => "unload the models and load them again: only a new engine sees new instances",
            Self::DrainAndReset => {
                "restart the appliance when its work is done; if it comes back, have the card checked"
            }
            Self::Lost => {
                "switch the machine off and on; if it comes back, check the card, its slot and its power"
            }
        }
    }
}

/// What an XID of NVIDIA's driver asks for. One that is not in the table changes nothing and is shown.
pub fn xid_action(xid: u64) -> DeviceAction {
    match xid {
        // A program's own fault, or a channel that was taken from it.
        8 | 13 | 31 | 43 | 45 | 68 | 69 => DeviceAction::RestartProcess,
        // An ECC error that was kept to the process it hit.
        94 => DeviceAction::RestartProcess,
        // ECC errors and rows or pages that were or could not be replaced.
        48 | 63 | 64 | 95 => DeviceAction::DrainAndReset,
        // The device, or the processor that runs its firmware, has stopped.
        46 | 62 | 119 | 120 | 154 => DeviceAction::DrainAndReset,
        74 => DeviceAction::AvoidSplit,
        79 => DeviceAction::Lost,
        _ => DeviceAction::None,
    }
}

/// A region of device memory as the kernel accounts for it, whoever made the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// The kernel's name: `drm/0000:03:00.0/vram0`.
    pub name: String,
    pub capacity_bytes: u64,
    /// Held by engines and by agents' own programs.
    pub engines_bytes: u64,
    pub agents_bytes: u64,
}

/// Where a model's layers go: its blocks in their order and, as the last one, its output layer. The first are computed on
/// the processor, from host memory; the last [`Placement::layers`] on devices, one stretch after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Without any, all of the model is in host memory.
    pub stretches: Vec<Stretch>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stretch {
    /// llama.cpp's name.
    pub device: String,
    pub layers: u32,
}

impl Placement {
    /// How many layers are on devices.
    pub fn layers(&self) -> u32 {
        self.stretches.iter().fold(0, |sum, stretch| sum.saturating_add(stretch.layers))
    }
}

/// `CUDA0:12,CUDA1:9`, or `host`.
impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.stretches.is_empty() {
            return f.write_str(HOST);
        }
        for (index, Stretch { device, layers }) in self.stretches.iter().enumerate() {
            write!(f, "{}{device}:{layers}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Placement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == HOST {
            return Ok(Self::default());
        }
        let stretch = |part: &str| {
            let (device, layers) = part.rsplit_once(':')?;
            let layers = layers.parse().ok().filter(|layers| *layers > 0)?;
            (!device.is_empty()).then(|| Stretch { device: device.to_owned(), layers })
        };
        let stretches = text.split(',').map(stretch).collect::<Option<Vec<_>>>();
        let stretches =
            stretches.ok_or_else(|| format!("`{text}` is not `DEVICE:LAYERS,...` and not `{HOST}`"))?;
        Ok(Self { stretches })
    }
}

/// What plans call host memory.
const HOST: &str = "host";

/// What a model with its context will take, counted by llama.cpp itself without taking it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    pub path: String,
    pub architecture: String,
    pub context_tokens: u32,
    pub sequences: u32,
    /// Host memory first, then those devices that get something.
    pub devices: Vec<PlannedDevice>,
    /// Where its layers were put; absent where that was left to llama.cpp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// One row of logits, in host memory.
    pub row_bytes: u64,
    /// So many rows are kept from the start, one for each sequence id.
    pub rows_least: u64,
    /// Vocabulary, tables and graphs, in host memory: measured, because llama.cpp counts its buffers only.
    pub overhead_bytes: u64,
    /// What llama.cpp keeps of its cells in host memory when all are in use.
    pub cells_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDevice {
    /// llama.cpp's name, `host` for host memory.
    pub device: String,
    /// As the device says now.
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
    pub model_bytes: u64,
    /// The KV cache.
    pub context_bytes: u64,
    pub compute_bytes: u64,
}

impl PlannedDevice {
    pub fn sum_bytes(&self) -> u64 {
        self.model_bytes + self.context_bytes + self.compute_bytes
    }
}

impl MemoryPlan {
    /// What one device will hold when the context is full; in host memory with all else, and `rows` rows of logits.
    pub fn bytes_on(&self, device: &str, rows: u64) -> u64 {
        let buffers = self.devices.iter().find(|planned| planned.device == device);
        let buffers = buffers.map_or(0, PlannedDevice::sum_bytes);
        if device != HOST {
            return buffers;
        }
        buffers + self.overhead_bytes + self.cells_bytes + rows.max(self.rows_least) * self.row_bytes
    }
}

/// The same after it was really loaded and its context filled to the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMeasured {
    pub devices: Vec<PlannedDevice>,
    /// Rows of logits that the last batch kept.
    pub rows: u64,
    /// By how much the process's own memory grew, files that it maps not counted.
    pub grown_bytes: u64,
}

/// Different XIDs that are kept apart: a card in trouble repeats a few.
const XIDS_MOST: usize = 16;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceHealth {
    pub action: DeviceAction,
    /// Each kind that was seen, with how often; in the order of their first time.
    pub xids: Vec<(u64, u64)>,
    /// Events of kinds beyond those.
    pub xids_uncounted: u64,
    pub ecc_corrected_events: u64,
    pub ecc_uncorrected_events: u64,
    pub mig_changes: u64,
    /// Whether the driver reports events at all; without, only a call that fails tells of a fault.
    pub watched: bool,
}

impl DeviceHealth {
    pub fn step(&mut self, event: DeviceEvent) {
        let action = match event {
            DeviceEvent::Xid(xid) => {
                self.count(xid);
                xid_action(xid)
            }
            DeviceEvent::EccCorrected => {
                self.ecc_corrected_events += 1;
                DeviceAction::None
            }
            DeviceEvent::EccUncorrected => {
                self.ecc_uncorrected_events += 1;
                DeviceAction::DrainAndReset
            }
            DeviceEvent::MigChanged => {
                self.mig_changes += 1;
                DeviceAction::Reread
            }
            DeviceEvent::Lost => DeviceAction::Lost,
        };
        self.action = self.action.max(action);
    }

    fn count(&mut self, xid: u64) {
        if let Some((_, count)) = self.xids.iter_mut().find(|(seen, _)| *seen == xid) {
            *count += 1;
        } else if self.xids.len() < XIDS_MOST {
            self.xids.push((xid, 1));
        } else {
            self.xids_uncounted += 1;
        }
    }

    /// One line for a person; `None` when there is nothing to say.
    pub fn sentence(&self) -> Option<String> {
        let mut parts: Vec<String> =
            self.xids.iter().map(|(xid, count)| format!("XID {xid} ({count} times)")).collect();
        if self.xids_uncounted > 0 {
            parts.push(format!("{} more XIDs of other kinds", self.xids_uncounted));
        }
        if self.ecc_uncorrected_events > 0 {
            parts.push(format!("{} uncorrected memory errors", self.ecc_uncorrected_events));
        }
        if self.mig_changes > 0 {
            parts.push("it was cut up anew".to_owned());
        }
        if self.action == DeviceAction::Lost {
            parts.push("it does not answer any more".to_owned());
        }
        if parts.is_empty() {
            return None;
        }
        Some(format!("{}; to do: {}", parts.join(", "), self.action.advice()))
    }
}

impl GpuReadings {
    /// What a person wants to see of it, in a few words each. What is absent is left out.
    pub fn facts(&self) -> Vec<String> {
        let mut facts = Vec::new();
        let watts = |milliwatts: u32| milliwatts.div_ceil(1000);
        if let (Some(used), Some(total)) = (self.memory_used_bytes, self.memory_total_bytes) {
            facts.push(format!("{} of {} in use", human::bytes(used), human::bytes(total)));
        }
        facts.extend(self.utilisation_percent.map(|percent| format!("{percent} % busy")));
        facts.extend(self.temperature_celsius.map(|celsius| format!("{celsius} °C")));
        facts.extend(self.power_milliwatts.map(|power| match self.power_limit_milliwatts {
            Some(limit) => format!("{} of {} W", watts(power), watts(limit)),
            None => format!("{} W", watts(power)),
        }));
        facts.extend(self.graphics_clock_mhz.map(|mhz| format!("{mhz} MHz")));
        facts.extend(self.processes.as_ref().map(|processes| match processes.len() {
            1 => "1 process".to_owned(),
            count => format!("{count} processes"),
        }));
        if let Some(mig) = self.mig.as_ref().filter(|mig| mig.enabled) {
            facts.push(format!("cut into {} instances", mig.instances.len()));
        }
        if let Some(ecc) = self.ecc.filter(|ecc| ecc.corrected + ecc.uncorrected > 0) {
            facts.push(format!(
                "{} memory errors, {} of them not corrected",
                ecc.corrected + ecc.uncorrected,
                ecc.uncorrected
            ));
        }
        // Idle is no reason to slow down that anybody would want to know.
        let slowed = self.throttle.iter().flatten().filter(|reason| *reason != "gpu_idle");
        let slowed: Vec<String> = slowed.map(|reason| reason.replace('_', " ")).collect();
        if !slowed.is_empty() {
            facts.push(format!("slowed down by {}", slowed.join(", ")));
        }
        facts
    }

    /// What is wrong with it, as the console and `agentctl` show problems.
    pub fn problem(&self) -> Option<Report> {
        if self.health.action.takes_work() {
            return None;
        }
        let name = self.name.as_deref().unwrap_or("a GPU");
        let place = self.pci_address.as_deref().map(|address| format!(" at {address}")).unwrap_or_default();
        Some(Report::environment(
            "gpu_unhealthy",
            format!("{name}{place} takes no new work"),
            self.health.sentence().unwrap_or_default(),
            self.health.action.advice(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_of_the_catalogue_has_its_action() {
        for xid in [8, 13, 31, 43, 45, 68, 69, 94] {
            assert_eq!(xid_action(xid), DeviceAction::RestartProcess, "{xid}");
        }
        for xid in [48, 63, 64, 95, 46, 62, 119, 120, 154] {
            assert_eq!(xid_action(xid), DeviceAction::DrainAndReset, "{xid}");
        }
        assert_eq!(xid_action(74), DeviceAction::AvoidSplit);
        assert_eq!(xid_action(79), DeviceAction::Lost);
        assert_eq!(xid_action(0), DeviceAction::None);
    }

    #[test]
    fn a_lost_device_stays_lost_whatever_comes_after() {
        let mut health = DeviceHealth::default();
        health.step(DeviceEvent::Xid(31));
        assert!(health.action.takes_work());
        health.step(DeviceEvent::Lost);
        health.step(DeviceEvent::Xid(31));
        health.step(DeviceEvent::MigChanged);
        assert_eq!(health.action, DeviceAction::Lost);
        assert!(!health.action.takes_work());
        assert!(health.sentence().is_some_and(|text| text.contains("XID 31 (2 times)")));
    }

    #[test]
    fn a_storm_of_xids_takes_no_memory() {
        let mut health = DeviceHealth::default();
        for index in 0..1_000_000 {
            health.step(DeviceEvent::Xid(200 + index % 100));
        }
        assert_eq!(health.xids.len(), XIDS_MOST);
        let counted: u64 = health.xids.iter().map(|(_, count)| count).sum();
        assert_eq!(counted + health.xids_uncounted, 1_000_000);
        assert_eq!(health.action, DeviceAction::None);
    }

    #[test]
    fn a_card_is_told_in_words_and_its_trouble_as_a_problem() {
        let mut gpu = GpuReadings {
            memory_used_bytes: Some(19 << 30),
            memory_total_bytes: Some(80 << 30),
            power_milliwatts: Some(123_456),
            throttle: Some(vec!["gpu_idle".to_owned(), "hw_thermal_slowdown".to_owned()]),
            ..GpuReadings::default()
        };
        let told = gpu.facts().join(" · ");
        assert!(told.ends_with(" in use · 124 W · slowed down by hw thermal slowdown"), "{told}");
        assert_eq!(GpuReadings::default().facts(), Vec::<String>::new());
        gpu.health.step(DeviceEvent::Xid(31));
        assert_eq!(gpu.problem(), None, "a program's own fault");
        gpu.health.step(DeviceEvent::Xid(79));
        assert!(
            gpu.problem().is_some_and(|report| report.code == "gpu_unhealthy" && report.why.contains("79"))
        );
    }

    #[test]
    fn what_is_absent_stays_absent() {
        let process = GpuProcess { pid: 7, used_bytes: None, gpu_instance: None, compute_instance: None };
        assert_eq!(serde_json::to_string(&process).unwrap(), r#"{"pid":7}"#);
        let old: DeviceHealth = serde_json::from_str("{}").unwrap();
        assert_eq!(old, DeviceHealth::default());
        assert_eq!(old.sentence(), None);
    }
}
