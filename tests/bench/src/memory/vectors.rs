//! What vectors has the appliance's own embedder for these texts, and what do they cost?
//!
//! Owns:   an engine's process while texts are missing, and one file per embedder below the build cache: a vector is
//!         made once. The file is append-only, `SHA-256 of the text, tokens (u32), dimension numbers (f32)` each,
//!         little-endian; a torn end is cut off.
//! Never:  a text in that file; LoCoMo's licence forbids to pass it on.

use agentd_domain::engine::{
    ClientFrame, Event, LoadModel, ModelKind, PROTOCOL_VERSION, Request, ServerFrame,
};
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// all-MiniLM-L6-v2's.
pub const DIMENSION: usize = 384;
const ROW_BYTES: usize = 32 + 4 + 4 * DIMENSION;
/// In one request: large enough that the engine fills its batches.
const BATCH: usize = 64;
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

type Key = [u8; 32];

/// Vectors by text.
pub struct Vectors {
    known: HashMap<Key, (u32, Vec<f32>)>,
    file: PathBuf,
    engine: PathBuf,
    model: PathBuf,
    /// What was made in this run: tokens, and how long that took.
    pub made_tokens: u64,
    pub made_in: Duration,
}

impl Vectors {
    /// What is in the cache for this model. `engine` is started when something is missing.
    pub fn open(cache: &Path, engine: PathBuf, model: PathBuf) -> Result<Self> {
        let bytes = fs::read(&model).with_context(|| model.display().to_string())?;
        let digest = hex::encode(Sha256::digest(&bytes));
        let file = cache.join("bench-vectors").join(format!("{}.f32", &digest[..16]));
        let mut known = HashMap::new();
        if file.exists() {
            let bytes = fs::read(&file)?;
            for row in bytes.chunks_exact(ROW_BYTES) {
                let (key, rest) = row.split_first_chunk::<32>().context("a row")?;
                let (tokens, rest) = rest.split_first_chunk::<4>().context("a row")?;
                let number = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                let vector = rest.chunks_exact(4).map(number).collect();
                known.insert(*key, (u32::from_le_bytes(*tokens), vector));
            }
            let whole = bytes.len() / ROW_BYTES * ROW_BYTES;
            OpenOptions::new().write(true).open(&file)?.set_len(whole as u64)?;
        }
        Ok(Self { known, file, engine, model, made_tokens: 0, made_in: Duration::ZERO })
    }

    /// Makes what is not there yet.
    pub fn ensure<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let mut missing: Vec<&str> =
            texts.into_iter().filter(|text| !self.known.contains_key(&key(text))).collect();
        missing.sort_unstable();
        missing.dedup();
        if missing.is_empty() {
            return Ok(());
        }
        // Texts of like length in one batch waste no padding.
        missing.sort_by_key(|text| text.len());
        println!("embedding {} texts; their vectors are kept in {}", missing.len(), self.file.display());
        let mut engine = Engine::start(&self.engine, &self.model)?;
        fs::create_dir_all(self.file.parent().context("a folder")?)?;
        let mut file = OpenOptions::new().create(true).append(true).open(&self.file)?;
        for batch in missing.chunks(BATCH) {
            let begun = Instant::now();
            let vectors = engine.embed(batch)?;
            self.made_in += begun.elapsed();
            for (text, vector) in batch.iter().zip(vectors) {
                let tokens = engine.tokens(text)?;
                self.made_tokens += u64::from(tokens);
                let mut row = key(text).to_vec();
                row.extend_from_slice(&tokens.to_le_bytes());
                row.extend(vector.iter().flat_map(|number| number.to_le_bytes()));
                file.write_all(&row)?;
                self.known.insert(key(text), (tokens, vector));
            }
        }
        Ok(())
    }

    pub fn of(&self, text: &str) -> Result<&[f32]> {
        Ok(&self.known.get(&key(text)).context("a text without a vector")?.1)
    }

    /// How many tokens of the embedder the text has.
    pub fn tokens(&self, text: &str) -> Result<u32> {
        Ok(self.known.get(&key(text)).context("a text without a vector")?.0)
    }
}

fn key(text: &str) -> Key {
    Sha256::digest(text.as_bytes()).into()
}

/// The appliance's engine with the embedder; ends when dropped.
pub(super) struct Engine {
    process: Child,
    stream: UnixStream,
    next_id: u64,
    _folder: tempfile::TempDir,
}

const MODEL: &str = "embedder";

impl Engine {
    pub(super) fn start(program: &Path, model: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("engine.sock");
        let backends = program.parent().context("the engine's folder")?.join("backends");
        let mut command = Command::new(program);
        command.arg("--listen").arg(&socket).arg("--backends").arg(backends);
        let mut process = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let mut lines = BufReader::new(process.stderr.take().context("a pipe")?);
        let mut seen = String::new();
        while !seen.contains("engine ready") {
            ensure!(lines.read_line(&mut seen)? > 0, "the engine ended before it was ready:\n{seen}");
        }
        // Nobody reads on, but its pipe must not fill.
        std::thread::spawn(move || lines.lines().map_while(Result::ok).for_each(drop));
        let stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let mut engine = Self { process, stream, next_id: 1, _folder: folder };
        engine.ask(Request::Hello { version: PROTOCOL_VERSION })?;
        let path = model.to_str().context("a plain path")?.to_owned();
        let kind = ModelKind::Embedding;
        engine.ask(Request::Load(LoadModel {
            model: MODEL.to_owned(),
            path,
            kind,
            context_tokens: 0,
            sequences: 0,
            placement: None,
        }))?;
        Ok(engine)
    }

    pub(super) fn embed(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let inputs = texts.iter().map(|text| (*text).to_owned()).collect();
        match self.ask(Request::Embed { model: MODEL.to_owned(), inputs })? {
            Event::Embeddings { vectors, .. } => {
                ensure!(vectors.len() == texts.len(), "{} vectors for {}", vectors.len(), texts.len());
                ensure!(vectors.iter().all(|vector| vector.len() == DIMENSION), "another dimension");
                Ok(vectors)
            }
            other => bail!("expected vectors, got {other:?}"),
        }
    }

    pub(super) fn tokens(&mut self, text: &str) -> Result<u32> {
        match self.ask(Request::Tokenize { model: MODEL.to_owned(), text: text.to_owned() })? {
            Event::Tokens { tokens } => Ok(u32::try_from(tokens.len())?),
            other => bail!("expected tokens, got {other:?}"),
        }
    }

    fn ask(&mut self, body: Request) -> Result<Event> {
        let id = self.next_id;
        self.next_id += 1;
        let frame = serde_json::to_vec(&ClientFrame { id, body })?;
        self.stream.write_all(&u32::try_from(frame.len())?.to_le_bytes())?;
        self.stream.write_all(&frame)?;
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut answer)?;
        let answer: ServerFrame = serde_json::from_slice(&answer)?;
        match answer.body {
            Event::Error(report) => bail!("the engine: {report:?}"),
            event => Ok(event),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
