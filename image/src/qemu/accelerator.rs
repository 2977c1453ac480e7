//! Does KVM really boot a guest here?
//!
//! `/dev/kvm` may be there and open and still not run a kernel (nested virtual machines without the right
//! features). So our own kernel is booted with no root at all and must come as far as complaining about
//! that. The answer is kept until the host restarts or the kernel changes.

use super::{Boot, Machine};
use crate::cache::Cache;
use crate::kernel::Kernel;
use anyhow::Result;
use std::fs::OpenOptions;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processor runs the guest.
    Kvm,
    /// QEMU translates: works everywhere, ten to fifty times slower.
    Tcg,
}

/// The choice and why, in words for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub accelerator: Accelerator,
    pub why: String,
}

/// With KVM a kernel without a root gives up in about a second.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

const PROBE_LOOK: Duration = Duration::from_millis(500);

/// The last thing such a kernel says.
const BOOTED: &str = "Unable to mount root fs";

/// Probes, or remembers. `$AGENTD_ACCEL` (`kvm` or `tcg`) overrides.
pub fn choose(cache: &Cache, kernel: &Kernel) -> Result<Choice> {
    match std::env::var("AGENTD_ACCEL").as_deref() {
        Ok("kvm") => return Ok(choice(Accelerator::Kvm, "AGENTD_ACCEL says so")),
        Ok("tcg") => return Ok(choice(Accelerator::Tcg, "AGENTD_ACCEL says so")),
        Ok(other) => anyhow::bail!("AGENTD_ACCEL={other}: it may be kvm or tcg"),
        Err(_) => {}
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(choice(Accelerator::Tcg, &format!("/dev/kvm: {error}")));
    }
    let host_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!("{} {}", host_boot.trim(), kernel.image.display());
    let memory = cache.path("kvm-probe");
    if let Ok(text) = std::fs::read_to_string(&memory)
        && let Some((found, why)) = remembered(&text, &key)
    {
        return Ok(choice(found, why));
    }
    let found = probe(kernel)?;
    let word = if found.accelerator == Accelerator::Kvm { "kvm" } else { "tcg" };
    std::fs::write(&memory, format!("{key}\n{word}\n{}\n", found.why))?;
    Ok(found)
}

fn probe(kernel: &Kernel) -> Result<Choice> {
    let boot = Boot::Direct {
        kernel: kernel.image.clone(),
        command_line: "console=ttyS0 panic=-1".to_owned(),
        initrd: None,
    };
    let mut guest = Machine { memory_mib: 256, ..Machine::new(Accelerator::Kvm, boot) }.start(None)?;
    let deadline = Instant::now() + PROBE_LIMIT;
    while Instant::now() < deadline {
        if let Ok(heard) = guest.wait_for(BOOTED, PROBE_LOOK) {
            let seconds = heard.after.as_secs_f64();
            return Ok(choice(Accelerator::Kvm, &format!("a test guest booted in {seconds:.1} s")));
        }
        // A processor that KVM could not run is told here at once, and on the serial line never.
        let status = guest.qmp("query-status", serde_json::Value::Null).unwrap_or_default();
        if status["status"] != "running" {
            break;
        }
    }
    Ok(choice(Accelerator::Tcg, "KVM is there but did not boot a test guest"))
}

fn remembered<'a>(text: &'a str, key: &str) -> Option<(Accelerator, &'a str)> {
    let mut lines = text.lines();
    if lines.next()? != key {
        return None;
    }
    let accelerator = match lines.next()? {
        "kvm" => Accelerator::Kvm,
        "tcg" => Accelerator::Tcg,
        _ => return None,
    };
    Some((accelerator, lines.next()?))
}

fn choice(accelerator: Accelerator, why: &str) -> Choice {
    Choice { accelerator, why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_counts_for_the_same_host_boot_and_kernel_only() {
        let text = "boot-1 /k/1\ntcg\nno luck\n";
        assert_eq!(remembered(text, "boot-1 /k/1"), Some((Accelerator::Tcg, "no luck")));
        assert_eq!(remembered(text, "boot-2 /k/1"), None);
        assert_eq!(remembered("boot-1 /k/1\nmaybe\n", "boot-1 /k/1"), None);
        assert_eq!(remembered("", "boot-1 /k/1"), None);
    }
}
