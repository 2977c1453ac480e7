//! What does the launcher take from itself before it listens?
//!
//! It stays root, because it makes namespaces, mounts, cgroups and uids. Everything else goes: capabilities that this
//! work does not need (also from the bounding set, so no child ever has them), the network, new privileges, and system
//! calls that change the kernel itself.

use crate::seccomp;
use crate::sys;
use rustix::thread::{CapabilitySet, CapabilitySets};

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("the launcher could not restrict itself ({step}): {source}")]
    Kernel { step: &'static str, source: rustix::io::Errno },
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
}

/// Inherited by jails and engines, so nothing that they need may stand here; `quotactl_fd` is the launcher's own work.
const REFUSED: &[&str] = &[
    "acct",
    "bpf",
    "delete_module",
    "finit_module",
    "init_module",
    "io_uring_setup",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "memfd_secret",
    "open_by_handle_at",
    "perf_event_open",
    "process_vm_readv",
    "process_vm_writev",
    "quotactl",
    "reboot",
    "request_key",
    "settimeofday",
    "swapoff",
    "swapon",
    "syslog",
    "userfaultfd",
];

pub(super) fn confine() -> Result<(), ConfineError> {
    let kernel = |step| move |source| ConfineError::Kernel { step, source };
    let keep = needed();
    sys::unshare_network().map_err(kernel("leave the network"))?;
    sys::drop_bounding_set(keep.bits()).map_err(kernel("capability bounding set"))?;
    let held = rustix::thread::capabilities(None).map_err(kernel("read capabilities"))?;
    let kept = held.permitted & keep;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(kernel("capabilities"))?;
    // Programs started from here keep root's capabilities, as none is gained by it (capabilities(7)).
    rustix::thread::set_no_new_privs(true).map_err(kernel("no_new_privs"))?;
    Ok(seccomp::install_refusal(REFUSED)?)
}

/// | capability | for |
/// |---|---|
/// | SYS_ADMIN | namespaces, mounts, quotas |
/// | SYS_CHROOT | entering a run's mount namespace, for a call in it |
/// | SYS_RESOURCE | limits of runs above the launcher's own |
/// | CHOWN, DAC_OVERRIDE, FOWNER | agents' folders, also to remove them |
/// | SETUID, SETGID, SETPCAP | the jail's change of user and its locked securebits |
/// | NET_ADMIN | `lo` in a run's namespace |
/// | NET_BIND_SERVICE | a run's name server on port 53, and caught ports such as 443, in the run's namespace |
/// | MKNOD | six device nodes |
/// | KILL | children of other uids |
fn needed() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::SYS_RESOURCE
        | CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID
        | CapabilitySet::SETPCAP
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::MKNOD
        | CapabilitySet::KILL
}
