//! Listing, sending and removing models.

use super::Session;
use crate::{cli, client, show};
use agentd_domain::api::{Model, ModelName};
use agentd_domain::fault::Report;
use agentd_domain::human;
use futures::StreamExt;
use hyper::Method;
use std::io::{self, IsTerminal};
use std::path::Path;
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

/// The first bytes of every GGUF file.
const GGUF: &[u8; 4] = b"GGUF";
const PIECE_BYTES: usize = 256 * 1024;

pub async fn run(session: &Session, command: cli::Model) -> Result<(), Report> {
    let client = session.client()?;
    match command {
        cli::Model::Ls => {
            let models: Vec<Model> = client.get("/api/v1/models").await?;
            session.show(models.as_slice(), show::models);
        }
        cli::Model::Rm { name } => client.order(Method::DELETE, &format!("/api/v1/models/{name}")).await?,
        cli::Model::Add { file, name } => {
            let name = name.map_or_else(|| name_of(&file), Ok)?;
            let body = body(&file).await?;
            let path = format!("/api/v1/models/{name}");
            let answer =
                client.send_slowly(Method::PUT, &path, Some("application/octet-stream"), body).await?;
            let model: Model = client::parse(answer).await?;
            session.show(std::slice::from_ref(&model), show::models);
        }
    }
    Ok(())
}

/// The file's name without its ending, with what a model's name may not hold replaced.
fn name_of(file: &Path) -> Result<ModelName, Report> {
    let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let name: String = stem.chars().map(|c| if allowed(c) { c } else { '-' }).take(96).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).parse().map_err(|why: String| {
        Report::caller("model_name_malformed", "nothing was sent", why, "choose a name with `--name`")
    })
}

async fn body(path: &Path) -> Result<client::Body, Report> {
    let failed = |e: io::Error| {
        let what = format!("{} was not sent", path.display());
        Report::caller("model_file_unreadable", what, e.to_string(), "name a readable GGUF file")
    };
    let mut file = File::open(path).await.map_err(failed)?;
    let bytes = file.metadata().await.map_err(failed)?.len();
    let mut magic = [0; 4];
    if file.read_exact(&mut magic).await.is_err() || &magic != GGUF {
        let what = format!("{} was not sent", path.display());
        let why = "it does not begin like a GGUF file";
        return Err(Report::caller(
            "model_file_foreign",
            what,
            why,
            "convert it, or take a file that ends in .gguf",
        ));
    }
    let head = futures::stream::once(async move { Ok(bytes::Bytes::copy_from_slice(&magic)) });
    let rest = ReaderStream::with_capacity(file, PIECE_BYTES);
    let mut progress = Progress { sent: 0, bytes, shown: 101, visible: io::stderr().is_terminal() };
    Ok(client::streamed(head.chain(rest).inspect(move |piece| {
        if let Ok(piece) = piece {
            progress.add(piece.len() as u64);
        }
    })))
}

struct Progress {
    sent: u64,
    bytes: u64,
    shown: u8,
    visible: bool,
}

impl Progress {
    fn add(&mut self, bytes: u64) {
        self.sent += bytes;
        let percent = human::percent(self.sent, self.bytes);
        if !self.visible || percent == self.shown {
            return;
        }
        self.shown = percent;
        eprint!("\r{percent:>3} % of {}", human::bytes(self.bytes));
        if self.sent >= self.bytes {
            eprintln!(", the appliance checks it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_name_comes_from_its_file() {
        for (file, name) in [
            ("/x/SmolLM2-360M.Q8_0.gguf", "SmolLM2-360M.Q8_0"),
            ("a model (1).gguf", "a-model--1-"),
            ("..hidden.gguf", "hidden"),
        ] {
            assert_eq!(name_of(Path::new(file)).expect(file).as_str(), name);
        }
        assert!(name_of(Path::new("---.gguf")).is_err());
        assert!(name_of(Path::new("/")).is_err());
    }
}
