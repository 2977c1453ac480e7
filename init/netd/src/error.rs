//! What can go wrong so badly that netd ends, for init to start it again? Everything else is a problem in the
//! status.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("the kernel gives no netlink socket")]
    Netlink(#[source] io::Error),
    #[error("the kernel's netlink connection has ended")]
    NetlinkEnded,
    #[error("signals cannot be received")]
    Signals(#[source] io::Error),
    #[error("{path} cannot be written")]
    Write { path: PathBuf, source: io::Error },
}
