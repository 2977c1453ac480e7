//! Which card is here, and is it free?
//!
//! Asked of `nvidia-smi`, which knows nothing of our own readings: they are compared with it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::process::Command;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
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
        write!(f, "{name}, {memory_total_mib} MiB, compute capability {compute}, driver {driver}")
    }
}

/// The first card, or why there is none that can be used.
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
}
