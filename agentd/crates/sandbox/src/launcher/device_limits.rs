//! Who holds the processes of a group to their share of a device?
//!
//! One trait for all kinds of limit ([`MemoryLimit`]): the kernel's files, the driver's call, an instance that the
//! hardware cut, and a wish. Which of them there is, and how each is called honestly, is decided in
//! `agentd_domain::enforcement`.
//!
//! Always: a limit stands before a process enters the group, which therefore never sees more of the device; a limit
//!         that was asked for and is not in force keeps the process from starting.
//! The driver's call needs its library, which a static program cannot load, and CAP_SYS_ADMIN, which an engine must
//! not have. So it is made by `agentd-engine limit`, a process of its own that is root, holds this one capability,
//! reads libraries and the group and nothing else, has the engine's system call filter and an empty network, and is
//! ended after [`CALL_LIMIT_S`]: a driver's call can hang.
//! Source: Documentation/admin-guide/cgroup-v2.rst, "DMEM"; NVML API reference, nvmlDeviceSetMemoryLimits_v1.

use super::options::Options;
use super::{broken, engines};
use crate::sys::{self, CloneRequest};
use agentd_domain::enforcement::{self, DeviceLimit, Enforcement, LimitBy};
use agentd_domain::fault::Report;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Loading a driver's library and one call; more means that the driver hangs.
const CALL_LIMIT_S: i64 = 5;
/// What the call prints is one small object.
const PRINTED_MOST: usize = 4096;

pub(super) trait MemoryLimit {
    fn enforcement(&self) -> Enforcement;

    /// Before a process enters the group.
    fn set(&self, group: &Path, bytes: u64) -> Result<(), Report>;

    /// While processes are in it. What they have beyond it already they keep, so then it is not in force.
    fn change(&self, group: &Path, bytes: u64) -> Result<(), Report> {
        self.set(group, bytes)
    }

    /// Before the group is removed.
    fn clear(&self, group: &Path) -> Result<(), Report>;
}

/// The means to one limit.
pub(super) fn means<'a>(options: &'a Options, by: &'a LimitBy) -> Box<dyn MemoryLimit + 'a> {
    match by {
        LimitBy::Dmem { region } => Box::new(Dmem { root: &options.cgroup_root, region }),
        LimitBy::Nvml { uuid } => Box::new(Driver { options, uuid }),
        LimitBy::Mig { .. } => Box::new(ByVariable(Enforcement::Hardware)),
        LimitBy::Mps { .. } => Box::new(ByVariable(Enforcement::Advisory)),
    }
}

/// All of a group's limits, or none: what was set before one failed is cleared.
pub(super) fn set_all(options: &Options, limits: &[DeviceLimit], group: &Path) -> Result<(), Report> {
    for (index, limit) in limits.iter().enumerate() {
        if let Err(report) = means(options, &limit.by).set(group, limit.bytes) {
            clear_all(options, limits.get(..index).unwrap_or_default(), group);
            return Err(report);
        }
    }
    Ok(())
}

/// Other limits for a group with living processes. Those that are new or another number are put in force first; when one
/// of them cannot be, what was is put back.
pub(super) fn change_all(
    options: &Options,
    before: &[DeviceLimit],
    after: &[DeviceLimit],
    group: &Path,
) -> Result<(), Report> {
    let fresh: Vec<&DeviceLimit> = after.iter().filter(|limit| !before.contains(limit)).collect();
    for (index, limit) in fresh.iter().enumerate() {
        let Err(report) = means(options, &limit.by).change(group, limit.bytes) else { continue };
        for undone in fresh.iter().take(index.saturating_add(1)) {
            match before.iter().find(|old| old.by == undone.by) {
                Some(old) => set_all(options, std::slice::from_ref(old), group)?,
                None => clear_all(options, &[(*undone).clone()], group),
            }
        }
        return Err(report);
    }
    let gone: Vec<DeviceLimit> =
        before.iter().filter(|old| after.iter().all(|limit| limit.by != old.by)).cloned().collect();
    clear_all(options, &gone, group);
    Ok(())
}

pub(super) fn clear_all(options: &Options, limits: &[DeviceLimit], group: &Path) {
    for limit in limits {
        let means = means(options, &limit.by);
        // The group goes either way, and the kernel's accounts with it.
        if let Err(report) = means.clear(group) {
            let (label, group) = (means.enforcement(), group.display());
            eprintln!("agent-launcher: a limit ({label:?}) of {group} was not cleared: {report}");
        }
    }
}

/// The kernel's files. Over the limit the driver moves memory to the host's or refuses it.
struct Dmem<'a> {
    root: &'a Path,
    region: &'a str,
}

impl MemoryLimit for Dmem<'_> {
    fn enforcement(&self) -> Enforcement {
        Enforcement::Kernel
    }

    fn set(&self, group: &Path, bytes: u64) -> Result<(), Report> {
        // Only the root has this file; a region that is not in it would be taken by no driver.
        let capacity = fs::read_to_string(self.root.join("dmem.capacity")).unwrap_or_default();
        if !enforcement::parse_dmem(&capacity).contains_key(self.region) {
            return Err(not_in_force(format!("the kernel knows no region {}", self.region)));
        }
        self.write(group, Some(bytes))?;
        let holds = self.read(group)?;
        if holds.is_none_or(|holds| holds > bytes) {
            return Err(not_in_force(format!("the kernel was told {bytes} bytes and holds it to {holds:?}")));
        }
        Ok(())
    }

    fn change(&self, group: &Path, bytes: u64) -> Result<(), Report> {
        self.set(group, bytes)?;
        let current = fs::read_to_string(group.join("dmem.current")).unwrap_or_default();
        let held = enforcement::parse_dmem(&current).get(self.region).copied().flatten().unwrap_or(0);
        if held > bytes {
            return Err(not_in_force(format!("the group holds {held} bytes already, more than {bytes}")));
        }
        Ok(())
    }

    fn clear(&self, group: &Path) -> Result<(), Report> {
        self.write(group, None)
    }
}

impl Dmem<'_> {
    fn write(&self, group: &Path, bytes: Option<u64>) -> Result<(), Report> {
        let path = group.join("dmem.max");
        // Not made where it is missing: that is a group without the controller.
        let written = fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| {
            use std::io::Write;
            file.write_all(enforcement::dmem_line(self.region, bytes).as_bytes())
        });
        written.map_err(|error| not_in_force(format!("{}: {error}", path.display())))
    }

    fn read(&self, group: &Path) -> Result<Option<u64>, Report> {
        let path = group.join("dmem.max");
        let text = fs::read_to_string(&path)
            .map_err(|error| not_in_force(format!("{}: {error}", path.display())))?;
        Ok(enforcement::parse_dmem(&text).get(self.region).copied().flatten())
    }
}

/// Nothing to do for the group: the program's environment says it.
struct ByVariable(Enforcement);

impl MemoryLimit for ByVariable {
    fn enforcement(&self) -> Enforcement {
        self.0
    }

    fn set(&self, _: &Path, _: u64) -> Result<(), Report> {
        Ok(())
    }

    fn clear(&self, _: &Path) -> Result<(), Report> {
        Ok(())
    }
}

/// NVIDIA's driver, through a process that can load its library.
struct Driver<'a> {
    options: &'a Options,
    uuid: &'a str,
}

impl MemoryLimit for Driver<'_> {
    fn enforcement(&self) -> Enforcement {
        Enforcement::Kernel
    }

    fn set(&self, group: &Path, bytes: u64) -> Result<(), Report> {
        self.call(&self.arguments("set", group, Some(bytes)), group).map(drop)
    }

    fn change(&self, group: &Path, bytes: u64) -> Result<(), Report> {
        let printed = self.call(&self.arguments("set", group, Some(bytes)), group)?;
        let said: serde_json::Value = serde_json::from_slice(&printed).unwrap_or_default();
        match said.get("used_bytes").and_then(serde_json::Value::as_u64) {
            Some(held) if held <= bytes => Ok(()),
            Some(held) => {
                Err(not_in_force(format!("the group holds {held} bytes already, more than {bytes}")))
            }
            None => Err(not_in_force("the driver does not say what the group holds already".to_owned())),
        }
    }

    fn clear(&self, group: &Path) -> Result<(), Report> {
        self.call(&self.arguments("clear", group, None), group).map(drop)
    }
}

impl Driver<'_> {
    fn arguments(&self, what: &str, group: &Path, bytes: Option<u64>) -> Vec<String> {
        let mut words =
            vec!["limit".to_owned(), what.to_owned(), "--device".to_owned(), self.uuid.to_owned()];
        words.extend(["--cgroup".to_owned(), Options::text(group)]);
        if let Some(bytes) = bytes {
            words.extend(["--bytes".to_owned(), bytes.to_string()]);
        }
        words
    }

    fn call(&self, arguments: &[String], group: &Path) -> Result<Vec<u8>, Report> {
        let failed = |error: Errno| not_in_force(format!("the driver could not be asked: {error}"));
        let (printed, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
        let namespaces = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let request = CloneRequest { namespaces, cgroup: None };
        let child = || engines::become_limiter(self.options, arguments, group, theirs.as_fd());
        let (_, pidfd) = sys::spawn(request, child).map_err(failed)?;
        drop(theirs);
        let text = read_to_end(&printed);
        if text.is_err() {
            let _ = sys::send_sigkill(pidfd.as_fd());
        }
        let status = await_end(pidfd.as_fd());
        match (text, status) {
            (Ok(text), Ok(true)) => Ok(text),
            (Ok(text), _) => Err(serde_json::from_slice(&text).unwrap_or_else(|_| {
                not_in_force(format!("the driver's answer was `{}`", String::from_utf8_lossy(&text).trim()))
            })),
            (Err(why), _) => Err(not_in_force(why)),
        }
    }
}

/// All that the process printed, within the limit.
fn read_to_end(pipe: &OwnedFd) -> Result<Vec<u8>, String> {
    let limit = Timespec { tv_sec: CALL_LIMIT_S, tv_nsec: 0 };
    let mut bytes = Vec::new();
    loop {
        let mut waiting = [PollFd::new(pipe, PollFlags::IN)];
        match poll(&mut waiting, Some(&limit)) {
            Ok(0) => return Err(format!("the driver did not answer within {CALL_LIMIT_S} s")),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.to_string()),
        }
        let mut buffer = [0_u8; 512];
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(read) => bytes.extend(buffer.iter().take(read)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
        if bytes.len() > PRINTED_MOST {
            return Err("the driver's answer has no end".to_owned());
        }
    }
}

/// Whether the process ended well. One that a signal cannot end is left to the loop, which reaps every child.
fn await_end(pidfd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut waiting = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let limit = Timespec { tv_sec: CALL_LIMIT_S, tv_nsec: 0 };
    if poll(&mut waiting, Some(&limit))? == 0 {
        return Err(Errno::TIMEDOUT);
    }
    let ended = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
    Ok(ended.is_some_and(|status| status.exit_status() == Some(0)))
}

fn not_in_force(why: String) -> Report {
    broken(
        "device_limit_failed",
        why,
        "use a partition whose limit the engine keeps, or install a driver or kernel that has limits for groups",
    )
}

/// Complaints about limits that agentd sent.
pub(super) fn check(limits: &[DeviceLimit]) -> Result<(), Report> {
    const LIMITS_MOST: usize = 16;
    let problem = limits.iter().find_map(|limit| limit.by.problem());
    let problem = problem.or((limits.len() > LIMITS_MOST).then_some("there are too many"));
    match problem {
        None => Ok(()),
        Some(why) => {
            let fix = "`agentd-engine --probe` and dmem.capacity name devices as they are meant here";
            Err(super::refused("plan_refused", format!("device_limits: {why}"), fix))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const REGION: &str = "drm/0000:03:00.0/vram0";

    /// A folder shaped like the root of the groups, and one like a leaf.
    struct Groups(tempfile::TempDir);

    impl Groups {
        fn new(capacity: &str) -> Self {
            let groups = Self(tempfile::tempdir().unwrap());
            fs::write(groups.0.path().join("dmem.capacity"), capacity).unwrap();
            fs::create_dir(groups.leaf()).unwrap();
            fs::write(groups.leaf().join("dmem.max"), "").unwrap();
            groups
        }

        fn leaf(&self) -> PathBuf {
            self.0.path().join("leaf")
        }

        fn options(&self) -> Options {
            Options { cgroup_root: self.0.path().to_owned(), ..Options::default() }
        }

        fn max(&self) -> String {
            fs::read_to_string(self.leaf().join("dmem.max")).unwrap()
        }
    }

    fn dmem(bytes: u64) -> DeviceLimit {
        DeviceLimit { by: LimitBy::Dmem { region: REGION.to_owned() }, bytes }
    }

    #[test]
    fn the_kernels_limit_is_written_and_read_back() {
        let groups = Groups::new("drm/0000:03:00.0/vram0 8514437120\n");
        let options = groups.options();
        set_all(&options, &[dmem(1 << 30)], &groups.leaf()).unwrap();
        assert_eq!(groups.max(), "drm/0000:03:00.0/vram0 1073741824");
        assert_eq!(means(&options, &dmem(0).by).enforcement(), Enforcement::Kernel);
    }

    #[test]
    fn a_limit_that_no_driver_would_keep_is_an_error() {
        let groups = Groups::new("drm/0000:04:00.0/vram0 8514437120\n");
        let report = set_all(&groups.options(), &[dmem(1 << 30)], &groups.leaf()).unwrap_err();
        assert!(report.code == "device_limit_failed" && report.why.contains(REGION), "{report}");
        assert_eq!(groups.max(), "");
        // A group without the controller has no such file, and it is not made.
        let groups = Groups::new("drm/0000:03:00.0/vram0 8514437120\n");
        fs::remove_file(groups.leaf().join("dmem.max")).unwrap();
        set_all(&groups.options(), &[dmem(1 << 30)], &groups.leaf()).unwrap_err();
        assert!(!groups.leaf().join("dmem.max").exists());
    }

    #[test]
    fn a_limit_of_a_living_group_changes_or_stays_as_it_was() {
        let groups = Groups::new("drm/0000:03:00.0/vram0 8514437120\n");
        let options = groups.options();
        let (one, half) = ([dmem(1 << 30)], [dmem(1 << 29)]);
        set_all(&options, &one, &groups.leaf()).unwrap();
        let held = |bytes: u64| {
            fs::write(groups.leaf().join("dmem.current"), format!("{REGION} {bytes}\n")).unwrap();
            // A real file holds one value for each region; this one keeps the end of what was longer.
            fs::write(groups.leaf().join("dmem.max"), "").unwrap();
        };
        held(1 << 28);
        change_all(&options, &one, &half, &groups.leaf()).unwrap();
        assert_eq!(groups.max(), format!("{REGION} {}", 1 << 29));
        // It has more than that already: the new limit would be a number that nobody keeps.
        held((1 << 29) + 1);
        let report = change_all(&options, &one, &half, &groups.leaf()).unwrap_err();
        assert!(report.code == "device_limit_failed" && report.why.contains("holds"), "{report}");
        assert!(groups.max().starts_with(&format!("{REGION} {}", 1 << 30)), "as before: {}", groups.max());
        held(0);
        change_all(&options, &one, &[], &groups.leaf()).unwrap();
        assert_eq!(groups.max(), format!("{REGION} max"));
        held(0);
        change_all(&options, &one, &one, &groups.leaf()).unwrap();
        assert_eq!(groups.max(), "", "what is as it was is not written again");
    }

    #[test]
    fn when_the_second_limit_fails_the_first_is_taken_back() {
        let groups = Groups::new("drm/0000:03:00.0/vram0 8514437120\n");
        let other = LimitBy::Dmem { region: "drm/0000:09:00.0/vram0".to_owned() };
        let limits = [dmem(1 << 30), DeviceLimit { by: other, bytes: 1 }];
        set_all(&groups.options(), &limits, &groups.leaf()).unwrap_err();
        // A real file holds one value for each region; this one keeps what was written last over what was longer.
        assert!(groups.max().starts_with("drm/0000:03:00.0/vram0 max"), "{}", groups.max());
    }

    #[test]
    fn the_driver_is_asked_in_these_words() {
        let options = Options::default();
        let driver = Driver { options: &options, uuid: "GPU-1" };
        let group = Path::new("/sys/fs/cgroup/engines/gpu0/1");
        assert_eq!(
            driver.arguments("set", group, Some(7)).join(" "),
            "limit set --device GPU-1 --cgroup /sys/fs/cgroup/engines/gpu0/1 --bytes 7"
        );
        assert_eq!(
            driver.arguments("clear", group, None).join(" "),
            "limit clear --device GPU-1 --cgroup /sys/fs/cgroup/engines/gpu0/1"
        );
    }

    #[test]
    fn what_a_program_could_undo_is_called_a_wish() {
        let options = Options::default();
        let label = |by: LimitBy| means(&options, &by).enforcement();
        for by in [
            LimitBy::Mps { device: 0 },
            LimitBy::Mig { uuid: "MIG-1".to_owned() },
            LimitBy::Nvml { uuid: "GPU-1".to_owned() },
            LimitBy::Dmem { region: REGION.to_owned() },
        ] {
            assert_eq!(label(by.clone()), by.enforcement());
        }
    }
}
