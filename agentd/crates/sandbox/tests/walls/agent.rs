//! What the agent inside does when it is told to misbehave.
//!
//! It prints what it saw as `name: result` lines. Tests do not take its word where an effect can be seen from outside.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(crate) fn run(words: &[String]) -> u8 {
    let word = |at: usize| words.get(at).map_or("", String::as_str);
    match word(0) {
        "exit" => return word(1).parse().unwrap(),
        "wait" => wait(),
        "ignore-term" => {
            // SAFETY: ignoring a signal touches no memory.
            #[allow(unsafe_code)]
            unsafe {
                libc::signal(libc::SIGTERM, libc::SIG_IGN)
            };
            wait();
        }
        "talk" => talk(),
        "network" => network(),
        "escape" => escape(&words[1..]),
        "forbidden-call" => forbidden_call(),
        "forbidden-call-of-a-child" => forbidden_call_of_a_child(),
        "eat-memory" => eat_memory(),
        "fork-bomb" => fork_bomb(),
        "fill-disk" => fill_disk(),
        "scene" => print_scene(),
        "copy" => copy(),
        "attempt" => attempt(),
        "device" => device(),
        other => panic!("the test agent does not know `{other}`"),
    }
    0
}

/// Standard input to standard output.
fn copy() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    say("read", text.trim());
}

/// Which nodes there are, what is behind them, and what their drivers may be asked.
fn device() {
    use std::os::unix::fs::MetadataExt;
    let mut nodes: Vec<String> = match std::fs::read_dir("/dev") {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect(),
        Err(error) => vec![error.to_string()],
    };
    nodes.sort();
    say("dev", nodes.join(" "));
    let look = |path: &str| -> std::io::Result<String> {
        let data = std::fs::metadata(path)?;
        let mut file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = [1_u8; 4];
        file.read_exact(&mut bytes)?;
        let read: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let written = file.write_all(b"x").is_ok();
        let (major, minor) = (rustix::fs::major(data.rdev()), rustix::fs::minor(data.rdev()));
        let mode = data.mode() & 0o777;
        Ok(format!("{major}:{minor} of {} {mode:o}, reads {read}, writes {written}", data.uid()))
    };
    for path in ["/dev/nvidia7", "/dev/dri/renderD200", "/dev/nvidia6"] {
        say(path, look(path).unwrap_or_else(|error| error.to_string()));
    }
    // A request of NVIDIA's driver, and one that puts a character into a terminal.
    for (name, path, request) in [
        ("ioctl on /dev/nvidia7", "/dev/nvidia7", 0x4600_u64),
        ("ioctl on /dev/zero", "/dev/zero", 0x4600),
        ("terminal's ioctl on /dev/nvidia7", "/dev/nvidia7", 0x5412),
    ] {
        let asked = std::fs::File::open(path).and_then(|file| {
            use std::os::fd::AsRawFd;
            // SAFETY: the argument is null, so the kernel has nothing to read or write.
            #[allow(unsafe_code)]
            let answer = unsafe { libc::ioctl(file.as_raw_fd(), request as _, 0) };
            if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
        say(name, asked.map_or_else(|error| error.to_string(), |()| "answered".to_owned()));
    }
}

/// What a call may have given up.
fn attempt() {
    say(
        "socket",
        std::net::TcpStream::connect("127.0.0.1:7070")
            .map_or_else(|error| error.to_string(), |_| "connected".to_owned()),
    );
    say(
        "write",
        std::fs::write("/work/by-a-call", "x")
            .map_or_else(|error| error.to_string(), |()| "written".to_owned()),
    );
    let other: i32 = std::env::var("OTHER").unwrap().parse().unwrap();
    // SAFETY: signal 0 only asks.
    #[allow(unsafe_code)]
    let killed = unsafe { libc::kill(other, 0) };
    say(
        "kill",
        if killed == 0 { "possible".to_owned() } else { std::io::Error::last_os_error().to_string() },
    );
}

fn say(name: &str, what: impl std::fmt::Display) {
    println!("{name}: {what}");
    let _ = std::io::stdout().flush();
}

fn wait() -> ! {
    say("ready", std::process::id());
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// One request over TCP and one over the Unix socket; prints the answers, then keeps a connection open.
fn talk() {
    let mut tcp = TcpStream::connect("127.0.0.1:7070").unwrap();
    tcp.write_all(b"over tcp\n").unwrap();
    say("tcp", read_line(&mut tcp));
    let mut unix = UnixStream::connect("/run/agentd.sock").unwrap();
    unix.write_all(b"over unix\n").unwrap();
    say("unix", read_line(&mut unix));
    // A second conversation, which starts while no agentd listens any more.
    let mut later = TcpStream::connect("127.0.0.1:7070").unwrap();
    later.write_all(b"to the next agentd\n").unwrap();
    say("waiting", "yes");
    say("later", read_line(&mut later));
    wait();
}

/// Knocks at every door of the egress, and where there is none.
fn network() {
    let file = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_else(|error| error.to_string());
    say("resolv.conf", file.trim_end());
    let ask = |address: &str| -> std::io::Result<String> {
        // Made without `bind`, which agents may not call: the kernel gives a port with the first datagram.
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        let to: std::net::SocketAddr = address.parse().unwrap();
        rustix::net::sendto(&socket, b"a question", rustix::net::SendFlags::empty(), &to)?;
        let mut answer = [0; 64];
        let (length, _) = rustix::net::recv(&socket, &mut answer, rustix::net::RecvFlags::empty())?;
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    };
    say("udp", ask("127.0.0.1:53").unwrap_or_else(|error| error.to_string()));
    for address in [
        "127.0.0.1:53",
        "127.0.0.1:7071",
        "198.18.7.9:443",
        "198.19.255.254:8443",
        "198.18.7.9:22",
        "93.184.216.34:443",
    ] {
        let said = TcpStream::connect(address).and_then(|mut stream| {
            stream.write_all(b"hello\n")?;
            Ok(read_line(&mut stream))
        });
        say(&format!("tcp {address}"), said.unwrap_or_else(|error| error.to_string()));
    }
    say("udp to 93.184.216.34:53", ask("93.184.216.34:53").unwrap_or_else(|error| error.to_string()));
    let listening = std::net::TcpListener::bind("127.0.0.1:9999").map(|_| "listens".to_owned());
    say("listen", listening.unwrap_or_else(|error| error.to_string()));
    wait();
}

fn read_line(stream: &mut impl Read) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap_or(0) == 1 && byte[0] != b'\n' {
        line.push(byte[0] as char);
    }
    line
}

/// Arguments: file to read, file to overwrite, pid to kill, TCP port, socket path, abstract socket name.
fn escape(words: &[String]) {
    let [secret, victim_file, victim_pid, port, socket, abstract_name] = words else {
        panic!("six arguments")
    };
    let report = |name: &str, result: Result<String, std::io::Error>| match result {
        Ok(what) => say(name, format!("ESCAPED {what}")),
        Err(error) => say(name, format!("blocked: {error}")),
    };
    report("read", std::fs::read_to_string(secret));
    report("overwrite", std::fs::write(victim_file, "overwritten").map(|()| String::new()));
    report("read through /proc/1/root", std::fs::read_to_string(format!("/proc/1/root{secret}")));
    report("read through /proc/self/root", std::fs::read_to_string(format!("/proc/self/root{secret}")));
    report(
        "connect tcp",
        TcpStream::connect(format!("127.0.0.1:{port}"))
            .and_then(|mut stream| stream.write_all(b"escaped"))
            .map(|()| String::new()),
    );
    report(
        "connect unix",
        UnixStream::connect(socket)
            .and_then(|mut stream| stream.write_all(b"escaped"))
            .map(|()| String::new()),
    );
    report("connect abstract", connect_abstract(abstract_name));
    report("write in the package", std::fs::write("/agent/planted", "x").map(|()| String::new()));
    report("replace the api socket", std::fs::remove_file("/run/agentd.sock").map(|()| String::new()));
    report("list all processes", list_strangers());
    raw_attempts(&report);
    // Last: without walls this is the end of the victim.
    let pid: i32 = victim_pid.parse().unwrap();
    report(
        "kill",
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid).unwrap(),
            rustix::process::Signal::KILL,
        )
        .map(|()| String::new())
        .map_err(Into::into),
    );
    say("done", "yes");
}

fn connect_abstract(name: &str) -> Result<String, std::io::Error> {
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    UnixStream::connect_addr(&address)?.write_all(b"escaped").map(|()| String::new())
}

/// Other processes than our own in /proc.
fn list_strangers() -> Result<String, std::io::Error> {
    let own = std::process::id().to_string();
    let strangers: Vec<String> = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != own)
        .collect();
    if strangers.is_empty() { Err(std::io::Error::other("none is visible")) } else { Ok(strangers.join(" ")) }
}

#[allow(unsafe_code)]
fn raw_attempts(report: &dyn Fn(&str, Result<String, std::io::Error>)) {
    let call = |number: i64, first: i64, second: i64, third: i64| {
        // SAFETY: pointer arguments are null or point to constants that live for ever.
        let returned = unsafe { libc::syscall(number, first, second, third, 0_i64, 0_i64, 0_i64) };
        if returned == -1 { Err(std::io::Error::last_os_error()) } else { Ok(returned.to_string()) }
    };
    report("socket netlink", call(libc::SYS_socket, 16, 3, 0));
    report("socket packet", call(libc::SYS_socket, 17, 3, 0));
    report("socket udp", call(libc::SYS_socket, 2, 2, 0));
    report("setuid 0", call(libc::SYS_setresuid, 0, 0, 0));
    report("memfd", call(libc::SYS_memfd_create, c"x".as_ptr() as i64, 0, 0));
    report("keyctl", call(libc::SYS_keyctl, 0, -3, 0));
    report("pidfd of pid 1", call(libc::SYS_pidfd_open, 1, 0, 0));
    report("seize pid 1", call(libc::SYS_ptrace, 0x4206, 1, 0));
    report("namespace", call(libc::SYS_unshare, i64::from(libc::CLONE_NEWNS), 0, 0));
}

/// The kernel answers EINVAL to these magic numbers; the filter answers first.
#[allow(unsafe_code)]
fn forbidden_call() {
    // SAFETY: wrong magic numbers make reboot(2) fail without effect.
    unsafe { libc::syscall(libc::SYS_reboot, 0, 0, 0, 0) };
    say("alive", "after a forbidden call");
}

fn forbidden_call_of_a_child() {
    let mut child = std::process::Command::new("/agent/probe");
    let status = child.args(["--agent", "forbidden-call"]).status().unwrap();
    say("child", format!("{:?}", std::os::unix::process::ExitStatusExt::signal(&status)));
    loop {
        std::thread::park();
    }
}

fn eat_memory() {
    say("ready", "eating");
    let mut kept = Vec::new();
    loop {
        kept.push(vec![1_u8; 1 << 20]);
    }
}

/// Forks until the kernel says no; then tells how often it worked, and waits.
#[allow(unsafe_code)]
fn fork_bomb() {
    let mut children = 0;
    loop {
        // SAFETY: this program has one thread; the child only waits.
        match unsafe { libc::fork() } {
            -1 => break,
            0 => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => children += 1,
        }
        if children >= 5_000 {
            break;
        }
    }
    say("children", children);
    wait();
}

/// Stands in for `agentd-engine`: tells every client what it finds around itself, and ends when told to.
#[allow(unsafe_code)]
pub(crate) fn engine() -> std::process::ExitCode {
    use std::os::fd::FromRawFd;
    // SAFETY: the launcher gives an engine its listener at this number, and nothing else here owns it.
    let listener = unsafe { std::os::unix::net::UnixListener::from_raw_fd(3) };
    loop {
        let (mut client, _) = listener.accept().unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let wanted = ["Uid", "CapEff", "NoNewPrivs", "Seccomp", "SigBlk"];
        for line in status.lines().filter(|line| wanted.contains(&line.split(':').next().unwrap())) {
            writeln!(client, "{}", line.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap();
        }
        let devices = ["/dev/nvidia6", "/dev/nvidia7", "/dev/dri/renderD200"];
        for path in ["/etc/passwd", "/proc/1/status", "/dev/kmsg"].into_iter().chain(devices) {
            writeln!(client, "{path}: {}", std::fs::File::open(path).is_ok()).unwrap();
        }
        writeln!(client, "write: {}", std::fs::write("/dev/shm/engine", "x").is_ok()).unwrap();
        writeln!(client, "tcp: {}", TcpStream::connect("127.0.0.1:7070").is_ok()).unwrap();
        for (name, allowed) in swap_folder() {
            writeln!(client, "{name}: {allowed}").unwrap();
        }
        writeln!(client, "end:").unwrap();
        if read_line(&mut client) == "crash" {
            std::process::exit(9);
        }
    }
}

/// What may be done in the folder that the launcher has named, and beside it.
fn swap_folder() -> Vec<(&'static str, bool)> {
    let words: Vec<String> = std::env::args().collect();
    let after = |name: &str| words.iter().skip_while(|word| *word != name).nth(1);
    let Some(folder) = after("--swap-dir").map(std::path::PathBuf::from) else {
        return vec![("swap", false)];
    };
    let file = folder.join("1-1-1.kv");
    let written = std::fs::write(&file, "keys and values").is_ok();
    let read = std::fs::read(&file).is_ok_and(|bytes| bytes == b"keys and values");
    vec![
        ("swap", written && read && std::fs::remove_file(&file).is_ok() && !file.exists()),
        ("swap-folder", std::fs::create_dir(folder.join("inner")).is_ok()),
        ("swap-beside", std::fs::write(folder.with_file_name("other"), "x").is_ok()),
        ("swap-link", std::os::unix::fs::symlink("/etc/passwd", folder.join("link")).is_ok()),
        (
            "swap-bounded",
            after("--swap-disk-mib").is_some_and(|mib| mib.parse::<u64>().is_ok_and(|mib| mib > 0)),
        ),
    ]
}

/// Stands in for `agentd-engine limit`: does what the device's name says, and tells what it finds around itself.
pub(crate) fn limiter(words: &[String]) -> std::process::ExitCode {
    if words.iter().any(|word| word == "GPU-hangs") {
        loop {
            std::thread::park();
        }
    }
    let held = match words.iter().find(|word| word.starts_with("GPU-")).map(String::as_str) {
        Some("GPU-works" | "GPU-works-too") => Some(1 << 30),
        // Of twelve gibibytes.
        Some("GPU-holds-more") => Some(13_u64 << 30),
        _ => None,
    };
    if let Some(used_bytes) = held {
        println!("{{\"soft_bytes\":0,\"hard_bytes\":12884901888,\"used_bytes\":{used_bytes}}}");
        return std::process::ExitCode::SUCCESS;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let wanted = ["Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"];
    let lines = status.lines().filter(|line| wanted.contains(&line.split(':').next().unwrap()));
    let mut found: Vec<String> =
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for path in ["/etc/passwd", "/proc/1/status", "/dev/kmsg"] {
        found.push(format!("{path}: {}", std::fs::File::open(path).is_ok()));
    }
    let group = words.iter().skip_while(|word| *word != "--cgroup").nth(1).unwrap();
    let empty = std::fs::read_to_string(format!("{group}/cgroup.procs")).is_ok_and(|text| text.is_empty());
    found.push(format!("group: {empty}"));
    found.push(format!("write: {}", std::fs::write(format!("{group}/cgroup.freeze"), "0").is_ok()));
    found.push(format!("words: {}", words.join(" ")));
    let report = agentd_domain::fault::Report::environment("stub", "nothing", found.join("; "), "nothing");
    println!("{}", serde_json::to_string(&report).unwrap());
    std::process::ExitCode::FAILURE
}

fn fill_disk() {
    let block = vec![0_u8; 1 << 20];
    let mut file = std::fs::File::create("/work/fill").unwrap();
    let mut written = 0;
    let error = loop {
        match file.write(&block) {
            Ok(bytes) => written += bytes,
            Err(error) => break error,
        }
        if written > 1 << 30 {
            panic!("a gibibyte fitted");
        }
    };
    say("written", written);
    say("error", error.raw_os_error().unwrap_or(0));
    let mut files = 0;
    drop(std::fs::remove_file("/work/fill"));
    while files < 100_000 && std::fs::File::create(format!("/work/f{files}")).is_ok() {
        files += 1;
    }
    say("files", files);
}

/// What the agent finds around itself.
fn print_scene() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for key in
        ["Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk"]
    {
        let line = status.lines().find(|line| line.split(':').next() == Some(key)).unwrap_or("");
        say(
            key,
            line.split_once(':')
                .map_or("", |(_, value)| value)
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
        );
    }
    say("pid", std::process::id());
    say("cwd", std::env::current_dir().unwrap().display());
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let mut fds: Vec<String> = fds.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    fds.sort();
    // The last is the folder that is being read.
    fds.pop();
    say("fds", fds.join(" "));
    let mut variables: Vec<String> =
        std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    variables.sort();
    say("env", variables.join(" "));
    let mut nodes: Vec<String> = std::fs::read_dir("/dev")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    nodes.sort();
    say("dev", nodes.join(" "));
    say("work", std::fs::write("/work/note", "x").is_ok());
    say("tmp", std::fs::write("/tmp/note", "x").is_ok());
    say(
        "hostname",
        std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|error| error.to_string()),
    );
}
