//! How does an agent run a tool that may eat memory, fork or hang without taking the agent with it?
//!
//! In:     a program of the agent's own package and what it gives up. Out: how it ended and what it said.
//! Always: the call has its run's walls, less what was given up, and a group of its own within the run's limits
//!         (`agentd_sandbox::narrow`). It ends with its request: a client that goes away, or [`TIMEOUT_MOST_MS`], kills it.
//! Never:  more of its output than [`OUTPUT_MOST_BYTES`] each is kept; the rest is read and dropped, so that it goes on.

use super::{Caller, Refused, parse};
use agentd_domain::agent_api::{Call, CallCause, Called};
use agentd_domain::fault::Report;
use agentd_domain::launcher::{CallEnd, CallLimits, CallSpec, SocketAccess, WorkAccess};
use agentd_domain::paths::inside;
use agentd_sandbox::client::CallHandles;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::{Extension, Json};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

/// A tool that takes longer is better started by the agent itself.
const TIMEOUT_MOST_MS: u64 = 600_000;
const TIMEOUT_MS: u64 = 60_000;
/// Of standard output, and of standard error.
const OUTPUT_MOST_BYTES: usize = 256 * 1024;

pub(super) async fn call(
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Called>, Refused> {
    let request: Call = parse(body)?;
    caller.may("calls")?;
    let timeout_ms = request.timeout_ms.unwrap_or(TIMEOUT_MS);
    if !(1..=TIMEOUT_MOST_MS).contains(&timeout_ms) {
        let why = format!("`timeout_ms` is {timeout_ms}");
        let fix = format!("write 1 to {TIMEOUT_MOST_MS}");
        return Err(Report::caller("body_invalid", "the call was not started", why, fix).into());
    }
    let began = Instant::now();
    let stdin = request.stdin.clone().unwrap_or_default();
    let (launcher, run, spec) = (caller.services.launcher.clone(), caller.run, spec_of(request));
    let handles = tokio::task::spawn_blocking(move || launcher.start_call(run, spec).map_err(Report::from));
    let handles = handles.await.map_err(|error| not_served(&error.to_string()))??;
    let mut said = Said::default();
    let spoken =
        tokio::time::timeout(Duration::from_millis(timeout_ms), converse(handles, stdin, &mut said)).await;
    let (cause, memory_peak_bytes) = match spoken {
        Ok(Ok(end)) => (CallCause::Ended(end.cause), end.memory_peak_bytes),
        Ok(Err(error)) => return Err(not_served(&error.to_string()).into()),
        // Its handles are dropped, and it ends.
        Err(_) => (CallCause::TimedOut, 0),
    };
    Ok(Json(Called {
        cause,
        stdout: said.stdout.text(),
        stderr: said.stderr.text(),
        truncated: said.stdout.cut || said.stderr.cut,
        memory_peak_bytes,
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }))
}

fn spec_of(request: Call) -> CallSpec {
    CallSpec {
        exec: request.exec,
        workdir: request.workdir.unwrap_or_else(|| inside::WORK.to_owned()),
        env: request.env.into_iter().collect(),
        limits: CallLimits {
            memory_max_bytes: request.memory_max_bytes,
            pids_max: request.pids,
            cpu_percent: request.cpu_percent,
        },
        work: if request.read_only_work { WorkAccess::Read } else { WorkAccess::ReadWrite },
        sockets: if request.no_sockets { SocketAccess::None } else { SocketAccess::AsRun },
    }
}

#[derive(Default)]
struct Said {
    stdout: Kept,
    stderr: Kept,
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    cut: bool,
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// All that is said until the end. What was heard so far stays in `said` when this is dropped.
async fn converse(handles: CallHandles, stdin: String, said: &mut Said) -> io::Result<CallEnd> {
    let CallHandles { stdin: to, stdout, stderr, ended, .. } = handles;
    let (told, _, _, ()) = tokio::try_join!(
        whole(ended),
        keep(stdout, &mut said.stdout),
        keep(stderr, &mut said.stderr),
        tell(to, stdin),
    )?;
    if told.is_empty() {
        return Err(io::Error::other("the launcher was restarted, and the call ended with it"));
    }
    Ok(serde_json::from_slice(&told)?)
}

async fn whole(fd: OwnedFd) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    pipe::Receiver::from_owned_fd(fd)?.read_to_end(&mut bytes).await?;
    Ok(bytes)
}

async fn keep(fd: OwnedFd, kept: &mut Kept) -> io::Result<()> {
    let mut pipe = pipe::Receiver::from_owned_fd(fd)?;
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let count = pipe.read(&mut chunk).await?;
        if count == 0 {
            return Ok(());
        }
        let room = OUTPUT_MOST_BYTES - kept.bytes.len();
        kept.bytes.extend_from_slice(&chunk[..count.min(room)]);
        kept.cut |= count > room;
    }
}

async fn tell(fd: OwnedFd, text: String) -> io::Result<()> {
    let mut pipe = pipe::Sender::from_owned_fd(fd)?;
    match pipe.write_all(text.as_bytes()).await {
        // A program need not read what it is given.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn not_served(why: &str) -> Report {
    Report::environment(
        "call_lost",
        "how the call ended is not known",
        why,
        "look at what it has done, and call again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::launcher::ExitCause;
    use std::io::{PipeReader, PipeWriter, Read, Write, pipe};

    /// The other ends, which the launcher and the program have.
    struct Ends {
        stdin: PipeReader,
        stdout: PipeWriter,
        stderr: PipeWriter,
        ended: PipeWriter,
    }

    fn call() -> (CallHandles, Ends) {
        let [(stdin, to), (from_out, stdout), (from_err, stderr), (from_ended, ended)] =
            std::array::from_fn(|_| pipe().expect("a pipe"));
        let handles = CallHandles {
            pid: 1,
            stdin: to.into(),
            stdout: from_out.into(),
            stderr: from_err.into(),
            ended: from_ended.into(),
        };
        (handles, Ends { stdin, stdout, stderr, ended })
    }

    #[tokio::test]
    async fn a_call_s_words_and_its_end_are_heard() {
        let (handles, mut ends) = call();
        let program = std::thread::spawn(move || {
            let mut heard = String::new();
            ends.stdin.read_to_string(&mut heard).expect("read");
            ends.stdout.write_all(heard.to_uppercase().as_bytes()).expect("written");
            ends.stderr.write_all(&vec![b'x'; OUTPUT_MOST_BYTES + 1]).expect("written");
            let end = CallEnd { cause: ExitCause::Exited { code: 3 }, memory_peak_bytes: 7 };
            ends.ended.write_all(&serde_json::to_vec(&end).expect("JSON")).expect("written");
        });
        let mut said = Said::default();
        let end = converse(handles, "a plum".to_owned(), &mut said).await.expect("an end");
        program.join().expect("ended well");
        assert_eq!((end.cause, end.memory_peak_bytes), (ExitCause::Exited { code: 3 }, 7));
        assert_eq!((said.stdout.text().as_str(), said.stdout.cut), ("A PLUM", false));
        assert_eq!((said.stderr.bytes.len(), said.stderr.cut), (OUTPUT_MOST_BYTES, true));
    }

    #[tokio::test]
    async fn a_launcher_that_dies_is_not_an_end_of_the_call() {
        let (handles, ends) = call();
        drop(ends);
        let mut said = Said::default();
        let error = converse(handles, "nobody reads this".to_owned(), &mut said).await.expect_err("no end");
        assert!(error.to_string().contains("launcher"), "{error}");
    }
}
