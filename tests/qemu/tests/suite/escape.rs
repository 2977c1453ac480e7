//! Does any attempt to get out of a jail have an effect, and would it without the walls?
//!
//! Real agents under real manifests: a neighbour with secrets, an attacker with the attempts of
//! `tests_qemu::escapes`. Who was attacked tells what happened (the neighbour, the serial line, the uplink, the disk,
//! a listener here; in the escape suite's own image also a bystander with root's view), never the attacker: its word
//! counts only against the walls. `ways.rs` holds how that is asked.

use crate::escape_ways::{Attack, Stage, lowerable};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use tests_qemu::elsewhere;
use tests_qemu::escapes::{Control, NOT_TRIED, ROWS};
use tests_qemu::setup;

/// Walls that can be left out one at a time; `agentd_sandbox::lower` knows them by these names.
const WALLS: [(&str, &str); 14] = [
    ("own uid", "uid"),
    ("no capabilities, securebits", "capabilities"),
    ("rlimits", "rlimits"),
    ("descriptors closed", "descriptors"),
    ("Landlock", "landlock"),
    ("seccomp", "seccomp"),
    ("pid namespace", "pid-namespace"),
    ("mount namespace, new root", "root"),
    ("net namespace", "net-namespace"),
    ("IPC namespace", "ipc-namespace"),
    ("UTS namespace", "uts-namespace"),
    ("cgroup namespace", "cgroup-namespace"),
    ("cgroup limits and group", "cgroup"),
    ("disk quota", "quota"),
];

/// The word that leaves init's and the launcher's own walls out, in the escape suite's image.
const UNCONFINED: &str = "agentd.launcher=unconfined";

/// The release image: an attacker that even asks for its walls to be lowered has no effect on anybody.
#[test]
fn nothing_gets_out_of_the_appliance() -> Result<()> {
    let attack = in_the_appliance()?;
    println!("RESULT: {} attempts, none had an effect", attack.tried());
    Ok(())
}

/// The control: without walls each attempt has the effect that the others are judged by.
#[test]
fn without_walls_every_attempt_succeeds() -> Result<()> {
    // In the long run also what our kernel leaves out.
    let kernel = test_kernel();
    let attack = without_walls(kernel.as_deref())?;
    let mut wanted: BTreeSet<&str> = ids(Control::WallsOff);
    if kernel.is_some() {
        wanted.extend(ids(Control::TestKernel));
    }
    let missing: Vec<String> = wanted
        .iter()
        .filter(|id| !attack.harmed.contains(**id))
        .map(|id| format!("{id} ({})", attack.own_word(id)))
        .collect();
    ensure!(missing.is_empty(), "unproven, as they had no effect even without walls: {}", missing.join("; "));
    println!("RESULT: {} attempts succeed without walls", wanted.len());
    Ok(())
}

/// Each wall that the self-probe of a start looks at, left out alone: the start ends there, and the report names it.
#[test]
fn a_start_without_a_wall_is_ended_by_its_own_probe() -> Result<()> {
    // A confined launcher has no network that a run could share with it.
    let mut stage = Stage::watched(None, "agentd.launcher=unconfined")?;
    for (wall, word) in [
        ("capabilities", "Cap"),
        ("landlock", "open(/) succeeded"),
        ("seccomp", "unshare(CLONE_NEWUSER)"),
        ("pid-namespace", "PPid"),
        ("net-namespace", "interface"),
    ] {
        let attack = stage.attack(&format!("{wall},probed"))?;
        let why = attack.refused.as_deref().with_context(|| format!("it ran without {wall}: {attack}"))?;
        ensure!(why.contains("self-probe") && why.contains(word), "{wall}: {why}");
    }
    stage.end()
}

/// What can lower a wall is in no program of the appliance.
#[test]
fn no_wall_of_the_appliance_can_be_lowered() -> Result<()> {
    const MARKER: &[u8] = b"NOT FOR AN APPLIANCE: THIS PROGRAM CAN LOWER ITS WALLS";
    let holds = |path: &Path, text: &[u8]| -> Result<bool> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(bytes.windows(text.len()).any(|window| window == text))
    };
    for program in &setup().built.programs.programs {
        ensure!(!holds(&program.built, MARKER)?, "{program:?}");
    }
    // And the search would find it.
    let walls = lowerable()?.programs.programs.iter();
    let lowering = ["/init", "-launcher", "-jail"];
    let walls = walls.filter(|program| lowering.iter().any(|end| program.place.ends_with(end)));
    let found: Vec<bool> = walls.map(|program| holds(&program.built, MARKER)).collect::<Result<_>>()?;
    ensure!(found == [true, true, true], "the search finds nothing in the escape suite's image either");
    Ok(())
}

/// Each wall switched off alone, in the long run; writes the table into the sandbox's documentation.
#[test]
fn each_wall_alone() -> Result<()> {
    if std::env::var_os("AGENTD_LONG").is_none() {
        println!("SKIP: the matrix of walls is for the long run (scripts/test long escape)");
        return Ok(());
    }
    let kernel = test_kernel();
    let whole = in_the_appliance()?;
    let mut proven = without_walls(None)?.harmed;
    let mut columns = Vec::new();
    if let Some(kernel) = &kernel {
        proven.extend(without_walls(Some(kernel))?.harmed);
        let mut stage = Stage::watched(Some(kernel), "")?;
        columns.push(("kernel options", stage.attack("")?));
        stage.end()?;
    }
    let mut stage = Stage::watched(None, "")?;
    columns.insert(0, ("none", stage.attack("")?));
    for (name, wall) in WALLS {
        columns.push((name, stage.attack(wall)?));
        println!("{name}: {:?}", columns.last().map(|(_, attack)| (&attack.harmed, &attack.refused)));
    }
    stage.end()?;
    // It is inherited from init, so it is only missing where init has left it out; Landlock's and seccomp's own calls
    // would set it again.
    let mut stage = Stage::watched(None, UNCONFINED)?;
    columns.push((
        "no_new_privs, and with it Landlock, seccomp and init's settings of the kernel",
        stage.attack("no-new-privs,landlock,seccomp")?,
    ));
    // The confined launcher, whose namespace a run gets in the column above, has no network either.
    columns.push(("net namespace, so that the host's network is there", stage.attack("net-namespace")?));
    stage.end()?;
    let table = table(&whole, &proven, &columns);
    std::fs::write(setup().built.checkout.path("agentd/crates/sandbox/ESCAPES.md"), &table)?;
    let unproven = ROWS.iter().filter(|row| !proven.contains(row.id)).count();
    println!("RESULT: {} attempts, {unproven} unproven; {}", ROWS.len(), summary(&columns));
    let (_, none) = columns.first().context("no column")?;
    ensure!(none.harmed.is_empty() && none.refused.is_none(), "with all walls up: {none}");
    Ok(())
}

/// `scripts/test long escape` builds it and says here where it is.
fn test_kernel() -> Option<PathBuf> {
    std::env::var_os("AGENTD_ESCAPE_KERNEL").map(PathBuf::from)
}

fn in_the_appliance() -> Result<Attack> {
    let mut stage = Stage::appliance()?;
    // In a release image these words mean nothing.
    let attack = stage.attack("all")?;
    stage.end()?;
    ensure!(attack.harmed.is_empty(), "these had an effect: {:?}\n{attack}", attack.harmed);
    let boasts = attack.boasts();
    ensure!(boasts.is_empty(), "the attacker says that these succeeded: {boasts:?}\n{attack}");
    // Each was tried, or the run was ended by what it did.
    for row in ROWS {
        ensure!(attack.begun.contains(row.id), "{} was not tried\n{attack}", row.id);
    }
    Ok(attack)
}

fn without_walls(kernel: Option<&Path>) -> Result<Attack> {
    let mut stage = Stage::watched(kernel, &format!("{UNCONFINED} lsm=landlock"))?;
    let attack = stage.attack("all")?;
    stage.end()?;
    println!("without walls: {:?}\n{attack}", attack.harmed);
    Ok(attack)
}

fn ids(control: Control) -> BTreeSet<&'static str> {
    ROWS.iter().filter(|row| row.control == control).map(|row| row.id).collect()
}

fn summary(columns: &[(&str, Attack)]) -> String {
    let stopped = |attack: &Attack| match &attack.refused {
        Some(_) => "none tried".to_owned(),
        None => (ROWS.len() - attack.harmed.len()).to_string(),
    };
    let words: Vec<String> =
        columns.iter().map(|(name, attack)| format!("without {name} {}", stopped(attack))).collect();
    format!("stopped: {}", words.join(", "))
}

fn table(whole: &Attack, proven: &BTreeSet<String>, columns: &[(&str, Attack)]) -> String {
    let commit = &setup().built.checkout.commit;
    let mut text = format!(
        "# What each wall is worth\n\n\
         Written by `scripts/test long escape` on {}, at commit `{commit}`. Do not edit.\n\n\
         Every attempt is made by a real agent under a real manifest, and judged by its effect on whoever is attacked.\n\
         A control is the same attempt with every wall lowered, in an image made for that alone; for what the kernel's\n\
         configuration leaves out, on a kernel that has it. Without a control an attempt is unproven, not stopped.\n\n\
         ## With one wall switched off\n\n\
         | wall switched off | attempts still stopped | not stopped |\n|---|---|---|\n",
        today(),
    );
    for (name, attack) in columns {
        let stopped =
            ROWS.iter().filter(|row| proven.contains(row.id) && !attack.harmed.contains(row.id)).count();
        let of = ROWS.iter().filter(|row| proven.contains(row.id)).count();
        let through: Vec<&str> = attack.harmed.iter().map(String::as_str).collect();
        let through = match &attack.refused {
            Some(why) => format!("no run started: {}", why.replace('|', "/")),
            None if through.is_empty() => "-".to_owned(),
            None => through.join(", "),
        };
        // What was not tried was not stopped either.
        let stopped =
            if attack.refused.is_some() { "none tried".to_owned() } else { format!("{stopped} of {of}") };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {name} | {stopped} | {through} |");
    }
    text.push_str(
        "\nWhere no run started, the other walls refused to stand without that one: nothing was tried, and nothing ran.\n\
         \n## Each attempt\n\n| attempt | what | primary | second | in the appliance | control |\n|---|---|---|---|---|---|\n",
    );
    for row in ROWS {
        let result = if whole.harmed.contains(row.id) { "ESCAPED" } else { "no effect" };
        let control = match (proven.contains(row.id), row.control) {
            (true, Control::WallsOff) => "succeeds without walls",
            (true, Control::TestKernel) => "succeeds without walls on a kernel that has it",
            (false, _) => "UNPROVEN",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {result}: {} | {control} |",
            row.id,
            row.what,
            row.primary,
            if row.second.is_empty() { "-" } else { row.second },
            whole.own_word(row.id).replace('|', "/"),
        );
    }
    text.push_str(&elsewhere::section());
    text.push_str("\n## Not tried here\n\n| row | why |\n|---|---|\n");
    for (row, why) in NOT_TRIED {
        let _ = writeln!(text, "| {row} | {why} |");
    }
    text
}

fn today() -> String {
    let date = std::process::Command::new("date").args(["-u", "+%F"]).output();
    date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
