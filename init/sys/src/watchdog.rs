//! The kernel's watchdog devices: a promise to restart the machine when nobody feeds them.
//!
//! Opening starts one; it goes on when the descriptor is closed without the magic character, so a dead
//! init means a restart. Source: Documentation/watchdog/watchdog-api.rst.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

/// `_IOWR('W', 6, int)`
const WDIOC_SETTIMEOUT: libc::Ioctl = 0xc004_5706;

#[derive(Debug)]
pub struct Watchdog {
    device: File,
}

impl Watchdog {
    /// Opens and thereby starts it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { device: OpenOptions::new().write(true).open(path)? })
    }

    /// Sets the time after which it restarts the machine; gives what the hardware made of it.
    pub fn set_timeout_s(&self, seconds: u32) -> io::Result<u32> {
        let mut value = libc::c_int::try_from(seconds).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one int through the pointer; `value` is a live, aligned
        // c_int that nothing else refers to, and `self.device` keeps the descriptor open during the call.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), WDIOC_SETTIMEOUT, &raw mut value) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        u32::try_from(value).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Any written byte feeds it, except `V`, which would allow it to be stopped.
    pub fn feed(&mut self) -> io::Result<()> {
        self.device.write_all(b".")
    }
}
