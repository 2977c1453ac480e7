//! How long from the wish to the first byte of a program in its sandbox? And what do many cost that wait ([`idle`])?
//!
//! Runs where the kernel is that matters: in a guest with ours, or on this machine with what it has. Starts one tiny
//! static program by each contender in turn, so that whatever disturbs the machine disturbs all alike.
//!
//! In:     folders and programs on the command line; root. Out: one JSON line per contender, in microseconds.
//! Always: a start counts when its first byte was read; one that fails ends the measurement.
//! Never:  statistics. Those are `scripts/bench`'s.
#![forbid(unsafe_code)]

mod agentd;
mod bubblewrap;
mod crun;
mod idle;
mod plan;

use std::io::{Error, Read, Result};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// After each start: the kernel takes namespaces and groups apart in the background, and that is not to be paid by
/// whoever comes next.
const SETTLE: Duration = Duration::from_millis(60);
/// Files that are read for the first time, code that is translated for the first time.
const WARM_UP: usize = 5;

/// Where everything is.
pub struct Scene {
    pub launcher: PathBuf,
    pub jail: PathBuf,
    /// Where the programs are that are started.
    pub programs: PathBuf,
    pub data: PathBuf,
    pub cgroup_root: PathBuf,
    /// For files that only this measurement needs.
    pub scratch: PathBuf,
    /// What the machine lacks, as the launcher's own option says it; empty in a guest of ours.
    pub without: String,
    starts: usize,
    wanted: Vec<String>,
    /// Instead of starts: so many agents that wait, and how many of them are frozen.
    idle: Option<(usize, usize)>,
}

pub trait Contender {
    fn name(&self) -> &'static str;
    /// Starts the program once and waits for its end; how long its first byte took.
    fn start(&mut self) -> Result<Duration>;
}

fn main() -> ExitCode {
    match Scene::parse(std::env::args().skip(1)).and_then(|scene| measure(&scene)) {
        Ok(()) => {
            println!("spawn: measured");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("spawn: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(scene: &Scene) -> Result<()> {
    std::fs::create_dir_all(&scene.scratch)?;
    if let Some((agents, frozen)) = scene.idle {
        return idle::measure(scene, agents, frozen);
    }
    let plan = plan::plan();
    let ours = agentd::Agentd::new(scene, plan)?;
    // It has made the agent's folders, which the others show to the program as well.
    let plan = ours.plan().clone();
    let mut contenders: Vec<Box<dyn Contender>> = vec![Box::new(ours)];
    if scene.wants("bwrap") {
        contenders.push(Box::new(bubblewrap::Bubblewrap::new(scene, &plan, bubblewrap::User::Root)?));
    }
    if scene.wants("bwrap-user") {
        contenders.push(Box::new(bubblewrap::Bubblewrap::new(scene, &plan, bubblewrap::User::Namespace)?));
    }
    if scene.wants("crun") {
        contenders.push(Box::new(crun::Crun::new(scene, &plan)?));
    }
    let mut times: Vec<Vec<u128>> = vec![Vec::new(); contenders.len()];
    for round in 0..WARM_UP + scene.starts {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let took = contender.start().map_err(|error| named(contender.name(), &error))?;
            if round >= WARM_UP {
                times.push(took.as_micros());
            }
            std::thread::sleep(SETTLE);
        }
    }
    for (contender, times) in contenders.iter().zip(&times) {
        println!("spawn: {}", serde_json::json!({ "contender": contender.name(), "us": times }));
    }
    Ok(())
}

impl Scene {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut scene = Self {
            launcher: "/usr/lib/agentd/agent-launcher".into(),
            jail: "/usr/lib/agentd/agent-jail".into(),
            programs: "/usr/lib/agentd".into(),
            data: "/data".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            scratch: "/run/spawn".into(),
            without: String::new(),
            starts: 100,
            wanted: ["bwrap", "bwrap-user", "crun"].map(String::from).into(),
            idle: None,
        };
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| Error::other(format!("{name} needs a value")))?;
            match name.as_str() {
                "--launcher" => scene.launcher = value.into(),
                "--jail" => scene.jail = value.into(),
                "--programs" => scene.programs = value.into(),
                "--data" => scene.data = value.into(),
                "--cgroup-root" => scene.cgroup_root = value.into(),
                "--scratch" => scene.scratch = value.into(),
                "--without" => scene.without = value,
                "--starts" => scene.starts = value.parse().map_err(Error::other)?,
                "--beside" => scene.wanted = value.split(',').map(str::to_owned).collect(),
                "--idle" => {
                    let (agents, frozen) =
                        value.split_once(',').ok_or_else(|| Error::other("--idle AGENTS,FROZEN"))?;
                    let number = |text: &str| text.parse().map_err(Error::other);
                    scene.idle = Some((number(agents)?, number(frozen)?));
                }
                _ => return Err(Error::other(format!("{name} is not known"))),
            }
        }
        Ok(scene)
    }

    fn wants(&self, name: &str) -> bool {
        self.wanted.iter().any(|wanted| wanted == name)
    }

    /// The agent's volume.
    pub fn work(&self, agent: &str) -> PathBuf {
        self.data.join("agents").join(agent).join("work")
    }

    /// The same package, where programs may be started from.
    pub fn copied_package(&self) -> PathBuf {
        self.scratch.join("package")
    }

    pub fn package(&self, agent: &str) -> PathBuf {
        self.data.join("agents").join(agent).join("package")
    }
}

/// Runs a command that starts the program with our pipe as its standard output.
pub fn until_first_byte(command: &mut Command) -> Result<Duration> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn()?;
    let mut byte = [0];
    let read = match &mut child.stdout {
        Some(stdout) => stdout.read(&mut byte)?,
        None => 0,
    };
    let took = begin.elapsed();
    let output = child.wait_with_output()?;
    if read == 1 && output.status.success() {
        return Ok(took);
    }
    Err(Error::other(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
}

fn named(name: &str, error: &Error) -> Error {
    Error::other(format!("{name}: {error}"))
}
