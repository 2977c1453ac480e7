//! Becoming the owner, signing in and out.

use super::Session;
use crate::ask::{self, Kind};
use crate::cli::{Claim, Entry};
use crate::client::{self, Client, Host};
use crate::config::{self, Config, Known};
use crate::pin::Pin;
use crate::show;
use agentd_domain::api;
use agentd_domain::fault::Report;
use hyper::Method;
use serde::Serialize;

pub async fn claim(session: &Session, claim: Claim) -> Result<(), Report> {
    let (config, client) = begin(session, claim.entry.fingerprint).await?;
    let code = claim.code.map_or_else(ask::code, Ok)?;
    let password = ask::password(claim.entry.password_stdin, Kind::New)?;
    enter(session, config, client, "/api/v1/claim", &api::Claim { code, password }).await
}

pub async fn login(session: &Session, entry: Entry) -> Result<(), Report> {
    let (config, client) = begin(session, entry.fingerprint).await?;
    let password = ask::password(entry.password_stdin, Kind::Known)?;
    enter(session, config, client, "/api/v1/login", &api::Login { password }).await
}

pub async fn logout(session: &Session) -> Result<(), Report> {
    let client = session.client()?;
    let mut config = config::read()?;
    let ended = client.order(Method::POST, "/api/v1/logout").await;
    config.remember(&client.host, client.pin, None);
    config::write(&config)?;
    // A session that has ended already is what was asked for.
    match ended {
        Err(report) if report.code == "unauthorized" => Ok(()),
        other => other,
    }
}

/// A client for an appliance whose authority is certain, before anything secret is asked for.
async fn begin(session: &Session, given: Option<Pin>) -> Result<(Config, Client), Report> {
    let config = config::read()?;
    let host = session.host(&config);
    let pin = match given.or_else(|| config.known(&host).and_then(Known::pin)) {
        Some(pin) => pin,
        None => first_contact(&host).await?,
    };
    Ok((config, Client { host, pin, token: None }))
}

async fn first_contact(host: &Host) -> Result<Pin, Report> {
    if !ask::have_terminal() {
        return Err(Report::caller(
            "fingerprint_needed",
            format!("nothing was sent to {host}"),
            "this appliance is not known here yet, and there is no terminal to ask at",
            "give the fingerprint from its screen: `--fingerprint SHA256`",
        ));
    }
    let pin = client::fingerprint(host).await?;
    ask::compare(pin)?;
    Ok(pin)
}

async fn enter(
    session: &Session,
    mut config: Config,
    client: Client,
    path: &str,
    body: &impl Serialize,
) -> Result<(), Report> {
    let entered: api::Session = client.post(path, body).await?;
    config.remember(&client.host, client.pin, Some(entered.token.clone()));
    config::write(&config)?;
    if session.json {
        show::json(&entered);
    } else {
        show::out(&format!("signed in to {}\n", client.host));
    }
    Ok(())
}
