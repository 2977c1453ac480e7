//! How soon does the sign-in page answer, and where does the time go?
//!
//! Times count from the start of the kernel: the guest's own clock at the first answer, which is its uptime when
//! asked less the time since the answer. The same for the Debian peer, in the same run, one boot of each in turn.

use crate::debian;
use crate::report::{Bench, Row, machine};
use agentd_domain::api::ApplianceStatus;
use anyhow::{Context, Result, bail};
use image::qemu::{Accelerator, Running};
use std::process::Command;
use std::time::{Duration, Instant};
use tests_qemu::{Appliance, BOOT, Start, setup};

/// How often the page is asked for. Small beside the seconds that are measured.
const ASK_EVERY: Duration = Duration::from_millis(25);

pub struct Answered {
    pub at: Instant,
}

/// One request; the body of a good answer.
pub fn ask(url: &str) -> Result<String> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--insecure", "--max-time", "2", url])
        .output()
        .context("cannot start curl: apt-get install curl")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks until the first good answer.
pub fn first_answer(url: &str, guest: &mut Running) -> Result<Answered> {
    let deadline = Instant::now() + BOOT;
    loop {
        match ask(url) {
            Ok(_) => return Ok(Answered { at: Instant::now() }),
            Err(error) if Instant::now() >= deadline => return Err(error.context(guest.scene())),
            Err(_) => std::thread::sleep(ASK_EVERY),
        }
    }
}

/// One boot of ours.
struct Ours {
    page_ms: f64,
    milestones: Vec<(String, u64)>,
    /// From the start of QEMU to the start of the kernel.
    firmware_ms: f64,
}

fn one(appliance: &mut Appliance, start: &Start) -> Result<Ours> {
    appliance.boot(start)?;
    let switched_on = appliance.guest()?.started();
    let url = format!("{}/login", appliance.ctl().host());
    let Answered { at } = first_answer(&url, appliance.guest()?)?;
    appliance.login()?;
    appliance.until("the first agent runs", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        Ok(status.milestones.iter().any(|(name, _)| name.contains("agent running")).then_some(()))
    })?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    let asked = Instant::now();
    let uptime_ms = status.uptime_ms as f64;
    let page_ms = uptime_ms - millis(asked.duration_since(at));
    let firmware_ms = millis(asked.duration_since(switched_on)) - uptime_ms;
    appliance.power_off()?;
    Ok(Ours { page_ms, milestones: status.milestones, firmware_ms })
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// `runs` boots of each kind.
pub fn measure(runs: usize, peer: bool) -> Result<Bench> {
    let setup = setup();
    let mut rows = Vec::new();

    let mut direct = Appliance::new()?;
    direct.boot(&Start::default())?;
    let started = direct.guest()?.started();
    let url = format!("{}/claim", direct.ctl().host());
    let first = first_answer(&url, direct.guest()?)?;
    rows.push(Row::new(
        "first boot of a new disk, direct: from power to the claim page",
        millis(first.at - started),
        "ms",
    ));
    direct.claim()?;
    direct.power_off()?;

    let mut debian_disk = None;
    if peer {
        let peer = debian::ensure_peer(&setup.cache, &setup.built.checkout.root)?;
        let disk = direct.file("debian.img");
        peer.disk(&disk)?;
        // Its own first boot sets things up too; it is not counted.
        peer.boot(setup.accelerator, &disk, tests_qemu::free_port()?)?;
        debian_disk = Some((peer, disk));
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(one(&mut direct, &Start::default())?);
        if let Some((peer, disk)) = &debian_disk {
            theirs.push(peer.boot(setup.accelerator, disk, tests_qemu::free_port()?)?);
        }
    }
    stages(&mut rows, "direct", &ours);
    if !theirs.is_empty() {
        let pages: Vec<f64> = ours.iter().map(|boot| boot.page_ms).collect();
        let ratios: Vec<f64> = theirs.iter().zip(&pages).map(|(their, our)| their / our).collect();
        rows.push(Row::median("minimal Debian, direct: first HTTP answer", &theirs, "ms"));
        let mut ratio =
            Row::median("Debian's first HTTP answer over our first HTTPS answer", &ratios, "x").at_least(5.0);
        ratio.spread = format!("{} pairs", ratios.len());
        rows.push(ratio);
    }

    let mut uefi = Appliance::new()?;
    uefi.boot(&Start { uefi: true, ..Start::default() })?;
    uefi.claim()?;
    uefi.power_off()?;
    let booted: Vec<Ours> = (0..runs)
        .map(|_| one(&mut uefi, &Start { uefi: true, ..Start::default() }))
        .collect::<Result<_>>()?;
    stages(&mut rows, "UEFI", &booted);

    let accelerator = if setup.accelerator == Accelerator::Kvm { "KVM" } else { "TCG (emulated)" };
    Ok(Bench {
        name: "boot".to_owned(),
        command: "scripts/bench boot".to_owned(),
        commit: setup.built.checkout.version.clone(),
        machine: machine(accelerator),
        rows,
    })
}

fn stages(rows: &mut Vec<Row>, kind: &str, boots: &[Ours]) {
    let firmware: Vec<f64> = boots.iter().map(|boot| boot.firmware_ms).collect();
    rows.push(Row::median(format!("{kind}: firmware and loader, before the kernel"), &firmware, "ms"));
    let names = boots.first().map(|boot| boot.milestones.clone()).unwrap_or_default();
    for (name, _) in names {
        let times: Vec<f64> = boots
            .iter()
            .filter_map(|boot| boot.milestones.iter().find(|(other, _)| *other == name))
            .map(|(_, ms)| *ms as f64)
            .collect();
        rows.push(Row::median(format!("{kind}: {name}"), &times, "ms"));
    }
    let pages: Vec<f64> = boots.iter().map(|boot| boot.page_ms).collect();
    rows.push(Row::median(format!("{kind}: sign-in page served"), &pages, "ms"));
}
