//! Serves the listeners of one run until the run is over.
//!
//! The jail bound them inside its own namespaces; agentd only accepts. Dropping them here closes nothing for the
//! agent: the jail keeps its copies, and connections wait for the next agentd.
//!
//! Always: an agent has at most [`CONNECTIONS_MOST`] connections at once; more wait in the kernel's queue. So an
//!         agent cannot use up agentd's descriptors.

use super::{Caller, Services, router};
use crate::agents::Serve;
use crate::logs::Logs;
use axum::extract::Request;
use axum::serve::Listener;
use axum::{Extension, ServiceExt};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net as unix;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::Layer;

/// Of one agent, over both of its listeners.
const CONNECTIONS_MOST: usize = 64;
/// What is being answered when a run ends may go on for so long: nobody is left to read it.
const LINGER: Duration = Duration::from_secs(1);

/// Spawns everything that belongs to a run. Call it on the data plane.
pub fn serve(run: Serve, services: Services, logs: &Logs) {
    let Serve { agent, run: run_id, manifest, held, handles, over, ended } = run;
    let caller = Caller { agent, name: manifest.name.clone(), run: run_id, held, shown: None, services };
    let sockets = handles.sockets;
    {
        let (memories, rights) = (caller.services.memories.clone(), caller.held.rights.clone());
        tokio::spawn(async move { memories.begin_run(agent, run_id, rights).await });
    }
    for (stream, fd) in [("out", sockets.stdout), ("err", sockets.stderr)] {
        if let Err(error) = logs.read(agent, stream, fd) {
            tracing::warn!(agent_id = %agent, run_id = %run_id, stream, %error, "an agent's output is not read");
        }
    }
    if let Err(error) = serve_both(sockets.api_tcp, sockets.api_unix, caller, &over) {
        tracing::error!(agent_id = %agent, run_id = %run_id, %error, "an agent's API is not served");
    }
    tokio::spawn(async move {
        match watched(sockets.pidfd) {
            Ok(pidfd) => tokio::select! {
                _ = pidfd.readable() => {}
                () = over.cancelled() => return,
            },
            Err(error) => tracing::warn!(agent_id = %agent, %error, "an agent's end is seen late"),
        }
        ended();
    });
}

/// A pidfd is readable when the process has ended (pidfd_open(2)).
// tokio marks the safe constructor as deprecated because a type could hand out a descriptor that it does not own.
// `OwnedFd` always hands out the one it owns, so what tokio asks for holds, without `unsafe` in this program.
#[allow(deprecated)]
fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(pidfd, tokio::io::Interest::READABLE)
}

pub(super) fn serve_both(
    tcp: OwnedFd,
    unix: OwnedFd,
    caller: Caller,
    over: &CancellationToken,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MOST));
    let tcp = std::net::TcpListener::from(tcp);
    tcp.set_nonblocking(true)?;
    let tcp = Limited { listener: TcpListener::from_std(tcp)?, places: Arc::clone(&places) };
    let unix = unix::UnixListener::from(unix);
    unix.set_nonblocking(true)?;
    let unix = Limited { listener: UnixListener::from_std(unix)?, places };
    tokio::spawn(until_over(tcp, caller.clone(), over.clone()));
    tokio::spawn(until_over(unix, caller, over.clone()));
    Ok(())
}

async fn until_over<L>(listener: Limited<L>, caller: Caller, over: CancellationToken)
where
    L: Listener,
    L::Addr: std::fmt::Debug,
{
    let stop = over.clone();
    let service = ServiceExt::<Request>::into_make_service(Extension(caller).layer(router()));
    let serving =
        axum::serve(listener, service).with_graceful_shutdown(async move { stop.cancelled().await });
    let serving = std::future::IntoFuture::into_future(serving);
    let late = async {
        over.cancelled().await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        _ = serving => {}
        () = late => {}
    }
}

/// A listener that accepts no more connections than there are places.
struct Limited<L> {
    listener: L,
    places: Arc<Semaphore>,
}

impl<L: Listener> Listener for Limited<L> {
    type Io = Placed<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // The semaphore is never closed; without a permit the connection would merely not be counted.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (io, address) = self.listener.accept().await;
        (Placed { io, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection with its place.
struct Placed<T> {
    io: T,
    _place: Option<OwnedSemaphorePermit>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Placed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Placed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
