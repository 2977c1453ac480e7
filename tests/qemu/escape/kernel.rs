//! The kernel's own surface: class D of the suite.

use crate::files::done;
use crate::processes::path_of;
use crate::scene::{Attempt, Outcome, Scene};
use crate::sys::{self, Arg};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

const X32_BIT: i64 = 0x4000_0000;
const TIOCSTI: i64 = 0x5412;
const NEWUSER: i64 = libc::CLONE_NEWUSER as i64;

pub const ATTEMPTS: &[Attempt] = &[
    ("23-filter", own_filter),
    ("24-x32", |scene| {
        // mkdir has the same number in both tables.
        let path = path_of(&scene.work.join("made-by-x32").to_string_lossy());
        done(sys::call(libc::SYS_mkdir | X32_BIT, [Arg::In(&path), Arg::N(0o700)]))
    }),
    ("24-ia32", ia32),
    ("37-uring", |_| {
        let mut parameters = [0_u8; 120];
        done(sys::call(libc::SYS_io_uring_setup, [Arg::N(4), Arg::Out(&mut parameters)]))
    }),
    ("38-uffd", |_| done(sys::call(libc::SYS_userfaultfd, [Arg::N(libc::O_CLOEXEC.into())]))),
    ("40-bpf", |_| {
        // An array of one number: type 2, key 4, value 4, entries 1.
        let mut attributes = [0_u8; 128];
        for (place, value) in [(0_usize, 2_u8), (4, 4), (8, 4), (12, 1)] {
            if let Some(byte) = attributes.get_mut(place) {
                *byte = value;
            }
        }
        done(sys::call(libc::SYS_bpf, [Arg::N(0), Arg::In(&attributes), Arg::N(128)]))
    }),
    ("40-perf", |_| {
        // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, of this process.
        let mut attributes = [0_u8; 128];
        for (place, value) in [(0_usize, 1_u8), (4, 128)] {
            if let Some(byte) = attributes.get_mut(place) {
                *byte = value;
            }
        }
        let open = [Arg::In(&attributes), Arg::N(0), Arg::N(-1), Arg::N(-1), Arg::N(0)];
        done(sys::call(libc::SYS_perf_event_open, open))
    }),
    ("41-userns", |_| done(sys::call(libc::SYS_unshare, [Arg::N(NEWUSER)]))),
    ("41-clone3", by_clone3),
    ("42-mount", |_| {
        let _ = fs::create_dir("/run/escape-mount");
        let target = path_of("/run/escape-mount");
        let mount = [Arg::In(b"escape-mount\0"), Arg::In(&target), Arg::In(b"tmpfs\0"), Arg::N(0), Arg::N(0)];
        done(sys::call(libc::SYS_mount, mount))
    }),
    ("42-fsopen", by_fsopen),
    ("42-chroot", |scene| {
        let path = path_of(&scene.work.to_string_lossy());
        done(sys::call(libc::SYS_chroot, [Arg::In(&path)]))
    }),
    ("43-reboot", |_| {
        // LINUX_REBOOT_CMD_CAD_ON: only a switch, which the bystander sees.
        let reboot = [Arg::N(0xfee1_dead), Arg::N(672_274_793), Arg::N(0x89ab_cdef), Arg::N(0)];
        done(sys::call(libc::SYS_reboot, reboot))
    }),
    ("43-time", |_| {
        // The time zone, which nothing uses: 77 minutes west.
        let zone = [77_i32.to_ne_bytes(), 0_i32.to_ne_bytes()].concat();
        done(sys::call(libc::SYS_settimeofday, [Arg::N(0), Arg::In(&zone)]))
    }),
    ("43-kexec", |_| {
        // One page of nothing, far up: never started, only loaded.
        let page = vec![0_u8; 4096];
        let segment = [
            (page.as_ptr() as u64).to_ne_bytes(),
            4096_u64.to_ne_bytes(),
            0x200_0000_u64.to_ne_bytes(),
            4096_u64.to_ne_bytes(),
        ]
        .concat();
        let load = [Arg::N(0x200_0000), Arg::N(1), Arg::In(&segment), Arg::N(0)];
        done(sys::call(libc::SYS_kexec_load, load))
    }),
    ("43-iopl", |_| {
        sys::call(libc::SYS_iopl, [Arg::N(3)])?;
        // The first serial port's data register.
        for byte in b"\r\nescape-mark 43-iopl\r\n" {
            sys::out_byte(0x3f8, *byte);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok("bytes went to a port".to_owned())
    }),
    ("43-hostname", |_| done(sys::call(libc::SYS_sethostname, [Arg::In(b"escaped"), Arg::N(7)]))),
    ("44-packet", |_| family(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("44-netlink", |_| family(libc::AF_NETLINK, libc::SOCK_RAW, 0)),
    ("44-alg", |_| family(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
    ("44-vsock", |_| family(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    ("44-tipc", |_| family(libc::AF_TIPC, libc::SOCK_SEQPACKET, 0)),
    ("44-rds", |_| family(libc::AF_RDS, libc::SOCK_SEQPACKET, 0)),
    ("44-key", |_| family(libc::AF_KEY, libc::SOCK_RAW, 2)),
    ("44-can", |_| family(libc::AF_CAN, libc::SOCK_RAW, 1)),
    ("44-sctp", |_| family(libc::AF_INET, libc::SOCK_SEQPACKET, libc::IPPROTO_SCTP)),
    ("44-xdp", |_| family(libc::AF_XDP, libc::SOCK_RAW, 0)),
    // BTPROTO_HCI.
    ("44-bluetooth", |_| family(libc::AF_BLUETOOTH, libc::SOCK_RAW, 1)),
    ("45-tiocsti", |_| type_into_terminal(TIOCSTI, b"1")),
    ("45-high", |_| type_into_terminal(TIOCSTI | 1 << 32, b"2")),
    ("47-pids", |scene| {
        // Its own group, whatever the run is called.
        let agent = scene.package.parent().and_then(|folder| folder.file_name()).unwrap_or_default();
        let group = std::path::Path::new("/sys/fs/cgroup/agents").join(agent);
        let mut last = io::Error::other("no group is seen");
        for run in fs::read_dir(&group)?.flatten().filter(|entry| entry.path().is_dir()) {
            match fs::write(run.path().join("pids.max"), "max") {
                Ok(()) => return Ok("it has no limit any more".to_owned()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }),
];

/// A filter that hands calls to another process to be answered (seccomp_unotify(2)).
fn own_filter(_: &Scene) -> Outcome {
    // One instruction: BPF_RET, SECCOMP_RET_ALLOW.
    let program =
        [0x0006_u16.to_ne_bytes().to_vec(), vec![0, 0], 0x7fff_0000_u32.to_ne_bytes().to_vec()].concat();
    let mut about = 1_u16.to_ne_bytes().to_vec();
    about.extend([0; 6]);
    about.extend((program.as_ptr() as u64).to_ne_bytes());
    const MODE_FILTER: i64 = 1;
    const NEW_LISTENER: i64 = 8;
    done(sys::call(libc::SYS_seccomp, [Arg::N(MODE_FILTER), Arg::N(NEW_LISTENER), Arg::In(&about)]))
}

fn ia32(scene: &Scene) -> Outcome {
    const MKDIR: u32 = 39;
    let path = std::ffi::CString::new(scene.work.join("made-by-ia32").to_string_lossy().into_owned())
        .map_err(io::Error::other)?;
    done(sys::call_ia32(MKDIR, &path, 0o700))
}

/// The new process keeps the attempt's name and waits like it.
fn by_clone3(_: &Scene) -> Outcome {
    let mut arguments = [0_u8; 88];
    for (place, value) in [(0_usize, NEWUSER.cast_unsigned()), (32, u64::from(libc::SIGCHLD.unsigned_abs()))]
    {
        if let Some(field) = arguments.get_mut(place..place + 8) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
    match sys::call(libc::SYS_clone3, [Arg::In(&arguments), Arg::N(88)])? {
        0 => loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        },
        pid => Ok(format!("process {pid}")),
    }
}

fn by_fsopen(_: &Scene) -> Outcome {
    const SET_STRING: i64 = 1;
    const CREATE: i64 = 6;
    const FROM_FD: i64 = 4;
    let context = sys::call(libc::SYS_fsopen, [Arg::In(b"tmpfs\0"), Arg::N(0)])?;
    let source =
        [Arg::N(context), Arg::N(SET_STRING), Arg::In(b"source\0"), Arg::In(b"escape-fsopen\0"), Arg::N(0)];
    sys::call(libc::SYS_fsconfig, source)?;
    sys::call(libc::SYS_fsconfig, [Arg::N(context), Arg::N(CREATE), Arg::N(0), Arg::N(0), Arg::N(0)])?;
    let mount = sys::call(libc::SYS_fsmount, [Arg::N(context), Arg::N(0), Arg::N(0)])?;
    let _ = fs::create_dir("/run/escape-fsopen");
    let target = path_of("/run/escape-fsopen");
    let here = i64::from(libc::AT_FDCWD);
    done(sys::call(
        libc::SYS_move_mount,
        [Arg::N(mount), Arg::In(b"\0"), Arg::N(here), Arg::In(&target), Arg::N(FROM_FD)],
    ))
}

/// The descriptor stays open, for the bystander to see.
fn family(family: i32, kind: i32, protocol: i32) -> Outcome {
    done(sys::call(libc::SYS_socket, [Arg::N(family.into()), Arg::N(kind.into()), Arg::N(protocol.into())]))
}

fn type_into_terminal(request: i64, text: &[u8]) -> Outcome {
    let terminal = match File::options().read(true).write(true).open("/dev/tty9") {
        Ok(terminal) => terminal.into_raw_fd(),
        // Standard input, whatever it is: the filter answers before the pipe does.
        Err(error) => {
            let on_input = sys::call(libc::SYS_ioctl, [Arg::N(0), Arg::N(request), Arg::In(text)]);
            return on_input.map(|_| "it was done".to_owned()).map_err(|_| error);
        }
    };
    done(sys::call(libc::SYS_ioctl, [Arg::N(terminal.as_raw_fd().into()), Arg::N(request), Arg::In(text)]))
}
