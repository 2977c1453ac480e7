//! How does NVIDIA's driver hold a cgroup to a share of a device's memory?
//!
//! Two functions of NVML that its Rust bindings (made from the header of 13.0) do not know yet: they are looked up by
//! name. A driver before 615 has none of them, which is a normal answer ([`LimitError::NotThere`]).
//!
//! Always: a limit is set on a leaf before processes enter it, so that they see it from their start; it is cleared by
//!         a soft limit of 0 and a hard one of `u64::MAX`, before the group is removed.
//! Who:    only a process with CAP_SYS_ADMIN may set (the driver asks the kernel for that), any may read.
//! Source: NVML API reference, nvmlSetMemoryLimits_v1_t; the header of cuda-nvml-dev 13.4.92.
#![expect(unsafe_code, reason = "two functions of NVML that no Rust binding has")]

use nvml_wrapper::Nvml;
use nvml_wrapper::error::{NvmlError, nvml_try};
use serde::Serialize;
use std::ffi::{CString, OsStr, c_char, c_uint, c_ulonglong};
use std::path::Path;

/// `NVML_DEVICE_MEMORY_LIMIT_MAX`.
const NO_LIMIT: u64 = u64::MAX;

#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitError {
    #[error("NVML: {0}")]
    Nvml(#[from] NvmlError),
    #[error("this driver has no limits for cgroups (they came with driver 615)")]
    NotThere,
    #[error("no device has the id {0}")]
    NoDevice(String),
    #[error("{0} is no folder of a cgroup")]
    NoGroup(String),
    #[error("the driver was told {wanted} bytes and holds the group to {holds}")]
    NotTaken { wanted: u64, holds: u64 },
}

/// What the driver holds a group to. A hard limit of `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Limits {
    pub(crate) soft_bytes: u64,
    pub(crate) hard_bytes: Option<u64>,
    pub(crate) used_bytes: u64,
}

/// As `nvmlSetMemoryLimits_v1_t`, 24 bytes.
#[repr(C)]
struct SetLimits {
    name_space: *const c_char,
    soft_limit: c_ulonglong,
    hard_limit: c_ulonglong,
}

/// As `nvmlGetMemoryLimits_v1_t`, 32 bytes.
#[repr(C)]
struct GetLimits {
    name_space: *const c_char,
    soft_limit: c_ulonglong,
    hard_limit: c_ulonglong,
    current_used: c_ulonglong,
}

const _: () = assert!(size_of::<SetLimits>() == 24 && size_of::<GetLimits>() == 32);

type Handle = *mut std::ffi::c_void;
type Set = unsafe extern "C" fn(Handle, *mut SetLimits) -> c_uint;
type Get = unsafe extern "C" fn(Handle, *mut GetLimits) -> c_uint;

/// One device and one group.
pub(crate) struct Limited<'a> {
    nvml: &'a Nvml,
    uuid: &'a str,
    group: CString,
}

pub(crate) fn library(path: &OsStr) -> Result<Nvml, LimitError> {
    Ok(Nvml::builder().lib_path(path).init()?)
}

impl<'a> Limited<'a> {
    pub(crate) fn new(nvml: &'a Nvml, uuid: &'a str, group: &Path) -> Result<Self, LimitError> {
        let no_group = || LimitError::NoGroup(group.display().to_string());
        if !group.is_absolute() || !group.is_dir() {
            return Err(no_group());
        }
        let group = CString::new(group.as_os_str().as_encoded_bytes()).map_err(|_| no_group())?;
        Ok(Self { nvml, uuid, group })
    }

    /// Sets both and asks the driver what it took: it may round down to its pages, and never up.
    pub(crate) fn set(&self, soft_bytes: u64, hard_bytes: u64) -> Result<Limits, LimitError> {
        self.call(soft_bytes, hard_bytes)?;
        let limits = self.get()?;
        let holds = limits.hard_bytes.unwrap_or(NO_LIMIT);
        if holds > hard_bytes {
            return Err(LimitError::NotTaken { wanted: hard_bytes, holds });
        }
        Ok(limits)
    }

    pub(crate) fn clear(&self) -> Result<Limits, LimitError> {
        self.call(0, NO_LIMIT)?;
        self.get()
    }

    pub(crate) fn get(&self) -> Result<Limits, LimitError> {
        let handle = self.handle()?;
        // SAFETY: the name ends with a zero byte, and NVML gives the function of that name this signature.
        let get = unsafe { self.nvml.lib().__library.get::<Get>(b"nvmlDeviceGetMemoryLimits_v1\0") }
            .map_err(|_| LimitError::NotThere)?;
        let mut limits =
            GetLimits { name_space: self.group.as_ptr(), soft_limit: 0, hard_limit: 0, current_used: 0 };
        // SAFETY: the handle is of this library, which lives as long as `self.nvml`; the structure has NVML's layout
        // and its name is a string that outlives the call.
        answer(unsafe { get(handle, &raw mut limits) })?;
        let hard_bytes = Some(limits.hard_limit).filter(|bytes| *bytes != NO_LIMIT);
        Ok(Limits { soft_bytes: limits.soft_limit, hard_bytes, used_bytes: limits.current_used })
    }

    fn call(&self, soft_bytes: u64, hard_bytes: u64) -> Result<(), LimitError> {
        let handle = self.handle()?;
        // SAFETY: as for `get`.
        let set = unsafe { self.nvml.lib().__library.get::<Set>(b"nvmlDeviceSetMemoryLimits_v1\0") }
            .map_err(|_| LimitError::NotThere)?;
        let mut limits =
            SetLimits { name_space: self.group.as_ptr(), soft_limit: soft_bytes, hard_limit: hard_bytes };
        // SAFETY: as for `get`.
        answer(unsafe { set(handle, &raw mut limits) })
    }

    fn handle(&self) -> Result<Handle, LimitError> {
        let device = self.nvml.device_by_uuid(self.uuid).map_err(|error| match error {
            NvmlError::NotFound | NvmlError::InvalidArg => LimitError::NoDevice(self.uuid.to_owned()),
            other => LimitError::Nvml(other),
        })?;
        // SAFETY: the handle is NVML's own and valid until the library is shut down, which `self.nvml` puts off.
        Ok(unsafe { device.handle() }.cast())
    }
}

fn answer(code: c_uint) -> Result<(), LimitError> {
    match nvml_try(code) {
        Ok(()) => Ok(()),
        // The group has no files of dmem, or the device is cut into instances.
        Err(NvmlError::NotSupported | NvmlError::FunctionNotFound) => Err(LimitError::NotThere),
        Err(error) => Err(LimitError::Nvml(error)),
    }
}
