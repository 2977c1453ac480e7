//! A connection to init that is made again when it is lost.

use agentd_domain::initctl::{MAX_MESSAGE_BYTES, Request, Response};
use agentd_domain::paths;
use init_sys::packet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// init answers between two other things that it does; longer means that it does not answer at all.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub struct Init {
    socket: Option<OwnedFd>,
}

impl Init {
    /// The answer, or nothing when init cannot be reached. Blocks up to [`DEADLINE`].
    pub fn ask(&mut self, request: &Request) -> Option<Response> {
        let message = serde_json::to_vec(request).ok()?;
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => packet::connect_to(Path::new(paths::INIT_SOCKET)).ok()?,
        };
        let answer = packet::ask(socket.as_fd(), &message, MAX_MESSAGE_BYTES, DEADLINE).ok()?;
        // Kept only after a good exchange: a late answer must not be taken for the next one's.
        self.socket = Some(socket);
        serde_json::from_slice(&answer).ok()
    }
}
