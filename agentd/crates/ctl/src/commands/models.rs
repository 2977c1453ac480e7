//! Listing, sending and removing models.

use super::Session;
use crate::client::Client;
use crate::{cli, client, show};
use agentd_domain::api::{Model, ModelName, PullModel, PullPart};
use agentd_domain::fault::Report;
use agentd_domain::gguf;
use agentd_domain::human;
use agentd_domain::ledger::{ModelPlan, PlanOrder};
use futures::StreamExt;
use hyper::Method;
use std::io::{self, IsTerminal};
use std::os::unix::fs::FileExt;
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
        cli::Model::Pin { name } => pin(session, &client, Method::PUT, &name).await?,
        cli::Model::Unpin { name } => pin(session, &client, Method::DELETE, &name).await?,
        cli::Model::Add { file, name } => {
            let name = name.map_or_else(|| name_of(&file), Ok)?;
            let body = body(&file).await?;
            let path = format!("/api/v1/models/{name}");
            let answer =
                client.send_slowly(Method::PUT, &path, Some("application/octet-stream"), body).await?;
            let model: Model = client::parse(answer).await?;
            session.show(std::slice::from_ref(&model), show::models);
        }
        cli::Model::Pull { url, name, sha256 } => {
            let name = name.map_or_else(|| name_of(Path::new(file_of(&url))), Ok)?;
            pull(session, &client, &name, PullModel { url, sha256 }).await?;
        }
        cli::Model::Plan { model, context, sequences } => {
            let plan: ModelPlan = match model.parse::<ModelName>() {
                Ok(name) if !Path::new(&model).exists() => {
                    let query = format!("context_tokens={context}&sequences={sequences}");
                    client.get(&format!("/api/v1/models/{name}/plan?{query}")).await?
                }
                _ => {
                    let order =
                        PlanOrder { context_tokens: context, sequences, ..read_header(Path::new(&model))? };
                    client.post("/api/v1/plan-model", &order).await?
                }
            };
            session.show(&plan, show::model_plan);
        }
    }
    Ok(())
}

async fn pin(session: &Session, client: &Client, method: Method, name: &ModelName) -> Result<(), Report> {
    let path = format!("/api/v1/models/{name}/pin");
    let model: Model = client::parse(client.send(method, &path, None, client::empty()).await?).await?;
    session.show(std::slice::from_ref(&model), show::models);
    Ok(())
}

/// The last part of an address's path.
fn file_of(url: &str) -> &str {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default()
}

/// Orders a pull and shows how it goes.
async fn pull(session: &Session, client: &Client, name: &ModelName, from: PullModel) -> Result<(), Report> {
    let body = client::full(serde_json::to_vec(&from).unwrap_or_default());
    let path = format!("/api/v1/models/{name}/pull");
    let answer = client.send(Method::POST, &path, Some("application/json"), body).await?;
    let visible = io::stderr().is_terminal();
    let mut end = None;
    client::lines(answer, |part: PullPart, _| {
        match part {
            PullPart::Progress { bytes, total_bytes } if visible => match total_bytes {
                Some(total) => eprint!("\r{:>3} % of {}", human::percent(bytes, total), human::bytes(total)),
                None => eprint!("\r{}", human::bytes(bytes)),
            },
            PullPart::Progress { .. } => {}
            PullPart::Done { model } => end = Some(Ok(model)),
            PullPart::Failed { report } => end = Some(Err(report)),
        }
        Ok(())
    })
    .await?;
    if visible {
        eprintln!();
    }
    let model: Model =
        end.unwrap_or_else(|| Err(client::connection_lost("it ended before the model was there")))?;
    session.show(std::slice::from_ref(&model), show::models);
    Ok(())
}

/// What the header of a file says; nothing else of it is read or sent.
fn read_header(path: &Path) -> Result<PlanOrder, Report> {
    let failed = |why: String| {
        let what = format!("{} was not planned", path.display());
        Report::caller(
            "model_file_unreadable",
            what,
            why,
            "name a readable GGUF file, or a model of the appliance",
        )
    };
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() {
        return Err(failed("it is no file".to_owned()));
    }
    let shown = path.display().to_string();
    let read = |at, into: &mut [u8]| file.read_exact_at(into, at).map_err(|error| error.to_string());
    let summary = gguf::check(metadata.len(), &mut { read }).map_err(|error| error.report(&shown))?;
    Ok(PlanOrder {
        model: path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or(shown),
        kind: summary.kind(),
        architecture: summary.architecture,
        context_length: summary.context_length,
        shape: summary.shape,
        context_tokens: 0,
        sequences: 0,
    })
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
        for (url, name) in [
            ("https://example.org/a/m.Q4_0.gguf?download=true", "m.Q4_0"),
            ("https://example.org/m.gguf#x/y", "m"),
        ] {
            assert_eq!(name_of(Path::new(file_of(url))).expect(url).as_str(), name);
        }
        assert!(name_of(Path::new(file_of("https://example.org/"))).is_err());
        assert!(name_of(Path::new("---.gguf")).is_err());
        assert!(name_of(Path::new("/")).is_err());
    }
}
