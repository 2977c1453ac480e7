//! Through which nodes is a device opened, and through which an instance of it?
//!
//! In:     what NVML says of a device, files of `/proc` and `/sys`. Out: paths below `/dev`.
//! Always: a node is named only where the driver or the kernel says that it is this device's; nothing is guessed, and
//!         whether the node is there is for who makes use of it to see.
//! Source: NVIDIA Multi-Instance GPU User Guide, "Device Nodes and Capabilities"; Linux, Documentation/ABI/testing/sysfs-bus-pci
//!         and drivers/gpu/drm/drm_sysfs.c.
#![expect(unsafe_code, reason = "two functions of NVML that its safe binding does not have")]

use nvml_wrapper::error::nvml_try;
use nvml_wrapper::{Device, Nvml};
use std::fs;
use std::path::Path;

/// Where NVIDIA's driver says which node opens an instance.
pub(crate) const CAPABILITIES: &str = "/proc/driver/nvidia/capabilities";
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Those of NVIDIA's driver, by the minor number that it gives the device.
pub(crate) fn of_card(minor: Option<u32>) -> Vec<String> {
    minor.map(|minor| format!("/dev/nvidia{minor}")).into_iter().collect()
}

/// Those of the kernel's graphics drivers for what sits at a place of the PCI bus.
pub(crate) fn of_graphics(pci_address: &str) -> Vec<String> {
    graphics_below(Path::new(PCI_DEVICES), pci_address)
}

fn graphics_below(devices: &Path, pci_address: &str) -> Vec<String> {
    // A word of the driver's becomes part of a path.
    let plain = |byte: u8| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.');
    if pci_address.is_empty() || !pci_address.bytes().all(plain) || pci_address.contains("..") {
        return Vec::new();
    }
    let entries = fs::read_dir(devices.join(pci_address).join("drm")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut nodes: Vec<String> = names.map(|name| format!("/dev/dri/{name}")).collect();
    nodes.retain(|path| agentd_domain::nodes::node(path).is_some());
    nodes.sort();
    nodes
}

/// Those of an instance: its share of the card, and its share of that share's computing.
pub(crate) fn of_instance(nvml: &Nvml, instance: &Device<'_>, minor: Option<u32>) -> Vec<String> {
    let (Some(minor), Some((gpu, compute))) = (minor, ids(nvml, instance)) else { return Vec::new() };
    capabilities_below(Path::new(CAPABILITIES), minor, gpu, compute)
}

fn capabilities_below(folder: &Path, minor: u32, gpu: u32, compute: u32) -> Vec<String> {
    let instance = folder.join(format!("gpu{minor}/mig/gi{gpu}"));
    let files = [instance.join("access"), instance.join(format!("ci{compute}/access"))];
    let nodes: Option<Vec<String>> = files
        .iter()
        .map(|file| {
            let text = fs::read_to_string(file).ok()?;
            let number = text.lines().find_map(|line| line.strip_prefix("DeviceFileMinor:"))?;
            let number: u32 = number.trim().parse().ok()?;
            Some(format!("/dev/nvidia-caps/nvidia-cap{number}"))
        })
        .collect();
    // One of the two opens nothing.
    nodes.unwrap_or_default()
}

/// Of its share of the card, and of its computing.
fn ids(nvml: &Nvml, instance: &Device<'_>) -> Option<(u32, u32)> {
    let library = nvml.lib();
    let of_gpu = library.nvmlDeviceGetGpuInstanceId.as_ref().ok()?;
    let of_compute = library.nvmlDeviceGetComputeInstanceId.as_ref().ok()?;
    let (mut gpu, mut compute) = (0, 0);
    // SAFETY: the handle is NVML's own, and valid until the library is shut down, which `nvml` puts off; each function
    // writes one number to where it points.
    let answers = unsafe {
        let handle = instance.handle();
        [of_gpu(handle, &raw mut gpu), of_compute(handle, &raw mut compute)]
    };
    answers.into_iter().try_for_each(nvml_try).ok()?;
    Some((gpu, compute))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_opened_by_the_two_nodes_that_the_driver_names() {
        let folder = tempfile::tempdir().unwrap();
        let instance = folder.path().join("gpu0/mig/gi3");
        fs::create_dir_all(instance.join("ci0")).unwrap();
        // As the driver writes it (MIG User Guide).
        let access =
            |minor: u32| format!("DeviceFileMinor: {minor}\nDeviceFileMode: 256\nDeviceFileModify: 1\n");
        fs::write(instance.join("access"), access(30)).unwrap();
        assert!(capabilities_below(folder.path(), 0, 3, 0).is_empty(), "half of it");
        fs::write(instance.join("ci0/access"), access(31)).unwrap();
        let nodes = ["/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31"];
        assert_eq!(capabilities_below(folder.path(), 0, 3, 0), nodes);
        assert!(capabilities_below(folder.path(), 1, 3, 0).is_empty(), "another card");
    }

    #[test]
    fn graphics_nodes_are_those_of_the_place_on_the_bus() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["card1", "renderD129", "card1-HDMI-A-1", "controlD64"] {
            fs::create_dir_all(folder.path().join("0000:03:00.0/drm").join(name)).unwrap();
        }
        let nodes = graphics_below(folder.path(), "0000:03:00.0");
        assert_eq!(nodes, ["/dev/dri/card1", "/dev/dri/renderD129"]);
        for other in ["0000:04:00.0", "", "..", "../0000:03:00.0"] {
            assert!(graphics_below(folder.path(), other).is_empty(), "{other}");
        }
        assert_eq!(of_card(Some(2)), ["/dev/nvidia2"]);
        assert!(of_card(None).is_empty());
    }
}
