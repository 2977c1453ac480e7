//! How does a small file survive a power cut in the middle of its own writing?
//!
//! Each file is kept twice, `<name>.a` and `<name>.b`, and written alternately: a write goes to the copy
//! that is *not* the newest intact one, so the newest one is never touched. A reader takes the newest copy
//! whose checksum holds. The first write makes both.
//!
//! Format of a copy, little-endian: magic `AOS2FILE` (8), sequence number (8), length (8), CRC-32 of sequence,
//! length and content (4), content.
//!
//! Always: after `write` returns, `read` gives the new content; if the power goes before, `read` gives the
//!         old or the new content and nothing else. The tests tear a write at every byte.
//! Never:  two writers at once; each file has one owner.
//! Why not rename: an ext4 rename is atomic, but a directory block that is damaged later takes the only copy
//!         with it; two files also survive a bad sector in one of them.

use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"AOS2FILE";
const HEADER_BYTES: usize = 28;
/// State files are a few hundred bytes. The limit keeps a damaged disk from filling memory.
pub const MAX_CONTENT_BYTES: usize = 4 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum TwoFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// Something is there, and neither copy is intact.
    #[error("both copies of {path} are damaged")]
    Damaged { path: PathBuf },
    #[error("{path}: {length_bytes} bytes are more than a state file may have")]
    TooLarge { path: PathBuf, length_bytes: usize },
}

/// A file that is kept twice. The path is given without `.a` and `.b`.
#[derive(Debug, Clone)]
pub struct TwoFile {
    path: PathBuf,
    mode: u32,
}

impl TwoFile {
    /// Readable for its owner only; see [`TwoFile::with_mode`].
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), mode: 0o600 }
    }

    /// Permission bits of copies that do not exist yet.
    pub fn with_mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// The newest intact content, or `None` when the file was never written.
    pub fn read(&self) -> Result<Option<Vec<u8>>, TwoFileError> {
        let a = self.read_copy('a')?;
        let b = self.read_copy('b')?;
        match newest(a.as_deref(), b.as_deref()) {
            Newest::A(_, content) | Newest::B(_, content) => Ok(Some(content.to_vec())),
            // The first write makes `.a` and then `.b`: without `.b` it never came to its end.
            Newest::Neither if b.is_none() => Ok(None),
            Newest::Neither => Err(TwoFileError::Damaged { path: self.path.clone() }),
        }
    }

    /// Replaces the content. Blocks until it is on the disk.
    pub fn write(&self, content: &[u8]) -> Result<(), TwoFileError> {
        if content.len() > MAX_CONTENT_BYTES {
            return Err(TwoFileError::TooLarge { path: self.path.clone(), length_bytes: content.len() });
        }
        let a = self.read_copy('a')?;
        let b = self.read_copy('b')?;
        match newest(a.as_deref(), b.as_deref()) {
            Newest::A(sequence, _) => self.write_copy('b', sequence.wrapping_add(1), content),
            Newest::B(sequence, _) => self.write_copy('a', sequence.wrapping_add(1), content),
            // Both, so that a file whose only copy is damaged is never taken for one that was never written.
            Newest::Neither => {
                self.write_copy('a', 1, content)?;
                self.write_copy('b', 2, content)
            }
        }
    }

    /// Removes both copies. A file that is not there is no error.
    pub fn remove(&self) -> Result<(), TwoFileError> {
        // `.b` first: what is left by a cut is then a file that reads as never written.
        for suffix in ['b', 'a'] {
            let path = self.copy_path(suffix);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(TwoFileError::Io { path, source });
                }
                _ => {}
            }
        }
        sync_folder(&self.path).map_err(|source| TwoFileError::Io { path: self.path.clone(), source })
    }

    fn copy_path(&self, suffix: char) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{suffix}"));
        PathBuf::from(path)
    }

    /// `None` when the copy is not there. A copy that cannot be read counts as damaged, not as an error:
    /// the other one may be good.
    fn read_copy(&self, suffix: char) -> Result<Option<Vec<u8>>, TwoFileError> {
        let path = self.copy_path(suffix);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TwoFileError::Io { path, source }),
        };
        let mut bytes = Vec::new();
        let limit_bytes = (HEADER_BYTES + MAX_CONTENT_BYTES + 1) as u64;
        match file.take(limit_bytes).read_to_end(&mut bytes) {
            Ok(_) => Ok(Some(bytes)),
            Err(_) => Ok(Some(b"unreadable".to_vec())),
        }
    }

    fn write_copy(&self, suffix: char, sequence: u64, content: &[u8]) -> Result<(), TwoFileError> {
        let path = self.copy_path(suffix);
        write_and_sync(&path, self.mode, &encode(sequence, content))
            .map_err(|source| TwoFileError::Io { path, source })
    }
}

fn write_and_sync(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(rustix::fs::open(path, flags, Mode::from_bits_truncate(mode))?);
    file.write_all(bytes)?;
    file.sync_all()?;
    sync_folder(path)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

enum Newest<'c> {
    A(u64, &'c [u8]),
    B(u64, &'c [u8]),
    Neither,
}

fn newest<'c>(a: Option<&'c [u8]>, b: Option<&'c [u8]>) -> Newest<'c> {
    match (a.and_then(decode), b.and_then(decode)) {
        (Some((a_sequence, a)), Some((b_sequence, _))) if a_sequence > b_sequence => Newest::A(a_sequence, a),
        (_, Some((sequence, content))) => Newest::B(sequence, content),
        (Some((sequence, content)), None) => Newest::A(sequence, content),
        (None, None) => Newest::Neither,
    }
}

fn encode(sequence: u64, content: &[u8]) -> Vec<u8> {
    let length_bytes = content.len() as u64;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&length_bytes.to_le_bytes());
    bytes.extend_from_slice(&checksum(sequence, content).to_le_bytes());
    bytes.extend_from_slice(content);
    bytes
}

/// The sequence number and the content, if the copy is whole.
fn decode(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let bytes = bytes.strip_prefix(MAGIC)?;
    let (sequence, bytes) = bytes.split_first_chunk::<8>()?;
    let (length_bytes, bytes) = bytes.split_first_chunk::<8>()?;
    let (crc, content) = bytes.split_first_chunk::<4>()?;
    let sequence = u64::from_le_bytes(*sequence);
    let whole = content.len() as u64 == u64::from_le_bytes(*length_bytes)
        && checksum(sequence, content) == u32::from_le_bytes(*crc);
    whole.then_some((sequence, content))
}

fn checksum(sequence: u64, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_le_bytes());
    hasher.update(&(content.len() as u64).to_le_bytes());
    hasher.update(content);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file() -> (tempfile::TempDir, TwoFile) {
        let folder = tempfile::tempdir().unwrap();
        let file = TwoFile::new(folder.path().join("clock"));
        (folder, file)
    }

    #[test]
    fn what_was_never_written_is_none() {
        let (_folder, file) = file();
        assert_eq!(file.read().unwrap(), None);
    }

    #[test]
    fn the_copies_take_turns() {
        let (folder, file) = file();
        for content in ["one", "two", "three"] {
            file.write(content.as_bytes()).unwrap();
            assert_eq!(file.read().unwrap().unwrap(), content.as_bytes());
        }
        let a = std::fs::read(folder.path().join("clock.a")).unwrap();
        let b = std::fs::read(folder.path().join("clock.b")).unwrap();
        assert_eq!(decode(&a), Some((3, b"two".as_slice())));
        assert_eq!(decode(&b), Some((4, b"three".as_slice())));
    }

    #[test]
    fn one_damaged_copy_gives_the_other_and_is_written_next() {
        let (folder, file) = file();
        file.write(b"old").unwrap();
        file.write(b"new").unwrap();
        std::fs::write(folder.path().join("clock.a"), b"rubbish").unwrap();
        assert_eq!(file.read().unwrap().unwrap(), b"old");
        file.write(b"newer").unwrap();
        assert_eq!(file.read().unwrap().unwrap(), b"newer");
        let b = std::fs::read(folder.path().join("clock.b")).unwrap();
        assert_eq!(decode(&b), Some((2, b"old".as_slice())), "the intact copy must not be written over");
    }

    #[test]
    fn two_damaged_copies_are_an_error_and_can_be_written_again() {
        let (folder, file) = file();
        file.write(b"old").unwrap();
        std::fs::write(folder.path().join("clock.a"), b"rubbish").unwrap();
        std::fs::write(folder.path().join("clock.b"), b"").unwrap();
        assert!(matches!(file.read(), Err(TwoFileError::Damaged { .. })));
        file.write(b"new").unwrap();
        assert_eq!(file.read().unwrap().unwrap(), b"new");
    }

    #[test]
    fn removing_leaves_nothing() {
        let (_folder, file) = file();
        file.write(b"old").unwrap();
        file.write(b"new").unwrap();
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.read().unwrap(), None);
    }

    /// What a copy may hold when the power goes during a write: the first `cut` bytes of the new content,
    /// then what was there before, rubbish of a reused block, or nothing.
    fn torn(before: &[u8], new: &[u8], cut: usize, rest: Rest) -> Vec<u8> {
        let mut bytes = new[..cut].to_vec();
        match rest {
            Rest::Nothing => {}
            Rest::Before => bytes.extend(before.iter().skip(cut)),
            Rest::Zeros => bytes.resize(new.len(), 0),
        }
        bytes
    }

    #[derive(Debug, Clone, Copy)]
    enum Rest {
        Nothing,
        Before,
        Zeros,
    }

    proptest! {
        #[test]
        fn a_write_torn_at_any_byte_leaves_the_old_or_the_new(
            old in proptest::collection::vec(any::<u8>(), 0..60),
            before in proptest::collection::vec(any::<u8>(), 0..60),
            new in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            // The newest copy is `.a`; what is being written over in `.b` is older.
            let (a, b) = (encode(8, &old), encode(7, &before));
            let whole = encode(9, &new);
            for cut in 0..=whole.len() {
                for rest in [Rest::Nothing, Rest::Before, Rest::Zeros] {
                    let bytes = torn(&b, &whole, cut, rest);
                    let read = match newest(Some(&a), Some(&bytes)) {
                        Newest::A(_, content) | Newest::B(_, content) => Some(content),
                        Newest::Neither => None,
                    };
                    let expected = if bytes == whole { &new } else { &old };
                    prop_assert_eq!(read, Some(expected.as_slice()), "cut at {} with {:?}", cut, rest);
                }
            }
        }

        /// The same with files: after any cut the next write succeeds and is read.
        #[test]
        fn a_write_after_a_cut_is_read(
            old in proptest::collection::vec(any::<u8>(), 0..60),
            new in proptest::collection::vec(any::<u8>(), 0..60),
            cut in any::<prop::sample::Index>(),
        ) {
            let (folder, file) = file();
            file.write(&old).unwrap();
            // The first write made both; `.b` is the newest, so the second goes to `.a`.
            let whole = encode(3, &new);
            let cut = cut.index(whole.len());
            std::fs::write(folder.path().join("clock.a"), &whole[..cut]).unwrap();
            prop_assert_eq!(file.read().unwrap().unwrap(), old);
            file.write(b"after the cut").unwrap();
            prop_assert_eq!(file.read().unwrap().unwrap(), b"after the cut");
        }

        #[test]
        fn a_first_write_torn_at_any_byte_leaves_nothing_or_the_new(
            new in proptest::collection::vec(any::<u8>(), 0..60),
            cut in any::<prop::sample::Index>(),
        ) {
            let (folder, file) = file();
            let (a, b) = (encode(1, &new), encode(2, &new));
            let cut = cut.index(a.len() + b.len() + 1);
            std::fs::write(folder.path().join("clock.a"), &a[..cut.min(a.len())]).unwrap();
            if cut > a.len() {
                std::fs::write(folder.path().join("clock.b"), &b[..cut - a.len()]).unwrap();
            }
            let expected = (cut >= a.len()).then(|| new.clone());
            prop_assert_eq!(file.read().unwrap(), expected, "cut at {}", cut);
        }

        #[test]
        fn any_changed_bit_is_noticed(
            content in proptest::collection::vec(any::<u8>(), 0..64), at in any::<prop::sample::Index>(), bit in 0..8u8,
        ) {
            let mut bytes = encode(7, &content);
            let index = at.index(bytes.len());
            bytes[index] ^= 1 << bit;
            prop_assert_eq!(decode(&bytes), None);
        }
    }
}
