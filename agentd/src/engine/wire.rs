//! Frames of `agentd_domain::engine` on a Unix stream.

use agentd_domain::engine::{ClientFrame, MAX_FRAME_BYTES, PROTOCOL_VERSION, ServerFrame};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use std::io;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::codec::{FramedRead, FramedWrite, LengthDelimitedCodec};

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("{path}: {source}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the connection to the engine failed: {0}")]
    Socket(#[from] io::Error),
    #[error("the engine closed the connection")]
    Closed,
    #[error("the engine sent what is no frame: {0}")]
    Malformed(serde_json::Error),
    #[error("the engine speaks version {engine} of the protocol, agentd version {PROTOCOL_VERSION}")]
    Version { engine: u32 },
    #[error("the engine did not answer within {0} s")]
    Silent(u64),
    #[error("the engine did not come to an end of what it was told")]
    Stuck,
}

pub struct Reader(FramedRead<OwnedReadHalf, LengthDelimitedCodec>);
pub struct Writer(FramedWrite<OwnedWriteHalf, LengthDelimitedCodec>);

pub async fn connect(path: &Path) -> Result<(Reader, Writer), WireError> {
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| WireError::Connect { path: path.to_owned(), source })?;
    let (read, write) = stream.into_split();
    let codec = || {
        LengthDelimitedCodec::builder()
            .little_endian()
            .length_field_length(4)
            .max_frame_length(MAX_FRAME_BYTES as usize)
            .new_codec()
    };
    Ok((Reader(FramedRead::new(read, codec())), Writer(FramedWrite::new(write, codec()))))
}

impl Reader {
    pub async fn next(&mut self) -> Result<ServerFrame, WireError> {
        let bytes = self.0.next().await.ok_or(WireError::Closed)??;
        serde_json::from_slice(&bytes).map_err(WireError::Malformed)
    }
}

impl Writer {
    pub async fn send(&mut self, frame: &ClientFrame) -> Result<(), WireError> {
        let bytes = serde_json::to_vec(frame).map_err(WireError::Malformed)?;
        Ok(self.0.send(Bytes::from(bytes)).await?)
    }
}
