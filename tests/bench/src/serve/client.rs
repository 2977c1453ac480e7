//! One request to an OpenAI-compatible server, and when each of its tokens came.
//!
//! HTTP/1.1 over TCP or a Unix socket, one connection per request, with std alone: a client that takes processor time
//! would measure itself. Or the engine's own frames, for what agentd's front does not offer (a priority): then the
//! words of the row say so. Always: every wait has a limit, and what went wrong is a value.
//! Source: RFC 9112 (chunks); the SSE lines of OpenAI's streams; `agentd_domain::engine`.

use agentd_domain::engine::PROTOCOL_VERSION;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A prompt of 8,000 tokens behind others takes minutes on two cores.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
pub enum Place {
    Tcp(SocketAddr),
    /// The agent's own socket: who asks is known by it.
    Unix(PathBuf),
    /// Past agentd: the engine's socket, a model's name there, and the share of who asks.
    Engine {
        socket: PathBuf,
        model: String,
        share: Value,
    },
}

#[derive(Debug, Clone)]
pub struct Ask {
    pub place: Place,
    pub prompt: String,
    pub max_tokens: u32,
    /// Added to the body.
    pub extra: Value,
    /// Waited before it is sent: what an agent does between two requests.
    pub think: Duration,
    /// Counted among those who speak, from its first word.
    pub speaks: Option<Arc<Speakers>>,
    /// Waits until so many speak, before it thinks.
    pub after: Option<(Arc<Speakers>, u32)>,
}

/// How many have begun to be answered.
#[derive(Debug, Default)]
pub struct Speakers {
    count: Mutex<u32>,
    more: Condvar,
}

impl Speakers {
    fn begin(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.more.notify_all();
    }

    fn wait(&self, most: u32) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.more.wait_timeout_while(count, PATIENCE, |count| *count < most));
    }
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Told {
    pub sent: Instant,
    /// Of each piece of text, in order.
    pub pieces: Vec<Instant>,
    pub ended: Instant,
    pub text: String,
    pub usage: Usage,
    /// The server's words, or what broke.
    pub failed: Option<String>,
}

/// As the server counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Of the prompt's tokens those that were not computed for it; absent when the server does not say.
    pub cached_tokens: Option<u64>,
}

impl Usage {
    fn of(usage: &Value, cached: &Value) -> Self {
        Self {
            prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            completion_tokens: usage["completion_tokens"].as_u64().unwrap_or(0),
            cached_tokens: cached.as_u64(),
        }
    }
}

impl Ask {
    pub fn new(place: &Place, prompt: String, max_tokens: u32) -> Self {
        Self {
            place: place.clone(),
            prompt,
            max_tokens,
            extra: Value::Null,
            think: Duration::ZERO,
            speaks: None,
            after: None,
        }
    }

    pub fn run(&self) -> Told {
        if let Some((speakers, count)) = &self.after {
            speakers.wait(*count);
        }
        std::thread::sleep(self.think);
        let sent = Instant::now();
        let mut told = Told {
            sent,
            pieces: Vec::new(),
            ended: sent,
            text: String::new(),
            usage: Usage::default(),
            failed: None,
        };
        let answered = match &self.place {
            Place::Engine { socket, model, share } => self.frames(socket, model, share, &mut told),
            Place::Tcp(_) | Place::Unix(_) => self.stream(&mut told),
        };
        if let Err(error) = answered {
            told.failed = Some(error.to_string());
        }
        // Who failed without a word keeps nobody waiting.
        if told.pieces.is_empty() {
            self.began();
        }
        told.ended = Instant::now();
        told
    }

    fn began(&self) {
        if let Some(speakers) = &self.speaks {
            speakers.begin();
        }
    }

    fn piece(&self, told: &mut Told, text: &str, now: Instant) {
        if told.pieces.is_empty() {
            self.began();
        }
        told.pieces.push(now);
        told.text.push_str(text);
    }

    fn body(&self) -> Value {
        // `ignore_eos` is llama-server's; agentd tolerates what it does not know, and seeded models never end.
        let mut body = json!({
            "model": "default", "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0,
            "stream": true, "stream_options": { "include_usage": true }, "ignore_eos": true,
        });
        if let (Some(body), Some(extra)) = (body.as_object_mut(), self.extra.as_object()) {
            body.extend(extra.clone());
        }
        body
    }

    /// The same request in the engine's own frames, as JSON: a share is passed on as it is.
    fn frames(&self, socket: &Path, model: &str, share: &Value, told: &mut Told) -> io::Result<()> {
        static KEYS: AtomicU64 = AtomicU64::new(0);
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let key = format!("bench-{}-{}", std::process::id(), KEYS.fetch_add(1, Ordering::Relaxed));
        let hello = json!({ "type": "hello", "version": PROTOCOL_VERSION });
        let generate = json!({ "type": "generate", "model": model, "key": key, "prompt": { "text": self.prompt },
            "sampling": { "temperature": 0.0 }, "max_tokens": self.max_tokens, "share": share });
        for body in [hello, generate] {
            let frame = json!({ "id": 1, "body": body }).to_string();
            let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_le_bytes(), frame.as_bytes()].concat())?;
        }
        loop {
            let mut length = [0; 4];
            stream.read_exact(&mut length)?;
            let mut frame = vec![0; u32::from_le_bytes(length) as usize];
            stream.read_exact(&mut frame)?;
            let now = Instant::now();
            let frame: Value = serde_json::from_slice(&frame)?;
            let body = &frame["body"];
            match body["type"].as_str() {
                Some("piece") => {
                    self.piece(told, body["text"].as_str().unwrap_or_default(), now);
                }
                Some("done") => {
                    told.usage = Usage::of(body, &body["cached_tokens"]);
                    return Ok(());
                }
                Some("error") => return Err(broken(&body.to_string())),
                _ => {}
            }
        }
    }

    fn stream(&self, told: &mut Told) -> io::Result<()> {
        let mut reader = post(&self.place, "/v1/completions", &self.body())?;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Err(broken("the stream ended without [DONE]"));
            }
            let Some(data) = line.strip_prefix("data: ").map(str::trim_end) else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            self.take(told, data, Instant::now())?;
        }
    }

    fn take(&self, told: &mut Told, data: &str, now: Instant) -> io::Result<()> {
        let chunk: Value = serde_json::from_str(data)?;
        if let Some(error) = chunk.get("error") {
            return Err(broken(error.get("message").and_then(Value::as_str).unwrap_or(data)));
        }
        let text = chunk["choices"][0]["text"].as_str().unwrap_or_default();
        if !text.is_empty() {
            self.piece(told, text, now);
        }
        if let Some(usage) = chunk.get("usage").filter(|usage| usage.is_object()) {
            told.usage = Usage::of(usage, &usage["prompt_tokens_details"]["cached_tokens"]);
        }
        Ok(())
    }
}

impl Told {
    /// Milliseconds to the first text; absent when there was none.
    pub fn first_ms(&self) -> Option<f64> {
        self.pieces.first().map(|at| (*at - self.sent).as_secs_f64() * 1000.0)
    }

    /// Milliseconds between pieces.
    pub fn gaps_ms(&self) -> impl Iterator<Item = f64> + '_ {
        self.pieces.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1000.0)
    }
}

/// The body of an answer whose status is 200.
pub fn post(place: &Place, path: &str, body: &Value) -> io::Result<BufReader<Body>> {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    request(place, &head, body.as_bytes())
}

pub fn get(place: &Place, path: &str) -> io::Result<Value> {
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let mut text = String::new();
    request(place, &head, &[])?.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

fn request(place: &Place, head: &str, body: &[u8]) -> io::Result<BufReader<Body>> {
    let mut stream: Box<dyn Connection> = match place {
        Place::Tcp(address) => {
            let stream = TcpStream::connect_timeout(address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Box::new(stream)
        }
        Place::Unix(path) | Place::Engine { socket: path, .. } => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Box::new(stream)
        }
    };
    // In one write where it fits, as clients do.
    let mut whole = head.as_bytes().to_vec();
    whole.extend(body);
    stream.write_all(&whole)?;
    let mut body = Body::of(BufReader::new(stream))?;
    if body.status == 200 {
        return Ok(BufReader::new(body));
    }
    let mut said = String::new();
    let _ = (&mut body).take(4096).read_to_string(&mut said);
    Err(broken(&format!("status {}: {}", body.status, said.trim())))
}

trait Connection: Read + Write + Send {}
impl<T: Read + Write + Send> Connection for T {}

/// An answer's body without its chunks' frames.
pub struct Body {
    stream: BufReader<Box<dyn Connection>>,
    status: u16,
    left: Left,
}

/// How much of it is still to come.
enum Left {
    UntilClosed,
    Bytes(u64),
    /// Of the current chunk.
    Chunk(u64),
    Nothing,
}

impl Body {
    fn of(mut stream: BufReader<Box<dyn Connection>>) -> io::Result<Self> {
        let first = line(&mut stream)?;
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| broken(&format!("no status in {first:?}")))?;
        let mut left = Left::UntilClosed;
        loop {
            let header = line(&mut stream)?.to_ascii_lowercase();
            if header.is_empty() {
                return Ok(Self { stream, status, left });
            }
            if let Some(length) = header.strip_prefix("content-length:") {
                left = Left::Bytes(length.trim().parse().map_err(|_| broken(&header))?);
            } else if header.starts_with("transfer-encoding:") && header.contains("chunked") {
                left = Left::Chunk(0);
            }
        }
    }
}

impl Read for Body {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Left::Chunk(0) = self.left {
            let mut size = line(&mut self.stream)?;
            // The break after the chunk before.
            if size.is_empty() {
                size = line(&mut self.stream)?;
            }
            let digits = size.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(digits, 16).map_err(|_| broken(&format!("no chunk: {size:?}")))?;
            self.left = if size == 0 { Left::Nothing } else { Left::Chunk(size) };
        }
        match &mut self.left {
            Left::Nothing => Ok(0),
            Left::UntilClosed => self.stream.read(into),
            Left::Bytes(left) | Left::Chunk(left) => {
                let most = into.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                let count = self.stream.read(&mut into[..most])?;
                *left -= count as u64;
                Ok(count)
            }
        }
    }
}

fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Err(broken("the connection was closed"));
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn broken(why: &str) -> io::Error {
    io::Error::other(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server that says this once.
    fn serve(answer: &'static [u8]) -> Place {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place::Tcp(listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(answer).unwrap();
        });
        place
    }

    #[test]
    fn a_stream_is_read_across_the_edges_of_its_chunks() {
        let place = serve(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
              1e\r\ndata: {\"choices\":[{\"text\":\"a\"}\r\n\
              4\r\n]}\n\n\r\n\
              20\r\ndata: {\"choices\":[{\"text\":\"b\"}]}\r\n2\r\n\n\n\r\n\
              74\r\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\
              \"prompt_tokens_details\":{\"cached_tokens\":3}}}\n\n\r\n\
              e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
        );
        let told = Ask::new(&place, "x".to_owned(), 2).run();
        assert_eq!(told.failed, None);
        assert_eq!((told.text.as_str(), told.pieces.len(), told.gaps_ms().count()), ("ab", 2, 1));
        let usage = Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: Some(3) };
        assert_eq!(told.usage, usage);
    }

    #[test]
    fn what_a_server_refuses_or_breaks_off_is_a_failure() {
        let refused = serve(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy");
        assert_eq!(Ask::new(&refused, String::new(), 1).run().failed.as_deref(), Some("status 429: busy"));
        let midway = serve(
            b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"error\":{\"message\":\"full\"}}\n\n",
        );
        let told = Ask::new(&midway, String::new(), 1).run();
        assert_eq!((told.failed.as_deref(), told.text.as_str()), (Some("full"), "a"));
        let cut = serve(b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\":[{\"text\":\"a\"}]}\n\n");
        assert!(Ask::new(&cut, String::new(), 1).run().failed.is_some(), "no end is no answer");
    }
}
