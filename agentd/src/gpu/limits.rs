//! To how much of each device is the engine held, and by whom?
//!
//! A guarantee on a GPU is worth what stands behind it. Where the kernel or the driver can hold a process to a number of
//! bytes, the engine is held to what the ledger gives out of each device on which something is guaranteed: then no fault of
//! it takes the device's reserve, which is what other processes have.
//!
//! An engine is on one instance of a card that is cut up, because a process of CUDA is on one; the others are agents'.
//! It is on no device that takes no work, or that is an agent's own: their nodes are hidden from it.
//!
//! Always: only what the launcher has put in force is called `kernel` or `hardware`. A limit that cannot be put in force
//!         is shown as a problem, and the engine goes on without: its own leases hold as before, and are called `engine`.
//! When:   a guarantee that is given later is put in force for the living process, where its group can be held; what a
//!         process sees of devices is settled at its start, so for that it begins anew when nobody uses it.
//! Where:  how hard each kind is, `agentd_domain::enforcement`; who applies it, the launcher's `device_limits.rs`.

use super::ill::id_of;
use super::lease::{available, hidden_by_grants, own};
use super::{Gpu, State};
use crate::engine::Terms;
use agentd_domain::device::{Mig, MigInstance};
use agentd_domain::enforcement::{DeviceLimit, LimitBy, hardest};
use agentd_domain::engine::Device;
use agentd_domain::fault::Report;
use agentd_gpu::ledger;
use std::collections::BTreeSet;

/// The limits of an engine on these devices. `held` says which must be kept to a number of bytes, and how many of a
/// device's are others'; `regions` are those that the kernel accounts for; `taken` are instances that have another user.
pub(super) fn wanted(
    devices: &[ledger::Device],
    held: &dyn Fn(&str) -> Option<u64>,
    regions: &BTreeSet<String>,
    instance: Option<&(String, MigInstance)>,
) -> Vec<(String, DeviceLimit)> {
    let limit = |device: &ledger::Device| {
        let gpu = device.gpu.as_ref().filter(|_| !device.is_host())?;
        if let Some((_, one)) = instance.filter(|(name, _)| *name == device.name) {
            let by = LimitBy::Mig { uuid: one.uuid.clone() };
            let bytes = one.memory_total_bytes.unwrap_or(device.total_bytes);
            return by.problem().is_none().then(|| (device.name.clone(), DeviceLimit { by, bytes }));
        }
        let others = held(&device.name)?;
        if gpu.mig.as_ref().is_some_and(|mig| mig.enabled) {
            return None;
        }
        let bytes = device.total_bytes.saturating_sub(device.reserve_bytes).saturating_sub(others);
        let by = hardest(&available(gpu, regions), bytes).filter(|by| by.problem().is_none() && holds(by))?;
        Some((device.name.clone(), DeviceLimit { by, bytes }))
    };
    devices.iter().filter_map(limit).collect()
}

/// A wish that the engine could ignore is none.
fn holds(by: &LimitBy) -> bool {
    by.enforcement().holds_strangers()
}

/// The instance that the engine is on, with the device it is of: the one it is on already, else the largest that has no
/// other user. A process of CUDA is on one instance, or on cards that are not cut up: where there is one of these, on none.
/// Source: NVIDIA Multi-Instance GPU User Guide, "CUDA Device Enumeration".
pub(super) fn instance(
    devices: &[ledger::Device],
    before: &[(String, DeviceLimit)],
    taken: &BTreeSet<String>,
) -> Option<(String, MigInstance)> {
    let gpu = |device: &ledger::Device| device.gpu.clone().filter(|gpu| gpu.uuid.is_some());
    let cut = |device: &ledger::Device| gpu(device).and_then(|gpu| gpu.mig).filter(|mig: &Mig| mig.enabled);
    if devices.iter().any(|device| gpu(device).is_some() && cut(device).is_none()) {
        return None;
    }
    let all = devices.iter().flat_map(|device| {
        let instances = cut(device).map(|mig| mig.instances).unwrap_or_default();
        instances.into_iter().map(|one| (device.name.clone(), one))
    });
    let own = |one: &MigInstance| {
        before.iter().any(|(_, limit)| matches!(&limit.by, LimitBy::Mig { uuid } if *uuid == one.uuid))
    };
    let free = all.filter(|(_, one)| own(one) || !taken.contains(&one.uuid));
    free.max_by_key(|(_, one)| (own(one), one.memory_total_bytes))
}

impl Gpu {
    /// How an engine with these devices is to be started.
    pub(super) fn terms(&self, devices: &[Device], regions: &BTreeSet<String>) -> Terms {
        let mut state = self.state();
        state.regions.clone_from(regions);
        let mut shown = super::plan::devices(devices, self.0.engine_memory_bytes);
        state.full_sizes(&mut shown);
        let of_runs = state.leases.values().filter_map(|lease| match &lease.given.limit()?.by {
            LimitBy::Mig { uuid } => Some(uuid.clone()),
            _ => None,
        });
        let taken = of_runs.collect();
        let instance = instance(&shown, &state.limits, &taken);
        let partitions = state.ledger.partitions().to_vec();
        let others = |name: &str| state.ledger.strangers_on(name);
        let sure = |name: &str| {
            partitions.iter().any(|one| one.guaranteed && one.devices.iter().any(|device| device == name))
        };
        let held = |name: &str| (sure(name) || others(name) > 0).then(|| others(name));
        let wanted = wanted(&shown, &held, regions, instance.as_ref());
        state.limits.clone_from(&wanted);
        let all = shown.iter().filter_map(|device| device.gpu.as_ref()?.mig.as_ref());
        let all: Vec<String> = all.flat_map(|mig| &mig.instances).flat_map(|one| own(&one.nodes)).collect();
        // A driver lists for the next engine only what that one may open: what was hidden stays so.
        state.others_instances.extend(all);
        for node in instance.iter().flat_map(|(_, one)| &one.nodes) {
            state.others_instances.remove(node);
        }
        Terms { limits: wanted.into_iter().map(|(_, limit)| limit).collect(), hidden: state.hidden() }
    }

    /// As they were decided last.
    pub(super) fn terms_now(&self) -> Terms {
        let state = self.state();
        let limits = state.limits.iter().filter(|(name, _)| state.limited.contains_key(name));
        Terms { limits: limits.map(|(_, limit)| limit.clone()).collect(), hidden: state.hidden() }
    }

    pub(super) fn hidden(&self) -> Vec<String> {
        self.state().hidden()
    }

    /// Which of them the launcher has put in force.
    pub(super) fn limited(&self, by: &[DeviceLimit]) {
        let mut state = self.state();
        let held = state.limits.iter().filter(|(_, limit)| by.contains(limit));
        state.limited = held.map(|(name, limit)| (name.clone(), limit.by.enforcement())).collect();
    }
}

impl State {
    /// Nodes that no engine may open.
    fn hidden(&self) -> Vec<String> {
        let ill = self.ill.out().flat_map(|(_, known)| own(&known.device.nodes));
        let mut hidden = hidden_by_grants(&self.grants);
        hidden.extend(ill);
        hidden.extend(self.others_instances.iter().cloned());
        hidden.into_iter().collect()
    }

    /// A process that is held to a part of a device is told that the device has so much, and a limit is of all of it. On
    /// an instance it has the instance.
    pub(super) fn full_sizes(&mut self, devices: &mut [ledger::Device]) {
        for device in devices.iter_mut().filter(|device| !device.is_host()) {
            let id = device.gpu.as_ref().and_then(id_of).unwrap_or_else(|| device.name.clone());
            let size = self.sizes.entry(id).or_default();
            *size = device.total_bytes.max(*size);
            match self.limits.iter().find(|(name, _)| *name == device.name).map(|(_, limit)| limit) {
                Some(DeviceLimit { by: LimitBy::Mig { .. }, bytes }) => {
                    device.total_bytes = device.total_bytes.min(*bytes);
                    device.reserve_bytes = device.reserve_bytes.min(device.total_bytes / 4);
                }
                Some(_) => device.total_bytes = *size,
                None => {}
            }
        }
    }
}

/// As the board shows it.
pub(super) fn refused(why: &Report) -> Report {
    if why.code == "engine_conflict" {
        return Report::environment(
            "device_limits_wait",
            "the engine is not held to its share of devices yet",
            "it was started before the share was what it is, and has work",
            "nothing: it begins anew as soon as nobody uses it; until then guarantees are kept by the engine alone",
        );
    }
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
        let limits = wanted(&all, &|_| Some(0), &regions, None);
        let by: Vec<_> = limits.iter().map(|(name, limit)| (name.as_str(), &limit.by, limit.bytes)).collect();
        let nvml = LimitBy::Nvml { uuid: "GPU-1".to_owned() };
        let dmem = LimitBy::Dmem { region: "drm/0000:03:00.0/vram0".to_owned() };
        assert_eq!(by, [("CUDA0", &nvml, 7 * GIB), ("Vulkan0", &dmem, 7 * GIB)]);
        assert_eq!(
            wanted(&all, &|name| (name == "CUDA0").then_some(0), &regions, None).len(),
            1,
            "nothing is guaranteed on the other"
        );
        assert!(
            wanted(&all, &|_| Some(0), &BTreeSet::new(), None).is_empty(),
            "a kernel without dmem holds nobody"
        );
        // Words that are no id of a device go into no message.
        let odd = [card("CUDA0", "no id", "0000:c1:00.0")];
        assert!(wanted(&odd, &|_| Some(0), &regions, None).is_empty());
    }
}
