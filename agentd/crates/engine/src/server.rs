//! Who is connected?
//!
//! Two threads per connection: one reads and starts requests, one writes what they answer. A client that stops
//! reading holds up nobody but itself.
//!
//! True: the first frame is `Hello` with our version; a frame that cannot be read ends its connection with the
//! reason; when a connection ends, its generations go on alone.

use crate::engine::Engine;
use crate::generations::Listener;
use crate::wire::{self, WireError};
use agentd_domain::engine::{ClientFrame, Event, PROTOCOL_VERSION, Request, ServerFrame};
use agentd_domain::fault::Report;
use std::io::{BufReader, BufWriter, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// agentd uses a few; the rest is for tools. Each costs two small threads.
const MAX_CONNECTIONS: usize = 64;
/// The id of errors that belong to no request.
const NO_REQUEST: u64 = 0;

/// Serves until the socket fails.
pub(crate) fn serve(listener: &UnixListener, engine: &Arc<Engine>) -> std::io::Error {
    let open = Arc::new(AtomicUsize::new(0));
    let mut next_connection = 0;
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return error,
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            // Dropping the stream tells the client.
            open.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(MAX_CONNECTIONS, "connection refused: too many");
            continue;
        }
        next_connection += 1;
        let (engine, open_here, connection) = (Arc::clone(engine), Arc::clone(&open), next_connection);
        let spawned = std::thread::Builder::new().name("connection".to_owned()).spawn(move || {
            converse(&engine, stream, connection);
            engine.generations.vanished(connection, Instant::now());
            open_here.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            open.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(%error, "no thread for a connection");
        }
    }
}

fn converse(engine: &Arc<Engine>, stream: UnixStream, connection: u64) {
    let Ok(writing) = stream.try_clone() else { return };
    let (outbox, inbox) = channel();
    let writer =
        std::thread::Builder::new().name("writer".to_owned()).spawn(move || write_all(&writing, &inbox));
    let Ok(writer) = writer else { return };
    let listener = |request| Listener { connection, request, outbox: outbox.clone() };
    if let Err(report) = read_all(engine, &stream, listener) {
        listener(NO_REQUEST).send(Event::Error(report));
    }
    engine.generations.vanished(connection, Instant::now());
    // Requests under way still hold the outbox; the writer ends when they and this one are gone, or at once
    // when the client no longer reads.
    drop(outbox);
    let _ = stream.shutdown(Shutdown::Read);
    let _ = writer.join();
}

/// Reads until the client closes. An error is what ended the conversation.
fn read_all(
    engine: &Arc<Engine>,
    stream: &UnixStream,
    listener: impl Fn(u64) -> Listener,
) -> Result<(), Report> {
    let mut reader = BufReader::new(stream);
    let mut greeted = false;
    loop {
        let frame = match wire::read(&mut reader) {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(WireError::Broken(_)) => return Ok(()),
            Err(error) => return Err(refused(&error)),
        };
        let ClientFrame { id, body } = frame;
        match body {
            Request::Hello { version } if !greeted => {
                if version != PROTOCOL_VERSION {
                    return Err(other_version(version));
                }
                greeted = true;
                listener(id).send(engine.hello());
            }
            _ if !greeted => return Err(no_hello()),
            request => engine.handle(request, listener(id)),
        }
    }
}

fn write_all(stream: &UnixStream, inbox: &Receiver<ServerFrame>) {
    let mut writer = BufWriter::new(stream);
    while let Ok(first) = inbox.recv() {
        let mut next = Some(first);
        while let Some(frame) = next {
            if wire::write(&mut writer, &frame).is_err() {
                return;
            }
            next = inbox.try_recv().ok();
        }
        if writer.flush().is_err() {
            return;
        }
    }
}

fn refused(error: &WireError) -> Report {
    let code = if matches!(error, WireError::TooLarge(_)) { "too_large" } else { "frame_wrong" };
    Report::caller(
        code,
        "the connection was closed",
        error.to_string(),
        "send frames as `agentd_domain::engine` describes them",
    )
}

fn other_version(version: u32) -> Report {
    Report::caller(
        "engine_version",
        "the connection was closed",
        format!("the client speaks version {version}, this engine {PROTOCOL_VERSION}"),
        "install agentd and the engine from the same image",
    )
}

fn no_hello() -> Report {
    Report::caller(
        "no_hello",
        "the connection was closed",
        "the first frame was not a hello",
        "say hello first",
    )
}
