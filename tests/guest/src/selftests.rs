//! Pid 1 of a guest that runs the kernel's own self-tests, and nothing else.
//!
//! In:     programs as `/tests/<suite>/<program>`; those to run are its arguments, which is what the kernel gives its
//!         init of the words behind ` -- ` on its command line.
//! Out:    on the console `selftests: begin <suite>/<program>`, what the program says, `selftests: end <suite>/<program>
//!         <exit status>`, and after the last `selftests: over`. Then the machine is off.
//! Always: a program runs as root in its suite's folder, because it makes its own folders there and starts what lies
//!         beside it.
#![forbid(unsafe_code)]

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use std::path::Path;
use std::process::Command;

/// What the tests look at or make their own mounts of. The kernel mounts `/dev` only for an initramfs.
const MOUNTS: [(&str, &str); 4] =
    [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")];

fn main() {
    for (kind, target) in MOUNTS {
        let flags = MountFlags::NOSUID;
        if let Err(error) = mount(kind, target, kind, flags, None) {
            println!("selftests: cannot mount {target}: {error}");
        }
    }
    for program in std::env::args().skip(1) {
        println!("selftests: begin {program}");
        println!("selftests: end {program} {}", run(&program));
    }
    println!("selftests: over");
    let failed = reboot(RebootCommand::PowerOff);
    println!("selftests: the machine stays on: {failed:?}");
}

fn run(program: &str) -> String {
    let path = Path::new("/tests").join(program);
    let folder = path.parent().unwrap_or(Path::new("/"));
    // `ip` is asked for by its bare name.
    let ended = Command::new(&path).current_dir(folder).env_clear().env("PATH", "/bin").status();
    ended.map_or_else(|error| error.to_string(), |status| status.to_string())
}
