//! What the kernel offers once it is asked: its file systems, its log, its watchdogs.

use crate::boot::{Done, Outcome};
use crate::control::Control;
use crate::machine::{Machine, WATCHDOG_TIMEOUT_S};
use agentd_domain::fault::Report;
use agentd_domain::paths;
use init_sys::mounts::{self, Flags};
use init_sys::watchdog::Watchdog;
use rustix::fs::{Gid, Mode, Uid};
use std::fs;
use std::io;
use std::path::Path;

struct KernelMount {
    target: &'static str,
    kind: &'static str,
    flags: Flags,
    options: &'static str,
    /// Mounted only where this exists; the kernel or the firmware may not have it.
    only_with: Option<&'static str>,
}

const CLOSED: Flags = Flags::NOSUID.union(Flags::NODEV).union(Flags::NOEXEC);

const MOUNTS: [KernelMount; 11] = [
    KernelMount { target: "/proc", kind: "proc", flags: CLOSED, options: "", only_with: None },
    KernelMount { target: "/sys", kind: "sysfs", flags: CLOSED, options: "", only_with: None },
    KernelMount {
        target: "/dev",
        kind: "devtmpfs",
        flags: Flags::NOSUID.union(Flags::NOEXEC),
        options: "mode=0755",
        only_with: None,
    },
    KernelMount {
        target: "/dev/pts",
        kind: "devpts",
        flags: Flags::NOSUID.union(Flags::NOEXEC),
        options: "mode=0620,ptmxmode=0666",
        only_with: None,
    },
    KernelMount {
        target: "/dev/shm",
        kind: "tmpfs",
        flags: CLOSED,
        options: "mode=1777,size=32m",
        only_with: None,
    },
    // Sockets, exit records and mount points; nothing large.
    KernelMount {
        target: "/run",
        kind: "tmpfs",
        flags: Flags::NOSUID.union(Flags::NODEV),
        options: "mode=0755,size=64m",
        only_with: None,
    },
    KernelMount {
        target: "/tmp",
        kind: "tmpfs",
        flags: CLOSED,
        options: "mode=1777,size=64m",
        only_with: None,
    },
    // nsdelegate: a cgroup namespace is a border; memory_recursiveprot: what /system is guaranteed reaches its
    // leaves (admin-guide/cgroup-v2.rst).
    KernelMount {
        target: "/sys/fs/cgroup",
        kind: "cgroup2",
        flags: CLOSED,
        options: "nsdelegate,memory_recursiveprot",
        only_with: None,
    },
    KernelMount {
        target: "/sys/fs/pstore",
        kind: "pstore",
        flags: CLOSED,
        options: "",
        only_with: Some("/sys/fs/pstore"),
    },
    KernelMount {
        target: "/sys/kernel/security",
        kind: "securityfs",
        flags: CLOSED,
        options: "",
        only_with: Some("/sys/kernel/security"),
    },
    KernelMount {
        target: "/sys/firmware/efi/efivars",
        kind: "efivarfs",
        flags: CLOSED,
        options: "",
        only_with: Some("/sys/firmware/efi/efivars"),
    },
];

/// Folders below `/run`, with owner and mode. Engines' sockets and exit records are the launcher's to make.
const RUN_FOLDERS: [(&str, u32, u32); 6] = [
    ("/run/init", 0, 0o755),
    ("/run/agentd", 0, 0o755),
    // What runs with rules for the network see of it: a bundle of authorities.
    ("/run/agentd/egress", paths::UID_AGENTD, 0o755),
    ("/run/netd", paths::UID_NETD, 0o755),
    ("/run/media", 0, 0o755),
    (paths::MEDIA_MODELS, 0, 0o755),
];

/// The rest of the boot reads all of these, so every failure is told, but none ends the step early.
pub fn mount_file_systems(machine: &mut Machine) -> Outcome {
    let mut failed = Vec::new();
    for mount in &MOUNTS {
        if mount.only_with.is_some_and(|path| !Path::new(path).exists()) {
            continue;
        }
        if let Err(error) = mount_one(mount) {
            failed.push(format!("{} ({}): {error}", mount.target, mount.kind));
        }
    }
    for (path, owner, mode) in RUN_FOLDERS {
        if let Err(error) = make_folder(Path::new(path), owner, mode) {
            failed.push(format!("{path}: {error}"));
        }
    }
    // Now that there is a /proc: what the rest wants to know of this boot.
    let facts = &mut machine.facts;
    facts.command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default().trim().to_owned();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    facts.version = release_value(&release, "VERSION_ID").unwrap_or_else(|| "unknown".to_owned());
    facts.variant = release_value(&release, "VARIANT_ID").unwrap_or_default();
    facts.build_ms =
        release_value(&release, "AGENTD_BUILD_UNIX_S").and_then(|s| s.parse::<u64>().ok()).unwrap_or(0)
            * 1000;
    // Dumps would hold agents' memory; nothing reads them here. Inherited by everything.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    if failed.is_empty() {
        return Ok(Done::Well);
    }
    Err(Report::environment(
        "kernel_mounts",
        "file systems of the kernel are missing",
        failed.join("; "),
        "start the version before this one, or write the image anew: this kernel does not fit it",
    ))
}

fn mount_one(mount: &KernelMount) -> io::Result<()> {
    let target = Path::new(mount.target);
    if !target.exists() {
        fs::create_dir(target)?;
    }
    match mounts::mount(mount.kind, target, mount.kind, mount.flags, mount.options) {
        // The kernel has mounted /dev itself (CONFIG_DEVTMPFS_MOUNT).
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// Makes a folder, or brings one that is there to this owner and mode.
pub fn make_folder(path: &Path, owner: u32, mode: u32) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Not through a link: what is in its place was put there by somebody else.
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::fs::fchown(&folder, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?;
    rustix::fs::fchmod(&folder, Mode::from_bits_truncate(mode))?;
    Ok(())
}

/// A value of os-release(5), without its quotes.
fn release_value(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

pub fn open_log(machine: &mut Machine) -> Outcome {
    machine.log.open();
    let version = machine.facts.version.clone();
    machine.log.info(&format!("agentd OS {version}"));
    Ok(Done::Well)
}

/// Starts every watchdog there is; from now on [`Machine::pump`] feeds them.
pub fn feed_watchdogs(machine: &mut Machine) -> Outcome {
    let mut found = 0;
    for number in 0..8 {
        let path = format!("/dev/watchdog{number}");
        match Watchdog::open(Path::new(&path)) {
            Ok(watchdog) => {
                if let Err(error) = watchdog.set_timeout_s(WATCHDOG_TIMEOUT_S) {
                    machine.log.warn(&format!("{path} keeps its own time-out: {error}"));
                }
                machine.feed_from_now_on(path.into(), watchdog);
                found += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => machine.log.warn(&format!("{path} is not fed: {error}")),
        }
    }
    if found == 0 {
        return Ok(Done::Skipped("the machine has no watchdog".to_owned()));
    }
    Ok(Done::Well)
}

/// The kernel is to tell init (by SIGINT) instead of restarting at once.
pub fn take_ctrl_alt_del(_: &mut Machine) -> Outcome {
    rustix::system::reboot(rustix::system::RebootCommand::CadOff).map_err(|error| {
        Report::bug(
            "ctrl_alt_del",
            "Ctrl-Alt-Del restarts the machine without a shutdown",
            error.to_string(),
            "use the power button or the local console",
        )
    })?;
    Ok(Done::Well)
}

pub fn listen(machine: &mut Machine) -> Outcome {
    let control = Control::listen(Path::new(paths::INIT_SOCKET)).map_err(|error| {
        Report::bug(
            "control_socket",
            "init cannot be asked for anything",
            format!("{}: {error}", paths::INIT_SOCKET),
            "restart the machine by its power button; start the version before this one if it happens again",
        )
    })?;
    machine.control = Some(control);
    Ok(Done::Well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_os_release_lose_their_quotes() {
        let text = "NAME=\"agentd OS\"\nVERSION_ID=\"0.1.0~7\"\nAGENTD_BUILD_UNIX_S=1700000000\n";
        assert_eq!(release_value(text, "VERSION_ID").as_deref(), Some("0.1.0~7"));
        assert_eq!(release_value(text, "AGENTD_BUILD_UNIX_S").as_deref(), Some("1700000000"));
        assert_eq!(release_value(text, "VERSION"), None);
    }

    #[test]
    fn nothing_is_mounted_before_what_it_lies_in() {
        for (index, mount) in MOUNTS.iter().enumerate() {
            for later in &MOUNTS[index + 1..] {
                assert!(
                    !Path::new(mount.target).starts_with(later.target),
                    "{} before {}",
                    mount.target,
                    later.target
                );
            }
        }
    }
}
