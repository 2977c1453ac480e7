//! How is an attempt made, and where does it find what it attacks?

use crate::sys::{self, Child};
use crate::{files, kernel, network, processes, resources};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Longer than any attempt needs on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an attacker knows. All of it could be guessed; nothing of it is a secret.
pub struct Scene {
    /// The neighbour's folder as the host sees it.
    pub neighbour: PathBuf,
    /// Own folders, wherever this run has them.
    pub work: PathBuf,
    pub package: PathBuf,
    /// A port of the machine that runs the test, at QEMU's address for it.
    pub outside_port: u16,
    only: Vec<String>,
}

/// What an attempt has to show. It keeps whatever it holds until its process ends.
pub type Outcome = io::Result<String>;

pub type Attempt = (&'static str, fn(&Scene) -> Outcome);

/// Those that may end the run come last.
const PARTS: [&[Attempt]; 5] =
    [files::ATTEMPTS, kernel::ATTEMPTS, network::ATTEMPTS, processes::ATTEMPTS, resources::ATTEMPTS];

impl Scene {
    pub fn from_arguments(words: &[String]) -> Self {
        let value = |name: &str| {
            words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        let program = std::env::current_exe().unwrap_or_default();
        let package = program.parent().and_then(Path::parent).unwrap_or(Path::new("/agent"));
        Self {
            neighbour: Path::new("/data/agents").join(value("victim")),
            work: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/work")),
            package: package.to_owned(),
            outside_port: value("outside").parse().unwrap_or(9),
            only: value("only").split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect(),
        }
    }

    /// A process whose arguments hold these words, as far as this run sees processes.
    pub fn process(&self, words: &[&str]) -> io::Result<u32> {
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            if words.iter().all(|word| arguments.contains(&word.as_bytes())) {
                return Ok(pid);
            }
        }
        Err(io::Error::other("no such process is visible"))
    }

    pub fn decoy(&self, name: &str) -> io::Result<u32> {
        self.process(&["decoy", name])
    }
}

/// Every attempt, one after the other; then waits, so that what they hold can be looked at.
pub fn attack(scene: &Scene) -> ExitCode {
    sys::name_process("x-main");
    let mut held = Vec::new();
    for (id, attempt) in PARTS.iter().copied().flatten() {
        if !scene.only.is_empty() && !scene.only.iter().any(|only| only == id) {
            continue;
        }
        say(&format!("begin {id}"));
        held.push(try_one(scene, id, *attempt));
    }
    say("attack over");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn try_one(scene: &Scene, id: &str, attempt: fn(&Scene) -> Outcome) -> Option<Child> {
    let (mut reader, mut writer) = match io::pipe() {
        Ok(pipe) => pipe,
        Err(error) => {
            say(&format!("try {id}: could not be tried: {error}"));
            return None;
        }
    };
    let child = match sys::fork() {
        Err(error) => {
            say(&format!("try {id}: could not be tried: {error}"));
            return None;
        }
        Ok(None) => {
            drop(reader);
            sys::name_process(&format!("x-{id}"));
            sys::die_with_parent();
            match attempt(scene) {
                Ok(evidence) => {
                    let _ = writer.write_all(format!("ESCAPED {evidence}\n").as_bytes());
                    drop(writer);
                    loop {
                        std::thread::sleep(Duration::from_secs(3600));
                    }
                }
                Err(error) => {
                    let _ = writer.write_all(format!("blocked: {error}\n").as_bytes());
                    sys::exit_now(0);
                }
            }
        }
        Ok(Some(child)) => child,
    };
    drop(writer);
    let said = sys::read_within(&mut reader, PATIENCE);
    let deadline = Instant::now() + Duration::from_millis(500);
    let ended = loop {
        match child.ended() {
            None if said.is_empty() && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5))
            }
            ended => break ended,
        }
    };
    match (said.as_str(), ended) {
        ("", Some(signal)) => say(&format!("try {id}: blocked: ended by signal {signal}")),
        // It has become another program, or hangs; what it holds is for others to see.
        ("", None) => say(&format!("try {id}: silent")),
        (said, _) => say(&format!("try {id}: {}", said.trim_end().replace('\n', " "))),
    }
    Some(child)
}

/// The rest of an attempt whose success is that this program runs at all.
pub fn hold(id: &str) -> ExitCode {
    sys::name_process(&format!("x-{id}"));
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

pub fn say(line: &str) {
    let mut out = io::stdout().lock();
    // A log that nobody reads any more is no reason to stop.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

/// Text of the secret in a block of memory or a file, or an error when it is not there.
pub fn secret_in(bytes: &[u8], mark: &str) -> Outcome {
    let found = bytes.windows(mark.len()).position(|window| window == mark.as_bytes());
    let from = found.ok_or_else(|| io::Error::other("there was no secret in it"))?;
    let text: String = bytes
        .iter()
        .skip(from)
        .take(mark.len() + 32)
        .map(|byte| char::from(*byte))
        .filter(|c| c.is_ascii_graphic())
        .collect();
    Ok(text)
}
