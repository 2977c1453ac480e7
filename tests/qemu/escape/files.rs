//! Files, file systems and devices: classes A of the suite.

use crate::scene::{Attempt, Outcome, Scene, secret_in};
use crate::sys::{self, Arg};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

pub const ATTEMPTS: &[Attempt] = &[
    ("1-read", |scene| read_secret(&scene.neighbour.join("work/secret"), "escape-file-")),
    ("1-write", |scene| done(fs::write(scene.neighbour.join("work/file"), "harmed"))),
    ("1-data", |_| done(fs::write("/data/agents/planted", "harmed"))),
    ("1-state", |_| done(fs::write("/state/planted", "harmed"))),
    ("2-truncate", |scene| {
        let path = c_path(&scene.neighbour.join("work/long"));
        done(sys::call(libc::SYS_truncate, [Arg::In(&path), Arg::N(1)]))
    }),
    ("2-chmod", |scene| {
        done(fs::set_permissions(scene.neighbour.join("work/modes"), fs::Permissions::from_mode(0o666)))
    }),
    ("2-utimes", |scene| {
        let path = c_path(&scene.neighbour.join("work/times"));
        // Now, for both times: the neighbour's file is of 1970.
        done(sys::call(
            libc::SYS_utimensat,
            [Arg::N(libc::AT_FDCWD.into()), Arg::In(&path), Arg::N(0), Arg::N(0)],
        ))
    }),
    ("4-stat", |scene| {
        let about = fs::metadata(scene.neighbour.join("work/secret"))?;
        Ok(format!("escape-stat-{}-{}", about.ino(), about.mtime_nsec()))
    }),
    ("6-fd", leaked_descriptor),
    ("9-link", |scene| done(fs::hard_link(scene.neighbour.join("work/linked"), scene.work.join("stolen")))),
    ("10-rename", |scene| done(fs::rename(scene.package.join("spare"), scene.work.join("spare")))),
    ("11-handle", by_handle),
    ("12-shm", |scene| {
        let neighbour = scene.process(&["neighbour"])?;
        read_secret(Path::new(&format!("/proc/{neighbour}/root/dev/shm/secret")), "escape-shm-")
    }),
    ("12-sysv", |_| secret_in(&sys::shared_memory(crate::bystander::SHM_KEY, None)?, "escape-sysv-")),
    ("12-mqueue", |_| {
        let open = [Arg::In(b"escape\0"), Arg::N(libc::O_RDONLY.into()), Arg::N(0), Arg::N(0)];
        let queue = sys::call(libc::SYS_mq_open, open)?;
        let mut message = vec![0; 8192];
        let receive = [Arg::N(queue), Arg::Out(&mut message), Arg::N(8192), Arg::N(0), Arg::N(0)];
        sys::call(libc::SYS_mq_timedreceive, receive)?;
        secret_in(&message, "escape-mqueue-")
    }),
    ("13-manifest", |scene| done(append(&scene.package.join("agent.toml"), b"\n[fs]\nread = [\"/data\"]\n"))),
    ("16-modprobe", |_| done(fs::write("/proc/sys/kernel/modprobe", "/escape"))),
    ("16-core", |_| done(fs::write("/proc/sys/kernel/core_pattern", "/escape"))),
    ("17-kmsg", |_| done(append(Path::new("/dev/kmsg"), b"<0>escape-mark 17-kmsg\n"))),
    ("17-mknod", |scene| {
        // Device 1:11 is the kernel's log.
        let path = c_path(&scene.work.join("node"));
        done(sys::call(
            libc::SYS_mknod,
            [Arg::In(&path), Arg::N((libc::S_IFCHR | 0o666).into()), Arg::N(0x010b)],
        ))
    }),
    ("17-disk", raw_disk),
    ("17-sysrq", |_| done(fs::write("/proc/sysrq-trigger", "h"))),
    ("17-mem", |_| keep(File::open("/dev/mem")?)),
    ("18-dmesg", |_| {
        let mut log = vec![0; 1 << 18];
        const READ_ALL: i64 = 3;
        let read = sys::call(libc::SYS_syslog, [Arg::N(READ_ALL), Arg::Out(&mut log), Arg::N(1 << 18)])?;
        log.truncate(usize::try_from(read).unwrap_or(0));
        secret_in(&log, "escape-dmesg-")
    }),
    ("18-kallsyms", |_| kernel_address()),
    ("18-kcore", |_| keep(File::open("/proc/kcore")?)),
];

/// What is found at this path is said only when it holds the secret.
pub fn read_secret(path: &Path, mark: &str) -> Outcome {
    secret_in(&fs::read(path)?, mark)
}

pub fn done<T>(result: io::Result<T>) -> Outcome {
    result.map(|_| "it was done".to_owned())
}

/// Stays open for the life of the attempt's process.
pub fn keep(file: File) -> Outcome {
    std::mem::forget(file);
    Ok("it is open".to_owned())
}

pub fn c_path(path: &Path) -> Vec<u8> {
    let mut bytes = path.as_os_str().as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(bytes)
}

/// Any descriptor beyond the pipes: what it is, and what can be reached from it.
fn leaked_descriptor(scene: &Scene) -> Outcome {
    let inside = scene.neighbour.strip_prefix("/data").unwrap_or(&scene.neighbour).join("work/secret");
    let path = c_path(&inside);
    for number in 3..256_i64 {
        let open = [Arg::N(number), Arg::In(&path), Arg::N(libc::O_RDONLY.into())];
        if let Ok(fd) = sys::call(libc::SYS_openat, open) {
            let mut bytes = vec![0; 256];
            sys::call(libc::SYS_read, [Arg::N(fd), Arg::Out(&mut bytes), Arg::N(256)])?;
            return secret_in(&bytes, "escape-file-");
        }
    }
    Err(io::Error::other("no descriptor leads there"))
}

fn by_handle(scene: &Scene) -> Outcome {
    let path = c_path(&scene.neighbour.join("work/secret"));
    // struct file_handle: bytes, type, handle.
    let mut handle = vec![0_u8; 8 + 128];
    if let Some(size) = handle.get_mut(..4) {
        size.copy_from_slice(&128_u32.to_ne_bytes());
    }
    let mut mount = [0_u8; 4];
    let name = [
        Arg::N(libc::AT_FDCWD.into()),
        Arg::In(&path),
        Arg::Out(&mut handle),
        Arg::Out(&mut mount),
        Arg::N(0),
    ];
    sys::call(libc::SYS_name_to_handle_at, name)?;
    let folder = File::open("/data")?;
    let at = i64::from(std::os::fd::AsRawFd::as_raw_fd(&folder));
    let fd = sys::call(
        libc::SYS_open_by_handle_at,
        [Arg::N(at), Arg::In(&handle), Arg::N(libc::O_RDONLY.into())],
    )?;
    let mut bytes = vec![0; 256];
    sys::call(libc::SYS_read, [Arg::N(fd), Arg::Out(&mut bytes), Arg::N(256)])?;
    secret_in(&bytes, "escape-file-")
}

/// The partition that stays empty: 64 MiB whose first bytes the test reads when the machine is off.
fn raw_disk(scene: &Scene) -> Outcome {
    let mut blocks = String::new();
    File::open("/proc/partitions")?.read_to_string(&mut blocks)?;
    let fields = |line: &str| -> Option<(i64, i64)> {
        let mut fields = line.split_whitespace();
        let (major, minor) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (kib, name) = (fields.next()?, fields.next()?);
        (kib == "65536" && name.ends_with('7')).then_some((major, minor))
    };
    let (major, minor) = blocks.lines().find_map(fields).unwrap_or((252, 7));
    let path = scene.work.join("disk");
    let node = [Arg::In(&c_path(&path)), Arg::N((libc::S_IFBLK | 0o600).into()), Arg::N(major << 8 | minor)];
    sys::call(libc::SYS_mknod, node)?;
    let mut disk = OpenOptions::new().write(true).open(&path)?;
    disk.seek(SeekFrom::Start(0))?;
    let agent =
        scene.package.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    let mut sector = format!("escape-mark 17-disk {agent}").into_bytes();
    sector.resize(512, 0);
    disk.write_all(&sector)?;
    done(disk.sync_all())
}

fn kernel_address() -> Outcome {
    let symbols = fs::read_to_string("/proc/kallsyms")?;
    let line = symbols.lines().find(|line| line.ends_with(" _stext"));
    match line.and_then(|line| line.split(' ').next()) {
        Some(address) if address.bytes().any(|byte| byte != b'0') => Ok(format!("escape-kallsyms-{address}")),
        _ => Err(io::Error::other("no address is shown")),
    }
}
