//! One HTTP request to the host and its answer back, each written anew.
//!
//! Both directions run at once: a host may answer before it has read the whole body.

use super::client::{Client, fill};
use super::meter::{Meter, Stop};
use crate::budget::CHUNK_BYTES;
use crate::http1::{self, Body, HeadError, Length, Piece, Request, Strictness, Version};
use crate::refusal::{Refusal, clip};
use crate::relay::Filled;
use crate::secret::{self, Scrubber};
use std::future::Future;
use std::pin::pin;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};

/// What may follow on the agent's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Request,
    Nothing,
}

pub(super) async fn exchange<S, H>(
    client: &mut Client<S>,
    host: H,
    filled: Filled<'_>,
    meter: &Meter,
    guard: impl Future<Output = Stop>,
) -> Result<Next, Stop>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: AsyncRead + AsyncWrite + Unpin,
{
    let (host_read, mut host_write) = split(host);
    let request = &*filled.request;
    let scrubber = Scrubber::new(filled.secret.as_ref());
    let (read, write, unread) = (&mut client.read, &mut client.write, &mut client.unread);
    let mut up = pin!(upload(read, unread, &mut host_write, request, meter));
    let mut down = pin!(download(host_read, write, request, scrubber, meter));
    let mut guard = pin!(guard);
    // Whether the whole request has left; nothing while it is on its way.
    let mut sent = None;
    loop {
        tokio::select! {
            result = &mut up, if sent.is_none() => match result {
                Ok(()) => sent = Some(true),
                // The host has stopped reading; it may still say why.
                Err(Stop::HostLost) => sent = Some(false),
                Err(stop) => return Err(stop),
            },
            answered = &mut down => {
                let next = answered?;
                return Ok(if sent == Some(true) { next } else { Next::Nothing });
            }
            stop = &mut guard => return Err(stop),
        }
    }
}

async fn upload<R, W>(
    read: &mut R,
    unread: &mut Vec<u8>,
    host: &mut WriteHalf<W>,
    request: &Request,
    meter: &Meter,
) -> Result<(), Stop>
where
    R: AsyncRead + Unpin,
    W: AsyncRead + AsyncWrite + Unpin,
{
    meter.write(host, &request.to_host()).await?;
    let chunked = request.body == Length::Chunked;
    let mut body = Body::new(request.body, Strictness::Request);
    loop {
        match body.next(unread).map_err(|error| Stop::Refused(Refusal::Head(error)))? {
            Piece::Content(count) => {
                let content: Vec<u8> = unread.drain(..count).collect();
                meter.write(host, &frame(content, chunked)).await?;
            }
            Piece::Framing(count) => drop(unread.drain(..count)),
            Piece::More => fill(read, unread).await?,
            Piece::Done if chunked => return meter.write(host, LAST_CHUNK).await,
            Piece::Done => return Ok(()),
        }
    }
}

async fn download<H, W>(
    mut host: ReadHalf<H>,
    write: &mut W,
    request: &Request,
    mut scrubber: Scrubber<'_>,
    meter: &Meter,
) -> Result<Next, Stop>
where
    H: AsyncRead + AsyncWrite + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut unread = Vec::new();
    let broken = |error| Stop::Refused(Refusal::Answer(error));
    let response = loop {
        let head = read_head(&mut host, &mut unread, meter).await?;
        let mut response = http1::parse_response(&head, &request.method).map_err(broken)?;
        scrubber.head(&mut response);
        if response.status >= 200 {
            break response;
        }
        // 100 Continue and 103 Early Hints are for clients that know HTTP/1.1 (RFC 9110, 15.2).
        if request.version == Version::Http11 {
            meter.set_answered();
            say(write, &response.to_agent(true, request.version), meter).await?;
        }
    };
    if let (true, Some(coding)) = (scrubber.looks(), secret::coding(&response)) {
        return Err(Stop::Refused(Refusal::Coded { coding: clip(&coding) }));
    }
    let keep_alive = request.keep_alive && response.body != Length::UntilClose;
    let chunked = response.body == Length::Chunked && request.version == Version::Http11;
    meter.set_answered();
    say(write, &response.to_agent(keep_alive, request.version), meter).await?;
    let mut body = Body::new(response.body, Strictness::Answer);
    let mut buffer = Box::new([0; CHUNK_BYTES]);
    loop {
        match body.next(&unread).map_err(broken)? {
            Piece::Content(count) => {
                let content = scrubber.piece(unread.drain(..count).collect());
                say(write, &frame(content, chunked), meter).await?;
            }
            Piece::Framing(count) => drop(unread.drain(..count)),
            Piece::Done => break,
            Piece::More => match meter.read(&mut host, &mut buffer).await? {
                0 if body.may_end_here() => break,
                0 => return Err(Stop::HostLost),
                count => unread.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            },
        }
    }
    let held = scrubber.rest();
    say(write, &frame(held, chunked), meter).await?;
    if chunked {
        say(write, LAST_CHUNK, meter).await?;
    }
    if keep_alive {
        return Ok(Next::Request);
    }
    write.shutdown().await.map_err(|_| Stop::Lost)?;
    Ok(Next::Nothing)
}

async fn read_head<H: AsyncRead + Unpin>(
    host: &mut H,
    unread: &mut Vec<u8>,
    meter: &Meter,
) -> Result<Vec<u8>, Stop> {
    let broken = |error| Stop::Refused(Refusal::Answer(error));
    let mut buffer = Box::new([0; CHUNK_BYTES]);
    let mut searched = 0;
    loop {
        if let Some(length) = http1::head_end(unread, searched).map_err(broken)? {
            return Ok(unread.drain(..length).collect());
        }
        searched = unread.len();
        match meter.read(host, &mut buffer).await {
            Ok(0) | Err(Stop::HostLost) => return Err(broken(HeadError::Truncated)),
            Err(stop) => return Err(stop),
            Ok(count) => unread.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

fn frame(content: Vec<u8>, chunked: bool) -> Vec<u8> {
    // An empty chunk would be the last one.
    if !chunked || content.is_empty() {
        return content;
    }
    let mut framed = format!("{:x}\r\n", content.len()).into_bytes();
    framed.extend_from_slice(&content);
    framed.extend_from_slice(b"\r\n");
    framed
}

async fn say<W: AsyncWrite + Unpin>(write: &mut W, bytes: &[u8], meter: &Meter) -> Result<(), Stop> {
    write.write_all(bytes).await.map_err(|_| Stop::Lost)?;
    write.flush().await.map_err(|_| Stop::Lost)?;
    meter.moved();
    Ok(())
}
