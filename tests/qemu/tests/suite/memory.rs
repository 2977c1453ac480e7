//! An agent writes to all tiers, the plug is pulled, and all of it is there; its owner finds it, puts it right and
//! forgets it with `agentctl`.

use crate::packages;
use agentd_domain::agent_api::Recalled;
use agentd_domain::api::LogLine;
use agentd_domain::memory_api::{History, Journal, Records};
use anyhow::{Context, Result, ensure};
use tests_qemu::{Appliance, BOOT, Ctl, Start};

#[test]
fn every_tier_survives_the_plug_and_the_owner_puts_it_right() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    let folder = packages::keeper(&appliance.file("packages"))?;
    let ctl = appliance.ctl();
    ctl.run(&["knowledge", "set", "house", "--bytes", "8M"])?.success()?;
    ctl.run(&["agent", "install", folder.to_str().context("path")?])?.success()?;
    ctl.run(&["agent", "start", "keeper"])?.success()?;
    let ungranted = ctl.run(&["knowledge", "ls"])?.success()?;
    ensure!(ungranted.contains("nobody"), "{ungranted}");
    ctl.run(&["knowledge", "grant", "house", "keeper", "--write"])?.success()?;
    let first = appliance.until("the keeper has looked", BOOT, looked)?;
    all_is_there(&first)?;
    ensure!(first.contains("written 200"), "{first}");

    appliance.power_off_hard()?;
    appliance.boot(&Start::default())?;
    appliance.login()?;
    let second = appliance.until("the keeper has looked again", BOOT, looked)?;
    all_is_there(&second)?;
    ensure!(!second.contains("written"), "it told all of it once more: {second}");
    the_owner_puts_it_right(&appliance.ctl())?;
    appliance.power_off()?;
    Ok(())
}

/// What the run that lives has said, once it has looked.
fn looked(ctl: &Ctl) -> Result<Option<String>> {
    let log = ctl.run(&["agent", "logs", "keeper", "--json"])?.success()?;
    let lines: Vec<LogLine> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let begun =
        lines.iter().rposition(|line| line.text.ends_with("is served") || line.text.contains("is served, "));
    let Some(begun) = begun else { return Ok(None) };
    let said: String = lines[begun..].iter().map(|line| format!("{}\n", line.text)).collect();
    Ok(said.contains("the keeper has looked").then_some(said))
}

fn all_is_there(log: &str) -> Result<()> {
    for (name, words) in [
        ("log 200", "The keeper came to the house."),
        ("prompt 200", "look after the house"),
        ("spirit 200", "The attic key hangs behind the clock."),
        ("knowledge 200", "Mrs. Brandt"),
    ] {
        ensure!(log.lines().any(|line| line.contains(name) && line.contains(words)), "{name}: {log}");
    }
    Ok(())
}

fn the_owner_puts_it_right(ctl: &Ctl) -> Result<()> {
    let search = |words: &str| -> Result<Recalled> {
        ctl.json(&["memory", "search", "keeper", words, "--tier", "spirit"])
    };
    let found = search("attic key")?;
    let hit = found.hits.first().context("nothing was found")?;
    ensure!(hit.text.contains("behind the clock") && hit.explain.is_some(), "{found:?}");
    let id = hit.id.to_string();
    let new =
        ctl.run(&["memory", "correct", "keeper", &id, "The attic key hangs in the cellar."])?.success()?;
    let new = new.trim();
    ensure!(search("attic key")?.hits[0].text.contains("in the cellar"), "the old one is still found");
    let history: History = ctl.json(&["memory", "show", "keeper", &id])?;
    ensure!(history.chain.len() == 2 && history.deeds[0].why == "corrected", "{history:?}");
    ctl.run(&["memory", "pin", "keeper", new])?.success()?;
    ctl.run(&["memory", "forget", "keeper", new])?.success()?;
    ensure!(search("attic key")?.hits.is_empty(), "what is forgotten is found");
    let forgotten: Records = ctl.json(&["memory", "ls", "keeper", "--state", "forgotten"])?;
    ensure!(forgotten.records.len() == 1, "{forgotten:?}");
    ctl.run(&["memory", "restore", "keeper", new])?.success()?;
    ensure!(search("attic key")?.hits.len() == 1, "what was restored is not found");
    ctl.run(&["memory", "purge", "keeper", new])?.success()?;
    let journal: Journal = ctl.json(&["memory", "journal", "keeper"])?;
    ensure!(journal.deeds[0].deed == "purged", "{journal:?}");
    ensure!(ctl.refused(&["memory", "restore", "keeper", new])?.code == "not_found");
    let doctor = ctl.run(&["memory", "doctor", "keeper"])?.success()?;
    ensure!(doctor.contains("keeper: whole"), "{doctor}");
    let audit = ctl.run(&["audit", "ls", "--agent", "keeper"])?.success()?;
    for action in ["memory.search", "memory.correct", "memory.purge", "memory.check"] {
        ensure!(audit.contains(action), "{action}: {audit}");
    }
    ensure!(
        !audit.contains("attic") && !audit.contains("cellar"),
        "words of a memory are in the audit log: {audit}"
    );
    Ok(())
}
