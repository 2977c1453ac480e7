//! How does the clock get right, and who said so?
//!
//! One task asks a time server (SNTP, RFC 4330), lets `plan::judge` decide and sets the clock. It asks only
//! while there is a default route or a server on the link, and rarely: see `plan::Poll`.
//!
//! Never: `adjtime`. Small differences stay, larger ones are one step; the appliance's ledgers order by the
//!        boot clock, so a step back does not reorder them.

use crate::plan::{self, Poll, Verdict};
use agentd_domain::netd::ClockStatus;
use agentd_domain::{fault::Report, initctl::Clock};
use rsntp::{Config, SntpClient};
use rustix::time::{ClockId, Timespec};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// A name may have many addresses; the pool's servers are all as good.
const ADDRESSES_PER_NAME: usize = 2;
const ANSWER: Duration = Duration::from_secs(3);
const SNTP_PORT: u16 = 123;

/// What the clock's task must know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Nobody is asked while there is no way out.
    pub reachable: bool,
    pub servers: Vec<String>,
    pub build_unix_ms: u64,
    pub floor_unix_ms: u64,
}

/// What it tells: where the clock stands, and what is wrong if something is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: ClockStatus,
    pub problem: Option<Report>,
}

/// A server's word.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sample {
    server: String,
    /// Server minus clock.
    offset_ms: i64,
}

pub async fn keep(mut questions: watch::Receiver<Question>, answers: mpsc::Sender<Answer>) {
    let mut poll = Poll::default();
    let mut answer = Answer::default();
    loop {
        let Ok(question) =
            questions.wait_for(|q| q.reachable && !q.servers.is_empty()).await.map(|q| q.clone())
        else {
            return;
        };
        let servers = question.servers.clone();
        // The system's resolver blocks, so both wait on a thread of their own.
        let sample = tokio::task::spawn_blocking(move || ask(&servers)).await;
        let sample = sample.unwrap_or_else(|why| Err(vec![why.to_string()]));
        answer.problem = conclude(&question, sample, &mut answer.status).err();
        let pause = if answer.problem.is_none() { poll.after_answer() } else { poll.after_failure() };
        if answers.send(answer.clone()).await.is_err() {
            return;
        }
        // Other servers are worth a question at once.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = questions.wait_for(|new| new.reachable && *new != question) => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Judges the sample, sets the clock, writes down what is known now.
fn conclude(
    question: &Question,
    sample: Result<Sample, Vec<String>>,
    status: &mut ClockStatus,
) -> Result<(), Report> {
    let sample = sample.map_err(|tried| {
        Report::environment(
            "time_unknown",
            "the clock is not confirmed",
            format!("no time server answered: {}", tried.join("; ")),
            "allow UDP port 123 to the internet, or name a server of your network in `[time] servers`",
        )
    })?;
    // What was confirmed before is as good a floor as the stored one.
    let floor = question.floor_unix_ms.max(status.confirmed_unix_ms.unwrap_or(0));
    let refused = |why: &str| {
        Report::environment(
            "time_refused",
            "the clock was not set",
            format!("the time server {} {why}", sample.server),
            "name another server in `[time] servers`",
        )
    };
    match plan::judge(now_unix_ms(), sample.offset_ms, question.build_unix_ms, floor) {
        Verdict::BeforeFloor => return Err(refused("says a time that is certainly past")),
        Verdict::PastHorizon => {
            return Err(refused("says a time ten years or more after this version was built"));
        }
        Verdict::Leave => {}
        Verdict::SetTo { .. } => set_by(sample.offset_ms).map_err(|why| {
            Report::bug("clock_not_set", "the clock was not set", why.to_string(), "restart the appliance")
        })?,
    }
    tracing::info!(server = sample.server, offset_ms = sample.offset_ms, "the clock is confirmed");
    *status = ClockStatus {
        state: Clock::Sntp,
        confirmed_unix_ms: Some(now_unix_ms()),
        server: Some(sample.server),
        offset_ms: Some(sample.offset_ms),
    };
    Ok(())
}

/// Moves the clock by a difference, so that the time since the question does not matter.
fn set_by(offset_ms: i64) -> rustix::io::Result<()> {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let ns =
        i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec) + i128::from(offset_ms) * 1_000_000;
    // `judge` has kept the result within a few decades of the build.
    let (tv_sec, tv_nsec) = (ns.div_euclid(1_000_000_000) as i64, ns.rem_euclid(1_000_000_000) as i64);
    rustix::time::clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })
}

pub fn now_unix_ms() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1000) + now.tv_nsec as u64 / 1_000_000
}

/// The first answer of the servers in order, or why each gave none. Blocks for some seconds per server.
fn ask(servers: &[String]) -> Result<Sample, Vec<String>> {
    let mut failures = Vec::new();
    for server in servers {
        let addresses: Vec<SocketAddr> = match (server.as_str(), SNTP_PORT).to_socket_addrs() {
            Ok(addresses) => addresses.take(ADDRESSES_PER_NAME).collect(),
            Err(why) => {
                failures.push(format!("{server}: {why}"));
                continue;
            }
        };
        for address in addresses {
            match ask_one(address) {
                Ok(offset_ms) => return Ok(Sample { server: server.clone(), offset_ms }),
                Err(why) => failures.push(format!("{server} ({}): {why}", address.ip())),
            }
        }
    }
    Err(failures)
}

fn ask_one(address: SocketAddr) -> Result<i64, rsntp::SynchronizationError> {
    let any = match address.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let config = Config::default().bind_address(SocketAddr::new(any, 0)).timeout(ANSWER);
    let result = SntpClient::with_config(config).synchronize(address)?;
    Ok((result.clock_offset().as_secs_f64() * 1000.0).round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        let now = now_unix_ms();
        Question {
            reachable: true,
            servers: vec![],
            build_unix_ms: now - 1_000_000,
            floor_unix_ms: now - 500_000,
        }
    }

    fn said(offset_ms: i64) -> Result<Sample, Vec<String>> {
        Ok(Sample { server: "t.example".into(), offset_ms })
    }

    #[test]
    fn an_agreeing_server_confirms() {
        let mut status = ClockStatus::default();
        conclude(&question(), said(20), &mut status).unwrap();
        assert_eq!((status.state, status.server.as_deref()), (Clock::Sntp, Some("t.example")));
        assert!(status.confirmed_unix_ms.is_some());
    }

    #[test]
    fn a_liar_changes_nothing() {
        let mut status = ClockStatus::default();
        for lie in [-600_000, -2_000_000, 4_000_000_000_000] {
            assert_eq!(conclude(&question(), said(lie), &mut status).unwrap_err().code, "time_refused");
        }
        assert_eq!(status, ClockStatus::default());
    }

    #[test]
    fn what_was_confirmed_is_a_floor() {
        let mut status =
            ClockStatus { confirmed_unix_ms: Some(now_unix_ms() - 1000), ..ClockStatus::default() };
        assert_eq!(conclude(&question(), said(-60_000), &mut status).unwrap_err().code, "time_refused");
    }

    #[test]
    fn silence_is_told_with_what_was_tried() {
        let report =
            conclude(&question(), Err(vec!["a: no route".into()]), &mut ClockStatus::default()).unwrap_err();
        assert_eq!(report.code, "time_unknown");
        assert!(report.why.contains("a: no route"));
    }
}
