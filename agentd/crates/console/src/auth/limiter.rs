//! May this client try again?
//!
//! Guessing gets slower with every wrong guess; the owner is never locked out for good. A client's first
//! [`FREE_ATTEMPTS`] are free, then each must wait twice as long as the one before, up to [`LONGEST_WAIT`]. An
//! attempt that comes too early is refused without counting, so hammering does not prolong the wait. A quiet
//! quarter of an hour, or one success, clears the slate.
//!
//! An attempt counts when it begins, not when it has failed: otherwise many at once would all be free.
//!
//! Clients are told apart by address (an IPv6 network of 64 bits is one client, since one host commonly has all
//! of it). Strangers together are also limited, so that many addresses are no way round; an address that has
//! succeeded before is not one of them.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

pub const FREE_ATTEMPTS: u32 = 5;
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);
const FORGET_AFTER: Duration = Duration::from_secs(15 * 60);
/// Attempts of all strangers together in one [`WINDOW`].
const STRANGERS_PER_WINDOW: u32 = 120;
const WINDOW: Duration = Duration::from_secs(60);
/// Bounds memory. The one whose last attempt is oldest makes room: it had the most to forget.
const MOST_CLIENTS: usize = 1024;
const MOST_KNOWN: usize = 64;

#[derive(Default)]
pub struct Limiter {
    clients: HashMap<IpAddr, Client>,
    known: HashSet<IpAddr>,
    window_start: Duration,
    window_attempts: u32,
}

#[derive(Clone, Copy)]
struct Client {
    attempts: u32,
    last: Duration,
}

impl Limiter {
    /// Counts one attempt, or says how long to wait.
    pub fn attempt(&mut self, peer: IpAddr, now: Duration) -> Result<(), Duration> {
        let peer = client_of(peer);
        let stranger = !self.known.contains(&peer);
        if now.saturating_sub(self.window_start) >= WINDOW {
            self.window_start = now;
            self.window_attempts = 0;
        }
        if stranger && self.window_attempts >= STRANGERS_PER_WINDOW {
            return Err((self.window_start + WINDOW).saturating_sub(now));
        }
        let before = self.clients.get(&peer).copied().filter(|c| now.saturating_sub(c.last) < FORGET_AFTER);
        if let Some(client) = before {
            let wait = (client.last + wait_after(client.attempts)).saturating_sub(now);
            if !wait.is_zero() {
                return Err(wait);
            }
        }
        self.make_room();
        let attempts = before.map_or(0, |c| c.attempts).saturating_add(1);
        self.clients.insert(peer, Client { attempts, last: now });
        if stranger {
            self.window_attempts += 1;
        }
        Ok(())
    }

    pub fn succeeded(&mut self, peer: IpAddr) {
        let peer = client_of(peer);
        self.clients.remove(&peer);
        if self.known.len() < MOST_KNOWN {
            self.known.insert(peer);
        }
    }

    fn make_room(&mut self) {
        if self.clients.len() < MOST_CLIENTS {
            return;
        }
        if let Some(oldest) = self.clients.iter().min_by_key(|(_, c)| c.last).map(|(peer, _)| *peer) {
            self.clients.remove(&oldest);
        }
    }
}

/// How long the next attempt has to wait after this many.
fn wait_after(attempts: u32) -> Duration {
    match attempts.checked_sub(FREE_ATTEMPTS) {
        None => Duration::ZERO,
        Some(over) => Duration::from_secs(1 << over.min(6)).min(LONGEST_WAIT),
    }
}

fn client_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn after(limiter: &mut Limiter, mut now: Duration, attempts: u32) -> Duration {
        for _ in 0..attempts {
            if let Err(wait) = limiter.attempt(PEER, now) {
                now += wait;
                limiter.attempt(PEER, now).expect("the wait is over");
            }
        }
        now
    }

    #[test]
    fn five_are_free_then_waits_double_up_to_a_minute() {
        let mut limiter = Limiter::default();
        let mut now = Duration::from_secs(1000);
        now = after(&mut limiter, now, FREE_ATTEMPTS);
        assert_eq!(now, Duration::from_secs(1000));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(limiter.attempt(PEER, now), Err(Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
            assert_eq!(limiter.attempt(PEER, now), Ok(()));
        }
    }

    #[test]
    fn trying_too_early_does_not_prolong_the_wait() {
        let mut limiter = Limiter::default();
        let now = after(&mut limiter, Duration::from_secs(50), 8);
        let Err(wait) = limiter.attempt(PEER, now) else { panic!("free after eight") };
        for step in 0..100 {
            assert!(limiter.attempt(PEER, now + wait * step / 101).is_err());
        }
        assert_eq!(limiter.attempt(PEER, now + wait), Ok(()));
    }

    #[test]
    fn a_quiet_quarter_of_an_hour_or_a_success_clears_the_slate() {
        let mut limiter = Limiter::default();
        let now = after(&mut limiter, Duration::ZERO, 30);
        assert!(limiter.attempt(PEER, now).is_err());
        let later = now + FORGET_AFTER;
        assert_eq!(after(&mut limiter, later, FREE_ATTEMPTS), later);
        limiter.succeeded(PEER);
        assert_eq!(after(&mut limiter, later, FREE_ATTEMPTS), later);
    }

    #[test]
    fn one_client_does_not_lock_out_another() {
        let mut limiter = Limiter::default();
        let now = after(&mut limiter, Duration::from_secs(9), 20);
        assert_eq!(limiter.attempt("192.0.2.8".parse().expect("address"), now), Ok(()));
    }

    #[test]
    fn many_addresses_are_no_way_round_and_a_known_one_still_gets_in() {
        let mut limiter = Limiter::default();
        limiter.succeeded(PEER);
        let now = Duration::from_secs(5);
        let passed = (0..2000u32)
            .filter(|n| limiter.attempt(IpAddr::V4((0x0a00_0000 + n).into()), now).is_ok())
            .count();
        assert_eq!(passed, STRANGERS_PER_WINDOW as usize);
        assert_eq!(limiter.attempt(PEER, now), Ok(()));
        assert!(limiter.attempt("203.0.113.9".parse().expect("address"), now + WINDOW).is_ok());
    }

    #[test]
    fn a_host_has_one_ipv6_network_and_mapped_addresses_are_ipv4() {
        let a = client_of("2001:db8:1:2:3:4:5:6".parse().expect("address"));
        assert_eq!(a, client_of("2001:db8:1:2:ffff::".parse().expect("address")));
        assert_ne!(a, client_of("2001:db8:1:3::".parse().expect("address")));
        assert_eq!(client_of("::ffff:192.0.2.7".parse().expect("address")), PEER);
    }

    proptest! {
        /// Whatever happened before, the owner waits at most a minute.
        #[test]
        fn nobody_waits_longer_than_a_minute(steps in proptest::collection::vec((0u8..4, 0u64..120), 0..200)) {
            let mut limiter = Limiter::default();
            let mut now = Duration::ZERO;
            for (peer, pause) in steps {
                now += Duration::from_secs(pause);
                let peer = IpAddr::V4([10, 0, 0, peer].into());
                if let Err(wait) = limiter.attempt(peer, now) {
                    prop_assert!(wait <= LONGEST_WAIT);
                    prop_assert!(!wait.is_zero());
                }
            }
        }
    }

    #[test]
    fn the_table_stays_small() {
        let mut limiter = Limiter::default();
        for peer in 0..2 * MOST_CLIENTS as u32 {
            let now = Duration::from_secs(u64::from(peer));
            limiter.attempt(IpAddr::V4(peer.into()), now).expect("a stranger's first");
        }
        assert_eq!(limiter.clients.len(), MOST_CLIENTS);
    }
}
