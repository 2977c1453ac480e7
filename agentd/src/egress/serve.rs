//! Serves the sockets of one run until the run is over.
//!
//! The jail bound them inside the run's network namespace and keeps copies: what knocks while agentd is away waits.
//!
//! Always: a run has at most [`CONNECTIONS_MOST`] connections out at once, whatever doors they came through; more wait
//!         in the kernel's queues. A name keeps its synthetic address while a connection uses it (`Lease`).
//! Never:  the same addresses as the agentd before: a program that remembers one would mean another name by it. Each
//!         run's pool begins at a place of its own.

use super::budgets::Asked;
use super::record::Recorder;
use super::world::{Dialler, Names};
use super::{Egress, Run};
use agentd_domain::net::{Destination, EgressRules, Host};
use agentd_egress::{Checks, Limits, Pool, Relay, dns};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A browser opens some dozens; agentd's own descriptors are two for each.
const CONNECTIONS_MOST: usize = 64;
/// Names that one run may know at once. Stars make more names than rules.
const NAMES_MOST: usize = 1024;
/// After an error of accept (out of descriptors, for one) trying at once would only fail again.
const PAUSE: Duration = Duration::from_millis(100);
/// For a question over TCP.
const QUESTION_PATIENCE: Duration = Duration::from_secs(5);

type Way = Relay<Names, Dialler, Recorder>;

struct Doors {
    relay: Way,
    rules: EgressRules,
    pool: Mutex<Pool>,
    recorder: Recorder,
    places: Arc<Semaphore>,
    over: CancellationToken,
}

pub(super) async fn serve(egress: Egress, run: Run) {
    let Run { agent, run: run_id, sockets, over } = run;
    let rules = match EgressRules::from_lines(&sockets.rules) {
        Ok(rules) => rules,
        Err(why) => {
            // Of a plan that another version has compiled. Nothing is served, so nothing leaves.
            return tracing::error!(agent_id = %agent, run_id = %run_id, why, "rules for the network are unreadable");
        }
    };
    let lines = Arc::new(sockets.rules);
    let family = match egress.family(agent).await {
        Ok(family) => family,
        Err(report) => {
            // Whose budgets it counts against is not known, so nothing is served.
            return tracing::error!(agent_id = %agent, run_id = %run_id, why = report.why, "an agent's family is unknown");
        }
    };
    let bytes_per_day = sockets.bytes_per_day;
    let asked = Asked { agent, rules: &rules, lines: &lines, bytes_per_day, family: &family };
    let budgets = egress.0.book.of(asked).await;
    let mut changed = egress.0.secrets.watch();
    changed.mark_unchanged();
    let (set, policy) = watch::channel(Arc::new(egress.policy(agent, &rules, &budgets)));
    let recorder = Recorder { audit: egress.0.audit.clone(), agent, run: run_id, rules: lines };
    let relay = Relay {
        agent,
        policy,
        limits: Limits::default(),
        resolve: Names(Arc::clone(&egress.0.resolver)),
        dial: Dialler,
        audit: recorder.clone(),
        ending: egress.0.ending.clone(),
        checks: Checks::default(),
    };
    let doors = Arc::new(Doors {
        relay,
        rules: rules.clone(),
        pool: Mutex::new(Pool::beginning_at(NAMES_MOST, random_place())),
        recorder,
        places: Arc::new(Semaphore::new(CONNECTIONS_MOST)),
        over: over.clone(),
    });
    if let Err(error) = open(&doors, sockets.proxy, sockets.dns_udp, sockets.dns_tcp, sockets.captured) {
        tracing::error!(agent_id = %agent, run_id = %run_id, %error, "an agent's way out is not served");
        return;
    }
    tracing::info!(agent_id = %agent, run_id = %run_id, rules = rules.as_slice().len(), "an agent's way out is served");
    // While the run lives its policy follows the owner's secrets; then whoever waits for it ends.
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            alive = changed.changed() => if alive.is_err() { return },
        }
        set.send_replace(Arc::new(egress.policy(agent, &rules, &budgets)));
    }
}

fn open(
    doors: &Arc<Doors>,
    proxy: OwnedFd,
    dns_udp: OwnedFd,
    dns_tcp: OwnedFd,
    captured: Vec<(u16, OwnedFd)>,
) -> io::Result<()> {
    let listener = |fd: OwnedFd| TcpListener::from_std(std::net::TcpListener::from(fd));
    let udp = UdpSocket::from_std(std::net::UdpSocket::from(dns_udp))?;
    tokio::spawn(Arc::clone(doors).answer_datagrams(udp));
    tokio::spawn(Arc::clone(doors).accept(listener(dns_tcp)?, Door::Names));
    tokio::spawn(Arc::clone(doors).accept(listener(proxy)?, Door::Proxy));
    for (_, fd) in captured {
        tokio::spawn(Arc::clone(doors).accept(listener(fd)?, Door::Caught));
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Door {
    Proxy,
    Names,
    Caught,
}

impl Doors {
    async fn accept(self: Arc<Self>, listener: TcpListener, door: Door) {
        loop {
            let accepted = tokio::select! {
                () = self.over.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    // The semaphore is never closed. One connection of each listener waits here, the others outside.
                    let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
                    tokio::spawn(Arc::clone(&self).connection(stream, door, place));
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, door: Door, _place: OwnedSemaphorePermit) {
        let served = async {
            match door {
                Door::Proxy => self.relay.serve_proxy(stream).await,
                Door::Caught => self.caught(stream).await,
                // A client that says nothing, or half a question, has only itself waiting.
                Door::Names => drop(timeout(QUESTION_PATIENCE, self.answer_stream(stream)).await),
            }
        };
        tokio::select! {
            () = served => {}
            () = self.over.cancelled() => {}
        }
    }

    /// The address that the program connected to says which name it means.
    async fn caught(&self, stream: TcpStream) {
        let lease = match stream.local_addr() {
            Ok(SocketAddr::V4(address)) => self.lease(*address.ip()).map(|lease| (lease, address.port())),
            _ => None,
        };
        let destination = lease
            .as_ref()
            .and_then(|(lease, port)| Destination::new(Host::Name(lease.name.clone()), *port).ok());
        self.relay.serve_captured(stream, destination).await;
        drop(lease);
    }

    fn lease(&self, address: Ipv4Addr) -> Option<agentd_egress::synthetic::Lease> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).lease(address)
    }

    async fn answer_datagrams(self: Arc<Self>, socket: UdpSocket) {
        // One byte more than a question may have, so that a longer one shows.
        let mut question = [0; dns::MESSAGE_MAX_BYTES + 1];
        loop {
            let received = tokio::select! {
                () = self.over.cancelled() => return,
                received = socket.recv_from(&mut question) => received,
            };
            match received {
                Ok((length, from)) => {
                    if let Some(answer) = self.answer(question.get(..length).unwrap_or_default()) {
                        // Who has gone does not wait for it.
                        let _ = socket.send_to(&answer, from).await;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a question was not received");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// RFC 1035, 4.2.2: each message has its length before it.
    async fn answer_stream(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = usize::from(stream.read_u16().await?);
            if length > dns::MESSAGE_MAX_BYTES {
                return Ok(());
            }
            let mut question = vec![0; length];
            stream.read_exact(&mut question).await?;
            let Some(answer) = self.answer(&question) else { return Ok(()) };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await?;
        }
    }

    fn answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        let answer = {
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            dns::answer(question, &self.rules, &mut pool, Instant::now())
        };
        self.recorder.asked(&answer.outcome);
        answer.message
    }
}

fn random_place() -> usize {
    let mut bytes = [0; 8];
    // Without chance there is still a pool; only a restart of agentd could be confused by it.
    let _ = getrandom::fill(&mut bytes);
    usize::try_from(u64::from_le_bytes(bytes) % (1 << 32)).unwrap_or(0)
}
