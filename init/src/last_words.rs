//! What happens if init panics all the same?
//!
//! The end of PID 1 is the end of the kernel, within the same millisecond and with open files. So the panic's
//! text goes to the kernel log (from where pstore keeps it), everything is written to the disks, and the
//! machine restarts. The boot counter and, on the next boot, the crash record do the rest.

use crate::log;
use rustix::system::RebootCommand;

/// From here on a panic ends in an orderly restart.
pub fn arm() {
    std::panic::set_hook(Box::new(|panic| {
        log::write_once(log::Level::Alarm, &format!("init: this is a bug, restarting the machine: {panic}"));
        rustix::fs::sync();
        // Only PID 1 takes the machine with it; a panicking child of it just ends.
        if std::process::id() == 1 {
            let _ = rustix::system::reboot(RebootCommand::Restart);
        }
    }));
}
