//! What does agentd tell init, and what does it ask?
//!
//! Owns:  one thread that talks over init's socket: a new connection per question, because init is one thread and
//!        must never wait for us.
//! In:    the report that the local console shows; questions for the system's status; reboot and power off.
//! Out:   answers, or a [`Report`] when init is not there (on a developer's machine it never is).
//! Always: init gets the present report again after it was away, because each change and each minute sends it.

use agentd_domain::fault::Report;
use agentd_domain::initctl::{AgentdReport, MAX_MESSAGE_BYTES, Request, Response, SystemStatus};
use init_sys::packet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// init answers between two feedings of the watchdog; longer means that it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("{path}: {source}")]
    Unreachable { path: PathBuf, source: std::io::Error },
    #[error("init answered with what is no answer: {0}")]
    Malformed(serde_json::Error),
    #[error("{0}")]
    Refused(Report),
    #[error("init answered something else than was asked")]
    Unexpected,
    #[error("the question was given up")]
    Cancelled,
}

impl InitError {
    pub fn report(&self, what: &str) -> Report {
        match self {
            Self::Refused(report) => report.clone(),
            Self::Unreachable { .. } | Self::Cancelled => Report::environment(
                "init_unreachable",
                what,
                self.to_string(),
                "use the local console, or the power button",
            ),
            Self::Malformed(_) | Self::Unexpected => {
                Report::bug("init_protocol", what, self.to_string(), "use the local console")
            }
        }
    }
}

/// init for async code. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Init {
    socket: PathBuf,
}

impl Init {
    pub fn at(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub async fn status(&self) -> Result<SystemStatus, InitError> {
        match self.ask(Request::Status).await? {
            Response::Status(status) => Ok(*status),
            _ => Err(InitError::Unexpected),
        }
    }

    pub async fn report(&self, report: AgentdReport) -> Result<(), InitError> {
        self.done(Request::Report(report)).await
    }

    pub async fn reboot(&self) -> Result<(), InitError> {
        self.done(Request::Reboot).await
    }

    pub async fn power_off(&self) -> Result<(), InitError> {
        self.done(Request::PowerOff).await
    }

    async fn done(&self, request: Request) -> Result<(), InitError> {
        match self.ask(request).await? {
            Response::Done => Ok(()),
            _ => Err(InitError::Unexpected),
        }
    }

    async fn ask(&self, request: Request) -> Result<Response, InitError> {
        let socket = self.socket.clone();
        let answer = tokio::task::spawn_blocking(move || ask(&socket, &request)).await;
        match answer.unwrap_or(Err(InitError::Cancelled))? {
            Response::Refused(report) => Err(InitError::Refused(report)),
            other => Ok(other),
        }
    }
}

fn ask(path: &Path, request: &Request) -> Result<Response, InitError> {
    let unreachable = |source| InitError::Unreachable { path: path.to_owned(), source };
    let message = serde_json::to_vec(request).map_err(InitError::Malformed)?;
    let socket = packet::connect_to(path).map_err(unreachable)?;
    let answer =
        packet::ask(socket.as_fd(), &message, MAX_MESSAGE_BYTES, ANSWER_LIMIT).map_err(unreachable)?;
    serde_json::from_slice(&answer).map_err(InitError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_machine_without_init_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Init::at(folder.path().join("none")).status().await.expect_err("nobody there");
        assert_eq!(error.report("x").code, "init_unreachable");
    }

    #[tokio::test]
    async fn a_refusal_is_passed_on_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("init.sock");
        let listener = packet::listen_at(&path, 4).expect("listens");
        let refusal = Report::caller("forbidden", "no reboot", "not you", "ask console-tty");
        let answer = serde_json::to_vec(&Response::Refused(refusal.clone())).expect("encoded");
        let server = std::thread::spawn(move || {
            loop {
                let Some((peer, _)) = packet::accept(listener.as_fd()).expect("accepts") else {
                    std::thread::yield_now();
                    continue;
                };
                while packet::receive(peer.as_fd(), 4096).expect("receives") == packet::Received::Nothing {
                    std::thread::yield_now();
                }
                packet::send_now(peer.as_fd(), &answer).expect("sends");
                return;
            }
        });
        let error = Init::at(path).reboot().await.expect_err("refused");
        assert!(matches!(error, InitError::Refused(report) if report == refusal));
        server.join().expect("served");
    }
}
