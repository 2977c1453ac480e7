//! Which BPF program says what a seccomp plan says?
//!
//! In:     a [`SeccompPlan`]. Out: a [`Filter`], plain instructions that a test can compare whole.
//! Always: 1. death for foreign architectures, x32 numbers and the calls of the plan's kill list;
//!         2. ENOSYS for calls whose arguments a filter cannot see;
//!         3. the allow list, with limits on arguments; everything else is EPERM.
//!         A call in several lists gets the first of these answers.
//!         Arguments that the kernel reads as 32 bits are compared as 32 bits: with 64, `TIOCSTI | 1 << 32` passes.
//! Never:  a call by number alone that the plan does not name.

mod program;

use crate::syscalls;
use agentd_domain::plan::SeccompPlan;
use program::{Answer, Check, Rule, assemble, statement};
use seccompiler::{BpfProgram, apply_filter, sock_filter};
use std::collections::BTreeMap;

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("`{name}` is not a system call that plans may name")]
    UnknownCall { name: String },
    #[error("the kernel did not take the filter: {source}")]
    Install { source: seccompiler::Error },
    #[error("no filter can be built for the processor architecture `{name}`")]
    Architecture { name: &'static str },
}

/// One program, because each costs the kernel pages of its own for what it is translated to, and every system call a
/// further look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub program: BpfProgram,
}

impl Filter {
    /// Sets no_new_privs and installs the program for the calling thread; irrevocable.
    pub fn install(&self) -> Result<(), SeccompError> {
        apply_filter(&self.program).map_err(|source| SeccompError::Install { source })
    }
}

/// What limits an argument beyond the call's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArgumentRules<'a> {
    /// As the plan says: listed `ioctl`s and so on.
    Plan(&'a SeccompPlan),
    /// A trusted program of ours, limited by name; only `clone` and `socket` are looked into.
    Own { ioctl: Ioctl },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ioctl {
    /// Drivers of accelerators speak nothing else.
    Any,
    /// What a standard library does to descriptors of its own: FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS.
    Descriptors,
    None,
}

pub fn compile(plan: &SeccompPlan) -> Result<Filter, SeccompError> {
    let names = |list: &[String]| -> Result<Vec<i64>, SeccompError> {
        list.iter().map(|name| number(name)).collect()
    };
    let calls = Calls { allow: names(&plan.allow)?, enosys: names(&plan.enosys)?, kill: names(&plan.kill)? };
    Ok(Filter { program: listed(&calls, ArgumentRules::Plan(plan))? })
}

/// A filter for a program of ours: `calls` and nothing else, and death for `kill`.
pub fn compile_own(calls: &[&str], kill: &[&str], ioctl: Ioctl) -> Result<Filter, SeccompError> {
    let names =
        |list: &[&str]| -> Result<Vec<i64>, SeccompError> { list.iter().map(|name| number(name)).collect() };
    let calls = Calls { allow: names(calls)?, enosys: names(&["clone3"])?, kill: names(kill)? };
    Ok(Filter { program: listed(&calls, ArgumentRules::Own { ioctl })? })
}

/// For a process whose children have work of their own to do: foreign architectures die, `refuse` fails with EPERM,
/// all else is left to them. Not a kill: the children's self-probe makes some of these calls to see them fail.
pub fn install_refusal(refuse: &[&str]) -> Result<(), SeccompError> {
    let refused = Answer::Always(REFUSED);
    let answers = refuse
        .iter()
        .map(|name| Ok((narrow(number(name)?)?, refused.clone())))
        .collect::<Result<BTreeMap<_, _>, SeccompError>>()?;
    Filter { program: guarded(&answers, libc::SECCOMP_RET_ALLOW)? }.install()
}

const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const MISSING: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// A call that stands in several lists gets the strictest answer: death, then ENOSYS.
struct Calls {
    allow: Vec<i64>,
    enosys: Vec<i64>,
    kill: Vec<i64>,
}

fn number(name: &str) -> Result<i64, SeccompError> {
    syscalls::number(name).ok_or_else(|| SeccompError::UnknownCall { name: name.to_owned() })
}

/// Behind a look at the architecture, and at x32, which has x86-64's audit value and bit 30 in the number.
fn guarded(answers: &BTreeMap<u32, Answer>, otherwise: u32) -> Result<BpfProgram, SeccompError> {
    const X32_BIT: u32 = 0x4000_0000;
    /// Offset of the architecture in `struct seccomp_data`.
    const ARCHITECTURE: u32 = 4;
    let killed = Answer::Always(libc::SECCOMP_RET_KILL_PROCESS);
    let mut program = vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, ARCHITECTURE),
        sock_filter {
            jt: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, audit_architecture()?)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    program.extend(assemble(answers, otherwise, Some((X32_BIT, killed))));
    Ok(program)
}

/// linux/audit.h: machine | 64 bit | little-endian.
fn audit_architecture() -> Result<u32, SeccompError> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(62 | 0x8000_0000 | 0x4000_0000),
        "aarch64" => Ok(183 | 0x8000_0000 | 0x4000_0000),
        name => Err(SeccompError::Architecture { name }),
    }
}

fn listed(calls: &Calls, rules: ArgumentRules<'_>) -> Result<BpfProgram, SeccompError> {
    let limits = argument_limits(rules);
    let mut answers = BTreeMap::new();
    for &call in &calls.allow {
        let answer = match limits.get(&call) {
            // Also for an empty list of good arguments, which allows none.
            Some(one_of) => {
                let one_of = one_of.clone();
                Answer::If { one_of, then: libc::SECCOMP_RET_ALLOW, otherwise: REFUSED }
            }
            None => Answer::Always(libc::SECCOMP_RET_ALLOW),
        };
        answers.insert(narrow(call)?, answer);
    }
    for &call in &calls.enosys {
        answers.insert(narrow(call)?, Answer::Always(MISSING));
    }
    for &call in &calls.kill {
        answers.insert(narrow(call)?, Answer::Always(libc::SECCOMP_RET_KILL_PROCESS));
    }
    guarded(&answers, REFUSED)
}

fn narrow(call: i64) -> Result<u32, SeccompError> {
    u32::try_from(call).map_err(|_| SeccompError::UnknownCall { name: call.to_string() })
}

/// One of the rules of a call must hold.
fn argument_limits(rules: ArgumentRules<'_>) -> BTreeMap<i64, Vec<Rule>> {
    /// Type bits of `socket`'s second argument; the rest are SOCK_CLOEXEC and SOCK_NONBLOCK.
    const SOCK_TYPE_MASK: u32 = 0xf;
    let unix = libc::AF_UNIX as u32;
    let stream = libc::SOCK_STREAM as u32;
    let mut limits = BTreeMap::from([
        (libc::SYS_clone, vec![vec![masked(0, new_namespaces(), 0)]]),
        (libc::SYS_socketpair, vec![vec![equal(0, unix)]]),
    ]);
    match rules {
        ArgumentRules::Own { ioctl } => {
            limits.insert(libc::SYS_socket, vec![vec![equal(0, unix)]]);
            match ioctl {
                Ioctl::Any => {}
                Ioctl::Descriptors => {
                    limits.insert(libc::SYS_ioctl, one_of(1, &[0x541b, 0x5421, 0x5450, 0x5451, 0x5401]));
                }
                Ioctl::None => {
                    limits.insert(libc::SYS_ioctl, Vec::new());
                }
            }
        }
        ArgumentRules::Plan(plan) => {
            let of = |families: &[u32], kind: u32| -> Vec<Rule> {
                families
                    .iter()
                    .map(|&family| vec![equal(0, family), masked(1, SOCK_TYPE_MASK, kind)])
                    .collect()
            };
            let mut sockets = of(&plan.socket_families, stream);
            sockets.extend(of(&plan.datagram_families, libc::SOCK_DGRAM as u32));
            limits.insert(libc::SYS_socket, sockets);
            let mut ioctls = one_of(1, &plan.ioctls);
            // `_IOC_TYPE` is the second byte; plain numbers have nothing but the lowest.
            ioctls.extend(plan.ioctl_types.iter().map(|&kind| match kind {
                0 => vec![masked(1, !0xff, 0)],
                kind => vec![masked(1, 0xff00, u32::from(kind) << 8)],
            }));
            limits.insert(libc::SYS_ioctl, ioctls);
            limits.insert(libc::SYS_prctl, one_of(0, &plan.prctls));
            // Its own limits only: 0 is the caller.
            limits.insert(libc::SYS_prlimit64, one_of(0, &[0]));
            // Asking is harmless; every persona weakens something (ASLR, READ_IMPLIES_EXEC).
            limits.insert(libc::SYS_personality, one_of(0, &[u32::MAX]));
        }
    }
    limits
}

/// `CLONE_NEWTIME` shares its bit with the exit signal of `clone` and cannot be asked for there.
fn new_namespaces() -> u32 {
    let flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    flags as u32
}

fn one_of(argument: u8, values: &[u32]) -> Vec<Rule> {
    values.iter().map(|&value| vec![equal(argument, value)]).collect()
}

fn equal(argument: u8, value: u32) -> Check {
    masked(argument, u32::MAX, value)
}

fn masked(argument: u8, mask: u32, value: u32) -> Check {
    Check { argument, mask, value }
}

#[cfg(test)]
mod tests;
