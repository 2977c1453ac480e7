//! One message per packet between local processes, and who sent it.
//!
//! `SOCK_SEQPACKET` Unix sockets keep message borders, so a reader never sees half a message, and the kernel
//! names the peer's uid. Source: unix(7).

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind,
    connect, listen, recv, send, socket_with,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Listens at `path`, which anybody may then connect to: the peer's uid decides, not the file's mode.
/// A socket that a former life left there is replaced.
pub fn listen_at(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::from_bits_truncate(0o666))?;
    listen(&socket, backlog)?;
    Ok(socket)
}

/// The next waiting connection and its peer's uid; `None` when nobody waits. The connection does not block.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<(OwnedFd, u32)>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match acceptfrom_with(listener, flags) {
        Ok((socket, _)) => socket,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let uid = peer_uid(socket.as_fd())?;
    Ok(Some((socket, uid)))
}

/// The uid with which the peer connected.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw())
}

/// Connects to a listener. The connection blocks.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What came of an attempt to receive.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    Message(Vec<u8>),
    /// Nothing is there yet.
    Nothing,
    /// The peer is gone.
    Closed,
    /// The message was longer than `limit_bytes`, and is lost.
    TooLong,
}

/// Receives one message of at most `limit_bytes`. Does not block.
pub fn receive(socket: BorrowedFd<'_>, limit_bytes: usize) -> io::Result<Received> {
    let mut buffer = vec![0; limit_bytes];
    // TRUNC makes the kernel tell the message's real length.
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    match recv(socket, &mut buffer, flags) {
        Ok((_, 0)) => Ok(Received::Closed),
        Ok((_, length_bytes)) if length_bytes > limit_bytes => Ok(Received::TooLong),
        Ok((_, length_bytes)) => {
            buffer.truncate(length_bytes);
            Ok(Received::Message(buffer))
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Received::Nothing),
        Err(rustix::io::Errno::CONNRESET) => Ok(Received::Closed),
        Err(error) => Err(error.into()),
    }
}

/// Sends one message, whole or not at all. Does not block: a peer that does not read loses it.
pub fn send_now(socket: BorrowedFd<'_>, message: &[u8]) -> io::Result<()> {
    send(socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Asks and waits for the answer, at most `deadline`.
pub fn ask(
    socket: BorrowedFd<'_>,
    message: &[u8],
    limit_bytes: usize,
    deadline: Duration,
) -> io::Result<Vec<u8>> {
    send_now(socket, message)?;
    let mut poll = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let timeout = Timespec::try_from(deadline).map_err(|_| io::ErrorKind::InvalidInput)?;
    if rustix::event::poll(&mut poll, Some(&timeout))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match receive(socket, limit_bytes)? {
        Received::Message(answer) => Ok(answer),
        Received::Nothing => Err(io::ErrorKind::TimedOut.into()),
        Received::Closed => Err(io::ErrorKind::ConnectionReset.into()),
        Received::TooLong => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Opens for writing without blocking and without becoming a controlling terminal.
pub fn open_non_blocking(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_whole_with_the_senders_uid() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = listen_at(&path, 4).unwrap();
        assert!(accept(listener.as_fd()).unwrap().is_none());
        let client = connect_to(&path).unwrap();
        let (server, uid) = accept(listener.as_fd()).unwrap().unwrap();
        assert_eq!(uid, rustix::process::getuid().as_raw());
        assert_eq!(receive(server.as_fd(), 100).unwrap(), Received::Nothing);
        send_now(client.as_fd(), b"first").unwrap();
        send_now(client.as_fd(), b"second, and too long").unwrap();
        assert_eq!(receive(server.as_fd(), 10).unwrap(), Received::Message(b"first".to_vec()));
        assert_eq!(receive(server.as_fd(), 10).unwrap(), Received::TooLong);
        drop(client);
        assert_eq!(receive(server.as_fd(), 10).unwrap(), Received::Closed);
    }

    #[test]
    fn nobody_answering_is_a_time_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _listener = listen_at(&path, 4).unwrap();
        let client = connect_to(&path).unwrap();
        let error = ask(client.as_fd(), b"hello", 10, Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
