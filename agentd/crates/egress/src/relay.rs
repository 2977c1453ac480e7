//! How does one accepted connection get out, or hear why not?
//!
//! In:     a connection from the proxy's port ([`Relay::serve_proxy`]) or one caught on a synthetic address
//!         ([`Relay::serve_captured`]); the agent's [`Policy`], which may change meanwhile.
//! Out:    bytes to and from the address that was decided on; [`Event`]s.
//! States: first bytes → (CONNECT | SOCKS | caught) → decided → opened → handshake checked → bytes;
//!         or → request decided → opened → exchanged → next request.
//! Always: one path for all doors: a rule for clear HTTP is read request by request also inside CONNECT and SOCKS.
//!         Names are resolved once per decision, and only what [`address::vet`] returned is dialled. Each request
//!         has a connection of its own to the host, so nothing that follows it can be taken for its answer.
//!         A connection ends when the rules no longer allow it.
//! Never:  a name that is resolved before it is allowed: the question alone would carry data out.
//!         How many connections an agent may have is decided by who accepts them.

mod checks;
mod client;
mod exchange;
mod meter;
mod tunnel;

use crate::address::{Reach, Vetted};
use crate::audit::{Audit, Door, End, Event};
use crate::budget::{ByteBudget, Purse, Whose};
use crate::ending::{Ended, Ending};
use crate::hello::{self, HelloError};
use crate::http1::{self, Kind, Request};
use crate::name::{Destination, Host, Name};
use crate::refusal::{Refusal, Waiting, clip};
use crate::rules::{Allow, Asked, EgressRules, Inside, Way};
use crate::secret::forms::Forms;
use crate::secret::{self, Secret};
use crate::socks5;
use agentd_domain::ids::AgentId;
pub use checks::Checks;
use client::{Client, Reply};
use meter::{Meter, Stop};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::timeout;

/// More addresses than this in one answer are vetted and not tried.
const ADDRESSES_TRIED: usize = 4;

/// Asks for the addresses of a name, once per call and without search domains.
pub trait Resolve: Send + Sync {
    fn resolve(&self, name: &Name) -> impl Future<Output = io::Result<Vec<IpAddr>>> + Send;
}

/// Connects to an address that was vetted, and to no other.
pub trait Dial: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    fn dial(&self, to: Vetted) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Whether this machine itself is at the address now. Asked for each address of an answer.
    fn is_own(&self, _address: IpAddr) -> bool {
        false
    }
}

/// All that decides for one agent. Replaced as a whole, so rules and budgets fit each other.
#[derive(Debug, Clone)]
pub struct Policy {
    pub rules: EgressRules,
    pub budgets: Budgets,
    /// The appliance's own addresses, besides those that [`Dial::is_own`] finds: an agent must not reach the console
    /// through its public name.
    pub own: Vec<IpAddr>,
    /// By the rule's number. A rule whose secret is missing here refuses its requests.
    pub secrets: HashMap<usize, Secret>,
}

#[derive(Debug, Clone, Default)]
pub struct Budgets {
    /// For whatever the agent moves.
    pub agent: Vec<(Whose, Arc<ByteBudget>)>,
    /// By the rule's number; besides those of the agent.
    pub by_rule: HashMap<usize, Vec<(Whose, Arc<ByteBudget>)>>,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the first byte to a complete head, handshake or SOCKS request.
    pub head: Duration,
    pub resolve: Duration,
    /// For each address.
    pub dial: Duration,
    /// Without a byte in either direction; also between two requests.
    pub idle: Duration,
    /// For one tunnel or one request.
    pub total: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            resolve: Duration::from_secs(10),
            dial: Duration::from_secs(10),
            // A language model may think for minutes before its first token.
            idle: Duration::from_secs(10 * 60),
            total: Duration::from_secs(6 * 60 * 60),
        }
    }
}

/// Serves the connections of one agent.
pub struct Relay<R, D, A> {
    pub agent: AgentId,
    pub policy: watch::Receiver<Arc<Policy>>,
    pub limits: Limits,
    pub resolve: R,
    pub dial: D,
    pub audit: A,
    /// Without it rules that speak of what is inside TLS are refused.
    pub ending: Option<Ending>,
    pub checks: Checks,
}

/// An allowed destination with an open connection.
struct Opened<S> {
    stream: S,
    address: SocketAddr,
}

impl<R: Resolve, D: Dial, A: Audit> Relay<R, D, A> {
    /// A connection to the proxy's port: HTTP or SOCKS 5, told apart by the first byte. Returns when it is over.
    pub async fn serve_proxy<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(&self, stream: S) {
        let mut client = Client::new(stream);
        match timeout(self.limits.head, client.first_byte()).await {
            Ok(Some(socks5::VERSION)) => self.socks(client).await,
            Ok(Some(byte)) if byte.is_ascii_alphabetic() => self.requests(client, Door::Forward, None).await,
            Ok(Some(_)) => {
                self.deny(Door::Forward, None, None, &Refusal::NotAProxy);
                client.refuse(Reply::Http, &Refusal::NotAProxy).await;
            }
            // Opened and never used.
            Ok(None) | Err(_) => {}
        }
    }

    /// A connection to a synthetic address, with the name and port that it stands for, if it stands for any.
    pub async fn serve_captured<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        stream: S,
        destination: Option<Destination>,
    ) {
        let client = Client::new(stream);
        match destination {
            Some(destination) => self.stream(client, destination, Door::Captured, Reply::Nothing).await,
            None => self.deny(Door::Captured, None, None, &Refusal::NotSynthetic),
        }
    }

    async fn socks<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(&self, mut client: Client<S>) {
        let read = timeout(self.limits.head, client.socks_request()).await;
        match read.unwrap_or(Err(Stop::Refused(Refusal::Slow(Waiting::Head)))) {
            Ok(destination) => self.stream(client, destination, Door::Socks, Reply::Socks).await,
            Err(Stop::Refused(refusal)) => {
                self.deny(Door::Socks, None, None, &refusal);
                client.refuse(Reply::Socks, &refusal).await;
            }
            Err(_) => {}
        }
    }

    /// A stream of bytes to one destination, whatever door it came through.
    async fn stream<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        mut client: Client<S>,
        destination: Destination,
        door: Door,
        reply: Reply,
    ) {
        let policy = self.policy();
        let allow = match self.checks.decide(&policy.rules, &destination, Asked::Stream) {
            Ok(Allow { way: Way::EndTls, rule, .. }) if self.ending.is_none() => {
                Err(Refusal::EndTls { destination: destination.clone(), rule })
            }
            other => other,
        };
        let allow = match allow {
            Ok(allow) => allow,
            Err(refusal) => {
                self.deny(door, Some(&destination), None, &refusal);
                return client.refuse(reply, &refusal).await;
            }
        };
        if allow.way == Way::Http {
            // Nothing is dialled yet and nothing leaves: each request inside is decided, and audited, for itself.
            if client.accept(reply).await.is_ok() {
                self.requests(client, door, Some((destination, Inside::Clear))).await;
            }
            return;
        }
        if let (Way::EndTls, Some(ending)) = (allow.way, &self.ending) {
            return match self.ended(client, ending, &destination, reply).await {
                Ok(client) => self.requests(client, door, Some((destination, Inside::Tls))).await,
                Err(Stop::Refused(refusal)) => self.deny(door, Some(&destination), None, &refusal),
                Err(_) => {}
            };
        }
        self.record(door, Some(&destination), None, Ok(allow.rule));
        let meter = Meter::new(self.checks.purse(policy.budgets.of(allow.rule)));
        let mut address = None;
        let result = match self.open(&policy, &destination, allow.reach).await {
            Ok(opened) => {
                address = Some(opened.address);
                let guard = self.guard(&meter, &destination, Asked::Stream, allow);
                self.tunnel(client, opened.stream, &destination, allow.way, reply, &meter, guard).await
            }
            Err(refusal) => {
                client.refuse(reply, &refusal).await;
                Err(Stop::Refused(refusal))
            }
        };
        self.close(door, &destination, address, allow.rule, &meter, result);
    }

    /// Says yes, checks that the handshake names the host, and answers it in the host's place.
    async fn ended<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        mut client: Client<S>,
        ending: &Ending,
        destination: &Destination,
        reply: Reply,
    ) -> Result<Client<Ended>, Stop> {
        client.accept(reply).await?;
        let slow = || Stop::Refused(Refusal::Slow(Waiting::Head));
        let named = timeout(self.limits.head, self.checks.handshake(&mut client, destination)).await;
        if let Err(stop) = named.unwrap_or_else(|_| Err(slow())) {
            client.last_words(&hello::ALERT_ACCESS_DENIED).await;
            return Err(stop);
        }
        if !hello::offers_http1(&client.unread) {
            // Said before anything else of the handshake, so that no client is writing when it arrives.
            client.last_words(&hello::ALERT_NO_PROTOCOL).await;
            let (destination, error) = (destination.clone(), HelloError::Protocol);
            return Err(Stop::Refused(Refusal::Hello { destination, error }));
        }
        let accepted =
            timeout(self.limits.head, ending.accept(client.into_stream(), &destination.host)).await;
        match accepted {
            Ok(Ok(stream)) => Ok(Client::new(stream)),
            Ok(Err(error)) => {
                let why = clip(&error.to_string());
                Err(Stop::Refused(Refusal::Ended { destination: destination.clone(), why }))
            }
            Err(_) => Err(slow()),
        }
    }

    /// Requests on one connection, each decided for itself. `inside` is the destination when it is known already.
    async fn requests<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        mut client: Client<S>,
        door: Door,
        inside: Option<(Destination, Inside)>,
    ) {
        loop {
            // Between two requests a client may be idle; once one has begun it has to arrive.
            let begun = match timeout(self.limits.idle, client.first_byte()).await {
                Ok(Some(_)) => timeout(self.limits.head, client.head(http1::head_end)).await,
                Ok(None) | Err(_) => return,
            };
            let head = begun.unwrap_or(Err(Stop::Refused(Refusal::Slow(Waiting::Head))));
            let parsed = match head {
                Ok(head) => self.checks.head(&head, inside.as_ref()).map_err(Refusal::Head),
                Err(Stop::Refused(refusal)) => Err(refusal),
                Err(_) => return,
            };
            match parsed {
                Ok(request) if request.kind == Kind::Connect => {
                    return self.connect(client, request.destination).await;
                }
                Ok(request) => {
                    if !self.one_request(&mut client, &request, door).await {
                        return;
                    }
                }
                Err(refusal) => {
                    self.deny(door, inside.as_ref().map(|(to, _)| to), None, &refusal);
                    return client.refuse(Reply::Http, &refusal).await;
                }
            }
        }
    }

    /// Boxed, because a tunnel may again hold requests; [`http1::parse_inside`] ends that: there is no CONNECT inside.
    fn connect<'a, S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &'a self,
        client: Client<S>,
        destination: Destination,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(self.stream(client, destination, Door::Connect, Reply::Http))
    }

    /// Whether the connection can take another request.
    async fn one_request<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        client: &mut Client<S>,
        request: &Request,
        door: Door,
    ) -> bool {
        let policy = self.policy();
        let destination = &request.destination;
        let asked = Asked::Request { inside: request.inside, method: &request.method, path: &request.path };
        let seen = Some((request.method.as_str(), request.path.as_str()));
        let allow = match self.checks.decide(&policy.rules, destination, asked) {
            Ok(allow) => allow,
            Err(refusal) => {
                self.deny(door, Some(destination), seen, &refusal);
                // The body is unread, so nothing after it can be found.
                client.refuse(Reply::Http, &refusal).await;
                return false;
            }
        };
        let filled = match filled(&policy, request, allow.rule, self.checks) {
            Ok(filled) => filled,
            Err(refusal) => {
                self.deny(door, Some(destination), seen, &refusal);
                client.refuse(Reply::Http, &refusal).await;
                return false;
            }
        };
        self.record(door, Some(destination), seen, Ok(allow.rule));
        let meter = Meter::new(self.checks.purse(policy.budgets.of(allow.rule)));
        let mut address = None;
        let result = match self.open(&policy, destination, allow.reach).await {
            Ok(opened) => {
                address = Some(opened.address);
                let guard = self.guard(&meter, destination, asked, allow);
                match (allow.way, &self.ending) {
                    (Way::EndTls, Some(ending)) => match self.begun(ending, opened.stream, destination).await
                    {
                        Ok(host) => exchange::exchange(client, host, filled, &meter, guard).await,
                        Err(refusal) => Err(Stop::Refused(refusal)),
                    },
                    // Decided for what is read in the clear; what is inside TLS never goes out without it.
                    (Way::Http, _) => exchange::exchange(client, opened.stream, filled, &meter, guard).await,
                    _ => Err(Stop::Refused(Refusal::EndTls {
                        destination: destination.clone(),
                        rule: allow.rule,
                    })),
                }
            }
            Err(refusal) => Err(Stop::Refused(refusal)),
        };
        if let (Err(Stop::Refused(refusal)), false) = (&result, meter.answered()) {
            client.refuse(Reply::Http, refusal).await;
        }
        let again = matches!(result, Ok(exchange::Next::Request));
        self.close(door, destination, address, allow.rule, &meter, result.map(|_| ()));
        again
    }

    async fn begun(
        &self,
        ending: &Ending,
        stream: D::Stream,
        destination: &Destination,
    ) -> Result<Ended, Refusal> {
        match timeout(self.limits.dial, ending.connect(stream, &destination.host)).await {
            Ok(Ok(host)) => Ok(host),
            Ok(Err(error)) => {
                let why = clip(&error.to_string());
                Err(Refusal::HostTls { destination: destination.clone(), why })
            }
            Err(_) => Err(Refusal::Slow(Waiting::Dial)),
        }
    }

    /// Resolves once, vets every address, and dials what was vetted.
    async fn open(
        &self,
        policy: &Policy,
        destination: &Destination,
        reach: Reach,
    ) -> Result<Opened<D::Stream>, Refusal> {
        let answer = match &destination.host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => timeout(self.limits.resolve, self.resolve.resolve(name))
                .await
                .map_err(|_| Refusal::Slow(Waiting::Resolve))?
                .map_err(|error| Refusal::Resolve { destination: destination.clone(), kind: error.kind() })?,
        };
        let mut own = policy.own.clone();
        own.extend(answer.iter().filter(|address| self.dial.is_own(**address)));
        let vetted = self
            .checks
            .vet(destination, &answer, reach, &own)
            .map_err(|error| Refusal::Address { destination: destination.clone(), error })?;
        let mut refusal = Refusal::Slow(Waiting::Dial);
        for to in vetted.into_iter().take(ADDRESSES_TRIED) {
            refusal = match timeout(self.limits.dial, self.dial.dial(to)).await {
                Ok(Ok(stream)) => return Ok(Opened { stream, address: to.socket() }),
                Ok(Err(error)) => Refusal::Dial { destination: destination.clone(), kind: error.kind() },
                Err(_) => Refusal::Slow(Waiting::Dial),
            };
        }
        Err(refusal)
    }

    /// Ends with the reason to stop: too long, too quiet, or no longer allowed.
    async fn guard(&self, meter: &Meter, destination: &Destination, asked: Asked<'_>, allow: Allow) -> Stop {
        let mut policy = self.policy.clone();
        let revoked = async {
            loop {
                let now = {
                    let policy = policy.borrow_and_update();
                    self.checks.decide(&policy.rules, destination, asked)
                };
                if !now.is_ok_and(|now| now.way == allow.way && now.reach == allow.reach) {
                    return Stop::Revoked;
                }
                if policy.changed().await.is_err() {
                    // Nobody can change the rules any more: the agent is gone.
                    return Stop::Revoked;
                }
            }
        };
        tokio::select! {
            stop = revoked => stop,
            stop = meter.quiet(self.limits.idle) => stop,
            () = tokio::time::sleep(self.limits.total) => Stop::Refused(Refusal::Slow(Waiting::Total)),
        }
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    fn deny(
        &self,
        door: Door,
        destination: Option<&Destination>,
        request: Option<(&str, &str)>,
        refusal: &Refusal,
    ) {
        self.record(door, destination, request, Err(refusal.clone()));
    }

    fn record(
        &self,
        door: Door,
        destination: Option<&Destination>,
        request: Option<(&str, &str)>,
        verdict: Result<usize, Refusal>,
    ) {
        let without_query = |path: &str| clip(path.split_once('?').map_or(path, |(path, _)| path));
        self.audit.record(Event::Decided {
            agent: self.agent,
            door,
            destination: destination.cloned(),
            request: request.map(|(method, path)| (clip(method), without_query(path))),
            verdict,
        });
    }

    fn close(
        &self,
        door: Door,
        destination: &Destination,
        address: Option<SocketAddr>,
        rule: usize,
        meter: &Meter,
        result: Result<(), Stop>,
    ) {
        let (bytes_out, bytes_in) = meter.bytes();
        let end = match result {
            Ok(()) => End::Finished,
            Err(Stop::Lost | Stop::HostLost) => End::Lost,
            Err(Stop::Revoked) => End::Revoked,
            Err(Stop::Refused(refusal)) => End::Refused(refusal),
        };
        let destination = destination.clone();
        let agent = self.agent;
        self.audit.record(Event::Closed {
            agent,
            door,
            destination,
            address,
            rule,
            bytes_out,
            bytes_in,
            end,
        });
    }
}

/// A request as the host gets it, and the forms of the secret that must not come back.
struct Filled<'a> {
    request: std::borrow::Cow<'a, Request>,
    secret: Option<Forms>,
}

/// With the secret of the rule that has allowed it.
fn filled<'a>(
    policy: &'a Policy,
    request: &'a Request,
    rule: usize,
    checks: Checks,
) -> Result<Filled<'a>, Refusal> {
    use std::borrow::Cow::{Borrowed, Owned};
    let Some(into) = policy.rules.as_slice().get(rule).and_then(|rule| rule.secret.as_ref()) else {
        return Ok(Filled { request: Borrowed(request), secret: None });
    };
    let secret = policy.secrets.get(&rule);
    let secret = secret.ok_or_else(|| Refusal::Secret { rule, name: into.name.to_string() })?;
    Ok(Filled {
        request: Owned(secret::put_in(request, into, secret)),
        secret: checks.hidden(Forms::of(secret, into)),
    })
}

impl Budgets {
    fn of(&self, rule: usize) -> Purse {
        let own = self.by_rule.get(&rule).into_iter().flatten();
        Purse::new(own.chain(&self.agent).cloned())
    }
}

#[cfg(test)]
mod ended_tests;
#[cfg(test)]
mod rows;
#[cfg(test)]
mod tests;
