//! What does NVIDIA's driver say of its devices?
//!
//! Owns:    the driver's library, loaded by name at run time; the health of each device.
//! Threads: one for each device, which waits in the driver for its events: an event names its device by a handle
//!          only, and a device that is lost does not answer who it is. Without a device there is none.
//! Always:  no library, an old one and one that lacks a function are normal states. What a device does not support
//!          is absent from its readings, never zero.
//! Never:   a change of a device's settings. Limits of its memory are `limits.rs`, in a process of their own.

use crate::nodes;
use agentd_domain::device::{DeviceEvent, DeviceHealth, EccCounters, GpuProcess, Mig, MigInstance};
use agentd_domain::engine::GpuReadings;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use std::ffi::OsStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The name that the driver's package installs; the one without a number is for compilers.
pub(crate) const LIBRARY: &str = "libnvidia-ml.so.1";
/// A wait in the driver; only then the thread sees that it has nobody to tell any more.
const WAIT_MS: u32 = 30_000;
/// Events without a pause, after which the thread makes one: a card in trouble may report thousands a second.
const BURST: u32 = 64;
const BURST_PAUSE: Duration = Duration::from_millis(200);
/// After a wait that failed: a lost device fails at once, again and again.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// What NVML answers in place of an XID that it does not know.
const XID_UNKNOWN: u64 = 999;
/// More than any program has instances on a device; a driver's number is not believed beyond.
const INSTANCES_MOST: u32 = 64;

pub(crate) struct Nvidia {
    nvml: Arc<Nvml>,
    gpus: Vec<Gpu>,
}

struct Gpu {
    index: u32,
    /// Read once, while the device still answers.
    uuid: Option<String>,
    name: Option<String>,
    pci_address: Option<String>,
    /// As the driver numbers its nodes.
    minor: Option<u32>,
    nodes: Vec<String>,
    health: Arc<Mutex<DeviceHealth>>,
}

impl Nvidia {
    /// Loads the library and starts to watch. `None`, with the reason logged, where there is no such device.
    pub(crate) fn open(library: &OsStr) -> Option<Self> {
        let nvml = match Nvml::builder().lib_path(library).init() {
            Ok(nvml) => Arc::new(nvml),
            // Absent on most machines.
            Err(error @ NvmlError::LibloadingError(_)) => {
                tracing::debug!(library = %library.to_string_lossy(), %error, "no NVML");
                return None;
            }
            Err(error) => {
                tracing::warn!(library = %library.to_string_lossy(), %error, "NVML does not start");
                return None;
            }
        };
        let count = match nvml.device_count() {
            Ok(count) => count,
            Err(error) => {
                tracing::warn!(%error, "NVML does not count its devices");
                return None;
            }
        };
        let gpus: Vec<Gpu> = (0..count).map(|index| Gpu::new(&nvml, index)).collect();
        for gpu in &gpus {
            gpu.watch(&nvml);
        }
        if gpus.is_empty() { None } else { Some(Self { nvml, gpus }) }
    }

    /// All devices, in the driver's order.
    pub(crate) fn readings(&self) -> Vec<GpuReadings> {
        self.gpus.iter().map(|gpu| gpu.readings(&self.nvml)).collect()
    }
}

impl Gpu {
    fn new(nvml: &Nvml, index: u32) -> Self {
        let device = nvml.device_by_index(index);
        let of = |read: fn(&Device<'_>) -> Result<String, NvmlError>| read(device.as_ref().ok()?).ok();
        let pci_address = of(|device| device.pci_info().map(|pci| short_address(&pci.bus_id)));
        let minor = device.as_ref().ok().and_then(|device| device.minor_number().ok());
        let graphics = pci_address.as_deref().map(nodes::of_graphics).unwrap_or_default();
        Self {
            index,
            uuid: of(|device| device.uuid()),
            name: of(|device| device.name()),
            nodes: [nodes::of_card(minor), graphics].concat(),
            pci_address,
            minor,
            health: Arc::default(),
        }
    }

    fn readings(&self, nvml: &Nvml) -> GpuReadings {
        let mut readings = GpuReadings {
            uuid: self.uuid.clone(),
            name: self.name.clone(),
            pci_address: self.pci_address.clone(),
            nodes: self.nodes.clone(),
            ..GpuReadings::default()
        };
        let mut reader = Reader { lost: false, nvml, minor: self.minor };
        if let Some(device) = reader.value(nvml.device_by_index(self.index)) {
            reader.read(&device, &mut readings);
        }
        if reader.lost {
            // Half of its values would look like a device that lives.
            let known = (readings.uuid.take(), readings.name.take(), readings.pci_address.take());
            let (uuid, name, pci_address) = known;
            let nodes = self.nodes.clone();
            readings = GpuReadings { uuid, name, pci_address, nodes, ..GpuReadings::default() };
            note(&self.health, DeviceEvent::Lost);
        }
        readings.health = self.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        readings
    }

    fn watch(&self, nvml: &Arc<Nvml>) {
        let (nvml, health, index) = (Arc::clone(nvml), Arc::downgrade(&self.health), self.index);
        let spawned = std::thread::Builder::new().name(format!("nvml-{index}")).spawn(move || {
            if let Err(error) = watch(&nvml, index, &health) {
                tracing::debug!(index, %error, "the driver reports no events of this device");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(index, %error, "no thread for a device's events");
        }
    }
}

/// Turns answers into values that may be absent, and remembers that a device was lost.
struct Reader<'a> {
    lost: bool,
    nvml: &'a Nvml,
    minor: Option<u32>,
}

impl Reader<'_> {
    fn value<T>(&mut self, answer: Result<T, NvmlError>) -> Option<T> {
        match answer {
            Ok(value) => Some(value),
            Err(NvmlError::GpuLost) => {
                self.lost = true;
                None
            }
            // Of this device or this library: nothing that could be done about it.
            Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => None,
            Err(error) => {
                tracing::debug!(%error, "NVML did not give a value");
                None
            }
        }
    }

    fn read(&mut self, device: &Device<'_>, into: &mut GpuReadings) {
        if let Some(rates) = self.value(device.utilization_rates()) {
            into.utilisation_percent = Some(rates.gpu);
            into.memory_utilisation_percent = Some(rates.memory);
        }
        into.temperature_celsius = self.value(device.temperature(TemperatureSensor::Gpu));
        into.power_milliwatts = self.value(device.power_usage());
        into.power_limit_milliwatts = self.value(device.enforced_power_limit());
        into.energy_millijoules = self.value(device.total_energy_consumption());
        into.graphics_clock_mhz = self.value(device.clock_info(Clock::Graphics));
        into.memory_clock_mhz = self.value(device.clock_info(Clock::Memory));
        if let Some(memory) = self.value(device.memory_info()) {
            into.memory_total_bytes = Some(memory.total);
            into.memory_used_bytes = Some(memory.used);
            into.memory_free_bytes = Some(memory.free);
            into.memory_reserved_bytes = Some(memory.reserved);
        }
        into.processes = self
            .value(device.running_compute_processes())
            .map(|processes| processes.into_iter().map(process).collect());
        into.throttle = self
            .value(device.current_throttle_reasons())
            .map(|reasons| reasons.iter_names().map(|(name, _)| name.to_lowercase()).collect());
        into.ecc = self.ecc(device);
        into.mig = self.mig(device);
    }

    /// Both or none: one alone would look like a device without the other kind.
    fn ecc(&mut self, device: &Device<'_>) -> Option<EccCounters> {
        let corrected = device.total_ecc_errors(MemoryError::Corrected, EccCounter::Volatile);
        let uncorrected = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
        let (corrected, uncorrected) = (self.value(corrected), self.value(uncorrected));
        Some(EccCounters { corrected: corrected?, uncorrected: uncorrected? })
    }

    fn mig(&mut self, device: &Device<'_>) -> Option<Mig> {
        let mode = self.value(device.mig_mode())?;
        let (enabled, pending) = (mode.current != 0, mode.pending != 0);
        let mut mig =
            Mig { enabled, pending: (pending != enabled).then_some(pending), instances: Vec::new() };
        if enabled {
            let most = self.value(device.mig_device_count()).unwrap_or(0).min(INSTANCES_MOST);
            // Numbers without an instance answer "not found".
            mig.instances = (0..most)
                .filter_map(|index| device.mig_device_by_index(index).ok())
                .filter_map(|instance| self.instance(&instance))
                .collect();
        }
        Some(mig)
    }

    fn instance(&mut self, instance: &Device<'_>) -> Option<MigInstance> {
        let uuid = self.value(instance.uuid())?;
        let memory = self.value(instance.memory_info());
        Some(MigInstance {
            nodes: nodes::of_instance(self.nvml, instance, self.minor),
            uuid,
            memory_total_bytes: memory.as_ref().map(|memory| memory.total),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
        })
    }
}

fn process(info: ProcessInfo) -> GpuProcess {
    GpuProcess {
        pid: info.pid,
        used_bytes: match info.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
        gpu_instance: info.gpu_instance_id,
        compute_instance: info.compute_instance_id,
    }
}

/// NVML writes the PCI domain with eight digits, everybody else with four.
fn short_address(bus_id: &str) -> String {
    let lower = bus_id.to_ascii_lowercase();
    match lower.split_once(':') {
        Some((domain, rest)) if domain.len() > 4 && domain.starts_with("0000") => {
            format!("{}:{rest}", &domain[4..])
        }
        _ => lower,
    }
}

fn note(health: &Mutex<DeviceHealth>, event: DeviceEvent) {
    let mut health = health.lock().unwrap_or_else(PoisonError::into_inner);
    let before = health.action;
    health.step(event);
    if health.action > before {
        let problem = health.sentence().unwrap_or_default();
        if health.action.takes_work() {
            tracing::warn!(?event, action = ?health.action, problem, "a device reported something");
        } else {
            tracing::error!(?event, action = ?health.action, problem, "a device takes no new work");
        }
    }
}

/// Waits for events as long as somebody keeps the device's health.
fn watch(nvml: &Nvml, index: u32, health: &std::sync::Weak<Mutex<DeviceHealth>>) -> Result<(), NvmlError> {
    let wanted = EventTypes::CRITICAL_XID_ERROR
        | EventTypes::SINGLE_BIT_ECC_ERROR
        | EventTypes::DOUBLE_BIT_ECC_ERROR
        | EventTypes::MIG_CONFIG_CHANGE;
    let device = nvml.device_by_index(index)?;
    let events = device.supported_event_types()? & wanted;
    if events.is_empty() {
        return Err(NvmlError::NotSupported);
    }
    let set = device.register_events(events, nvml.create_event_set()?).map_err(|error| error.error)?;
    if let Some(health) = health.upgrade() {
        health.lock().unwrap_or_else(PoisonError::into_inner).watched = true;
    }
    let mut in_a_row = 0;
    loop {
        let waited = set.wait(WAIT_MS);
        let Some(health) = health.upgrade() else { return Ok(()) };
        match waited {
            Ok(data) => {
                for event in told(data.event_type, data.event_data) {
                    note(&health, event);
                }
                in_a_row += 1;
                if in_a_row >= BURST {
                    in_a_row = 0;
                    std::thread::sleep(BURST_PAUSE);
                }
            }
            Err(NvmlError::Timeout) => in_a_row = 0,
            Err(error) => {
                if matches!(error, NvmlError::GpuLost) {
                    note(&health, DeviceEvent::Lost);
                }
                tracing::debug!(index, %error, "waiting for a device's events failed");
                std::thread::sleep(FAILURE_PAUSE);
            }
        }
    }
}

fn told(types: EventTypes, xid: Option<XidError>) -> Vec<DeviceEvent> {
    let mut events = Vec::new();
    if types.contains(EventTypes::CRITICAL_XID_ERROR) {
        events.push(DeviceEvent::Xid(match xid {
            Some(XidError::Value(xid)) => xid,
            Some(XidError::Unknown) | None => XID_UNKNOWN,
        }));
    }
    let others = [
        (EventTypes::SINGLE_BIT_ECC_ERROR, DeviceEvent::EccCorrected),
        (EventTypes::DOUBLE_BIT_ECC_ERROR, DeviceEvent::EccUncorrected),
        (EventTypes::MIG_CONFIG_CHANGE, DeviceEvent::MigChanged),
    ];
    events.extend(others.into_iter().filter(|(kind, _)| types.contains(*kind)).map(|(_, event)| event));
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_everybody_else_writes_them() {
        assert_eq!(short_address("00000000:C1:00.0"), "0000:c1:00.0");
        assert_eq!(short_address("0000:c1:00.0"), "0000:c1:00.0");
        // A domain beyond 16 bits keeps its digits.
        assert_eq!(short_address("10000001:02:00.0"), "10000001:02:00.0");
        assert_eq!(short_address(""), "");
    }

    #[test]
    fn one_report_may_hold_several_events() {
        let types = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        let events = told(types, Some(XidError::Value(48)));
        assert_eq!(events, [DeviceEvent::Xid(48), DeviceEvent::EccUncorrected]);
        assert_eq!(told(EventTypes::empty(), None), []);
    }
}
