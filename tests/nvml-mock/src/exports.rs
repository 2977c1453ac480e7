//! The functions of `nvml.h`, by their C names.
//!
//! Each reads the state, finds the device by its handle, and writes through the pointers that the caller gave. All of
//! this is unsafe in the same way: the callers are C by contract, and what they promise is NVML's documentation.
#![expect(unsafe_code, reason = "a C library, in Rust")]

use crate::state::{self, Device, Event, Instance, Limit, State};
use std::ffi::{CStr, c_char, c_uint, c_ulonglong, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

type Return = c_uint;
const SUCCESS: Return = 0;
const INVALID_ARGUMENT: Return = 2;
const NOT_SUPPORTED: Return = 3;
const NO_PERMISSION: Return = 4;
const NOT_FOUND: Return = 6;
const INSUFFICIENT_SIZE: Return = 7;
const TIMEOUT: Return = 10;
const LOST: Return = 15;
const UNKNOWN: Return = 999;

const NOT_AVAILABLE: u64 = u64::MAX;
const NO_INSTANCE: u32 = u32::MAX;
/// Instances of a device, at most.
const INSTANCES: usize = 7;

/// A handle is a number: one more than the device's, and for an instance its own number times this on top.
const INSTANCE_STEP: usize = 0x1000;
type Handle = *mut c_void;

#[repr(C)]
struct PciInfo {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
    bus_id: [c_char; 32],
}

#[repr(C)]
struct MemoryV2 {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[repr(C)]
struct Utilisation {
    gpu: c_uint,
    memory: c_uint,
}

#[repr(C)]
struct ProcessInfo {
    pid: c_uint,
    used: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[repr(C)]
struct EventData {
    device: Handle,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[repr(C)]
struct SetLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
}

#[repr(C)]
struct GetLimits {
    name_space: *const c_char,
    soft: c_ulonglong,
    hard: c_ulonglong,
    used: c_ulonglong,
}

/// A set of events: which device it watches, and how many of its events it was given.
struct EventSet {
    device: AtomicUsize,
    given: AtomicUsize,
}

/// The device of a handle, and the number of an instance of it.
fn find(handle: Handle) -> Result<(Device, Option<usize>), Return> {
    let number = handle as usize;
    let (device, instance) = (number % INSTANCE_STEP, number / INSTANCE_STEP);
    let mut state = State::now();
    if device == 0 || device > state.devices.len() {
        return Err(INVALID_ARGUMENT);
    }
    let device = state.devices.swap_remove(device - 1);
    if device.lost { Err(LOST) } else { Ok((device, instance.checked_sub(1))) }
}

/// Writes a value that the device may not have.
fn give<T, V>(
    handle: Handle,
    into: *mut T,
    value: impl Fn(&Device) -> Option<V>,
    as_c: fn(V) -> T,
) -> Return {
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    match find(handle) {
        Err(code) => code,
        Ok((device, _)) => match value(&device) {
            None => NOT_SUPPORTED,
            Some(value) => {
                // SAFETY: not null, and by NVML's contract the caller's own place for one value.
                unsafe { into.write(as_c(value)) };
                SUCCESS
            }
        },
    }
}

/// Copies a text with its zero byte into `room` bytes.
fn give_text(text: &str, into: *mut c_char, room: c_uint) -> Return {
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    if text.len() + 1 > room as usize {
        return INSUFFICIENT_SIZE;
    }
    for (index, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: the index is below the room that the caller has said the place has.
        unsafe { into.add(index).write(c_char::from_ne_bytes([byte])) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> Return {
    State::now().init
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> Return {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(_code: Return) -> *const c_char {
    c"an error of the mock".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn nvmlSystemGetDriverVersion(into: *mut c_char, room: c_uint) -> Return {
    give_text(&State::now().driver, into, room)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCount_v2(into: *mut c_uint) -> Return {
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and by NVML's contract the caller's own place for one value.
    unsafe { into.write(State::now().devices.len() as c_uint) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, into: *mut Handle) -> Return {
    if into.is_null() || index as usize >= State::now().devices.len() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: as above.
    unsafe { into.write((index as usize + 1) as Handle) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, into: *mut Handle) -> Return {
    if uuid.is_null() || into.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and by NVML's contract a C string.
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_string_lossy();
    match State::now().devices.iter().position(|device| device.uuid == uuid) {
        None => NOT_FOUND,
        Some(index) => {
            // SAFETY: as above.
            unsafe { into.write((index + 1) as Handle) };
            SUCCESS
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetUUID(handle: Handle, into: *mut c_char, room: c_uint) -> Return {
    match find(handle) {
        Err(code) => code,
        Ok((device, None)) => give_text(&device.uuid, into, room),
        Ok((device, Some(index))) => match device.instances.get(index) {
            Some(instance) => give_text(&instance.uuid, into, room),
            None => NOT_FOUND,
        },
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetName(handle: Handle, into: *mut c_char, room: c_uint) -> Return {
    find(handle).map_or_else(|code| code, |(device, _)| give_text(&device.name, into, room))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetPciInfo_v3(handle: Handle, into: *mut PciInfo) -> Return {
    let of = |device: &Device| {
        let mut info = PciInfo {
            legacy: [0; 16],
            domain: 0,
            bus: 0,
            device: 0,
            device_id: 0,
            subsystem_id: 0,
            bus_id: [0; 32],
        };
        let room = info.bus_id.len() as c_uint;
        (give_text(&device.pci, info.bus_id.as_mut_ptr(), room) == SUCCESS).then_some(info)
    };
    give(handle, into, of, |info| info)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: Handle, into: *mut MemoryV2) -> Return {
    let instance = match find(handle) {
        Err(code) => return code,
        Ok((device, Some(index))) => device.instances.get(index).cloned(),
        Ok((_, None)) => None,
    };
    let of = |device: &Device| match &instance {
        Some(instance) => Some((instance.total, 0, instance.total - instance.used, instance.used)),
        None => device.memory,
    };
    give(handle, into, of, |(total, reserved, free, used)| MemoryV2 {
        version: 2,
        total,
        reserved,
        free,
        used,
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetUtilizationRates(handle: Handle, into: *mut Utilisation) -> Return {
    give(handle, into, |device| device.utilisation, |(gpu, memory)| Utilisation { gpu, memory })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTemperature(handle: Handle, _sensor: c_uint, into: *mut c_uint) -> Return {
    give(handle, into, |device| device.temperature, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetPowerUsage(handle: Handle, into: *mut c_uint) -> Return {
    give(handle, into, |device| device.power, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetEnforcedPowerLimit(handle: Handle, into: *mut c_uint) -> Return {
    give(handle, into, |device| device.power_limit, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTotalEnergyConsumption(handle: Handle, into: *mut c_ulonglong) -> Return {
    give(handle, into, |device| device.energy, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetClockInfo(handle: Handle, kind: c_uint, into: *mut c_uint) -> Return {
    let of = |device: &Device| {
        let (graphics, memory) = device.clocks?;
        // NVML_CLOCK_GRAPHICS and NVML_CLOCK_MEM.
        match kind {
            0 => Some(graphics),
            2 => Some(memory),
            _ => None,
        }
    };
    give(handle, into, of, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(handle: Handle, into: *mut c_ulonglong) -> Return {
    give(handle, into, |device| device.throttle, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTotalEccErrors(
    handle: Handle,
    kind: c_uint,
    _counter: c_uint,
    into: *mut c_ulonglong,
) -> Return {
    let of = |device: &Device| device.ecc.map(|(corrected, other)| if kind == 0 { corrected } else { other });
    give(handle, into, of, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: Handle,
    count: *mut c_uint,
    into: *mut ProcessInfo,
) -> Return {
    let processes = match find(handle) {
        Err(code) => return code,
        Ok((device, _)) => match device.processes {
            None => return NOT_SUPPORTED,
            Some(processes) => processes,
        },
    };
    if count.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and by NVML's contract a number in and out.
    let room = unsafe { count.read() } as usize;
    // SAFETY: as above.
    unsafe { count.write(processes.len() as c_uint) };
    if processes.is_empty() {
        return SUCCESS;
    }
    if into.is_null() || room < processes.len() {
        return INSUFFICIENT_SIZE;
    }
    for (index, process) in processes.iter().enumerate() {
        let info = ProcessInfo {
            pid: process.pid,
            used: process.used.unwrap_or(NOT_AVAILABLE),
            gpu_instance: process.gpu_instance.unwrap_or(NO_INSTANCE),
            compute_instance: NO_INSTANCE,
        };
        // SAFETY: the caller has said that there is room for more than `index` entries.
        unsafe { into.add(index).write(info) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMigMode(handle: Handle, now: *mut c_uint, pending: *mut c_uint) -> Return {
    match give(handle, now, |device| device.mig, |(now, _)| c_uint::from(now)) {
        SUCCESS => give(handle, pending, |device| device.mig, |(_, pending)| c_uint::from(pending)),
        code => code,
    }
}

/// What an instance has of a number that only instances have.
fn of_instance(handle: Handle, into: *mut c_uint, number: fn(&Instance) -> u32) -> Return {
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    match find(handle) {
        Err(code) => code,
        Ok((_, None)) => NOT_SUPPORTED,
        Ok((device, Some(index))) => match device.instances.get(index) {
            None => INVALID_ARGUMENT,
            Some(instance) => {
                // SAFETY: not null, and by NVML's contract the caller's own place for one value.
                unsafe { into.write(number(instance)) };
                SUCCESS
            }
        },
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetGpuInstanceId(handle: Handle, into: *mut c_uint) -> Return {
    of_instance(handle, into, |instance| instance.gpu_instance)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetComputeInstanceId(handle: Handle, into: *mut c_uint) -> Return {
    of_instance(handle, into, |instance| instance.compute_instance)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMinorNumber(handle: Handle, into: *mut c_uint) -> Return {
    give(handle, into, |device| device.minor, |minor| minor)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMaxMigDeviceCount(handle: Handle, into: *mut c_uint) -> Return {
    give(handle, into, |device| device.mig, |_| INSTANCES as c_uint)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    handle: Handle,
    index: c_uint,
    into: *mut Handle,
) -> Return {
    let device = match find(handle) {
        Err(code) => return code,
        Ok((device, _)) => device,
    };
    if device.mig.is_none_or(|(enabled, _)| !enabled) || index as usize >= device.instances.len() {
        return NOT_FOUND;
    }
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    let instance = handle as usize % INSTANCE_STEP + INSTANCE_STEP * (index as usize + 1);
    // SAFETY: not null, and by NVML's contract the caller's own place for one value.
    unsafe { into.write(instance as Handle) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetSupportedEventTypes(handle: Handle, into: *mut c_ulonglong) -> Return {
    give(handle, into, |device| device.event_kinds, |value| value)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetCreate(into: *mut *mut c_void) -> Return {
    if into.is_null() {
        return INVALID_ARGUMENT;
    }
    let set = Box::new(EventSet { device: AtomicUsize::new(0), given: AtomicUsize::new(0) });
    // SAFETY: not null, and by NVML's contract the caller's own place for one value.
    unsafe { into.write(Box::into_raw(set).cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetFree(set: *mut c_void) -> Return {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: by NVML's contract a set of `nvmlEventSetCreate` that is not used again.
    drop(unsafe { Box::from_raw(set.cast::<EventSet>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceRegisterEvents(handle: Handle, _kinds: c_ulonglong, set: *mut c_void) -> Return {
    let device = match find(handle) {
        Err(code) => return code,
        Ok((device, _)) => device,
    };
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: by NVML's contract a set of `nvmlEventSetCreate` that lives.
    let set = unsafe { &*set.cast::<EventSet>() };
    set.device.store(handle as usize, Ordering::Relaxed);
    // What happened before is nobody's.
    set.given.store(device.events.len(), Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetWait_v2(set: *mut c_void, into: *mut EventData, timeout_ms: c_uint) -> Return {
    if set.is_null() || into.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: by NVML's contract a set of `nvmlEventSetCreate` that lives.
    let set = unsafe { &*set.cast::<EventSet>() };
    let handle = set.device.load(Ordering::Relaxed) as Handle;
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    loop {
        let device = match find(handle) {
            Err(code) => return code,
            Ok((device, _)) => device,
        };
        let given = set.given.load(Ordering::Relaxed);
        let event: Option<Event> = match device.events.get(given) {
            Some(event) => {
                set.given.store(given + 1, Ordering::Relaxed);
                Some(*event)
            }
            None => device.storm,
        };
        if let Some(event) = event {
            let data = EventData {
                device: handle,
                kind: event.kind,
                data: event.data,
                gpu_instance: NO_INSTANCE,
                compute_instance: NO_INSTANCE,
            };
            // SAFETY: not null, and by NVML's contract the caller's own place for one value.
            unsafe { into.write(data) };
            return SUCCESS;
        }
        if Instant::now() >= until {
            return TIMEOUT;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One change of the limits' file at a time, in this process.
static LIMITS: Mutex<()> = Mutex::new(());

/// The device's id, the group and the state's file, if the device has limits.
fn limited(handle: Handle, name_space: *const c_char) -> Result<(Device, String, PathBuf), Return> {
    let (device, _) = find(handle)?;
    let state = std::env::var_os(state::VARIABLE).map(PathBuf::from).ok_or(UNKNOWN)?;
    if !device.limits {
        return Err(NOT_SUPPORTED);
    }
    if name_space.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not null, and by NVML's contract a C string.
    let group = unsafe { CStr::from_ptr(name_space) }.to_string_lossy().into_owned();
    Ok((device, group, state))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceSetMemoryLimits_v1(handle: Handle, limits: *mut SetLimits) -> Return {
    if limits.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and by NVML's contract a structure of this layout.
    let wanted = unsafe { &*limits };
    let (device, group, state) = match limited(handle, wanted.name_space) {
        Err(code) => return code,
        Ok(found) => found,
    };
    if device.limits_forbidden {
        return NO_PERMISSION;
    }
    if wanted.soft > wanted.hard {
        return INVALID_ARGUMENT;
    }
    let _one = LIMITS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all = state::read_limits(&state);
    let of_device = all.entry(device.uuid).or_default();
    if (wanted.soft, wanted.hard) == (0, u64::MAX) {
        of_device.remove(&group);
    } else {
        of_device.insert(group, Limit { soft: wanted.soft, hard: wanted.hard });
    }
    if state::write_limits(&state, &all).is_ok() { SUCCESS } else { UNKNOWN }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMemoryLimits_v1(handle: Handle, limits: *mut GetLimits) -> Return {
    if limits.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and by NVML's contract a structure of this layout.
    let into = unsafe { &mut *limits };
    let (device, group, state) = match limited(handle, into.name_space) {
        Err(code) => return code,
        Ok(found) => found,
    };
    let all = state::read_limits(&state);
    let limit = all.get(&device.uuid).and_then(|groups| groups.get(&group)).copied();
    let limit = limit.unwrap_or(Limit { soft: 0, hard: u64::MAX });
    (into.soft, into.hard, into.used) = (limit.soft, limit.hard, 0);
    SUCCESS
}
