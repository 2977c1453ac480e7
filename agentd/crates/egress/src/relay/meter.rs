//! Every byte between the appliance and a host passes here: reserved, moved, settled, counted.

use crate::budget::{CHUNK_BYTES, Purse, Whose};
use crate::refusal::{Refusal, Waiting};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

/// Why moving bytes ended before both sides were done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// The agent's side is gone.
    Lost,
    /// The host's side is gone.
    HostLost,
    Revoked,
    Refused(Refusal),
}

pub(super) struct Meter {
    purse: Purse,
    out: AtomicU64,
    into: AtomicU64,
    began: Instant,
    /// When bytes last moved, in milliseconds since `began`.
    moved_ms: AtomicU64,
    /// Whether the agent has seen a part of the host's answer, so that no refusal can be said any more.
    answered: AtomicBool,
}

impl Meter {
    pub(super) fn new(purse: Purse) -> Self {
        Self {
            purse,
            out: AtomicU64::new(0),
            into: AtomicU64::new(0),
            began: Instant::now(),
            moved_ms: AtomicU64::new(0),
            answered: AtomicBool::new(false),
        }
    }

    /// Writes to the host, all or nothing of each chunk. A write that fails half-way counts as whole: how much has
    /// left is not known.
    pub(super) async fn write<W: AsyncWrite + Unpin>(&self, host: &mut W, bytes: &[u8]) -> Result<(), Stop> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            let length = chunk.len() as u64;
            let reserved = self.purse.reserve(length, length).map_err(spent)?;
            let written = host.write_all(chunk).await;
            reserved.settle(length);
            self.out.fetch_add(length, Ordering::Relaxed);
            self.moved();
            written.map_err(|_| Stop::HostLost)?;
        }
        host.flush().await.map_err(|_| Stop::HostLost)
    }

    /// Reads from the host; 0 is the end.
    pub(super) async fn read<R: AsyncRead + Unpin>(
        &self,
        host: &mut R,
        buffer: &mut [u8; CHUNK_BYTES],
    ) -> Result<usize, Stop> {
        let reserved = self.purse.reserve(1, CHUNK_BYTES as u64).map_err(spent)?;
        let room = usize::try_from(reserved.bytes()).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let space = buffer.get_mut(..room).unwrap_or_default();
        let count = host.read(space).await.map_err(|_| Stop::HostLost)?;
        reserved.settle(count as u64);
        self.into.fetch_add(count as u64, Ordering::Relaxed);
        self.moved();
        Ok(count)
    }

    /// Returns when nothing has moved for `idle`.
    pub(super) async fn quiet(&self, idle: Duration) -> Stop {
        loop {
            let last = self.began + Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
            if last.elapsed() >= idle {
                return Stop::Refused(Refusal::Slow(Waiting::Idle));
            }
            tokio::time::sleep_until(last + idle).await;
        }
    }

    pub(super) fn moved(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.store(now, Ordering::Relaxed);
    }

    pub(super) fn set_answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    pub(super) fn answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Out, in.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.out.load(Ordering::Relaxed), self.into.load(Ordering::Relaxed))
    }
}

fn spent(whose: Whose) -> Stop {
    Stop::Refused(Refusal::Budget(whose))
}
