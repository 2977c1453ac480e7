//! Who holds a process to its share of a device's memory, and in which words is that asked for?
//!
//! In:     what a machine offers ([`Available`]), a limit ([`DeviceLimit`]).
//! Out:    the hardest kind of limit there is, its honest name ([`Enforcement`]), the lines of the kernel's `dmem.*`
//!         files and the variables of a program.
//! Always: what a program could undo by itself is `advisory`, whoever wrote it down.
//! Where:  the launcher applies limits (`agentd-sandbox`, launcher/device_limits.rs); the driver's call is made by
//!         `agentd-engine limit`, because a static program cannot load the driver's library.
//! Source: Documentation/admin-guide/cgroup-v2.rst, "DMEM" (Linux 6.14); NVIDIA's guides to MIG and to MPS.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What stands behind a number, the hardest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforcement {
    /// A wish that a program can ignore.
    Advisory,
    /// Our engine gives out no more; true for agents that use the engine and for nobody else.
    Engine,
    /// The kernel or its driver refuses memory beyond it.
    Kernel,
    /// The device itself has no way to more.
    Hardware,
}

impl Enforcement {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Advisory => "advisory",
            Self::Engine => "engine",
            Self::Kernel => "kernel",
            Self::Hardware => "hardware",
        }
    }

    /// Whether a program that is not ours may be let at a device on the strength of this.
    pub fn holds_strangers(self) -> bool {
        self >= Self::Kernel
    }
}

/// A limit for the processes of one cgroup on one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceLimit {
    pub by: LimitBy,
    pub bytes: u64,
}

impl DeviceLimit {
    /// Whether it holds by what the process is told at its start, and not by its group.
    pub fn is_seen(&self) -> bool {
        !self.by.variables(self.bytes).is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LimitBy {
    /// The processes see this instance and no other device.
    Mig { uuid: String },
    /// A limit of the driver on the cgroup (driver 615 or newer).
    Nvml { uuid: String },
    /// The kernel's own limit on the cgroup (Linux 6.14 or newer), for drivers that use it: amdgpu, xe.
    Dmem { region: String },
    /// NVIDIA's Multi-Process Service, by a variable that the program could take out of its environment.
    Mps { device: u32 },
}

impl LimitBy {
    pub fn enforcement(&self) -> Enforcement {
        match self {
            Self::Mig { .. } => Enforcement::Hardware,
            Self::Nvml { .. } | Self::Dmem { .. } => Enforcement::Kernel,
            Self::Mps { .. } => Enforcement::Advisory,
        }
    }

    /// Why its words cannot be what they should: they end up in files, arguments and variables.
    pub fn problem(&self) -> Option<&'static str> {
        match self {
            Self::Mig { uuid } if !is_id(uuid, "MIG-") => Some("the instance's id is not MIG-..."),
            Self::Nvml { uuid } if !is_id(uuid, "GPU-") => Some("the device's id is not GPU-..."),
            Self::Dmem { region } if !is_region(region) => Some("the region is not driver/device/kind"),
            Self::Dmem { region } if region.starts_with("nvidia/") => {
                Some("NVIDIA's driver keeps accounts of its own: its regions are limited by the kind nvml")
            }
            Self::Mps { device } if *device > 63 => Some("there is no such device"),
            _ => None,
        }
    }

    /// What the program finds in its environment.
    pub fn variables(&self, bytes: u64) -> Vec<(&'static str, String)> {
        match self {
            Self::Mig { uuid } => vec![("CUDA_VISIBLE_DEVICES", uuid.clone())],
            // In whole mebibytes, never more than was given.
            Self::Mps { device } => {
                vec![("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", format!("{device}={}M", bytes >> 20))]
            }
            Self::Nvml { .. } | Self::Dmem { .. } => Vec::new(),
        }
    }
}

/// What could limit the processes of a cgroup on one device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Available {
    /// A free instance, with its size.
    pub mig: Option<(String, u64)>,
    /// The device's id, where the driver has limits for cgroups.
    pub nvml: Option<String>,
    /// The device's region, where the kernel has `dmem`.
    pub dmem: Option<String>,
    /// The device's number, where a server of MPS runs.
    pub mps: Option<u32>,
}

/// The hardest that there is for so many bytes. An instance is taken only when it is no larger than what is given:
/// the rest of it would be nobody's.
pub fn hardest(available: &Available, bytes: u64) -> Option<LimitBy> {
    if let Some((uuid, size)) = &available.mig
        && *size <= bytes
    {
        return Some(LimitBy::Mig { uuid: uuid.clone() });
    }
    let nvml = available.nvml.clone().map(|uuid| LimitBy::Nvml { uuid });
    let dmem = || available.dmem.clone().map(|region| LimitBy::Dmem { region });
    let mps = || available.mps.map(|device| LimitBy::Mps { device });
    nvml.or_else(dmem).or_else(mps)
}

/// A `dmem.*` file: bytes of each region, `None` for `max`. A line that is something else is left out: a newer kernel
/// may add some.
pub fn parse_dmem(text: &str) -> BTreeMap<String, Option<u64>> {
    let line = |line: &str| {
        let (region, value) = line.trim().rsplit_once(' ')?;
        let bytes = if value == "max" { None } else { Some(value.parse().ok()?) };
        Some((region.trim().to_owned(), bytes))
    };
    text.lines().filter_map(line).collect()
}

/// The line for `dmem.max`, `dmem.low` or `dmem.min`. Without bytes there is no limit.
pub fn dmem_line(region: &str, bytes: Option<u64>) -> String {
    bytes.map_or_else(|| format!("{region} max"), |bytes| format!("{region} {bytes}"))
}

/// The region of a device's own memory, by its PCI address: `drm/0000:03:00.0/vram0`, `nvidia/0000:c1:00.0/vidmem`.
pub fn region_of<'a>(regions: impl IntoIterator<Item = &'a String>, pci_address: &str) -> Option<&'a String> {
    regions.into_iter().find(|region| {
        let mut parts = region.split('/').skip(1);
        let here = parts.next().is_some_and(|address| address.eq_ignore_ascii_case(pci_address));
        here && parts.next().is_some_and(|kind| kind.starts_with("vram") || kind == "vidmem")
    })
}

fn is_id(text: &str, start: &str) -> bool {
    let rest = text.strip_prefix(start).unwrap_or_default();
    !rest.is_empty()
        && text.len() <= 96
        && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"-/".contains(&b))
}

fn is_region(text: &str) -> bool {
    let whole = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b":._-".contains(&b))
    };
    text.len() <= 128 && text.split('/').count() == 3 && text.split('/').all(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in the kernel's documentation.
    const CAPACITY: &str = "drm/0000:03:00.0/vram0 8514437120\ndrm/0000:03:00.0/stolen 67108864\n";

    #[test]
    fn files_of_all_drivers_are_read_alike() {
        let capacity = parse_dmem(&format!("{CAPACITY}nvidia/0000:c1:00.0/vidmem 85899345920\n"));
        assert_eq!(capacity.len(), 3);
        assert_eq!(region_of(capacity.keys(), "0000:03:00.0").unwrap(), "drm/0000:03:00.0/vram0");
        assert_eq!(region_of(capacity.keys(), "0000:C1:00.0").unwrap(), "nvidia/0000:c1:00.0/vidmem");
        assert_eq!(region_of(capacity.keys(), "0000:04:00.0"), None);
        let max = parse_dmem("drm/0000:03:00.0/vram0 max\ngarbage\nx y z\n\n");
        assert_eq!(max, BTreeMap::from([("drm/0000:03:00.0/vram0".to_owned(), None)]));
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        for bytes in [None, Some(0), Some(u64::MAX)] {
            let read = parse_dmem(&dmem_line("drm/0000:03:00.0/vram0", bytes));
            assert_eq!(read["drm/0000:03:00.0/vram0"], bytes);
        }
    }

    #[test]
    fn the_hardest_limit_is_taken_and_named_for_what_it_is() {
        let all = Available {
            mig: Some(("MIG-1".to_owned(), 10)),
            nvml: Some("GPU-1".to_owned()),
            dmem: Some("drm/0000:03:00.0/vram0".to_owned()),
            mps: Some(0),
        };
        let label = |available: &Available, bytes| hardest(available, bytes).map(|by| by.enforcement());
        assert_eq!(label(&all, 10), Some(Enforcement::Hardware));
        assert_eq!(label(&all, 9), Some(Enforcement::Kernel), "an instance larger than the share");
        let dmem = Available { mig: None, nvml: None, ..all.clone() };
        assert_eq!(label(&dmem, 9), Some(Enforcement::Kernel));
        let mps = Available { dmem: None, ..dmem };
        assert_eq!(label(&mps, 9), Some(Enforcement::Advisory));
        assert_eq!(label(&Available::default(), 9), None);
        assert!(Enforcement::Kernel.holds_strangers() && Enforcement::Hardware.holds_strangers());
        assert!(!Enforcement::Engine.holds_strangers() && !Enforcement::Advisory.holds_strangers());
    }

    #[test]
    fn words_that_would_say_more_than_a_name_are_refused() {
        for uuid in ["", "GPU-", "GPU-a b", "GPU-a\n", "MIG-a"] {
            assert!(LimitBy::Nvml { uuid: uuid.to_owned() }.problem().is_some(), "{uuid:?}");
        }
        for region in ["", "a/b", "a/b/c/d", "a//c", "a/b/c 1\nx", "nvidia/0000:c1:00.0/vidmem"] {
            assert!(LimitBy::Dmem { region: region.to_owned() }.problem().is_some(), "{region:?}");
        }
        assert_eq!(LimitBy::Nvml { uuid: "GPU-8f1c-22".to_owned() }.problem(), None);
        assert_eq!(LimitBy::Dmem { region: "drm/0000:03:00.0/vram0".to_owned() }.problem(), None);
        assert_eq!(LimitBy::Mig { uuid: "MIG-8f1c-22".to_owned() }.problem(), None);
    }

    #[test]
    fn a_wish_is_rounded_down() {
        let wish = LimitBy::Mps { device: 1 }.variables((3 << 20) + 5);
        assert_eq!(wish, [("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "1=3M".to_owned())]);
    }
}
