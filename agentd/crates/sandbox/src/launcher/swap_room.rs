//! Where may an engine put what does not fit into memory?
//!
//! `/data/swap` (root 0711) holds one folder for each device set (the engines' uid, 0700). Keys and values of prompts lie
//! in it while their agents wait: as secret as the agents' own files beside it, and encrypted exactly where these are,
//! with the partition. What a process leaves behind the next one of its set removes before it listens.
//!
//! Always: bounded, by a user quota on the engines' uid, so that no engine fills the partition; without a quota there is
//!         no folder. Paths are walked beneath the data folder, without links.
//! Never:  a reason for an engine not to start: without a folder it computes again what it would have read.

use super::options::{Options, Without};
use super::volumes::{beneath, data_folder, give, make_folder};
use crate::sys::{DiskLimits, set_user_quota};
use agentd_domain::paths;
use rustix::io::Errno;
use std::os::fd::AsFd;

/// Of all engines together: some ten thousand tokens of a small model's cache. An eighth of a small partition.
const MOST_BYTES: u64 = 2 << 30;
const PART_OF_DISK: u64 = 8;
/// Less is not worth a file.
const LEAST_BYTES: u64 = 16 << 20;
/// Files of all engines; each holds one sequence's part.
const MOST_FILES: u64 = 4096;
const FOLDER: &str = "swap";

/// A folder for one engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SwapRoom {
    pub(super) path: String,
    pub(super) mebibytes: u64,
}

/// `set` has the form that the launcher checks. Doing it twice changes nothing. The error is for the log.
pub(super) fn prepare(options: &Options, set: &str) -> Result<SwapRoom, String> {
    let failed = |error: Errno| format!("no folder to swap to: {error}");
    let data = data_folder(options).map_err(failed)?;
    make_folder(&data, FOLDER, 0o700).map_err(failed)?;
    let top = beneath(&data, FOLDER).map_err(failed)?;
    make_folder(&top, set, 0o700).map_err(failed)?;
    let own = beneath(&top, set).map_err(failed)?;
    let disk = rustix::fs::fstatvfs(&own).map_err(failed)?;
    let bytes = (disk.f_blocks.saturating_mul(disk.f_frsize) / PART_OF_DISK).min(MOST_BYTES);
    if bytes < LEAST_BYTES {
        return Err(format!("no folder to swap to: {bytes} bytes of the data partition are too few"));
    }
    if !options.without.contains(&Without::Quota) {
        let limits = DiskLimits { bytes, inodes: MOST_FILES };
        set_user_quota(own.as_fd(), paths::UID_ENGINE, limits)
            .map_err(|error| format!("no folder to swap to: the file system takes no user quota: {error}"))?;
    }
    give(&own, paths::UID_ENGINE, paths::UID_ENGINE, 0o700).map_err(failed)?;
    // Engines pass through, and see nobody else's name.
    give(&top, 0, 0, 0o711).map_err(failed)?;
    let path = Options::text(&options.data_dir.join(FOLDER).join(set));
    Ok(SwapRoom { path, mebibytes: bytes >> 20 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::Path;

    fn options(data: &Path) -> Options {
        Options { data_dir: data.to_owned(), without: [Without::Quota].into(), ..Options::default() }
    }

    #[test]
    fn each_set_has_a_folder_of_its_own() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP: only root gives folders away");
            return;
        }
        let data = tempfile::tempdir().unwrap();
        let options = options(data.path());
        for _ in 0..2 {
            let room = prepare(&options, "host").unwrap();
            assert_eq!(Path::new(&room.path), data.path().join("swap/host"));
            assert!((LEAST_BYTES >> 20..=MOST_BYTES >> 20).contains(&room.mebibytes));
        }
        let seen = |path: &str| std::fs::metadata(data.path().join(path)).unwrap();
        assert_eq!((seen("swap").uid(), seen("swap").mode() & 0o7777), (0, 0o711));
        assert_eq!((seen("swap/host").uid(), seen("swap/host").mode() & 0o7777), (paths::UID_ENGINE, 0o700));
    }

    /// agentd may make names in the data folder: a link there leads the launcher nowhere.
    #[test]
    fn links_are_not_followed() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP: only root gives folders away");
            return;
        }
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = options(data.path());
        symlink(elsewhere.path(), data.path().join("swap")).unwrap();
        assert!(prepare(&options, "host").is_err());
        std::fs::remove_file(data.path().join("swap")).unwrap();
        std::fs::create_dir(data.path().join("swap")).unwrap();
        symlink(elsewhere.path(), data.path().join("swap/host")).unwrap();
        assert!(prepare(&options, "host").is_err());
        assert_eq!(std::fs::metadata(elsewhere.path()).unwrap().uid(), 0);
    }
}
