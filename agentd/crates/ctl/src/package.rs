//! What is sent when an agent is installed?
//!
//! A tar of the directory that depends on nothing but names, contents and the execute bit: sorted, without
//! times, owners or other modes, so that the same package has the same digest wherever it was packed. Links and
//! special files are refused, since what they mean depends on where they are unpacked.
//!
//! Packing is decided first, as a list ([`list`]), and then done ([`write`]).

use agentd_domain::fault::Report;
use ruzstd::encoding::{CompressionLevel, compress};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub const MANIFEST: &str = "agent.toml";
/// What the appliance takes.
const LIMIT_BYTES: u64 = 1024 * 1024 * 1024;
const MOST_ENTRIES: usize = 100_000;

#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// Beneath the package, with `/` between its parts.
    pub name: String,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File { bytes: u64, executable: bool },
}

/// Everything in the directory, sorted by name.
pub fn list(directory: &Path) -> Result<Vec<Entry>, Report> {
    let mut entries = Vec::new();
    walk(directory, "", &mut entries)?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let bytes: u64 =
        entries.iter().map(|e| if let Kind::File { bytes, .. } = e.kind { bytes } else { 0 }).sum();
    if bytes > LIMIT_BYTES {
        return Err(refused(
            directory,
            &format!("it holds {}", agentd_domain::human::bytes(bytes)),
            "leave out what the agent does not need: a package may hold 1 GiB",
        ));
    }
    Ok(entries)
}

/// Writes the tar. A file that changes meanwhile is an error, never a broken tar.
pub fn write(directory: &Path, entries: &[Entry], out: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    tar.mode(tar::HeaderMode::Deterministic);
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        match entry.kind {
            Kind::Folder => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                tar.append_data(&mut header, format!("{}/", entry.name), io::empty())?;
            }
            Kind::File { bytes, executable } => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(if executable { 0o755 } else { 0o644 });
                header.set_size(bytes);
                let file = File::open(directory.join(&entry.name))?;
                let mut content = io::Read::take(file, bytes);
                tar.append_data(&mut header, &entry.name, Exactly { inner: &mut content, left: bytes })?;
            }
        }
    }
    tar.finish()
}

/// Writes the tar as one Zstandard frame. A file that is there already stays as it is.
pub fn write_compressed(directory: &Path, entries: &[Entry], path: &Path) -> io::Result<()> {
    let file = File::create_new(path)?;
    let (reader, writer) = io::pipe()?;
    let mut drain = Drain { out: io::BufWriter::new(&file), failed: None };
    let packed = std::thread::scope(|scope| {
        let packing = scope.spawn(move || write(directory, entries, io::BufWriter::new(writer)));
        compress(io::BufReader::new(reader), &mut drain, CompressionLevel::Fastest);
        packing.join().unwrap_or_else(|_| Err(io::Error::other("packing broke off")))
    });
    let written = packed.and(drain.finished()).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

/// Takes everything and remembers the first error: the compressor panics when its drain has one.
struct Drain<W: Write> {
    out: io::BufWriter<W>,
    failed: Option<io::Error>,
}

impl<W: Write> Drain<W> {
    fn finished(mut self) -> io::Result<()> {
        self.failed.take().map_or_else(|| self.out.flush(), Err)
    }
}

impl<W: Write> Write for Drain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failed.is_none() {
            self.failed = self.out.write_all(bytes).err();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that must give as many bytes as the header promised.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: io::Read> io::Read for Exactly<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buf)?;
        self.left -= count as u64;
        if count == 0 && self.left > 0 && !buf.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a file became shorter while it was packed",
            ));
        }
        Ok(count)
    }
}

fn walk(directory: &Path, prefix: &str, entries: &mut Vec<Entry>) -> Result<(), Report> {
    let folder = directory.join(prefix);
    let failed = |e: io::Error| refused(&folder, &e.to_string(), "make it readable");
    for item in fs::read_dir(&folder).map_err(failed)? {
        let item = item.map_err(failed)?;
        let name = item
            .file_name()
            .into_string()
            .map_err(|name| refused(&folder.join(name), "its name is not UTF-8", "rename it"))?;
        let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let path: PathBuf = directory.join(&name);
        let about = fs::symlink_metadata(&path).map_err(failed)?;
        if entries.len() >= MOST_ENTRIES {
            return Err(refused(
                directory,
                &format!("it holds more than {MOST_ENTRIES} files"),
                "leave out what the agent does not need",
            ));
        }
        if about.is_dir() {
            entries.push(Entry { name: name.clone(), kind: Kind::Folder });
            walk(directory, &name, entries)?;
        } else if about.is_file() {
            let executable = about.permissions().mode() & 0o111 != 0;
            entries.push(Entry { name, kind: Kind::File { bytes: about.len(), executable } });
        } else {
            return Err(refused(
                &path,
                "it is a link or a special file",
                "replace it by a copy of what it stands for, or remove it",
            ));
        }
    }
    Ok(())
}

fn refused(path: &Path, why: &str, fix: &str) -> Report {
    Report::caller("package_refused", format!("{} was not packed", path.display()), why, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(order: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("bin")).expect("made");
        for name in order {
            fs::write(folder.path().join(name), name.as_bytes()).expect("written");
        }
        fs::set_permissions(folder.path().join("bin/run"), fs::Permissions::from_mode(0o700)).expect("set");
        folder
    }

    fn packed(folder: &Path) -> Vec<u8> {
        let mut out = Vec::new();
        write(folder, &list(folder).expect("listed"), &mut out).expect("packed");
        out
    }

    #[test]
    fn the_same_package_is_the_same_tar_wherever_it_was_made() {
        let one = package(&["agent.toml", "bin/run", "a"]);
        let other = package(&["a", "bin/run", "agent.toml"]);
        fs::set_permissions(other.path().join("a"), fs::Permissions::from_mode(0o640)).expect("set");
        assert_eq!(packed(one.path()), packed(other.path()));
    }

    #[test]
    fn a_compressed_package_holds_the_same_tar_and_overwrites_nothing() {
        let folder = package(&["agent.toml", "bin/run", "a"]);
        let elsewhere = tempfile::tempdir().expect("a folder");
        let file = elsewhere.path().join("packed.agent");
        let entries = list(folder.path()).expect("listed");
        write_compressed(folder.path(), &entries, &file).expect("written");
        let frame = fs::read(&file).expect("read");
        let mut tar = Vec::new();
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(frame.as_slice()).expect("a frame");
        io::Read::read_to_end(&mut decoder, &mut tar).expect("decoded");
        assert_eq!(tar, packed(folder.path()));
        let again = write_compressed(folder.path(), &entries, &file).expect_err("it is there");
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&file).expect("read"), frame);
    }

    #[test]
    fn it_unpacks_to_what_it_was() {
        let folder = package(&["agent.toml", "bin/run"]);
        let long = "x".repeat(150);
        fs::write(folder.path().join(&long), b"long").expect("written");
        let bytes = packed(folder.path());
        let mut seen = Vec::new();
        for entry in tar::Archive::new(&bytes[..]).entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").display().to_string();
            let mode = entry.header().mode().expect("a mode");
            let mut content = String::new();
            io::Read::read_to_string(&mut entry, &mut content).expect("text");
            seen.push((name, mode, content));
        }
        assert_eq!(
            seen,
            [
                ("agent.toml".into(), 0o644, "agent.toml".into()),
                ("bin/".into(), 0o755, String::new()),
                ("bin/run".into(), 0o755, "bin/run".into()),
                (long, 0o644, "long".into()),
            ]
        );
    }

    #[test]
    fn links_are_refused_with_their_name() {
        let folder = package(&["agent.toml", "bin/run"]);
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("bin/secret")).expect("linked");
        let report = list(folder.path()).expect_err("a link");
        assert!(report.what.contains("bin/secret"), "{report}");
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let folder = package(&["agent.toml", "bin/run"]);
        let entries = list(folder.path()).expect("listed");
        fs::write(folder.path().join("agent.toml"), b"").expect("written");
        assert!(write(folder.path(), &entries, io::sink()).is_err());
    }
}
