//! Listing, installing, starting, stopping, removing agents, and reading what they printed.

use super::{Failed, Outcome, Session, audit, plan};
use crate::cli;
use crate::client::{self, Body};
use crate::package::{self, Entry, Kind, MANIFEST};
use crate::show;
use agentd_domain::api::{Agent, LogLine};
use agentd_domain::fault::Report;
use agentd_domain::manifest::Manifest;
use agentd_domain::paths::inside;
use bytes::Bytes;
use hyper::Method;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;

/// Pieces that wait to be sent; bounds memory.
const PIECES_AHEAD: usize = 8;
const PIECE_BYTES: usize = 64 * 1024;
/// The newest records, below an agent's health.
const TRAIL_RECORDS: usize = 20;

pub async fn run(session: &Session, command: cli::Agent) -> Outcome {
    match command {
        cli::Agent::Install { package } if package.is_file() => install_file(session, &package).await?,
        cli::Agent::Install { package } => install(session, &package).await?,
        cli::Agent::Pack { directory, output } => pack(session, &directory, output)?,
        cli::Agent::Ls => {
            let agents: Vec<Agent> = session.client()?.get("/api/v1/agents").await?;
            session.show(agents.as_slice(), show::agents);
        }
        cli::Agent::Show { name } => one(session, &name.to_string()).await?,
        cli::Agent::Start { name } => change(session, &format!("/api/v1/agents/{name}/start")).await?,
        cli::Agent::Stop { name } => change(session, &format!("/api/v1/agents/{name}/stop")).await?,
        cli::Agent::Rm { name } => {
            session.client()?.order(Method::DELETE, &format!("/api/v1/agents/{name}")).await?;
        }
        cli::Agent::Logs { name, follow, lines } => {
            logs(session, &format!("/api/v1/agents/{name}/logs?lines={lines}&follow={follow}")).await?;
        }
    }
    Ok(())
}

/// With `--json` the agent alone: `audit ls --agent NAME --json` has the records.
async fn one(session: &Session, name: &str) -> Outcome {
    let client = session.client()?;
    let agent: Agent = client.get(&format!("/api/v1/agents/{name}")).await?;
    session.show(&agent, show::agent_with_health);
    if !session.json {
        let page = audit::page(&client, &format!("limit={TRAIL_RECORDS}&agent={name}")).await?;
        show::out(&format!("\naudit trail\n{}", show::audit(&audit::records(&page))));
    }
    Ok(())
}

async fn logs(session: &Session, path: &str) -> Result<(), Report> {
    let answer = session.client()?.send(Method::GET, path, None, client::empty()).await?;
    client::lines(answer, |line: LogLine, raw| {
        show::out(&if session.json { format!("{raw}\n") } else { show::log_line(&line) });
        Ok(())
    })
    .await
}

async fn change(session: &Session, path: &str) -> Result<(), Report> {
    let agent: Agent = session.client()?.post(path, &()).await?;
    session.show(&agent, show::agent);
    Ok(())
}

/// Checked here first, so that mistakes are told before anything is sent.
async fn install(session: &Session, directory: &Path) -> Outcome {
    let (_, entries) = checked(directory)?;
    send(session, packed(directory.to_owned(), entries)).await
}

/// The appliance looks into it.
async fn install_file(session: &Session, path: &Path) -> Outcome {
    let file = tokio::fs::File::open(path).await.map_err(|error| {
        Report::caller(
            "package_unreadable",
            "nothing was sent",
            format!("{}: {error}", path.display()),
            "name a file that you may read",
        )
    })?;
    send(session, client::streamed(tokio_util::io::ReaderStream::with_capacity(file, PIECE_BYTES))).await
}

#[derive(serde::Serialize)]
struct Packed {
    file: PathBuf,
}

fn pack(session: &Session, directory: &Path, output: Option<PathBuf>) -> Outcome {
    let (manifest, entries) = checked(directory)?;
    let path =
        output.unwrap_or_else(|| PathBuf::from(format!("{}-{}.agent", manifest.name, manifest.version)));
    package::write_compressed(directory, &entries, &path).map_err(|error| {
        Report::environment(
            "package_not_written",
            "no package was made",
            format!("{}: {error}", path.display()),
            "write it elsewhere with `--output FILE`",
        )
    })?;
    let packed = Packed { file: path };
    session.show(&packed, |packed| format!("{}\n", packed.file.display()));
    Ok(())
}

fn checked(directory: &Path) -> Result<(Manifest, Vec<Entry>), Failed> {
    let manifest = plan::manifest(&directory.join(MANIFEST))?;
    let entries = package::list(directory)?;
    check_program(&manifest, &entries)?;
    Ok((manifest, entries))
}

async fn send(session: &Session, body: Body) -> Outcome {
    let client = session.client()?;
    let answer = client.send_slowly(Method::POST, "/api/v1/agents", Some("application/x-tar"), body).await;
    let agent: Agent = client::parse(answer?).await?;
    session.show(&agent, show::agent);
    Ok(())
}

/// A program of the package must be in it.
fn check_program(manifest: &Manifest, entries: &[Entry]) -> Result<(), Report> {
    let Some(program) = manifest.exec.first() else { return Ok(()) };
    let Some(name) = program.strip_prefix(inside::PACKAGE).and_then(|rest| rest.strip_prefix('/')) else {
        return Ok(());
    };
    let why = match entries.iter().find(|entry| entry.name == name).map(|entry| entry.kind) {
        Some(Kind::File { executable: true, .. }) => return Ok(()),
        Some(Kind::File { .. }) => format!("`{name}` is not executable"),
        Some(Kind::Folder) => format!("`{name}` is a folder"),
        None => format!("there is no `{name}` in the directory"),
    };
    Err(Report::caller(
        "program_missing",
        "nothing was sent",
        format!("`agent.exec` names {program}, and {why}"),
        format!("put the program there with `chmod +x {name}`, or mend `agent.exec`"),
    ))
}

/// Packs on a thread of its own, a few pieces ahead of the network.
fn packed(directory: std::path::PathBuf, entries: Vec<Entry>) -> Body {
    let (sender, mut receiver) = mpsc::channel::<io::Result<Bytes>>(PIECES_AHEAD);
    tokio::task::spawn_blocking(move || {
        let pieces = Pieces(sender.clone());
        let mut out = io::BufWriter::with_capacity(PIECE_BYTES, pieces);
        let result = package::write(&directory, &entries, &mut out).and_then(|()| out.flush());
        if let Err(error) = result {
            // The body breaks off, so the appliance throws away what it has.
            let _ = sender.blocking_send(Err(error));
        }
    });
    client::streamed(futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)))
}

struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(Bytes::copy_from_slice(piece))).map_err(gone)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
