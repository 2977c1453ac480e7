//! Which drivers does this machine need that the kernel does not have in it?
//!
//! In:     the image's list (`paths::DRIVERS`; base has none), the devices on the machine's buses.
//! Out:    modules of the kernel, each with its signature checked by the kernel; nodes below `/dev` that engines may open.
//! Always: loading happens in a process of its own, `init load-drivers`, with an end: a driver that waits for its card for
//!         ever costs the card, not the machine. Afterwards [`super::sysctl::end_module_loading`] shuts the door, whatever
//!         came of it.
//! Normal: no device that a driver of the image is for; a driver that does not want the device it was loaded for.

use crate::boot::{Done, Outcome};
use crate::machine::Machine;
use agentd_domain::drivers::{Driver, List, Loaded};
use agentd_domain::fault::Report;
use agentd_domain::paths;
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub const RESULT_PREFIX: &str = "result: ";

/// A card whose firmware has to be loaded answers within ten seconds, several cards one after the other.
const LIMIT_S: u64 = 90;
/// Cards, and those of a virtual machine.
const BUSES: [&str; 2] = ["/sys/bus/pci/devices", "/sys/bus/virtio/devices"];

/// What engines reach a driver through: names below `/dev`, or folders of them.
const NODES: [&str; 3] = ["dri", "nvidia-caps", ""];

pub fn load(machine: &mut Machine) -> Outcome {
    let list = match fs::read(paths::DRIVERS) {
        Ok(text) => serde_json::from_slice::<List>(&text).map_err(|error| failed(error.to_string()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Done::Skipped("this image brings no drivers beside the kernel's own".to_owned()));
        }
        Err(error) => return Err(failed(format!("{}: {error}", paths::DRIVERS))),
    };
    let names: Vec<&str> = list.wanted(&devices()).iter().map(|driver| driver.name.as_str()).collect();
    if names.is_empty() {
        let brought: Vec<&str> = list.drivers.iter().map(|driver| driver.name.as_str()).collect();
        return Ok(Done::Skipped(format!("no device here is one for {}", brought.join(", "))));
    }
    machine.log.info(&format!("loading drivers: {}", names.join(", ")));
    let names = serde_json::to_string(&names).map_err(|error| failed(error.to_string()))?;
    let result = machine
        .run_tool("/proc/self/exe", &["load-drivers", &names], LIMIT_S)
        .map_err(|error| failed(error.to_string()))?;
    let line = result.output.lines().find_map(|line| line.strip_prefix(RESULT_PREFIX));
    let loaded: Vec<Loaded> = line
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| failed(format!("the loader ended without a result: {}", result.output.trim())))?;
    for one in &loaded {
        match &one.why {
            None => machine.log.info(&format!("driver {}: loaded", one.name)),
            Some(why) => machine.log.warn(&format!("driver {}: not loaded, {why}", one.name)),
        }
    }
    let open = open_to_engines(Path::new("/dev"));
    if open.is_empty() {
        machine.log.info("no driver has made a node that an engine could open");
    } else {
        machine.log.info(&format!("engines may open {}", open.join(", ")));
    }
    Ok(Done::Well)
}

fn failed(why: String) -> Report {
    Report::environment(
        "drivers",
        "drivers of this image were not loaded, so its graphics cards do not compute",
        why,
        "restart; the log says what each driver said. The processor computes meanwhile",
    )
}

/// As the kernel describes what is on the buses, a line each.
fn devices() -> Vec<String> {
    let entries = BUSES.iter().filter_map(|bus| fs::read_dir(bus).ok()).flatten().flatten();
    entries.filter_map(|entry| fs::read_to_string(entry.path().join("modalias")).ok()).collect()
}

/// The program `init load-drivers`: names as JSON in, what became of them out.
pub fn main(names: Option<String>) -> ExitCode {
    let names: Vec<String> = names.and_then(|names| serde_json::from_str(&names).ok()).unwrap_or_default();
    let list: List =
        fs::read(paths::DRIVERS).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let wanted = list.drivers.iter().filter(|driver| names.contains(&driver.name));
    let loaded: Vec<Loaded> = wanted.map(load_one).collect();
    match serde_json::to_string(&loaded) {
        Ok(line) => println!("{RESULT_PREFIX}{line}"),
        Err(error) => eprintln!("cannot tell the result: {error}"),
    }
    ExitCode::SUCCESS
}

fn load_one(driver: &Driver) -> Loaded {
    let mut why = None;
    for file in &driver.files {
        if let Err(error) = load_file(Path::new(file)) {
            why = Some(format!("{file}: {error}"));
            break;
        }
    }
    Loaded { name: driver.name.clone(), why }
}

/// One module; one that is there already, for two drivers may need it, is loaded.
fn load_file(path: &Path) -> io::Result<()> {
    let file = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// devtmpfs makes nodes for root alone, and there is no udev here: engines' group gets those of devices that compute.
fn open_to_engines(dev: &Path) -> Vec<String> {
    let mut open = Vec::new();
    for folder in NODES {
        let entries = fs::read_dir(dev.join(folder)).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| is_of_a_device(folder, &entry.file_name().to_string_lossy())) {
            if open_one(&entry.path()).is_ok() {
                open.push(entry.path().display().to_string());
            }
        }
    }
    open.sort();
    open
}

/// Only what computes: a node that sets the screen's mode (`card0`) is no engine's business.
fn is_of_a_device(folder: &str, name: &str) -> bool {
    match folder {
        "dri" => name.starts_with("renderD"),
        "nvidia-caps" => name.starts_with("nvidia-cap"),
        _ => name.starts_with("nvidia"),
    }
}

fn open_one(path: &PathBuf) -> io::Result<()> {
    // Folders keep their mode: they are root's and everybody may look into them.
    if !path.symlink_metadata()?.file_type().is_file() && !path.is_dir() {
        rustix::fs::chown(path, Some(Uid::ROOT), Some(Gid::from_raw(paths::UID_ENGINE)))?;
        rustix::fs::chmod(path, Mode::from_raw_mode(0o660))?;
        return Ok(());
    }
    Err(io::Error::other("no device"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_get_nodes_that_compute_and_no_others() {
        for (folder, name) in
            [("dri", "renderD128"), ("", "nvidia0"), ("", "nvidiactl"), ("nvidia-caps", "nvidia-cap1")]
        {
            assert!(is_of_a_device(folder, name), "{folder} {name}");
        }
        for (folder, name) in
            [("dri", "card0"), ("dri", "by-path"), ("", "sda"), ("", "mem"), ("nvidia-caps", "x")]
        {
            assert!(!is_of_a_device(folder, name), "{folder} {name}");
        }
    }

    #[test]
    fn a_folder_without_devices_opens_nothing() {
        let dev = tempfile::tempdir().unwrap();
        fs::create_dir(dev.path().join("dri")).unwrap();
        fs::write(dev.path().join("dri/renderD128"), "a file").unwrap();
        assert!(open_to_engines(dev.path()).is_empty());
    }

    #[test]
    fn a_module_that_is_not_there_is_told_with_its_file() {
        let driver =
            Driver { name: "x".to_owned(), files: vec!["/nowhere/x.ko".to_owned()], devices: Vec::new() };
        let loaded = load_one(&driver);
        assert!(loaded.why.is_some_and(|why| why.starts_with("/nowhere/x.ko: ")));
    }
}
