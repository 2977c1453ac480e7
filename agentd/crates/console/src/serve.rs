//! How does a request from the network reach the router?
//!
//! Owns:  the accept loop, the TLS handshakes, the limits on connections and their time.
//! In:    a bound listener, a TLS configuration, a router. Out: nothing; it runs until told to stop.
//!
//! A stranger can hold at most one of [`Limits::connections`] places for the time of a handshake and of a
//! request's head, keep an unused one for [`Limits::idle`], and have [`Limits::per_client`] places in all, so that one host cannot use them up. ALPN has
//! decided the protocol before the first byte of HTTP, so nothing is guessed.
//!
//! Bodies are limited where they are read: see `input`.

use crate::guarded::{Guarded, Patience};
use axum::Router;
use axum::body::HttpBody;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

/// Who is asking, as the router sees it; absent in tests that have no connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// One owner with a few browsers and terminals needs a few dozen; each costs some 40 KiB.
    pub connections: usize,
    /// A browser opens six over HTTP/1.1; behind a shared address there may be several people.
    pub per_client: usize,
    pub handshake: Duration,
    /// For a request's head.
    pub head: Duration,
    /// How long a connection without an open request is kept; a browser opens a new one in no time.
    pub idle: Duration,
    pub stalled_write: Duration,
    pub linger: Duration,
    /// What open requests get at shutdown.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            per_client: 96,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(30),
            idle: Duration::from_secs(120),
            stalled_write: Duration::from_secs(60),
            linger: Duration::from_secs(10),
            grace: Duration::from_secs(3),
        }
    }
}

/// Serves until `shutdown` is cancelled, then lets open requests end for [`Limits::grace`].
pub async fn serve_tls(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    router: Router,
    shutdown: CancellationToken,
) {
    serve_tls_with(listener, tls, router, shutdown, Limits::default()).await;
}

pub async fn serve_tls_with(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    router: Router,
    shutdown: CancellationToken,
    limits: Limits,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(limits.connections));
    let clients = Clients::default();
    let tasks = TaskTracker::new();
    // Ends what is still open when the grace is over, and all of it when this future is dropped.
    let cut = CancellationToken::new();
    let _cut_at_end = cut.clone().drop_guard();
    while let Some((place, stream, peer)) = next(&listener, &places, &shutdown).await {
        let Some(client) = clients.enter(peer.ip(), limits.per_client) else { continue };
        let (acceptor, router, shutdown) = (acceptor.clone(), router.clone(), shutdown.clone());
        let connection = async move {
            let _held = (place, client);
            if let Err(error) = connection(stream, peer, acceptor, router, shutdown, limits).await {
                tracing::debug!(%error, %peer, "connection ended early");
            }
        };
        tasks.spawn(cut.clone().run_until_cancelled_owned(connection));
    }
    tasks.close();
    if timeout(limits.grace, tasks.wait()).await.is_err() {
        cut.cancel();
        tasks.wait().await;
    }
}

type Place = tokio::sync::OwnedSemaphorePermit;

/// The next connection, once there is a place for it; nothing at shutdown.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    shutdown: &CancellationToken,
) -> Option<(Place, TcpStream, SocketAddr)> {
    let accept = async {
        let place = Arc::clone(places).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => return Some((place, stream, peer)),
                // Out of descriptors, or a connection that was reset before it was taken: neither ends the loop,
                // and the pause keeps the first from spinning.
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    shutdown.run_until_cancelled(accept).await.flatten()
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    shutdown: CancellationToken,
    limits: Limits,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(tls) = timeout(limits.handshake, handshake(stream, acceptor)).await?? else { return Ok(()) };
    let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
    let patience = Patience { stalled_write: limits.stalled_write, linger: limits.linger };
    let io = TokioIo::new(Guarded::new(tls, patience));
    let activity = Activity::new();
    let requests = activity.clone();
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer.ip()));
        let open = requests.begin();
        let answer = router.clone().call(request);
        // The request is open until its answer's body has ended or was dropped.
        async move { answer.await.map(|answer| answer.map(|body| Tied { body, _open: open })) }
    });
    let leave = async {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = activity.idle_for(limits.idle) => {}
        }
    };
    if http2 {
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(64)
            .max_header_list_size(32 * 1024)
            .keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .serve_connection(io, service);
        drive(connection, leave, |c| c.graceful_shutdown()).await
    } else {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(64 * 1024)
            .serve_connection(io, service);
        drive(connection, leave, |c| c.graceful_shutdown()).await
    }
    .map_err(io::Error::other)
}

/// Runs a connection; once it is time to leave, open requests may end, and no new ones are taken.
async fn drive<C: Future>(
    connection: C,
    leave: impl Future<Output = ()>,
    tell: impl FnOnce(Pin<&mut C>),
) -> C::Output {
    tokio::pin!(connection);
    tokio::select! {
        biased;
        output = &mut connection => return output,
        () = leave => tell(connection.as_mut()),
    }
    connection.await
}

/// Whether a connection has open requests, and since when it has none.
#[derive(Clone)]
struct Activity(watch::Sender<Load>);

#[derive(Clone, Copy)]
struct Load {
    open: usize,
    since: Instant,
}

/// One open request.
struct Open(Activity);

impl Activity {
    fn new() -> Self {
        Self(watch::Sender::new(Load { open: 0, since: Instant::now() }))
    }

    fn begin(&self) -> Open {
        self.0.send_modify(|load| load.open += 1);
        Open(self.clone())
    }

    /// Ends once there has been no open request for this long.
    async fn idle_for(&self, limit: Duration) {
        let mut loads = self.0.subscribe();
        loop {
            let load = *loads.borrow_and_update();
            let changed = loads.changed();
            if load.open > 0 {
                // The sender is ours, so this cannot fail.
                let _ = changed.await;
            } else if timeout_at(load.since + limit, changed).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.send_modify(|load| {
            load.open -= 1;
            load.since = Instant::now();
        });
    }
}

/// A body that keeps its request open.
struct Tied {
    body: axum::body::Body,
    _open: Open,
}

impl HttpBody for Tied {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// `None` for a client that speaks plain HTTP: it has been told.
async fn handshake(mut stream: TcpStream, acceptor: TlsAcceptor) -> io::Result<Option<TlsStream<TcpStream>>> {
    /// Content type of a TLS record that holds a handshake (RFC 8446, 5.1).
    const TLS_HANDSHAKE: u8 = 22;
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        stream.write_all(PLAIN_HTTP_ANSWER).await?;
        stream.shutdown().await?;
        // Read what was sent, so that the answer is not lost to a reset.
        stream.take(64 * 1024).read_to_end(&mut Vec::new()).await?;
        return Ok(None);
    }
    acceptor.accept(stream).await.map(Some)
}

const PLAIN_HTTP_ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n\
Content-Length: 84\r\nConnection: close\r\n\r\n\
This port speaks HTTPS only. Write https:// instead of http:// before the address.\r\n";

/// How many connections each client has open.
#[derive(Clone, Default)]
struct Clients(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct Entered {
    clients: Clients,
    peer: IpAddr,
}

impl Clients {
    fn enter(&self, peer: IpAddr, most: usize) -> Option<Entered> {
        let peer = peer.to_canonical();
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(peer).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Entered { clients: self.clone(), peer })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.clients.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}
