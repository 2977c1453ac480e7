//! Which card is here, and is it free?
//!
//! NVIDIA's: asked of `nvidia-smi`, which knows nothing of our own readings: they are compared with it. Vulkan's: asked of
//! the engine, which lists what its back end sees. One that computes on the processor is no GPU: it is taken for a rehearsal
//! and for nothing else, and is called what it is.

use crate::Backend;
use agentd_domain::engine::Device;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::process::Command;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    pub backend: Backend,
    /// Whether it computes on the processor.
    pub software: bool,
    pub name: String,
    pub uuid: String,
    pub driver: String,
    /// `9.0`.
    pub compute: String,
    pub memory_total_mib: u64,
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, driver, compute, memory_total_mib, .. } = self;
        match self.backend {
            Backend::Cuda => {
                write!(f, "{name}, {memory_total_mib} MiB, compute capability {compute}, driver {driver}")
            }
            Backend::Vulkan if self.software => {
                write!(f, "REHEARSAL on a software device, no GPU: {name}, {memory_total_mib} MiB, Vulkan")
            }
            Backend::Vulkan => write!(f, "{name}, {memory_total_mib} MiB, Vulkan"),
        }
    }
}

/// Names of drivers that compute on the processor: Mesa's lavapipe, and SwiftShader.
const SOFTWARE: [&str; 2] = ["llvmpipe", "SwiftShader"];

/// The first device of Vulkan's back end, among those that the engine lists; a software device for a rehearsal alone.
pub fn of_vulkan(devices: &[Device], rehearsal: bool) -> Result<Card, String> {
    let found = devices.iter().find(|device| device.name.starts_with(Backend::Vulkan.prefix()));
    let device = found.ok_or("the engine's Vulkan back end sees no device")?;
    let software = SOFTWARE.iter().any(|name| device.description.contains(name));
    if software && !rehearsal {
        return Err(format!(
            "{} computes on the processor; --rehearse takes it all the same",
            device.description
        ));
    }
    if rehearsal && !software {
        return Err(format!("{} is no software device: leave --rehearse out", device.description));
    }
    Ok(Card {
        backend: Backend::Vulkan,
        software,
        name: device.description.clone(),
        uuid: String::new(),
        driver: String::new(),
        compute: String::new(),
        memory_total_mib: device.memory_total_bytes >> 20,
    })
}

/// NVIDIA's first card, or why there is none that can be used.
pub fn find() -> Result<Card, String> {
    if !Path::new("/dev/nvidiactl").exists() {
        return Err("there is no /dev/nvidiactl, so no driver of NVIDIA's is loaded".to_owned());
    }
    let text = ask("--query-gpu", "name,uuid,driver_version,compute_cap,memory.total")?;
    let card = parse(&text).ok_or_else(|| format!("nvidia-smi said `{}`", text.trim()))?;
    let others = ask("--query-compute-apps", "pid,used_memory")?;
    if let Some(other) = others.lines().find(|line| !line.trim().is_empty()) {
        return Err(format!(
            "somebody computes on it (pid, MiB: {other}); nothing could be measured beside that"
        ));
    }
    Ok(card)
}

/// Numbers of the card as `nvidia-smi` gives them, in the order of `fields`.
pub fn numbers(fields: &str) -> Result<Vec<Option<f64>>, String> {
    let text = ask("--query-gpu", fields)?;
    let line = text.lines().next().unwrap_or_default();
    Ok(line.split(',').map(|value| value.trim().parse().ok()).collect())
}

fn ask(what: &str, fields: &str) -> Result<String, String> {
    let output = Command::new("nvidia-smi")
        .arg(format!("{what}={fields}"))
        .args(["--format=csv,noheader,nounits"])
        .output()
        .map_err(|error| format!("nvidia-smi does not run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = if output.stderr.is_empty() { output.stdout } else { output.stderr };
    Err(format!("nvidia-smi failed: {}", String::from_utf8_lossy(&text).trim()))
}

fn parse(text: &str) -> Option<Card> {
    let mut fields = text.lines().next()?.split(',').map(|field| field.trim().to_owned());
    let (name, uuid, driver, compute) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let memory_total_mib = fields.next()?.parse().ok()?;
    (uuid.starts_with("GPU-") && compute.contains('.')).then_some(Card {
        backend: Backend::Cuda,
        software: false,
        name,
        uuid,
        driver,
        compute,
        memory_total_mib,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_read_and_an_error_is_none() {
        let text = "NVIDIA H100 80GB HBM3, GPU-1b2c, 570.86.15, 9.0, 81559\n";
        let card = parse(text).unwrap();
        assert_eq!((card.compute.as_str(), card.memory_total_mib), ("9.0", 81_559));
        assert_eq!(parse("No devices were found\n"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_software_device_is_taken_for_a_rehearsal_alone_and_called_what_it_is() {
        let device = |name: &str, description: &str| Device {
            name: name.to_owned(),
            description: description.to_owned(),
            kind: "gpu".to_owned(),
            memory_total_bytes: 2 << 30,
            memory_free_bytes: 2 << 30,
            gpu: None,
        };
        let lavapipe = [device("CPU", "a processor"), device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)")];
        assert!(of_vulkan(&lavapipe, false).unwrap_err().contains("on the processor"));
        let card = of_vulkan(&lavapipe, true).unwrap();
        assert!(
            card.software && card.to_string().starts_with("REHEARSAL on a software device, no GPU"),
            "{card}"
        );
        let real = [device("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)")];
        assert!(of_vulkan(&real, true).is_err(), "a GPU is not rehearsed on");
        assert!(!of_vulkan(&real, false).unwrap().software);
        assert!(of_vulkan(&lavapipe[..1], true).is_err());
    }
}
