//! What can hold a model here, and how busy is it?
//!
//! Devices come from llama.cpp's back ends, readings of NVIDIA devices from NVML when its library is there; its
//! absence is normal. The two are brought together by PCI address: NVML counts by address, CUDA by speed. The
//! host's memory is read from `/proc/meminfo`, because llama.cpp calls all of it free.

use crate::ggml;
use crate::nodes;
use crate::nvml::Nvidia;
use agentd_domain::device::DeviceAction;
use agentd_domain::engine::{BackEnd, Device, GpuReadings};
use llama_cpp_2::LlamaBackendDeviceType;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

pub(crate) struct Devices {
    nvidia: Option<Nvidia>,
    /// By PCI address, in ggml's order; asked once, while all devices answer.
    addresses: Vec<Option<String>>,
    /// What was listed last: a back end that is asked for the memory of a lost device ends the process.
    listed: Mutex<Vec<Device>>,
    /// What was loaded, and what not.
    pub(crate) backends: Vec<BackEnd>,
}

impl Devices {
    /// Call after the back ends are loaded.
    pub(crate) fn probe(nvml_library: &OsStr, backends: Vec<BackEnd>) -> Self {
        let nvidia = Nvidia::open(nvml_library);
        let addresses = ggml::device_addresses();
        Self { nvidia, addresses, listed: Mutex::default(), backends }
    }

    pub(crate) fn list(&self) -> Vec<Device> {
        self.read().0
    }

    /// The devices of the back ends, and every GPU that NVML knows.
    pub(crate) fn read(&self) -> (Vec<Device>, Vec<GpuReadings>) {
        let gpus = self.nvidia.as_ref().map(Nvidia::readings).unwrap_or_default();
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = gpus.iter().any(|gpu| gpu.health.action == DeviceAction::Lost);
        if !lost || listed.is_empty() {
            *listed = devices();
        }
        let mut devices = listed.clone();
        for (device, address) in devices.iter_mut().zip(&self.addresses) {
            device.gpu = address.as_ref().map(|address| {
                let of_driver = of_address(&gpus, address);
                of_driver.unwrap_or_else(|| elsewhere(address))
            });
        }
        (devices, gpus)
    }
}

/// Of a device of which NVML knows nothing: where it is, and how it is opened.
fn elsewhere(address: &str) -> GpuReadings {
    let pci_address = Some(address.to_ascii_lowercase());
    GpuReadings { pci_address, nodes: nodes::of_graphics(address), ..GpuReadings::default() }
}

fn of_address(gpus: &[GpuReadings], address: &str) -> Option<GpuReadings> {
    let same =
        |gpu: &&GpuReadings| gpu.pci_address.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(address));
    gpus.iter().find(same).cloned()
}

fn devices() -> Vec<Device> {
    let devices = llama_cpp_2::list_llama_ggml_backend_devices();
    devices
        .into_iter()
        .map(|device| {
            let host = matches!(device.device_type, LlamaBackendDeviceType::Cpu);
            let memory = if host { host_memory() } else { None };
            let (total, free) = memory.unwrap_or((device.memory_total as u64, device.memory_free as u64));
            Device {
                name: device.name,
                description: device.description.trim().to_owned(),
                kind: kind(device.device_type).to_owned(),
                memory_total_bytes: total,
                memory_free_bytes: free,
                gpu: None,
            }
        })
        .collect()
}

fn kind(kind: LlamaBackendDeviceType) -> &'static str {
    match kind {
        LlamaBackendDeviceType::Cpu => "cpu",
        LlamaBackendDeviceType::Gpu => "gpu",
        LlamaBackendDeviceType::IntegratedGpu => "igpu",
        LlamaBackendDeviceType::Accelerator | LlamaBackendDeviceType::Unknown => "accelerator",
    }
}

/// Total and available bytes.
pub(crate) fn host_memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some((meminfo_bytes(&text, "MemTotal:")?, meminfo_bytes(&text, "MemAvailable:")?))
}

fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// Resident memory of this process; 0 where `/proc` cannot be read.
pub(crate) fn rss_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Memory of this process that no file stands behind; 0 where `/proc` cannot be read.
pub(crate) fn anonymous_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    meminfo_bytes(&text, "RssAnon:").unwrap_or(0)
}

/// Threads for one model: a core's second hyper-thread slows matrix products down.
pub(crate) fn physical_cores() -> usize {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = siblings(Path::new("/sys/devices/system/cpu")).len();
    if cores == 0 { available } else { cores.min(available) }
}

/// One entry for each core, whatever the number of its threads.
fn siblings(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|cpu| fs::read_to_string(cpu.path().join("topology/thread_siblings_list")).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kibibytes() {
        let text = "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable:"), Some(1024 * 1024));
        assert_eq!(meminfo_bytes(text, "SwapTotal:"), None);
    }

    #[test]
    fn there_is_at_least_one_core() {
        assert!(physical_cores() >= 1);
    }
}
