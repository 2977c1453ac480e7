//! What does an agent cost that waits, and how fast do many stand still?
//!
//! Twice. Without agentd, in the guest of `scripts/bench spawn`: what a run costs by itself, when a thousand are started
//! by the launcher's protocol, and how long it takes to freeze half of them. And with the real image in 4 GiB: a
//! thousand agents, installed and started through the management API, each holding a request to agentd.
//! Memory is what the whole machine has left before and after.

use crate::report::result;
use crate::spawn::Scene;
use agentd_domain::api::{Agent, ApplianceStatus};
use anyhow::{Context, Result, ensure};
use image::qemu::Accelerator;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests_qemu::{Appliance, BOOT, Ctl, Start, setup};
use tests_tidy::promises::{Bench, Row};

const MIB: f64 = 1024.0 * 1024.0;
/// What is promised for a thousand agents.
const MEMORY_MIB: u32 = 4096;
/// By then the last agents have asked, and what their start needed is given back.
const SETTLE: Duration = Duration::from_secs(60);
/// One installation or start under emulation on a machine that does much else.
const EACH: Duration = Duration::from_secs(5);

pub fn measure(agents: usize) -> Result<Bench> {
    let mut rows = alone(agents)?;
    rows.extend(with_agentd(agents)?);
    Ok(result("idle", rows))
}

fn alone(agents: usize) -> Result<Vec<Row>> {
    let frozen = agents / 2;
    let arguments = format!("--idle {agents},{frozen}");
    let within = BOOT + EACH * u32::try_from(agents)?;
    let said = Scene::prepare()?.guest(&arguments, MEMORY_MIB, within)?;
    let lines = said.lines().filter_map(|line| line.split_once("idle: ")).map(|(_, rest)| rest.trim());
    let told: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let [memory, freezing] = told.as_slice() else { anyhow::bail!("the driver told something else: {said}") };
    told_rows(agents, memory, freezing, setup().accelerator)
}

fn told_rows(agents: usize, memory: &Value, freezing: &Value, accelerator: Accelerator) -> Result<Vec<Row>> {
    let number = |value: &Value| value.as_f64().with_context(|| format!("no number: {memory} {freezing}"));
    let kinds = memory["kib_each"].as_object().context("no kinds of memory")?;
    // What the driver took stands for agentd's part.
    let left = -number(&memory["kib_each"]["MemAvailable"])?;
    let whole = left - number(&memory["own_kib_each"])?;
    let what = format!("memory of an idle agent, kernel, jail and its process, of {agents}");
    let mut rows = vec![Row::new(what, whole / 1024.0, "MiB").at_most(1.0)];
    for (kind, kib) in kinds {
        rows.push(Row::new(format!("of that, growth of {kind}"), number(kib)?, "KiB").detail());
    }
    for which in ["jail", "agent"] {
        let own = number(&memory["processes_kib"][which]["RssAnon"])?;
        rows.push(
            Row::new(format!("of that, pages of its own of the {which}'s process"), own, "KiB").detail(),
        );
    }
    let frozen = number(&freezing["frozen"])?;
    let freeze = Row::new(
        format!("{frozen} agents ordered to freeze and standing still"),
        number(&freezing["stood_ms"])?,
        "ms",
    );
    // Under emulation the time says nothing of hardware, so no goal is set on it there.
    rows.push(if accelerator == Accelerator::Kvm { freeze.at_most(1000.0) } else { freeze });
    Ok(rows)
}

fn with_agentd(agents: usize) -> Result<Vec<Row>> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { memory_mib: MEMORY_MIB, ..Start::default() })?;
    appliance.claim()?;
    appliance.until("the first agent runs", BOOT, |ctl| Ok((running(ctl)? > 0).then_some(())))?;
    std::thread::sleep(SETTLE);
    let before: ApplianceStatus = appliance.ctl().json(&["status"])?;
    let already = running(&appliance.ctl())?;
    let program = appliance.file("idle");
    compile(&setup().built.checkout.root, &program)?;
    let packages = appliance.file("packages");
    let names: Vec<String> = (0..agents).map(|number| format!("idle-{number:04}")).collect();
    let tars: Vec<PathBuf> =
        names.iter().map(|name| package(&packages, &program, name)).collect::<Result<_>>()?;
    let installs: Vec<(String, Option<&Path>)> =
        tars.iter().map(|tar| ("/api/v1/agents".to_owned(), Some(tar.as_path()))).collect();
    post(&appliance.ctl(), &appliance.file("install"), &installs)?;
    let starts: Vec<(String, Option<&Path>)> =
        names.iter().map(|name| (format!("/api/v1/agents/{name}/start"), None)).collect();
    post(&appliance.ctl(), &appliance.file("start"), &starts)?;
    let within = BOOT + EACH * u32::try_from(agents)?;
    appliance.until("all agents run", within, |ctl| Ok((running(ctl)? >= already + agents).then_some(())))?;
    std::thread::sleep(SETTLE);
    let after: ApplianceStatus = appliance.ctl().json(&["status"])?;
    let alive = running(&appliance.ctl())?;
    ensure!(alive >= already + agents, "only {alive} of {} still run", already + agents);
    appliance.power_off_hard()?;
    let taken = before.memory_available_bytes.saturating_sub(after.memory_available_bytes) as f64;
    let own = after.agentd_rss_bytes.saturating_sub(before.agentd_rss_bytes) as f64;
    let each = |bytes: f64| bytes / agents as f64 / MIB;
    let beside = format!("{agents} idle agents on 2 processors and {MEMORY_MIB} MiB");
    Ok(vec![
        Row::new(format!("agentd, resident, with {beside}"), after.agentd_rss_bytes as f64 / MIB, "MiB")
            .at_most(64.0),
        Row::new(format!("memory each, without agentd's own growth, of {beside}"), each(taken - own), "MiB")
            .at_most(1.0),
        Row::new(format!("growth of agentd, each, of {beside}"), each(own) * 1024.0, "KiB"),
    ])
}

fn running(ctl: &Ctl) -> Result<usize> {
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    Ok(agents.iter().filter(|agent| agent.run.is_some()).count())
}

/// The agent that waits; also for the guest without agentd.
pub fn compile(checkout: &Path, to: &Path) -> Result<()> {
    let source = checkout.join("tests/guest/idle.c");
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-nostdlib", "-fno-stack-protector", "-Os", "-s", "-o"]).arg(to).arg(source);
    crate::spawn::run(&mut gcc)
}

/// A tar with the program and a manifest of this name.
fn package(below: &Path, program: &Path, name: &str) -> Result<PathBuf> {
    let folder = below.join(name);
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::hard_link(program, folder.join("bin/idle"))?;
    let manifest = format!(
        "[agent]\nname = \"{name}\"\nexec = [\"/agent/bin/idle\"]\n\n[limits]\nmemory_high = \"8M\"\n\
         memory_max = \"8M\"\ndisk = \"1M\"\n\n[messages]\naccept = true\n"
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    let tar = below.join(format!("{name}.tar"));
    crate::spawn::run(
        Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&folder).args(["agent.toml", "bin"]),
    )?;
    Ok(tar)
}

/// All requests one after another over one connection: a handshake is most of what one costs.
fn post(ctl: &Ctl, answers: &Path, requests: &[(String, Option<&Path>)]) -> Result<()> {
    std::fs::create_dir_all(answers)?;
    let mut config = String::new();
    let token = token(ctl)?;
    for (number, (path, body)) in requests.iter().enumerate() {
        let sent = match body {
            Some(file) => {
                format!("data-binary = \"@{}\"\nheader = \"content-type: application/x-tar\"", file.display())
            }
            None => "data = \"\"\nheader = \"content-type: application/json\"".to_owned(),
        };
        let answer = answers.join(number.to_string());
        writeln!(
            config,
            "url = \"{}{path}\"\ninsecure\nsilent\nshow-error\nfail-with-body\nrequest = POST\n{sent}\n\
             header = \"authorization: Bearer {token}\"\noutput = \"{}\"\nnext",
            ctl.host(),
            answer.display()
        )?;
    }
    let file = answers.join("requests");
    std::fs::write(&file, config.trim_end().trim_end_matches("next"))?;
    let output = Command::new("curl").arg("--config").arg(&file).output().context("cannot start curl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = std::fs::read_to_string(answers.join((requests.len() - 1).to_string())).unwrap_or_default();
    ensure!(output.status.success(), "{said}{last}");
    Ok(())
}

/// What `agentctl claim` was given.
fn token(ctl: &Ctl) -> Result<String> {
    let file = ctl.home().join(".config/agentctl/config.toml");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("token = \"")).context("no token")?;
    Ok(line.trim_end_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_for_agentd_is_not_counted_as_the_agents() {
        let memory = serde_json::json!({
            "agents": 10, "kib_each": { "MemAvailable": -700.0, "Slab": 300.0 }, "own_kib_each": 60.0,
            "processes_kib": { "jail": { "RssAnon": 120 }, "agent": { "RssAnon": 8 } },
        });
        let freezing = serde_json::json!({ "frozen": 5, "stood_ms": 1200 });
        let rows = told_rows(10, &memory, &freezing, Accelerator::Kvm).unwrap();
        let promised: Vec<(f64, bool)> =
            rows.iter().filter_map(|row| Some((row.value, row.goal.as_ref()?.reached))).collect();
        assert_eq!(promised, [(640.0 / 1024.0, true), (1200.0, false)]);
        let emulated = told_rows(10, &memory, &freezing, Accelerator::Tcg).unwrap();
        assert!(emulated.last().unwrap().goal.is_none(), "a time under emulation is only told");
        assert!(told_rows(10, &serde_json::json!({}), &freezing, Accelerator::Kvm).is_err());
    }
}
