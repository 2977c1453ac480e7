//! Who is asked for addresses, and how is one dialled?
//!
//! Always: an allowed name alone is asked for, absolutely (with its last dot), so that no search domain makes another
//!         name of it; each question is asked anew and its answer is dialled, so there is no second answer. A name
//!         that the owner has given addresses for is never asked for.
//! Never:  an address that was not vetted: [`Vetted`] is made by `agentd_domain::net::address::vet` alone.
//!
//! glibc's resolver is asked, on threads that may block: it reads the file that netd writes, follows its changes, and is
//! what the rest of the world's programs use; a second one would be a second parser of strangers' answers. How many
//! questions wait at once is bounded, as glibc gives up late.

use agentd_domain::config::PrivateHost;
use agentd_domain::net::address::{Class, classify};
use agentd_domain::net::{Host, Name, Vetted};
use agentd_egress::{Dial, Resolve};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Half of the data plane's threads that may block: stores and files need the others.
const QUESTIONS_MOST: usize = 8;

pub(super) struct Resolver {
    given: HashMap<Name, Vec<IpAddr>>,
    places: Arc<Semaphore>,
}

impl Resolver {
    pub(super) fn new(private: &[PrivateHost]) -> Self {
        let given = private.iter().filter_map(|host| match &host.host {
            Host::Name(name) if !host.addresses.is_empty() => Some((name.clone(), host.addresses.clone())),
            _ => None,
        });
        Self { given: given.collect(), places: Arc::new(Semaphore::new(QUESTIONS_MOST)) }
    }

    async fn ask(&self, name: &Name) -> io::Result<Vec<IpAddr>> {
        let absolute = format!("{name}.");
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(io::Error::other)?;
        let asked = tokio::task::spawn_blocking(move || {
            // Held by the thread and not by who waits: a question goes on when nobody waits any more.
            let _place = place;
            (absolute.as_str(), 0).to_socket_addrs()
        });
        let found = asked.await.map_err(io::Error::other)??;
        Ok(found.map(|address| address.ip()).collect())
    }
}

/// Of one run; all share one resolver.
pub(super) struct Names(pub(super) Arc<Resolver>);

impl Resolve for Names {
    async fn resolve(&self, name: &Name) -> io::Result<Vec<IpAddr>> {
        match self.0.given.get(name) {
            Some(addresses) => Ok(addresses.clone()),
            None => self.0.ask(name).await,
        }
    }
}

pub(super) struct Dialler;

impl Dial for Dialler {
    type Stream = TcpStream;

    async fn dial(&self, to: Vetted) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(to.socket()).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// A socket can be bound to the machine's own addresses alone (EADDRNOTAVAIL, ip(7)). So it is true of this moment,
    /// whatever address a lease has brought. Groups and the unspecified address can be bound to as well, and are
    /// refused as what they are.
    fn is_own(&self, address: IpAddr) -> bool {
        let shared = matches!(classify(address), Class::Multicast | Class::Reserved);
        !shared && UdpSocket::bind((address, 0)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_knows_its_own_addresses() {
        assert!(Dialler.is_own("127.0.0.1".parse().unwrap()));
        assert!(Dialler.is_own("127.9.9.9".parse().unwrap()));
        assert!(!Dialler.is_own("192.0.2.77".parse().unwrap()));
    }

    #[tokio::test]
    async fn a_name_with_addresses_of_the_owner_is_not_asked_for() {
        let name = Name::parse("nas.invalid").unwrap();
        let addresses: Vec<IpAddr> = vec!["192.168.1.9".parse().unwrap()];
        let host = Host::Name(name.clone());
        let given = PrivateHost { host, addresses: addresses.clone(), authority: None };
        let names = Names(Arc::new(Resolver::new(&[given])));
        assert_eq!(names.resolve(&name).await.unwrap(), addresses);
        let other = Name::parse("other.invalid").unwrap();
        assert!(names.resolve(&other).await.is_err(), "RFC 6761: it never exists");
    }
}
