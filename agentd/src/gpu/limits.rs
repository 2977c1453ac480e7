//! To how much of each device is the engine held, and by whom?
//!
//! A guarantee on a GPU is worth what stands behind it. Where the kernel or the driver can hold a process to a number of
//! bytes, the engine is held to what the ledger gives out of each device on which something is guaranteed: then no fault of
//! it takes the device's reserve, which is what other processes have.
//!
//! Always: only what the launcher has put in force is called `kernel`. A limit that cannot be put in force is shown as a
//!         problem, and the engine goes on without: its own leases hold as before, and are called `engine`.
//! When:   for an engine's process from its start on. A guarantee that is given later counts from the next one.
//! Where:  how hard each kind is, `agentd_domain::enforcement`; who applies it, the launcher's `device_limits.rs`.

use super::Gpu;
use agentd_domain::enforcement::{Available, DeviceLimit, LimitBy, hardest, region_of};
use agentd_domain::engine::Device;
use agentd_domain::fault::Report;
use agentd_gpu::ledger;
use std::collections::BTreeSet;

/// The limits of an engine on these devices. `regions` are those that the kernel accounts for.
pub(super) fn wanted(
    devices: &[ledger::Device],
    guaranteed: &dyn Fn(&str) -> bool,
    regions: &BTreeSet<String>,
) -> Vec<(String, DeviceLimit)> {
    let limit = |device: &ledger::Device| {
        let gpu = device.gpu.as_ref().filter(|_| !device.is_host() && guaranteed(&device.name))?;
        let region = region_of(regions, gpu.pci_address.as_deref()?)?;
        // A driver of NVIDIA's that shows its regions to the kernel has limits for cgroups too, and wants to be asked.
        let available = match region.starts_with("nvidia/") {
            true => Available { nvml: gpu.uuid.clone(), ..Available::default() },
            false => Available { dmem: Some(region.clone()), ..Available::default() },
        };
        let bytes = device.total_bytes.saturating_sub(device.reserve_bytes);
        let by = hardest(&available, bytes).filter(|by| by.problem().is_none() && holds(by))?;
        Some((device.name.clone(), DeviceLimit { by, bytes }))
    };
    devices.iter().filter_map(limit).collect()
}

/// A wish that the engine could ignore is none.
fn holds(by: &LimitBy) -> bool {
    by.enforcement().holds_strangers()
}

impl Gpu {
    /// What an engine with these devices is to be started with.
    pub(super) fn limits(&self, devices: &[Device], regions: &BTreeSet<String>) -> Vec<DeviceLimit> {
        let mut state = self.state();
        let shown = super::plan::devices(devices, self.0.engine_memory_bytes);
        let partitions = state.ledger.partitions().to_vec();
        let sure = |name: &str| {
            partitions.iter().any(|one| one.guaranteed && one.devices.iter().any(|device| device == name))
        };
        let wanted = wanted(&shown, &sure, regions);
        state.limits = wanted.clone();
        wanted.into_iter().map(|(_, limit)| limit).collect()
    }

    /// Which of them the launcher has put in force.
    pub(super) fn limited(&self, by: &[DeviceLimit]) {
        let mut state = self.state();
        let held = state.limits.iter().filter(|(_, limit)| by.contains(limit)).map(|(name, _)| name.clone());
        state.limited = held.collect();
    }
}

/// As the board shows it.
pub(super) fn refused(why: &Report) -> Report {
    Report::environment(
        "device_limits_refused",
        "the engine runs without limits of its devices",
        why.to_string(),
        "guarantees are kept by the engine alone (`agentctl gpu ls` says so); a restart of the appliance tries again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::engine::GpuReadings;
    use agentd_domain::ledger::Enforcement;

    const GIB: u64 = 1 << 30;

    fn card(name: &str, uuid: &str, pci: &str) -> ledger::Device {
        ledger::Device {
            name: name.to_owned(),
            description: String::new(),
            kind: "gpu".to_owned(),
            total_bytes: 8 * GIB,
            reserve_bytes: GIB,
            reported_free_bytes: 0,
            enforcement: Enforcement::Engine,
            problem: None,
            gpu: Some(GpuReadings {
                uuid: Some(uuid.to_owned()),
                pci_address: Some(pci.to_owned()),
                ..GpuReadings::default()
            }),
        }
    }

    #[test]
    fn a_guarantee_has_the_hardest_limit_that_holds_behind_it() {
        let nvidia = card("CUDA0", "GPU-1", "0000:c1:00.0");
        let amd = card("Vulkan0", "x", "0000:03:00.0");
        let host = ledger::Device { kind: "cpu".to_owned(), ..card("CPU", "GPU-2", "0000:c1:00.0") };
        let all = [host, nvidia, amd];
        let regions =
            BTreeSet::from(["drm/0000:03:00.0/vram0", "nvidia/0000:c1:00.0/vidmem"].map(str::to_owned));
        let limits = wanted(&all, &|_| true, &regions);
        let by: Vec<_> = limits.iter().map(|(name, limit)| (name.as_str(), &limit.by, limit.bytes)).collect();
        let nvml = LimitBy::Nvml { uuid: "GPU-1".to_owned() };
        let dmem = LimitBy::Dmem { region: "drm/0000:03:00.0/vram0".to_owned() };
        assert_eq!(by, [("CUDA0", &nvml, 7 * GIB), ("Vulkan0", &dmem, 7 * GIB)]);
        assert_eq!(
            wanted(&all, &|name| name == "CUDA0", &regions).len(),
            1,
            "nothing is guaranteed on the other"
        );
        assert!(wanted(&all, &|_| true, &BTreeSet::new()).is_empty(), "a kernel without dmem holds nobody");
        // Words that are no id of a device go into no message.
        let odd = [card("CUDA0", "no id", "0000:c1:00.0")];
        assert!(wanted(&odd, &|_| true, &regions).is_empty());
    }
}
