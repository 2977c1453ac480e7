//! How does a model come from a server?
//!
//! In:    an address that the owner named, and perhaps what its bytes come to. Out: progress, then a file that is whole.
//! Always: what has come stays beside the models when the line breaks, with what tells whether the server still has the
//!         same file; the same order goes on from there. The whole file is hashed before it gets a name: against the sum
//!         that was given, else against the server's own `.sha256` file, if it has one. Without TLS a sum is required.
//! Never:  half a file under the model's name; a host that `[[egress.private]]` would have to open and does not; more
//!         bytes than are free.
//! Threads: a task of the data plane; hashing blocks a thread of its own.

mod plan;
#[cfg(test)]
mod tests;

use agentd_domain::fault::Report;
use agentd_domain::net::Host;
use axum::body::Body;
use axum::http::{Request, Response, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use plan::{Begun, REDIRECTS_MOST, SIDE_FILE_MOST_BYTES, Source, Take, WHAT};
use sha2::{Digest, Sha256};
use std::future::Future;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// A server that says nothing for so long is given up; what has come is kept.
const SILENCE: Duration = Duration::from_secs(60);
/// How often a broken line is taken up again by itself, as long as something comes between.
const TRIES: u32 = 5;
/// The first pause before that; doubled each time.
const PAUSE: Duration = Duration::from_secs(1);

/// A connection to a host, with TLS inside where it was asked for.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Line for T {}

pub type Dialling<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Line>, Report>> + Send + 'a>>;

/// The way out of the machine.
pub trait Outside: Send + Sync {
    /// Only to an address that the owner's settings let somebody reach.
    fn dial(&self, host: Host, port: u16, tls: bool) -> Dialling<'_>;
}

/// What the owner ordered.
#[derive(Debug, Clone)]
pub struct Order {
    source: Source,
    url: String,
    sha256: Option<[u8; 32]>,
}

impl Order {
    pub fn new(url: &str, sha256: Option<&str>) -> Result<Self, Report> {
        let source = Source::parse(url)?;
        let sha256 = sha256.map(|text| {
            plan::digest(text).ok_or_else(|| {
                let why = "the sum is not 64 hexadecimal letters";
                Report::caller("sha256_malformed", WHAT, why, "copy it from the file's page, or leave it out")
            })
        });
        let sha256 = sha256.transpose()?;
        if !source.tls && sha256.is_none() {
            let why = "without TLS anybody on the way may have changed the file";
            let fix = "name an https address, or say what the file comes to with `--sha256`";
            return Err(Report::caller("sha256_required", WHAT, why, fix));
        }
        Ok(Self { source, url: url.to_owned(), sha256 })
    }
}

/// Where a pull's file is while it grows.
#[derive(Debug, Clone)]
pub struct Place {
    pub file: PathBuf,
    /// Bytes that it may grow to.
    pub room_bytes: u64,
}

impl Place {
    /// What is known of the file beside it.
    fn note(&self) -> PathBuf {
        let mut name = self.file.clone().into_os_string();
        name.push(".json");
        name.into()
    }

    async fn begun(&self) -> Option<Begun> {
        let bytes = tokio::fs::read(self.note()).await.ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    async fn have_bytes(&self) -> u64 {
        tokio::fs::metadata(&self.file).await.map_or(0, |data| data.len())
    }

    /// Removes what has come.
    pub async fn clear(&self) {
        for path in [&self.file, &self.note()] {
            if let Err(error) = tokio::fs::remove_file(path).await
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "what was pulled before was not removed");
            }
        }
    }
}

/// How a pull ended.
enum Broken {
    /// It may go on where it is.
    Line(Report),
    End(Report),
}

impl From<Report> for Broken {
    fn from(report: Report) -> Self {
        Self::End(report)
    }
}

/// Brings the whole file to its place, checked. `progress` is told bytes and, where known, how many there will be.
pub async fn pull(
    outside: &dyn Outside,
    order: &Order,
    place: &Place,
    progress: &(dyn Fn(u64, Option<u64>) + Send + Sync),
) -> Result<[u8; 32], Report> {
    let known = place.begun().await.filter(|begun| begun.url == order.url);
    // Of another file, or one of which nothing tells whether it is still the same.
    let goes_on = known.as_ref().is_some_and(|begun| begun.validator.is_some() || order.sha256.is_some());
    if !goes_on {
        place.clear().await;
    }
    let mut tries = 0;
    loop {
        let before = place.have_bytes().await;
        match fetch(outside, order, place, progress).await {
            Ok(()) => break,
            Err(Broken::End(report)) => return Err(report),
            Err(Broken::Line(report)) => {
                tries = if place.have_bytes().await > before { 0 } else { tries + 1 };
                if tries >= TRIES {
                    return Err(report);
                }
                tracing::info!(problem = %report, "a pull goes on after a pause");
                tokio::time::sleep(PAUSE * 2_u32.pow(tries)).await;
            }
        }
    }
    let expected = match order.sha256 {
        Some(sum) => Some(sum),
        None => side_file(outside, order).await?,
    };
    let file = place.file.clone();
    let hashed = tokio::task::spawn_blocking(move || sha256(&file)).await.map_err(io::Error::other).flatten();
    let sum = hashed.map_err(|error| super::disk_report(WHAT, &error))?;
    if expected.is_some_and(|expected| expected != sum) {
        place.clear().await;
        let why = format!(
            "its bytes come to {}, and should to {}",
            hex::encode(sum),
            hex::encode(expected.unwrap_or_default())
        );
        let fix =
            "the file was changed on its way or at its source: compare the sum with the one its makers give";
        return Err(Report::caller("sha256_differs", WHAT, why, fix));
    }
    Ok(sum)
}

/// One answer of a server, as far as it goes.
async fn fetch(
    outside: &dyn Outside,
    order: &Order,
    place: &Place,
    progress: &(dyn Fn(u64, Option<u64>) + Send + Sync),
) -> Result<(), Broken> {
    let mut source = order.source.clone();
    let mut have_bytes = place.have_bytes().await;
    let validator = place.begun().await.and_then(|begun| begun.validator);
    for _ in 0..=REDIRECTS_MOST + 1 {
        let answer = ask(outside, &source, have_bytes, validator.as_deref()).await?;
        let (total_bytes, append) = match plan::take(answer.status(), answer.headers(), have_bytes) {
            Take::Refused(report) => return Err(report.into()),
            Take::Whole => return Ok(()),
            Take::Again => {
                have_bytes = 0;
                continue;
            }
            Take::SentOn => {
                source = source.sent_on(answer.headers())?;
                continue;
            }
            Take::Append { total_bytes } => (total_bytes, true),
            Take::FromStart { total_bytes } => (total_bytes, false),
        };
        if total_bytes.is_some_and(|total| total > place.room_bytes) {
            return Err(super::no_room(place.room_bytes).into());
        }
        let begun =
            Begun { url: order.url.clone(), validator: plan::validator(answer.headers()), total_bytes };
        return write(answer, place, &begun, append, progress).await;
    }
    let why = format!("the server sent on more than {REDIRECTS_MOST} times");
    Err(Report::environment("redirect_refused", WHAT, why, "name the file's last address").into())
}

async fn write(
    answer: Response<Incoming>,
    place: &Place,
    begun: &Begun,
    append: bool,
    progress: &(dyn Fn(u64, Option<u64>) + Send + Sync),
) -> Result<(), Broken> {
    let failed = |error: io::Error| Broken::End(super::disk_report(WHAT, &error));
    let mut options = tokio::fs::OpenOptions::new();
    options.write(true).create(true).append(append).truncate(!append);
    let mut file = options.open(&place.file).await.map_err(failed)?;
    if !append {
        // After the file was emptied: what is written beside it is never of other bytes.
        let note = serde_json::to_vec(begun).unwrap_or_default();
        tokio::fs::write(place.note(), note).await.map_err(failed)?;
    }
    let mut taken_bytes = if append { place.have_bytes().await } else { 0 };
    let mut body = answer.into_body();
    let ended = loop {
        let frame = match tokio::time::timeout(SILENCE, body.frame()).await {
            Err(_) => break Err(broke_off(taken_bytes, &format!("silent for {} s", SILENCE.as_secs()))),
            Ok(None) => break Ok(()),
            Ok(Some(Err(error))) => break Err(broke_off(taken_bytes, &error.to_string())),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(piece) = frame.into_data() else { continue };
        taken_bytes = taken_bytes.saturating_add(piece.len() as u64);
        if taken_bytes > place.room_bytes || begun.total_bytes.is_some_and(|total| taken_bytes > total) {
            return Err(super::no_room(place.room_bytes).into());
        }
        file.write_all(&piece).await.map_err(failed)?;
        progress(taken_bytes, begun.total_bytes);
    };
    file.flush().await.map_err(failed)?;
    file.sync_all().await.map_err(failed)?;
    ended.map_err(Broken::Line)?;
    match begun.total_bytes {
        Some(total) if total != taken_bytes => Err(Broken::Line(broke_off(taken_bytes, "the line ended"))),
        _ => Ok(()),
    }
}

/// Sends a request for what comes after `have_bytes`, and reads the answer's head.
async fn ask(
    outside: &dyn Outside,
    source: &Source,
    have_bytes: u64,
    validator: Option<&str>,
) -> Result<Response<Incoming>, Broken> {
    let lost = |why: String| {
        let fix = "give the same order again: it goes on where it ended";
        Broken::Line(Report::environment("pull_interrupted", WHAT, format!("{}: {why}", source.host), fix))
    };
    let asked = async {
        let line = outside.dial(source.host.clone(), source.port, source.tls).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(line))
            .await
            .map_err(|error| lost(error.to_string()))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the line of a pull ended");
            }
        });
        let mut request = Request::get(&source.path)
            .header(header::HOST, source.authority())
            .header(header::USER_AGENT, concat!("agentd-os/", env!("CARGO_PKG_VERSION")))
            // Bytes are counted and hashed as they are stored.
            .header(header::ACCEPT_ENCODING, "identity");
        if have_bytes > 0 {
            request = request.header(header::RANGE, format!("bytes={have_bytes}-"));
            if let Some(validator) = validator {
                request = request.header(header::IF_RANGE, validator);
            }
        }
        let request = request.body(Body::empty()).map_err(|error| lost(error.to_string()))?;
        sender.send_request(request).await.map_err(|error| lost(error.to_string()))
    };
    match tokio::time::timeout(SILENCE, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(lost(format!("no answer within {} s", SILENCE.as_secs()))),
    }
}

/// The sum that the server has beside the file; `None` where it has none.
async fn side_file(outside: &dyn Outside, order: &Order) -> Result<Option<[u8; 32]>, Report> {
    let mut source = order.source.side_file();
    for _ in 0..=REDIRECTS_MOST {
        let Ok(answer) = ask(outside, &source, 0, None).await else { return Ok(None) };
        if answer.status().is_redirection() {
            match source.sent_on(answer.headers()) {
                Ok(next) => source = next,
                Err(_) => return Ok(None),
            }
            continue;
        }
        if !answer.status().is_success() {
            return Ok(None);
        }
        let body = Limited::new(answer.into_body(), SIDE_FILE_MOST_BYTES).collect();
        let Ok(Ok(body)) = tokio::time::timeout(SILENCE, body).await else { return Ok(None) };
        // A page in its place, as some servers give for every path, holds no sum.
        return Ok(plan::digest_in(&String::from_utf8_lossy(&body.to_bytes())));
    }
    Ok(None)
}

fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest.finalize().into()),
            count => digest.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

fn broke_off(taken_bytes: u64, why: &str) -> Report {
    let fix = "give the same order again: it goes on where it ended";
    Report::environment("pull_interrupted", WHAT, format!("after {taken_bytes} bytes: {why}"), fix)
}
