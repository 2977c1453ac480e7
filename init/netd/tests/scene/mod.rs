//! Two network namespaces with a cable between them: netd on one end, dnsmasq and a time server on the other.
//!
//! netd runs as on the appliance: uid 201 with ambient capabilities, but without CAP_SYS_TIME, because the
//! clock is the whole machine's and a test must not move it. That it is really set is seen in tests/qemu.

mod capture;

use agentd_domain::netd::{Settings, Status};
use anyhow::{Context, Result, bail, ensure};
use capture::Capture;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use std::collections::BTreeMap;
use std::io::Read;
use std::net::UdpSocket;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// DHCP answers in well under a second; a router advertisement after duplicate detection takes two. The rest is
/// for a machine that is busy with a compiler.
const DEADLINE: Duration = Duration::from_secs(30);
const UID_NETD: u32 = 201;
static SCENES: AtomicU32 = AtomicU32::new(0);

pub struct Scene {
    client: String,
    server: String,
    folder: tempfile::TempDir,
    netd: Option<Child>,
    dnsmasq: Option<Child>,
    /// What the time server adds to the true time, and that nobody answers when it is `i64::MIN`.
    pub lie_ms: Arc<AtomicI64>,
}

/// Why the tests cannot run here, if they cannot.
pub fn skip() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    for tool in ["ip", "dnsmasq", "setpriv"] {
        let found = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|dir| PathBuf::from(dir).join(tool).exists());
        if !found {
            return Some(format!("`{tool}` is not installed (apt install iproute2 dnsmasq-base util-linux)"));
        }
    }
    // A container may be root and still not have namespaces or virtual cables.
    let probe = format!("netd-{}-probe", std::process::id());
    static CAPABLE: OnceLock<Option<String>> = OnceLock::new();
    CAPABLE
        .get_or_init(|| {
            let made = run(&["ip", "netns", "add", &probe]).and_then(|()| {
                run(&["ip", "-n", &probe, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
            });
            let _ = run(&["ip", "netns", "del", &probe]);
            made.err().map(|why| format!("this machine gives no namespace with a cable: {why:#}"))
        })
        .clone()
}

impl Scene {
    pub fn new() -> Result<Self> {
        let number = SCENES.fetch_add(1, Ordering::Relaxed);
        let name = |end: &str| format!("netd-{}-{number}-{end}", std::process::id());
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join("run"))?;
        chown(folder.path().join("run"), Some(UID_NETD), Some(UID_NETD))?;
        // netd must be able to pass through.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let scene = Self {
            client: name("c"),
            server: name("s"),
            folder,
            netd: None,
            dnsmasq: None,
            lie_ms: Arc::new(AtomicI64::new(0)),
        };
        for namespace in [&scene.client, &scene.server] {
            run(&["ip", "netns", "add", namespace])?;
            run(&["ip", "-n", namespace, "link", "set", "lo", "up"])?;
        }
        Ok(scene)
    }

    /// A cable, up on the server's side, with the server's addresses.
    pub fn plug_in(&self) -> Result<()> {
        let (client, server) = (self.client.as_str(), self.server.as_str());
        run(&[
            "ip", "-n", client, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns",
            server,
        ])?;
        for address in ["10.99.0.1/24", "fd99::1/64"] {
            // Without duplicate detection, so that dnsmasq can use it at once.
            let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            run(&[&["ip", "-n", server, "addr", "add", address, "dev", "eth0"], nodad].concat())?;
        }
        self.carrier("up")
    }

    /// `up` or `down`, as the other end of the cable does it.
    pub fn carrier(&self, state: &str) -> Result<()> {
        run(&["ip", "-n", &self.server, "link", "set", "eth0", state])
    }

    /// A DHCP server that hands out 10.99.0.`first` and the nine after it, and advertises fd99::/64.
    pub fn serve_dhcp(&mut self, first: u8) -> Result<()> {
        self.stop_dhcp()?;
        let range = format!("--dhcp-range=10.99.0.{first},10.99.0.{},255.255.255.0,2m", first + 9);
        let leases = self.folder.path().join(format!("leases-{first}"));
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.server, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"])
            .args(["--user=root", "--port=0", "--interface=eth0", "--bind-dynamic", "--dhcp-authoritative"])
            .args(["--no-ping", "--enable-ra", "--dhcp-range=fd99::,ra-only,64", &range])
            .args(["--dhcp-option=option:router,10.99.0.1", "--dhcp-option=option:dns-server,10.99.0.53"])
            .args([
                "--dhcp-option=option:ntp-server,10.99.0.1",
                "--dhcp-option=option6:dns-server,[fd99::53]",
            ])
            // T1 after three seconds (dnsmasq takes no less): a lease is renewed while a test waits. T2 is far beyond every deadline.
            .args(["--dhcp-option=option:T1,3s", "--dhcp-option=option:T2,100s", "--log-facility=-"])
            .arg(format!("--dhcp-leasefile={}", leases.display()))
            .arg(format!("--pid-file={}", self.folder.path().join("dnsmasq.pid").display()))
            .stderr(self.log("dnsmasq")?)
            .stdin(Stdio::null());
        self.dnsmasq = Some(command.spawn()?);
        Ok(())
    }

    pub fn stop_dhcp(&mut self) -> Result<()> {
        self.dnsmasq.take().map_or(Ok(()), end)
    }

    /// An SNTP server on 10.99.0.1 (RFC 4330, 5), in a thread that lives as long as the process.
    pub fn serve_time(&self) -> Result<()> {
        let lie_ms = self.lie_ms.clone();
        let socket = self.on_the_other_end(|| Ok(UdpSocket::bind("0.0.0.0:123")?))?;
        std::thread::spawn(move || answer_for_ever(&socket, &lie_ms));
        Ok(())
    }

    /// What netd's end sends by kind, until `window` after the first frame of the kind `last`. The listening
    /// begins before `then` is called.
    pub fn listen(
        &mut self,
        last: &str,
        window: Duration,
        then: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<BTreeMap<String, usize>> {
        let listener = self.on_the_other_end(|| Capture::open(Capture::mac_of_eth0()?))?;
        then(self)?;
        listener.listen(DEADLINE, last, window)
    }

    /// Runs on a thread that has entered the server's namespace, which a socket remembers.
    fn on_the_other_end<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = std::fs::File::open(format!("/run/netns/{}", self.server))?;
        let network = Some(rustix::thread::LinkNameSpaceType::Network);
        let enter_and_run = move || {
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), network)?;
            body()
        };
        std::thread::scope(|scope| scope.spawn(enter_and_run).join())
            .unwrap_or_else(|_| bail!("the thread in {} panicked", self.server))
    }

    pub fn settings_path(&self) -> PathBuf {
        self.folder.path().join("settings.json")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub fn write_settings(&self, settings: &Settings) -> Result<()> {
        let fresh = self.folder.path().join("settings.new");
        std::fs::write(&fresh, serde_json::to_string(settings)?)?;
        Ok(std::fs::rename(fresh, self.settings_path())?)
    }

    pub fn start_netd(&mut self) -> Result<()> {
        let capabilities = "-all,+net_admin,+net_raw,+net_bind_service";
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.client, "setpriv", "--reuid=201", "--regid=201", "--clear-groups"])
            .args([format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}")])
            .args(["--no-new-privs", env!("CARGO_BIN_EXE_netd"), "--settings"])
            .arg(self.settings_path())
            .arg("--run-dir")
            .arg(self.run_dir())
            .stderr(self.log("netd")?)
            .stdin(Stdio::null())
            .process_group(0);
        self.netd = Some(command.spawn()?);
        Ok(())
    }

    pub fn stop_netd(&mut self) -> Result<()> {
        self.netd.take().map_or(Ok(()), end)
    }

    /// `ip netns exec` and setpriv replace themselves, so the child is netd.
    pub fn hang_up(&self) -> Result<()> {
        let child = self.netd.as_ref().context("netd does not run")?;
        let pid = rustix::process::Pid::from_child(child);
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::HUP)?)
    }

    /// Waits for a status that is as described; the failure shows the whole scene.
    pub fn wait_for(&mut self, what: &str, is_so: impl Fn(&Status) -> bool) -> Result<Status> {
        let folder = self.run_dir();
        self.wait(what, folder, inotify::WatchFlags::MOVED_TO, |scene| scene.status().ok().filter(&is_so))
    }

    /// Waits until dnsmasq's log is as described.
    pub fn wait_for_dhcp_log(&mut self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let log = self.folder.path().join("dnsmasq.log");
        let read = log.clone();
        self.wait(what, log, inotify::WatchFlags::MODIFY, move |_| {
            std::fs::read_to_string(&read).ok().filter(|text| is_so(text))
        })
    }

    fn wait<T>(
        &mut self,
        what: &str,
        path: PathBuf,
        change: inotify::WatchFlags,
        look: impl Fn(&Self) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + DEADLINE;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, path, change)?;
        loop {
            // The watch is older than this look, so no change is missed in between.
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if let Some(code) = self.netd.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("netd ended ({code}) instead of: {what}\n{}", self.show());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "not within {DEADLINE:?}: {what}\n{}", self.show());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&left))?;
            let mut events = [0u8; 4096];
            while rustix::io::read(&watch, &mut events).is_ok_and(|bytes| bytes > 0) {}
        }
    }

    pub fn status(&self) -> Result<Status> {
        Ok(serde_json::from_str(&std::fs::read_to_string(self.run_dir().join("status.json"))?)?)
    }

    /// The output of `ip` on netd's end.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("ip").args(["-n", &self.client]).args(arguments).output()?;
        Ok(String::from_utf8(output.stdout)?)
    }

    fn log(&self, name: &str) -> Result<std::fs::File> {
        let path = self.folder.path().join(format!("{name}.log"));
        Ok(std::fs::OpenOptions::new().create(true).append(true).open(path)?)
    }

    fn show(&self) -> String {
        let mut text = String::new();
        for (title, content) in [
            ("status", std::fs::read_to_string(self.run_dir().join("status.json")).unwrap_or_default()),
            ("addresses", self.ip(&["addr"]).unwrap_or_default()),
            ("routes", self.ip(&["route"]).unwrap_or_default()),
        ] {
            text += &format!("--- {title}\n{content}\n");
        }
        for log in ["netd", "dnsmasq"] {
            let mut content = String::new();
            let file = std::fs::File::open(self.folder.path().join(format!("{log}.log")));
            let _ = file.and_then(|mut file| file.read_to_string(&mut content));
            let lines: Vec<&str> = content.lines().collect();
            text += &format!("--- {log}\n{}\n", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
        text
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.stop_netd();
        let _ = self.stop_dhcp();
        for namespace in [&self.client, &self.server] {
            let _ = run(&["ip", "netns", "del", namespace]);
        }
    }
}

/// Asks a process to end, and waits.
fn end(mut child: Child) -> Result<()> {
    if child.try_wait()?.is_none() {
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    }
    child.wait()?;
    Ok(())
}

fn run(command: &[&str]) -> Result<()> {
    let output = Command::new(command[0]).args(&command[1..]).output().context(command[0].to_owned())?;
    ensure!(
        output.status.success(),
        "{}: {}",
        command.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn answer_for_ever(socket: &UdpSocket, lie_ms: &AtomicI64) {
    let mut request = [0u8; 48];
    while let Ok((length, from)) = socket.recv_from(&mut request) {
        let lie_ms = lie_ms.load(Ordering::Relaxed);
        if length != request.len() || lie_ms == i64::MIN {
            continue;
        }
        // Seconds since 1900 and a fraction of 2^32, modulo 2^32 as NTP has it.
        let now_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64 + lie_ms;
        let seconds = (now_ms.div_euclid(1000) + 2_208_988_800) as u32;
        let fraction = ((now_ms.rem_euclid(1000) as u64) << 32) / 1000;
        let now = [seconds.to_be_bytes(), (fraction as u32).to_be_bytes()].concat();
        // No leap warning, version 4, mode server; stratum 1.
        let mut reply = vec![0x24, 1, 6, 0xec];
        reply.extend([0; 8]);
        reply.extend(b"TEST");
        reply.extend(&now);
        reply.extend(&request[40..48]);
        reply.extend(&now);
        reply.extend(&now);
        let _ = socket.send_to(&reply, from);
    }
}
