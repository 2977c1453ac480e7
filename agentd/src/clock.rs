//! What time is it, and what is the next id?
//!
//! Back-off, leases and time limits use the boot clock, which never jumps; records carry Unix time, which may.

use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Milliseconds since boot, sleep included: the clock of the launcher's records.
pub fn boot_ms() -> u64 {
    init_sys::clock::boot_ms()
}

pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A UUIDv7 (RFC 9562, 5.7).
pub fn fresh_id() -> Uuid {
    Uuid::now_v7()
}
