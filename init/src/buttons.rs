//! The power button, wherever it is: on the case (ACPI), on a keyboard, or QEMU's `system_powerdown`.
//!
//! Every input device that has a power key is read. Source: Documentation/input/event-codes.rst,
//! linux/input.h; sysfs tells a device's keys as words of a bit map, the highest first.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use init_sys::packet::open_non_blocking;
use rustix::fs::OFlags;

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;
/// `struct input_event` with 64-bit time: two longs, two shorts, an int.
const EVENT_BYTES: usize = 24;
const INPUT_CLASS: &str = "/sys/class/input";

#[derive(Debug, Default)]
pub struct Buttons {
    open: BTreeMap<String, OwnedFd>,
}

impl Buttons {
    /// Opens devices with a power key that are not open yet.
    pub fn look(&mut self) {
        let Ok(entries) = fs::read_dir(INPUT_CLASS) else { return };
        for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
            if !name.starts_with("event") || self.open.contains_key(&name) {
                continue;
            }
            let keys = Path::new(INPUT_CLASS).join(&name).join("device/capabilities/key");
            if !fs::read_to_string(keys).is_ok_and(|keys| has_key(&keys, KEY_POWER)) {
                continue;
            }
            if let Ok(device) = open_non_blocking(&Path::new("/dev/input").join(&name), OFlags::RDONLY) {
                self.open.insert(name, device);
            }
        }
    }

    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.open.values().map(AsFd::as_fd)
    }

    /// Reads what is there. A device that is gone is closed.
    pub fn power_was_pressed(&mut self) -> bool {
        let mut pressed = false;
        self.open.retain(|_, device| {
            let mut buffer = [0_u8; EVENT_BYTES * 32];
            match rustix::io::read(&*device, &mut buffer) {
                Ok(0) => false,
                Ok(count) => {
                    pressed |= buffer.get(..count).is_some_and(contains_power_press);
                    true
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => true,
                Err(_) => false,
            }
        });
        pressed
    }
}

fn contains_power_press(events: &[u8]) -> bool {
    events.chunks_exact(EVENT_BYTES).any(|event| {
        let short = |at: usize| event.get(at..)?.first_chunk::<2>().map(|bytes| u16::from_ne_bytes(*bytes));
        let value = event.get(20..).and_then(|rest| rest.first_chunk::<4>()).map(|b| i32::from_ne_bytes(*b));
        (short(16), short(18), value) == (Some(EV_KEY), Some(KEY_POWER), Some(PRESSED))
    })
}

/// `capabilities/key`: words of 64 bits in hex, the highest first.
fn has_key(words: &str, key: u16) -> bool {
    words
        .split_whitespace()
        .rev()
        .nth(usize::from(key / 64))
        .and_then(|word| u64::from_str_radix(word, 16).ok())
        .is_some_and(|word| word >> (key % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_acpi_button_has_a_power_key_and_a_mouse_has_not() {
        // As QEMU's "Power Button" shows it: bit 116 is bit 52 of the second word.
        assert!(has_key("10000000000000 0\n", KEY_POWER));
        assert!(!has_key("70000 0 0 0 0\n", KEY_POWER));
        assert!(!has_key("", KEY_POWER));
    }

    #[test]
    fn a_press_is_found_among_other_events() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        let release = event(EV_KEY, KEY_POWER, 0);
        let sync = event(0, 0, 0);
        let press = event(EV_KEY, KEY_POWER, 1);
        assert!(contains_power_press(&[sync.clone(), press].concat()));
        assert!(!contains_power_press(&[release, sync].concat()));
        assert!(!contains_power_press(&[1, 2, 3]));
    }
}
