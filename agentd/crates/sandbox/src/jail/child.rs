//! What happens between the fork and the first instruction of the agent's program?
//!
//! Always: the order below. Each step is irrevocable and narrows; each is checked where the kernel lets it be checked;
//!         the self-probe comes after all of them. A failure is written to the report pipe, which exec closes.
//!
//! | step | why here |
//! |---|---|
//! | stdio | descriptors can still be moved |
//! | resource limits, umask | inherited by everything after |
//! | bounding set, securebits | need CAP_SETPCAP, which the next steps take |
//! | groups, gid, uid | needs CAP_SETGID and CAP_SETUID |
//! | capabilities empty, setuid(0) fails | proves the two above |
//! | no_new_privs, parent death signal | after the uid: its change clears the signal |
//! | Landlock | sees the new root; needs no_new_privs |
//! | wait | nothing of the agent starts before the jail has confined itself, which it does meanwhile |
//! | seccomp | forbids all of the above |
//! | self-probe, close, exec | |

use super::{Failure, probe, step};
use crate::lower::{Lowered, Wall};
use crate::{landlock, seccomp, sys};
use agentd_domain::plan::{Rlimit, SandboxPlan};
use rustix::io::Errno;
use rustix::process::{Gid, Resource, Signal, Uid, set_parent_process_death_signal, setrlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use std::fs::DirBuilder;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The report pipe keeps this number until exec closes it.
const REPORT_FD: i32 = 3;
/// The pipe on which the jail says that it is confined itself.
const GO_FD: i32 = 4;

/// Written right before exec: with this and nothing more before the pipe's end, the agent's program runs. A child
/// that was killed on the way never gets to write it.
pub(super) const ABOUT_TO_EXEC: &[u8] = b"E";

pub(super) struct AgentChild<'a> {
    pub plan: &'a SandboxPlan,
    pub lowered: &'a Lowered,
    /// Targets of optional mounts that are not there.
    pub absent: &'a [String],
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    pub report: BorrowedFd<'a>,
    pub go: BorrowedFd<'a>,
}

/// Becomes the agent's program. Returns only on failure, after writing the report; the value is the exit status.
pub(super) fn run(child: &AgentChild<'_>) -> i32 {
    let failure = match place_descriptors(child) {
        Ok(()) => {
            let Err(failure) = become_agent(child);
            failure
        }
        // The report may not arrive now; without the word below, the end of the pipe is a failure as well.
        Err(failure) => failure,
    };
    let report = serde_json::to_vec(&failure).unwrap_or_default();
    sys::write_all(REPORT_FD, &report);
    1
}

fn become_agent(child: &AgentChild<'_>) -> Result<std::convert::Infallible, Failure> {
    let plan = child.plan;
    step("agent: session", rustix::process::setsid())?;
    step("agent: signal mask", sys::unblock_all())?;
    let stands = |wall: Wall| !child.lowered.lacks(wall);
    for limit in plan.rlimits.iter().filter(|_| stands(Wall::Rlimits)) {
        step(&format!("agent: resource limit {}", limit.name), set_limit(limit))?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    if stands(Wall::Capabilities) {
        step("agent: capability bounding set", sys::drop_bounding_set(0))?;
        change_user(plan.uid)?;
        drop_capabilities()?;
    } else if stands(Wall::Uid) {
        change_user_alone(plan.uid)?;
    }
    if stands(Wall::NoNewPrivs) {
        step("agent: no_new_privs", rustix::thread::set_no_new_privs(true))?;
    }
    step("agent: die with the jail", set_parent_process_death_signal(Some(Signal::KILL)))?;
    step("agent: working folder", enter_workdir(&plan.workdir))?;
    let absent = |path: &str| child.absent.iter().any(|gone| gone == path);
    if stands(Wall::Landlock) {
        step("agent: landlock", landlock::restrict(&plan.landlock, &absent))?;
    }
    let filters = step("agent: seccomp", seccomp::compile(&plan.seccomp))?;
    step("agent: wait for the jail", sys::await_byte(GO_FD))?;
    if stands(Wall::Seccomp) {
        step("agent: seccomp", filters.install())?;
    }
    if child.lowered.is_probed() {
        probe::all_walls_hold(plan)?;
    }
    sys::write_all(REPORT_FD, ABOUT_TO_EXEC);
    exec(plan)
}

/// 0, 1, 2 are the agent's pipes, 3 and 4 are gone at exec, and nothing else stays open.
fn place_descriptors(child: &AgentChild<'_>) -> Result<(), Failure> {
    let places = [
        (child.stdin, 0),
        (child.stdout, 1),
        (child.stderr, 2),
        (child.report, REPORT_FD),
        (child.go, GO_FD),
    ];
    // Copied above all targets first: a source may sit at another's place.
    let mut copies = Vec::new();
    for (source, target) in places {
        copies.push((step("agent: descriptors", rustix::io::fcntl_dupfd_cloexec(source, 64))?, target));
    }
    for (copy, target) in &copies {
        step("agent: descriptors", sys::place_fd(std::os::fd::AsFd::as_fd(copy), *target))?;
    }
    // Not dropped: the numbers are closed by the next call, together with the jail's and the launcher's own.
    std::mem::forget(copies);
    if !child.lowered.lacks(Wall::Descriptors) {
        step("agent: descriptors", sys::close_from(GO_FD + 1))?;
    }
    step("agent: descriptors", sys::close_on_exec(REPORT_FD))?;
    step("agent: descriptors", sys::close_on_exec(GO_FD))
}

fn set_limit(limit: &Rlimit) -> Result<(), Errno> {
    let resource = match limit.name.as_str() {
        "CORE" => Resource::Core,
        "MEMLOCK" => Resource::Memlock,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "NOFILE" => Resource::Nofile,
        "RTPRIO" => Resource::Rtprio,
        _ => return Err(Errno::INVAL),
    };
    setrlimit(resource, rustix::process::Rlimit { current: Some(limit.soft), maximum: Some(limit.hard) })
}

/// Groups first, uid last: after the uid nothing of this is allowed any more. The securebits keep root's magic from
/// coming back, so the capabilities must be emptied by hand afterwards ([`drop_capabilities`]).
pub(crate) fn change_user(uid: u32) -> Result<(), Failure> {
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    step("user: securebits", rustix::thread::set_capabilities_secure_bits(bits))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    step("user: groups", rustix::thread::set_thread_groups(&[]))?;
    step("user: gid", rustix::thread::set_thread_res_gid(group, group, group))?;
    step("user: uid", rustix::thread::set_thread_res_uid(user, user, user))
}

#[cfg(not(feature = "walls-can-be-lowered"))]
fn change_user_alone(_: u32) -> Result<(), Failure> {
    step("agent: capabilities", Err("no wall can be lowered in this build"))
}

/// Another uid, and every capability that the launcher has left, also after exec.
#[cfg(feature = "walls-can-be-lowered")]
fn change_user_alone(uid: u32) -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    step("lowered: keep", rustix::thread::set_keep_capabilities(true))?;
    step("lowered: groups", rustix::thread::set_thread_groups(&[]))?;
    step("lowered: gid", rustix::thread::set_thread_res_gid(group, group, group))?;
    step("lowered: uid", rustix::thread::set_thread_res_uid(user, user, user))?;
    let held = step("lowered: capabilities", rustix::thread::capabilities(None))?.permitted;
    let all = CapabilitySets { effective: held, permitted: held, inheritable: held };
    step("lowered: capabilities", rustix::thread::set_capabilities(None, all))?;
    for capability in held.iter() {
        step("lowered: ambient", rustix::thread::configure_capability_in_ambient_set(capability, true))?;
    }
    Ok(())
}

/// All sets empty, and proof that root cannot be had back.
pub(crate) fn drop_capabilities() -> Result<(), Failure> {
    let none = CapabilitySet::empty();
    let empty = CapabilitySets { effective: none, permitted: none, inheritable: none };
    step("capabilities", rustix::thread::clear_ambient_capability_set())?;
    step("capabilities", rustix::thread::set_capabilities(None, empty))?;
    if step("capabilities", rustix::thread::capabilities(None))? != empty {
        return step("capabilities", Err("some are left after they were dropped"));
    }
    if rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).is_ok() {
        return step("capabilities", Err("setuid(0) succeeded after the change of user"));
    }
    Ok(())
}

/// Made by the agent's own uid: a link that an earlier run has left there leads to nowhere new.
fn enter_workdir(path: &str) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    std::env::set_current_dir(path)
}

fn exec(plan: &SandboxPlan) -> Result<std::convert::Infallible, Failure> {
    let Some((program, arguments)) = plan.exec.split_first() else {
        return step("exec", Err("the plan names no program"));
    };
    let variables = plan.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    // exec itself gives SIGPIPE its default back, which Rust's start-up had taken.
    let error = Command::new(program).args(arguments).env_clear().envs(variables).exec();
    step("exec", Err(format!("{program}: {error}")))
}
