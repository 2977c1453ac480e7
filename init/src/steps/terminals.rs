//! On which terminals does the local console live?
//!
//! On those to which the kernel writes its own messages (`console=` on its command line): the owner looks
//! there. init opens them, because console-tty has no right to, and leaves them open for it.

use init_sys::packet::open_non_blocking;
use rustix::fs::OFlags;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

const ACTIVE: &str = "/sys/class/tty/console/active";

/// An open terminal.
#[derive(Debug)]
pub struct Terminal {
    pub name: String,
    pub descriptor: OwnedFd,
}

impl Terminal {
    /// How console-tty is told: `5=ttyS0`.
    pub fn argument(&self) -> String {
        format!("{}={}", self.descriptor.as_raw_fd(), self.name)
    }
}

/// Those that can be opened, for reading too where that is possible.
pub fn open() -> Vec<Terminal> {
    let active = std::fs::read_to_string(ACTIVE).unwrap_or_default();
    names(&active).into_iter().filter_map(open_one).collect()
}

fn open_one(name: String) -> Option<Terminal> {
    let path = Path::new("/dev").join(&name);
    let opened = open_non_blocking(&path, OFlags::RDWR).or_else(|_| open_non_blocking(&path, OFlags::WRONLY));
    Some(Terminal { name, descriptor: opened.ok()? })
}

/// `tty0` means whichever virtual terminal is in front; the console lives on the first.
fn names(active: &str) -> Vec<String> {
    let mut names: Vec<String> = active
        .split_whitespace()
        .map(|name| if name == "tty0" { "tty1".to_owned() } else { name.to_owned() })
        .collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_screen_is_the_first_virtual_terminal() {
        assert_eq!(names("tty0 ttyS0\n"), ["tty1", "ttyS0"]);
        assert_eq!(names("ttyS0"), ["ttyS0"]);
        assert_eq!(names(""), Vec::<String>::new());
    }
}
