//! What can somebody do who runs their own code in agentd?
//!
//! The test starts itself once more as agentd's user, lets that process shut itself in exactly as agentd does, and then
//! tries everything that `SECURITY.md` beside this crate speaks of. Each attempt is judged by its effect on a victim,
//! and as root without walls each of them succeeds.

use super::{Listening, confine};
use crate::places::Places;
use agentd_domain::paths;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::set_thread_res_uid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SCENE: &str = "AGENTD_COMPROMISED";
const TEST: &str = "confine::compromise::code_of_a_stranger_in_agentd_reaches_what_is_written_down";
const AGENT_UID: u32 = paths::UID_AGENTS_FIRST + 1;
const SECRET: &str = "known to nobody else 5e2a91";

/// For somebody who should knock to do so, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);

/// What agentd's user may do, because agentd's work is made of it.
const REACHABLE: [&str; 5] =
    ["change a package", "change a store", "read a store", "reach the launcher", "read the system"];

/// Of the harm below, what no wall is in the way of: agents' way out goes through agentd, to hosts and ports that only
/// their manifests know, and it asks for names by UDP. Landlock knows no addresses, and nothing of UDP.
const OPEN: [&str; 3] = ["connect to a port", "send a datagram", "hear datagrams at a port"];

/// Everything else.
const HARM: [&str; 18] = [
    "read an agent's file",
    "write an agent's file",
    "replace an agent's folder",
    "write the root",
    "write what init keeps",
    "raise a limit",
    "become root",
    "start a program",
    "connect to a port",
    "send a datagram",
    "hear datagrams at a port",
    "listen on a port",
    "listen on whatever port is free",
    "hear what others are sent",
    "connect to an abstract socket",
    "kill an agent",
    "read an agent's environment",
    "mount",
];

#[test]
fn code_of_a_stranger_in_agentd_reaches_what_is_written_down() {
    if let Some(folder) = std::env::var_os(SCENE) {
        return stranger(Path::new(&folder));
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: only root can become agentd's user");
        return;
    }
    let inside = Scene::new();
    let said = inside.run(Some(paths::UID_AGENTD));
    if let Some(why) = said.get("walls") {
        // A kernel before 6.12: agentd then starts no agents, and there is nothing to see.
        println!("SKIP: {why}");
        return;
    }
    let harmed = inside.harmed(&said);
    assert_eq!(harmed, OPEN.into(), "{said:?}");
    for reachable in REACHABLE {
        assert_eq!(said.get(reachable).map(String::as_str), Some("done"), "{reachable}: {said:?}");
    }
    // The control: the same code as root, without walls.
    let outside = Scene::new();
    let said = outside.run(None);
    assert_eq!(outside.harmed(&said), HARM.into(), "{said:?}");
}

/// What `SECURITY.md` says of agentd's own connections holds for as long as nobody writes another one.
#[test]
fn nothing_but_the_egress_dials() {
    const DIALS: [&str; 6] = [
        "TcpStream::connect",
        "UdpSocket::bind",
        "to_socket_addrs",
        "TcpSocket::new",
        "reqwest",
        "HttpConnector",
    ];
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    let mut folders = vec![here.join("src"), here.join("crates")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("read").map(|entry| entry.expect("read").path()) {
            let name = entry.file_name().expect("a name").to_string_lossy().into_owned();
            // A program of its own, on the owner's machine; and what is no part of a shipped program.
            if ["ctl", "tests", "tests.rs", "testing.rs", "compromise.rs"].contains(&name.as_str()) {
                continue;
            }
            if entry.is_dir() {
                folders.push(entry);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&entry).expect("read");
                let shipped = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
                if DIALS.iter().any(|dial| shipped.contains(dial)) {
                    found.insert(entry.strip_prefix(here).expect("below").display().to_string());
                }
            }
        }
    }
    assert_eq!(found, BTreeSet::from(["src/egress/world.rs".to_owned()]));
}

struct Scene {
    folder: tempfile::TempDir,
    victim: std::sync::Mutex<Child>,
    tcp: TcpListener,
    udp: UdpSocket,
    abstract_socket: UnixListener,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("open to others");
        let places = places(folder.path());
        let agent = places.agents().join("an-agent");
        let made = [
            (folder.path().join("usr/lib/agentd"), 0, 0, 0o755),
            (folder.path().join("state/init"), 0, 0, 0o700),
            (folder.path().join("state/agentd"), paths::UID_AGENTD, paths::UID_AGENTD, 0o700),
            (places.cgroup_root.clone(), 0, 0, 0o755),
            (places.run_agentd.clone(), 0, paths::UID_AGENTD, 0o750),
            (places.data.clone(), paths::UID_AGENTD, paths::UID_AGENTD, 0o750),
            (places.agents(), 0, paths::UID_AGENTD, 0o750),
            // As the launcher makes them (agentd-sandbox, `launcher/volumes.rs`).
            (agent.clone(), 0, paths::UID_AGENTD, 0o1770),
            (agent.join("work"), AGENT_UID, AGENT_UID, 0o700),
            (agent.join("package"), paths::UID_AGENTD, paths::UID_AGENTD, 0o750),
        ];
        for (path, owner, group, mode) in made {
            fs::create_dir_all(&path).expect("made");
            chown(&path, Some(owner), Some(group)).expect("given");
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("closed");
        }
        let files = [
            (agent.join("work/secret"), AGENT_UID, 0o600),
            (agent.join("work/file"), AGENT_UID, 0o600),
            (agent.join("memory.redb"), paths::UID_AGENTD, 0o600),
            (agent.join("package/agent.toml"), paths::UID_AGENTD, 0o644),
            (folder.path().join("usr/lib/agentd/agent-jail"), 0, 0o755),
            (folder.path().join("state/init/clock"), 0, 0o600),
            (places.cgroup_root.join("pids.max"), 0, 0o644),
        ];
        for (path, owner, mode) in files {
            fs::write(&path, SECRET).expect("written");
            chown(&path, Some(owner), Some(owner)).expect("given");
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("closed");
        }
        let launcher = UnixListener::bind(&places.launcher_socket).expect("bound");
        chown(&places.launcher_socket, Some(0), Some(paths::UID_AGENTD)).expect("given");
        fs::set_permissions(&places.launcher_socket, Permissions::from_mode(0o660)).expect("closed");
        // Kept in the folder's life: connections only need it to be bound.
        std::mem::forget(launcher);
        let victim = Command::new("/bin/sleep")
            .arg("3600")
            .env("VICTIM", SECRET)
            .uid(AGENT_UID)
            .gid(AGENT_UID)
            .spawn()
            .expect("a victim");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
        let name = abstract_name(folder.path());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let abstract_socket = UnixListener::bind_addr(&address).expect("bound");
        tcp.set_nonblocking(true).expect("set");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        udp.set_nonblocking(true).expect("set");
        abstract_socket.set_nonblocking(true).expect("set");
        let port = |address: io::Result<std::net::SocketAddr>| address.expect("an address").port();
        let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let targets = [port(tcp.local_addr()), port(udp.local_addr()), port(free)].map(u32::from);
        let targets = [&targets[..], &[victim.id()]].concat();
        fs::write(
            folder.path().join("targets"),
            targets.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
        )
        .expect("written");
        Self { folder, victim: std::sync::Mutex::new(victim), tcp, udp, abstract_socket }
    }

    /// What the process said that ran as this user, or as root without walls.
    fn run(&self, user: Option<u32>) -> BTreeMap<String, String> {
        // A copy, as the folder of test programs may be closed to agentd's user.
        let program = self.folder.path().join("stranger");
        fs::copy(std::env::current_exe().expect("this program"), &program).expect("copied");
        fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("open to others");
        let mut command = Command::new(program);
        command.args(["--exact", TEST, "--nocapture", "--test-threads=1"]).env(SCENE, self.folder.path());
        if let Some(user) = user {
            // Also empties the supplementary groups.
            command.uid(user).gid(user);
        }
        let over = AtomicBool::new(false);
        let output = std::thread::scope(|scope| {
            scope.spawn(|| self.knock_until(&over));
            let output = command.stdin(Stdio::null()).output().expect("it ran");
            over.store(true, Ordering::Relaxed);
            output
        });
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.strip_prefix("said ")?.split_once(": "))
            .map(|(name, what)| (name.to_owned(), what.to_owned()))
            .collect()
    }

    /// Somebody who takes whatever listens for what it should be: knocks wherever the process says that it listens, and
    /// leaves a mark where something answers. Also sends the secret to somebody else, over and over.
    fn knock_until(&self, over: &AtomicBool) {
        let speaker = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let listener = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let to = listener.local_addr().expect("an address");
        while !over.load(Ordering::Relaxed) {
            let _ = speaker.send_to(SECRET.as_bytes(), to);
            for entry in fs::read_dir(self.folder.path().join("state/agentd")).expect("read").flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Some((kind, port)) = name.strip_prefix("port ").and_then(|name| name.split_once(' '))
                else {
                    continue;
                };
                let port: u16 = port.parse().expect("a port");
                if kind == "datagrams" {
                    let _ = speaker.send_to(SECRET.as_bytes(), ("127.0.0.1", port));
                } else if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    fs::write(self.folder.path().join(format!("knocked {kind}")), "").expect("written");
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What has really happened to the victims.
    fn harmed(&self, said: &BTreeMap<String, String>) -> BTreeSet<&'static str> {
        let at = |path: &str| self.folder.path().join(path);
        let changed = |path: &str| fs::read_to_string(at(path)).ok().as_deref() != Some(SECRET);
        let told = |name: &str| said.get(name).is_some_and(|what| what.contains(SECRET));
        let happened = |name: &str| match name {
            "read an agent's file" | "read an agent's environment" => told(name),
            "write an agent's file" => {
                !at("data/agents/an-agent/work").exists() || changed("data/agents/an-agent/work/file")
            }
            "replace an agent's folder" => !at("data/agents/an-agent/work").exists(),
            "write the root" => changed("usr/lib/agentd/agent-jail"),
            "write what init keeps" => changed("state/init/clock"),
            "raise a limit" => changed("sys/fs/cgroup/pids.max"),
            "connect to a port" => self.tcp.accept().is_ok(),
            "send a datagram" => self.udp.recv(&mut [0; 8]).is_ok(),
            "hear datagrams at a port" | "hear what others are sent" => told(name),
            "listen on a port" => at("knocked chosen").exists(),
            "listen on whatever port is free" => at("knocked free").exists(),
            "connect to an abstract socket" => self.abstract_socket.accept().is_ok(),
            "kill an agent" => self
                .victim
                .lock()
                .is_ok_and(|mut victim| victim.try_wait().is_ok_and(|ended| ended.is_some())),
            // A file that a program left which was started, a user id that another file belongs to, a mount: each
            // leaves a trace of its own.
            "start a program" => at("state/agentd/started").exists(),
            "become root" => fs::metadata(at("state/agentd/as-root"))
                .is_ok_and(|about| std::os::unix::fs::MetadataExt::uid(&about) == 0),
            "mount" => told(name),
            _ => false,
        };
        HARM.into_iter().filter(|name| happened(name)).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Ok(victim) = self.victim.get_mut() {
            let _ = victim.kill();
            let _ = victim.wait();
        }
    }
}

fn places(folder: &Path) -> Places {
    Places { cgroup_root: folder.join("sys/fs/cgroup"), ..Places::below(folder) }
}

fn abstract_name(folder: &Path) -> String {
    format!("agentd-compromise-{}", folder.display())
}

/// The second process. As root it is the control and shuts nothing.
fn stranger(folder: &Path) {
    let targets = fs::read_to_string(folder.join("targets")).expect("targets");
    let targets: Vec<i32> = targets.split(' ').map(|number| number.parse().expect("a number")).collect();
    let [port, udp_port, free_port, victim] = targets[..] else { panic!("{targets:?}") };
    let [port, udp_port, free_port] =
        [port, udp_port, free_port].map(|port| u16::try_from(port).expect("a port"));
    let places = places(folder);
    if !rustix::process::geteuid().is_root()
        && let Err(error) = confine(&places, Listening::Begun)
    {
        println!("\nsaid walls: {error}");
        return;
    }
    let agent = places.agents().join("an-agent");
    let say = |name: &str, result: io::Result<String>| match result {
        Ok(what) => println!("\nsaid {name}: {what}"),
        Err(error) => println!("\nsaid {name}: blocked: {error}"),
    };
    let overwrite = |path: PathBuf| fs::write(path, "harmed").map(|()| "done".to_owned());
    say("read the system", fs::read("/etc/passwd").map(|_| "done".to_owned()));
    say("read a store", fs::read(agent.join("memory.redb")).map(|_| "done".to_owned()));
    say("change a store", overwrite(agent.join("memory.redb")));
    say("change a package", overwrite(agent.join("package/agent.toml")));
    say("reach the launcher", UnixStream::connect(&places.launcher_socket).map(|_| "done".to_owned()));

    say("read an agent's file", fs::read_to_string(agent.join("work/secret")));
    say("write an agent's file", overwrite(agent.join("work/file")));
    say("write the root", overwrite(folder.join("usr/lib/agentd/agent-jail")));
    say("write what init keeps", overwrite(folder.join("state/init/clock")));
    say("raise a limit", overwrite(places.cgroup_root.join("pids.max")));
    say("connect to a port", TcpStream::connect(("127.0.0.1", port)).and_then(send));
    let datagram = UdpSocket::bind("127.0.0.1:0").and_then(|own| own.send_to(b"x", ("127.0.0.1", udp_port)));
    say("send a datagram", datagram.map(|_| "done".to_owned()));
    let say_port =
        |kind: &str, port: u16| fs::write(folder.join(format!("state/agentd/port {kind} {port}")), "");
    say("hear datagrams at a port", heard(&say_port));
    let listening =
        TcpListener::bind(("127.0.0.1", free_port)).and_then(|own| answered(own, "chosen", &say_port));
    say("listen on a port", listening);
    say("listen on whatever port is free", unbound().and_then(|own| answered(own, "free", &say_port)));
    say("hear what others are sent", overheard());
    let named = SocketAddr::from_abstract_name(abstract_name(folder));
    say(
        "connect to an abstract socket",
        named.and_then(|name| UnixStream::connect_addr(&name)).and_then(send),
    );
    let pid = Pid::from_raw(victim).expect("a pid");
    say(
        "read an agent's environment",
        fs::read(format!("/proc/{victim}/environ"))
            .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " ")),
    );
    let touch = Command::new("/usr/bin/touch").arg(folder.join("state/agentd/started")).status();
    say("start a program", touch.map(|status| status.to_string()));
    let root = rustix::process::Uid::ROOT;
    let became = set_thread_res_uid(root, root, root).map_err(io::Error::from);
    say(
        "become root",
        became.and_then(|()| fs::write(folder.join("state/agentd/as-root"), "")).map(|()| "done".to_owned()),
    );
    say("mount", mount(folder));
    say("kill an agent", kill_process(pid, Signal::KILL).map(|()| "done".to_owned()).map_err(Into::into));
    // Last: it takes the other victims' folder away.
    let away = fs::rename(agent.join("work"), agent.join("elsewhere"));
    say("replace an agent's folder", away.map(|()| "done".to_owned()));
}

/// A memory file system that holds the secret; gone again at once, as the control must not leave it on the host.
fn mount(folder: &Path) -> io::Result<String> {
    use rustix::mount::{MountFlags, UnmountFlags, unmount};
    let place = folder.join("usr");
    rustix::mount::mount("none", &place, "tmpfs", MountFlags::empty(), None)?;
    let is_empty = !place.join("lib").exists();
    unmount(&place, UnmountFlags::DETACH)?;
    if is_empty { Ok(SECRET.to_owned()) } else { Err(io::Error::other("nothing was mounted")) }
}

fn send(mut stream: impl Write) -> io::Result<String> {
    stream.write_all(b"x").map(|()| "done".to_owned())
}

/// Waits for somebody who knocks.
fn answered(
    own: TcpListener,
    kind: &str,
    say_port: &dyn Fn(&str, u16) -> io::Result<()>,
) -> io::Result<String> {
    say_port(kind, own.local_addr()?.port())?;
    own.set_nonblocking(true)?;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if own.accept().is_ok() {
            return Ok("done".to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// listen(2) without bind(2): the kernel picks a port.
fn unbound() -> io::Result<TcpListener> {
    use rustix::net::{AddressFamily, SocketType, listen, socket};
    let own = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    listen(&own, 1)?;
    Ok(own.into())
}

fn heard(say_port: &dyn Fn(&str, u16) -> io::Result<()>) -> io::Result<String> {
    let own = UdpSocket::bind("127.0.0.1:0")?;
    own.set_read_timeout(Some(PATIENCE))?;
    say_port("datagrams", own.local_addr()?.port())?;
    let mut bytes = [0; 256];
    let count = own.recv(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

/// All datagrams of the machine, whoever they are for (raw(7)).
fn overheard() -> io::Result<String> {
    use rustix::net::{AddressFamily, SocketType, ipproto, socket};
    let own = UdpSocket::from(socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::UDP))?);
    own.set_read_timeout(Some(PATIENCE))?;
    let until = Instant::now() + PATIENCE;
    let mut bytes = [0; 256];
    while Instant::now() < until {
        let count = own.recv(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        if text.contains(SECRET) {
            return Ok(text.replace(char::is_control, " "));
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}
