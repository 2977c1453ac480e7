//! Which BPF programs say what a seccomp plan says?
//!
//! In:     a [`SeccompPlan`]. Out: [`Filters`], plain instructions that a test can compare whole.
//! Always: three programs, all of which the kernel runs; the strictest answer counts (seccomp(2)).
//!         1. the guard kills foreign architectures, x32 numbers and the calls of the plan's kill list;
//!         2. ENOSYS for calls whose arguments a filter cannot see;
//!         3. the allow list, with limits on arguments; everything else is EPERM.
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

/// Programs in the order in which they are installed: the last must come last, as it forbids installing more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filters {
    pub guard: BpfProgram,
    pub enosys: Option<BpfProgram>,
    pub allow: BpfProgram,
}

impl Filters {
    /// Sets no_new_privs and installs all programs for the calling thread; irrevocable.
    pub fn install(&self) -> Result<(), SeccompError> {
        for program in [Some(&self.guard), self.enosys.as_ref(), Some(&self.allow)].into_iter().flatten() {
            apply_filter(program).map_err(|source| SeccompError::Install { source })?;
        }
        Ok(())
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

pub fn compile(plan: &SeccompPlan) -> Result<Filters, SeccompError> {
    let names = |list: &[String]| -> Result<Vec<i64>, SeccompError> {
        list.iter().map(|name| number(name)).collect()
    };
    Ok(Filters {
        guard: guard(&names(&plan.kill)?)?,
        enosys: match names(&plan.enosys)?.as_slice() {
            [] => None,
            calls => Some(answer(calls, libc::ENOSYS)?),
        },
        allow: allow(&names(&plan.allow)?, ArgumentRules::Plan(plan))?,
    })
}

/// Filters for a program of ours: `calls` and nothing else, and death for `kill`.
pub fn compile_own(calls: &[&str], kill: &[&str], ioctl: Ioctl) -> Result<Filters, SeccompError> {
    let names =
        |list: &[&str]| -> Result<Vec<i64>, SeccompError> { list.iter().map(|name| number(name)).collect() };
    Ok(Filters {
        guard: guard(&names(kill)?)?,
        enosys: Some(answer(&names(&["clone3"])?, libc::ENOSYS)?),
        allow: allow(&names(calls)?, ArgumentRules::Own { ioctl })?,
    })
}

/// For a process whose children have work of their own to do: foreign architectures die, `refuse` fails with EPERM,
/// all else is left to them. Not a kill: the children's self-probe makes some of these calls to see them fail.
pub fn install_refusal(refuse: &[&str]) -> Result<(), SeccompError> {
    let numbers: Vec<i64> = refuse.iter().map(|name| number(name)).collect::<Result<_, _>>()?;
    for program in [guard(&[])?, answer(&numbers, libc::EPERM)?] {
        apply_filter(&program).map_err(|source| SeccompError::Install { source })?;
    }
    Ok(())
}

fn number(name: &str) -> Result<i64, SeccompError> {
    syscalls::number(name).ok_or_else(|| SeccompError::UnknownCall { name: name.to_owned() })
}

/// Also for x32, which has x86-64's audit value and bit 30 in the number.
fn guard(kill: &[i64]) -> Result<BpfProgram, SeccompError> {
    const X32_BIT: u32 = 0x4000_0000;
    /// Offset of the architecture in `struct seccomp_data`.
    const ARCHITECTURE: u32 = 4;
    let killed = Answer::Always(libc::SECCOMP_RET_KILL_PROCESS);
    let answers = kill
        .iter()
        .map(|&call| Ok((narrow(call)?, killed.clone())))
        .collect::<Result<BTreeMap<_, _>, SeccompError>>()?;
    let mut program = vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, ARCHITECTURE),
        sock_filter {
            jt: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, audit_architecture()?)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    program.extend(assemble(&answers, libc::SECCOMP_RET_ALLOW, Some((X32_BIT, killed))));
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

fn answer(calls: &[i64], errno: i32) -> Result<BpfProgram, SeccompError> {
    let answer = Answer::Always(libc::SECCOMP_RET_ERRNO | errno as u32);
    let answers = calls.iter().map(|&call| Ok((narrow(call)?, answer.clone()))).collect::<Result<_, _>>()?;
    Ok(assemble(&answers, libc::SECCOMP_RET_ALLOW, None))
}

fn allow(calls: &[i64], rules: ArgumentRules<'_>) -> Result<BpfProgram, SeccompError> {
    const REFUSED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let limits = argument_limits(rules);
    let mut answers = BTreeMap::new();
    for &call in calls {
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
    Ok(assemble(&answers, REFUSED, None))
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
            limits.insert(libc::SYS_ioctl, one_of(1, &plan.ioctls));
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
