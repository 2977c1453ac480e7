//! Do the walls hold for this very process?
//!
//! In:     a process that has just become what the agent will be. Out: Ok, or the first escape that succeeded.
//! Always: runs at every start, after the last wall. Each attempt must fail with an errno that only the wall gives, so
//!         that a missing wall is not mistaken for a missing feature. A seccomp answer is EPERM even for a call that
//!         this kernel does not have. What no attempt would show, because another wall stands before it, is read from
//!         what the kernel says about this process (proc_pid_status(5)).
//! Never:  an attempt that would do harm if it succeeded, beyond ending this process, which happens anyway.
//! Source: the idea of a live probe is Certora/AutoProver's (pull request 73).
#![allow(unsafe_code)]

use super::{Failure, step};
use agentd_domain::plan::{Mount, SandboxPlan};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use std::net::{Ipv4Addr, SocketAddrV4};

pub(super) fn all_walls_hold(plan: &SandboxPlan) -> Result<(), Failure> {
    forbidden_calls()?;
    files_outside(plan)?;
    network(plan)?;
    processes()?;
    identity(plan)?;
    interfaces()
}

/// System calls that the filter must refuse before the kernel looks at their arguments.
fn forbidden_calls() -> Result<(), Failure> {
    const NEWUSER: i64 = libc::CLONE_NEWUSER as i64;
    const TIOCSTI_HIGH: i64 = 0x5412 | 1 << 32;
    let attempts: [(&str, i64, [i64; 3]); 16] = [
        ("unshare(CLONE_NEWUSER)", libc::SYS_unshare, [NEWUSER, 0, 0]),
        ("mount", libc::SYS_mount, [0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [0, 0, 0]),
        ("chroot", libc::SYS_chroot, [0, 0, 0]),
        ("setns", libc::SYS_setns, [-1, 0, 0]),
        ("ptrace(PTRACE_TRACEME)", libc::SYS_ptrace, [0, 0, 0]),
        ("pidfd_open(1)", libc::SYS_pidfd_open, [1, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -3, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, [0, 0, 0]),
        ("setresuid(0)", libc::SYS_setresuid, [0, 0, 0]),
        ("seccomp", libc::SYS_seccomp, [0, 0, 0]),
        ("ioctl(TIOCSTI | 1 << 32)", libc::SYS_ioctl, [0, TIOCSTI_HIGH, 0]),
    ];
    for (name, number, arguments) in attempts {
        expect(name, raw_call(number, arguments), &[Errno::PERM])?;
    }
    expect("clone3", raw_call(libc::SYS_clone3, [0, 0, 0]), &[Errno::NOSYS])?;
    // CLONE_NEWUSER through the one call whose other flags are allowed.
    expect(
        "clone(CLONE_NEWUSER)",
        raw_call(libc::SYS_clone, [NEWUSER | i64::from(libc::SIGCHLD), 0, 0]),
        &[Errno::PERM],
    )
}

fn files_outside(plan: &SandboxPlan) -> Result<(), Failure> {
    let gone = [Errno::NOENT, Errno::ACCESS, Errno::PERM];
    for path in [
        "/data",
        "/state",
        "/sys/kernel",
        "/run/agentd/launcher.sock",
        "/proc/1/root/etc",
        "/proc/sys/kernel",
    ] {
        expect(&format!("open({path})"), open(path, OFlags::RDONLY), &gone)?;
    }
    let walls = [Errno::ACCESS, Errno::ROFS];
    let create = OFlags::WRONLY | OFlags::CREATE;
    expect("create(/probe)", open("/probe", create), &walls)?;
    for mount in &plan.mounts {
        if let Mount::ReadOnly { target, optional: false, .. } = mount {
            expect(&format!("create in {target}"), open(&format!("{target}/.probe"), create), &walls)?;
        }
    }
    // The list of the root's folders is nobody's business; Landlock alone stops this one.
    expect("open(/)", open("/", OFlags::RDONLY | OFlags::DIRECTORY), &[Errno::ACCESS])
}

/// A port on which nothing of the appliance listens for agents, whatever the plan says: one of these.
const PORTS_OUTSIDE: [u16; 2] = [8443, 8444];

fn network(plan: &SandboxPlan) -> Result<(), Failure> {
    for (name, family) in [
        ("AF_NETLINK", AddressFamily::NETLINK),
        ("AF_PACKET", AddressFamily::PACKET),
        ("AF_ALG", AddressFamily::from_raw(38)),
        ("AF_VSOCK", AddressFamily::from_raw(40)),
    ] {
        let attempt = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None);
        expect(&format!("socket({name})"), attempt.map(drop), &[Errno::PERM])?;
    }
    let raw = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, None);
    expect("socket(AF_INET, SOCK_RAW)", raw.map(drop), &[Errno::PERM])?;
    let datagrams = plan.seccomp.datagram_families.as_slice();
    for (name, family) in [("AF_INET", AddressFamily::INET), ("AF_INET6", AddressFamily::INET6)] {
        if !datagrams.contains(&u32::from(family.as_raw())) {
            let datagram = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
            expect(&format!("socket({name}, SOCK_DGRAM)"), datagram.map(drop), &[Errno::PERM])?;
        }
    }
    let stream = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let outside = PORTS_OUTSIDE.into_iter().find(|port| !plan.landlock.connect_tcp.contains(port));
    if let (Ok(stream), Some(port)) = (stream, outside) {
        // Landlock answers EACCES before the empty network could answer ECONNREFUSED.
        let attempt = connect(&stream, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        expect(&format!("connect(127.0.0.1:{port})"), attempt, &[Errno::ACCESS])?;
    }
    Ok(())
}

fn processes() -> Result<(), Failure> {
    let pid_1 = rustix::process::Pid::INIT;
    // Same uid, same pid namespace: what stands between is the Landlock scope.
    expect("kill(1, 0)", rustix::process::test_kill_process(pid_1), &[Errno::PERM])?;
    for path in ["/proc/1/mem", "/proc/1/environ"] {
        expect(
            &format!("open({path})"),
            open(path, OFlags::RDONLY),
            &[Errno::NOENT, Errno::ACCESS, Errno::PERM],
        )?;
    }
    Ok(())
}

/// Own user and group, no capability in any set, filter and no_new_privs set, and a parent that is the namespace's
/// pid 1 (the jail) or, for a call that came in from outside, nobody in it.
fn identity(plan: &SandboxPlan) -> Result<(), Failure> {
    let text = step("self-probe", std::fs::read_to_string("/proc/self/status"))?;
    let own = plan.uid.to_string();
    let values = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.map(|line| line.split_ascii_whitespace())
    };
    for (key, wanted) in [
        ("Uid", [own.as_str()].as_slice()),
        ("Gid", &[own.as_str()]),
        ("CapInh", NO_CAPABILITY),
        ("CapPrm", NO_CAPABILITY),
        ("CapEff", NO_CAPABILITY),
        ("CapBnd", NO_CAPABILITY),
        ("CapAmb", NO_CAPABILITY),
        ("NoNewPrivs", &["1"]),
        ("Seccomp", SECCOMP_FILTER),
        ("PPid", &["1", "0"]),
    ] {
        if !values(key).is_some_and(|mut values| values.all(|value| wanted.contains(&value))) {
            let is = values(key).map(Iterator::collect::<Vec<_>>).unwrap_or_default().join(" ");
            return step("self-probe", Err(format!("{key} is {is:?} and not {}", wanted.join(" or "))));
        }
    }
    Ok(())
}

const NO_CAPABILITY: &[&str] = &["0000000000000000"];
/// `SECCOMP_MODE_FILTER`.
const SECCOMP_FILTER: &[&str] = &["2"];

/// An empty network has one interface.
fn interfaces() -> Result<(), Failure> {
    let text = step("self-probe", std::fs::read_to_string("/proc/self/net/dev"))?;
    let other = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() != "lo");
    match other {
        None => Ok(()),
        Some((name, _)) => step("self-probe", Err(format!("the network has the interface {}", name.trim()))),
    }
}

fn open(path: &str, flags: OFlags) -> Result<(), Errno> {
    rustix::fs::openat(rustix::fs::CWD, path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o600)).map(drop)
}

fn expect(name: &str, attempt: Result<(), Errno>, walls: &[Errno]) -> Result<(), Failure> {
    match attempt {
        Err(errno) if walls.contains(&errno) => Ok(()),
        Err(errno) => step("self-probe", Err(format!("{name} failed, but not at the wall: {errno}"))),
        Ok(()) => step("self-probe", Err(format!("{name} succeeded"))),
    }
}

fn raw_call(number: i64, [first, second, third]: [i64; 3]) -> Result<(), Errno> {
    // SAFETY: every pointer argument among the attempts is null, so the kernel can read or write nothing of this
    // process. Should `clone` succeed, both copies are single-threaded and report a broken wall; should any other
    // succeed, the process is about to exit because of it.
    let returned = unsafe { libc::syscall(number, first, second, third, 0_i64, 0_i64, 0_i64) };
    if returned == -1 {
        Err(std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))
    } else {
        Ok(())
    }
}
