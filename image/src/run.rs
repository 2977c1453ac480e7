//! `scripts/run`: the appliance in a virtual machine, from nothing to a claim code.
//!
//! In:     a few options. What is missing is built, a line per stage.
//! Out:    on standard output exactly three kinds of line, each flushed at once: `console: https://...`,
//!         `fingerprint: ...`, `claim code: ...`; everything else goes to standard error.
//! States: building, booting, running, powering down (first Ctrl-C or SIGTERM), killed (second).
//! Always: the default disk stays between runs, so the machine remembers. Booted directly, a newer build
//!         puts its root into slot a of that disk; state and data stay. With `--uefi` the disk boots itself.

use crate::build::{self, Built};
use crate::cache::{Cache, Line};
use crate::disk;
use crate::media;
use crate::qemu::accelerator::{self, Choice};
use crate::qemu::{self, Accelerator, Boot, Drive, Machine, Network, OnReboot, Running, Screen};
use crate::variant::Wanted;
use agentd_domain::config::APP_PORTS_FIRST;
use agentd_domain::paths;
use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Agents' own web interfaces that are forwarded, from `APP_PORTS_FIRST` up.
const FORWARDED_APP_PORTS: u16 = 4;

/// How far above a taken port a free one is looked for.
const PORT_ATTEMPTS: u16 = 50;

/// How often the serial line, the signals and QEMU's end are looked at.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug, Clone)]
pub struct Options {
    pub wanted: Wanted,
    pub headless: bool,
    pub uefi: bool,
    /// `None`: the cache's own disk, kept between runs.
    pub disk: Option<PathBuf>,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Host port of the console. `None`: 8443, or the next one that is free.
    pub port: Option<u16>,
    pub model: Option<PathBuf>,
}

/// Builds, boots and stays until the guest is off.
pub fn run(cache: &Cache, options: &Options) -> Result<()> {
    let built = build::of_variant(cache, &options.wanted)?;
    let choice = accelerator::choose(cache, &built.kernel)?;
    let name = if choice.accelerator == Accelerator::Kvm { "KVM" } else { "TCG (emulation)" };
    eprintln!("machine     {name}: {}", choice.why);
    let disk = prepare_disk(cache, &built, options)?;
    let machine = machine(cache, &built, options, &choice, &disk)?;
    let log = cache.path("run/serial.log");
    eprintln!("booting     disk {}, serial line in {}", disk.display(), log.display());
    let port = machine.network.as_ref().and_then(|network| network.forwards.first()).map_or(0, |f| f.0);
    let mut guest = machine.start(Some(&log))?;
    watch(&mut guest, port)
}

fn prepare_disk(cache: &Cache, built: &Built, options: &Options) -> Result<PathBuf> {
    std::fs::create_dir_all(cache.path("run"))?;
    let disk = options.disk.clone().unwrap_or_else(|| cache.path("run/disk.img"));
    let line = Line::start("disk file");
    if !disk.exists() {
        // Under another name first: an interrupted copy must not be taken for a disk.
        let partial = disk.with_extension("partial");
        qemu::copy_disk(&built.disk.image, &partial)?;
        std::fs::rename(&partial, &disk)?;
        line.end("new", &disk.display().to_string());
        return Ok(disk);
    }
    let current = disk::root_guid(&disk)? == built.root.about.root_hash.data_partition();
    match (current, options.uefi) {
        (true, _) => line.end("kept", &disk.display().to_string()),
        (false, false) => {
            disk::replace_root(&disk, &built.root)?;
            line.end("kept", &format!("{} with the newer root", disk.display()));
        }
        (false, true) => line.end("kept", &format!("{} with its own, other version", disk.display())),
    }
    Ok(disk)
}

fn machine(cache: &Cache, built: &Built, options: &Options, choice: &Choice, disk: &Path) -> Result<Machine> {
    let boot = if options.uefi {
        let variables = disk.with_extension("uefi-variables");
        if !variables.exists() {
            qemu::fresh_uefi_variables(&variables)?;
        }
        Boot::Uefi { variables }
    } else {
        Boot::Direct {
            kernel: built.kernel.image.clone(),
            command_line: built.disk.command_line.clone(),
            initrd: None,
        }
    };
    let mut drives = vec![Drive::raw(disk)];
    if let Some(model) = &options.model {
        drives.push(media::drive(&media::ensure_model_medium(cache, model)?));
    }
    let port = match options.port {
        Some(port) if is_free(port) => port,
        Some(port) => bail!("port {port} is taken on this machine; choose another with --port"),
        None => free_port(paths::HTTPS_PORT)?,
    };
    let mut forwards = vec![(port, paths::HTTPS_PORT)];
    forwards.extend(
        (APP_PORTS_FIRST..APP_PORTS_FIRST + FORWARDED_APP_PORTS)
            .filter(|port| is_free(*port))
            .map(|port| (port, port)),
    );
    Ok(Machine {
        memory_mib: options.memory_mib,
        cpus: options.cpus,
        drives,
        network: Some(Network { forwards, ..Network::default() }),
        screen: screen(options.headless),
        on_reboot: OnReboot::Reboot,
        watchdog: true,
        ..Machine::new(choice.accelerator, boot)
    })
}

fn screen(headless: bool) -> Screen {
    let display = ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some());
    match (headless, display) {
        (true, _) => Screen::None,
        (false, true) => Screen::Window,
        (false, false) => {
            eprintln!("display     none here: no window, the serial line tells the same");
            Screen::None
        }
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn free_port(first: u16) -> Result<u16> {
    (first..first.saturating_add(PORT_ATTEMPTS))
        .find(|port| is_free(*port))
        .with_context(|| format!("no free port from {first} on; choose one with --port"))
}

/// Passes on what the local console says until QEMU ends.
fn watch(guest: &mut Running, port: u16) -> Result<()> {
    let presses = count_signals()?;
    let mut said = Announced::default();
    let mut handled = 0;
    loop {
        let now = Announced::read(&guest.serial_text(), port);
        for line in now.news(&said) {
            println!("{line}");
        }
        std::io::stdout().flush()?;
        said = now;
        if let Some(status) = guest.ended()? {
            if status.success() {
                eprintln!("the machine is off");
                return Ok(());
            }
            bail!("QEMU ended: {status}\n{}", guest.scene());
        }
        let pressed = presses.load(Ordering::SeqCst);
        if pressed > handled {
            if handled == 0 && pressed == 1 {
                eprintln!("powering down; once more to pull the plug");
                guest.power_button()?;
            } else {
                eprintln!("pulling the plug");
                return guest.kill();
            }
            handled = pressed;
        }
        std::thread::sleep(LOOK);
    }
}

/// How often someone asked this program to stop.
fn count_signals() -> Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let counter = Arc::clone(&count);
    std::thread::spawn(move || {
        for _ in signals.forever() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    Ok(count)
}

/// What the local console says on the serial line, in whole lines.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Announced {
    console: Option<String>,
    fingerprint: Option<String>,
    claim_code: Option<String>,
}

impl Announced {
    /// The last of each kind. The console's address is the forwarded port, not the guest's own.
    fn read(serial: &str, port: u16) -> Self {
        let whole = serial.rfind('\n').map_or("", |end| &serial[..end]);
        let last = |prefix: &str| {
            whole.lines().rev().find_map(|line| line.strip_prefix(prefix)).map(|rest| rest.trim().to_owned())
        };
        Self {
            console: last("console: https://").map(|_| format!("https://127.0.0.1:{port}")),
            fingerprint: last("fingerprint: "),
            claim_code: last("claim code: "),
        }
    }

    /// Lines that were not said before.
    fn news(&self, before: &Self) -> Vec<String> {
        let lines = [
            ("console", &self.console, &before.console),
            ("fingerprint", &self.fingerprint, &before.fingerprint),
            ("claim code", &self.claim_code, &before.claim_code),
        ];
        lines
            .into_iter()
            .filter(|(_, now, before)| now != before)
            .filter_map(|(name, now, _)| now.as_ref().map(|value| format!("{name}: {value}")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_lines_become_ours_with_the_hosts_port() {
        let serial = "boot\nconsole: no address yet\nconsole: https://10.0.2.15:8443\nfingerprint: 00ff\n\
                      claim code: ABCD-EFGH-JKLM\nclaim co";
        let said = Announced::read(serial, 10443);
        assert_eq!(
            said.news(&Announced::default()),
            ["console: https://127.0.0.1:10443", "fingerprint: 00ff", "claim code: ABCD-EFGH-JKLM"]
        );
        assert_eq!(said.news(&said), Vec::<String>::new());
    }

    #[test]
    fn a_renewed_claim_code_is_said_and_half_a_line_is_not() {
        let first = Announced::read("claim code: AAAA\n", 1);
        let later = Announced::read("claim code: AAAA\nclaim code: BB", 1);
        assert_eq!(later.news(&first), Vec::<String>::new());
        let renewed = Announced::read("claim code: AAAA\nclaim code: BBBB\n", 1);
        assert_eq!(renewed.news(&first), ["claim code: BBBB"]);
    }

    #[test]
    fn nothing_is_announced_without_an_address() {
        assert_eq!(Announced::read("console: no address yet\n", 1), Announced::default());
    }

    #[test]
    fn a_taken_port_is_passed_over() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(!is_free(port));
        assert_ne!(free_port(port).unwrap(), port);
    }
}
