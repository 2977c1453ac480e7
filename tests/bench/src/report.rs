//! Where do results go?
//!
//! A result is printed and written to `target/bench/<name>.json`. What is worth keeping is copied to
//! `tests/results/bench/`, which is committed, and README says what lies there. The form is [`tests_tidy::promises`]'s.

use anyhow::{Context, Result, ensure};
use image::qemu::Accelerator;
use image::source::Checkout;
use std::fs;
use std::path::{Path, PathBuf};
use tests_qemu::setup;
use tests_tidy::Repo;
use tests_tidy::promises::{self, Bench, Row};

/// The rows of one benchmark with today's date, this checkout's commit and this machine.
pub fn result(name: &str, rows: Vec<Row>) -> Bench {
    let setup = setup();
    let accelerator = match setup.accelerator {
        Accelerator::Kvm => "KVM",
        Accelerator::Tcg => "TCG (emulated)",
    };
    Bench {
        name: name.to_owned(),
        command: format!("scripts/bench {name}"),
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        commit: setup.built.checkout.commit.clone(),
        machine: machine(),
        accelerator: accelerator.to_owned(),
        rows,
    }
}

/// The same for what ran on this machine's own kernel, without an image or a guest.
pub fn here(name: &str, rows: Vec<Row>, checkout: &Checkout) -> Bench {
    Bench {
        name: name.to_owned(),
        command: format!("scripts/bench {name}"),
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        commit: checkout.commit.clone(),
        machine: machine(),
        accelerator: "no guest: this machine's own kernel".to_owned(),
        rows,
    }
}

/// Prints the table, a line per promise for `scripts/test long`, and writes the file below `target/bench`.
pub fn publish(bench: &Bench, checkout: &Path) -> Result<()> {
    println!("{}", bench.table());
    write(&fresh(checkout, &bench.name), &format!("{}\n", serde_json::to_string_pretty(bench)?))?;
    println!("`scripts/bench keep {}` keeps it", bench.name);
    for promise in bench.promises() {
        println!("RESULT: {promise}");
    }
    Ok(())
}

/// Copies results to where they are committed, and has README say what they say.
pub fn keep(checkout: &Path, names: &[String]) -> Result<()> {
    for name in names {
        let file = fresh(checkout, name);
        let text = fs::read_to_string(&file)
            .with_context(|| format!("{}: `scripts/bench {name}` makes it", file.display()))?;
        let bench: Bench = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        ensure!(bench.name == *name, "{} is the result of {}", file.display(), bench.name);
        if bench.commit.ends_with("-dirty") {
            println!("{name}: measured at {}, with changes that nobody else has", bench.commit);
        }
        let kept = checkout.join(promises::FOLDER).join(format!("{name}.json"));
        write(&kept, &text)?;
        println!("kept as {}", kept.display());
    }
    readme(checkout)
}

/// Writes README's section from the kept results.
pub fn readme(checkout: &Path) -> Result<()> {
    let section = promises::section(&promises::kept(&Repo::open()?)?);
    let file = checkout.join("README.md");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let new = promises::with_section(&text, &section)?;
    if new != text {
        write(&file, &new)?;
        println!("README.md has changed");
    }
    Ok(())
}

fn fresh(checkout: &Path, name: &str) -> PathBuf {
    checkout.join("target/bench").join(format!("{name}.json"))
}

fn write(file: &Path, text: &str) -> Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// `2 x Xeon ...`.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    format!("{cpus} x {}", model.trim_start_matches([' ', '\t', ':']))
}
