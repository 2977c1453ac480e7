//! The agent's side of a connection: its unread bytes, and what it is told.

use super::meter::Stop;
use crate::budget::CHUNK_BYTES;
use crate::ending::Prefixed;
use crate::http1::{HEAD_MAX_BYTES, HeadError};
use crate::name::Destination;
use crate::refusal::{Refusal, Waiting};
use crate::socks5::{self, SocksError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

/// A yes or no is one packet; who does not take it in this time does not want it.
const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// In which language the agent is told yes or no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Http,
    Socks,
    /// A caught connection has no language: it is closed.
    Nothing,
}

pub(super) struct Client<S> {
    pub(super) read: ReadHalf<S>,
    pub(super) write: WriteHalf<S>,
    /// Read and not yet used.
    pub(super) unread: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(super) fn new(stream: S) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self { read, write, unread: Vec::new() }
    }

    /// The connection as it was, with the bytes that were read and not used.
    pub(super) fn into_stream(self) -> Prefixed<S> {
        Prefixed { unread: self.unread, stream: self.read.unsplit(self.write) }
    }

    /// The next byte, left where it is; nothing when the client is gone.
    pub(super) async fn first_byte(&mut self) -> Option<u8> {
        if self.unread.is_empty() {
            fill(&mut self.read, &mut self.unread).await.ok()?;
        }
        self.unread.first().copied()
    }

    /// Takes a complete head off the unread bytes; `end` finds where it stops, from where it searched last.
    pub(super) async fn head(
        &mut self,
        end: fn(&[u8], usize) -> Result<Option<usize>, HeadError>,
    ) -> Result<Vec<u8>, Stop> {
        let mut searched = 0;
        loop {
            let found = end(&self.unread, searched).map_err(|error| Stop::Refused(Refusal::Head(error)))?;
            if let Some(length) = found {
                return Ok(self.unread.drain(..length).collect());
            }
            searched = self.unread.len();
            if searched > HEAD_MAX_BYTES {
                return Err(Stop::Refused(Refusal::Head(HeadError::TooLarge)));
            }
            fill(&mut self.read, &mut self.unread).await?;
        }
    }

    /// The greeting, its answer, and the request of SOCKS 5.
    pub(super) async fn socks_request(&mut self) -> Result<Destination, Stop> {
        let refused = |error| Stop::Refused(Refusal::Socks(error));
        loop {
            match socks5::greeting(&self.unread) {
                Ok(Some(length)) => {
                    self.unread.drain(..length);
                    break;
                }
                Ok(None) => fill(&mut self.read, &mut self.unread).await?,
                Err(error) => return Err(refused(error)),
            }
        }
        self.write.write_all(&socks5::CHOSEN).await.map_err(|_| Stop::Lost)?;
        self.write.flush().await.map_err(|_| Stop::Lost)?;
        loop {
            match socks5::request(&self.unread) {
                Ok(Some((length, destination))) => {
                    self.unread.drain(..length);
                    return Ok(destination);
                }
                Ok(None) => fill(&mut self.read, &mut self.unread).await?,
                Err(error) => return Err(refused(error)),
            }
        }
    }

    /// Says that the connection is open.
    pub(super) async fn accept(&mut self, reply: Reply) -> Result<(), Stop> {
        let bytes = match reply {
            Reply::Http => b"HTTP/1.1 200 Connection established\r\n\r\n".to_vec(),
            Reply::Socks => socks5::reply(socks5::SUCCEEDED).to_vec(),
            Reply::Nothing => return Ok(()),
        };
        let say = async {
            self.write.write_all(&bytes).await?;
            self.write.flush().await
        };
        match timeout(REPLY_DEADLINE, say).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Stop::Lost),
        }
    }

    /// Says why not, and ends the client's side.
    pub(super) async fn refuse(&mut self, reply: Reply, refusal: &Refusal) {
        let bytes = match (reply, refusal) {
            (Reply::Http, _) => http_refusal(refusal),
            (Reply::Socks, Refusal::Socks(SocksError::Method)) => socks5::NONE_ACCEPTABLE.to_vec(),
            (Reply::Socks, _) => socks5::reply(refusal.socks_reply()).to_vec(),
            (Reply::Nothing, _) => Vec::new(),
        };
        self.last_words(&bytes).await;
    }

    pub(super) async fn last_words(&mut self, bytes: &[u8]) {
        let say = async {
            self.write.write_all(bytes).await?;
            self.write.shutdown().await
        };
        // Nobody listens: the connection ends either way, and the refusal is in the audit.
        let _ = timeout(REPLY_DEADLINE, say).await;
    }
}

/// Reads once, so that `unread` grows; the client being gone is an end.
pub(super) async fn fill<R: AsyncRead + Unpin>(read: &mut R, unread: &mut Vec<u8>) -> Result<(), Stop> {
    let mut chunk = vec![0; CHUNK_BYTES];
    match read.read(&mut chunk).await {
        Ok(0) | Err(_) => Err(Stop::Lost),
        Ok(count) => {
            unread.extend_from_slice(chunk.get(..count).unwrap_or_default());
            Ok(())
        }
    }
}

fn http_refusal(refusal: &Refusal) -> Vec<u8> {
    let report = refusal.report();
    let phrase = match refusal.status() {
        400 => "Bad Request",
        403 => "Forbidden",
        408 => "Request Timeout",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        502 => "Bad Gateway",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Refused",
    };
    let body =
        format!("{}\n  why: {}\n  fix: {}\n  code: {}\n", report.what, report.why, report.fix, report.code);
    let retry = match refusal {
        Refusal::Slow(Waiting::Resolve | Waiting::Dial) => "Retry-After: 5\r\n",
        _ => "",
    };
    format!(
        "HTTP/1.1 {} {phrase}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n{retry}Connection: close\r\n\r\n{body}",
        refusal.status(),
        body.len(),
    )
    .into_bytes()
}
