//! Is this tar an agent's package, and what is its digest?
//!
//! In:    a tar from the owner, compressed or not, or a folder of the image. Out: the manifest's text, the digest, and for a tar its
//!        files below `/data/agents/<id>/package`.
//! Always: nothing is written outside of that folder; only folders and regular files are taken, within bounds;
//!         modes are 0755 or 0644 whatever the tar says. What was half written is removed.
//! Never:  the agent's own `work` folder, which belongs to its uid.
//! Threads: everything blocks.
//! Source: POSIX.1-2017, `pax` interchange format.

use super::archive;
use agentd_domain::fault::Report;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

/// Larger packages bring models, which belong into the models' folder.
pub const PACKAGE_MOST_BYTES: u64 = 512 * 1024 * 1024;
const FILES_MOST: usize = 20_000;
const MANIFEST_MOST_BYTES: u64 = 64 * 1024;
const MANIFEST: &str = "agent.toml";

#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("the tar cannot be read: {0}")]
    Tar(io::Error),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("`{0}` leads out of the package")]
    Outside(String),
    #[error("`{path}` is {kind}; a package holds folders and files only")]
    Kind { path: String, kind: &'static str },
    #[error("it holds `{0}` twice")]
    Twice(String),
    #[error("it has more than {FILES_MOST} files or {PACKAGE_MOST_BYTES} bytes")]
    TooLarge,
    #[error("it has no `{MANIFEST}` at its top")]
    NoManifest,
    #[error("`{MANIFEST}` has more than {MANIFEST_MOST_BYTES} bytes or is not UTF-8")]
    ManifestShape,
}

impl PackageError {
    pub fn report(&self) -> Report {
        let what = "the agent was not installed";
        match self {
            Self::File { .. } => Report::environment(
                "package_not_written",
                what,
                self.to_string(),
                "when the disk is full, remove a model with `agentctl model rm NAME`",
            ),
            Self::TooLarge => Report::caller(
                "too_large",
                what,
                self.to_string(),
                "add models with `agentctl model add`, and leave build outputs out of the package",
            ),
            _ => Report::caller(
                "package_invalid",
                what,
                self.to_string(),
                "give `agentctl agent install` the folder that holds `agent.toml` and the agent's files, or what \
                 `agentctl agent pack` has made of it",
            ),
        }
    }
}

/// A package's content in one number: SHA-256 over every file's path, kind, length and bytes, sorted by path.
#[derive(Default)]
struct Content {
    files: BTreeMap<String, (bool, [u8; 32])>,
}

impl Content {
    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (path, (executable, bytes)) in &self.files {
            hash.update((path.len() as u64).to_le_bytes());
            hash.update(path);
            hash.update([u8::from(*executable)]);
            hash.update(bytes);
        }
        hex::encode(hash.finalize())
    }
}

#[derive(Debug)]
pub struct Unpacked {
    pub manifest: String,
    pub digest: String,
}

/// The text of the manifest in a tar; reads no further than needed.
pub fn manifest_of_tar(tar: impl BufRead) -> Result<String, PackageError> {
    let mut archive = tar::Archive::new(archive::open(tar).map_err(not_read)?);
    for entry in archive.entries().map_err(not_read)? {
        let mut entry = entry.map_err(not_read)?;
        if relative(&entry)?.as_deref() == Some(MANIFEST) {
            return read_manifest(&mut entry);
        }
    }
    Err(PackageError::NoManifest)
}

/// Unpacks into `folder`, which must not exist, and syncs it.
pub fn unpack(tar: impl BufRead, folder: &Path) -> Result<Unpacked, PackageError> {
    let result = unpack_all(tar, folder);
    if result.is_err() {
        let _ = fs::remove_dir_all(folder);
    }
    result
}

fn unpack_all(tar: impl BufRead, folder: &Path) -> Result<Unpacked, PackageError> {
    make_folder(folder)?;
    let mut content = Content::default();
    let mut room_bytes = PACKAGE_MOST_BYTES;
    let mut archive = tar::Archive::new(archive::open(tar).map_err(not_read)?);
    for entry in archive.entries().map_err(not_read)? {
        let mut entry = entry.map_err(not_read)?;
        let Some(path) = relative(&entry)? else { continue };
        let target = folder.join(&path);
        match entry.header().entry_type() {
            tar::EntryType::Directory => make_folders(folder, &target)?,
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                if content.files.len() >= FILES_MOST {
                    return Err(PackageError::TooLarge);
                }
                if let Some(parent) = target.parent() {
                    make_folders(folder, parent)?;
                }
                let executable = entry.header().mode().unwrap_or(0) & 0o111 != 0;
                let digest = copy(&mut entry, &target, executable, &mut room_bytes)?;
                if content.files.insert(path.clone(), (executable, digest)).is_some() {
                    return Err(PackageError::Twice(path));
                }
            }
            tar::EntryType::XGlobalHeader | tar::EntryType::XHeader => {}
            other => return Err(PackageError::Kind { path, kind: kind_name(other) }),
        }
    }
    let path = folder.join(MANIFEST);
    let manifest = match File::open(&path) {
        Ok(mut file) => read_manifest(&mut file)?,
        Err(_) => return Err(PackageError::NoManifest),
    };
    sync(folder)?;
    Ok(Unpacked { manifest, digest: content.digest() })
}

/// Manifest and digest of a package that lies unpacked: a bundled agent's folder.
pub fn read_folder(folder: &Path) -> Result<Unpacked, PackageError> {
    let mut content = Content::default();
    let mut queue = vec![folder.to_owned()];
    while let Some(at) = queue.pop() {
        let failed = |source| PackageError::File { path: at.clone(), source };
        for entry in fs::read_dir(&at).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let failed = |source| PackageError::File { path: path.clone(), source };
            let metadata = fs::symlink_metadata(&path).map_err(failed)?;
            let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
            if metadata.is_dir() {
                queue.push(path);
            } else if metadata.is_file() {
                let mut file = File::open(&path).map_err(failed)?;
                let digest = pump(&mut file, |_| Ok(())).map_err(failed)?;
                let executable = metadata.permissions().mode() & 0o111 != 0;
                content.files.insert(name, (executable, digest));
            } else {
                return Err(PackageError::Kind { path: name, kind: "neither folder nor file" });
            }
        }
    }
    let path = folder.join(MANIFEST);
    let mut file = File::open(&path).map_err(|_| PackageError::NoManifest)?;
    Ok(Unpacked { manifest: read_manifest(&mut file)?, digest: content.digest() })
}

fn not_read(error: io::Error) -> PackageError {
    match error.kind() {
        io::ErrorKind::FileTooLarge => PackageError::TooLarge,
        _ => PackageError::Tar(error),
    }
}

/// The same package at another place: the same files, by hard links. Nobody writes to a package.
pub fn link(from: &Path, to: &Path) -> Result<(), PackageError> {
    make_folder(to)?;
    let mut queue = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = queue.pop() {
        let failed = |source| PackageError::File { path: from.clone(), source };
        for entry in fs::read_dir(&from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let target = to.join(entry.file_name());
            if entry.file_type().map_err(failed)?.is_dir() {
                make_folder(&target)?;
                queue.push((entry.path(), target));
            } else {
                fs::hard_link(entry.path(), &target)
                    .map_err(|source| PackageError::File { path: target.clone(), source })?;
            }
        }
    }
    sync(to)
}

/// The entry's path without a leading `./`; `None` for the top itself.
fn relative<R: Read>(entry: &tar::Entry<'_, R>) -> Result<Option<String>, PackageError> {
    let raw = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let mut parts = Vec::new();
    for component in Path::new(&raw).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => {
                match part.to_str().filter(|part| !part.contains(['\0', '\u{fffd}'])) {
                    Some(part) => parts.push(part.to_owned()),
                    None => return Err(PackageError::Outside(raw)),
                }
            }
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(PackageError::Outside(raw));
            }
        }
    }
    Ok((!parts.is_empty()).then(|| parts.join("/")))
}

fn read_manifest(from: &mut impl Read) -> Result<String, PackageError> {
    let mut text = String::new();
    let read = from.take(MANIFEST_MOST_BYTES + 1).read_to_string(&mut text);
    match read {
        Ok(bytes) if bytes as u64 <= MANIFEST_MOST_BYTES => Ok(text),
        _ => Err(PackageError::ManifestShape),
    }
}

fn copy(
    from: &mut impl Read,
    target: &Path,
    executable: bool,
    room_bytes: &mut u64,
) -> Result<[u8; 32], PackageError> {
    let failed = |source| PackageError::File { path: target.to_owned(), source };
    let mode = if executable { 0o755 } else { 0o644 };
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(target).map_err(|source| {
            match source.kind() {
                io::ErrorKind::AlreadyExists => PackageError::Twice(target.display().to_string()),
                _ => failed(source),
            }
        })?;
    // The umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
    let mut broken = None;
    let digest = pump(from, |bytes| {
        let left = room_bytes.checked_sub(bytes.len() as u64).ok_or(PackageError::TooLarge);
        let written = left.and_then(|left| {
            *room_bytes = left;
            file.write_all(bytes).map_err(failed)
        });
        written.map_err(|error| {
            broken = Some(error);
            io::Error::other("writing failed")
        })
    });
    if let Some(error) = broken {
        return Err(error);
    }
    let digest = digest.map_err(not_read)?;
    file.sync_all().map_err(failed)?;
    Ok(digest)
}

/// Gives everything there is to read to `give`, and its SHA-256.
fn pump(from: &mut impl Read, mut give: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..count]);
        give(&buffer[..count])?;
    }
}

fn make_folders(top: &Path, folder: &Path) -> Result<(), PackageError> {
    if folder == top || folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_folders(top, parent)?;
    }
    make_folder(folder)
}

fn make_folder(folder: &Path) -> Result<(), PackageError> {
    let failed = |source| PackageError::File { path: folder.to_owned(), source };
    fs::create_dir(folder).map_err(failed)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).map_err(failed)
}

/// Syncs every folder: the files themselves are synced when they are written.
fn sync(folder: &Path) -> Result<(), PackageError> {
    let failed = |source| PackageError::File { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            sync(&entry.path())?;
        }
    }
    File::open(folder).and_then(|file| file.sync_all()).map_err(failed)
}

fn kind_name(kind: tar::EntryType) -> &'static str {
    match kind {
        tar::EntryType::Symlink => "a symbolic link",
        tar::EntryType::Link => "a hard link",
        tar::EntryType::Char | tar::EntryType::Block => "a device",
        tar::EntryType::Fifo => "a pipe",
        _ => "of an unknown kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(files: &[(&str, &str, u32)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content, mode) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(*mode);
            // Written directly: the builder itself refuses paths that lead out.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, content.as_bytes()).expect("appended");
        }
        builder.into_inner().expect("a tar")
    }

    #[test]
    fn a_package_is_unpacked_and_its_digest_is_that_of_its_folder() {
        let top = tempfile::tempdir().expect("a folder");
        let folder = top.path().join("package");
        let tar = tar_of(&[
            ("./agent.toml", "[agent]", 0o600),
            ("bin/run", "#!", 0o4777),
            ("data/x/y.txt", "y", 0),
        ]);
        assert_eq!(manifest_of_tar(tar.as_slice()).expect("there"), "[agent]");
        let unpacked = unpack(tar.as_slice(), &folder).expect("unpacked");
        assert_eq!(unpacked.manifest, "[agent]");
        let mode = |path: &str| fs::metadata(folder.join(path)).expect("there").permissions().mode() & 0o7777;
        assert_eq!((mode("bin/run"), mode("data/x/y.txt"), mode("data/x")), (0o755, 0o644, 0o755));
        assert_eq!(read_folder(&folder).expect("read").digest, unpacked.digest);
        let other =
            tar_of(&[("agent.toml", "[agent]", 0o600), ("bin/run", "#!", 0o666), ("data/x/y.txt", "y", 0)]);
        let other = unpack(other.as_slice(), &top.path().join("other")).expect("unpacked");
        assert_ne!(other.digest, unpacked.digest, "whether a file may be executed is content");
    }

    #[test]
    fn what_leads_out_or_is_no_file_is_refused_and_leaves_nothing() {
        let top = tempfile::tempdir().expect("a folder");
        let folder = top.path().join("package");
        for path in ["../evil", "/etc/passwd", "a/../../evil"] {
            let tar = tar_of(&[("agent.toml", "x", 0), (path, "x", 0)]);
            assert!(matches!(unpack(tar.as_slice(), &folder), Err(PackageError::Outside(_))), "{path}");
            assert!(!folder.exists() && !top.path().join("evil").exists());
        }
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, "link", "/etc/passwd").expect("appended");
        let tar = builder.into_inner().expect("a tar");
        assert!(matches!(unpack(tar.as_slice(), &folder), Err(PackageError::Kind { .. })));
    }

    #[test]
    fn rubbish_is_an_error_and_not_a_package() {
        let top = tempfile::tempdir().expect("a folder");
        let folder = top.path().join("package");
        assert!(matches!(unpack(&b""[..], &folder), Err(PackageError::NoManifest)));
        assert!(unpack(&[7u8; 4096][..], &folder).is_err());
        let tar = tar_of(&[("agent.toml", "x", 0), ("run", "long enough", 0)]);
        assert!(unpack(&tar[..1200], &folder).is_err(), "cut in the middle");
        let twice = tar_of(&[("agent.toml", "x", 0), ("a", "1", 0), ("./a", "2", 0)]);
        assert!(matches!(unpack(twice.as_slice(), &folder), Err(PackageError::Twice(_))));
        assert!(!folder.exists());
    }
}
