//! Where is a store's key, and how does it cease to exist?
//!
//! Owns:   the files `<store>.<32 hexadecimal digits>.key` beside a store. A store's first row names its key by the
//!         digits, so that changing the store's file (one rename) changes the key with it.
//! Always: a key is on disk, and its name too, before anything is sealed with it. Only keys that the open store does
//!         not name are destroyed.
//! Destroyed: overwritten with zeros, synced, removed, the directory synced. On a medium that writes elsewhere
//!         (flash behind a translation layer, a copy-on-write file system, a backup) the old bytes may live on
//!         where only the medium reaches them: then encrypting the data partition is what protects.

use crate::seal::{Secret, random_secret};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use zeroize::{Zeroize, Zeroizing};

/// `agentdk1`, id, secret, CRC-32 of all before.
const MAGIC: &[u8; 8] = b"agentdk1";
const FILE_BYTES: usize = 8 + 16 + 32 + 4;

pub(crate) struct StoreKey {
    pub(crate) id: Uuid,
    pub(crate) secret: Secret,
}

impl StoreKey {
    pub(crate) fn random() -> io::Result<Self> {
        let secret = random_secret().map_err(io::Error::other)?;
        Ok(Self { id: Uuid::now_v7(), secret })
    }

    fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(FILE_BYTES));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(self.secret.as_slice());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        if bytes.len() != FILE_BYTES || crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (id, secret) = rest.split_first_chunk::<16>()?;
        let secret: &[u8; 32] = secret.try_into().ok()?;
        (magic == MAGIC).then(|| Self { id: Uuid::from_bytes(*id), secret: Zeroizing::new(*secret) })
    }
}

/// Makes a key; it is on disk when this returns.
pub(crate) fn make(store: &Path) -> io::Result<StoreKey> {
    let key = StoreKey::random()?;
    let path = path(store, key.id);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(&key.to_bytes())?;
    file.sync_all()?;
    sync_directory(store)?;
    Ok(key)
}

/// The key of this name. `NotFound`: it was destroyed, or not copied along; `InvalidData`: it is damaged.
pub(crate) fn read(store: &Path, id: Uuid) -> io::Result<StoreKey> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_BYTES + 1));
    File::open(path(store, id))?.take(FILE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    StoreKey::from_bytes(&bytes)
        .filter(|key| key.id == id)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the key file is damaged"))
}

/// Destroys all keys beside the store but this one; says how many.
pub(crate) fn destroy_others(store: &Path, live: Uuid) -> io::Result<usize> {
    destroy_but(store, Some(live))
}

/// Destroys every key beside the store: nothing opens it after this.
pub(crate) fn destroy_all(store: &Path) -> io::Result<usize> {
    destroy_but(store, None)
}

fn destroy_but(store: &Path, live: Option<Uuid>) -> io::Result<usize> {
    let mut destroyed = 0;
    for (id, path) in keys(store)? {
        if Some(id) != live {
            destroy(&path)?;
            destroyed += 1;
        }
    }
    if destroyed > 0 {
        sync_directory(store)?;
    }
    Ok(destroyed)
}

fn destroy(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    let mut zeros = vec![0u8; usize::try_from(file.metadata()?.len()).unwrap_or(0).max(FILE_BYTES)];
    file.write_all(&zeros)?;
    file.sync_all()?;
    zeros.zeroize();
    std::fs::remove_file(path)
}

/// All key files of this store.
pub(crate) fn keys(store: &Path) -> io::Result<Vec<(Uuid, PathBuf)>> {
    let stem = stem(store);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory(store))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let id = name
            .strip_prefix(&stem)
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|rest| rest.strip_suffix(".key"))
            .filter(|digits| digits.len() == 32)
            .and_then(|digits| Uuid::try_parse(digits).ok());
        found.extend(id.map(|id| (id, path)));
    }
    Ok(found)
}

pub(crate) fn path(store: &Path, id: Uuid) -> PathBuf {
    store.with_file_name(format!("{}.{}.key", stem(store), id.simple()))
}

fn stem(store: &Path) -> String {
    store.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

pub(crate) fn directory(store: &Path) -> &Path {
    store.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// After this the directory's entries are on disk: a file that was made, moved or removed is so for good.
pub(crate) fn sync_directory(store: &Path) -> io::Result<()> {
    File::open(directory(store))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_are_told_apart_and_cease() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("memory.redb");
        let (old, new) = (make(&store).unwrap(), make(&store).unwrap());
        let other = make(&dir.path().join("other.redb")).unwrap();
        assert_eq!(read(&store, old.id).unwrap().secret, old.secret);
        assert_ne!(old.secret, new.secret);

        assert_eq!(destroy_others(&store, new.id).unwrap(), 1);
        assert_eq!(read(&store, old.id).err().unwrap().kind(), io::ErrorKind::NotFound);
        assert_eq!(read(&store, new.id).unwrap().secret, new.secret);
        assert!(read(&dir.path().join("other.redb"), other.id).is_ok(), "another store's key stays");
    }

    #[test]
    fn a_damaged_key_is_told_from_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("memory.redb");
        let key = make(&store).unwrap();
        let mut bytes = std::fs::read(path(&store, key.id)).unwrap();
        bytes[30] ^= 1;
        std::fs::write(path(&store, key.id), &bytes).unwrap();
        assert_eq!(read(&store, key.id).err().unwrap().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("memory.redb");
        let key = make(&store).unwrap();
        let mode = std::fs::metadata(path(&store, key.id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
