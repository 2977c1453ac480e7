//! An agent that takes all it can get: processes, descriptors, disk, and after the seconds that its argument says also
//! memory, which ends it. Says of each when it was first held: `fork held after 12 ms`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

const PROGRAM: &str = "/agent/bin/bombs";

fn main() {
    let word = std::env::args().nth(1).unwrap_or_default();
    match word.as_str() {
        "fork" => forks(Told::NotYet),
        "fork-again" => forks(Told::Already),
        "descriptors" => descriptors(),
        "disk" => disk(),
        seconds => all(seconds.parse().unwrap_or(10)),
    }
}

/// Each in a process of its own, so that one that is held holds up no other.
fn all(seconds: u64) {
    println!("begins");
    println!("begins at {} ms of the boot clock", boot_ms());
    for bomb in ["descriptors", "disk", "fork"] {
        if let Err(error) = Command::new(PROGRAM).arg(bomb).spawn() {
            println!("no {bomb}: {error}");
        }
    }
    std::thread::sleep(Duration::from_secs(seconds));
    println!("memory begins");
    let mut kept: Vec<Vec<u8>> = Vec::new();
    loop {
        // Written to, so that it is charged.
        kept.push(vec![1; 1 << 20]);
        std::hint::black_box(&kept);
    }
}

fn held(what: &str, begin: Instant) {
    println!("{what} held after {} ms", begin.elapsed().as_millis());
}

#[derive(PartialEq)]
enum Told {
    NotYet,
    Already,
}

/// Every process starts others, and goes on when it is refused.
fn forks(mut told: Told) {
    let begin = Instant::now();
    loop {
        let refused = Command::new(PROGRAM).arg("fork-again").spawn().is_err();
        if refused && told == Told::NotYet {
            held("fork", begin);
            told = Told::Already;
        }
    }
}

fn descriptors() {
    let begin = Instant::now();
    let mut open = Vec::new();
    let mut told = false;
    loop {
        match File::open("/dev/null") {
            Ok(file) => open.push(file),
            Err(_) if told => open.clear(),
            Err(_) => {
                held("descriptors", begin);
                told = true;
            }
        }
    }
}

fn disk() {
    let begin = Instant::now();
    let block = vec![7; 1 << 20];
    let mut told = false;
    loop {
        let Ok(mut file) = File::create("/work/fill") else { continue };
        while file.write_all(&block).is_ok() {}
        if !told {
            held("disk", begin);
            told = true;
        }
        drop(file);
        let _ = std::fs::remove_file("/work/fill");
    }
}

fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
