//! What may agentd itself not do, even if somebody makes it run their code?
//!
//! In:    the places it needs, and whether it listens already. Out: the walls are up, or an error; then agentd starts
//!        no agents and says so (`main.rs`).
//! Always: called once, before any thread exists: both walls hold for the calling thread and all it makes.
//! Walls: Landlock lets it read the system and write three folders; no signal and no abstract socket reaches outside.
//!        The one socket that it listens on was made before: afterwards no TCP port can be bound, and listen(2) fails,
//!        as it would pick a port by itself for a socket without one, which Landlock does not see. It may connect, and
//!        use UDP: agents' rules name any host and port, names are asked for by UDP, and Landlock knows no addresses.
//!        Who is dialled is decided by the egress alone, which somebody with agentd's code is not held to.
//!        Seccomp takes away programs, processes, namespaces, mounts, kernel interfaces that nothing here needs, every
//!        address family but Unix and IP, and of IP everything but TCP and UDP.
//! Sources: landlock(7), seccomp(2), listen(2), ip(7), Documentation/userspace-api/landlock.rst.

use crate::places::Places;
use agentd_domain::fault::Report;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::path::Path;

/// Where netd's resolv.conf is, to which `/etc/resolv.conf` points.
const NAME_SERVERS: &str = "/run/netd";
/// For packets of the link, as it was before AF_PACKET (socket(2)).
const SOCK_PACKET: i32 = 10;
/// Scopes for signals and abstract sockets came with Linux 6.12.
const LANDLOCK_ABI: ABI = ABI::V6;

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("Landlock: {path}: {source}")]
    Path { path: String, source: landlock::PathFdError },
    #[error("Landlock is only {0:?}")]
    Partly(RulesetStatus),
    #[error("seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("seccomp: {0}")]
    Apply(#[from] seccompiler::Error),
}

impl ConfineError {
    pub fn report(&self) -> Report {
        Report::environment(
            "own_walls_missing",
            "no agent is started",
            format!("agentd could not shut itself in: {self}"),
            "start the appliance with its own kernel and without `lsm=` on the command line",
        )
    }
}

/// The console's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listening {
    Begun,
    /// It could not be made, and will be tried again: this port may be bound.
    NotYet(u16),
}

pub fn confine(places: &Places, listening: Listening) -> Result<(), ConfineError> {
    landlock(places, listening)?;
    seccomp(listening)
}

fn landlock(places: &Places, listening: Listening) -> Result<(), ConfineError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(LANDLOCK_ABI))?;
    let mut ruleset = ruleset.create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_all(LANDLOCK_ABI)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let readable =
        [Path::new("/usr"), Path::new("/etc"), Path::new("/proc"), &places.cgroup_root].into_iter().chain([
            Path::new(NAME_SERVERS),
            places.builtin_models.as_path(),
            &places.builtin_agents,
            &places.media_models,
            &places.config_default,
        ]);
    for path in readable {
        // What this machine does not have needs no rule: without one it stays shut.
        if path.is_dir() {
            ruleset = ruleset.add_rule(PathBeneath::new(open(path)?, read))?;
        }
    }
    for path in [&places.data, &places.state_agentd, &places.run_agentd] {
        if path.is_dir() {
            ruleset = ruleset.add_rule(PathBeneath::new(open(path)?, write))?;
        }
    }
    if let Listening::NotYet(port) = listening {
        ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::BindTcp))?;
    }
    let status = ruleset.restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        other => Err(ConfineError::Partly(other)),
    }
}

fn open(path: &Path) -> Result<PathFd, ConfineError> {
    PathFd::new(path).map_err(|source| ConfineError::Path { path: path.display().to_string(), source })
}

fn seccomp(listening: Listening) -> Result<(), ConfineError> {
    // First the one call that must fail as if it did not exist: then libc makes threads with `clone`, whose flags
    // the second filter can see.
    let absent = filter([(libc::SYS_clone3, Vec::new())], libc::ENOSYS)?;
    let forbidden = filter(forbidden(listening)?, libc::EPERM)?;
    seccompiler::apply_filter(&absent)?;
    seccompiler::apply_filter(&forbidden)?;
    Ok(())
}

fn filter(
    rules: impl IntoIterator<Item = (i64, Vec<SeccompRule>)>,
    errno: i32,
) -> Result<BpfProgram, ConfineError> {
    let rules: BTreeMap<i64, Vec<SeccompRule>> = rules.into_iter().collect();
    // The same numbers hold for every architecture this is built for.
    let errno = errno.unsigned_abs();
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), arch)?.try_into()?)
}

/// What nothing in agentd does. An empty rule list means: whatever the arguments are.
fn forbidden(listening: Listening) -> Result<Vec<(i64, Vec<SeccompRule>)>, ConfineError> {
    let always = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_send_signal,
        libc::SYS_kcmp,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_fsconfig,
        libc::SYS_mount_setattr,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
        libc::SYS_clock_adjtime,
        libc::SYS_acct,
        libc::SYS_quotactl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_personality,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_fanotify_init,
        libc::SYS_syslog,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
        libc::SYS_capset,
        libc::SYS_mknodat,
    ];
    let mut rules: Vec<_> = always.into_iter().map(|call| (call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend([libc::SYS_fork, libc::SYS_vfork, libc::SYS_mknod].map(|call| (call, Vec::new())));
    // A `clone` that makes no thread makes a process.
    let no_thread = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(libc::CLONE_THREAD.unsigned_abs().into()),
        0,
    )?;
    rules.push((libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]));
    let mut foreign = Vec::new();
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        foreign.push(SeccompCondition::new(
            0,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Ne,
            family.unsigned_abs().into(),
        )?);
    }
    // All conditions of one rule must hold: none of the three families.
    let mut sockets = vec![SeccompRule::new(foreign)?];
    for family in [libc::AF_INET, libc::AF_INET6] {
        // A stream is TCP and a datagram UDP, whether by name or by default: Landlock's ports are those of TCP alone,
        // and another protocol that makes streams would pass it.
        let mut other = vec![is(0, family)?];
        for protocol in [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
            other.push(is_not(2, protocol)?);
        }
        sockets.push(SeccompRule::new(other)?);
        for kind in [libc::SOCK_RAW, libc::SOCK_RDM, libc::SOCK_SEQPACKET, libc::SOCK_DCCP, SOCK_PACKET] {
            sockets.push(SeccompRule::new(vec![is(0, family)?, kind_is(kind)?])?);
        }
    }
    rules.push((libc::SYS_socket, sockets));
    if listening == Listening::Begun {
        rules.push((libc::SYS_listen, Vec::new()));
    }
    Ok(rules)
}

fn is(argument: u8, value: i32) -> Result<SeccompCondition, ConfineError> {
    compared(argument, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: i32) -> Result<SeccompCondition, ConfineError> {
    compared(argument, SeccompCmpOp::Ne, value)
}

/// The second argument of socket(2) carries flags above the kind.
fn kind_is(kind: i32) -> Result<SeccompCondition, ConfineError> {
    const KIND: u64 = 0xf;
    compared(1, SeccompCmpOp::MaskedEq(KIND), kind)
}

fn compared(argument: u8, by: SeccompCmpOp, value: i32) -> Result<SeccompCondition, ConfineError> {
    let value = value.unsigned_abs().into();
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, by, value)?)
}

#[cfg(test)]
mod compromise;
#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::net::UdpSocket;
    use std::process::Command;

    /// In a thread of its own: walls cannot be taken down again.
    fn walled<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(move || {
            seccomp(Listening::Begun).expect("the filter is taken");
            work()
        });
        thread.join().expect("no panic")
    }

    #[test]
    fn no_program_is_started_and_threads_are() {
        let (program, thread) = walled(|| {
            let program = Command::new("/bin/true").spawn().map(|_| ());
            (program, std::thread::spawn(|| 7).join().expect("joined"))
        });
        assert_eq!(program.expect_err("refused").kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(thread, 7);
    }

    #[test]
    fn only_unix_and_ip_sockets_are_made() {
        use rustix::net::{AddressFamily, SocketType, socket};
        // Made before, as the console's is: it goes on to be listened on.
        let begun = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let at = begun.local_addr().expect("an address");
        let client = std::thread::spawn(move || std::net::TcpStream::connect(at).is_ok());
        let heard = walled(move || begun.accept().is_ok());
        assert!(heard && client.join().expect("joined"));
        let others = walled(|| {
            let refused = |kind, protocol: i32| {
                let protocol =
                    rustix::net::Protocol::from_raw(protocol.unsigned_abs().try_into().expect("not 0"));
                socket(AddressFamily::INET, kind, Some(protocol)).err() == Some(rustix::io::Errno::PERM)
            };
            [
                refused(SocketType::RAW, libc::IPPROTO_ICMP),
                refused(SocketType::DGRAM, libc::IPPROTO_ICMP),
                refused(SocketType::STREAM, libc::IPPROTO_MPTCP),
                refused(SocketType::STREAM, libc::IPPROTO_SCTP),
                refused(SocketType::SEQPACKET, libc::IPPROTO_SCTP),
            ]
        });
        assert_eq!(others, [true; 5]);
        let listen = walled(|| std::net::TcpListener::bind("127.0.0.1:0").err().map(|error| error.kind()));
        assert_eq!(listen, Some(io::ErrorKind::PermissionDenied));
        let (netlink, packet, ip, unix) = walled(|| {
            (
                socket(AddressFamily::NETLINK, SocketType::RAW, None).err(),
                socket(AddressFamily::PACKET, SocketType::DGRAM, None).err(),
                UdpSocket::bind("127.0.0.1:0").is_ok(),
                socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).is_ok(),
            )
        });
        assert_eq!((netlink, packet), (Some(rustix::io::Errno::PERM), Some(rustix::io::Errno::PERM)));
        assert!(ip && unix);
    }

    #[test]
    fn files_and_ports_outside_are_shut() {
        let folder = tempfile::tempdir().expect("a folder");
        let places = Places::below(folder.path());
        for made in [&places.data, &places.state_agentd, &places.run_agentd] {
            std::fs::create_dir_all(made).expect("made");
        }
        std::fs::write(folder.path().join("secret"), "x").expect("written");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("an address");
        let top = folder.path().to_owned();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let permitted = free.local_addr().expect("an address").port();
        drop(free);
        let thread = std::thread::spawn(move || {
            match landlock(&places, Listening::NotYet(permitted)) {
                Ok(()) => {}
                // A kernel before 6.12: failing closed is what is asked for, and there is nothing more to see.
                Err(error) => return Err(error.to_string()),
            }
            let denied = |result: io::Result<()>| result.err().map(|error| error.kind());
            let inside = std::fs::write(places.data.join("x"), "x").is_ok();
            let secret = denied(std::fs::read(top.join("secret")).map(|_| ()));
            // The egress needs it, and Landlock knows no addresses.
            let connect = std::net::TcpStream::connect(address).is_ok();
            let bind = denied(std::net::TcpListener::bind("127.0.0.1:8444").map(|_| ()));
            // A console whose port was taken when agentd started is tried again.
            let late = std::net::TcpListener::bind(("127.0.0.1", permitted)).is_ok();
            Ok((inside, secret, connect, bind, late))
        });
        match thread.join().expect("no panic") {
            Err(why) => assert!(why.starts_with("Landlock"), "{why}"),
            Ok(seen) => {
                let shut = Some(io::ErrorKind::PermissionDenied);
                assert_eq!(seen, (true, shut, true, shut, true));
            }
        }
    }
}
