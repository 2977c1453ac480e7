//! How does a connection end when the other side misbehaves?
//!
//! [`Guarded`] wraps a TLS stream with two promises that hyper does not make:
//!
//! - *A client that stops reading is let go*: a write that makes no progress for [`Patience::stalled_write`]
//!   fails, so a stopped reader cannot keep a connection slot for ever.
//! - *An early answer arrives.* When a request is refused before its body was read (413), closing at once would
//!   make the kernel send a reset, which throws away the answer that is on its way. So after the end of our side
//!   the rest is read and dropped for at most [`Patience::linger`]: memory stays constant, and time is bounded.
//!   This is nginx's `lingering_close`.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub stalled_write: Duration,
    pub linger: Duration,
}

pub struct Guarded<S> {
    inner: S,
    patience: Patience,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Runs once our side has ended.
    lingering: Option<Pin<Box<Sleep>>>,
}

impl<S> Guarded<S> {
    pub fn new(inner: S, patience: Patience) -> Self {
        Self { inner, patience, stalled: None, lingering: None }
    }

    /// Passes progress on; turns waiting that lasts too long into an error.
    fn watch<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let patience = self.patience.stalled_write;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            let result = Pin::new(&mut self.inner).poll_shutdown(cx);
            ready!(self.watch(cx, result))?;
            self.lingering = Some(Box::pin(sleep(self.patience.linger)));
        }
        let mut scratch = [0; 16 * 1024];
        loop {
            if let Some(timer) = &mut self.lingering
                && timer.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Ok(()));
            }
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                // The other side has ended too, one way or another: nothing is left to lose.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const PATIENCE: Patience =
        Patience { stalled_write: Duration::from_secs(60), linger: Duration::from_secs(10) };

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_reading_is_let_go() {
        let (ours, _theirs) = duplex(16);
        let mut guarded = Guarded::new(ours, PATIENCE);
        let error = guarded.write_all(&[0; 64]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_not_a_stopped_one() {
        let (ours, mut theirs) = duplex(16);
        let mut guarded = Guarded::new(ours, PATIENCE);
        let reader = tokio::spawn(async move {
            let mut got = 0;
            let mut buf = [0; 8];
            while got < 64 {
                sleep(Duration::from_secs(50)).await;
                got += theirs.read(&mut buf).await.expect("reads");
            }
        });
        guarded.write_all(&[0; 64]).await.expect("there is progress all the time");
        reader.await.expect("ends");
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_client_still_sends_is_read_before_the_end() {
        let (ours, mut theirs) = duplex(64);
        let mut guarded = Guarded::new(ours, PATIENCE);
        let client = tokio::spawn(async move {
            theirs.write_all(&[1; 100_000]).await.expect("taken, so no reset");
            let mut answer = Vec::new();
            theirs.read_to_end(&mut answer).await.expect("read");
            answer
        });
        guarded.write_all(b"413").await.expect("written");
        guarded.shutdown().await.expect("ends");
        drop(guarded);
        assert_eq!(client.await.expect("ends"), b"413");
    }

    #[tokio::test(start_paused = true)]
    async fn lingering_ends_although_the_client_sends_for_ever() {
        let (ours, mut theirs) = duplex(64);
        let mut guarded = Guarded::new(ours, PATIENCE);
        let client = tokio::spawn(async move {
            while theirs.write_all(&[1; 64]).await.is_ok() {
                sleep(Duration::from_millis(100)).await;
            }
        });
        let before = tokio::time::Instant::now();
        guarded.shutdown().await.expect("ends");
        assert!(before.elapsed() <= PATIENCE.linger + Duration::from_secs(1));
        drop(guarded);
        client.await.expect("ends");
    }
}
