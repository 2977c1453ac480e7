//! Our own way: the launcher's real protocol over its real socket, as agentd speaks it.
//!
//! Counted: the request, the checks, a cgroup with all limits, six namespaces, the new root, Landlock, seccomp, the
//! self-probe, exec, the descriptors' way back, and the byte. The volume and its quota are made once, when an agent is
//! installed.

use crate::{Contender, Scene};
use agentd_domain::ids::RunId;
use agentd_domain::plan::{DiskQuota, SandboxPlan};
use agentd_sandbox::client::{Launcher, RunHandles};
use std::io::{Error, Result};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use uuid::Uuid;

const QUOTA: DiskQuota = DiskQuota { bytes: 8 << 20, inodes: 50 };
/// Far more than a start takes on the slowest machine.
const LIMIT: Duration = Duration::from_secs(30);

pub struct Agentd {
    client: Launcher,
    plan: SandboxPlan,
    // Ends with this value.
    _launcher: Serving,
}

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        // It ends every run with it. It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Agentd {
    pub fn new(scene: &Scene, plan: SandboxPlan) -> Result<Self> {
        let run_dir = scene.scratch.join("launcher");
        let mut command = Command::new(&scene.launcher);
        command.stdin(Stdio::null());
        for (name, value) in [
            ("--run-dir", run_dir.as_path()),
            ("--data-dir", &scene.data),
            ("--cgroup-root", &scene.cgroup_root),
            ("--jail", &scene.jail),
        ] {
            command.arg(name).arg(value);
        }
        command.args(["--agentd-uid", "0"]);
        if !scene.without.is_empty() {
            command.args(["--testing-without", &scene.without]);
        }
        let launcher = Serving(command.spawn()?);
        let client = Launcher::at(run_dir.join("launcher.sock"));
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = client.list() {
            if Instant::now() > deadline {
                return Err(Error::other(error.to_string()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(problem) = client.list().map_err(other)?.problems.first() {
            return Err(Error::other(problem.to_string()));
        }
        let ours = Self { client, plan, _launcher: launcher };
        ours.prepare(scene, &ours.plan)?;
        install(&scene.programs, &scene.copied_package())?;
        Ok(ours)
    }

    /// What agentd does when an agent is installed.
    pub fn prepare(&self, scene: &Scene, plan: &SandboxPlan) -> Result<()> {
        self.client.prepare_agent(plan.agent_id, plan.uid, QUOTA).map_err(other)?;
        install(&scene.programs, &scene.package(&plan.agent_id.to_string()))
    }

    pub fn client(&self) -> &Launcher {
        &self.client
    }

    pub fn plan(&self) -> &SandboxPlan {
        &self.plan
    }
}

impl Contender for Agentd {
    fn name(&self) -> &'static str {
        "agentd"
    }

    fn start(&mut self) -> Result<Duration> {
        let run_id = RunId(Uuid::now_v7());
        let begin = Instant::now();
        let run = self.client.start(run_id, self.plan.clone()).map_err(other)?;
        wait_readable(&run.sockets.stdout)?;
        let mut byte = [0];
        let read = rustix::io::read(&run.sockets.stdout, &mut byte)?;
        let took = begin.elapsed();
        self.finish(run_id, &run)?;
        if read == 1 { Ok(took) } else { Err(Error::other("the program ended without its byte")) }
    }
}

impl Agentd {
    /// Waits for the run's end and its record, so that one run at a time exists.
    fn finish(&self, run_id: RunId, run: &RunHandles) -> Result<()> {
        wait_readable(&run.sockets.pidfd)?;
        let deadline = Instant::now() + LIMIT;
        while !self.client.list().map_err(other)?.exits.iter().any(|exit| exit.run_id == run_id) {
            if Instant::now() > deadline {
                return Err(Error::other("the run left no exit record"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.client.forget_exit(run_id).map_err(other)
    }
}

/// A package with the programs that are started here.
fn install(programs: &Path, package: &Path) -> Result<()> {
    std::fs::create_dir_all(package)?;
    let everybody = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755));
    everybody(package)?;
    for name in ["one-byte", "idle"] {
        let program = package.join(name);
        std::fs::copy(programs.join(name), &program)?;
        everybody(&program)?;
    }
    Ok(())
}

pub fn wait_readable(fd: &std::os::fd::OwnedFd) -> Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit))?;
    if ready == 0 { Err(Error::other("nothing within half a minute")) } else { Ok(()) }
}

pub fn other(error: impl std::fmt::Display) -> Error {
    Error::other(error.to_string())
}
