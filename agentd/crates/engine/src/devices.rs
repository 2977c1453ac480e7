//! What can hold a model here, and how busy is it?
//!
//! Devices come from llama.cpp's back ends, readings of NVIDIA devices from NVML when its library is there; its
//! absence is normal. The host's memory is read from `/proc/meminfo`, because llama.cpp calls all of it free.

use agentd_domain::engine::{Device, GpuReadings};
use llama_cpp_2::LlamaBackendDeviceType;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

/// The name that the driver's package installs; the one without a number is for compilers.
const NVML_LIBRARY: &str = "libnvidia-ml.so.1";

pub(crate) struct Devices {
    nvml: Option<Nvml>,
    /// File name of the CPU back end in use.
    pub(crate) cpu_backend: String,
}

impl Devices {
    /// Call after the back ends are loaded.
    pub(crate) fn probe() -> Self {
        let nvml = Nvml::builder().lib_path(OsStr::new(NVML_LIBRARY)).init();
        if let Err(error) = &nvml {
            tracing::debug!(%error, "no NVML");
        }
        Self { nvml: nvml.ok(), cpu_backend: cpu_backend() }
    }

    pub(crate) fn list(&self) -> Vec<Device> {
        let devices = llama_cpp_2::list_llama_ggml_backend_devices();
        let cuda_devices = devices.iter().filter(|device| device.backend == "CUDA").count();
        let mut cuda_index = 0;
        devices
            .into_iter()
            .map(|device| {
                let host = matches!(device.device_type, LlamaBackendDeviceType::Cpu);
                let memory = if host { host_memory() } else { None };
                let (total, free) = memory.unwrap_or((device.memory_total as u64, device.memory_free as u64));
                let gpu = if device.backend == "CUDA" {
                    cuda_index += 1;
                    self.readings(cuda_index - 1, cuda_devices)
                } else {
                    None
                };
                Device {
                    name: device.name,
                    description: device.description.trim().to_owned(),
                    kind: kind(device.device_type).to_owned(),
                    memory_total_bytes: total,
                    memory_free_bytes: free,
                    gpu,
                }
            })
            .collect()
    }

    /// NVML counts by PCI address, CUDA by speed unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`: with several devices in
    /// another order readings would be given to the wrong one, so there are none.
    fn readings(&self, cuda_index: u32, cuda_devices: usize) -> Option<GpuReadings> {
        let nvml = self.nvml.as_ref()?;
        let by_address = std::env::var("CUDA_DEVICE_ORDER").is_ok_and(|order| order == "PCI_BUS_ID");
        let alone = cuda_devices == 1 && nvml.device_count().is_ok_and(|count| count == 1);
        if !by_address && !alone {
            return None;
        }
        let device = nvml.device_by_index(cuda_index).ok()?;
        Some(GpuReadings {
            uuid: device.uuid().ok(),
            utilisation_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            power_milliwatts: device.power_usage().ok(),
            memory_used_bytes: device.memory_info().ok().map(|memory| memory.used),
        })
    }
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

/// Which of the CPU variants is mapped: llama.cpp chooses by itself and does not tell.
fn cpu_backend() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapped = maps.lines().filter_map(|line| line.rsplit('/').next());
    let name = mapped.into_iter().find(|name| name.starts_with("libggml-cpu"));
    name.unwrap_or_default().to_owned()
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
