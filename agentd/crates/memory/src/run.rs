//! Who holds the file, and when is something acknowledged?
//!
//! Owns:    the open file and one thread, its writer. Questions are answered on the caller's thread, from a
//!          snapshot; everything that writes goes through a bounded queue to the writer.
//! Group commit: while one commit waits for the disk, further works queue; the next transaction takes all of
//!          them. One commit costs two fsyncs, whether it carries one record or five hundred.
//! Always:  a work is acknowledged after its transaction is on disk and after the index knows it.
//! States:  open -> (an I/O error) -> closed -> (next use) reopened, or still closed with the reason.
//!          redb refuses everything after an I/O error until the file is reopened. Reopening is sound even when
//!          an fsync failed: two-phase commit moves the root only after its pages were synced, so a page that the
//!          kernel dropped belongs to a transaction that was never acknowledged and that no root names.
//! Never:   an await. agentd calls from its blocking threads.
//! Not here: how the file is made and opened, and how a transaction is begun: `file.rs`.

use crate::error::{Damage, OpenError, Refusal, StoreError};
use crate::file::{self, begin_write};
use crate::index::{Change, Index, read_counters};
use crate::plan::{self, Budgets};
use crate::read::{self, Pending, Stored};
use crate::tables::{Counters, Identity, IdentityRow};
use crate::text::WORDS_VERSION;
use crate::work::{Job, Work};
use crate::write::{Batch, Completed, EmbedderDigest, EmbedderUse, Embedding, RememberWork};
use agentd_domain::agent_api::{Recall, Recalled, Remember, Remembered};
use agentd_domain::ids::RecordId;
use redb::{Database, ReadTransaction, ReadableDatabase};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Works that may wait; the next caller blocks. As many as one transaction takes, so the queue never grows
/// while the disk is busy.
const QUEUE: usize = 512;
/// A transaction takes at most so much text, so that a pile of large records does not delay a small one by
/// more than a fraction of a second.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Refused below this: redb must be able to write the pages of a commit, and the owner to sign in and delete.
const DISK_RESERVE_BYTES: u64 = 16 * 1024 * 1024;
/// The writer encodes records and walks trees of a few levels; records of 32 KiB fit in a debug build, too.
const WRITER_STACK_BYTES: usize = 512 * 1024;

/// What to remember, and when it was told by agentd's clock.
#[derive(Debug, Clone)]
pub struct NewRecord {
    pub request: Remember,
    pub recorded_unix_ms: i64,
    /// From the request's `Idempotency-Key` header: repeated within 24 hours it gives the first answer again.
    pub idempotency_key: Option<String>,
}

#[derive(Debug, Clone)]
pub struct Options {
    pub identity: Identity,
    pub budgets: Budgets,
    pub tuning: Tuning,
}

/// What may differ between stores without changing what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// How long a commit waits for more works to share its two fsyncs. With zero it takes what queued while the
    /// commit before it was on its way: a lone writer waits for nothing, and many share all the same. More than
    /// zero spares the disk where single writers come at their own pace; every one of them waits for it.
    pub group_window: Duration,
    /// redb's page cache; its own default is 1 GiB. What questions need of every record is in the index anyway.
    pub cache_bytes: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { group_window: Duration::ZERO, cache_bytes: 4 * 1024 * 1024 }
    }
}

/// A window is for sharing, not for losing patience: an acknowledgement never waits longer for others than this.
const GROUP_WINDOW_MOST: Duration = Duration::from_millis(50);

impl Options {
    pub fn new(identity: Identity, budgets: Budgets) -> Self {
        Self { identity, budgets, tuning: Tuning::default() }
    }
}

/// One store: an agent's own, or the shared one. `Send` and `Sync`; share it in an `Arc`. Dropping it finishes
/// what is queued and closes the file.
pub struct Store {
    shared: Arc<Shared>,
    queue: Mutex<Option<SyncSender<Box<dyn Job>>>>,
    writer: Option<JoinHandle<()>>,
}

/// Opens or creates the file: the one thing that differs between the disk and a test's failing disk.
pub(crate) type Opener = Box<dyn Fn() -> Result<Database, OpenError> + Send + Sync>;

struct Shared {
    path: PathBuf,
    identity: Identity,
    budgets: Budgets,
    opener: Opener,
    /// The directory whose file system must keep a reserve; none in tests without a file.
    directory: Option<PathBuf>,
    file: RwLock<Handle>,
    index: RwLock<Option<Index>>,
    /// What the index takes; readable while somebody loads it.
    index_bytes: AtomicUsize,
    /// Transactions whose works were acknowledged: what a reopened file must hold at least.
    acknowledged: AtomicU64,
}

/// The open file, and how often it was opened: a thread that met an error reopens only what it failed on.
struct Handle {
    database: Option<Database>,
    opened: u64,
}

impl Store {
    /// Opens the store, or creates it with an own identity. Blocks: a new file is four fsyncs, an old one is
    /// open in milliseconds, whatever its size and however it was closed.
    pub fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let (file_path, identity, cache) = (path.to_owned(), options.identity, options.tuning.cache_bytes);
        let opener: Opener = Box::new(move || file::open_or_create(&file_path, identity, cache));
        let directory = path.parent().map(Path::to_owned);
        let _returned = file::OpeningNote::leave(path)?;
        Self::open_with(path, opener, directory, options)
    }

    pub(crate) fn open_with(
        path: &Path,
        opener: Opener,
        directory: Option<PathBuf>,
        options: Options,
    ) -> Result<Self, OpenError> {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            identity: options.identity,
            budgets: options.budgets,
            opener,
            directory,
            file: RwLock::new(Handle { database: None, opened: 0 }),
            index: RwLock::new(None),
            index_bytes: AtomicUsize::new(0),
            acknowledged: AtomicU64::new(0),
        });
        shared.reopen(0)?;
        let (queue, works) = sync_channel(QUEUE);
        let for_writer = Arc::clone(&shared);
        let window = options.tuning.group_window.min(GROUP_WINDOW_MOST);
        let writer = std::thread::Builder::new()
            .name("memory-writer".to_owned())
            .stack_size(WRITER_STACK_BYTES)
            .spawn(move || write_until_closed(&for_writer, &works, window))
            .map_err(|source| OpenError::Thread { path: path.to_owned(), source: Arc::new(source) })?;
        Ok(Self { shared, queue: Mutex::new(Some(queue)), writer: Some(writer) })
    }

    /// Stores one record; returns when it is on disk. Without a usable embedding it is stored as pending.
    pub fn remember(&self, new: NewRecord, embedding: Option<Embedding>) -> Result<Remembered, StoreError> {
        let work = self.check_new(new, embedding)?;
        self.submit(work.record.text.len(), move |batch| batch.remember(&work))
    }

    /// Stores many records in one transaction; returns when all are on disk. Each has its own outcome: one that
    /// is refused keeps no other from being stored.
    pub fn remember_many(
        &self,
        news: Vec<(NewRecord, Option<Embedding>)>,
    ) -> Result<Vec<Result<Remembered, Refusal>>, StoreError> {
        let works: Vec<_> = news.into_iter().map(|(new, embedding)| self.check_new(new, embedding)).collect();
        let bytes = works.iter().flatten().map(|work| work.record.text.len()).sum();
        self.submit(bytes, move |batch| works.iter().map(|work| outcome_of(batch, work)).collect())
    }

    fn check_new(&self, new: NewRecord, embedding: Option<Embedding>) -> Result<RememberWork, Refusal> {
        let record = plan::check_remember(new.request, &self.shared.budgets)?;
        if let Some(key) = &new.idempotency_key {
            plan::check_key(key)?;
        }
        let (recorded_unix_ms, key) = (new.recorded_unix_ms, new.idempotency_key);
        Ok(RememberWork { record, recorded_unix_ms, key, embedding })
    }

    /// Answers a question on the caller's thread. Without a usable embedding of it, by words alone.
    pub fn recall(&self, request: &Recall, embedding: Option<&Embedding>) -> Result<Recalled, StoreError> {
        let question = plan::check_recall(request, &self.shared.budgets)?;
        self.shared.with_index(|index, txn| read::recall(txn, index, &question, embedding))
    }

    /// Names the embedder in use: after every load of the embedding model, before vectors are passed in.
    /// With another digest than before, all records wait for new vectors.
    pub fn use_embedder(&self, embedder: EmbedderDigest, dimension: u32) -> Result<EmbedderUse, StoreError> {
        // Nearly always nothing changes: then nothing is written, and a full disk is no obstacle.
        let in_use = self
            .shared
            .with_database(|database| read::embedder_in_use(&database.begin_read()?, &embedder, dimension))?;
        if let Some(found) = in_use {
            return Ok(found);
        }
        self.submit(0, move |batch| batch.use_embedder(&embedder, dimension))
    }

    /// The oldest records without a vector of the current embedder, at most so many.
    pub fn pending_batch(&self, most: usize) -> Result<Vec<Pending>, StoreError> {
        self.shared.with_database(|database| read::pending(&database.begin_read()?, most))
    }

    /// Vectors for pending records, made by this embedder. Records that got one meanwhile are left alone.
    pub fn complete_embedding(
        &self,
        embedder: EmbedderDigest,
        vectors: Vec<(RecordId, Vec<f32>)>,
    ) -> Result<Completed, StoreError> {
        let bytes = vectors.iter().map(|(_, vector)| vector.len() * 4).sum();
        self.submit(bytes, move |batch| batch.complete(&embedder, &vectors))
    }

    pub fn get(&self, id: RecordId) -> Result<Option<Stored>, StoreError> {
        self.shared.with_database(|database| read::get(&database.begin_read()?, id))
    }

    pub fn counters(&self) -> Result<Counters, StoreError> {
        self.shared.with_database(|database| read_counters(&database.begin_read()?))
    }

    /// Reads everything and compares it with what the indexes say. Slow: seconds for 100,000 records.
    pub fn check(&self) -> Result<crate::check::Checked, StoreError> {
        self.shared.with_database(|database| crate::check::check(&database.begin_read()?))
    }

    /// What the index in memory takes now; 0 until the first question.
    pub fn index_bytes(&self) -> usize {
        self.shared.index_bytes.load(Ordering::Relaxed)
    }

    /// Frees the index; the next question loads it again.
    pub fn drop_index(&self) {
        self.shared.set_index(&mut write(&self.shared.index), None);
    }

    fn submit<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnMut(&mut Batch<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = sync_channel(1);
        let queue = lock(&self.queue).clone().ok_or(StoreError::Closing)?;
        queue.send(Box::new(Work::new(bytes, work, reply))).map_err(|_| StoreError::Closing)?;
        answer.recv().map_err(|_| StoreError::Closing)?
    }
}

/// One record of many: a refusal is its own, anything else ends the transaction.
fn outcome_of(
    batch: &mut Batch<'_>,
    work: &Result<RememberWork, Refusal>,
) -> Result<Result<Remembered, Refusal>, StoreError> {
    let stored = match work {
        Ok(work) => batch.remember(work),
        Err(refusal) => return Ok(Err(refusal.clone())),
    };
    match stored {
        Ok(remembered) => Ok(Ok(remembered)),
        Err(StoreError::Refused(refusal)) => Ok(Err(refusal)),
        Err(error) => Err(error),
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The writer ends when the queue has no sender left, after it wrote what was in it.
        lock(&self.queue).take();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl Shared {
    /// Runs `use_it` on the open file. After an error of the disk the file is closed and opened again, so that
    /// the next request finds a working handle; this one has failed.
    fn with_database<T>(
        &self,
        use_it: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (opened, result) = {
            let handle = self.open_handle()?;
            let database = handle.database.as_ref().ok_or(StoreError::Closing)?;
            (handle.opened, use_it(database))
        };
        if let Err(error) = &result
            && error.poisons_handle()
        {
            tracing::error!(path = %self.path.display(), %error, "the memory store's file is reopened after an error");
            if let Err(error) = self.reopen(opened) {
                tracing::error!(path = %self.path.display(), %error, "the memory store stays closed until its next use");
            }
        }
        result
    }

    fn open_handle(&self) -> Result<RwLockReadGuard<'_, Handle>, StoreError> {
        let handle = read(&self.file);
        if handle.database.is_some() {
            return Ok(handle);
        }
        let opened = handle.opened;
        drop(handle);
        self.reopen(opened)?;
        Ok(read(&self.file))
    }

    /// Closes the file and opens it again, unless another thread has done so since it was opened `failed`.
    fn reopen(&self, failed: u64) -> Result<(), OpenError> {
        let mut handle = write(&self.file);
        if handle.opened != failed && handle.database.is_some() {
            return Ok(());
        }
        self.set_index(&mut write(&self.index), None);
        handle.database = None;
        let database = (self.opener)()?;
        self.look_over(&database)?;
        handle.opened += 1;
        handle.database = Some(database);
        Ok(())
    }

    /// Is this file ours, in a format we know, and does it hold everything that was acknowledged?
    fn look_over(&self, database: &Database) -> Result<(), OpenError> {
        let damaged = |damage| OpenError::Damaged { path: self.path.clone(), damage };
        let failed = |error| self.open_error(error);
        let row = file::read_identity(database, &self.path)?;
        if row.identity.agent_id != self.identity.agent_id {
            let (found, expected) = (row.identity.agent_id, self.identity.agent_id);
            return Err(OpenError::OtherAgent { path: self.path.clone(), found, expected });
        }
        if row.words != WORDS_VERSION {
            self.rebuild_words(database, row).map_err(failed)?;
        }
        let counters = crate::check::check_counts(&database.begin_read().map_err(|e| failed(e.into()))?)
            .map_err(failed)?;
        let acknowledged = self.acknowledged.fetch_max(counters.commits, Ordering::SeqCst);
        if counters.commits < acknowledged {
            return Err(damaged(Damage::LostWrites { found: counters.commits, acknowledged }));
        }
        Ok(())
    }

    fn rebuild_words(&self, database: &Database, row: IdentityRow) -> Result<(), StoreError> {
        tracing::info!(path = %self.path.display(), from = row.words, to = WORDS_VERSION, "word index is rebuilt");
        let txn = begin_write(database)?;
        {
            let mut batch = Batch::begin(&txn, self.identity.owner_id, &self.budgets)?;
            batch.rebuild_words()?;
            batch.write_identity(IdentityRow { words: WORDS_VERSION, ..row })?;
            batch.finish()?;
        }
        Ok(txn.commit()?)
    }

    fn open_error(&self, error: StoreError) -> OpenError {
        let path = self.path.clone();
        match error {
            StoreError::Open(error) => error,
            StoreError::Damaged(damage) => OpenError::Damaged { path, damage },
            StoreError::Storage(source) => OpenError::Database { path, source },
            other => {
                let source = Arc::new(std::io::Error::other(other.to_string()));
                OpenError::File { path, source }
            }
        }
    }

    /// The index is read before the snapshot is taken: what it names is then in the snapshot.
    fn with_index<T>(
        &self,
        use_it: impl Fn(&Index, &ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.with_database(|database| {
            {
                let index = read(&self.index);
                if let Some(index) = index.as_ref() {
                    return use_it(index, &database.begin_read()?);
                }
            }
            let mut index = write(&self.index);
            if index.is_none() {
                let loaded = Index::load(&database.begin_read()?)?;
                self.set_index(&mut index, Some(loaded));
            }
            match index.as_ref() {
                Some(index) => use_it(index, &database.begin_read()?),
                None => Err(StoreError::Closing),
            }
        })
    }

    fn commit(&self, mut jobs: Vec<Box<dyn Job>>) {
        let result = self
            .check_reserve()
            .and_then(|()| self.with_database(|database| self.commit_to(database, &mut jobs)));
        for job in jobs {
            job.acknowledge(result.clone());
        }
    }

    fn commit_to(&self, database: &Database, jobs: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        let txn = begin_write(database)?;
        let (counters, changes) = {
            let mut batch = Batch::begin(&txn, self.identity.owner_id, &self.budgets)?;
            for job in jobs {
                job.apply(&mut batch)?;
            }
            batch.finish()?
        };
        txn.commit()?;
        self.acknowledged.fetch_max(counters.commits, Ordering::SeqCst);
        let mut slot = write(&self.index);
        let mut index = slot.take().filter(|_| !changes.contains(&Change::Rebuild));
        if let Some(index) = &mut index {
            changes.iter().for_each(|change| index.apply(change));
        }
        self.set_index(&mut slot, index);
        Ok(())
    }

    fn set_index(&self, slot: &mut Option<Index>, index: Option<Index>) {
        self.index_bytes.store(index.as_ref().map_or(0, Index::bytes), Ordering::Relaxed);
        *slot = index;
    }

    fn check_reserve(&self) -> Result<(), StoreError> {
        let Some(directory) = &self.directory else { return Ok(()) };
        // A file system that cannot tell is not a reason to refuse: the write itself will.
        let Ok(state) = rustix::fs::statvfs(directory) else { return Ok(()) };
        let free_bytes = state.f_bavail.saturating_mul(state.f_frsize);
        if free_bytes < DISK_RESERVE_BYTES {
            return Err(StoreError::DiskFull { free_bytes, reserve_bytes: DISK_RESERVE_BYTES });
        }
        Ok(())
    }
}

fn write_until_closed(shared: &Shared, works: &Receiver<Box<dyn Job>>, window: Duration) {
    while let Ok(first) = works.recv() {
        let mut bytes = first.bytes();
        let mut jobs = vec![first];
        let deadline = Instant::now() + window;
        while jobs.len() < QUEUE && bytes < BATCH_BYTES {
            // What is queued is taken even when no time is left.
            let left = deadline.saturating_duration_since(Instant::now());
            let next = if left.is_zero() { works.try_recv().ok() } else { works.recv_timeout(left).ok() };
            let Some(next) = next else { break };
            bytes += next.bytes();
            jobs.push(next);
        }
        shared.commit(jobs);
    }
}

// A panic while a lock was held aborts the release build; in tests the data under it is only a cache or a handle.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
