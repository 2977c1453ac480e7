//! Bytes both ways, after the handshake was checked where there has to be one.

use super::client::{Client, Reply, fill};
use super::meter::{Meter, Stop};
use super::{Dial, Relay, Resolve};
use crate::audit::Audit;
use crate::budget::CHUNK_BYTES;
use crate::hello::{ALERT_ACCESS_DENIED, HelloReader};
use crate::name::Destination;
use crate::refusal::{Refusal, Waiting};
use crate::rules::Way;
use std::future::Future;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::timeout;

impl<R: Resolve, D: Dial, A: Audit> Relay<R, D, A> {
    /// Says yes, checks the handshake, and moves bytes until both sides are done or `guard` says stop.
    #[allow(clippy::too_many_arguments, reason = "each is used once; a struct would only rename them")]
    pub(super) async fn tunnel<S, H>(
        &self,
        mut client: Client<S>,
        host: H,
        destination: &Destination,
        way: Way,
        reply: Reply,
        meter: &Meter,
        guard: impl Future<Output = Stop>,
    ) -> Result<(), Stop>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin,
        H: AsyncRead + AsyncWrite + Send + Unpin,
    {
        client.accept(reply).await?;
        if way == Way::Tls {
            let checked = timeout(self.limits.head, self.checks.handshake(&mut client, destination)).await;
            if let Err(stop) = checked.unwrap_or(Err(Stop::Refused(Refusal::Slow(Waiting::Head)))) {
                client.last_words(&ALERT_ACCESS_DENIED).await;
                return Err(stop);
            }
        }
        tokio::select! {
            result = pump(&mut client, host, meter) => result,
            stop = guard => Err(stop),
        }
    }
}

/// Reads until the ClientHello is complete. Its bytes stay unread: they go to the host as they came.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut Client<S>,
    destination: &Destination,
) -> Result<(), Stop> {
    let mut reader = HelloReader::default();
    let mut fed = 0;
    loop {
        let new = client.unread.get(fed..).unwrap_or_default();
        let complete = reader
            .feed(new, &destination.host)
            .map_err(|error| Stop::Refused(Refusal::Hello { destination: destination.clone(), error }))?;
        if complete {
            return Ok(());
        }
        fed = client.unread.len();
        fill(&mut client.read, &mut client.unread).await?;
    }
}

async fn pump<S, H>(client: &mut Client<S>, host: H, meter: &Meter) -> Result<(), Stop>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: AsyncRead + AsyncWrite + Unpin,
{
    let (mut host_read, mut host_write) = split(host);
    let (read, write, unread) = (&mut client.read, &mut client.write, &mut client.unread);
    let out = async {
        meter.write(&mut host_write, unread).await?;
        unread.clear();
        let mut buffer = Box::new([0; CHUNK_BYTES]);
        loop {
            let count = read.read(&mut buffer[..]).await.map_err(|_| Stop::Lost)?;
            if count == 0 {
                // One direction may end before the other.
                return host_write.shutdown().await.map_err(|_| Stop::HostLost);
            }
            meter.write(&mut host_write, buffer.get(..count).unwrap_or_default()).await?;
        }
    };
    let back = async {
        let mut buffer = Box::new([0; CHUNK_BYTES]);
        loop {
            let count = meter.read(&mut host_read, &mut buffer).await?;
            if count == 0 {
                return write.shutdown().await.map_err(|_| Stop::Lost);
            }
            write.write_all(buffer.get(..count).unwrap_or_default()).await.map_err(|_| Stop::Lost)?;
            write.flush().await.map_err(|_| Stop::Lost)?;
            meter.moved();
        }
    };
    tokio::try_join!(out, back).map(|_| ())
}
