//! This machine with some files covered, for one run of `scripts/bootstrap.sh`.
//!
//! Always: the covers are bind mounts in a mount namespace that ends with the run, and `apt-get` is always covered
//!         by a stand-in that writes down what it was asked, so that no run changes this machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The user who owns nothing, on every distribution.
const NOBODY: &str = "65534";

const DPKG_STATUS: &str = "/var/lib/dpkg/status";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    Root,
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sudo {
    Absent,
    AsksForPassword,
    WithoutPassword,
}

#[derive(Debug)]
pub struct Run {
    /// The line after the script was reached.
    pub went_on: bool,
    /// On standard error.
    pub said: String,
    /// What the stand-ins were asked, a line each.
    pub done: String,
}

pub struct Machine {
    folder: TempDir,
    /// What lies over what.
    covers: Vec<(PathBuf, PathBuf)>,
    kernel_source: Option<PathBuf>,
}

impl Machine {
    /// # Errors
    /// Why files cannot be covered here.
    pub fn new() -> Result<Self, String> {
        let may = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
        if !may.is_ok_and(|status| status.success()) {
            return Err("a mount namespace needs root and `unshare`".to_owned());
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let machine = Self { folder, covers: Vec::new(), kernel_source: None };
        fs::set_permissions(machine.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // A copy, because another user may not be able to read this checkout.
        fs::create_dir(machine.path("scripts")).unwrap();
        fs::create_dir(machine.path("programs")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/bootstrap.sh");
        fs::copy(script, machine.path("scripts/bootstrap.sh")).expect("scripts/bootstrap.sh");
        fs::write(machine.path("done"), "").unwrap();
        fs::set_permissions(machine.path("done"), fs::Permissions::from_mode(0o666)).unwrap();
        let mut machine = machine;
        machine.stand_in("apt-get", "echo \"$(id -un): apt-get $*\" >>DONE");
        Ok(machine)
    }

    /// What `/etc/os-release` says.
    pub fn distribution(&mut self, os_release: &str) {
        let file = self.path("os-release");
        fs::write(&file, os_release).unwrap();
        self.covers.push((file, "/etc/os-release".into()));
    }

    /// dpkg has never heard of the package.
    pub fn forget_package(&mut self, name: &str) {
        let status = fs::read_to_string(DPKG_STATUS).unwrap_or_default();
        let is_other = |entry: &&str| entry.lines().next() != Some(&format!("Package: {name}"));
        let others: Vec<_> = status.split("\n\n").filter(is_other).collect();
        let file = self.path("dpkg-status");
        fs::write(&file, others.join("\n\n")).unwrap();
        self.covers.push((file, DPKG_STATUS.into()));
    }

    /// The program cannot be executed.
    pub fn hide_program(&mut self, name: &str) {
        let program = Path::new("/usr/bin").join(name);
        if program.exists() {
            self.covers.push(("/dev/null".into(), program));
        }
    }

    pub fn sudo(&mut self, sudo: Sudo) {
        match sudo {
            Sudo::Absent => self.hide_program("sudo"),
            Sudo::AsksForPassword => self.stand_in("sudo", "echo 'a password is required' >&2; exit 1"),
            Sudo::WithoutPassword => self.stand_in(
                "sudo",
                "if [ \"$1\" = -n ]; then shift; else echo \"sudo $*\" >>DONE; fi\nexec \"$@\"",
            ),
        }
    }

    /// `AGENTD_KERNEL_SOURCE` names a file.
    pub fn kernel_source(&mut self) {
        let file = self.path("linux.tar");
        fs::write(&file, "").unwrap();
        self.kernel_source = Some(file);
    }

    /// Sources the script as `scripts/run` does.
    pub fn bootstrap(&mut self, user: User) -> Run {
        let mut covering = String::new();
        for (from, onto) in &self.covers {
            covering += &format!("mount --bind '{}' '{}'\n", from.display(), onto.display());
        }
        let user = match user {
            User::Root => String::new(),
            User::Nobody => format!("setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups"),
        };
        let script = self.path("scripts/bootstrap.sh");
        let run = format!("bash -euo pipefail -c '. \"$1\"; echo went on' - '{}'", script.display());
        let path =
            format!("{}:{}", std::env::var("PATH").unwrap_or_default(), self.path("programs").display());
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-euc", &format!("{covering}exec {user} {run}")])
            .current_dir("/")
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env_remove("AGENTD_KERNEL_SOURCE")
            .stdin(Stdio::null());
        if let Some(file) = &self.kernel_source {
            command.env("AGENTD_KERNEL_SOURCE", file);
        }
        let output = command.output().expect("unshare");
        let went_on = String::from_utf8_lossy(&output.stdout).contains("went on");
        assert_eq!(went_on, output.status.success(), "{output:?}");
        Run {
            went_on,
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
            done: fs::read_to_string(self.path("done")).unwrap(),
        }
    }

    /// A program in the place of the machine's own, or as the only one of its name. `DONE` is the list of deeds.
    fn stand_in(&mut self, name: &str, body: &str) {
        let file = self.path("programs").join(name);
        let done = self.path("done");
        let text = format!("#!/bin/sh\n{body}\n").replace("DONE", &done.display().to_string());
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let own = Path::new("/usr/bin").join(name);
        if own.exists() {
            self.covers.push((file, own));
        }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }
}
