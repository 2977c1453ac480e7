//! How is the agent's root made?
//!
//! In:     the plan's mounts. Out: a new root, pivoted to, in which nothing else is left.
//! Always: the host's tree is first made private, so nothing done here shows outside; sources are opened without
//!         following a link and may not leave their folder; every mount is nosuid, and nodev but for `/dev`; the root
//!         itself is read-only at the end.
//! Needs:  root, in a mount namespace of its own. Source: mount(2), mount_setattr(2), open_tree, move_mount, pivot_root(2).

use super::{Failure, JailSpec, step};
use crate::check::is_beneath;
use crate::lower::{Lowered, Wall};
use crate::sys::{MountAttributes, mount_setattr};
use agentd_domain::paths;
use agentd_domain::plan::{Mount, SandboxPlan};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, makedev, mkdirat, mknodat, openat,
    openat2, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Enough for folders, links and empty files on which others are mounted.
const ROOT_SIZE: &str = "256k";
const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;

/// The new root while it is being made.
pub(super) struct NewRoot {
    root: OwnedFd,
    /// Targets of optional mounts whose source this image lacks.
    absent: Vec<String>,
    /// False for the host's, which only the escape suite ever leaves in place.
    is_own: bool,
}

/// Makes the root, enters it and lets the old one go. `/run` is left writable for [`NewRoot::seal`] to close.
pub(super) fn build(spec: &JailSpec) -> Result<NewRoot, Failure> {
    if Lowered::of(&spec.plan).lacks(Wall::Root) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = step("mounts: the host's root", openat(CWD, "/", flags, Mode::empty()))?;
        return Ok(NewRoot { root, absent: Vec::new(), is_own: false });
    }
    let (plan, data_dir, mountpoint) = (&spec.plan, spec.data_dir.as_str(), spec.root_mountpoint.as_str());
    step("mounts: make the tree private", make_private())?;
    let root = step(
        "mounts: new root",
        tmpfs(ROOT_SIZE, "0755", MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC),
    )?;
    step("mounts: new root", attach(root.as_fd(), CWD, mountpoint))?;
    let mut new = NewRoot { root, absent: Vec::new(), is_own: true };
    step("mounts: /run", new.folder("/run"))?;
    for mount in &plan.mounts {
        let name = format!("mounts: {}", describe(mount));
        step(&name, new.add(plan, mount, data_dir))?;
    }
    step("mounts: pivot_root", enter(&new.root))?;
    Ok(new)
}

impl NewRoot {
    pub(super) fn absent(&self) -> &[String] {
        &self.absent
    }

    /// No more changes: neither by the jail nor by anyone in it.
    pub(super) fn seal(&self) -> Result<(), Failure> {
        if !self.is_own {
            return Ok(());
        }
        let read_only = MountAttributes { set: RDONLY, ..MountAttributes::default() };
        step("mounts: read-only root", mount_setattr(self.root.as_fd(), c"", false, read_only))
    }

    fn add(&mut self, plan: &SandboxPlan, mount: &Mount, data_dir: &str) -> Result<(), Errno> {
        match mount {
            Mount::ReadOnly { source, target, exec, optional } => {
                let attributes = RDONLY | NOSUID | NODEV | if *exec { 0 } else { NOEXEC };
                match self.bind(source, target, data_dir, attributes) {
                    Err(Errno::NOENT) if *optional => {
                        self.absent.push(target.clone());
                        Ok(())
                    }
                    result => result,
                }
            }
            Mount::Symlink { target, points_to } => {
                let (folder, name) = self.parent(target)?;
                symlinkat(points_to.as_str(), &folder, name)
            }
            Mount::Work { target } => {
                let source = format!("{}/{}/work", paths::DATA_AGENTS, plan.agent_id);
                self.bind(&source, target, data_dir, NOSUID | NODEV | NOEXEC)
            }
            Mount::Tmpfs { target, size_bytes } => {
                let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                let tmpfs = tmpfs(&size_bytes.to_string(), "1777", attributes)?;
                attach(tmpfs.as_fd(), self.folder(target)?.as_fd(), "")
            }
            Mount::Proc { target } => attach(proc()?.as_fd(), self.folder(target)?.as_fd(), ""),
            Mount::Dev { target } => self.dev(target, plan),
            Mount::Text { target, text } => self.text(target, text),
        }
    }

    /// A copy of one mount, without the mounts beneath it.
    fn bind(&self, source: &str, target: &str, data_dir: &str, attributes: u64) -> Result<(), Errno> {
        let source = open_source(source, data_dir)?;
        let is_folder = FileType::from_raw_mode(rustix::fs::fstat(&source)?.st_mode).is_dir();
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(&source, "", flags)?;
        // Cleared first: the data partition is mounted noexec, and a package must be able to hold a program.
        let change =
            MountAttributes { set: attributes, clear: (RDONLY | NOEXEC) & !attributes, propagation: 0 };
        mount_setattr(tree.as_fd(), c"", false, change)?;
        let place = if is_folder { self.folder(target)? } else { self.file(target)? };
        attach(tree.as_fd(), place.as_fd(), "")
    }

    /// Six nodes, and links that programs expect. The shared memory folder is a mount of its own, made later.
    fn dev(&self, target: &str, plan: &SandboxPlan) -> Result<(), Errno> {
        const NODES: [(&str, u32, u32); 6] = [
            ("null", 1, 3),
            ("zero", 1, 5),
            ("full", 1, 7),
            ("random", 1, 8),
            ("urandom", 1, 9),
            ("tty", 5, 0),
        ];
        const LINKS: [(&str, &str); 4] = [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ];
        let dev = tmpfs(ROOT_SIZE, "0755", MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
        attach(dev.as_fd(), self.folder(target)?.as_fd(), "")?;
        for (name, major, minor) in NODES {
            let device: Dev = makedev(major, minor);
            mknodat(&dev, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)?;
            // mknod's mode is cut by the umask.
            rustix::fs::chmodat(&dev, name, Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty())?;
        }
        for (name, points_to) in LINKS {
            symlinkat(points_to, &dev, name)?;
        }
        mkdirat(&dev, "shm", Mode::from_raw_mode(0o755))?;
        let given = plan.device.as_ref().and_then(|wish| wish.given.as_ref());
        for path in given.iter().flat_map(|given| &given.nodes) {
            own_node(&dev, target, path, plan.uid)?;
        }
        let read_only = MountAttributes { set: RDONLY, ..MountAttributes::default() };
        mount_setattr(dev.as_fd(), c"", false, read_only)
    }

    /// A file of the new root's own file system, which becomes read-only as a whole.
    fn text(&self, target: &str, text: &str) -> Result<(), Errno> {
        let (parent, name) = self.parent(target)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
        let file = openat(&parent, name, flags, Mode::from_raw_mode(0o444))?;
        // A part of so small a file is written only where there is no room.
        match rustix::io::write(&file, text.as_bytes())? {
            written if written == text.len() => Ok(()),
            _ => Err(Errno::NOSPC),
        }
    }

    fn folder(&self, target: &str) -> Result<OwnedFd, Errno> {
        let (parent, name) = self.parent(target)?;
        make_folder(&parent, name)
    }

    fn file(&self, target: &str) -> Result<OwnedFd, Errno> {
        let (parent, name) = self.parent(target)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        openat(&parent, name, flags, Mode::from_raw_mode(0o444))
    }

    /// The folder that a target lies in, made when it is missing, and the target's last name.
    fn parent<'a>(&self, target: &'a str) -> Result<(OwnedFd, &'a str), Errno> {
        let (folders, name) = target.rsplit_once('/').ok_or(Errno::INVAL)?;
        let mut at = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        for part in folders.split('/').filter(|part| !part.is_empty()) {
            at = make_folder(&at, part)?;
        }
        Ok((at, name))
    }
}

/// A node of the run's own for the device that the host's node of this name is: who may open the host's does not matter
/// then, and nothing that is done to this one shows there.
fn own_node(dev: &OwnedFd, target: &str, path: &str, uid: u32) -> Result<(), Errno> {
    let host = open_source(path, paths::DATA)?;
    let stat = rustix::fs::fstat(&host)?;
    if !FileType::from_raw_mode(stat.st_mode).is_char_device() {
        return Err(Errno::NOTTY);
    }
    let rest = path.strip_prefix(target).and_then(|rest| rest.strip_prefix('/')).ok_or(Errno::INVAL)?;
    let (folders, name) = rest.rsplit_once('/').unwrap_or(("", rest));
    let mut at = rustix::io::fcntl_dupfd_cloexec(dev, 0)?;
    for part in folders.split('/').filter(|part| !part.is_empty()) {
        at = make_folder(&at, part)?;
    }
    mknodat(&at, name, FileType::CharacterDevice, Mode::from_raw_mode(0o600), stat.st_rdev)?;
    let (owner, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(&at, name, Some(owner), Some(group), flags)
}

fn make_folder(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Opens a source in this mount namespace without following any link. What the plan calls `/data` is `data_dir`.
fn open_source(source: &str, data_dir: &str) -> Result<OwnedFd, Errno> {
    let (base, rest) = match source.strip_prefix(paths::DATA) {
        Some(rest) if is_beneath(source, paths::DATA) => (data_dir, rest),
        _ => ("/", source),
    };
    let folder = openat(CWD, base, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(&folder, rest.trim_start_matches('/'), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn make_private() -> Result<(), Errno> {
    // MS_PRIVATE of linux/mount.h.
    const PRIVATE: u64 = 1 << 18;
    let change = MountAttributes { propagation: PRIVATE, ..MountAttributes::default() };
    let root = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount_setattr(root.as_fd(), c"", true, change)
}

fn tmpfs(size: &str, mode: &str, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "size", size)?;
    fsconfig_set_string(&context, "mode", mode)?;
    finish(&context, attributes)
}

/// Processes of other users and everything that is not about processes stay hidden: no /proc/sys, no sysrq.
fn proc() -> Result<OwnedFd, Errno> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "hidepid", "invisible")?;
    fsconfig_set_string(&context, "subset", "pid")?;
    finish(&context, MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC)
}

fn finish(context: &OwnedFd, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    fsconfig_create(context)?;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes | MountAttrFlags::MOUNT_ATTR_NOSUID)
}

/// An empty `path` means `place` itself.
fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    move_mount(mount, "", place, path, flags)
}

/// With both arguments the same folder the old root ends on top of the new one, so that one unmount lets go of it.
fn enter(root: &OwnedFd) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

fn describe(mount: &Mount) -> &str {
    match mount {
        Mount::ReadOnly { target, .. }
        | Mount::Symlink { target, .. }
        | Mount::Work { target }
        | Mount::Tmpfs { target, .. }
        | Mount::Proc { target }
        | Mount::Dev { target }
        | Mount::Text { target, .. } => target,
    }
}
