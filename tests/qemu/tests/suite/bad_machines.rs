//! Machines that are not as they should be: the owner is never locked out, and nothing of theirs is overwritten.

use agentd_domain::api::{Agent, ApplianceStatus};
use agentd_domain::initctl::Health;
use agentd_domain::{marker, paths};
use anyhow::{Context, Result, ensure};
use image::disk::{ImageGuids, write_table};
use image::layout;
use std::process::Command;
use tests_qemu::{Appliance, BOOT, PASSWORD, Start, patch};

/// ext4's magic number lies 56 bytes into the superblock, which is 1024 bytes in.
const EXT4_MAGIC_AT: u64 = 1024 + 56;

#[test]
fn foreign_data_and_a_clock_far_ahead_leave_a_console_that_says_so() -> Result<()> {
    let mut appliance = Appliance::new()?;
    let data = layout::partition(marker::PARTITION_DATA).context("no data partition")?;
    let foreign = b"somebody else's file system, not to be touched".repeat(50);
    patch(&appliance.disk(), data.start_bytes, &foreign)?;
    appliance.boot(&Start {
        rtc_base: "2099-01-01T00:00:00".to_owned(),
        memory_mib: 512,
        ..Start::default()
    })?;
    appliance.claim()?;
    let status = appliance.until("health is red and names the data partition", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let named = status.problems.iter().any(|problem| problem.what.contains("data"));
        Ok((status.health == Health::Red && named).then_some(status))
    })?;
    ensure!(year(status.now_unix_ms) < 2090, "the clock of 2099 was believed: {}", status.now_unix_ms);
    let agents: Vec<Agent> = appliance.ctl().json(&["agent", "ls"]).unwrap_or_default();
    ensure!(agents.iter().all(|agent| agent.run.is_none()), "{agents:?}");
    appliance.power_off()?;
    let after = tests_qemu::read(&appliance.disk(), data.start_bytes, foreign.len())?;
    ensure!(after == foreign, "foreign data was overwritten");
    Ok(())
}

#[test]
fn three_mistakes_in_the_configuration_are_three_problems_at_once() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { rtc_base: "1970-01-01T00:00:00".to_owned(), ..Start::default() })?;
    appliance.claim()?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    ensure!(year(status.now_unix_ms) >= 2026, "the clock of 1970 was believed: {}", status.now_unix_ms);
    appliance.power_off()?;

    let wrong = "[network]\nmode = \"carrier pigeon\"\n\n[console]\nport = 70000\n\n[time]\nservers = 7\n";
    write_config(&appliance, wrong)?;
    appliance.boot(&Start::default())?;
    appliance.login()?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    for key in ["network.mode", "console.port", "time.servers"] {
        let named = status.problems.iter().any(|problem| format!("{problem}").contains(key));
        ensure!(named, "{key} is not among {:?}", status.problems);
    }
    // The safe defaults are in force: it was reached over DHCP at the usual port.
    ensure!(!status.addresses.is_empty(), "{status:?}");
    Ok(())
}

#[test]
fn twenty_wrong_claim_codes_open_nothing() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    let code = appliance.said("claim code: ")?;
    let fingerprint = appliance.said("fingerprint: ")?;
    let mut slowed = 0;
    for attempt in 0..20 {
        let wrong = format!("AAAA-AAAA-{attempt:04}");
        ensure!(wrong != code);
        let answer = appliance.ctl().input(
            &["claim", "--code", &wrong, "--fingerprint", &fingerprint, "--password-stdin", "--json"],
            &format!("{PASSWORD}\n"),
        )?;
        if answer.report()?.http_status() == 429 {
            slowed += 1;
        }
    }
    ensure!(slowed >= 10, "only {slowed} of twenty were slowed down");
    // The owner, with the right code, gets in once the wait is over.
    appliance.until("the right code still works", BOOT, |ctl| {
        let answer = ctl.input(
            &["claim", "--code", &code, "--fingerprint", &fingerprint, "--password-stdin"],
            &format!("{PASSWORD}\n"),
        )?;
        answer.success().map(Some)
    })?;
    Ok(())
}

#[test]
fn a_disk_that_is_too_small_is_named() -> Result<()> {
    let mut appliance = Appliance::new()?;
    // A table that fits a disk which ends a megabyte behind the data partition's first 64.
    let data = layout::partition(marker::PARTITION_DATA).context("no data partition")?;
    let bytes = data.start_bytes + data.size_bytes + layout::MIB;
    let about = &tests_qemu::setup().built.root.about;
    let guids = ImageGuids { version: &about.version, root_hash: &about.root_hash };
    let mut disk = std::fs::OpenOptions::new().read(true).write(true).open(appliance.disk())?;
    disk.set_len(bytes)?;
    write_table(&mut disk, bytes, &guids)?;
    drop(disk);
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    appliance.until("the small disk is named", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let named = status
            .problems
            .iter()
            .any(|problem| format!("{problem}").contains("small") || format!("{problem}").contains("disk"));
        Ok((status.health == Health::Red && named).then_some(()))
    })
}

fn year(unix_ms: i64) -> i64 {
    1970 + unix_ms / (365_2425 * 24 * 3600 / 10)
}

/// Writes `agentd.toml` on the state partition from outside, as two intact copies.
fn write_config(appliance: &Appliance, text: &str) -> Result<()> {
    let state = layout::partition(marker::PARTITION_STATE).context("no state partition")?;
    let magic = tests_qemu::read(&appliance.disk(), state.start_bytes + EXT4_MAGIC_AT, 2)?;
    ensure!(magic == [0x53, 0xef], "the state partition was not formatted");
    let name = paths::CONFIG.rsplit('/').next().context("name")?;
    let staged = appliance.file(name);
    init_sys::twofile::TwoFile::new(&staged).write(text.as_bytes())?;
    for copy in ["a", "b"] {
        let from = appliance.file(&format!("{name}.{copy}"));
        if !from.exists() {
            continue;
        }
        let device = format!("{}?offset={}", appliance.disk().display(), state.start_bytes);
        // debugfs prints its errors and succeeds, so the result is read back.
        for request in [format!("rm {name}.{copy}"), format!("write {} {name}.{copy}", from.display())] {
            Command::new("/usr/sbin/debugfs").args(["-w", "-R", &request, &device]).output()?;
        }
        let read = Command::new("/usr/sbin/debugfs")
            .args(["-R", &format!("cat {name}.{copy}"), &device])
            .output()?;
        ensure!(read.stdout == std::fs::read(&from)?, "debugfs did not write {name}.{copy}: {read:?}");
    }
    Ok(())
}
