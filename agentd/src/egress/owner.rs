//! How does a connection go out that the owner ordered?
//!
//! In:    a host, a port, whether TLS. Out: a connection to an address that was vetted as an agent's would be.
//! Always: private networks and the appliance itself are open only as far as `[[egress.private]]` says; the name is
//!         resolved once, and that address is dialled.
//! Never:  on behalf of an agent. Those have rules of their own.

use super::Egress;
use super::world::{Dialler, Names};
use crate::models::{Dialling, Line, Outside};
use agentd_domain::fault::Report;
use agentd_domain::net::address::{Reach, vet};
use agentd_domain::net::{Destination, Host};
use agentd_egress::{Dial, Resolve};
use std::net::IpAddr;
use std::sync::Arc;

const WHAT: &str = "nothing was fetched";
const FIX: &str = "check the address and the network; a host of your own network must stand in agentd.toml: `[[egress.private]]`";

impl Egress {
    async fn reach(&self, host: Host, port: u16, tls: bool) -> Result<Box<dyn Line>, Report> {
        let lost = |why: String| Report::environment("host_unreachable", WHAT, why, FIX);
        let to = Destination::new(host.clone(), port)
            .map_err(|error| Report::caller("url_malformed", WHAT, error.to_string(), FIX))?;
        let addresses: Vec<IpAddr> = match &host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => {
                let names = Names(Arc::clone(&self.0.resolver));
                names.resolve(name).await.map_err(|error| lost(format!("{name}: {error}")))?
            }
        };
        let granted = self.0.private.iter().any(|private| private.host == host);
        let reach = if granted { Reach::Private } else { Reach::Public };
        let own: Vec<IpAddr> = addresses.iter().copied().filter(|address| Dialler.is_own(*address)).collect();
        let vetted = vet(&to, &addresses, reach, &own)
            .map_err(|error| Report::caller("host_refused", WHAT, format!("{host}: {error}"), FIX))?;
        let mut last = lost(format!("{host} has no address"));
        for address in vetted {
            let stream = match Dialler.dial(address).await {
                Ok(stream) => stream,
                Err(error) => {
                    last = lost(format!("{host}: {error}"));
                    continue;
                }
            };
            if !tls {
                return Ok(Box::new(stream));
            }
            let Some(ending) = &self.0.ending else {
                return Err(lost("TLS is not possible: the egress's authority is missing".to_owned()));
            };
            match ending.client(stream, &host).await {
                Ok(stream) => return Ok(Box::new(stream)),
                Err(error) => {
                    last = in_tls(&host, &error).unwrap_or_else(|| lost(format!("{host}: {error}")))
                }
            }
        }
        Err(last)
    }
}

/// Of a host that answered, and is not known to be the one that was named.
fn in_tls(host: &Host, error: &std::io::Error) -> Option<Report> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::InvalidCertificate(why) = error else { return None };
    let why = format!("the certificate of {host} was not accepted: {why:?}");
    let fix = format!(
        "check the address and the appliance's clock; a server with an authority of your own is known by `authority` in its `[[egress.private]]` of agentd.toml, beside `host = \"{host}\"`"
    );
    Some(Report::environment("host_not_verified", WHAT, why, fix))
}

impl Outside for Egress {
    fn dial(&self, host: Host, port: u16, tls: bool) -> Dialling<'_> {
        Box::pin(self.reach(host, port, tls))
    }
}
