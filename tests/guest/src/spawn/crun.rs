//! crun with the same mounts, namespaces, limits and list of system calls, by the kernel's files instead of systemd.
//!
//! `/proc` is cut down as ours is (`subset=pid`), so nothing is left in it that would have to be masked mount by
//! mount. Devices are limited by which nodes there are, by no program in the kernel: ours has no `bpf` system call.
//! Without are Landlock, quotas and the self-probe.

use crate::bubblewrap::place;
use crate::{Contender, Scene, until_first_byte};
use agentd_domain::plan::{Mount, SandboxPlan};
use serde_json::{Value, json};
use std::io::Result;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

pub struct Crun {
    bundle: PathBuf,
    state: PathBuf,
    manager: &'static str,
    started: u32,
}

impl Crun {
    pub fn new(scene: &Scene, plan: &SandboxPlan) -> Result<Self> {
        let bundle = scene.scratch.join("bundle");
        let root = bundle.join("rootfs");
        std::fs::create_dir_all(&root)?;
        let mut mounts = Vec::new();
        for mount in &plan.mounts {
            match mount {
                Mount::ReadOnly { source, target, exec, optional } => {
                    let source = place(scene, source);
                    if *optional && !source.exists() {
                        continue;
                    }
                    let exec = if *exec { "exec" } else { "noexec" };
                    mounts.push(bound(&source, target, &["ro", "nosuid", "nodev", exec]));
                }
                Mount::Symlink { target, points_to } => {
                    let link = root.join(target.trim_start_matches('/'));
                    if link.symlink_metadata().is_err() {
                        symlink(points_to, link)?;
                    }
                }
                Mount::Work { target } => {
                    let source = scene.work(&plan.agent_id.to_string());
                    mounts.push(bound(&source, target, &["rw", "nosuid", "nodev", "noexec"]));
                }
                Mount::Tmpfs { target, size_bytes } => {
                    let size = format!("size={size_bytes}");
                    mounts.push(made("tmpfs", target, &["nosuid", "nodev", "noexec", "mode=1777", &size]));
                }
                Mount::Proc { target } => {
                    let options = ["nosuid", "nodev", "noexec", "hidepid=invisible", "subset=pid"];
                    mounts.push(made("proc", target, &options));
                }
                Mount::Dev { target } => {
                    mounts.push(made("tmpfs", target, &["nosuid", "noexec", "mode=755", "size=64k"]));
                }
                Mount::Text { .. } => {
                    return Err(std::io::Error::other("a plan with a network is not compared"));
                }
            }
        }
        std::fs::write(bundle.join("config.json"), configuration(scene, plan, &mounts).to_string())?;
        // Without cgroup v2 it can only do without.
        let manager = if scene.without.is_empty() { "cgroupfs" } else { "disabled" };
        Ok(Self { bundle, state: scene.scratch.join("crun"), manager, started: 0 })
    }
}

impl Contender for Crun {
    fn name(&self) -> &'static str {
        "crun"
    }

    fn start(&mut self) -> Result<Duration> {
        self.started += 1;
        let mut command = Command::new("crun");
        command
            .arg(format!("--cgroup-manager={}", self.manager))
            .arg("--root")
            .arg(&self.state)
            .args(["run", "--bundle"])
            .arg(&self.bundle)
            .arg(format!("start-{}", self.started));
        until_first_byte(&mut command)
    }
}

fn bound(source: &std::path::Path, target: &str, options: &[&str]) -> Value {
    let options: Vec<&str> = [&["bind"], options].concat();
    json!({ "destination": target, "type": "bind", "source": source, "options": options })
}

fn made(kind: &str, target: &str, options: &[&str]) -> Value {
    json!({ "destination": target, "type": kind, "source": kind, "options": options })
}

fn configuration(scene: &Scene, plan: &SandboxPlan, mounts: &[Value]) -> Value {
    let none: [&str; 0] = [];
    let env: Vec<String> = plan.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let rlimits = plan.rlimits.iter().map(
        |limit| json!({ "type": format!("RLIMIT_{}", limit.name), "soft": limit.soft, "hard": limit.hard }),
    );
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    let limits = &plan.cgroup;
    let mut linux = json!({
        "namespaces": namespaces,
        "seccomp": seccomp(plan),
        "maskedPaths": none,
        "readonlyPaths": none,
    });
    if scene.without.is_empty() {
        linux["cgroupsPath"] = json!("/crun/start");
        linux["resources"] = json!({
            "memory": { "limit": limits.memory_max_bytes },
            "pids": { "limit": limits.pids_max },
            "cpu": { "quota": limits.cpu_quota_us, "period": limits.cpu_period_us },
            "unified": { "memory.high": limits.memory_high_bytes.to_string(), "memory.oom.group": "1" },
        });
    }
    json!({
        "ociVersion": "1.0.2",
        "hostname": "agent",
        "root": { "path": "rootfs", "readonly": true },
        "process": {
            "terminal": false,
            "user": { "uid": plan.uid, "gid": plan.uid },
            "args": plan.exec,
            "env": env,
            "cwd": plan.workdir,
            "noNewPrivileges": true,
            "oomScoreAdj": 500,
            "capabilities": {
                "bounding": none, "effective": none, "inheritable": none, "permitted": none, "ambient": none,
            },
            "rlimits": rlimits.collect::<Vec<_>>(),
        },
        "mounts": mounts,
        "linux": linux,
    })
}

/// The plan's list. A call whose arguments are looked at has a rule of its own, as it has with us.
fn seccomp(plan: &SandboxPlan) -> Value {
    let plan = &plan.seccomp;
    let looked_into =
        ["clone", "clone3", "ioctl", "personality", "prctl", "prlimit64", "socket", "socketpair"];
    let names: Vec<&String> =
        plan.allow.iter().filter(|name| !looked_into.contains(&name.as_str())).collect();
    let mut rules = vec![
        json!({ "names": names, "action": "SCMP_ACT_ALLOW" }),
        json!({ "names": plan.enosys, "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }),
        json!({ "names": plan.kill, "action": "SCMP_ACT_KILL_PROCESS" }),
        // No new namespaces.
        only(
            "clone",
            json!({ "index": 0, "value": 2_114_060_288_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }),
        ),
        only("personality", json!({ "index": 0, "value": 0xffff_ffff_u32, "op": "SCMP_CMP_EQ" })),
        only("prlimit64", json!({ "index": 0, "value": 0, "op": "SCMP_CMP_EQ" })),
        only("socketpair", json!({ "index": 0, "value": 1, "op": "SCMP_CMP_EQ" })),
    ];
    let lists =
        [("socket", 0, &plan.socket_families), ("ioctl", 1, &plan.ioctls), ("prctl", 0, &plan.prctls)];
    for (name, index, values) in lists {
        rules.extend(
            values
                .iter()
                .map(|value| only(name, json!({ "index": index, "value": value, "op": "SCMP_CMP_EQ" }))),
        );
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

fn only(name: &str, argument: Value) -> Value {
    json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument] })
}
