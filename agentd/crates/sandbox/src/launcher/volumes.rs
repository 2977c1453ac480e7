//! Where do an agent's files live, and whose are they?
//!
//! `/data/agents` (root:agentd 0750) holds `<agent_id>` (root:agentd 1770: agentd makes its store there and can
//! neither remove nor rename what is not its own) with `work` (the agent's uid, 0700), under a user quota.
//! Always: the folder's owner is the record of which uid an agent has: a uid belongs to one agent, and a run starts
//!         only when plan, folder and uid agree. Paths are walked with `openat2` beneath the data folder, without links.
//! Source: openat2(2), quotactl(2).

use super::options::{Options, Without};
use super::{broken, refused};
use crate::sys::{DiskLimits, set_user_quota};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::plan::DiskQuota;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, fsync, mkdirat,
    openat, openat2, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

/// Files looked at in one step of a removal, so that a volume of a million files delays no kill.
const REMOVAL_STEP: usize = 512;
const WORK: &str = "work";
/// What an agent's folder is called while it is being removed.
const DOOMED: &str = ".removed-";

/// Makes the agent's folders and sets its quota. Doing it twice changes nothing but the quota.
pub(super) fn prepare(
    options: &Options,
    agent_id: AgentId,
    uid: u32,
    quota: DiskQuota,
) -> Result<(), Report> {
    let failed = |error: Errno| {
        broken(
            "volume_failed",
            format!("the folders of agent {agent_id} could not be made: {error}"),
            "look at the data partition's state with `agentctl status`",
        )
    };
    let agents = agents_folder(options).map_err(failed)?;
    if let Some(other) = owner_of_uid(&agents, uid, agent_id).map_err(failed)? {
        return Err(refused(
            "uid_taken",
            format!("uid {uid} belongs to agent {other}"),
            "uids are never reused: choose the next one",
        ));
    }
    let name = agent_id.to_string();
    make_folder(&agents, &name, 0o700).map_err(failed)?;
    let folder = beneath(&agents, &name).map_err(failed)?;
    make_folder(&folder, WORK, 0o700).map_err(failed)?;
    let work = beneath(&folder, WORK).map_err(failed)?;
    let owner = fstat(&work).map_err(failed)?.st_uid;
    if owner != 0 && owner != uid {
        return Err(refused(
            "uid_mismatch",
            format!("the volume of agent {agent_id} belongs to uid {owner}, not {uid}"),
            "an agent keeps the uid it was made with",
        ));
    }
    if !options.without.contains(&Without::Quota) {
        let limits = DiskLimits { bytes: quota.bytes, inodes: quota.inodes };
        set_user_quota(work.as_fd(), uid, limits).map_err(no_quota)?;
    }
    // Last: from here on the folder counts as prepared.
    give(&work, uid, uid, 0o700).map_err(failed)?;
    give(&folder, 0, options.agentd_uid, 0o1770).map_err(failed)?;
    sync(&folder).and_then(|()| sync(&agents)).map_err(failed)
}

/// That this agent's volume exists and belongs to this uid.
pub(super) fn verify(options: &Options, agent_id: AgentId, uid: u32) -> Result<(), Report> {
    let prepared = data_folder(options)
        .and_then(|data| beneath(&data, &format!("agents/{agent_id}/{WORK}")))
        .and_then(|work| fstat(&work));
    match prepared {
        Ok(stat) if stat.st_uid == uid && FileType::from_raw_mode(stat.st_mode).is_dir() => Ok(()),
        Ok(stat) => Err(refused(
            "uid_mismatch",
            format!("the volume of agent {agent_id} belongs to uid {}, not {uid}", stat.st_uid),
            "an agent runs with the uid its volume was made for",
        )),
        Err(error) => Err(refused(
            "not_prepared",
            format!("agent {agent_id} has no volume: {error}"),
            "prepare the agent before starting it",
        )),
    }
}

fn no_quota(error: Errno) -> Report {
    broken(
        "quota_missing",
        format!("the data file system takes no user quota: {error}"),
        "mount the data partition with user quotas (`usrquota`, ext4 feature `quota`)",
    )
}

/// A removal that goes on step by step. No folder is ever entered by a path: folders inside are moved up beside the
/// agent's own first, so that depth costs nothing, and links are unlinked, never followed.
#[derive(Debug)]
pub(super) struct Removal {
    pub(super) agent_id: AgentId,
    agents: OwnedFd,
    top: OwnedFd,
    moved: u64,
}

/// Removals that an earlier launcher began: the agents are gone, and the rest of their files follows.
pub(super) fn unfinished_removals(options: &Options) -> VecDeque<Removal> {
    let Ok(agents) = agents_folder(options) else { return VecDeque::new() };
    let found = names(&agents, usize::MAX).unwrap_or_default();
    let ids =
        found.iter().filter_map(|name| name.to_str().ok()?.strip_prefix(DOOMED)?.parse::<AgentId>().ok());
    ids.filter_map(|agent_id| {
        let top = beneath(&agents, &doomed(agent_id)).ok()?;
        let agents = rustix::io::fcntl_dupfd_cloexec(&agents, 0).ok()?;
        Some(Removal { agent_id, agents, top, moved: 0 })
    })
    .collect()
}

impl Removal {
    /// Renames the agent's folder first: from then on the agent is gone, whatever happens in between.
    pub(super) fn begin(options: &Options, agent_id: AgentId, uid: u32) -> Result<Option<Self>, Report> {
        let failed = |error: Errno| {
            broken(
                "volume_failed",
                format!("the folders of agent {agent_id} could not be removed: {error}"),
                "try again",
            )
        };
        let agents = agents_folder(options).map_err(failed)?;
        let name = agent_id.to_string();
        match verify(options, agent_id, uid) {
            Ok(()) => renameat(&agents, name.as_str(), &agents, doomed(agent_id).as_str()).map_err(failed)?,
            Err(report) if report.code == "uid_mismatch" => return Err(report),
            // Neither there nor half removed: done already.
            Err(_) if statat(&agents, doomed(agent_id).as_str(), AtFlags::SYMLINK_NOFOLLOW).is_err() => {
                return Ok(None);
            }
            Err(_) => {}
        }
        let top = beneath(&agents, &doomed(agent_id)).map_err(failed)?;
        if !options.without.contains(&Without::Quota) {
            let no_limit = DiskLimits { bytes: 0, inodes: 0 };
            set_user_quota(top.as_fd(), uid, no_limit).map_err(no_quota)?;
        }
        Ok(Some(Self { agent_id, agents, top, moved: 0 }))
    }

    /// True when everything is gone.
    pub(super) fn step(&mut self) -> Result<bool, Report> {
        self.try_step().map_err(|error| {
            broken(
                "volume_failed",
                format!("the folders of agent {} could not be removed: {error}", self.agent_id),
                "try again",
            )
        })
    }

    fn try_step(&mut self) -> Result<bool, Errno> {
        let mut left = REMOVAL_STEP;
        for name in names(&self.top, left)? {
            if left == 0 {
                return Ok(false);
            }
            left = left.saturating_sub(1);
            if self.remove_if_simple(&name)? {
                continue;
            }
            let folder = openat(
                &self.top,
                &name,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            let inner = names(&folder, left)?;
            left = left.saturating_sub(inner.len());
            for inner in inner {
                self.unlink_or_move_up(&folder, &inner)?;
            }
        }
        if !names(&self.top, 1)?.is_empty() {
            return Ok(false);
        }
        unlinkat(&self.agents, doomed(self.agent_id).as_str(), AtFlags::REMOVEDIR)?;
        sync(&self.agents)?;
        Ok(true)
    }

    /// A file, a link or an empty folder goes at once.
    fn remove_if_simple(&self, name: &std::ffi::CStr) -> Result<bool, Errno> {
        match unlinkat(&self.top, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(true),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error),
        }
        match unlinkat(&self.top, name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn unlink_or_move_up(&mut self, folder: &OwnedFd, name: &std::ffi::CStr) -> Result<(), Errno> {
        match unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => loop {
                self.moved += 1;
                let free = format!(".moved-{}", self.moved);
                match rustix::fs::renameat_with(
                    folder,
                    name,
                    &self.top,
                    free.as_str(),
                    rustix::fs::RenameFlags::NOREPLACE,
                ) {
                    // The agent may have used such a name itself, or an earlier removal was interrupted.
                    Err(Errno::EXIST) => {}
                    result => return result,
                }
            },
            Err(error) => Err(error),
        }
    }
}

fn doomed(agent_id: AgentId) -> String {
    format!("{DOOMED}{agent_id}")
}

/// At most `most` entries besides `.` and `..`.
fn names(folder: &OwnedFd, most: usize) -> Result<Vec<std::ffi::CString>, Errno> {
    let mut found = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        if found.len() == most.max(1) {
            break;
        }
        found.push(entry.file_name().to_owned());
    }
    Ok(found)
}

pub(super) fn data_folder(options: &Options) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, options.data_dir.as_path(), flags, Mode::empty())
}

fn agents_folder(options: &Options) -> Result<OwnedFd, Errno> {
    let data = data_folder(options)?;
    make_folder(&data, "agents", 0o700)?;
    let agents = beneath(&data, "agents")?;
    give(&agents, 0, options.agentd_uid, 0o750)?;
    Ok(agents)
}

/// Which other agent's volume has this uid.
fn owner_of_uid(agents: &OwnedFd, uid: u32, but: AgentId) -> Result<Option<String>, Errno> {
    for name in names(agents, usize::MAX)? {
        let Ok(text) = name.to_str() else { continue };
        if text == but.to_string() {
            continue;
        }
        let work = beneath(agents, &format!("{text}/{WORK}")).and_then(|work| fstat(&work));
        if work.is_ok_and(|stat| stat.st_uid == uid) {
            return Ok(Some(text.to_owned()));
        }
    }
    Ok(None)
}

pub(super) fn beneath(folder: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    openat2(folder, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// One that is there already is left as it is.
pub(super) fn make_folder(parent: &OwnedFd, name: &str, mode: u32) -> Result<(), Errno> {
    match mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(super) fn give(folder: &OwnedFd, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    fchown(folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    // After the owner: a change of owner may clear bits.
    fchmod(folder, Mode::from_raw_mode(mode))
}

fn sync(folder: &OwnedFd) -> Result<(), Errno> {
    fsync(folder)
}
