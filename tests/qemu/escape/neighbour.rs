//! The agent that is attacked: it has secrets, files and processes, and says what happens to them.
//!
//! Always: after each harm it puts itself right again, so that one neighbour serves a whole matrix of attackers. Each
//!         harm has a number of its own, by which the test tells old from new.

use crate::scene::say;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, SystemTime};

const LOOK: Duration = Duration::from_millis(300);
/// Few lines, because a log keeps the newest ones only.
const LOOKS_PER_LINE: u32 = 6;
const LONG_BYTES: usize = 4096;

/// Something nobody can guess.
pub fn random() -> String {
    let mut bytes = [0_u8; 12];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    assert!(read.is_ok(), "no randomness: {read:?}");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Counts what happened.
#[derive(Default)]
pub struct Harms {
    told: u32,
    looks: u32,
}

impl Harms {
    pub fn report(&mut self, id: &str) {
        self.told += 1;
        say(&format!("harm {} {id}", self.told));
    }

    /// The test waits for these instead of for a time: what happened before the one before last has been seen.
    pub fn looked(&mut self) {
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS_PER_LINE) {
            say(&format!("looked {}", self.looks / LOOKS_PER_LINE));
        }
    }
}

pub fn run() -> ExitCode {
    match watch() {
        Err(error) => {
            say(&format!("the neighbour ended: {error}"));
            ExitCode::FAILURE
        }
        Ok(never) => match never {},
    }
}

fn watch() -> io::Result<std::convert::Infallible> {
    make_secrets()?;
    let mut decoys: Vec<(&str, Child)> = Vec::new();
    for name in ["28-kill", "32-signal", "memory", "getfd", "environ"] {
        decoys.push((name, start_decoy(name)?));
    }
    for put_right in PUT_RIGHT {
        put_right.1()?;
    }
    say("ready");
    let mut harms = Harms::default();
    loop {
        std::thread::sleep(LOOK);
        for (id, put_right, is_harmed) in PUT_RIGHT {
            if is_harmed() {
                harms.report(id);
                put_right()?;
            }
        }
        for (name, decoy) in &mut decoys {
            if decoy.try_wait()?.is_some() {
                harms.report(name);
                *decoy = start_decoy(name)?;
            }
        }
        harms.looked();
    }
}

type Watched = (&'static str, fn() -> io::Result<()>, fn() -> bool);

/// What is looked at, how it is made, and how harm shows.
const PUT_RIGHT: &[Watched] = &[
    (
        "1-write",
        || fs::write("file", "untouched"),
        || !fs::read("file").is_ok_and(|text| text == b"untouched"),
    ),
    ("2-truncate", || fs::write("long", vec![1; LONG_BYTES]), || length("long") != LONG_BYTES as u64),
    (
        "2-chmod",
        || {
            fs::write("modes", "")?;
            fs::set_permissions("modes", fs::Permissions::from_mode(0o600))
        },
        || fs::metadata("modes").map_or(0, |about| about.mode() & 0o777) != 0o600,
    ),
    (
        "2-utimes",
        || {
            let file = File::create("times")?;
            file.set_times(fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH))
        },
        || fs::metadata("times").map_or(1, |about| about.mtime()) != 0,
    ),
    (
        "9-link",
        || {
            let _ = fs::remove_file("linked");
            fs::write("linked", "")
        },
        || fs::metadata("linked").map_or(0, |about| about.nlink()) != 1,
    ),
];

fn length(name: &str) -> u64 {
    fs::metadata(name).map_or(0, |about| about.len())
}

fn make_secrets() -> io::Result<()> {
    let text = format!("escape-file-{}", random());
    fs::write("secret", &text)?;
    say(&format!("secret {text}"));
    let about = fs::metadata("secret")?;
    say(&format!("secret escape-stat-{}-{}", about.ino(), about.mtime_nsec()));
    let text = format!("escape-shm-{}", random());
    fs::write("/dev/shm/secret", &text)?;
    say(&format!("secret {text}"));
    Ok(())
}

fn start_decoy(name: &str) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["decoy", name]);
    if name == "environ" {
        let text = format!("escape-environ-{}", random());
        say(&format!("secret {text}"));
        command.env("ESCAPE_SECRET", text);
    }
    command.spawn()
}

/// A process to attack.
pub fn decoy(name: &str) -> ExitCode {
    match name {
        "memory" => {
            let text = format!("escape-memory-{}", random());
            say(&format!("secret {text}"));
            crate::sys::keep_in_memory(&text);
        }
        "getfd" => {
            let text = format!("escape-getfd-{}", random());
            say(&format!("secret {text}"));
            let made = File::options().read(true).write(true).create(true).truncate(true).open("taken");
            if let Ok(mut file) = made {
                let written = file.write_all(text.as_bytes()).and_then(|()| fs::remove_file("taken"));
                if let Err(error) = written {
                    say(&format!("the decoy has no file: {error}"));
                }
                // Open as long as this process lives.
                let _ = file.into_raw_fd();
            }
        }
        _ => {}
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
