//! How does one message with its descriptors cross a Unix socket?
//!
//! In/out: one `SOCK_SEQPACKET` packet is one JSON value; descriptors travel beside it as `SCM_RIGHTS`.
//! Always: a packet over [`MAX_MESSAGE_BYTES`] or with more than [`MAX_FDS`] descriptors is an error, never cut
//!         short: `MSG_TRUNC` and `MSG_CTRUNC` are checked. Received descriptors are close-on-exec from birth.
//! Used by: agentd's client, the launcher, and the jail's channel to the launcher.
//! Source: unix(7), cmsg(3).

use agentd_domain::launcher::{HANDOVER_FDS, MAX_MESSAGE_BYTES};
use agentd_domain::plan::{EGRESS_FIXED_SOCKETS, ceiling};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What a run's sockets are at most: five of every run, and the egress's. The kernel's own limit is 253
/// (`SCM_MAX_FD`).
pub const MAX_FDS: usize = HANDOVER_FDS.len() + EGRESS_FIXED_SOCKETS + ceiling::NET_PORTS_MAX;

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the message has {bytes} bytes, at most {MAX_MESSAGE_BYTES} fit")]
    TooLarge { bytes: usize },
    #[error("the message carries {count} descriptors, at most {MAX_FDS} are allowed")]
    TooManyFds { count: usize },
    #[error("the message came with more bytes or descriptors than are allowed")]
    Truncated,
    #[error("the peer has closed the connection")]
    Closed,
    #[error("the message is not what the protocol says: {source}")]
    Malformed { source: serde_json::Error },
    #[error("the socket failed: {source}")]
    Socket { source: Errno },
}

impl WireError {
    /// Nothing to read or no room to write just now, on a non-blocking socket.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Socket { source } if *source == Errno::AGAIN)
    }
}

pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let bytes = serde_json::to_vec(message).map_err(|source| WireError::Malformed { source })?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLarge { bytes: bytes.len() });
    }
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds { count: fds.len() });
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(WireError::TooManyFds { count: fds.len() });
    }
    retry(|| sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<(T, Vec<OwnedFd>), WireError> {
    // One byte more than allowed, so that a packet of exactly the limit and one over it differ without a flag.
    let mut bytes = vec![0_u8; MAX_MESSAGE_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry(|| recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    // Collected first, so that every descriptor is closed again when the message is refused below.
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(WireError::Truncated);
    }
    let Some(packet) = bytes.get(..received.bytes) else { return Err(WireError::Truncated) };
    match packet.len() {
        0 => Err(WireError::Closed),
        length if length > MAX_MESSAGE_BYTES => Err(WireError::TooLarge { bytes: length }),
        _ => {
            let message = serde_json::from_slice(packet).map_err(|source| WireError::Malformed { source })?;
            Ok((message, fds))
        }
    }
}

/// The descriptors of a message as an array, or an error when the peer sent another number.
pub fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], WireError> {
    let count = fds.len();
    fds.try_into().map_err(|_| WireError::TooManyFds { count })
}

/// Borrows of owned descriptors, as [`send`] wants them.
pub fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, WireError> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(WireError::Closed),
            Err(source) => return Err(WireError::Socket { source }),
            Ok(value) => return Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_message_and_its_descriptors_arrive_together() {
        let (left, right) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(left.as_fd(), &"hello", &[file.as_fd(), file.as_fd()]).unwrap();
        let (text, fds): (String, _) = receive(right.as_fd()).unwrap();
        assert_eq!((text.as_str(), fds.len()), ("hello", 2));
        for fd in fds {
            assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_on_both_sides() {
        let (left, right) = pair();
        let long = "x".repeat(MAX_MESSAGE_BYTES);
        assert!(matches!(send(left.as_fd(), &long, &[]), Err(WireError::TooLarge { .. })));
        let raw = vec![b'1'; MAX_MESSAGE_BYTES + 4096];
        rustix::net::send(&left, &raw, SendFlags::empty()).unwrap();
        assert!(matches!(receive::<u8>(right.as_fd()), Err(WireError::Truncated)));
        rustix::net::send(&left, &raw[..MAX_MESSAGE_BYTES + 1], SendFlags::empty()).unwrap();
        assert!(matches!(receive::<u8>(right.as_fd()), Err(WireError::TooLarge { .. })));
    }

    #[test]
    fn more_descriptors_than_allowed_are_refused_and_closed() {
        let (left, right) = pair();
        let (watched, other) = rustix::pipe::pipe().unwrap();
        let many = vec![other.as_fd(); MAX_FDS + 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&left, &[IoSlice::new(b"1")], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive::<u8>(right.as_fd()), Err(WireError::Truncated)));
        drop(other);
        // Every write end is closed, so the pipe is at its end.
        assert_eq!(rustix::io::read(&watched, &mut [0_u8; 1]).unwrap(), 0);
    }

    #[test]
    fn an_ended_peer_is_told_apart_from_bad_data() {
        let (left, right) = pair();
        rustix::net::send(&left, b"{not json", SendFlags::empty()).unwrap();
        assert!(matches!(receive::<u8>(right.as_fd()), Err(WireError::Malformed { .. })));
        drop(left);
        assert!(matches!(receive::<u8>(right.as_fd()), Err(WireError::Closed)));
    }
}
