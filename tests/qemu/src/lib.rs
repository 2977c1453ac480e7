//! How does a test own an appliance: real kernel, real image, in QEMU?
//!
//! Owns:   [`Appliance`]: a disk copied from the built image, a running guest, and a home for `agentctl`.
//! In/out: the serial line, the power, and `agentctl` as a person would use it. No other way in.
//! Always: every wait has a deadline in units of what one boot takes here; a failure shows the serial line.
//! Never:  timing assertions. How long things take is `scripts/bench`'s.
#![forbid(unsafe_code)]

mod capture;
mod ctl;
#[path = "../escape/elsewhere.rs"]
pub mod elsewhere;
#[path = "../escape/table.rs"]
pub mod escapes;
pub mod tap;

pub use capture::{Capture, Traffic};
pub use ctl::{Answer, Ctl, Talking, post_zeros};

use agentd_domain::marker;
use anyhow::{Context, Result, bail, ensure};
use image::build::{self, Built};
use image::cache::Cache;
use image::layout;
use image::qemu::{
    self, Accelerator, Boot, Drive, Heard, Machine, Network, OnReboot, Running, Screen, accelerator,
};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// One boot under emulation takes about ten seconds on an idle machine. Ten times that is a hang, not a slow day.
pub const BOOT: Duration = Duration::from_secs(150);

/// The kernel's words when a signal has killed init.
const INIT_KILLED: &str = "Attempted to kill init! exitcode=0x0000000b";
/// What init says first.
const INIT_SPOKE: &str = "agentd OS ";

pub const PASSWORD: &str = "correct horse battery staple";

/// What all tests share: the build and the accelerator.
pub struct Setup {
    pub cache: Cache,
    pub built: Built,
    pub accelerator: Accelerator,
}

/// Builds what is missing, once for all tests of this process.
pub fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| {
        let make = || -> Result<Setup> {
            let cache = Cache::from_env()?;
            let built = build::everything(&cache)?;
            let accelerator = accelerator::choose(&cache, &built.kernel)?.accelerator;
            Ok(Setup { cache, built, accelerator })
        };
        make().unwrap_or_else(|error| panic!("the image cannot be built: {error:#}"))
    })
}

/// What differs from boot to boot.
#[derive(Debug, Clone)]
pub struct Start {
    /// Added to the kernel's command line; only for direct boot.
    pub command_line: String,
    pub uefi: bool,
    pub memory_mib: u32,
    pub cpus: u32,
    pub rtc_base: String,
    pub capture: bool,
    pub drives: Vec<Drive>,
    /// Further devices, in QEMU's words.
    pub devices: Vec<String>,
    pub disk: Disk,
    pub uplink: Uplink,
    /// A kernel other than the appliance's; only for direct boot.
    pub kernel: Option<PathBuf>,
}

/// The appliance's own disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    Attached,
    Absent,
}

/// The network card and what is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uplink {
    Connected,
    /// There is no card.
    Absent,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            command_line: String::new(),
            uefi: false,
            memory_mib: 1024,
            cpus: 2,
            rtc_base: "utc".to_owned(),
            capture: false,
            drives: Vec::new(),
            devices: Vec::new(),
            disk: Disk::Attached,
            uplink: Uplink::Connected,
            kernel: None,
        }
    }
}

/// A disk, and the guest that runs from it while it is on.
pub struct Appliance {
    built: Built,
    folder: tempfile::TempDir,
    guest: Option<Running>,
    port: u16,
    boots: u32,
    last: Start,
    begun_again: bool,
}

impl Appliance {
    /// A disk fresh from the factory. Nothing runs yet.
    pub fn new() -> Result<Self> {
        Self::of(&setup().built)
    }

    /// The same with an image other than the appliance's.
    pub fn of(built: &Built) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("agentd-os-").tempdir()?;
        qemu::copy_disk(&built.disk.image, &folder.path().join("disk.img"))?;
        Ok(Self {
            built: built.clone(),
            folder,
            guest: None,
            port: 0,
            boots: 0,
            last: Start::default(),
            begun_again: false,
        })
    }

    pub fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// A file beside the disk that lives as long as the appliance.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn boot(&mut self, start: &Start) -> Result<()> {
        self.power_off_hard()?;
        self.boots += 1;
        self.port = free_port()?;
        let machine = self.machine(start)?;
        let log = self.folder.path().join(format!("serial-{}.log", self.boots));
        self.guest = Some(machine.start(Some(&log))?);
        self.last = start.clone();
        Ok(())
    }

    /// Waits for words since the boot.
    ///
    /// QEMU 7.2 emulated a general protection fault at init's first instruction, once in hundreds of boots: `xor
    /// ebp, ebp`, which cannot raise one, with every register as the kernel left it. Such a boot is done again, once
    /// and counted; a fault after init's first words, or without an emulator, is a failure as any other.
    fn hear(&mut self, words: &str) -> Result<Heard> {
        let heard = self.guest()?.wait_for_any(0, &[words, INIT_KILLED], BOOT)?;
        if !heard.line.contains(INIT_KILLED) {
            return Ok(heard);
        }
        let guest = self.guest()?;
        let emulated = setup().accelerator == Accelerator::Tcg && !guest.serial_text().contains(INIT_SPOKE);
        ensure!(emulated && !self.begun_again, "init was killed; {}", self.guest()?.scene());
        println!("EMULATOR: init was killed at its first instruction, the boot is begun again");
        self.begun_again = true;
        let start = self.last.clone();
        self.boot(&start)?;
        self.guest()?.wait_for(words, BOOT)
    }

    fn machine(&self, start: &Start) -> Result<Machine> {
        let setup = setup();
        let boot = if start.uefi {
            let variables = self.file("uefi-variables");
            if !variables.exists() {
                qemu::fresh_uefi_variables(&variables)?;
            }
            Boot::Uefi { variables }
        } else {
            let command_line = format!("{} {}", self.built.disk.command_line, start.command_line);
            let kernel = start.kernel.clone().unwrap_or_else(|| self.built.kernel.image.clone());
            Boot::Direct { kernel, command_line, initrd: None }
        };
        let own = match start.disk {
            Disk::Attached => Some(Drive::raw(&self.disk())),
            Disk::Absent => None,
        };
        let mut drives: Vec<Drive> = own.into_iter().collect();
        drives.extend(start.drives.iter().cloned());
        let capture = start.capture.then(|| self.capture_file());
        let network = match start.uplink {
            Uplink::Connected => Some(Network { forwards: vec![(self.port, 8443)], capture, cut_off: false }),
            Uplink::Absent => None,
        };
        Ok(Machine {
            memory_mib: start.memory_mib,
            cpus: start.cpus,
            drives,
            network,
            rtc_base: start.rtc_base.clone(),
            screen: Screen::None,
            on_reboot: OnReboot::Exit,
            extra: start.devices.clone(),
            ..Machine::new(setup.accelerator, boot)
        })
    }

    pub fn capture_file(&self) -> PathBuf {
        self.folder.path().join(format!("uplink-{}.pcap", self.boots))
    }

    pub fn guest(&mut self) -> Result<&mut Running> {
        self.guest.as_mut().context("the appliance is off")
    }

    /// The value after `words` on the serial line, for example the code after `claim code: `.
    pub fn said(&mut self, words: &str) -> Result<String> {
        let heard = self.hear(words)?;
        // The words may have come with the first half of their line.
        self.guest()?.wait_for_from(heard.end, "\n", BOOT)?;
        let text = self.guest()?.serial_text();
        text.lines()
            .find_map(|line| line.split_once(words))
            .map(|(_, after)| after.trim().to_owned())
            .with_context(|| format!("nothing follows {words:?}"))
    }

    /// Types on the serial line and waits for words that come after.
    pub fn type_and_hear(&mut self, keys: &str, words: &str) -> Result<String> {
        let guest = self.guest()?;
        let mark = guest.mark();
        guest.send(keys)?;
        guest.wait_for_from(mark, words, BOOT).map(|heard| heard.line)
    }

    /// `agentctl` with a home of its own, aimed at this appliance.
    pub fn ctl(&self) -> Ctl {
        Ctl::new(self.folder.path(), self.port)
    }

    /// Claims a fresh appliance with the code from its serial line.
    pub fn claim(&mut self) -> Result<()> {
        let code = self.said("claim code: ")?;
        let fingerprint = self.said("fingerprint: ")?;
        let answer = self.ctl().input(
            &["claim", "--code", &code, "--fingerprint", &fingerprint, "--password-stdin"],
            &format!("{PASSWORD}\n"),
        )?;
        answer.success().map(drop)
    }

    /// Signs in again after a boot.
    pub fn login(&mut self) -> Result<()> {
        self.said("console: ")?;
        let fingerprint = self.said("fingerprint: ")?;
        let answer = self
            .ctl()
            .input(&["login", "--fingerprint", &fingerprint, "--password-stdin"], &format!("{PASSWORD}\n"))?;
        answer.success().map(drop)
    }

    /// Asks every half second until the answer is what is waited for; the last answer is in the error.
    pub fn until<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut ask: impl FnMut(&Ctl) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = std::time::Instant::now() + within;
        loop {
            let last = match ask(&self.ctl()) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => "not yet".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            if std::time::Instant::now() >= deadline {
                let scene = self.guest()?.scene();
                bail!("{what}: not within {} s; {last}; {scene}", within.as_secs());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Pulls the plug.
    pub fn power_off_hard(&mut self) -> Result<()> {
        if let Some(mut guest) = self.guest.take() {
            guest.kill()?;
        }
        Ok(())
    }

    /// Presses the power button and waits for the end; returns what the serial line said.
    pub fn power_off(&mut self) -> Result<String> {
        let mut guest = self.guest.take().context("the appliance is off")?;
        guest.power_down(BOOT)?;
        Ok(guest.serial_text())
    }
}

/// Changes bytes of a disk image in place.
pub fn patch(disk: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(disk)?;
    file.write_all_at(bytes, offset)?;
    Ok(())
}

/// Bytes of a disk image.
pub fn read(disk: &Path, offset: u64, length: usize) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; length];
    std::fs::File::open(disk)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// A model that the image carries, as a file here.
pub fn builtin_model(name: &str) -> Result<PathBuf> {
    build::model_entries(&setup().cache)?
        .iter()
        .filter_map(|entry| entry.source())
        .find(|path| path.file_name().is_some_and(|file| file == name))
        .map(Path::to_owned)
        .with_context(|| format!("the image carries no {name}"))
}

/// Puts a file into a disk image's boot partition, as somebody who prepares a disk would.
pub fn put_on_boot_partition(disk: &Path, file: &Path) -> Result<()> {
    let boot = layout::partition(marker::PARTITION_ESP).context("no boot partition")?;
    let status = std::process::Command::new("mcopy")
        .args(["-o", "-i", &format!("{}@@{}", disk.display(), boot.start_bytes)])
        .args([file, Path::new("::")])
        .status()
        .context("cannot start mcopy: apt-get install mtools")?;
    ensure!(status.success(), "mcopy {} failed: {status}", file.display());
    Ok(())
}

/// A port that nobody listens on now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
