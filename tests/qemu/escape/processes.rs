//! Running programs, and other processes: classes B and C of the suite.

use crate::files::{c_path, done, read_secret};
use crate::scene::{Attempt, Outcome, Scene, secret_in};
use crate::sys::{self, Arg};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

pub const ATTEMPTS: &[Attempt] = &[
    ("7-root", |scene| through_proc(scene, "root/work/secret")),
    ("7-cwd", |scene| through_proc(scene, "cwd/secret")),
    ("19-memfd", from_memory),
    ("21-setuid", set_uid_program),
    ("22-copy", |scene| {
        let copy = scene.work.join("copy");
        fs::copy(std::env::current_exe()?, &copy)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o700))?;
        Err(Command::new(&copy).args(["hold", "22-copy"]).exec())
    }),
    ("29-ptrace", by_ptrace),
    ("30-mem", |scene| {
        let pid = scene.decoy("memory")?;
        search_memory(pid)
    }),
    ("30-environ", |scene| {
        let pid = scene.decoy("environ")?;
        read_secret(Path::new(&format!("/proc/{pid}/environ")), "escape-environ-")
    }),
    ("31-vmread", by_vm_read),
    ("32-getfd", by_getfd),
    ("32-signal", |scene| {
        let pidfd = sys::call(libc::SYS_pidfd_open, [Arg::N(scene.decoy("32-signal")?.into()), Arg::N(0)])?;
        let signal = [Arg::N(pidfd), Arg::N(libc::SIGKILL.into()), Arg::N(0), Arg::N(0)];
        done(sys::call(libc::SYS_pidfd_send_signal, signal))
    }),
    ("28-kill", kill),
    ("33-setns", |scene| {
        let pid = scene.process(&["neighbour"])?;
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&namespace);
        sys::call(libc::SYS_setns, [Arg::N(fd.into()), Arg::N(libc::CLONE_NEWNS.into())])?;
        read_secret(Path::new("/work/secret"), "escape-file-")
    }),
    ("34-daemon", |_| {
        // Twice, so that nobody waits for it, in a session of its own.
        if sys::fork()?.is_none() {
            let _ = sys::call(libc::SYS_setsid, [Arg::N(0)]);
            match sys::fork() {
                Ok(None) => loop {
                    std::thread::sleep(std::time::Duration::from_secs(3600));
                },
                _ => sys::exit_now(0),
            }
        }
        Err(io::Error::other("it shows only after the stop"))
    }),
    ("36-core", |scene| {
        let _ = fs::write("/proc/sys/kernel/core_pattern", "core");
        std::env::set_current_dir(&scene.work)?;
        let most = [u64::MAX.to_ne_bytes(), u64::MAX.to_ne_bytes()].concat();
        let _ = sys::call(libc::SYS_prlimit64, [Arg::N(0), Arg::N(4), Arg::In(&most), Arg::N(0)]);
        std::process::abort();
    }),
];

fn through_proc(scene: &Scene, path: &str) -> Outcome {
    let pid = scene.process(&["neighbour"])?;
    read_secret(Path::new(&format!("/proc/{pid}/{path}")), "escape-file-")
}

fn from_memory(_: &Scene) -> Outcome {
    let fd = sys::call(libc::SYS_memfd_create, [Arg::In(b"escape\0"), Arg::N(0)])?;
    let path = format!("/proc/self/fd/{fd}");
    fs::write(&path, fs::read(std::env::current_exe()?)?)?;
    Err(Command::new(&path).args(["hold", "19-memfd"]).exec())
}

/// A copy of this program that belongs to root: only root can make one, and only no_new_privs or nosuid spoil it.
fn set_uid_program(scene: &Scene) -> Outcome {
    let copy = scene.work.join("setuid");
    fs::copy(std::env::current_exe()?, &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755))?;
    fs::set_permissions(&scene.work, fs::Permissions::from_mode(0o755))?;
    // As some user of no importance.
    if sys::user_id() == 0 {
        let nobody = [Arg::N(65_534), Arg::N(65_534), Arg::N(65_534)];
        sys::call(libc::SYS_setresuid, nobody)?;
        // The folders above are closed to strangers, so the way goes by the folder that is already entered.
        return Err(Command::new("./setuid").args(["hold", "21-setuid"]).exec());
    }
    Err(Command::new(&copy).args(["hold", "21-setuid"]).exec())
}

/// The decoy named for it; where no other process is seen, every number.
fn kill(scene: &Scene) -> Outcome {
    let signal = |pid: u32| sys::call(libc::SYS_kill, [Arg::N(pid.into()), Arg::N(libc::SIGKILL.into())]);
    if let Ok(pid) = scene.decoy("28-kill") {
        return done(signal(pid));
    }
    let parent = std::os::unix::process::parent_id();
    let own_parent = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let own: Vec<u32> = own_parent
        .lines()
        .filter(|line| line.starts_with("Pid:") || line.starts_with("PPid:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse().ok())
        .chain([parent])
        .collect();
    let mut last = io::Error::other("there is nobody");
    for pid in 1..=2_000 {
        if own.contains(&pid) {
            continue;
        }
        match sys::call(libc::SYS_kill, [Arg::N(pid.into()), Arg::N(0)]) {
            // Somebody is there; our own other attempts are below this one's parent, and may be told to end.
            Ok(_) if is_own_attempt(pid) => {}
            Ok(_) => return done(signal(pid)),
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => last = error,
            Err(_) => {}
        }
    }
    Err(last)
}

fn is_own_attempt(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("x-"))
}

/// Where a process keeps what it has written: its heap and its own memory, without what is mapped from files.
fn writable_parts(pid: u32) -> io::Result<Vec<(u64, u64)>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let part = |line: &str| -> Option<(u64, u64)> {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        rest.starts_with("rw").then_some(())?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        Some((from, (to - from).min(1 << 20)))
    };
    Ok(maps.lines().filter_map(part).collect())
}

fn search_memory(pid: u32) -> Outcome {
    let mut memory = File::open(format!("/proc/{pid}/mem"))?;
    for (from, length) in writable_parts(pid)? {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        if memory.seek(SeekFrom::Start(from)).is_ok()
            && memory.read_exact(&mut bytes).is_ok()
            && let Ok(secret) = secret_in(&bytes, "escape-memory-")
        {
            return Ok(secret);
        }
    }
    Err(io::Error::other("the secret is not in its memory"))
}

fn by_ptrace(scene: &Scene) -> Outcome {
    const SEIZE: i64 = 0x4206;
    const INTERRUPT: i64 = 0x4207;
    // Where nobody is seen, pid 1 is there.
    let pid = scene.decoy("memory").unwrap_or(1);
    sys::call(libc::SYS_ptrace, [Arg::N(SEIZE), Arg::N(pid.into()), Arg::N(0), Arg::N(0)])?;
    sys::call(libc::SYS_ptrace, [Arg::N(INTERRUPT), Arg::N(pid.into()), Arg::N(0), Arg::N(0)])?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    // A word at a time, as a debugger of old.
    for (from, length) in writable_parts(pid)? {
        let mut bytes = Vec::new();
        for at in (from..from + length.min(1 << 18)).step_by(8) {
            let mut word = [0_u8; 8];
            let peek = [Arg::N(2), Arg::N(pid.into()), Arg::N(at.cast_signed()), Arg::Out(&mut word)];
            if sys::call(libc::SYS_ptrace, peek).is_err() {
                break;
            }
            bytes.extend(word);
        }
        if let Ok(secret) = secret_in(&bytes, "escape-memory-") {
            return Ok(secret);
        }
    }
    Err(io::Error::other("the secret is not in its memory"))
}

fn by_vm_read(scene: &Scene) -> Outcome {
    let pid = scene.decoy("memory").unwrap_or(1);
    let parts = writable_parts(pid).unwrap_or_else(|_| vec![(4096, 4096)]);
    let mut last = io::Error::other("the secret is not in its memory");
    for (from, length) in parts {
        let mut bytes = vec![0_u8; usize::try_from(length).unwrap_or(0)];
        let local = [(bytes.as_mut_ptr() as u64).to_ne_bytes(), length.to_ne_bytes()].concat();
        let remote = [from.to_ne_bytes(), length.to_ne_bytes()].concat();
        let read = [Arg::N(pid.into()), Arg::In(&local), Arg::N(1), Arg::In(&remote), Arg::N(1), Arg::N(0)];
        match sys::call(libc::SYS_process_vm_readv, read) {
            Ok(_) => {
                if let Ok(secret) = secret_in(&bytes, "escape-memory-") {
                    return Ok(secret);
                }
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn by_getfd(scene: &Scene) -> Outcome {
    let pid = scene.decoy("getfd").unwrap_or(1);
    let pidfd = sys::call(libc::SYS_pidfd_open, [Arg::N(pid.into()), Arg::N(0)])?;
    let mut last = io::Error::other("it has no such descriptor");
    for number in 3..32_i64 {
        match sys::call(libc::SYS_pidfd_getfd, [Arg::N(pidfd), Arg::N(number), Arg::N(0)]) {
            Ok(fd) => {
                let mut bytes = vec![0; 256];
                let read = [Arg::N(fd), Arg::Out(&mut bytes), Arg::N(256), Arg::N(0)];
                if sys::call(libc::SYS_pread64, read).is_ok()
                    && let Ok(secret) = secret_in(&bytes, "escape-getfd-")
                {
                    return Ok(secret);
                }
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// For paths that a kernel call takes by pointer.
pub fn path_of(text: &str) -> Vec<u8> {
    c_path(Path::new(text))
}
