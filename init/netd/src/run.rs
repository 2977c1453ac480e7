//! The loop: what happened, what should be, what must change, what to tell.
//!
//! Owns:  what DHCP said per link, what routers advertised, the clock's last word, the tasks behind them.
//! In:    events: the kernel changed something, DHCP, advertisements, the clock, signals.
//! Invariant: after every event the kernel is brought to what `plan::wanted` says and the files to what is
//!        true, from scratch. A missed event costs time, never correctness.
//! Threads: netd's only one. Waits are `select!`s, never sleeps.

use crate::clock::{self, Answer, Question};
use crate::error::RunError;
use crate::files::{self, Files};
use crate::kernel::{self, Kernel, Snapshot};
use crate::plan::{self, Dhcp};
use crate::{lease, rdnss};
use agentd_domain::fault::Report;
use agentd_domain::initctl::NetworkSettings;
use agentd_domain::netd::{LeaseStatus, LinkStatus, Settings, Status};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Comparing again after applying: the kernel takes routes away with their address, which the next round sees.
const ROUNDS: usize = 3;
/// After a change that the kernel refused. Its own messages wake us earlier.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Event {
    KernelChanged,
    Dhcp(u32, Dhcp),
    Advertised(rdnss::Advertised),
    Clock(Answer),
    Reload,
    /// A lifetime ended, or a refused change is worth another attempt.
    Tick,
    Stop,
}

/// Name servers that a router advertised on a link, each with its end.
type Advertisements = BTreeMap<(u32, Ipv6Addr), Instant>;

struct Netd {
    kernel: Kernel,
    files: Files,
    settings_path: PathBuf,
    settings: Settings,
    settings_problems: Vec<Report>,
    dhcp: BTreeMap<u32, Dhcp>,
    /// One per link with a carrier, while the settings say DHCP.
    dhcp_tasks: BTreeMap<u32, JoinHandle<()>>,
    dhcp_events: mpsc::Sender<(u32, Dhcp)>,
    advertised: Advertisements,
    question: watch::Sender<Question>,
    clock: Answer,
    refused: Vec<Report>,
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(settings_path: PathBuf, run_dir: PathBuf) -> Result<(), RunError> {
    let mut hang_up = signal(SignalKind::hangup()).map_err(RunError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let (kernel, mut kernel_changed) = Kernel::open()?;
    let (advertised_sender, mut advertised) = mpsc::channel(8);
    rdnss::listen(advertised_sender).map_err(RunError::Netlink)?;
    let (dhcp_events, mut dhcp) = mpsc::channel(8);
    let (question, questions) = watch::channel(Question::default());
    let (answer_sender, mut answers) = mpsc::channel(1);
    tokio::spawn(clock::keep(questions, answer_sender));

    let (settings, settings_problems) = files::read_settings(&settings_path);
    let mut netd = Netd {
        kernel,
        files: Files::new(run_dir),
        settings_path,
        settings,
        settings_problems,
        dhcp: BTreeMap::new(),
        dhcp_tasks: BTreeMap::new(),
        dhcp_events,
        advertised: Advertisements::new(),
        question,
        clock: Answer::default(),
        refused: Vec::new(),
    };
    loop {
        netd.settle().await?;
        let tick = netd.next_tick();
        let event = tokio::select! {
            changed = kernel_changed.recv() => changed.map(|()| Event::KernelChanged).ok_or(RunError::NetlinkEnded)?,
            Some((link, news)) = dhcp.recv() => Event::Dhcp(link, news),
            Some(news) = advertised.recv() => Event::Advertised(news),
            Some(answer) = answers.recv() => Event::Clock(answer),
            Some(()) = hang_up.recv() => Event::Reload,
            Some(()) = terminate.recv() => Event::Stop,
            Some(()) = interrupt.recv() => Event::Stop,
            () = sleep_until(tick) => Event::Tick,
        };
        tracing::debug!(?event, "netd");
        if netd.take(event) == Flow::Stop {
            return Ok(());
        }
    }
}

async fn sleep_until(tick: Option<Instant>) {
    match tick {
        Some(tick) => tokio::time::sleep_until(tick).await,
        None => std::future::pending().await,
    }
}

#[derive(PartialEq, Eq)]
enum Flow {
    GoOn,
    Stop,
}

impl Netd {
    fn take(&mut self, event: Event) -> Flow {
        match event {
            Event::KernelChanged | Event::Tick => {}
            Event::Dhcp(link, news) => {
                tracing::info!(link, ?news, "DHCP");
                self.dhcp.insert(link, news);
            }
            Event::Advertised(news) => {
                let end = Instant::now() + Duration::from_secs(u64::from(news.lifetime_s.min(7 * 24 * 3600)));
                self.advertised.extend(news.servers.iter().map(|&server| ((news.link, server), end)));
            }
            Event::Clock(answer) => self.clock = answer,
            Event::Reload => self.reload(),
            Event::Stop => return Flow::Stop,
        }
        Flow::GoOn
    }

    fn reload(&mut self) {
        let before = self.settings.network.clone();
        (self.settings, self.settings_problems) = files::read_settings(&self.settings_path);
        if self.settings.network != before {
            // Whatever was there came by the old settings, and must not be kept for "asking".
            self.stop_dhcp(|_| true);
            self.dhcp.values_mut().for_each(|dhcp| *dhcp = Dhcp::Nothing);
        }
    }

    /// Brings kernel, tasks and files to what is wanted now.
    async fn settle(&mut self) -> Result<(), RunError> {
        let now = Instant::now();
        self.advertised.retain(|_, end| *end > now);
        let mut snapshot = Snapshot::default();
        self.refused.clear();
        for _ in 0..ROUNDS {
            snapshot = match self.kernel.read().await {
                Ok(snapshot) => snapshot,
                Err(why) => {
                    self.refused.push(refused("the network's state was not read", &why.to_string()));
                    break;
                }
            };
            if !self.change(&snapshot).await {
                break;
            }
        }
        self.follow_carriers(&snapshot);
        let reachable = !snapshot.gateways.is_empty() && !snapshot.usable.is_empty();
        self.ask_for_time(reachable);
        let advertised: Vec<IpAddr> = self.advertised.keys().map(|(_, server)| IpAddr::V6(*server)).collect();
        let dns = plan::name_servers(&self.settings.network, &self.dhcp, &advertised);
        self.files.write_name_servers(&dns)?;
        self.files.write_status(&self.status(&snapshot, &dns))
    }

    /// Applies what differs. Says whether anything was changed, so that it is worth reading again.
    async fn change(&mut self, snapshot: &Snapshot) -> bool {
        let wanted = plan::wanted(&self.settings.network, &snapshot.links, &self.dhcp);
        for link in &snapshot.links {
            // Before the link comes up: the kernel asks routers at that moment.
            if let Some(Err(why)) = wanted.get(&link.index).map(|wanted| kernel::set_ipv6(link, wanted.ipv6))
            {
                let what = format!("IPv6 on {} was not set up", link.name);
                self.refused.push(refused(&what, &why.to_string()));
            }
        }
        let mut changed = false;
        for change in plan::changes(&snapshot.ours, &wanted) {
            match self.kernel.apply(&change).await {
                Ok(()) => changed = true,
                Err(why) => {
                    self.refused.push(refused(
                        &format!("a network change was refused ({change:?})"),
                        &why.to_string(),
                    ));
                }
            }
        }
        changed && self.refused.is_empty()
    }

    /// DHCP runs on a link exactly while it has a carrier. A link that lost it keeps its address, so that a
    /// cable pulled for a moment cuts no connection; when the carrier is back DHCP is asked anew, and a
    /// different lease replaces the address.
    fn follow_carriers(&mut self, snapshot: &Snapshot) {
        let asking = self.settings.network == NetworkSettings::Dhcp;
        let live =
            |index: u32| snapshot.links.iter().any(|link| link.index == index && link.carrier && link.up);
        self.stop_dhcp(|index| !asking || !live(index));
        self.dhcp.retain(|index, _| snapshot.links.iter().any(|link| link.index == *index));
        for link in snapshot.links.iter().filter(|link| asking && live(link.index)) {
            let events = self.dhcp_events.clone();
            self.dhcp_tasks
                .entry(link.index)
                .or_insert_with(|| tokio::spawn(lease::keep(link.clone(), events)));
        }
    }

    fn stop_dhcp(&mut self, which: impl Fn(u32) -> bool) {
        self.dhcp_tasks.retain(|&index, task| {
            let stop = which(index);
            if stop {
                task.abort();
            }
            !stop
        });
    }

    fn ask_for_time(&self, reachable: bool) {
        let question = Question {
            reachable,
            servers: plan::time_servers(&self.settings.time_servers, &self.dhcp),
            build_unix_ms: self.settings.build_unix_ms,
            floor_unix_ms: self.settings.floor_unix_ms,
        };
        self.question.send_if_modified(|old| {
            let differs = *old != question;
            *old = question;
            differs
        });
    }

    fn next_tick(&self) -> Option<Instant> {
        let retry = (!self.refused.is_empty()).then(|| Instant::now() + RETRY);
        self.advertised.values().copied().chain(retry).min()
    }

    fn status(&self, snapshot: &Snapshot, dns: &[IpAddr]) -> Status {
        let links = snapshot.links.iter().map(|link| LinkStatus {
            name: link.name.clone(),
            mac: link.mac_text(),
            carrier: link.carrier,
            lease: match self.dhcp.get(&link.index) {
                Some(Dhcp::Bound(lease)) => Some(LeaseStatus {
                    address: lease.address.to_string(),
                    server: lease.server.to_string(),
                    lease_s: lease.lease_s,
                }),
                _ => None,
            },
        });
        let problems =
            [self.settings_problems.clone(), self.refused.clone(), link_problems(snapshot)].concat();
        Status {
            links: links.collect(),
            addresses: snapshot.usable.iter().map(ToString::to_string).collect(),
            gateways: snapshot.gateways.iter().map(ToString::to_string).collect(),
            dns: dns.iter().map(ToString::to_string).collect(),
            clock: self.clock.status.clone(),
            problems: problems.into_iter().chain(self.clock.problem.clone()).collect(),
        }
    }
}

/// What a person can mend by hand.
fn link_problems(snapshot: &Snapshot) -> Vec<Report> {
    let report =
        |code: &str, why: &str, fix: &str| vec![Report::environment(code, "there is no network", why, fix)];
    if snapshot.links.is_empty() {
        report(
            "no_interface",
            "no wired network card was found",
            "plug in a network card that this version knows",
        )
    } else if snapshot.links.iter().all(|link| !link.carrier) {
        report("no_carrier", "no network cable has a signal", "plug in a cable, or look at the switch")
    } else if snapshot.usable.is_empty() {
        report(
            "no_address",
            "nobody on the network has given an address yet",
            "look at the DHCP server, or set a static address on the local console",
        )
    } else {
        vec![]
    }
}

fn refused(what: &str, why: &str) -> Report {
    Report::environment(
        "network_change_refused",
        what,
        why,
        "correct the network settings on the local console",
    )
}
