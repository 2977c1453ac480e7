//! How soon does the sign-in page answer, and where does the time go?
//!
//! Times count from the start of the kernel, but for the firmware's, which ends there. What the guest notes itself
//! (init's steps, agentd's first word, the first agent's start) it notes by its own boot clock; the pages are seen
//! from outside, by our clock, and [`kernel_start`] says how the two belong together. The same for the Debian peer,
//! in the same run, one boot of each in turn.

use crate::debian;
use crate::report::result;
use agentd_domain::api::{Agent, ApplianceStatus, Liveness};
use agentd_domain::initctl::Health;
use anyhow::{Context, Result, bail};
use image::qemu::Running;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tests_qemu::{Appliance, BOOT, Capture, Ctl, Start, Traffic, setup};
use tests_tidy::promises::{Bench, Row};

/// How often the page is asked for. Small beside the seconds that are measured.
const ASK_EVERY: Duration = Duration::from_millis(25);
/// How often it is tried whether the guest has its address.
const KNOCK_EVERY: Duration = Duration::from_millis(20);

/// Signing in costs the guest a second of hashing, so it waits until the boot is surely over.
const SETTLE: Duration = Duration::from_secs(20);

/// How often the guest's clock is asked for to fit it to ours.
const CLOCK_ASKS: usize = 5;

/// What init notes, under which name it is told here, in order. init/src/boot.rs and init/src/status.rs have the
/// names on the left.
const STAGES: [(&str, &str); 3] = [
    ("init", "kernel done, init begins"),
    ("boot done", "init has done its steps"),
    ("agentd ready", "agentd reports to init"),
];

/// One request for each address, over one connection; the bodies one after another.
pub fn ask(urls: &[&str]) -> Result<String> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--insecure", "--max-time", "10"])
        .args(urls)
        .output()
        .context("cannot start curl: apt-get install curl")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks until the answer is one that counts; when it came. The first question waits until the guest has its address:
/// QEMU takes a connection for the guest whether or not it is there, and repeats a lost first packet only after six
/// seconds, which would be measured instead. One question at a time, because each costs the guest something.
pub fn first_answer(
    urls: &[&str],
    guest: &mut Running,
    uplink: &Path,
    counts: impl Fn(&str) -> bool,
) -> Result<Instant> {
    let deadline = Instant::now() + BOOT;
    wait_for_address(guest, uplink, deadline)?;
    loop {
        let last = match ask(urls) {
            Ok(answer) if counts(&answer) => return Ok(Instant::now()),
            Ok(answer) => answer,
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            bail!("no answer that counts from {urls:?}, the last was {last:?}; {}", guest.scene());
        }
        std::thread::sleep(ASK_EVERY);
    }
}

/// Knocks at a port where nobody listens, until the guest's kernel says so (ICMP).
fn wait_for_address(guest: &mut Running, uplink: &Path, deadline: Instant) -> Result<()> {
    const DISCARD: u16 = 9;
    let knocker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let command = format!("hostfwd_add uplink udp:127.0.0.1:{port}-:{DISCARD}");
    let arguments = serde_json::json!({ "command-line": command });
    // QEMU itself needs a moment before it listens.
    while let Err(error) = guest.qmp("human-monitor-command", arguments.clone()) {
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(KNOCK_EVERY);
    }
    let answered = |(_, traffic): &(Duration, Traffic)| matches!(traffic, Traffic::Other(what) if what.starts_with("protocol Some(1) "));
    while !Capture::read(uplink).is_ok_and(|seen| seen.frames.iter().any(answered)) {
        if Instant::now() >= deadline {
            bail!("the guest has no address; {}", guest.scene());
        }
        // QEMU may close the port on an error that it was told.
        knocker.send_to(b"knock", (Ipv4Addr::LOCALHOST, port)).ok();
        std::thread::sleep(KNOCK_EVERY);
    }
    Ok(())
}

/// A page that asks for a password, from an agentd that has heard from its launcher: before that its health is red.
fn page_of_a_ready_agentd(answer: &str) -> bool {
    let mut health = serde_json::Deserializer::from_str(answer).into_iter::<Liveness>();
    let ready = matches!(health.next(), Some(Ok(Liveness { health })) if health != Health::Red);
    ready && answer.contains("name=\"password\"")
}

/// Milliseconds from `origin` to the start of the guest's kernel. Each ask gives an earliest and a latest moment;
/// the middle of what all allow is off by half of what is left.
pub fn kernel_start(origin: Instant, mut uptime_ms: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut asks = Vec::new();
    for _ in 0..CLOCK_ASKS {
        let before = millis(origin.elapsed());
        let uptime = uptime_ms()?;
        asks.push((before - uptime, millis(origin.elapsed()) - uptime));
    }
    Ok(middle(&asks))
}

fn middle(asks: &[(f64, f64)]) -> f64 {
    let earliest = asks.iter().map(|ask| ask.0).fold(f64::NEG_INFINITY, f64::max);
    let latest = asks.iter().map(|ask| ask.1).fold(f64::INFINITY, f64::min);
    f64::midpoint(earliest, latest)
}

/// One boot of ours.
struct Ours {
    /// From the start of QEMU to the start of the kernel.
    firmware_ms: f64,
    page_ms: f64,
    agent_ms: f64,
    milestones: Vec<(String, u64)>,
}

fn one(appliance: &mut Appliance, start: &Start) -> Result<Ours> {
    appliance.boot(start)?;
    let switched_on = appliance.guest()?.started();
    let at = page(appliance, "sign-in")?;
    std::thread::sleep(SETTLE);
    appliance.login()?;
    let agent_ms = appliance.until("the first agent runs", BOOT, first_agent_ms)?;
    let ctl = appliance.ctl();
    let status = || -> Result<ApplianceStatus> { ctl.json(&["status"]) };
    let firmware_ms = kernel_start(switched_on, || Ok(status()?.uptime_ms as f64))?;
    let milestones = status()?.milestones;
    appliance.power_off()?;
    Ok(Ours { firmware_ms, page_ms: millis(at - switched_on) - firmware_ms, agent_ms, milestones })
}

fn page(appliance: &mut Appliance, name: &str) -> Result<Instant> {
    let host = appliance.ctl().host().to_owned();
    let (health, page) = (format!("{host}/healthz"), format!("{host}/{name}"));
    let uplink = appliance.capture_file();
    first_answer(&[&health, &page], appliance.guest()?, &uplink, page_of_a_ready_agentd)
}

fn first_agent_ms(ctl: &Ctl) -> Result<Option<f64>> {
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    let untouched = agents.iter().filter(|agent| agent.restarts == 0);
    let started = untouched.filter_map(|agent| agent.run.as_ref()).map(|run| run.started_boot_ms).min();
    Ok(started.map(|ms| ms as f64))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// `runs` boots of each kind.
pub fn measure(runs: usize, peer: bool) -> Result<Bench> {
    let setup = setup();
    let mut rows = Vec::new();

    let mut direct = Appliance::new()?;
    direct.boot(&Start { capture: true, ..Start::default() })?;
    let started = direct.guest()?.started();
    let first = page(&mut direct, "claim")?;
    rows.push(Row::new(
        "first boot of a new disk, direct: from power to the claim page",
        millis(first - started),
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
        ours.push(one(&mut direct, &Start { capture: true, ..Start::default() })?);
        if let Some((peer, disk)) = &debian_disk {
            theirs.push(peer.boot(setup.accelerator, disk, tests_qemu::free_port()?)?);
        }
    }
    if !theirs.is_empty() {
        let ratios: Vec<f64> = theirs.iter().zip(&ours).map(|(their, our)| their / our.page_ms).collect();
        let what = "kernel to first page, direct: a minimal Debian's HTTP over our HTTPS";
        rows.push(Row::median(what, &ratios, "x")?.at_least(5.0));
        rows.push(Row::median("minimal Debian, direct: first HTTP answer", &theirs, "ms")?);
    }
    stages(&mut rows, "direct", &ours)?;

    let mut uefi = Appliance::new()?;
    uefi.boot(&Start { uefi: true, ..Start::default() })?;
    uefi.claim()?;
    uefi.power_off()?;
    let booted: Vec<Ours> = (0..runs)
        .map(|_| one(&mut uefi, &Start { uefi: true, capture: true, ..Start::default() }))
        .collect::<Result<_>>()?;
    stages(&mut rows, "UEFI", &booted)?;
    Ok(result("boot", rows))
}

fn stages(rows: &mut Vec<Row>, kind: &str, boots: &[Ours]) -> Result<()> {
    let tell = |what: &str, value: &dyn Fn(&Ours) -> Option<f64>| -> Result<Row> {
        let times: Option<Vec<f64>> = boots.iter().map(value).collect();
        let times = times.with_context(|| format!("{kind}: not every boot noted {what:?}"))?;
        Row::median(format!("{kind}: {what}"), &times, "ms")
    };
    let mut told =
        vec![tell("firmware and loader, until the kernel begins", &|boot| Some(boot.firmware_ms))?];
    for (milestone, what) in STAGES {
        told.push(tell(what, &|boot| at(boot, milestone))?);
    }
    told.push(tell("sign-in page served by a ready agentd", &|boot| Some(boot.page_ms))?);
    told.push(tell("first agent running", &|boot| Some(boot.agent_ms))?);
    let first = boots.first().map(|boot| boot.milestones.as_slice()).unwrap_or_default();
    for (name, _) in first.iter().filter(|(name, _)| STAGES.iter().all(|stage| stage.0 != name)) {
        // A step that only some boots have is no stage.
        if let Ok(row) = tell(&format!("step `{name}` ends"), &|boot| at(boot, name)) {
            told.push(row.detail());
        }
    }
    rows.extend(told);
    Ok(())
}

fn at(boot: &Ours, milestone: &str) -> Option<f64> {
    boot.milestones.iter().find(|(name, _)| name == milestone).map(|(_, ms)| *ms as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_counts_when_agentd_is_ready() {
        let page = "<!DOCTYPE html><form><input type=\"password\" name=\"password\"></form>";
        for (health, counts) in [("green", true), ("yellow", true), ("red", false)] {
            let answer = format!("{{\"health\":\"{health}\"}}{page}");
            assert_eq!(page_of_a_ready_agentd(&answer), counts, "{health}");
        }
        for answer in [page, "", "{\"health\":\"green\"}", "{\"health\":\"green\"}<!DOCTYPE html>"] {
            assert!(!page_of_a_ready_agentd(answer), "{answer:?}");
        }
    }

    #[test]
    fn two_clocks_are_fitted_by_what_every_ask_allows() {
        assert_eq!(middle(&[(900.0, 1300.0), (950.0, 1050.0), (700.0, 1010.0)]), 980.0);
    }

    fn boot(milestones: &[(&str, u64)]) -> Ours {
        let milestones = milestones.iter().map(|(name, ms)| ((*name).to_owned(), *ms)).collect();
        Ours { firmware_ms: 100.0, page_ms: 900.0, agent_ms: 950.0, milestones }
    }

    #[test]
    fn stages_are_told_in_order_and_steps_are_details() {
        let noted = [("init", 300), ("state", 350), ("boot done", 500), ("agentd ready", 800)];
        let mut rows = Vec::new();
        stages(&mut rows, "direct", &[boot(&noted), boot(&noted)]).unwrap();
        let times: Vec<f64> = rows.iter().filter(|row| !row.detail).map(|row| row.value).collect();
        assert_eq!(times, [100.0, 300.0, 500.0, 800.0, 900.0, 950.0]);
        assert_eq!(rows.last().map(|row| row.what.as_str()), Some("direct: step `state` ends"));
        assert!(rows.last().is_some_and(|row| row.detail));
        let missing = stages(&mut Vec::new(), "direct", &[boot(&noted), boot(&[("init", 300)])]);
        assert!(missing.unwrap_err().to_string().contains("init has done its steps"));
    }
}
