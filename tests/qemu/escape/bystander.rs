//! What happens on the host while an agent attacks?
//!
//! Only in the escape suite's image: an agent without walls that looks at the machine from root's place. It owns what
//! the host has and the image has not (a socket, a queue, a terminal's other end), sees what attackers hold, and puts
//! right what they have changed.

use crate::neighbour::{Harms, random};
use crate::network::first_line;
use crate::scene::say;
use crate::sys::{self, Arg};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

pub const SOCKET: &str = "/run/bystander.sock";
pub const SPARE_SOCKET: &str = "/run/bystander-spare.sock";
pub const ABSTRACT: &str = "escape-bystander";
pub const TCP_PORT: u16 = 9_999;
pub const SHM_KEY: i32 = 0x5ec2e7;

const LOOK: Duration = Duration::from_millis(300);
/// What the suite's manifest allows an attacker, times one and a half.
const DISK_BLOCKS_OF_512: u64 = (20 << 20) / 512;
const FILES: usize = 500;
const PROCESSES: usize = 100;
const MEMORY_KIB: u64 = 100 << 10;
/// Of 100 ticks a second: four fifths of a processor, where half of one was given.
const BUSY_TICKS: u64 = 80;

pub fn run() -> ExitCode {
    match Bystander::new().and_then(Bystander::watch) {
        Err(error) => {
            say(&format!("the bystander ended: {error}"));
            ExitCode::FAILURE
        }
        Ok(never) => match never {},
    }
}

struct Bystander {
    socket: UnixListener,
    spare: Option<UnixListener>,
    abstract_socket: UnixListener,
    tcp: TcpListener,
    terminal: Option<File>,
    /// Processes and files whose harm was told.
    told: BTreeSet<(String, String)>,
    /// Pid, ticks of processor time, when: of the hog.
    hog: Option<(u32, u64, Instant)>,
    /// For how many looks a daemon has outlived its attacker.
    orphaned: u32,
    modprobe: String,
    hostname: String,
    harms: Harms,
}

impl Bystander {
    fn new() -> io::Result<Self> {
        for path in [SOCKET, SPARE_SOCKET] {
            let _ = fs::remove_file(path);
        }
        let address = std::os::unix::net::SocketAddr::from_abstract_name(ABSTRACT)?;
        let bystander = Self {
            socket: UnixListener::bind(SOCKET)?,
            spare: Some(UnixListener::bind(SPARE_SOCKET)?),
            abstract_socket: UnixListener::bind_addr(&address)?,
            tcp: TcpListener::bind((Ipv4Addr::LOCALHOST, TCP_PORT))?,
            terminal: open_terminal(),
            told: BTreeSet::new(),
            hog: None,
            orphaned: 0,
            modprobe: read("/proc/sys/kernel/modprobe"),
            hostname: read("/proc/sys/kernel/hostname"),
            harms: Harms::default(),
        };
        bystander.socket.set_nonblocking(true)?;
        bystander.abstract_socket.set_nonblocking(true)?;
        bystander.tcp.set_nonblocking(true)?;
        make_secrets();
        say("ready");
        Ok(bystander)
    }

    fn watch(mut self) -> io::Result<std::convert::Infallible> {
        loop {
            std::thread::sleep(LOOK);
            self.look_at_sockets()?;
            self.look_at_settings();
            self.look_at_files();
            self.look_at_processes();
            self.harms.looked();
        }
    }

    fn look_at_sockets(&mut self) -> io::Result<()> {
        let mut heard = Vec::new();
        while let Ok((stream, _)) = self.socket.accept() {
            stream.set_read_timeout(Some(LOOK))?;
            heard.push(("48-socket", first_line(stream)));
        }
        while let Ok((stream, _)) = self.abstract_socket.accept() {
            stream.set_read_timeout(Some(LOOK))?;
            heard.push(("49-abstract", first_line(stream)));
        }
        while let Ok((stream, _)) = self.tcp.accept() {
            stream.set_read_timeout(Some(LOOK))?;
            heard.push(("52-loopback", first_line(stream)));
        }
        for (id, line) in heard {
            if line == id {
                self.harms.report(id);
            }
        }
        if !Path::new(SPARE_SOCKET).exists() {
            self.harms.report("51-replace");
            self.spare = Some(UnixListener::bind(SPARE_SOCKET)?);
        }
        let mut typed = [0_u8; 16];
        if let Some(terminal) = &mut self.terminal
            && let Ok(read) = terminal.read(&mut typed)
        {
            for byte in typed.iter().take(read) {
                match byte {
                    b'1' => self.harms.report("45-tiocsti"),
                    b'2' => self.harms.report("45-high"),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn look_at_settings(&mut self) {
        if read("/proc/sys/kernel/modprobe") == "/escape" {
            self.harms.report("16-modprobe");
            let _ = fs::write("/proc/sys/kernel/modprobe", &self.modprobe);
        }
        if read("/proc/sys/kernel/core_pattern") == "/escape" {
            self.harms.report("16-core");
            let _ = fs::write("/proc/sys/kernel/core_pattern", "core");
        }
        if read("/proc/sys/kernel/hostname") == "escaped" {
            self.harms.report("43-hostname");
            let _ = fs::write("/proc/sys/kernel/hostname", &self.hostname);
        }
        // LINUX_REBOOT_CMD_CAD_ON has been called: init had switched it off, or the bystander below.
        if read("/proc/sys/kernel/ctrl-alt-del") == "1" {
            self.once("43-reboot", "");
        }
        if sys::kernel_minutes_west() == 77 {
            self.harms.report("43-time");
            let _ = sys::call(libc::SYS_settimeofday, [Arg::N(0), Arg::In(&[0; 8])]);
        }
        if read("/sys/kernel/kexec_loaded") == "1" {
            self.once("43-kexec", "");
        }
        for (id, source, target) in [
            ("42-mount", "escape-mount ", "/run/escape-mount\0"),
            ("42-fsopen", "escape-fsopen ", "/run/escape-fsopen\0"),
        ] {
            if read("/proc/mounts").lines().any(|line| line.starts_with(source)) {
                self.harms.report(id);
                let _ = sys::call(libc::SYS_umount2, [Arg::In(target.as_bytes()), Arg::N(0)]);
            }
        }
    }

    fn look_at_files(&mut self) {
        for (id, path) in [("1-data", "/data/agents/planted"), ("1-state", "/state/planted")] {
            if Path::new(path).exists() {
                self.harms.report(id);
                let _ = fs::remove_file(path);
            }
        }
        for agent in fs::read_dir("/data/agents").into_iter().flatten().flatten() {
            let package = agent.path().join("package");
            let manifest = read_path(&package.join("agent.toml"));
            if !manifest.contains("name = \"attacker") {
                continue;
            }
            let id = agent.file_name().to_string_lossy().into_owned();
            if manifest.contains("/data") {
                self.once("13-manifest", &id);
            }
            // Where it was moved to: in the package it is missing too while that is unpacked or removed.
            if agent.path().join("work/spare").exists() {
                self.once("10-rename", &id);
            }
            self.look_at_work(&agent.path().join("work"), &id);
            let groups = Path::new("/sys/fs/cgroup/agents").join(&id);
            for run in fs::read_dir(groups).into_iter().flatten().flatten() {
                if read_path(&run.path().join("pids.max")) == "max" {
                    self.once("47-pids", &run.path().display().to_string());
                }
            }
        }
    }

    fn look_at_work(&mut self, work: &Path, agent: &str) {
        let about = |name: &str| fs::symlink_metadata(work.join(name)).ok();
        if about("node").is_some_and(|node| node.file_type().is_char_device()) {
            self.once("17-mknod", agent);
        }
        if about("given").is_some_and(|given| i64::from(given.uid()) == crate::resources::OTHER) {
            self.once("82-chown", agent);
        }
        for (name, id) in [("made-by-x32", "24-x32"), ("made-by-ia32", "24-ia32")] {
            if about(name).is_some() {
                self.once(id, agent);
            }
        }
        if about("fill").is_some_and(|fill| fill.blocks() > DISK_BLOCKS_OF_512) {
            self.once("82-disk", agent);
        }
        if fs::read_dir(work.join("many")).is_ok_and(|files| files.count() > FILES) {
            self.once("82-inodes", agent);
        }
        let is_core = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with("core");
        if fs::read_dir(work).into_iter().flatten().flatten().any(is_core) {
            self.once("36-core", agent);
        }
    }

    fn look_at_processes(&mut self) {
        let mut attackers = 0;
        let mut daemon = None;
        let mut forks = 0;
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let folder = entry.path();
            let name = read_path(&folder.join("comm"));
            let Some(id) = name.strip_prefix("x-") else { continue };
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            match id {
                "main" => attackers += 1,
                "34-daemon" => daemon = Some(pid),
                "79-forks" => forks += 1,
                "81-cpu" => self.look_at_hog(pid, &folder),
                _ => {}
            }
            if holds_it(id, &folder) {
                self.once(id, &pid.to_string());
            }
        }
        if forks > PROCESSES {
            self.once("79-forks", &forks.to_string());
        }
        match daemon {
            Some(pid) if attackers == 0 => {
                self.orphaned += 1;
                if self.orphaned == 5 {
                    self.harms.report("34-daemon");
                    let _ = sys::call(libc::SYS_kill, [Arg::N(pid.into()), Arg::N(libc::SIGKILL.into())]);
                }
            }
            _ => self.orphaned = 0,
        }
    }

    /// Processor time over two seconds.
    fn look_at_hog(&mut self, pid: u32, folder: &Path) {
        let fields = numbers_after_state(folder);
        // utime and stime are fields 14 and 15.
        let ticks = fields.iter().skip(10).take(2).sum::<i64>().unsigned_abs();
        match self.hog {
            Some((known, before, since)) if known == pid => {
                let elapsed_ms = since.elapsed().as_millis();
                if elapsed_ms >= 2_000 {
                    let per_second =
                        ticks.saturating_sub(before) * 1_000 / u64::try_from(elapsed_ms).unwrap_or(1);
                    if per_second > BUSY_TICKS {
                        self.once("81-cpu", &pid.to_string());
                    }
                    self.hog = Some((pid, ticks, Instant::now()));
                }
            }
            _ => self.hog = Some((pid, ticks, Instant::now())),
        }
    }

    fn once(&mut self, id: &str, whose: &str) {
        if self.told.insert((id.to_owned(), whose.to_owned())) {
            self.harms.report(id);
        }
    }
}

/// Does the process of an attempt have what the attempt was for?
fn holds_it(id: &str, folder: &Path) -> bool {
    let link = |name: &str| fs::read_link(folder.join(name)).unwrap_or_default();
    let descriptors: Vec<PathBuf> = fs::read_dir(folder.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect();
    let has = |what: &str| descriptors.iter().any(|link| link.to_string_lossy().contains(what));
    let status = read_path(&folder.join("status"));
    let field = |name: &str| -> Vec<u64> {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|rest| rest.split_whitespace().filter_map(|word| word.parse().ok()).collect())
            .unwrap_or_default()
    };
    let after_state = numbers_after_state(folder);
    match id {
        "17-mem" => has("/dev/mem"),
        "18-kcore" => has("/proc/kcore"),
        "19-memfd" => link("exe").to_string_lossy().contains("memfd:"),
        "21-setuid" => {
            matches!(field("Uid:").as_slice(), [real, effective, ..] if *real != 0 && *effective == 0)
        }
        "22-copy" => link("exe").ends_with("work/copy"),
        "23-filter" => has("seccomp"),
        "37-uring" => has("io_uring"),
        "38-uffd" => has("userfaultfd"),
        "40-bpf" => has("bpf"),
        "40-perf" => has("perf_event"),
        "41-userns" | "41-clone3" => {
            // A process that has just ended has no link any more.
            let theirs = link("ns/user");
            !theirs.as_os_str().is_empty()
                && fs::read_link("/proc/self/ns/user").is_ok_and(|own| own != theirs)
        }
        "42-chroot" => link("root").ends_with("work"),
        "79-threads" => field("Threads:").first().is_some_and(|threads| *threads > PROCESSES as u64),
        "80-memory" => field("VmRSS:").first().is_some_and(|kib| *kib > MEMORY_KIB),
        // Fields 19 and 41.
        "81-nice" => after_state.get(15).is_some_and(|nice| *nice < 0),
        "81-fifo" => after_state.get(37).is_some_and(|policy| *policy == 1),
        family if family.starts_with("44-") => has("socket:"),
        _ => false,
    }
}

/// The fields of `/proc/PID/stat` from the fourth on (proc_pid_stat(5)); one that is no number of this kind is 0.
fn numbers_after_state(folder: &Path) -> Vec<i64> {
    let stat = read_path(&folder.join("stat"));
    stat.rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').skip(1).map(|field| field.parse().unwrap_or(0)).collect())
        .unwrap_or_default()
}

fn make_secrets() {
    let text = format!("escape-sysv-{}", random());
    match sys::shared_memory(SHM_KEY, Some(&text)) {
        Ok(_) => say(&format!("secret {text}")),
        Err(error) => say(&format!("no shared memory: {error}")),
    }
    let text = format!("escape-dmesg-{}", random());
    if OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(text.as_bytes()))
        .is_ok()
    {
        say(&format!("secret {text}"));
    }
    let text = format!("escape-mqueue-{}", random());
    let flags = i64::from(libc::O_CREAT | libc::O_RDWR);
    let open = [Arg::In(b"escape\0"), Arg::N(flags), Arg::N(0o666), Arg::N(0)];
    if let Ok(queue) = sys::call(libc::SYS_mq_open, open) {
        let length = i64::try_from(text.len()).unwrap_or(0);
        let send = [Arg::N(queue), Arg::In(text.as_bytes()), Arg::N(length), Arg::N(0), Arg::N(0)];
        if sys::call(libc::SYS_mq_timedsend, send).is_ok() {
            say(&format!("secret {text}"));
        }
    }
    let symbols = read("/proc/kallsyms");
    if let Some(address) =
        symbols.lines().find(|line| line.ends_with(" _stext")).and_then(|line| line.split(' ').next())
    {
        say(&format!("secret escape-kallsyms-{address}"));
    }
    // So that 43-reboot has something to change.
    let reboot = [Arg::N(0xfee1_dead), Arg::N(672_274_793), Arg::N(0), Arg::N(0)];
    let _ = sys::call(libc::SYS_reboot, reboot);
}

/// A virtual terminal that nobody sits at, without line editing, read without waiting.
fn open_terminal() -> Option<File> {
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/dev/tty9")
        .ok()?;
    let fd = i64::from(terminal.as_raw_fd());
    // struct termios of the kernel: c_lflag is the fourth word; no ICANON, no ECHO.
    let mut settings = [0_u8; 60];
    sys::call(libc::SYS_ioctl, [Arg::N(fd), Arg::N(0x5401), Arg::Out(&mut settings)]).ok()?;
    settings.get_mut(12..16)?.fill(0);
    sys::call(libc::SYS_ioctl, [Arg::N(fd), Arg::N(0x5402), Arg::In(&settings)]).ok()?;
    Some(terminal)
}

fn read(path: &str) -> String {
    read_path(Path::new(path))
}

fn read_path(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()).unwrap_or_default()
}
