//! The peer of the boot benchmark: a minimal Debian that serves a page, made by `tests/bench/debian-peer.sh`.

use crate::boot::{ask, first_answer, kernel_start};
use anyhow::{Context, Result, ensure};
use image::cache::{Cache, sha256_file};
use image::qemu::{self, Accelerator, Boot, Drive, Machine, Network};
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Peer {
    folder: PathBuf,
}

/// Builds it when it is missing; needs root and a few minutes.
pub fn ensure_peer(cache: &Cache, checkout: &Path) -> Result<Peer> {
    let script = checkout.join("tests/bench/debian-peer.sh");
    // Another script makes another peer.
    let digest = sha256_file(&script)?;
    let folder = cache.path(&format!("debian-peer-{}", &digest[..16]));
    let status = Command::new("bash").arg(script).arg(&folder).status().context("cannot start bash")?;
    ensure!(status.success(), "the Debian peer was not built");
    Ok(Peer { folder })
}

impl Peer {
    /// A disk that has been booted before, as ours has when it is measured.
    pub fn disk(&self, to: &Path) -> Result<()> {
        qemu::copy_disk(&self.folder.join("disk.img"), to)
    }

    /// Boots it once and returns when its page came, in milliseconds since its kernel started.
    pub fn boot(&self, accelerator: Accelerator, disk: &Path, port: u16) -> Result<f64> {
        let boot = Boot::Direct {
            kernel: self.folder.join("vmlinuz"),
            command_line: "root=/dev/vda ro quiet console=ttyS0".to_owned(),
            initrd: Some(self.folder.join("initrd.img")),
        };
        let uplink = disk.with_extension("pcap");
        let machine = Machine {
            memory_mib: 1024,
            cpus: 2,
            drives: vec![Drive::raw(disk)],
            network: Some(Network {
                forwards: vec![(port, 80)],
                capture: Some(uplink.clone()),
                ..Network::default()
            }),
            ..Machine::new(accelerator, boot)
        };
        // An earlier boot's lease is not this one's.
        std::fs::remove_file(&uplink).ok();
        let mut guest = machine.start(None)?;
        let switched_on = guest.started();
        let (page, clock) =
            (format!("http://127.0.0.1:{port}/"), format!("http://127.0.0.1:{port}/cgi-bin/uptime"));
        let at = first_answer(&[&page], &mut guest, &uplink, |_| true)?;
        // Served by a program of the page's own server, so it needs nothing else in the guest.
        let kernel_ms = kernel_start(switched_on, || {
            let text = ask(&[&clock])?;
            let seconds: f64 = text.split_whitespace().next().context("no uptime")?.parse()?;
            Ok(seconds * 1000.0)
        })?;
        // It has no program that would hear the power button. The answer may be lost with the machine.
        ask(&[&format!("http://127.0.0.1:{port}/cgi-bin/off")]).ok();
        guest.wait_exit(tests_qemu::BOOT)?;
        Ok((at - switched_on).as_secs_f64() * 1000.0 - kernel_ms)
    }
}
