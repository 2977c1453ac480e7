//! The real launcher, agentd and engine, with agents of a test's own, below a folder of their own.
//!
//! The launcher looks for its programs and for bundled agents at the appliance's places: it is started in a mount
//! namespace where these lie over `/usr`. agentd has `--root`, its own uid and its own walls. Who starts it again
//! after a kill is the test, as init does.
//! What this machine lacks (cgroup controllers that belong to v1, quotas) the launcher is told to go without.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a loaded machine; only a broken test waits this long.
pub const LIMIT: Duration = Duration::from_secs(60);
const AGENTD_UID: u32 = 200;

pub struct Scene {
    folder: TempDir,
    programs: Programs,
    cgroup_root: PathBuf,
    cgroup_mounted: bool,
    without: String,
    launcher: Option<Child>,
    agentd: Option<Child>,
    told: Option<Receiver<(Instant, Value)>>,
    /// What all lives of agentd and the launcher have said, for a test that fails.
    said: Arc<Mutex<Vec<String>>>,
    port: u16,
}

/// Where the programs are, as the image has them.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The folder of the static ones.
    pub fixed: PathBuf,
    pub dynamic: PathBuf,
    /// The engine itself; its libraries lie beside it.
    pub engine: PathBuf,
    /// The folder of its back ends.
    pub backends: PathBuf,
    pub models: PathBuf,
}

impl Programs {
    /// Where `scripts/test host` has put them. The error is which variable is missing.
    pub fn from_env() -> Result<Self, String> {
        let set = |name: &str| {
            let why = || format!("{name} is not set; `scripts/test host` sets it");
            std::env::var_os(name).map(PathBuf::from).ok_or_else(why)
        };
        let engine = set("AGENTD_ENGINE_BIN")?;
        Ok(Self {
            fixed: set("AGENTD_STATIC_BIN")?,
            dynamic: set("AGENTD_BIN")?,
            backends: engine.with_file_name("backends"),
            engine,
            models: set("AGENTD_MODELS")?,
        })
    }
}

/// An agent that the scene installs.
#[derive(Debug, Clone)]
pub struct Package {
    pub name: String,
    /// Copied to `/agent/bin/<its file's name>`.
    pub program: PathBuf,
    /// `agent.toml`.
    pub manifest: String,
}

/// A run as agentd told that it serves it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Served {
    pub agent_id: String,
    pub run_id: String,
    pub pid: i32,
}

impl Scene {
    /// With these agents, nothing started. The error is why this cannot run here.
    pub fn new(programs: Programs, agents: &[Package]) -> Result<Self, String> {
        if !run(Command::new("unshare").args(["--mount", "true"])) {
            return Err("a mount namespace needs root and `unshare`".to_owned());
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let mut scene = Self {
            folder,
            programs,
            cgroup_root: PathBuf::new(),
            cgroup_mounted: false,
            without: String::new(),
            launcher: None,
            agentd: None,
            told: None,
            said: Arc::default(),
            port,
        };
        scene.lay_out(agents);
        scene.find_cgroups()?;
        Ok(scene)
    }

    /// A path of the appliance, below the scene's folder.
    pub fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn lay_out(&self, agents: &[Package]) {
        fs::set_permissions(self.folder.path(), fs::Permissions::from_mode(0o711)).expect("permissions");
        let models = self.at("data/models/builtin");
        for folder in ["state/agentd", "bin", "over/lib/agentd/backends", "over/share/agentd/agents"] {
            fs::create_dir_all(self.at(folder)).expect("a folder");
        }
        fs::create_dir_all(&models).expect("a folder");
        fs::create_dir_all(self.at("usr/share/agentd/agents")).expect("a folder");
        for name in ["tiny.gguf", "all-minilm-l6-v2.q8_0.gguf"] {
            copy(&self.programs.models.join(name), &models.join(name), 0o644);
        }
        // The engine's walls open the data partition's models to it; the file that is read counts, not its link.
        symlink(&models, self.at("usr/share/agentd/models")).expect("a link");
        for owned in ["data", "data/models", "state/agentd"] {
            chown(self.at(owned), Some(AGENTD_UID), Some(AGENTD_UID)).expect("an owner");
        }
        copy(&self.programs.dynamic.join("agentd"), &self.at("bin/agentd"), 0o755);
        let over = self.at("over/lib/agentd");
        copy(&self.programs.fixed.join("agent-jail"), &over.join("agent-jail"), 0o755);
        copy(&self.programs.engine, &over.join("agentd-engine"), 0o755);
        let beside = self.programs.engine.parent().expect("the engine's folder");
        for (from, to) in
            [(beside.to_owned(), over.clone()), (self.programs.backends.clone(), over.join("backends"))]
        {
            for entry in fs::read_dir(&from).expect("a folder").flatten() {
                let name = entry.file_name();
                if name.to_string_lossy().contains(".so") && entry.path().is_file() {
                    copy(&entry.path(), &to.join(name), 0o755);
                }
            }
        }
        for agent in agents {
            for place in ["over/share/agentd/agents", "usr/share/agentd/agents"] {
                let package = self.at(place).join(&agent.name);
                fs::create_dir_all(package.join("bin")).expect("a folder");
                fs::write(package.join("agent.toml"), &agent.manifest).expect("a manifest");
                let name = agent.program.file_name().expect("a program has a name");
                copy(&agent.program, &package.join("bin").join(name), 0o755);
            }
        }
    }

    fn find_cgroups(&mut self) -> Result<(), String> {
        let standard = Path::new("/sys/fs/cgroup");
        let tree = if standard.join("cgroup.controllers").exists() {
            standard.to_owned()
        } else {
            let own = self.at("cgroup2");
            fs::create_dir(&own).expect("a folder");
            if !run(Command::new("mount").args(["-t", "cgroup2", "none"]).arg(&own)) {
                return Err("no cgroup v2 can be mounted".to_owned());
            }
            self.cgroup_mounted = true;
            own
        };
        let available = fs::read_to_string(tree.join("cgroup.controllers")).unwrap_or_default();
        // Quotas need a file system of its own, and nothing here is about them.
        let mut without = vec!["quota"];
        for name in ["cpu", "io", "memory", "pids"] {
            let offered = available.split_whitespace().any(|offered| offered == name)
                && fs::write(tree.join("cgroup.subtree_control"), format!("+{name}")).is_ok();
            if !offered {
                without.push(name);
            }
        }
        self.without = without.join(",");
        self.cgroup_root = tree.join(format!("agentd-outlive-{}-{}", std::process::id(), self.port));
        fs::create_dir(&self.cgroup_root).map_err(|error| format!("no cgroup can be made: {error}"))
    }

    pub fn start_launcher(&mut self) {
        let over = format!("lowerdir={}:/usr", self.at("over").display());
        let mount = format!("mount -t overlay overlay -o {over} /usr && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &mount, "sh"]);
        command.arg(self.programs.fixed.join("agent-launcher"));
        let values = [
            ("--run-dir", self.at("run/agentd")),
            ("--data-dir", self.at("data")),
            ("--cgroup-root", self.cgroup_root.clone()),
        ];
        for (name, value) in values {
            command.arg(name).arg(value);
        }
        command.args(["--agentd-uid", &AGENTD_UID.to_string(), "--testing-without", &self.without]);
        // That of a launcher that was killed.
        let _ = fs::remove_file(self.at("run/agentd/launcher.sock"));
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the launcher");
        self.keep(child.stderr.take().expect("a pipe"), None);
        self.launcher = Some(child);
        let socket = self.at("run/agentd/launcher.sock");
        self.until("the launcher's socket is there", || socket.exists());
    }

    /// As init does. Returns when the process exists.
    pub fn start_agentd(&mut self) -> Instant {
        let mut command = Command::new(self.at("bin/agentd"));
        command.arg("--root").arg(self.folder.path()).args(["--port", &self.port.to_string()]);
        command.env_clear().uid(AGENTD_UID).gid(AGENTD_UID);
        let begun = Instant::now();
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("agentd");
        let (tell, told) = channel();
        self.keep(child.stderr.take().expect("a pipe"), Some(tell));
        self.told = Some(told);
        self.agentd = Some(child);
        begun
    }

    fn keep(
        &self,
        from: impl std::io::Read + Send + 'static,
        tell: Option<std::sync::mpsc::Sender<(Instant, Value)>>,
    ) {
        let said = Arc::clone(&self.said);
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let now = Instant::now();
                if let (Some(tell), Ok(value)) = (&tell, serde_json::from_str::<Value>(&line)) {
                    let _ = tell.send((now, value));
                }
                said.lock().expect("unpoisoned").push(line);
            }
        });
    }

    /// SIGKILL, at once.
    pub fn kill_agentd(&mut self) {
        let mut child = self.agentd.take().expect("agentd runs");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    pub fn kill_launcher(&mut self) {
        let mut child = self.launcher.take().expect("the launcher runs");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    pub fn agentd_lives(&mut self) -> bool {
        self.agentd.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    pub fn agentd_pid(&self) -> i32 {
        self.agentd.as_ref().map_or(0, |child| child.id() as i32)
    }

    pub fn launcher_pid(&self) -> i32 {
        self.launcher.as_ref().map_or(0, |child| child.id() as i32)
    }

    /// After this the installed agents are known to the store alone, as on a verified root, whose packages are not
    /// read again at each start.
    pub fn forget_packages(&self) {
        fs::remove_dir_all(self.at("usr/share/agentd/agents")).expect("removed");
    }

    /// Takes what this life of agentd says until `seen` is satisfied; says when that was, or `None` at the deadline.
    pub fn hear(&self, deadline: Instant, mut seen: impl FnMut(&Value) -> bool) -> Option<Instant> {
        let told = self.told.as_ref().expect("agentd was started");
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match told.recv_timeout(left) {
                Ok((at, line)) => {
                    if seen(&line["fields"]) {
                        return Some(at);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Until so many runs are served; the runs, and when the last was.
    pub fn hear_runs(&self, count: usize, deadline: Instant) -> Option<(BTreeMap<String, Served>, Instant)> {
        let mut runs = BTreeMap::new();
        let at = self.hear(deadline, |fields| {
            if let Some(served) = served(fields) {
                runs.insert(served.agent_id.clone(), served);
            }
            runs.len() == count
        })?;
        Some((runs, at))
    }

    /// The folders that the agents may write, by the agents' ids.
    pub fn works(&self) -> BTreeMap<String, PathBuf> {
        let entries = fs::read_dir(self.at("data/agents")).expect("the agents' folder").flatten();
        let named = entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()));
        named.map(|(id, path)| (id, path.join("work"))).collect()
    }

    pub fn memory_of(&self, agent_id: &str) -> PathBuf {
        self.at("data/agents").join(agent_id).join("memory.redb")
    }

    /// Where the launcher keeps how runs ended until agentd has stored it.
    pub fn exit_records(&self) -> usize {
        fs::read_dir(self.at("run/agentd/runs")).expect("the records' folder").count()
    }

    pub fn system_store(&self) -> PathBuf {
        self.at("data/system.redb")
    }

    pub fn until(&self, what: &str, mut happened: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !happened() {
            assert!(Instant::now() < deadline, "waited for this in vain: {what}\n{}", self.tail());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How often these words were said.
    pub fn said(&self, words: &str) -> usize {
        self.said.lock().expect("unpoisoned").iter().filter(|line| line.contains(words)).count()
    }

    /// The newest of what was said; of engine, models and launcher more than of all the others.
    pub fn tail(&self) -> String {
        let said = self.said.lock().expect("unpoisoned");
        let (before, newest) = said.split_at(said.len().saturating_sub(60));
        let about = |line: &&String| ["engine", "model", "launcher"].iter().any(|word| line.contains(word));
        let mut kept: Vec<&String> = before.iter().rev().filter(about).take(60).collect();
        kept.reverse();
        kept.into_iter().chain(newest).map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for child in [&mut self.agentd, &mut self.launcher] {
            if let Some(mut child) = child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        // Their processes die with the launcher, a moment later.
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.cgroup_root.exists() && Instant::now() < deadline {
            remove_groups(&self.cgroup_root);
            std::thread::sleep(Duration::from_millis(20));
        }
        if self.cgroup_mounted {
            run(Command::new("umount").arg(self.at("cgroup2")));
        }
    }
}

fn served(fields: &Value) -> Option<Served> {
    if fields["message"] != "a run is served" {
        return None;
    }
    Some(Served {
        agent_id: fields["agent_id"].as_str()?.to_owned(),
        run_id: fields["run_id"].as_str()?.to_owned(),
        pid: i32::try_from(fields["pid"].as_i64()?).ok()?,
    })
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

fn copy(from: &Path, to: &Path, mode: u32) {
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).expect("permissions");
}

fn run(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
