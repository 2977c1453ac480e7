//! Which models does the machine have, and how do new ones come and go?
//!
//! Owns:  `/data/models`; the wish of what the engine loads.
//! In:    files of the image, of an extra medium and of the owner; uploads. Out: the list, [`Engine::want`].
//! Always: a file is in place under its name only when it is whole, its header was checked and it is on disk; what
//!         an upload left behind is removed, what a pull left waits for its next order.
//! Never:  reads a model's weights. The engine does, in a process that may die.
//! Threads: files are read and written on blocking threads.

mod orders;
mod pins;
mod plan;
mod pull;

pub use pins::configured as configured_pins;
pub use pull::{Dialling, Line, Order as PullOrder, Outside};

use crate::engine::Engine;
use crate::places::Places;
use agentd_console::Upload;
use agentd_domain::api::{Model, ModelName};
use agentd_domain::engine::ModelKind;
use agentd_domain::fault::Report;
use agentd_domain::gguf;
use futures::StreamExt;
use plan::{Found, Named, Origin};
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::AsyncWriteExt;

/// Left free on the data partition, so that stores can still write.
const RESERVE_BYTES: u64 = 64 * 1024 * 1024;

/// All models of the machine. Cheap to clone.
#[derive(Clone)]
pub struct Models(Arc<Inner>);

struct Inner {
    folders: [(Origin, PathBuf); 3],
    data: PathBuf,
    engine: Engine,
    checked: Mutex<HashMap<PathBuf, Checked>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
    /// Names of models that are being pulled.
    pulling: Mutex<BTreeSet<String>>,
    pins: Mutex<pins::Pins>,
}

/// The result of a header check, good while the file is the same.
#[derive(Clone)]
struct Checked {
    bytes: u64,
    changed_ns: i64,
    result: Result<gguf::Summary, Report>,
}

impl Models {
    pub fn new(places: &Places, engine: Engine) -> Self {
        let folders = [
            (Origin::Image, places.builtin_models.clone()),
            (Origin::Medium, places.media_models.clone()),
            (Origin::Data, places.models()),
        ];
        Self(Arc::new(Inner {
            folders,
            data: places.models(),
            engine,
            checked: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            pulling: Mutex::default(),
            pins: Mutex::default(),
        }))
    }

    /// Removes what broken uploads left, looks at all files and tells the engine what to load.
    pub async fn refresh(&self) {
        let this = self.clone();
        let named = tokio::task::spawn_blocking(move || {
            this.sweep();
            this.scan().into_iter().map(|(named, _)| named).collect::<Vec<_>>()
        });
        if let Ok(named) = named.await {
            self.0.engine.want(plan::wanted(&named, &self.pinned()));
        }
    }

    pub async fn list(&self) -> Vec<Model> {
        let this = self.clone();
        let scanned = tokio::task::spawn_blocking(move || this.scan()).await.unwrap_or_default();
        let (view, pinned) = (self.0.engine.view(), self.pinned());
        let show = |(named, checked): (Named, Checked)| {
            let loaded =
                view.models.iter().any(|model| model.model == named.name && model.path == named.found.path);
            let seen = self.0.engine.seen(&named.name);
            let default = match named.found.kind {
                ModelKind::Chat => view.default_chat.as_ref() == Some(&named.name),
                ModelKind::Embedding => named.name == plan::EMBEDDER,
            };
            let problem =
                checked.result.as_ref().err().cloned().or_else(|| view.failed.get(&named.name).cloned());
            Model {
                file: named.found.file,
                bytes: checked.bytes,
                origin: named.found.origin.word().to_owned(),
                architecture: checked.result.map(|summary| summary.architecture).unwrap_or_default(),
                kind: named.found.kind,
                loaded,
                loading: view.loading.as_ref() == Some(&named.name),
                default,
                pinned: pinned.contains(&named.name) || (loaded && named.name == plan::EMBEDDER),
                uses: seen.inside,
                idle_ms: (loaded && seen.inside == 0).then(|| millis(seen.idle)),
                last_used_unix_ms: seen.last_unix_ms,
                load_ms: (!seen.load.is_zero()).then(|| millis(seen.load)),
                held_bytes: None,
                problem,
                name: named.name,
            }
        };
        scanned.into_iter().map(show).collect()
    }

    /// What a model's header says, and what it is for.
    pub async fn header(&self, name: &ModelName) -> Result<(gguf::Summary, ModelKind), Report> {
        let this = self.clone();
        let scanned = tokio::task::spawn_blocking(move || this.scan()).await.unwrap_or_default();
        let found = scanned.into_iter().find(|(named, _)| named.name == name.as_str());
        let Some((named, checked)) = found else {
            let why = format!("there is no model `{name}`");
            return Err(Report::caller(
                "not_found",
                "nothing was planned",
                why,
                "`agentctl model ls` shows the models",
            ));
        };
        Ok((checked.result?, named.found.kind))
    }

    /// Writes an upload to disk, checks it, puts it in place and has it loaded.
    pub async fn add(&self, name: ModelName, upload: Upload) -> Result<Model, Report> {
        let _one = self.0.changing.lock().await;
        self.free_name(&name).await?;
        let part = self.0.data.join(format!("{name}.gguf.part"));
        let whole = self.0.data.join(format!("{name}.gguf"));
        let written = self.receive(&part, upload).await;
        let placed = match written {
            Ok(()) => place(part.clone(), whole).await,
            Err(report) => Err(report),
        };
        if let Err(report) = placed {
            let _ = tokio::fs::remove_file(&part).await;
            return Err(report);
        }
        self.refresh().await;
        self.added(&name).await
    }

    /// Fetches a model, checks it, puts it in place and has it loaded. What has come stays when it breaks off, and the
    /// same order goes on from there.
    pub async fn pull(
        &self,
        outside: &dyn Outside,
        name: &ModelName,
        order: &PullOrder,
        progress: &(dyn Fn(u64, Option<u64>) + Send + Sync),
    ) -> Result<Model, Report> {
        let _alone = Pulling::begin(&self.0, name)?;
        self.free_name(name).await?;
        let part = self.part_of(name);
        let room_bytes = crate::readings::disk(&self.0.data).available_bytes.saturating_sub(RESERVE_BYTES);
        let there = tokio::fs::metadata(&part).await.map_or(0, |data| data.len());
        let of = pull::Place { file: part.clone(), room_bytes: room_bytes.saturating_add(there) };
        let sum = pull::pull(outside, order, &of, progress).await?;
        let _one = self.0.changing.lock().await;
        self.free_name(name).await?;
        let placed = place(part, self.0.data.join(format!("{name}.gguf"))).await;
        // Whether it has a name now or is no model: nothing of it is taken up again.
        of.clear().await;
        placed?;
        tracing::info!(model = %name, sha256 = %hex::encode(sum), "a model was pulled");
        self.refresh().await;
        self.added(name).await
    }

    /// What has come of a model that is being pulled. Its ending is neither a model's nor an upload's.
    fn part_of(&self, name: &ModelName) -> PathBuf {
        self.0.data.join(format!("{name}.gguf.pull"))
    }

    async fn free_name(&self, name: &ModelName) -> Result<(), Report> {
        if !self.list().await.iter().any(|model| model.name == name.as_str()) {
            return Ok(());
        }
        Err(Report::caller(
            "conflict",
            "the model was not added",
            format!("there is a model `{name}` already"),
            "choose another name, or remove the other first (`agentctl model rm NAME`)",
        ))
    }

    async fn added(&self, name: &ModelName) -> Result<Model, Report> {
        let added = self.list().await.into_iter().find(|model| model.name == name.as_str());
        added.ok_or_else(|| {
            let what = "the model was not added";
            Report::environment("model_vanished", what, "its file is gone", "add it again")
        })
    }

    /// Removes what has come of a pull that broke off; false when there is none.
    async fn forget_pull(&self, name: &ModelName) -> Result<bool, Report> {
        let _alone = Pulling::begin(&self.0, name)?;
        let part = self.part_of(name);
        if !tokio::fs::try_exists(&part).await.unwrap_or(false) {
            return Ok(false);
        }
        pull::Place { file: part, room_bytes: 0 }.clear().await;
        Ok(true)
    }

    pub async fn remove(&self, name: ModelName) -> Result<(), Report> {
        let _one = self.0.changing.lock().await;
        let what = "the model was not removed";
        let model = self.list().await.into_iter().find(|model| model.name == name.as_str());
        if model.is_none() && self.forget_pull(&name).await? {
            return Ok(());
        }
        let Some(model) = model else {
            let why = format!("there is no model `{name}`");
            return Err(Report::caller("not_found", what, why, "`agentctl model ls` shows the models"));
        };
        if model.origin != Origin::Data.word() {
            return Err(Report::caller(
                "conflict",
                what,
                format!("`{name}` belongs to the {}", model.origin),
                "only models that were added can be removed",
            ));
        }
        let folder = self.0.data.clone();
        let removed = tokio::task::spawn_blocking(move || {
            fs::remove_file(folder.join(&model.file))?;
            File::open(&folder)?.sync_all()
        });
        removed.await.map_err(io::Error::other).flatten().map_err(|error| disk_report(what, &error))?;
        self.refresh().await;
        Ok(())
    }

    async fn receive(&self, part: &Path, mut upload: Upload) -> Result<(), Report> {
        let what = "the model was not added";
        let room_bytes = crate::readings::disk(&self.0.data).available_bytes.saturating_sub(RESERVE_BYTES);
        if upload.length_bytes.is_some_and(|length| length > room_bytes) {
            return Err(no_room(room_bytes));
        }
        let failed = |error: io::Error| disk_report(what, &error);
        let mut file = tokio::fs::File::create(part).await.map_err(failed)?;
        let mut taken_bytes = 0u64;
        while let Some(piece) = upload.pieces.next().await {
            let piece = piece.map_err(|error| broken_off(taken_bytes, &error))?;
            taken_bytes += piece.len() as u64;
            if taken_bytes > room_bytes {
                return Err(no_room(room_bytes));
            }
            file.write_all(&piece).await.map_err(failed)?;
        }
        if upload.length_bytes.is_some_and(|length| length != taken_bytes) {
            return Err(broken_off(taken_bytes, &io::ErrorKind::UnexpectedEof.into()));
        }
        file.flush().await.map_err(failed)?;
        file.sync_all().await.map_err(failed)
    }

    fn sweep(&self) {
        let entries = fs::read_dir(&self.0.data).into_iter().flatten().flatten();
        for path in
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "part"))
        {
            let removed = fs::remove_file(&path);
            tracing::info!(path = %path.display(), ok = removed.is_ok(), "what a broken upload left is removed");
        }
    }

    fn scan(&self) -> Vec<(Named, Checked)> {
        let mut files = Vec::new();
        let mut results = HashMap::new();
        for (origin, folder) in &self.0.folders {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_model =
                    path.extension().is_some_and(|extension| extension == "gguf") && path.is_file();
                let (Some(file), true) = (path.file_name().and_then(|name| name.to_str()), is_model) else {
                    continue;
                };
                let checked = self.check(&path, file);
                let kind = checked.result.as_ref().map_or(ModelKind::Chat, gguf::Summary::kind);
                let text = path.to_string_lossy().into_owned();
                files.push(Found {
                    origin: *origin,
                    path: text.clone(),
                    file: file.to_owned(),
                    kind,
                    good: checked.result.is_ok(),
                });
                results.insert(text, checked);
            }
        }
        let named = plan::name(files).into_iter();
        named.filter_map(|named| results.remove(&named.found.path).map(|checked| (named, checked))).collect()
    }

    fn check(&self, path: &Path, shown: &str) -> Checked {
        let metadata = fs::metadata(path);
        let (bytes, changed_ns) =
            metadata.map_or((0, 0), |m| (m.len(), m.mtime() * 1_000_000_000 + m.mtime_nsec()));
        let mut known = self.0.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(checked) = known.get(path).filter(|c| c.bytes == bytes && c.changed_ns == changed_ns) {
            return checked.clone();
        }
        let checked = Checked { bytes, changed_ns, result: check_file(path, shown) };
        known.insert(path.to_owned(), checked.clone());
        checked
    }
}

/// One pull of a name at a time.
struct Pulling<'a> {
    of: &'a Inner,
    name: String,
}

impl<'a> Pulling<'a> {
    fn begin(of: &'a Inner, name: &ModelName) -> Result<Self, Report> {
        let name = name.as_str().to_owned();
        if of.pulling.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
            return Ok(Self { of, name });
        }
        let why = format!("`{name}` is being pulled");
        Err(Report::caller("conflict", "nothing was done", why, "wait for it, or end the other order"))
    }
}

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.of.pulling.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn check_file(path: &Path, shown: &str) -> Result<gguf::Summary, Report> {
    let unreadable = |why: String| gguf::GgufError::Unreadable { at: 0, why }.report(shown);
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let bytes = file.metadata().map_err(|error| unreadable(error.to_string()))?.len();
    let mut read_at =
        |at: u64, into: &mut [u8]| file.read_exact_at(into, at).map_err(|error| error.to_string());
    gguf::check(bytes, &mut read_at).map_err(|error| error.report(shown))
}

/// Checks the whole file's header, then gives it its name. On disk when this returns.
async fn place(part: PathBuf, whole: PathBuf) -> Result<(), Report> {
    let work = move || {
        let shown = whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        check_file(&part, &shown)?;
        let placed = || -> io::Result<()> {
            // The engine has a uid of its own.
            fs::set_permissions(&part, fs::Permissions::from_mode(0o644))?;
            fs::rename(&part, &whole)?;
            File::open(whole.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        placed().map_err(|error| disk_report("the model was not added", &error))
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(Report::bug("thread_lost", "the model was not added", error.to_string(), "try again"))
        }
    }
}

fn disk_report(what: &str, error: &io::Error) -> Report {
    if error.kind() == io::ErrorKind::StorageFull {
        return no_room(0);
    }
    Report::environment(
        "models_not_written",
        what,
        error.to_string(),
        "see the data partition's state on the local console",
    )
}

fn no_room(room_bytes: u64) -> Report {
    Report::environment(
        "disk_full",
        "the model was not added",
        format!("{} MiB are free for models on the data partition", room_bytes / (1024 * 1024)),
        "remove a model with `agentctl model rm NAME`, or use a larger disk",
    )
}

fn broken_off(taken_bytes: u64, error: &io::Error) -> Report {
    Report::caller(
        "upload_incomplete",
        "the model was not added",
        format!("the upload ended after {taken_bytes} bytes: {error}"),
        "add it again; nothing of it was kept",
    )
}

#[cfg(test)]
mod tests;
