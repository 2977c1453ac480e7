//! Which settings of the kernel does the appliance change, and why each?
//!
//! A setting that this kernel does not have is told in the log and is no failure: what is not compiled in
//! cannot be misused. One that is there and cannot be set is a failure if it is required.
//! Source: Documentation/admin-guide/sysctl/; lists of Talos and Bottlerocket were compared.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use agentd_domain::fault::Report;
use std::io;
use std::path::{Path, PathBuf};

struct Setting {
    key: &'static str,
    value: &'static str,
    required: bool,
    why: &'static str,
}

const fn required(key: &'static str, value: &'static str, why: &'static str) -> Setting {
    Setting { key, value, required: true, why }
}

const fn optional(key: &'static str, value: &'static str, why: &'static str) -> Setting {
    Setting { key, value, required: false, why }
}

const SETTINGS: &[Setting] = &[
    required(
        "user.max_user_namespaces",
        "0",
        "a user namespace gives its maker all capabilities inside: most local root holes begin there",
    ),
    required("kernel.unprivileged_bpf_disabled", "1", "programs in the kernel are not for agents"),
    required("kernel.kptr_restrict", "2", "kernel addresses are half of an exploit"),
    required(
        "kernel.dmesg_restrict",
        "1",
        "so are the kernel's messages; agentd gets what it may show from init",
    ),
    required("fs.protected_symlinks", "1", "nobody follows another's link in a shared folder"),
    required("fs.protected_hardlinks", "1", "nobody keeps another's file by a link"),
    required("fs.protected_fifos", "2", "nobody opens another's pipe in a shared folder by mistake"),
    required("fs.protected_regular", "2", "nor another's file"),
    required("fs.suid_dumpable", "0", "a process that changed its uid leaves no dump and cannot be traced"),
    required("kernel.randomize_va_space", "2", "stack, libraries, heap at random places"),
    optional("kernel.yama.ptrace_scope", "3", "no process reads another's memory; it cannot be turned back"),
    optional("net.core.bpf_jit_harden", "2", "constants of filters are blinded"),
    optional("kernel.perf_event_paranoid", "3", "performance counters leak what others do"),
    optional("kernel.io_uring_disabled", "2", "a second way around the system-call filter"),
    optional("kernel.kexec_load_disabled", "1", "no other kernel without the firmware's check"),
    optional("vm.unprivileged_userfaultfd", "0", "a tool to win races in the kernel"),
    optional("vm.mmap_min_addr", "65536", "a null pointer in the kernel reads nothing of ours"),
    optional("dev.tty.ldisc_autoload", "0", "old line disciplines are a known door"),
    optional("dev.tty.legacy_tiocsti", "0", "nobody types into another's terminal"),
    optional("kernel.sysrq", "0", "a break on the serial line is no command to the kernel"),
    optional("kernel.panic", "10", "a dead kernel restarts, after time to read its last words"),
    optional("kernel.panic_on_oops", "1", "a kernel that has gone wrong is not trusted with walls"),
    optional(
        "vm.overcommit_memory",
        "0",
        "models are mapped and forks are large; what agents use is limited by their cgroup",
    ),
    optional("vm.panic_on_oom", "0", "one agent's hunger ends that agent, not the machine"),
    optional("kernel.printk_devkmsg", "on", "init limits its children's lines itself and says what it drops"),
    optional("net.ipv4.tcp_syncookies", "1", "half-open connections do not fill the table"),
    optional("net.ipv4.ip_forward", "0", "the appliance is no router"),
    optional("net.ipv4.conf.all.rp_filter", "1", "no packet from where its sender cannot be"),
    optional("net.ipv4.conf.all.accept_redirects", "0", "no stranger changes routes"),
    optional("net.ipv4.conf.default.accept_redirects", "0", "no stranger changes routes"),
    optional("net.ipv4.conf.all.send_redirects", "0", "the appliance is no router"),
    optional("net.ipv4.conf.all.accept_source_route", "0", "senders do not choose the way"),
    optional("net.ipv6.conf.all.accept_redirects", "0", "no stranger changes routes"),
    optional("net.ipv6.conf.default.accept_redirects", "0", "no stranger changes routes"),
];

/// Of these, what can be set and never unset.
const LASTING: &[&str] = &["kernel.kexec_load_disabled"];

/// Descriptors that a child of init may hold. The launcher and agentd need about eight for each run, and the kernel's own
/// limit of 1024 ends with the hundred-and-fiftieth agent. An agent's limit is its plan's.
const OPEN_FILES: u64 = 65_536;

/// Sets them all.
pub fn apply(machine: &mut Machine) -> Outcome {
    let limit = rustix::process::Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
        machine
            .log
            .warn(&format!("children may hold no {OPEN_FILES} descriptors ({error}): fewer agents can run"));
    }
    let mut failed = Vec::new();
    let mut absent = Vec::new();
    // For the escape suite's control: what can be switched off again, the launcher switches off there.
    let is_left_out = |setting: &Setting| init_sys::lower::is_lowered() && LASTING.contains(&setting.key);
    for setting in SETTINGS.iter().filter(|setting| !is_left_out(setting)) {
        match set(Path::new("/proc/sys"), setting.key, setting.value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => absent.push(setting.key),
            Err(error) if setting.required => {
                failed.push(format!("{} ({error}): {}", setting.key, setting.why))
            }
            Err(error) => machine.log.warn(&format!("{} is not set ({error}): {}", setting.key, setting.why)),
        }
    }
    if !absent.is_empty() {
        machine.log.info(&format!("this kernel has no {}", absent.join(", ")));
    }
    if failed.is_empty() {
        return Ok(Done::Well);
    }
    Err(Report::environment(
        "kernel_settings",
        "settings of the kernel that protect the machine from agents are not in force",
        failed.join("; "),
        "remove settings of the same names from the kernel's command line, or start the version before this one",
    ))
}

/// From now on nothing can be loaded into the kernel, until the next boot.
pub fn end_module_loading(_: &mut Machine) -> Outcome {
    match set(Path::new("/proc/sys"), "kernel.modules_disabled", "1") {
        Ok(()) => Ok(Done::Well),
        // A kernel that cannot load modules at all is what this step wants.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Done::Well),
        Err(error) => Err(Report::environment(
            "module_loading",
            "modules can still be loaded into the kernel",
            format!("kernel.modules_disabled: {error}"),
            "restart; start the version before this one if it happens again",
        )),
    }
}

/// Writes a setting and reads it back: some are silently clamped.
fn set(root: &Path, key: &str, value: &str) -> io::Result<()> {
    let path = path_of(root, key);
    // Some can be set once and are then read-only, so what is right already is not written.
    if std::fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    // With its newline: printk_devkmsg refuses a word without one.
    std::fs::write(&path, format!("{value}\n"))?;
    let now = std::fs::read_to_string(&path)?;
    if now.trim() == value {
        return Ok(());
    }
    Err(io::Error::other(format!("the kernel kept `{}`", now.trim())))
}

fn path_of(root: &Path, key: &str) -> PathBuf {
    root.join(key.replace('.', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_written_and_read_back() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("kernel")).unwrap();
        std::fs::write(root.path().join("kernel/panic"), "0\n").unwrap();
        set(root.path(), "kernel.panic", "10").unwrap();
        assert_eq!(std::fs::read_to_string(root.path().join("kernel/panic")).unwrap(), "10\n");
        assert_eq!(set(root.path(), "kernel.other", "1").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn every_key_stands_once() {
        for (index, setting) in SETTINGS.iter().enumerate() {
            assert!(SETTINGS[..index].iter().all(|other| other.key != setting.key), "{}", setting.key);
        }
    }
}
