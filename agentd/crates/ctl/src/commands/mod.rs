//! What does each command do?

mod agents;
mod audit;
mod chat;
mod entry;
mod gpu;
mod memory;
mod models;
mod plan;
mod secrets;
mod token;

use crate::cli::{Cli, Command};
use crate::client::{Client, Host};
use crate::config::{self, Config, Known};
use crate::show;
use agentd_domain::api::ApplianceStatus;
use agentd_domain::fault::Report;
use hyper::Method;
use serde::Serialize;

/// One error, or all that is wrong with a manifest.
#[derive(Debug)]
pub struct Failed(pub Vec<Report>);

impl From<Report> for Failed {
    fn from(report: Report) -> Self {
        Self(vec![report])
    }
}

pub use audit::{KeyFrom, Verified};

pub type Outcome = Result<(), Failed>;

pub fn run(cli: Cli) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        let fix = "free memory and file descriptors, then try again";
        Report::environment("no_runtime", "agentctl did not start", error.to_string(), fix)
    })?;
    runtime.block_on(dispatch(cli))
}

async fn dispatch(cli: Cli) -> Outcome {
    let session = Session { host: cli.host, json: cli.json };
    match cli.command {
        Command::Claim(claim) => entry::claim(&session, claim).await?,
        Command::Login(entry) => entry::login(&session, entry).await?,
        Command::Logout => entry::logout(&session).await?,
        Command::Status => {
            let status: ApplianceStatus = session.client()?.get("/api/v1/status").await?;
            session.show(&status, show::status);
        }
        Command::Plan { manifest, remote: false } => plan::local(&manifest, session.json)?,
        Command::Plan { manifest, remote: true } => plan::remote(&session, &manifest).await?,
        Command::Diff { before, after } => plan::diff(&session, &before, &after)?,
        Command::Agent(command) => agents::run(&session, command).await?,
        Command::Chat { name, text } => chat::run(&session, &name, text).await?,
        Command::Model(command) => models::run(&session, command).await?,
        Command::Gpu(command) => gpu::run(&session, command).await?,
        Command::Memory(command) => memory::run(&session, command).await?,
        Command::Knowledge(command) => memory::knowledge(&session, command).await?,
        Command::Token(command) => token::run(&session, command).await?,
        Command::Secret(command) => secrets::run(&session, command).await?,
        Command::Audit(command) => audit::run(&session, command).await?,
        Command::Reboot => session.client()?.order(Method::POST, "/api/v1/reboot").await?,
        Command::Poweroff => session.client()?.order(Method::POST, "/api/v1/poweroff").await?,
    }
    Ok(())
}

/// What all commands share.
pub struct Session {
    host: Option<Host>,
    pub json: bool,
}

impl Session {
    /// The appliance that is meant: named, or the one last signed in to, or the one on this machine.
    pub fn host(&self, config: &Config) -> Host {
        let last = || config.host.as_deref().and_then(|text| text.parse().ok());
        self.host.clone().or_else(last).unwrap_or_default()
    }

    /// A client that is signed in.
    pub fn client(&self) -> Result<Client, Report> {
        let config = config::read()?;
        let host = self.host(&config);
        match config.known(&host) {
            Some(known @ Known { token: Some(token), .. }) => match known.pin() {
                Some(pin) => Ok(Client { host, pin, token: Some(token.clone()) }),
                None => Err(not_signed_in(&host)),
            },
            _ => Err(not_signed_in(&host)),
        }
    }

    pub fn show<T: Serialize + ?Sized>(&self, value: &T, people: impl Fn(&T) -> String) {
        if self.json { show::json(&value) } else { show::out(&people(value)) }
    }
}

fn not_signed_in(host: &Host) -> Report {
    Report::caller(
        "not_signed_in",
        format!("nothing was sent to {host}"),
        "there is no session for this appliance",
        "sign in with `agentctl login`, or become its owner with `agentctl claim`; another one is named with `--host`",
    )
}
