//! How long does a start take, with all walls, beside bubblewrap and crun?
//!
//! Four measurements by one driver (`tests/guest/src/spawn`), which starts the same tiny program by each contender in
//! turn: in a guest with the appliance's kernel, where every wall is real; under emulation once more without address
//! randomisation, because QEMU translates code anew for each address at which it meets it, which no processor does, and
//! then with its time counted in instructions, which no other load on this machine can disturb; and on this machine's
//! own kernel, without what needs cgroup v2 and quotas. Ratios are taken start by start, from what stood side by side.

use crate::report::result;
use anyhow::{Context, Result, ensure};
use image::cache::sha256_file;
use image::programs;
use image::qemu::{Accelerator, Boot, Drive, Machine, Time, copy_disk};
use serde::Deserialize;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tests_qemu::{BOOT, setup};
use tests_tidy::promises::{Bench, Row};

const OURS: &str = "agentd";
const BUBBLEWRAP: &str = "bubblewrap";
const CRUN: &str = "crun";
/// Counting in instructions gives the same each time; more starts would only take longer.
const COUNTED_STARTS: usize = 10;
/// One start of all contenders under emulation on a machine that does much else.
const ROUND: Duration = Duration::from_secs(10);

/// All starts by one contender, in order: the n-th of each stand side by side.
#[derive(Debug, Deserialize)]
struct Starts {
    contender: String,
    us: Vec<f64>,
}

pub fn measure(starts: usize) -> Result<Bench> {
    let setup = setup();
    let scene = Scene::prepare()?;
    let mut rows = Vec::new();

    let passing = scene.starts(Time::Passing, starts, "")?;
    rows.push(
        ratios("in a guest with our kernel: bubblewrap over agentd", &passing, BUBBLEWRAP)?.at_least(1.0),
    );
    rows.push(ratios("in a guest with our kernel: crun over agentd", &passing, CRUN)?.at_least(3.0));
    rows.extend(absolute("in a guest with our kernel", &passing, "ms")?);
    if setup.accelerator == Accelerator::Tcg {
        let fixed = scene.starts(Time::Passing, starts, "norandmaps")?;
        let so = "in that guest, every program at one address (norandmaps)";
        rows.push(ratios(&format!("{so}: bubblewrap over agentd"), &fixed, BUBBLEWRAP)?.at_least(1.0));
        rows.push(ratios(&format!("{so}: crun over agentd"), &fixed, CRUN)?.at_least(3.0));
        rows.extend(absolute(so, &fixed, "ms")?);
        let counted = scene.starts(Time::Instructions, COUNTED_STARTS, "")?;
        let of = "of instructions, in that guest";
        rows.push(ratios(&format!("{of}: bubblewrap over agentd"), &counted, BUBBLEWRAP)?);
        rows.push(ratios(&format!("{of}: crun over agentd"), &counted, CRUN)?);
        rows.extend(absolute("instructions and waiting, in that guest", &counted, "million")?);
    }
    let native = scene.native(starts)?;
    let here = "on this machine's own kernel, without cgroup v2's controllers and quotas";
    rows.push(ratios(&format!("{here}: bubblewrap over agentd"), &native, BUBBLEWRAP)?);
    rows.push(ratios(&format!("{here}: crun over agentd"), &native, CRUN)?);
    rows.extend(absolute(here, &native, "ms")?);
    Ok(result("spawn", rows))
}

pub(crate) struct Scene {
    peer: PathBuf,
    folder: tempfile::TempDir,
    kernel: PathBuf,
    native: PathBuf,
}

impl Scene {
    pub(crate) fn prepare() -> Result<Self> {
        let setup = setup();
        let checkout = &setup.built.checkout;
        let script = checkout.root.join("tests/bench/spawn-peer.sh");
        let peer = setup.cache.path(&format!("spawn-peer-{}", &sha256_file(&script)?[..16]));
        let status = Command::new("bash").arg(script).arg(&peer).status().context("cannot start bash")?;
        ensure!(status.success(), "the peer was not built");

        let folder = tempfile::Builder::new().prefix("agentd-spawn-").tempdir()?;
        let ours = folder.path().join("programs");
        std::fs::create_dir(&ours)?;
        let guests = programs::static_programs(&setup.cache, checkout, "tests-guest", &["spawn-driver"])?;
        let sandbox = programs::static_programs(
            &setup.cache,
            checkout,
            "agentd-sandbox",
            &["agent-launcher", "agent-jail"],
        )?;
        for program in guests.iter().chain(&sandbox) {
            std::fs::copy(program, ours.join(program.file_name().context("a program has a name")?))?;
        }
        let source = checkout.root.join("tests/guest/one-byte.c");
        run(Command::new("gcc").args(["-static", "-Os", "-s", "-o"]).arg(ours.join("one-byte")).arg(source))?;
        crate::idle::compile(&checkout.root, &ours.join("idle"))?;
        let image = folder.path().join("programs.img");
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&ours).arg(image).arg("32M"))?;
        let native = checkout.root.join("tests/bench/spawn-native.sh");
        Ok(Self { peer, folder, kernel: setup.built.kernel.image.clone(), native })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One boot in which all contenders start `starts` times each.
    fn starts(&self, time: Time, starts: usize, option: &str) -> Result<Vec<Starts>> {
        let within = BOOT + ROUND * u32::try_from(starts + 10)?;
        read(&self.booted(time, option, &format!("--starts {starts}"), 1024, within)?)
    }

    /// One boot in which the driver does what its arguments say; what it said.
    pub(crate) fn guest(&self, arguments: &str, memory_mib: u32, within: Duration) -> Result<String> {
        self.booted(Time::Passing, "", arguments, memory_mib, within)
    }

    /// The same, with an option for the kernel.
    fn booted(
        &self,
        time: Time,
        option: &str,
        arguments: &str,
        memory_mib: u32,
        within: Duration,
    ) -> Result<String> {
        let (root, data) = (self.file("root.img"), self.file("data.img"));
        copy_disk(&self.peer.join("root.img"), &root)?;
        let _ = std::fs::remove_file(&data);
        // Room for a thousand agents' folders.
        let quota = ["-q", "-t", "ext4", "-N", "40000", "-O", "quota", "-E", "quotatype=usrquota"];
        run(Command::new("mke2fs").args(quota).arg(&data).arg("1G"))?;
        let boot = Boot::Direct {
            kernel: self.kernel.clone(),
            command_line: format!(
                "console=ttyS0 quiet root=/dev/vda rw init=/sbin/bench-init {option} \
                 DRIVER=\"/usr/lib/agentd/spawn-driver {arguments}\""
            ),
            initrd: None,
        };
        let machine = Machine {
            time,
            memory_mib,
            // What counts instructions runs its processors in turn, which is no order of things on any machine.
            cpus: if time == Time::Instructions { 1 } else { 2 },
            drives: [root, data, self.file("programs.img")].map(|file| Drive::raw(&file)).into(),
            ..Machine::new(setup().accelerator, boot)
        };
        let mut guest = machine.start(None)?;
        guest.wait_for("bench: over", within)?;
        let said = guest.serial_text();
        ensure!(said.contains("spawn: measured"), "the driver did not measure: {}", guest.scene());
        Ok(said)
    }

    fn native(&self, starts: usize) -> Result<Vec<Starts>> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash"]).arg(&self.native).arg(self.peer.join("root"));
        command.arg(self.file("programs")).args(["--without", "quota,memory,pids,cpu,io"]);
        let output =
            command.args(["--starts", &starts.to_string()]).output().context("cannot start unshare")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}{errors}", self.native.display());
        read(&said)
    }
}

fn read(said: &str) -> Result<Vec<Starts>> {
    let lines = said.lines().filter_map(|line| line.split_once("spawn: ")).map(|(_, rest)| rest.trim());
    let starts: Vec<Starts> = lines
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect::<Result<_>>()?;
    ensure!(!starts.is_empty(), "the driver measured nothing: {said}");
    Ok(starts)
}

fn of<'a>(starts: &'a [Starts], contender: &str) -> Result<&'a [f64]> {
    let found = starts.iter().find(|starts| starts.contender == contender);
    found.map(|starts| starts.us.as_slice()).with_context(|| format!("{contender} started nothing"))
}

/// How many times as long as ours the other took.
fn ratios(what: &str, starts: &[Starts], other: &str) -> Result<Row> {
    let (ours, theirs) = (of(starts, OURS)?, of(starts, other)?);
    ensure!(ours.len() == theirs.len(), "{other} did not start as often as agentd");
    let ratios: Vec<f64> = theirs.iter().zip(ours).map(|(their, our)| their / our).collect();
    Row::median(format!("start of a program, {what}"), &ratios, "x")
}

/// Half and 99 of 100 starts are as fast or faster.
fn absolute(place: &str, starts: &[Starts], unit: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for one in starts {
        let mut sorted = one.us.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| -> Result<f64> {
            let place = (share * sorted.len() as f64).ceil() as usize;
            Ok(sorted.get(place.saturating_sub(1)).context("nothing was measured")? / 1000.0)
        };
        for (name, share) in [("p50", 0.50), ("p99", 0.99)] {
            let what =
                format!("start of a program, {place}: {} {name}, {} starts", one.contender, sorted.len());
            let row = Row::new(what, at(share)?, unit);
            rows.push(if one.contender == OURS { row } else { row.detail() });
        }
    }
    Ok(rows)
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "boot\nspawn: {\"contender\":\"agentd\",\"us\":[2000,4000]}\r\n\
                        spawn: {\"contender\":\"crun\",\"us\":[8000,12000]}\nspawn: measured\n";

    #[test]
    fn starts_are_compared_with_what_stood_beside_them() {
        let starts = read(SAID).unwrap();
        let row = ratios("crun over agentd", &starts, CRUN).unwrap();
        assert_eq!((row.value, row.unit.as_str()), (3.5, "x"));
        assert!(ratios("x", &starts, BUBBLEWRAP).is_err(), "what did not run is no number");
        assert!(read("spawn: FAILED: crun: no").is_err());
    }

    #[test]
    fn halves_and_hundredths_are_real_starts() {
        let rows = absolute("here", &read(SAID).unwrap(), "ms").unwrap();
        assert_eq!(rows.iter().map(|row| row.value).collect::<Vec<_>>(), [2.0, 4.0, 8.0, 12.0]);
        assert_eq!(rows.iter().map(|row| row.detail).collect::<Vec<_>>(), [false, false, true, true]);
    }
}
