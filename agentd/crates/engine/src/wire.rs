//! How does a frame get through the socket?
//!
//! Format: 4 bytes little-endian length, then that many bytes of JSON (`agentd_domain::engine`).
//! True: a length above the limit is refused before anything is allocated.

use agentd_domain::engine::{ClientFrame, MAX_FRAME_BYTES, ServerFrame};
use std::io::{self, Read, Write};

#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the frame has {0} bytes, at most {MAX_FRAME_BYTES} are read")]
    TooLarge(u32),
    #[error("the frame is not a request: {0}")]
    NotARequest(#[from] serde_json::Error),
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
}

/// The next frame; `None` when the client closed between two frames.
pub(crate) fn read(stream: &mut impl Read) -> Result<Option<ClientFrame>, WireError> {
    let mut length = [0; 4];
    let mut filled = 0;
    while filled < length.len() {
        match stream.read(&mut length[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_FRAME_BYTES {
        return Err(WireError::TooLarge(length));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

/// Writes one frame. Blocks while the client does not read.
pub(crate) fn write(stream: &mut impl Write, frame: &ServerFrame) -> Result<(), WireError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, frame)?;
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::engine::Request;

    fn framed(body: &[u8]) -> Vec<u8> {
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(body);
        bytes
    }

    #[test]
    fn frames_are_read_one_after_the_other() {
        let one = br#"{"id":7,"body":{"type":"status"}}"#;
        let two = br#"{"id":8,"body":{"type":"attach","key":"k"}}"#;
        let mut stream: &[u8] = &[framed(one), framed(two)].concat();
        assert!(matches!(read(&mut stream).unwrap().unwrap().body, Request::Status));
        assert_eq!(read(&mut stream).unwrap().unwrap().id, 8);
        assert!(read(&mut stream).unwrap().is_none());
    }

    #[test]
    fn a_hundred_megabytes_are_refused_by_the_length_alone() {
        let mut stream: &[u8] = &(100 * 1024 * 1024u32).to_le_bytes();
        assert!(matches!(read(&mut stream), Err(WireError::TooLarge(_))));
    }

    #[test]
    fn unknown_requests_and_keys_are_errors() {
        for body in [r#"{"id":1,"body":{"type":"shell"}}"#, r#"{"id":1,"body":{"type":"attach","kye":"k"}}"#]
        {
            assert!(matches!(read(&mut framed(body.as_bytes()).as_slice()), Err(WireError::NotARequest(_))));
        }
        let mut half: &[u8] = &framed(b"{}")[..5];
        assert!(matches!(read(&mut half), Err(WireError::Broken(_))));
    }
}
