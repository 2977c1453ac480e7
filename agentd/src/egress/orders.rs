//! What may the owner order about secrets?
//!
//! Always: each order is recorded with the secret's name and whom it is for, and never with its value.

use super::secrets::SecretKey;
use crate::appliance::{Machine, thread_lost};
use crate::audit::Order;
use agentd_domain::api::AgentKey;
use agentd_domain::fault::Report;
use agentd_domain::net::rule::SecretName;
use agentd_domain::secret::{SecretInfo, SecretOrder};

impl Machine {
    pub(crate) fn secret_list(&self) -> Result<Vec<SecretInfo>, Report> {
        let parts = self.parts()?;
        let views = parts.agents.views();
        let shown = parts.egress.secrets().list().into_iter().map(|(key, hosts)| SecretInfo {
            agent: key.agent.and_then(|agent| views.get(&agent)).map(|view| view.row.name.clone()),
            agent_id: key.agent,
            name: key.name,
            hosts,
        });
        Ok(shown.collect())
    }

    pub(crate) async fn secret_set(&self, secret: SecretOrder) -> Result<(), Report> {
        let SecretOrder { name, agent, hosts, value } = secret;
        let order = self.about("secret.set", &name, agent.as_deref());
        let work = async {
            let secrets = self.parts()?.egress.secrets().clone();
            let key = self.key(name, agent.as_deref())?;
            blocking(move || secrets.set(key, hosts, value)).await
        };
        self.audit.order(order, work, |(), _| {}).await
    }

    pub(crate) async fn secret_remove(
        &self,
        name: SecretName,
        agent: Option<AgentKey>,
    ) -> Result<(), Report> {
        let agent = agent.map(|agent| agent.to_string());
        let order = self.about("secret.remove", &name, agent.as_deref());
        let work = async {
            let secrets = self.parts()?.egress.secrets().clone();
            let key = self.key(name, agent.as_deref())?;
            if blocking(move || secrets.remove(&key)).await? {
                return Ok(());
            }
            let why = "there is no secret of this name for this agent, or for all";
            Err(Report::caller("not_found", "no secret was removed", why, "`agentctl secret ls` shows them"))
        };
        self.audit.order(order, work, |(), _| {}).await
    }

    fn key(&self, name: SecretName, agent: Option<&str>) -> Result<SecretKey, Report> {
        let agent = agent.map(|text| {
            let key: AgentKey = text.parse().map_err(|why: String| {
                Report::caller(
                    "agent_name_malformed",
                    "nothing was done",
                    why,
                    "`agentctl agent ls` shows the names",
                )
            })?;
            Ok::<_, Report>(self.find(&key)?.0)
        });
        Ok(SecretKey { name, agent: agent.transpose()? })
    }

    fn about(&self, action: &'static str, name: &SecretName, agent: Option<&str>) -> Order {
        let known = agent.and_then(|text| text.parse().ok()).and_then(|key| self.find(&key).ok());
        let about = match agent {
            Some(agent) => format!("{name} for {agent}"),
            None => name.to_string(),
        };
        Order { action, agent: known.map(|(agent, _)| agent), about }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Report> + Send + 'static,
) -> Result<T, Report> {
    tokio::task::spawn_blocking(work).await.map_err(|error| thread_lost(&error.to_string()))?
}
