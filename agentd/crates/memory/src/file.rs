//! How does a store's file come to be, and how is it opened?
//!
//! Owns:   the way of one file: made beside its place, moved there, opened, its first row understood.
//! Always: a power cut leaves a whole store or none; an existing file is never written over; every transaction
//!         is on disk when `commit` returns.
//! Source: redb 4.4 `docs/design.md` (two-phase commit, quick repair). Its `Builder::create` does not sync the
//!         directory, so [`create`] does.

use crate::error::{Damage, OpenError, StoreError};
use crate::plan::Budgets;
use crate::tables::{FORMAT_VERSION, IDENTITY, Identity, IdentityRow, META};
use crate::text::WORDS_VERSION;
use crate::write::Batch;
use redb::{Builder, Database, Durability, ReadableDatabase, WriteTransaction};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// So many openings in a row may end the program before the file is left alone for [`REST_AFTER_FATAL_OPENINGS`].
/// A kill or power cut in the few milliseconds of an opening counts, too, so one alone must not.
const FATAL_OPENINGS_MOST: u8 = 3;
/// Then it is tried again at this pace: one damaged file must not keep agentd from running.
const REST_AFTER_FATAL_OPENINGS: Duration = Duration::from_secs(600);

/// redb 4.4 panics on some damaged files (with a random bit flipped, 7 of 3,000 at opening), and a panic ends
/// agentd. A note beside the file counts openings that did not return.
pub(crate) struct OpeningNote {
    path: PathBuf,
}

impl OpeningNote {
    pub(crate) fn leave(store: &Path) -> Result<Self, OpenError> {
        let failed = |source| file_error(store, source);
        let path = store.with_extension("redb.opening");
        let (before, age) = match std::fs::read(&path) {
            Ok(note) => (note.first().copied().unwrap_or(0), age(&path).map_err(failed)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (0, Duration::MAX),
            Err(error) => return Err(failed(error)),
        };
        if before >= FATAL_OPENINGS_MOST && age < REST_AFTER_FATAL_OPENINGS {
            let damage = Damage::FatalOpenings { times: before };
            return Err(OpenError::Damaged { path: store.to_owned(), damage });
        }
        // Not synced: after a power cut the count may start again, which errs on the side of trying.
        match std::fs::write(&path, [before.saturating_add(1)]) {
            Ok(()) => {}
            // A full disk must not close a store that can still be read.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(Self { path })
    }
}

impl Drop for OpeningNote {
    /// The opening returned, well or with an error. A note that stays after all is removed by the next one.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A time in the future (the clock was set back) counts as long ago: then the file is tried.
fn age(path: &Path) -> io::Result<Duration> {
    Ok(std::fs::metadata(path)?.modified()?.elapsed().unwrap_or(Duration::MAX))
}

/// Opens the file at this path, after making it if there is none.
pub(crate) fn open_or_create(
    path: &Path,
    identity: Identity,
    cache_bytes: usize,
) -> Result<Database, OpenError> {
    // Not `exists`: it says no when the directory cannot be read.
    if !path.try_exists().map_err(|source| file_error(path, source))? {
        create(path, identity, cache_bytes)?;
    }
    let file = open_file(path, path)?;
    open_database(path, cache_bytes, |builder| builder.create_file(file))
}

/// Every transaction of a store is written like this: on disk before `commit` returns, in two phases because
/// texts come from strangers (a single phase can be fooled by crafted pages), and with the allocator's state, so
/// that opening after a power cut need not walk the file.
pub(crate) fn begin_write(database: &Database) -> Result<WriteTransaction, StoreError> {
    let mut txn = database.begin_write()?;
    txn.set_durability(Durability::Immediate)?;
    txn.set_quick_repair(true);
    Ok(txn)
}

/// Makes a new store beside its place and moves it there, so that a power cut leaves a whole store or none.
fn create(path: &Path, identity: Identity, cache_bytes: usize) -> Result<(), OpenError> {
    let failed = |source| file_error(path, source);
    let beside = path.with_extension("redb.new");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let file = open_file(&beside, path)?;
    let database = open_database(path, cache_bytes, |builder| builder.create_file(file))?;
    initialise(&database, path, identity)?;
    drop(database);
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, &beside, CWD, path, RenameFlags::NOREPLACE).map_err(|e| failed(e.into()))?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|d| d.sync_all()).map_err(failed)
}

pub(crate) fn initialise(database: &Database, path: &Path, identity: Identity) -> Result<(), OpenError> {
    let budgets = Budgets::new([]);
    let write = || {
        let txn = begin_write(database)?;
        {
            let mut batch = Batch::begin(&txn, identity.owner_id, &budgets)?;
            let store = uuid::Uuid::now_v7();
            batch.write_identity(IdentityRow {
                format: FORMAT_VERSION,
                words: WORDS_VERSION,
                store,
                identity,
            })?;
            batch.finish()?;
        }
        Ok::<_, StoreError>(txn.commit()?)
    };
    write().map_err(|error| match error {
        StoreError::Storage(source) => OpenError::Database { path: path.to_owned(), source },
        other => {
            OpenError::File { path: path.to_owned(), source: Arc::new(io::Error::other(other.to_string())) }
        }
    })
}

pub(crate) fn read_identity(database: &Database, path: &Path) -> Result<IdentityRow, OpenError> {
    let damaged = |damage| OpenError::Damaged { path: path.to_owned(), damage };
    let failed = |e: redb::Error| OpenError::Database { path: path.to_owned(), source: Arc::new(e) };
    let txn = database.begin_read().map_err(|e| failed(e.into()))?;
    let meta = match txn.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Err(damaged(Damage::Meta(IDENTITY))),
        Err(error) => return Err(failed(error.into())),
    };
    let row =
        meta.get(IDENTITY).map_err(|e| failed(e.into()))?.ok_or_else(|| damaged(Damage::Meta(IDENTITY)))?;
    let found = IdentityRow::format_of(row.value()).map_err(damaged)?;
    if found > FORMAT_VERSION {
        return Err(OpenError::NewerFormat { path: path.to_owned(), found, known: FORMAT_VERSION });
    }
    IdentityRow::from_bytes(row.value()).map_err(damaged)
}

/// Readable by agentd's uid alone.
fn open_file(path: &Path, named: &Path) -> Result<File, OpenError> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| OpenError::File { path: named.to_owned(), source: Arc::new(source) })
}

pub(crate) fn open_database(
    path: &Path,
    cache_bytes: usize,
    open: impl FnOnce(&mut Builder) -> Result<Database, redb::DatabaseError>,
) -> Result<Database, OpenError> {
    open(Builder::new().set_cache_size(cache_bytes)).map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.to_owned() },
        other => OpenError::Database { path: path.to_owned(), source: Arc::new(other.into()) },
    })
}

fn file_error(path: &Path, source: io::Error) -> OpenError {
    OpenError::File { path: path.to_owned(), source: Arc::new(source) }
}
