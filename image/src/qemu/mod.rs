//! How is the appliance, or any other guest, started in QEMU, watched and stopped?
//!
//! Owns:   one QEMU process per [`Running`], in its own process group (a Ctrl-C in the terminal must reach
//!         us, not it), killed when the value is dropped.
//! In:     a [`Machine`]: plain data, all of QEMU's arguments follow from it.
//! Out:    the serial line as text with times, QMP commands, the exit status.
//! Always: every wait has a deadline and its error shows the end of the serial line.
//! Who:    `scripts/run`, `tests/qemu`, `tests/bench`.

pub mod accelerator;
mod arguments;
mod qmp;
mod serial;

pub use accelerator::Accelerator;
pub use serial::Heard;

use anyhow::{Context, Result, bail};
use serial::Serial;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub const QEMU: &str = "qemu-system-x86_64";

/// How often a process is asked whether it ended; QEMU has no descriptor that std can wait on with a limit.
const EXIT_POLL: Duration = Duration::from_millis(20);

/// A guest, as data. Fill what matters and leave the rest: `Machine { memory_mib: 512, ..Machine::new(..) }`.
#[derive(Debug, Clone)]
pub struct Machine {
    pub accelerator: Accelerator,
    pub boot: Boot,
    pub kernel_text: KernelText,
    pub time: Time,
    pub memory_mib: u32,
    pub cpus: u32,
    pub drives: Vec<Drive>,
    pub network: Option<Network>,
    /// `utc`, or a time such as `1970-01-01T00:00:00`.
    pub rtc_base: String,
    pub screen: Screen,
    pub on_reboot: OnReboot,
    /// Adds an Intel 6300ESB watchdog, which resets the guest when it is not fed.
    pub watchdog: bool,
    /// Anything else, passed on word by word.
    pub extra: Vec<String>,
}

impl Machine {
    /// One processor, 1 GiB, nothing else.
    pub fn new(accelerator: Accelerator, boot: Boot) -> Self {
        Self {
            accelerator,
            boot,
            kernel_text: KernelText::Patched,
            time: Time::Passing,
            memory_mib: 1024,
            cpus: 1,
            drives: Vec::new(),
            network: None,
            rtc_base: "utc".to_owned(),
            screen: Screen::None,
            on_reboot: OnReboot::Exit,
            watchdog: false,
            extra: Vec::new(),
        }
    }
}

/// Does the guest's kernel change its own code while several processors run it?
///
/// QEMU before 8.1 translates code without holding its page's lock, so that a processor may keep running an
/// instruction that another one has just replaced; Linux then dies with `Oops: int3`. Such a guest gets one
/// translating thread there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelText {
    Constant,
    Patched,
}

/// What moves the guest's clocks?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// Our time.
    Passing,
    /// Only under emulation: while the guest has work, each instruction takes a nanosecond, whatever else runs on this
    /// machine. While it waits our time passes, so that a slow disk of ours is no deadline missed.
    Instructions,
}

#[derive(Debug, Clone)]
pub enum Boot {
    /// The kernel is given by QEMU: no firmware menu, no boot loader, no slots.
    Direct { kernel: PathBuf, command_line: String, initrd: Option<PathBuf> },
    /// OVMF finds systemd-boot on the first drive. The variables are this file, which keeps them between
    /// boots; see [`fresh_uefi_variables`].
    Uefi { variables: PathBuf },
}

#[derive(Debug, Clone)]
pub struct Drive {
    /// A path, or anything QEMU takes for a file: `nbd:unix:/path`.
    pub file: String,
    pub format: &'static str,
    pub bus: Bus,
    /// Up to 20 characters; the guest sees it in sysfs.
    pub serial: Option<String>,
    pub mode: Mode,
}

impl Drive {
    /// A raw image on virtio.
    pub fn raw(path: &Path) -> Self {
        Self {
            file: path.display().to_string(),
            format: "raw",
            bus: Bus::Virtio,
            serial: None,
            mode: Mode::Write,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    Virtio,
    Nvme,
    Sata,
    Usb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Write,
    /// Writes go to a temporary file that ends with QEMU.
    Discard,
    ReadOnly,
}

#[derive(Debug, Clone, Default)]
pub struct Network {
    /// Host port on 127.0.0.1 to guest port, TCP.
    pub forwards: Vec<(u16, u16)>,
    /// Every frame of the uplink, in pcap format.
    pub capture: Option<PathBuf>,
    /// The guest reaches nothing but us: QEMU answers DHCP and DNS, and drops what goes further.
    pub cut_off: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Screen {
    /// No graphics card.
    None,
    /// A card that nobody looks at; [`Running::screenshot`] does.
    Hidden,
    Window,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnReboot {
    /// QEMU ends, so that a test sees the reboot.
    Exit,
    Reboot,
}

/// A guest that runs.
pub struct Running {
    child: Child,
    serial: Serial,
    qmp: PathBuf,
    started: Instant,
    // Sockets and QEMU's own messages; removed with the value.
    folder: tempfile::TempDir,
}

impl Machine {
    /// Starts QEMU. The serial line is also written to `serial_log`, when given.
    pub fn start(&self, serial_log: Option<&Path>) -> Result<Running> {
        use std::os::unix::process::CommandExt;
        let folder = tempfile::Builder::new().prefix("agentd-qemu-").tempdir()?;
        let qmp = folder.path().join("qmp");
        let said = std::fs::File::create(folder.path().join("stderr"))?;
        let mut child = Command::new(QEMU)
            .args(arguments::all(self, &qmp, version()?))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(said)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {QEMU}: install qemu-system-x86"))?;
        let (Some(from), Some(to)) = (child.stdout.take(), child.stdin.take()) else {
            bail!("{QEMU} was started without pipes")
        };
        let started = Instant::now();
        let log = serial_log.map(std::fs::File::create).transpose()?;
        let serial = Serial::listen(from, to, log, started);
        Ok(Running { child, serial, qmp, started, folder })
    }
}

impl Running {
    /// Waits until the serial line, read from its beginning, holds `words`; returns when and in which line.
    pub fn wait_for(&mut self, words: &str, within: Duration) -> Result<Heard> {
        self.wait_for_from(0, words, within)
    }

    /// The same from a place: [`Heard::end`] of an earlier wait, or [`Self::mark`].
    pub fn wait_for_from(&mut self, from: usize, words: &str, within: Duration) -> Result<Heard> {
        self.wait_for_any(from, &[words], within)
    }

    /// The same for whichever of these words is there first.
    pub fn wait_for_any(&mut self, from: usize, words: &[&str], within: Duration) -> Result<Heard> {
        let deadline = Instant::now() + within;
        if let Some(heard) = self.serial.wait_for(from, words, deadline) {
            return Ok(heard);
        }
        let reason = match self.child.try_wait()? {
            Some(status) => format!("QEMU ended ({status}) before"),
            None => format!("{:.0} s passed before", within.as_secs_f64()),
        };
        let words = words.iter().map(|words| format!("{words:?}")).collect::<Vec<_>>().join(" or ");
        bail!("{reason} the serial line said {words}; {}", self.scene())
    }

    /// Where the serial line is now.
    pub fn mark(&self) -> usize {
        self.serial.length()
    }

    /// Everything the serial line said, with carriage returns and escape sequences taken out.
    pub fn serial_text(&self) -> String {
        self.serial.text()
    }

    /// Types on the serial line.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.serial.send(text.as_bytes()).context("QEMU does not take input for the serial line")
    }

    /// One QMP command with its arguments; returns what it returned.
    pub fn qmp(&mut self, command: &str, arguments: serde_json::Value) -> Result<serde_json::Value> {
        qmp::execute(&self.qmp, command, &arguments)
            .with_context(|| format!("QMP {command}; {}", self.scene()))
    }

    /// Presses the power button.
    pub fn power_button(&mut self) -> Result<()> {
        self.qmp("system_powerdown", serde_json::Value::Null).map(drop)
    }

    /// Writes what the screen shows, as PPM.
    pub fn screenshot(&mut self, to: &Path) -> Result<()> {
        self.qmp("screendump", serde_json::json!({ "filename": to })).map(drop)
    }

    /// The power button, then waiting for the end.
    pub fn power_down(&mut self, within: Duration) -> Result<ExitStatus> {
        self.power_button()?;
        self.wait_exit(within)
    }

    pub fn wait_exit(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("QEMU did not end within {:.0} s; {}", within.as_secs_f64(), self.scene());
            }
            std::thread::sleep(EXIT_POLL);
        }
    }

    /// Has QEMU ended?
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The plug. What the guest had written to the drive stays, as QEMU's own caches are the host's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// What a failing test shows: the last lines of the serial line and QEMU's own words.
    pub fn scene(&self) -> String {
        const LINES: usize = 40;
        let text = self.serial.text();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n");
        let said = std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default();
        format!("last lines of the serial line:\n{last}\nQEMU said:\n{said}")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Major and minor version of the QEMU on this machine.
fn version() -> Result<(u32, u32)> {
    let text = crate::command::version(QEMU, "--version")?;
    arguments::version(&text).with_context(|| format!("{QEMU} --version says {text:?}"))
}

/// Copies OVMF's empty variables, so that a machine has its own.
pub fn fresh_uefi_variables(to: &Path) -> Result<()> {
    std::fs::copy(arguments::OVMF_VARIABLES, to)
        .with_context(|| format!("{}: install ovmf", arguments::OVMF_VARIABLES))?;
    Ok(())
}

/// Copies a disk image without writing its holes.
pub fn copy_disk(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    copy.args(["--sparse=always", "--reflink=auto"]).args([from, to]);
    crate::command::output(&mut copy).map(drop)
}
