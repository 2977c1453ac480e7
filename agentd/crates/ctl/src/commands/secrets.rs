//! Listing, setting and removing secrets. A value is read from standard input, never from an argument: those are seen by
//! every process of the machine.

use super::Session;
use crate::{ask, cli, show};
use agentd_domain::fault::Report;
use agentd_domain::secret::{SecretInfo, SecretOrder};
use hyper::Method;

pub async fn run(session: &Session, command: cli::Secret) -> Result<(), Report> {
    let client = session.client()?;
    match command {
        cli::Secret::Ls => {
            let secrets: Vec<SecretInfo> = client.get("/api/v1/secrets").await?;
            session.show(secrets.as_slice(), show::secrets);
        }
        cli::Secret::Set { name, agent, hosts } => {
            let value = ask::secret()?;
            let order = SecretOrder { name, agent: agent.map(|agent| agent.to_string()), hosts, value };
            client.post_json("/api/v1/secrets", &order).await?;
        }
        cli::Secret::Rm { name, agent } => {
            let query = agent.map(|agent| format!("?agent={agent}")).unwrap_or_default();
            client.order(Method::DELETE, &format!("/api/v1/secrets/{name}{query}")).await?;
        }
    }
    Ok(())
}
