//! An agent that takes all it can get: processes, descriptors, disk, and after the seconds that its argument says also
//! memory, which ends it. Says of each when it was first held: `fork held after 12 ms`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

fn main() {
    let seconds: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(10);
    println!("begins");
    // Each in a process of its own, so that one that is held holds up no other.
    for bomb in [descriptors, disk, forks] {
        if child() {
            bomb();
        }
    }
    std::thread::sleep(Duration::from_secs(seconds));
    println!("memory begins at {} ms", boot_ms());
    let mut kept: Vec<Vec<u8>> = Vec::new();
    loop {
        // Written to, so that it is charged.
        kept.push(vec![1; 1 << 20]);
        std::hint::black_box(&kept);
    }
}

/// True in the new process, and in the old one when there is none.
fn child() -> bool {
    // SAFETY: this program has one thread, so the child may allocate and use every library call.
    unsafe { libc::fork() == 0 }
}

fn held(what: &str, begin: Instant) {
    println!("{what} held after {} ms", begin.elapsed().as_millis());
}

/// Every process forks, and goes on when it is refused.
fn forks() {
    let begin = Instant::now();
    let mut first = true;
    loop {
        // SAFETY: as in `child`. What the copies do is the same as what this one does.
        let copy = unsafe { libc::fork() };
        if copy == 0 {
            first = false;
        }
        if copy == -1 && first {
            held("fork", begin);
            first = false;
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
