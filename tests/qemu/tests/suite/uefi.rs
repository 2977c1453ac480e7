//! The same build through firmware, boot loader and boot item, and a root that was damaged.

use agentd_domain::api::ApplianceStatus;
use agentd_domain::initctl::Health;
use agentd_domain::marker;
use anyhow::{Context, Result, ensure};
use image::layout;
use tests_qemu::{Appliance, BOOT, Start, patch};

#[test]
fn the_disk_boots_by_itself_and_knows_its_slot() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { uefi: true, ..Start::default() })?;
    appliance.claim()?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    ensure!(status.slot == "a", "slot is {}", status.slot);
    let serial = appliance.power_off()?;
    ensure!(serial.contains("reached power off"), "no orderly end: {serial}");

    // The second start finds what the first one made: the owner, the agents, the identity.
    appliance.boot(&Start { uefi: true, ..Start::default() })?;
    appliance.login()?;
    appliance.until("health is green again", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        Ok((status.health == Health::Green && status.slot == "a").then_some(()))
    })?;
    let serial = appliance.guest()?.serial_text();
    ensure!(!serial.contains("claim code"), "it has no owner any more: {serial}");
    Ok(())
}

#[test]
fn a_damaged_block_that_is_read_is_detected() -> Result<()> {
    let mut appliance = Appliance::new()?;
    let root = layout::partition(marker::PARTITION_ROOT_A).context("no root partition")?;
    // The superblock of erofs lies 1024 bytes in and is read first; a bit of its padding is flipped.
    patch(&appliance.disk(), root.start_bytes + 100, &[0xff])?;
    appliance.boot(&Start::default())?;
    let heard = appliance.guest()?.wait_for("is corrupted", BOOT)?;
    ensure!(heard.line.contains("device-mapper: verity"), "{}", heard.line);
    let serial = appliance.guest()?.serial_text();
    ensure!(!serial.contains("claim code"), "it went on: {serial}");
    Ok(())
}
