//! Who is signed in?
//!
//! A session is a random 256-bit token that the client shows with each request. Only the token's SHA-256 is
//! kept, and only in memory: a restart of agentd signs everybody out, and a copy of the disk holds no session.
//!
//! States of a session: alive → gone (idle for [`IDLE`], older than [`OLDEST`], signed out, or pushed out by
//! newer ones). What streams on behalf of a session ends with it: see [`Grant::gone`].

use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub const IDLE: Duration = Duration::from_secs(12 * 3600);
pub const OLDEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// One owner with a few browsers and terminals. Bounds memory.
const MOST_SESSIONS: usize = 64;

#[derive(Default)]
pub struct Sessions {
    by_hash: HashMap<[u8; 32], Entry>,
}

struct Entry {
    started: Duration,
    used: Duration,
    gone: CancellationToken,
}

/// A live session, as a request sees it.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Cancelled when the session ends, so that streams end with it.
    pub gone: CancellationToken,
}

/// Does this request show that a person is there?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    Active,
    /// A page that refreshes itself: an open tab alone must not keep a session alive.
    Background,
}

impl Sessions {
    /// Makes the session that `token` will show.
    pub fn start(&mut self, token: &str, now: Duration) {
        self.sweep(now);
        while self.by_hash.len() >= MOST_SESSIONS {
            let Some(oldest) = self.by_hash.iter().min_by_key(|(_, e)| e.used).map(|(hash, _)| *hash) else {
                break;
            };
            self.end(&oldest);
        }
        let entry = Entry { started: now, used: now, gone: CancellationToken::new() };
        self.by_hash.insert(hash(token), entry);
    }

    pub fn check(&mut self, token: &str, now: Duration, used: Use) -> Option<Grant> {
        let hash = hash(token);
        let entry = self.by_hash.get_mut(&hash)?;
        if !alive(entry, now) {
            self.end(&hash);
            return None;
        }
        if used == Use::Active {
            entry.used = now;
        }
        Some(Grant { gone: entry.gone.clone() })
    }

    pub fn stop(&mut self, token: &str) {
        self.end(&hash(token));
    }

    fn end(&mut self, hash: &[u8; 32]) {
        if let Some(entry) = self.by_hash.remove(hash) {
            entry.gone.cancel();
        }
    }

    fn sweep(&mut self, now: Duration) {
        self.by_hash.retain(|_, entry| {
            let keep = alive(entry, now);
            if !keep {
                entry.gone.cancel();
            }
            keep
        });
    }
}

fn alive(entry: &Entry, now: Duration) -> bool {
    now.saturating_sub(entry.used) < IDLE && now.saturating_sub(entry.started) < OLDEST
}

/// Looking a hash up in a table tells by its timing at most something about hashes, never about tokens.
fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(77);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn idle_sessions_end_and_used_ones_live_on() {
        let mut sessions = Sessions::default();
        sessions.start("t", START);
        assert!(sessions.check("t", START + IDLE - SECOND, Use::Active).is_some());
        assert!(sessions.check("t", START + IDLE + SECOND, Use::Active).is_some());
        assert!(sessions.check("t", START + IDLE * 3, Use::Active).is_none());
        assert!(sessions.check("t", START, Use::Active).is_none(), "an ended session stays ended");
    }

    #[test]
    fn a_page_that_refreshes_itself_keeps_nothing_alive() {
        let mut sessions = Sessions::default();
        sessions.start("t", START);
        assert!(sessions.check("t", START + IDLE - SECOND, Use::Background).is_some());
        assert!(sessions.check("t", START + IDLE, Use::Background).is_none());
    }

    #[test]
    fn the_oldest_age_holds_however_busy_it_is() {
        let mut sessions = Sessions::default();
        sessions.start("t", START);
        let mut now = START;
        while now < START + OLDEST - IDLE {
            now += IDLE / 2;
            assert!(sessions.check("t", now, Use::Active).is_some());
        }
        assert!(sessions.check("t", START + OLDEST, Use::Active).is_none());
    }

    #[test]
    fn signing_out_ends_streams() {
        let mut sessions = Sessions::default();
        sessions.start("t", START);
        let grant = sessions.check("t", START, Use::Active).expect("alive");
        sessions.stop("t");
        assert!(grant.gone.is_cancelled());
        assert!(sessions.check("t", START, Use::Active).is_none());
    }

    #[test]
    fn the_table_is_bounded_and_the_least_used_goes_first() {
        let mut sessions = Sessions::default();
        for n in 0..MOST_SESSIONS as u64 {
            sessions.start(&n.to_string(), START + Duration::from_secs(n));
        }
        let now = START + Duration::from_secs(500);
        assert!(sessions.check("0", now, Use::Active).is_some());
        sessions.start("new", now);
        assert_eq!(sessions.by_hash.len(), MOST_SESSIONS);
        assert!(sessions.check("0", now, Use::Active).is_some());
        assert!(sessions.check("1", now, Use::Active).is_none());
    }
}
