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
use crate::file::{Folder, Home, Open, OpeningNote, begin_write, open_error};
use crate::index::{Index, Kept, read_counters};
use crate::journal::Entry;
use crate::near::CELLS_FROM;
use crate::plan::{self, At, Budgets, Detail, Duplicates};
use crate::read::{self, History, Listing, Pending, Stored, View, Window};
use crate::recall::{self, Asked, Wanted};
use crate::record::SourceKind;
use crate::tables::{Counters, Identity, IdentityRow};
use crate::text::WORDS_VERSION;
use crate::vocabulary::{self, PendingWords};
use crate::work::{Job, Work};
use crate::write::{
    Batch, Block, BlockWork, Completed, CorrectWork, EmbedderDigest, EmbedderUse, Embedding, ForgetMode,
    Made, Meaning, Ready, RememberWork, RolledBack, SessionEnd, SessionEnded, Swept, check_block,
    session_number, share_out,
};
use agentd_domain::agent_api::{Recall, Recalled, Remember, Remembered, Tier};
use agentd_domain::ids::RecordId;
use redb::ReadableDatabase;
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
    pub detail: Detail,
    /// Whose texts the embedding has in it besides this one: [`Window::with`].
    pub with: Vec<RecordId>,
}

impl NewRecord {
    /// Told now, with nothing special about it.
    pub fn new(request: Remember, recorded_unix_ms: i64) -> Self {
        Self { request, recorded_unix_ms, idempotency_key: None, detail: Detail::default(), with: Vec::new() }
    }
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
    pub duplicates: Duplicates,
    /// With more vectors than so many a question looks only where it is worth looking (`near.rs`).
    pub cells_from: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            group_window: Duration::ZERO,
            cache_bytes: 4 * 1024 * 1024,
            duplicates: Duplicates::Reinforce,
            cells_from: CELLS_FROM,
        }
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
    queue: Mutex<Option<SyncSender<Task>>>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    identity: Identity,
    budgets: Budgets,
    duplicates: Duplicates,
    cells_from: usize,
    home: Box<dyn Home>,
    file: RwLock<Handle>,
    index: RwLock<Option<Index>>,
    /// What the index takes; readable while somebody loads it.
    index_bytes: AtomicUsize,
    /// Transactions whose works were acknowledged: what a reopened file must hold at least.
    acknowledged: AtomicU64,
}

/// The open file, and how often it was opened: a thread that met an error reopens only what it failed on.
struct Handle {
    open: Option<Open>,
    opened: u64,
}

/// What the writer does.
enum Task {
    Work(Box<dyn Job>),
    /// Write the store anew under another key.
    Rewrite(i64, SyncSender<Result<(), StoreError>>),
}

impl Store {
    /// Opens the store, or creates it with an own identity and key. Blocks: a new file is six fsyncs, an old one is
    /// open in milliseconds, whatever its size and however it was closed. A file of format 1 is written anew first.
    pub fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let (identity, cache_bytes) = (options.identity, options.tuning.cache_bytes);
        let home = Folder { path: path.to_owned(), identity, cache_bytes };
        let _returned = OpeningNote::leave(path)?;
        Self::open_at(path, Box::new(home), options)
    }

    pub(crate) fn open_at(path: &Path, home: Box<dyn Home>, options: Options) -> Result<Self, OpenError> {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            identity: options.identity,
            budgets: options.budgets,
            duplicates: options.tuning.duplicates,
            cells_from: options.tuning.cells_from,
            home,
            file: RwLock::new(Handle { open: None, opened: 0 }),
            index: RwLock::new(None),
            index_bytes: AtomicUsize::new(0),
            acknowledged: AtomicU64::new(0),
        });
        shared.reopen(0)?;
        let (queue, tasks) = sync_channel(QUEUE);
        let for_writer = Arc::clone(&shared);
        let window = options.tuning.group_window.min(GROUP_WINDOW_MOST);
        let writer = std::thread::Builder::new()
            .name("memory-writer".to_owned())
            .stack_size(WRITER_STACK_BYTES)
            .spawn(move || write_until_closed(&for_writer, &tasks, window))
            .map_err(|source| OpenError::Thread { path: path.to_owned(), source: Arc::new(source) })?;
        Ok(Self { shared, queue: Mutex::new(Some(queue)), writer: Some(writer) })
    }

    /// Stores one record; returns when it is on disk. Without a usable embedding it is stored as pending.
    pub fn remember(&self, new: NewRecord, embedding: Option<Embedding>) -> Result<Remembered, StoreError> {
        let mut work = self.check_new(new, embedding)?;
        self.make_ready(std::slice::from_mut(&mut work), |work| Some(work));
        self.submit(work.record.text.len(), move |batch| batch.remember(&work))
    }

    /// Stores many records in one transaction; returns when all are on disk. Each has its own outcome: one that
    /// is refused keeps no other from being stored.
    pub fn remember_many(
        &self,
        news: Vec<(NewRecord, Option<Embedding>)>,
    ) -> Result<Vec<Result<Remembered, Refusal>>, StoreError> {
        let mut works: Vec<_> =
            news.into_iter().map(|(new, embedding)| self.check_new(new, embedding)).collect();
        self.make_ready(&mut works, |work| work.as_mut().ok());
        let bytes = works.iter().flatten().map(|work| work.record.text.len()).sum();
        self.submit(bytes, move |batch| works.iter().map(|work| outcome_of(batch, work)).collect())
    }

    fn check_new(&self, new: NewRecord, embedding: Option<Embedding>) -> Result<RememberWork, Refusal> {
        let record = plan::check_remember(new.request, new.detail, &self.shared.budgets)?;
        if let Some(key) = &new.idempotency_key {
            plan::check_key(key)?;
        }
        let (recorded_unix_ms, key) = (new.recorded_unix_ms, new.idempotency_key);
        Ok(RememberWork { record, recorded_unix_ms, key, embedding, with: new.with, ready: Ready::default() })
    }

    /// Finds the words of what is to be told and rounds its vectors. If the store is closed the writer finds them, or says why it cannot.
    fn make_ready<T: Send>(
        &self,
        works: &mut [T],
        work_of: impl Fn(&mut T) -> Option<&mut RememberWork> + Sync,
    ) {
        let made = self.shared.with_open(|open| {
            share_out(works, &open.seal, |one, marker| {
                if let Some(work) = work_of(one) {
                    work.ready.terms = Some(marker.terms(&work.record.text));
                    work.ready.meaning = work.embedding.take().map(Meaning::of);
                }
            });
            Ok(())
        });
        if let Err(error) = made {
            tracing::debug!(%error, "what is told is left to the writer as it is");
        }
    }

    /// What the embedder should get for a text that is about to be told: with what was told before it in its session,
    /// because one turn of a conversation seldom says what it is about. Without a session it is the text.
    pub fn window(&self, tier: Tier, text: &str, detail: &Detail) -> Result<Window, StoreError> {
        let alone = || Window { text: text.to_owned(), with: Vec::new() };
        let Some(session) = detail.session.as_ref().filter(|_| plan::has_meaning(tier)) else {
            return Ok(alone());
        };
        self.shared.with_index(|index, view| {
            let session = session_number(view.store, session);
            read::window(view, index, (session, tier, detail.order), text)
        })
    }

    /// What the embedder should read of a question, so that [`Store::answer`] knows what it means.
    pub fn wanted(&self, request: &Recall) -> Result<Wanted, StoreError> {
        let question = plan::check_recall(request, At::Latest, &self.shared.budgets)?;
        self.shared.with_index(|index, view| Ok(recall::wanted(view, index, request, &question)))
    }

    /// Answers a question on the caller's thread. Without usable vectors of it, by words alone.
    pub fn answer(&self, request: &Recall, asked: &Asked) -> Result<Recalled, StoreError> {
        let question = plan::check_recall(request, asked.at, &self.shared.budgets)?;
        self.shared.with_index(|index, view| recall::recall(view, index, request, &question, asked))
    }

    /// The same with a vector of the question alone.
    pub fn recall(&self, request: &Recall, embedding: Option<&Embedding>) -> Result<Recalled, StoreError> {
        self.recall_at(request, embedding, At::Latest)
    }

    /// The same for a question about another time.
    pub fn recall_at(
        &self,
        request: &Recall,
        embedding: Option<&Embedding>,
        at: At,
    ) -> Result<Recalled, StoreError> {
        let vectors = embedding.cloned().map(Into::into);
        self.answer(request, &Asked { at, now_unix_ms: None, vectors })
    }

    /// These were recalled and given to somebody: each is strengthened. Nothing needs to wait for it.
    pub fn used(&self, ids: Vec<RecordId>, now_unix_ms: i64) -> Result<(), StoreError> {
        self.submit(0, move |batch| batch.used(&ids, now_unix_ms))
    }

    /// Forgets these; says how many were not forgotten already. An unknown id refuses all.
    pub fn forget(&self, ids: Vec<RecordId>, mode: ForgetMode, now_unix_ms: i64) -> Result<u64, StoreError> {
        self.submit(0, move |batch| batch.forget(&ids, mode, now_unix_ms))
    }

    /// Takes a tombstone back.
    pub fn restore(&self, id: RecordId, now_unix_ms: i64) -> Result<(), StoreError> {
        self.submit(0, move |batch| batch.restore(id, now_unix_ms))
    }

    /// A pinned record never goes by itself.
    pub fn pin(&self, id: RecordId, pinned: bool, now_unix_ms: i64) -> Result<(), StoreError> {
        self.submit(0, move |batch| batch.pin(id, pinned, now_unix_ms))
    }

    /// Puts another text in a record's place, as the user's word. The old one stays for questions about then.
    pub fn correct(
        &self,
        id: RecordId,
        text: String,
        embedding: Option<Embedding>,
        now_unix_ms: i64,
    ) -> Result<Remembered, StoreError> {
        self.correct_as(SourceKind::User, id, text, embedding, now_unix_ms)
    }

    /// The same as somebody else's word, which must be believed no less than whose text it is.
    pub fn correct_as(
        &self,
        source: SourceKind,
        id: RecordId,
        text: String,
        embedding: Option<Embedding>,
        now_unix_ms: i64,
    ) -> Result<Remembered, StoreError> {
        plan::check_text(&text)?;
        let work = CorrectWork { id, text, source, now_unix_ms, embedding };
        self.submit(work.text.len(), move |batch| batch.correct(&work))
    }

    /// Forgets everything that came from this source (and reference, if one is given) since then; what it had
    /// superseded stands again.
    pub fn roll_back(
        &self,
        source: SourceKind,
        reference: Option<String>,
        since_unix_ms: i64,
        now_unix_ms: i64,
    ) -> Result<RolledBack, StoreError> {
        self.submit(0, move |batch| batch.roll_back(source, reference.as_deref(), since_unix_ms, now_unix_ms))
    }

    /// A run is over: what of its log is worth keeping goes to the long memory; the log goes a day later.
    pub fn end_session(&self, end: SessionEnd) -> Result<SessionEnded, StoreError> {
        self.submit(0, move |batch| batch.end_session(&end))
    }

    /// Ends every session but this one: of runs whose end nobody told. Says how many there were.
    pub fn end_sessions_but(&self, current: Option<String>, now_unix_ms: i64) -> Result<u64, StoreError> {
        self.submit(0, move |batch| batch.end_sessions_but(current.as_deref(), now_unix_ms))
    }

    /// What the store may hold.
    pub fn budgets(&self) -> &Budgets {
        &self.shared.budgets
    }

    /// What time has come for. Call it every hour or so, and again at once while it says `more`.
    pub fn sweep(&self, now_unix_ms: i64) -> Result<Swept, StoreError> {
        self.submit(0, move |batch| batch.sweep(now_unix_ms))
    }

    /// Writes the store anew under another key and destroys the old one: what was purged opens no more. Questions
    /// are answered meanwhile; works wait. Takes seconds for 100,000 records.
    pub fn rewrite(&self, now_unix_ms: i64) -> Result<(), StoreError> {
        let (reply, answer) = sync_channel(1);
        self.send(Task::Rewrite(now_unix_ms, reply))?;
        answer.recv().map_err(|_| StoreError::Closing)?
    }

    /// Writes a block of the prompt over the version its writer has seen (0: none); none as text removes it.
    pub fn set_block(
        &self,
        key: String,
        text: Option<String>,
        seen: u64,
        pinned: bool,
        now_unix_ms: i64,
    ) -> Result<Option<Block>, StoreError> {
        let work = BlockWork { key, text, seen, pinned, now_unix_ms };
        check_block(&work, self.shared.budgets.block_bytes)?;
        self.submit(work.text.as_ref().map_or(0, String::len), move |batch| batch.set_block(&work))
    }

    pub fn block(&self, key: &str) -> Result<Option<Block>, StoreError> {
        self.shared.with_view(|view| read::block(view, key))
    }

    /// All blocks, by key: what is always in the prompt.
    pub fn blocks(&self) -> Result<Vec<Block>, StoreError> {
        self.shared.with_view(read::blocks)
    }

    /// Records from the latest told back, tombstones included if asked for.
    pub fn list(&self, listing: &Listing) -> Result<Vec<Stored>, StoreError> {
        self.shared.with_view(|view| read::list(view, listing))
    }

    /// A record with what came before and after it, and all that was done to any of these.
    pub fn history(&self, id: RecordId) -> Result<History, StoreError> {
        self.shared.with_view(|view| read::history(view, id))
    }

    /// What was forgotten when and why: the newest entries first, each with its number, before that number.
    pub fn journal(&self, before: Option<u64>, most: usize) -> Result<Vec<(u64, Entry)>, StoreError> {
        self.shared.with_view(|view| read::journal(view, before.unwrap_or(u64::MAX), most))
    }

    /// Names the embedder in use: after every load of the embedding model, before vectors are passed in.
    /// With another digest than before, all records wait for new vectors.
    pub fn use_embedder(&self, embedder: EmbedderDigest, dimension: u32) -> Result<EmbedderUse, StoreError> {
        // Nearly always nothing changes: then nothing is written, and a full disk is no obstacle.
        let in_use = self.shared.with_view(|view| read::embedder_in_use(view.txn, &embedder, dimension))?;
        if let Some(found) = in_use {
            return Ok(found);
        }
        self.submit(0, move |batch| batch.use_embedder(&embedder, dimension))
    }

    /// The oldest records without a vector of the current embedder, at most so many.
    pub fn pending_batch(&self, most: usize) -> Result<Vec<Pending>, StoreError> {
        if self.counters()?.pending == 0 {
            return Ok(Vec::new());
        }
        self.shared.with_index(|index, view| read::pending(view, index, most))
    }

    /// Distinct words that want a vector of the current embedder, so that questions find words of like meaning. After
    /// all records have theirs.
    pub fn pending_words(&self, most: usize) -> Result<PendingWords, StoreError> {
        // Nearly always nothing does: then no index is loaded for it.
        if self.shared.with_view(vocabulary::is_complete)? {
            return Ok(PendingWords::default());
        }
        self.shared.with_index(|index, view| vocabulary::pending(view, index, most))
    }

    /// Vectors for these, in their order.
    pub fn complete_words(
        &self,
        embedder: EmbedderDigest,
        pending: PendingWords,
        vectors: Vec<Vec<f32>>,
    ) -> Result<(), StoreError> {
        let bytes = vectors.iter().map(|vector| vector.len() * 4).sum();
        self.submit(bytes, move |batch| batch.complete_words(&embedder, &pending, &vectors))
    }

    /// Vectors for pending records, made by this embedder. Records that got one meanwhile are left alone.
    pub fn complete_pending(
        &self,
        embedder: EmbedderDigest,
        vectors: Vec<Made>,
    ) -> Result<Completed, StoreError> {
        let bytes = vectors.iter().map(|made| made.vector.len() * 4).sum();
        self.submit(bytes, move |batch| batch.complete(&embedder, &vectors))
    }

    /// The same with vectors of the records' texts alone.
    pub fn complete_embedding(
        &self,
        embedder: EmbedderDigest,
        vectors: Vec<(RecordId, Vec<f32>)>,
    ) -> Result<Completed, StoreError> {
        self.complete_pending(embedder, vectors.into_iter().map(Into::into).collect())
    }

    pub fn get(&self, id: RecordId) -> Result<Option<Stored>, StoreError> {
        self.shared.with_view(|view| read::get(view, id))
    }

    pub fn counters(&self) -> Result<Counters, StoreError> {
        self.shared.with_view(|view| read_counters(view.txn))
    }

    /// Reads everything and compares it with what the indexes say. Slow: seconds for 100,000 records.
    pub fn check(&self) -> Result<crate::check::Checked, StoreError> {
        self.shared.with_view(crate::check::check)
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
        self.send(Task::Work(Box::new(Work::new(bytes, work, reply))))?;
        answer.recv().map_err(|_| StoreError::Closing)?
    }

    fn send(&self, task: Task) -> Result<(), StoreError> {
        let queue = lock(&self.queue).clone().ok_or(StoreError::Closing)?;
        queue.send(task).map_err(|_| StoreError::Closing)
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
    fn with_open<T>(&self, use_it: impl FnOnce(&Open) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let (opened, result) = {
            let handle = self.open_handle()?;
            let open = handle.open.as_ref().ok_or(StoreError::Closing)?;
            (handle.opened, use_it(open))
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

    fn with_view<T>(&self, use_it: impl FnOnce(View<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.with_open(|open| use_it(View::of(open, &open.database.begin_read()?)))
    }

    fn open_handle(&self) -> Result<RwLockReadGuard<'_, Handle>, StoreError> {
        let handle = read(&self.file);
        if handle.open.is_some() {
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
        if handle.opened != failed && handle.open.is_some() {
            return Ok(());
        }
        self.close(&mut handle);
        self.open_into(&mut handle)
    }

    fn close(&self, handle: &mut Handle) {
        self.set_index(&mut write(&self.index), None);
        handle.open = None;
    }

    fn open_into(&self, handle: &mut Handle) -> Result<(), OpenError> {
        let mut open = self.home.open()?;
        self.look_over(&mut open)?;
        handle.opened += 1;
        handle.open = Some(open);
        Ok(())
    }

    /// Is this file ours, in a format we know, and does it hold everything that was acknowledged?
    fn look_over(&self, open: &mut Open) -> Result<(), OpenError> {
        let damaged = |damage| OpenError::Damaged { path: self.path.clone(), damage };
        let failed = |error| open_error(&self.path, error);
        let row = open.row;
        if row.identity.agent_id != self.identity.agent_id {
            let (found, expected) = (row.identity.agent_id, self.identity.agent_id);
            return Err(OpenError::OtherAgent { path: self.path.clone(), found, expected });
        }
        open.row.identity.owner_id = self.identity.owner_id;
        if row.words != WORDS_VERSION {
            self.rebuild_words(open, row).map_err(failed)?;
        }
        let txn = open.database.begin_read().map_err(|e| failed(e.into()))?;
        let counters = crate::check::check_counts(&txn).map_err(failed)?;
        let acknowledged = self.acknowledged.fetch_max(counters.commits, Ordering::SeqCst);
        if counters.commits < acknowledged {
            return Err(damaged(Damage::LostWrites { found: counters.commits, acknowledged }));
        }
        Ok(())
    }

    fn rebuild_words(&self, open: &Open, row: IdentityRow) -> Result<(), StoreError> {
        tracing::info!(path = %self.path.display(), from = row.words, to = WORDS_VERSION, "word index is rebuilt");
        let txn = begin_write(&open.database)?;
        {
            let mut batch = Batch::begin(&txn, open.ground(&self.budgets, self.duplicates))?;
            batch.rebuild_words()?;
            batch.write_identity(IdentityRow { words: WORDS_VERSION, ..row })?;
            batch.finish()?;
        }
        Ok(txn.commit()?)
    }

    /// The index is read before the snapshot is taken: what it names is then in the snapshot.
    fn with_index<T>(
        &self,
        use_it: impl Fn(&Index, View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.with_open(|open| {
            {
                let index = read(&self.index);
                if let Some(index) = index.as_ref() {
                    return use_it(index, View::of(open, &open.database.begin_read()?));
                }
            }
            let mut index = write(&self.index);
            if index.is_none() {
                let loaded = Index::load(&open.database.begin_read()?, &open.seal, self.cells_from)?;
                self.set_index(&mut index, Some(loaded));
            }
            match index.as_ref() {
                Some(index) => use_it(index, View::of(open, &open.database.begin_read()?)),
                None => Err(StoreError::Closing),
            }
        })
    }

    fn commit(&self, mut jobs: Vec<Box<dyn Job>>) {
        let result =
            self.check_reserve().and_then(|()| self.with_open(|open| self.commit_to(open, &mut jobs)));
        for job in jobs {
            job.acknowledge(result.clone());
        }
    }

    fn commit_to(&self, open: &Open, jobs: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        let txn = begin_write(&open.database)?;
        let (counters, changes) = {
            let mut batch = Batch::begin(&txn, open.ground(&self.budgets, self.duplicates))?;
            for job in jobs {
                job.apply(&mut batch)?;
            }
            batch.finish()?
        };
        txn.commit()?;
        self.acknowledged.fetch_max(counters.commits, Ordering::SeqCst);
        let mut slot = write(&self.index);
        let mut index = slot.take();
        if let Some(built) = &mut index
            && changes.iter().any(|change| built.apply(change) == Kept::Stale)
        {
            index = None;
        }
        self.set_index(&mut slot, index);
        Ok(())
    }

    /// Writes the store anew. Until it takes the store's place, questions are answered from the old file; nothing
    /// is written meanwhile, because this is the writer's thread.
    fn rewrite(&self, now_unix_ms: i64) -> Result<(), StoreError> {
        self.check_reserve()?;
        self.with_open(|open| Ok(self.home.write_anew(open, now_unix_ms)?))?;
        let mut handle = write(&self.file);
        self.close(&mut handle);
        let taken = self.home.take_place();
        // Either file is a whole store: whichever has the name now is opened.
        self.open_into(&mut handle)?;
        Ok(taken?)
    }

    fn set_index(&self, slot: &mut Option<Index>, index: Option<Index>) {
        self.index_bytes.store(index.as_ref().map_or(0, Index::bytes), Ordering::Relaxed);
        *slot = index;
    }

    fn check_reserve(&self) -> Result<(), StoreError> {
        let Some(directory) = self.home.directory() else { return Ok(()) };
        // A file system that cannot tell is not a reason to refuse: the write itself will.
        let Ok(state) = rustix::fs::statvfs(directory) else { return Ok(()) };
        let free_bytes = state.f_bavail.saturating_mul(state.f_frsize);
        if free_bytes < DISK_RESERVE_BYTES {
            return Err(StoreError::DiskFull { free_bytes, reserve_bytes: DISK_RESERVE_BYTES });
        }
        Ok(())
    }
}

fn write_until_closed(shared: &Shared, tasks: &Receiver<Task>, window: Duration) {
    let mut rewrite = None;
    while let Ok(first) = tasks.recv() {
        let mut jobs = Vec::new();
        let mut bytes = 0;
        let deadline = Instant::now() + window;
        let mut next = Some(first);
        while let Some(task) = next.take() {
            match task {
                Task::Work(job) => {
                    bytes += job.bytes();
                    jobs.push(job);
                }
                Task::Rewrite(now_unix_ms, reply) => {
                    rewrite = Some((now_unix_ms, reply));
                    break;
                }
            }
            if jobs.len() >= QUEUE || bytes >= BATCH_BYTES {
                break;
            }
            // What is queued is taken even when no time is left.
            let left = deadline.saturating_duration_since(Instant::now());
            next = if left.is_zero() { tasks.try_recv().ok() } else { tasks.recv_timeout(left).ok() };
        }
        if !jobs.is_empty() {
            shared.commit(jobs);
        }
        if let Some((now_unix_ms, reply)) = rewrite.take() {
            // A caller that is gone has nothing to be told.
            drop(reply.send(shared.rewrite(now_unix_ms)));
        }
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
