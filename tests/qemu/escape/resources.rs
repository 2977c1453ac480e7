//! More than the agent's share of the machine: class H of the suite.
//!
//! Each stops at some multiple of the limits that the suite's manifest sets: 64 processes, 64 MiB, half a processor,
//! 16 MiB and 400 files on disk.

use crate::files::{c_path, done};
use crate::scene::{Attempt, Outcome, Scene};
use crate::sys::{self, Arg};
use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Somebody else's account.
pub const OTHER: i64 = 12_345;
const FORKS: usize = 150;
const DISK_BYTES: usize = 24 << 20;
const FILES: usize = 600;
const MEMORY_BYTES: usize = 160 << 20;

pub const ATTEMPTS: &[Attempt] = &[
    ("81-fifo", |_| {
        let priority = 10_i32.to_ne_bytes();
        const FIFO: i64 = 1;
        done(sys::call(libc::SYS_sched_setscheduler, [Arg::N(0), Arg::N(FIFO), Arg::In(&priority)]))
    }),
    ("81-nice", |_| done(sys::call(libc::SYS_setpriority, [Arg::N(0), Arg::N(0), Arg::N(-15)]))),
    ("81-cpu", |_| {
        // The bystander measures. Two loops, because the share is of one processor.
        let until = Instant::now() + Duration::from_secs(6);
        let burn = move || {
            while Instant::now() < until {
                std::hint::black_box((0..10_000_u64).fold(1, |a: u64, b| a.wrapping_mul(b | 1)));
            }
        };
        let second = std::thread::spawn(burn);
        burn();
        let _ = second.join();
        Err(io::Error::other("how much it got is measured outside"))
    }),
    ("82-chown", |scene| {
        let path = scene.work.join("given");
        File::create(&path)?.write_all(&[1; 4096])?;
        done(sys::call(libc::SYS_chown, [Arg::In(&c_path(&path)), Arg::N(OTHER), Arg::N(OTHER)]))
    }),
    ("82-inodes", |scene| {
        let folder = scene.work.join("many");
        std::fs::create_dir(&folder)?;
        for number in 0..FILES {
            File::create(folder.join(number.to_string()))?;
        }
        Ok("they are all there".to_owned())
    }),
    ("82-disk", fill_disk),
    ("79-threads", |_| {
        for _ in 0..FORKS {
            std::thread::Builder::new().stack_size(64 << 10).spawn(|| {
                loop {
                    std::thread::sleep(Duration::from_secs(3600));
                }
            })?;
        }
        Ok("they all run".to_owned())
    }),
    ("79-forks", |_| {
        for _ in 0..FORKS {
            if sys::fork()?.is_none() {
                // Nobody is left behind when the attempt ends.
                sys::die_with_parent();
                loop {
                    std::thread::sleep(Duration::from_secs(3600));
                }
            }
        }
        Ok("they all run".to_owned())
    }),
    ("80-memory", |_| {
        let mut eaten = Vec::new();
        while eaten.len() << 20 < MEMORY_BYTES {
            eaten.push(vec![1_u8; 1 << 20]);
        }
        std::mem::forget(eaten);
        Ok("it is all ours".to_owned())
    }),
];

fn fill_disk(scene: &Scene) -> Outcome {
    let mut file = File::create(scene.work.join("fill"))?;
    let block = vec![1_u8; 1 << 20];
    for _ in 0..DISK_BYTES >> 20 {
        file.write_all(&block)?;
    }
    done(file.sync_all())
}
