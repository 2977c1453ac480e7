//! How does a Landlock plan become a domain that the process can never leave?
//!
//! Always: every file, TCP and scope right that ABI 6 knows is handled, so what no rule grants is denied; a kernel
//!         without one of them is an error (`HardRequirement`), never a weaker domain.
//! Source: landlock(7); the table of what Landlock does not stop stands in this crate's README.

use agentd_domain::plan::{FsAccess, LandlockPlan};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
    make_bitflags,
};
use rustix::io::Errno;

/// Linux 6.12, the first with scopes.
pub const ABI_MIN: u32 = 6;
const ABI_USED: ABI = ABI::V6;

#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    #[error("this kernel has no Landlock, or it is not among its `lsm=` modules: {source}")]
    Missing { source: Errno },
    #[error("this kernel's Landlock has ABI {found}, at least {needed} is needed")]
    TooOld { found: u32, needed: u32 },
    #[error("no rule could be made for {path}: {why}")]
    Rule { path: String, why: String },
    #[error("the kernel did not take the ruleset: {source}")]
    Ruleset { source: RulesetError },
    #[error("the kernel enforces only a part of the ruleset")]
    Partial,
}

impl From<RulesetError> for LandlockError {
    fn from(source: RulesetError) -> Self {
        Self::Ruleset { source }
    }
}

/// Whether this kernel can raise the wall at all.
pub fn require(abi_min: u32) -> Result<(), LandlockError> {
    let found = crate::sys::landlock_abi().map_err(|source| LandlockError::Missing { source })?;
    let needed = abi_min.max(ABI_MIN);
    if found < needed { Err(LandlockError::TooOld { found, needed }) } else { Ok(()) }
}

/// Which paths that do not exist may be left out: those of optional mounts that the image lacks.
pub type IsAbsent<'a> = &'a dyn Fn(&str) -> bool;

/// Puts the calling process into the plan's domain; irrevocable, and inherited by all its children.
pub fn restrict(plan: &LandlockPlan, absent: IsAbsent<'_>) -> Result<(), LandlockError> {
    require(plan.abi_min)?;
    let mut ruleset = everything_denied(Scope::from_all(ABI_USED))?;
    for rule in plan.rules.iter().filter(|rule| !absent(&rule.path)) {
        ruleset = grant(ruleset, &rule.path, rights(rule.access))?;
    }
    for &port in &plan.connect_tcp {
        ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    enforce(ruleset)
}

/// A domain that grants nothing: no file can be opened any more, no TCP port used. Signals stay possible, for a
/// process that must still end its child.
pub fn restrict_to_nothing() -> Result<(), LandlockError> {
    require(ABI_MIN)?;
    enforce(everything_denied(Scope::AbstractUnixSocket.into())?)
}

/// A domain for a program of ours: paths that do not exist are left out, which denies them.
pub fn restrict_own(rules: &[(&str, OwnAccess)]) -> Result<(), LandlockError> {
    require(ABI_MIN)?;
    let mut ruleset = everything_denied(Scope::from_all(ABI_USED))?;
    for (path, access) in rules {
        if rustix::fs::access(*path, rustix::fs::Access::EXISTS).is_ok() {
            ruleset = grant(ruleset, path, own_rights(*access))?;
        }
    }
    enforce(ruleset)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnAccess {
    Read,
    ReadExecute,
    /// Read, write and `ioctl` on device nodes.
    Device,
    /// Plain files that it makes, reads, writes and removes.
    Scratch,
}

fn everything_denied(scopes: BitFlags<Scope>) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI_USED))?
        .handle_access(AccessNet::from_all(ABI_USED))?
        .scope(scopes)?
        .create()
}

fn enforce(ruleset: RulesetCreated) -> Result<(), LandlockError> {
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        _ => Err(LandlockError::Partial),
    }
}

fn grant(
    ruleset: RulesetCreated,
    path: &str,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, LandlockError> {
    let rule_error = |why: String| LandlockError::Rule { path: path.to_owned(), why };
    let fd = PathFd::new(path).map_err(|error| rule_error(error.to_string()))?;
    let kind = rustix::fs::fstat(&fd).map_err(|error| rule_error(error.to_string()))?;
    let is_folder = rustix::fs::FileType::from_raw_mode(kind.st_mode).is_dir();
    // Rights that only folders have make the kernel refuse a rule for a file.
    let rights = if is_folder { rights } else { rights & AccessFs::from_file(ABI_USED) };
    ruleset.add_rule(PathBeneath::new(fd, rights)).map_err(|error| rule_error(error.to_string()))
}

fn rights(access: FsAccess) -> BitFlags<AccessFs> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    match access {
        FsAccess::Read => read,
        FsAccess::ReadExecute => read | AccessFs::Execute,
        FsAccess::Device => make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}),
        // Neither Execute nor IoctlDev, and no device nodes.
        FsAccess::ReadWrite => {
            read | make_bitflags!(AccessFs::{
                WriteFile | Truncate | MakeReg | MakeDir | MakeSym | MakeFifo | MakeSock | RemoveFile | RemoveDir | Refer
            })
        }
    }
}

fn own_rights(access: OwnAccess) -> BitFlags<AccessFs> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    match access {
        OwnAccess::Read => read,
        OwnAccess::ReadExecute => read | AccessFs::Execute,
        OwnAccess::Device => read | AccessFs::WriteFile | AccessFs::IoctlDev,
        OwnAccess::Scratch => read | make_bitflags!(AccessFs::{WriteFile | Truncate | MakeReg | RemoveFile}),
    }
}
