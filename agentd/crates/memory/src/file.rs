//! How does a store's file come to be, and how is it opened?
//!
//! Owns:   the way of one file: made beside its place, moved there, opened, its first row understood, its key found.
//!         What an interrupted making or rewriting left beside it is removed once the store itself has opened.
//! Always: a power cut leaves a whole store or none, and a whole store always with its key; a new store never takes
//!         the place of one; every transaction is on disk when `commit` returns.
//! Source: redb 4.4 `docs/design.md` (two-phase commit, quick repair). Its `Builder::create` does not sync the
//!         directory, so [`create`] does.

use crate::error::{Damage, OpenError, StoreError};
use crate::key::{self, StoreKey, sync_directory};
use crate::plan::{Budgets, Duplicates};
use crate::rewrite;
use crate::seal::{Row, Seal};
use crate::tables::{CANARY, FORMAT_VERSION, IDENTITY, Identity, IdentityRow, META};
use crate::text::WORDS_VERSION;
use crate::write::{Batch, Ground};
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

/// An open store.
pub(crate) struct Open {
    pub(crate) database: Database,
    pub(crate) seal: Seal,
    /// Its first row, as it was when it was opened.
    pub(crate) row: IdentityRow,
}

impl Open {
    /// What a transaction of this store stands on.
    pub(crate) fn ground<'a>(&'a self, budgets: &'a Budgets, duplicates: Duplicates) -> Ground<'a> {
        let owner = self.row.identity.owner_id;
        Ground { owner, budgets, duplicates, seal: &self.seal, store: self.row.store }
    }
}

/// Where a store lives: a folder, or in tests a disk that fails.
pub(crate) trait Home: Send + Sync {
    /// Opens the store; makes it first if there is none.
    fn open(&self) -> Result<Open, OpenError>;
    /// The directory whose file system must keep a reserve.
    fn directory(&self) -> Option<&Path>;
    /// Writes the store anew beside itself under a new key; nothing refers to it yet.
    fn write_anew(&self, open: &Open, now_unix_ms: i64) -> Result<(), OpenError>;
    /// Puts what was written anew in the store's place. Whoever opens it next destroys the old key.
    fn take_place(&self) -> Result<(), OpenError>;
}

/// A file in a folder, its key beside it.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) cache_bytes: usize,
}

impl Home for Folder {
    fn open(&self) -> Result<Open, OpenError> {
        // Not `exists`: it says no when the directory cannot be read.
        if !self.path.try_exists().map_err(|source| self.failed(source))? {
            self.create()?;
        }
        let database = self.database_at(&self.path)?;
        let format = read_format(&database, &self.path)?;
        if format == 1 {
            let found = rewrite::first_agent(&meta_row(&database, &self.path, IDENTITY)?)
                .map_err(|damage| OpenError::Damaged { path: self.path.clone(), damage })?;
            if found != self.identity.agent_id {
                let (path, expected) = (self.path.clone(), self.identity.agent_id);
                return Err(OpenError::OtherAgent { path, found, expected });
            }
            tracing::info!(path = %self.path.display(), "the memory is written anew in format {FORMAT_VERSION}");
            // Held open, so that its old bytes can be overwritten when it has no name any more.
            let old = open_file(&self.path, &self.path)?;
            self.begin_next(|next, key| rewrite::from_first_format(&database, next, key, &self.path))?;
            drop(database);
            self.take_place()?;
            scrub(old).map_err(|source| self.failed(source))?;
            return self.open();
        }
        let row = read_identity(&database, &self.path)?;
        let secret = self.key(row.key)?.secret;
        let open = Open { database, seal: Seal::new(&secret), row };
        check_canary(&open, &self.path)?;
        if format == 2 {
            if row.identity.agent_id != self.identity.agent_id {
                let (path, found) = (self.path.clone(), row.identity.agent_id);
                return Err(OpenError::OtherAgent { path, found, expected: self.identity.agent_id });
            }
            tracing::info!(path = %self.path.display(), "the memory is written anew in format {FORMAT_VERSION}");
            self.begin_next(|next, key| rewrite::from_second_format(&open, next, key, &self.path))?;
            drop(open);
            // Its pages need not be overwritten: their key is destroyed when the new file is opened.
            self.take_place()?;
            return self.open();
        }
        self.clean_up(&open)?;
        Ok(open)
    }

    fn directory(&self) -> Option<&Path> {
        Some(key::directory(&self.path))
    }

    fn write_anew(&self, open: &Open, now_unix_ms: i64) -> Result<(), OpenError> {
        self.begin_next(|next, key| rewrite::under_another_key(open, next, key, now_unix_ms, &self.path))
    }

    fn take_place(&self) -> Result<(), OpenError> {
        std::fs::rename(self.next(), &self.path).map_err(|source| self.failed(source))?;
        sync_directory(&self.path).map_err(|source| self.failed(source))
    }
}

impl Folder {
    fn next(&self) -> PathBuf {
        self.path.with_extension("redb.next")
    }

    fn failed(&self, source: io::Error) -> OpenError {
        file_error(&self.path, source)
    }

    fn database_at(&self, path: &Path) -> Result<Database, OpenError> {
        let file = open_file(path, &self.path)?;
        open_database(&self.path, self.cache_bytes, |builder| builder.create_file(file))
    }

    fn key(&self, id: uuid::Uuid) -> Result<StoreKey, OpenError> {
        key::read(&self.path, id).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::InvalidData => OpenError::KeyMissing {
                path: self.path.clone(),
                key: key::path(&self.path, id),
                source: Arc::new(source),
            },
            _ => self.failed(source),
        })
    }

    /// Makes a new store beside its place and moves it there, so that a power cut leaves a whole store or none.
    fn create(&self) -> Result<(), OpenError> {
        let beside = self.path.with_extension("redb.new");
        remove(&beside).map_err(|source| self.failed(source))?;
        let key = key::make(&self.path).map_err(|source| self.failed(source))?;
        let database = self.database_at(&beside)?;
        initialise(&database, &self.path, self.identity, &key)?;
        drop(database);
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, &beside, CWD, &self.path, RenameFlags::NOREPLACE)
            .map_err(|error| self.failed(error.into()))?;
        sync_directory(&self.path).map_err(|source| self.failed(source))
    }

    /// Fills a store beside this one under a key of its own; both are on disk when it returns.
    fn begin_next(
        &self,
        fill: impl FnOnce(&Database, &StoreKey) -> Result<(), OpenError>,
    ) -> Result<(), OpenError> {
        remove(&self.next()).map_err(|source| self.failed(source))?;
        let key = key::make(&self.path).map_err(|source| self.failed(source))?;
        let filled = self.database_at(&self.next()).and_then(|mut next| {
            fill(&next, &key)?;
            // Written in several transactions, it has pages that the later ones freed.
            next.compact().map_err(|error| compaction_error(&self.path, error))?;
            Ok(())
        });
        if filled.is_err() {
            // A full disk must not stay full of half a store. The key goes when the store is opened next.
            let _ = remove(&self.next());
        }
        filled
    }

    /// The store is open: whatever an interrupted step left beside it is of no use, and keys it does not name must
    /// not exist.
    fn clean_up(&self, open: &Open) -> Result<(), OpenError> {
        let clean = || {
            remove(&self.path.with_extension("redb.new"))?;
            remove(&self.next())?;
            key::destroy_others(&self.path, open.row.key)
        };
        let destroyed = clean().map_err(|source| self.failed(source))?;
        if destroyed > 0 {
            tracing::info!(path = %self.path.display(), destroyed, "old keys of the memory were destroyed");
        }
        Ok(())
    }
}

/// Destroys a store that nobody has open: first every key, so that from then on nothing opens its rows, wherever
/// copies of its pages are; then its files. What was interrupted is finished by doing it again. Blocks: some fsyncs.
pub fn destroy(path: &Path) -> Result<(), OpenError> {
    let failed = |source| file_error(path, source);
    match key::directory(path).try_exists() {
        Ok(false) => return Ok(()),
        Ok(true) => {}
        Err(source) => return Err(failed(source)),
    }
    key::destroy_all(path).map_err(failed)?;
    for extension in ["redb", "redb.next", "redb.new", "redb.opening"] {
        remove(&path.with_extension(extension)).map_err(failed)?;
    }
    sync_directory(path).map_err(failed)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Overwrites a file whose content was not sealed. It has no name any more.
fn scrub(mut file: File) -> io::Result<()> {
    use std::io::{Seek, Write};
    let zeros = vec![0u8; 64 * 1024];
    let mut left = file.metadata()?.len();
    file.rewind()?;
    while left > 0 {
        let some = left.min(zeros.len() as u64);
        file.write_all(&zeros[..some as usize])?;
        left -= some;
    }
    file.sync_all()
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

/// Writes the first rows of an empty store.
pub(crate) fn initialise(
    database: &Database,
    path: &Path,
    identity: Identity,
    key: &StoreKey,
) -> Result<(), OpenError> {
    let row = IdentityRow {
        format: FORMAT_VERSION,
        words: WORDS_VERSION,
        store: uuid::Uuid::now_v7(),
        identity,
        key: key.id,
    };
    let (seal, budgets) = (Seal::new(&key.secret), Budgets::new([]));
    let ground = Ground {
        owner: identity.owner_id,
        budgets: &budgets,
        duplicates: Duplicates::Keep,
        seal: &seal,
        store: row.store,
    };
    let write = || {
        let txn = begin_write(database)?;
        {
            let mut batch = Batch::begin(&txn, ground)?;
            batch.write_identity(row)?;
            batch.finish()?;
        }
        Ok::<_, StoreError>(txn.commit()?)
    };
    write().map_err(|error| open_error(path, error))
}

/// An error of a store that is not open yet.
pub(crate) fn open_error(path: &Path, error: StoreError) -> OpenError {
    let path = path.to_owned();
    match error {
        StoreError::Open(error) => error,
        StoreError::Damaged(damage) => OpenError::Damaged { path, damage },
        StoreError::Storage(source) => OpenError::Database { path, source },
        other => {
            let source = Arc::new(io::Error::other(other.to_string()));
            OpenError::File { path, source }
        }
    }
}

fn compaction_error(path: &Path, error: redb::CompactionError) -> OpenError {
    let source = match error {
        redb::CompactionError::Storage(error) => redb::Error::from(error),
        // Nobody else has the new file.
        other => redb::Error::Io(io::Error::other(other.to_string())),
    };
    OpenError::Database { path: path.to_owned(), source: Arc::new(source) }
}

fn meta_row(database: &Database, path: &Path, name: &'static str) -> Result<Vec<u8>, OpenError> {
    let damaged = || OpenError::Damaged { path: path.to_owned(), damage: Damage::Meta(name) };
    let failed = |e: redb::Error| OpenError::Database { path: path.to_owned(), source: Arc::new(e) };
    let txn = database.begin_read().map_err(|e| failed(e.into()))?;
    let meta = match txn.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Err(damaged()),
        Err(error) => return Err(failed(error.into())),
    };
    let row = meta.get(name).map_err(|e| failed(e.into()))?.ok_or_else(damaged)?;
    Ok(row.value().to_vec())
}

fn read_format(database: &Database, path: &Path) -> Result<u32, OpenError> {
    let row = meta_row(database, path, IDENTITY)?;
    let found = IdentityRow::format_of(&row)
        .map_err(|damage| OpenError::Damaged { path: path.to_owned(), damage })?;
    match found {
        1..=FORMAT_VERSION => Ok(found),
        0 => Err(OpenError::Damaged { path: path.to_owned(), damage: Damage::Meta(IDENTITY) }),
        found => Err(OpenError::NewerFormat { path: path.to_owned(), found, known: FORMAT_VERSION }),
    }
}

pub(crate) fn read_identity(database: &Database, path: &Path) -> Result<IdentityRow, OpenError> {
    let row = meta_row(database, path, IDENTITY)?;
    IdentityRow::from_bytes(&row).map_err(|damage| OpenError::Damaged { path: path.to_owned(), damage })
}

/// Does the key open what it should? Otherwise nothing would, and nothing must be destroyed on its word.
pub(crate) fn check_canary(open: &Open, path: &Path) -> Result<(), OpenError> {
    let canary = meta_row(&open.database, path, CANARY)?;
    match open.seal.open(Row::Canary, open.row.key.as_bytes(), &canary, &mut Vec::new()) {
        Some(_) => Ok(()),
        None => Err(OpenError::Damaged { path: path.to_owned(), damage: Damage::Key }),
    }
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
