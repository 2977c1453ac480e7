//! Bubblewrap with the same mounts, namespaces and system call filter.
//!
//! What it has no word for is left out, which is in its favour: a cgroup with limits, Landlock, quotas, resource
//! limits, the self-probe. As root it cannot change the uid: that takes a user namespace, which is the other variant, and
//! even there it is root's uid to the machine.

use crate::{Contender, Scene, until_first_byte};
use agentd_domain::plan::{Mount, SandboxPlan};
use agentd_sandbox::seccomp;
use std::fs::File;
use std::io::{Error, Result, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Started by root, who stays root without a capability.
    Root,
    /// A uid of its own, by a user namespace.
    Namespace,
}

pub struct Bubblewrap {
    user: User,
    arguments: Vec<String>,
    filter: PathBuf,
    exec: Vec<String>,
}

impl Bubblewrap {
    pub fn new(scene: &Scene, plan: &SandboxPlan, user: User) -> Result<Self> {
        let compiled = seccomp::compile(&plan.seccomp).map_err(|error| Error::other(error.to_string()))?;
        let filter = scene.scratch.join("filter");
        let mut file = File::create(&filter)?;
        for step in &compiled.program {
            // `struct sock_filter` of linux/filter.h.
            file.write_all(&step.code.to_ne_bytes())?;
            file.write_all(&[step.jt, step.jf])?;
            file.write_all(&step.k.to_ne_bytes())?;
        }
        let mut words: Vec<String> = Vec::new();
        let mut add = |more: &[&str]| words.extend(more.iter().map(|word| (*word).to_owned()));
        add(&["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"]);
        if user == User::Namespace {
            let uid = plan.uid.to_string();
            add(&["--unshare-user", "--uid", &uid, "--gid", &uid]);
        }
        add(&[
            "--new-session",
            "--die-with-parent",
            "--cap-drop",
            "ALL",
            "--hostname",
            "agent",
            "--clearenv",
        ]);
        for (name, value) in &plan.env {
            add(&["--setenv", name, value]);
        }
        for mount in &plan.mounts {
            match mount {
                Mount::ReadOnly { source, target, optional, .. } => {
                    let source = place(scene, source);
                    if *optional && !source.exists() {
                        continue;
                    }
                    add(&["--ro-bind", &text(&source), target]);
                }
                Mount::Symlink { target, points_to } => add(&["--symlink", points_to, target]),
                // Root's own: to root without a capability the agent's volume is closed.
                Mount::Work { target } => {
                    let work = scene.scratch.join("work");
                    std::fs::create_dir_all(&work)?;
                    add(&["--bind", &text(&work), target]);
                }
                Mount::Tmpfs { target, size_bytes } => {
                    add(&["--size", &size_bytes.to_string(), "--tmpfs", target]);
                }
                Mount::Proc { target } => add(&["--proc", target]),
                Mount::Dev { target } => add(&["--dev", target]),
                Mount::Text { .. } => return Err(Error::other("a plan with a network is not compared")),
            }
        }
        add(&["--remount-ro", "/", "--chdir", &plan.workdir]);
        Ok(Self { user, arguments: words, filter, exec: plan.exec.clone() })
    }
}

impl Contender for Bubblewrap {
    fn name(&self) -> &'static str {
        match self.user {
            User::Root => "bubblewrap",
            User::Namespace => "bubblewrap with a user namespace",
        }
    }

    fn start(&mut self) -> Result<Duration> {
        let filter = File::open(&self.filter)?;
        rustix::io::fcntl_setfd(&filter, rustix::io::FdFlags::empty())?;
        let mut command = Command::new("bwrap");
        command.args(&self.arguments).args(["--seccomp", &filter.as_raw_fd().to_string()]);
        command.arg("--").args(&self.exec);
        until_first_byte(&mut command)
    }
}

/// The agent's package is on the data disk, which is mounted noexec, and bubblewrap cannot take that back: it and crun
/// get a copy elsewhere.
pub fn place(scene: &Scene, source: &str) -> PathBuf {
    if source.starts_with("/data/") { scene.copied_package() } else { PathBuf::from(source) }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
