//! A launcher of our own, with folders, cgroups and a data file system that nothing else uses.

use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::launcher::{ExitCause, ExitRecord};
use agentd_domain::plan::{DiskQuota, SandboxPlan};
use agentd_sandbox::client::{Launcher, LauncherError, RunHandles};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longer than anything here takes on a loaded machine; only a broken test waits this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
const QUOTA: DiskQuota = DiskQuota { bytes: 8 << 20, inodes: 50 };

static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Scene {
    pub folder: tempfile::TempDir,
    pub data: PathBuf,
    pub missing: Vec<&'static str>,
    cgroup_root: PathBuf,
    launcher: Option<Child>,
    mounts: Vec<PathBuf>,
    agentd_uid: u32,
    /// Whether the launcher is told what is missing.
    excuses: bool,
}

/// Why nothing of this can run here, or the controllers and features that are missing.
fn capabilities_of_this_machine() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root".to_owned());
    }
    agentd_sandbox::landlock::require(agentd_sandbox::landlock::ABI_MIN).map_err(|error| error.to_string())
}

impl Scene {
    pub(crate) fn new() -> Result<Self, String> {
        Self::with_agentd_uid(0)
    }

    /// A launcher that is told of nothing that this machine lacks, as on the appliance.
    pub(crate) fn without_excuses() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".to_owned());
        }
        Self::build(0, false)
    }

    pub(crate) fn with_agentd_uid(agentd_uid: u32) -> Result<Self, String> {
        capabilities_of_this_machine()?;
        Self::build(agentd_uid, true)
    }

    fn build(agentd_uid: u32, excuses: bool) -> Result<Self, String> {
        let folder = tempfile::tempdir().unwrap();
        let mut scene = Self {
            data: folder.path().join("data"),
            cgroup_root: PathBuf::new(),
            folder,
            missing: Vec::new(),
            launcher: None,
            mounts: Vec::new(),
            agentd_uid,
            excuses,
        };
        std::fs::create_dir(&scene.data).unwrap();
        // Another uid starts the engine, and must be able to walk there.
        std::fs::set_permissions(scene.folder.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), scene.engine()).unwrap();
        scene.mount_data();
        scene.find_cgroups()?;
        scene.start_launcher();
        Ok(scene)
    }

    pub(crate) fn lacks(&self, feature: &str) -> Option<String> {
        self.missing
            .contains(&feature)
            .then(|| format!("this machine offers no {feature} (see --testing-without)"))
    }

    /// A file system with user quotas that the environment names (`AGENTD_TEST_DATA`), or an ext4 in a file; without
    /// loop devices and quotas a plain folder.
    fn mount_data(&mut self) {
        if let Some(prepared) = std::env::var_os("AGENTD_TEST_DATA") {
            self.data = Path::new(&prepared).join(format!("data-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
            return std::fs::create_dir(&self.data).unwrap();
        }
        let image = self.folder.path().join("data.img");
        let made = std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).is_ok()
            && quiet(
                Command::new("mkfs.ext4").args(["-q", "-O", "quota", "-E", "quotatype=usrquota"]).arg(&image),
            )
            && quiet(
                Command::new("mount")
                    .args(["-o", "loop,nosuid,nodev,noexec,usrquota"])
                    .arg(&image)
                    .arg(&self.data),
            );
        if made {
            self.mounts.push(self.data.clone());
        } else {
            self.missing.push("quota");
        }
    }

    fn find_cgroups(&mut self) -> Result<(), String> {
        let standard = Path::new("/sys/fs/cgroup");
        let tree = if standard.join("cgroup.controllers").exists() {
            standard.to_owned()
        } else {
            let own = self.folder.path().join("cgroup2");
            std::fs::create_dir(&own).unwrap();
            if !quiet(Command::new("mount").args(["-t", "cgroup2", "none"]).arg(&own)) {
                return Err("no cgroup v2 can be mounted".to_owned());
            }
            self.mounts.push(own.clone());
            own
        };
        let available = std::fs::read_to_string(tree.join("cgroup.controllers")).unwrap();
        for name in ["cpu", "io", "memory", "pids"] {
            let offered = available.split_whitespace().any(|offered| offered == name)
                && std::fs::write(tree.join("cgroup.subtree_control"), format!("+{name}")).is_ok();
            if !offered {
                self.missing.push(name);
            }
        }
        self.cgroup_root =
            tree.join(format!("agentd-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&self.cgroup_root).map_err(|error| format!("no cgroup can be made: {error}"))
    }

    pub(crate) fn start_launcher(&mut self) {
        let mut command = Command::new(program("agent-launcher", env!("CARGO_BIN_EXE_agent-launcher")));
        command.stdin(Stdio::null());
        let pairs = [
            ("--run-dir", self.run_dir().display().to_string()),
            ("--data-dir", self.data.display().to_string()),
            ("--cgroup-root", self.cgroup_root.display().to_string()),
            ("--jail", program("agent-jail", env!("CARGO_BIN_EXE_agent-jail")).display().to_string()),
            ("--engine", self.engine().display().to_string()),
            ("--agentd-uid", self.agentd_uid.to_string()),
        ];
        for (name, value) in pairs {
            command.args([name, &value]);
        }
        if self.excuses && !self.missing.is_empty() {
            command.args(["--testing-without", &self.missing.join(",")]);
        }
        let _ = std::fs::remove_file(self.socket());
        self.launcher = Some(command.spawn().unwrap());
        until("the launcher listens", || {
            self.client().list().is_ok() || matches!(self.client().list(), Err(LauncherError::Refused(_)))
        });
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// This test program, standing in for the engine.
    fn engine(&self) -> PathBuf {
        self.folder.path().join("engine")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join("launcher.sock")
    }

    pub(crate) fn client(&self) -> Launcher {
        Launcher::at(self.socket())
    }

    pub(crate) fn kill_launcher(&mut self) {
        let mut child = self.launcher.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and the exit status.
    pub(crate) fn stop_launcher(&mut self) -> std::process::ExitStatus {
        let mut child = self.launcher.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap()
    }

    /// An agent whose program is this test program, doing `words`.
    pub(crate) fn agent(&self, words: &[&str]) -> SandboxPlan {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut plan = fixture_plan();
        let old = plan.agent_id.to_string();
        plan.agent_id =
            AgentId(Uuid::from_u128(0x0190_0000_0000_7000_9000_0000_0000_0000 + u128::from(number)));
        let text = serde_json::to_string(&plan).unwrap().replace(&old, &plan.agent_id.to_string());
        plan = serde_json::from_str(&text).unwrap();
        plan.uid = 1_000_100 + number;
        plan.exec = ["/agent/probe", "--agent"].iter().chain(words).map(|word| (*word).to_owned()).collect();
        self.client().prepare_agent(plan.agent_id, plan.uid, QUOTA).unwrap();
        let package = self.data.join("agents").join(plan.agent_id.to_string()).join("package");
        std::fs::create_dir(&package).unwrap();
        let program = package.join("probe");
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        for path in [&package, &program] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        plan
    }

    pub(crate) fn start(&self, plan: &SandboxPlan) -> Running {
        let run_id = new_run();
        let handles = self.client().start(run_id, plan.clone()).unwrap_or_else(|error| panic!("{error}"));
        Running { run_id, handles, text: String::new() }
    }

    /// The exit record of a run that ends by itself or was told to.
    pub(crate) fn record(&self, run: &Running) -> ExitRecord {
        assert!(readable(&run.handles.sockets.pidfd, LIMIT), "the run did not end");
        let mut found = None;
        until("the exit record appears", || {
            found =
                self.client().list().unwrap().exits.into_iter().find(|record| record.run_id == run.run_id);
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn cause(&self, run: &Running) -> ExitCause {
        self.record(run).cause
    }

    /// The group of the set `host`.
    pub(crate) fn cgroup_of_engine(&self) -> PathBuf {
        self.cgroup_root.join("engines/host")
    }

    pub(crate) fn cgroup_of(&self, plan: &SandboxPlan, run: &Running) -> PathBuf {
        self.cgroup_root.join("agents").join(plan.agent_id.to_string()).join(run.run_id.to_string())
    }
}

/// Where a program under test is: what cargo has built, or a folder that the environment names (`AGENTD_TEST_PROGRAMS`).
fn program(name: &str, built: &str) -> PathBuf {
    std::env::var_os("AGENTD_TEST_PROGRAMS")
        .map_or_else(|| PathBuf::from(built), |folder| Path::new(&folder).join(name))
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(mut child) = self.launcher.take() {
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_child(&child),
                rustix::process::Signal::TERM,
            );
            let _ = child.wait();
        }
        for name in ["agents", "engines"] {
            let _ = std::fs::remove_dir(self.cgroup_root.join(name));
        }
        let _ = std::fs::remove_dir(&self.cgroup_root);
        let _ = std::fs::remove_dir_all(self.data.join("agents"));
        for mount in self.mounts.iter().rev() {
            quiet(Command::new("umount").arg(mount));
        }
    }
}

pub(crate) struct Running {
    pub run_id: RunId,
    pub handles: RunHandles,
    text: String,
}

impl Running {
    /// The value of the next line `name: value` of the agent's standard output.
    pub(crate) fn says(&mut self, name: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            while let Some((line, rest)) = self.text.split_once('\n') {
                let (line, rest) = (line.to_owned(), rest.to_owned());
                self.text = rest;
                if let Some((key, value)) = line.split_once(": ")
                    && key == name
                {
                    return value.to_owned();
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                readable(&self.handles.sockets.stdout, left),
                "the agent did not say `{name}`; {}",
                self.errors()
            );
            let mut bytes = [0; 4096];
            let read = rustix::io::read(&self.handles.sockets.stdout, &mut bytes).unwrap();
            assert!(read > 0, "the agent ended before it said `{name}`; {}", self.errors());
            self.text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    /// A run that was handed over.
    pub(crate) fn adopted(run_id: RunId, handles: RunHandles) -> Self {
        Self { run_id, handles, text: String::new() }
    }

    /// All lines up to the one called `last`.
    pub(crate) fn text_until(&mut self, last: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        while !self.text.lines().any(|line| line.starts_with(&format!("{last}: "))) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                readable(&self.handles.sockets.stdout, left),
                "no `{last}` in {}; {}",
                self.text,
                self.errors()
            );
            let mut bytes = [0; 4096];
            let read = rustix::io::read(&self.handles.sockets.stdout, &mut bytes).unwrap();
            assert!(read > 0, "the agent ended after {}; {}", self.text, self.errors());
            self.text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        std::mem::take(&mut self.text)
    }

    fn errors(&self) -> String {
        let mut bytes = [0; 4096];
        let read = rustix::io::read(&self.handles.sockets.stderr, &mut bytes).unwrap_or(0);
        format!("its standard error: {}", String::from_utf8_lossy(&bytes[..read]))
    }
}

pub(crate) fn fixture_plan() -> SandboxPlan {
    serde_json::from_str(include_str!("../fixtures/plan.json")).unwrap()
}

pub(crate) fn new_run() -> RunId {
    RunId(Uuid::now_v7())
}

pub(crate) fn readable(fd: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    let mut waiting = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    poll(&mut waiting, Some(&limit)).unwrap() > 0
}

/// Asks again and again for something that no descriptor announces.
pub(crate) fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < deadline, "waited for this in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn quiet(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
