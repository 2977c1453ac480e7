//! Who owns the appliance, and who is asking?
//!
//! Owns:   the claim code, the owner's password hash, the sessions, and the limits on guessing.
//! In:     codes, passwords and tokens. Out: sessions, or a [`Denied`] that says what to do.
//!
//! ```text
//!            right code and password          hash is on disk
//! unclaimed ────────────────────────▶ claiming ─────────────▶ owned
//!     ▲  └── code older than 15 min:      │ could not be written
//!     │      a new code                   ▼
//!     └─────────────────────────── the same code again
//! ```
//!
//! Invariants: there is no default password; the hash is on disk before anybody is told that the claim worked; a
//! damaged owner file is an error, never an unclaimed appliance. Time is the boot clock.
//! Threads:    methods are called from async workers; Argon2 and files run on blocking threads, one at a time,
//!             so that sign-ins cannot use up a small machine's memory.

pub mod code;
mod limiter;
pub mod password;
mod sessions;

pub use sessions::{Grant, IDLE, OLDEST, Use};

use crate::clock::BootClock;
use crate::state::StateFiles;
use agentd_domain::api::{Claim, Session};
use agentd_domain::fault::Report;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use code::ClaimCode;
use limiter::Limiter;
use serde::{Deserialize, Serialize};
use sessions::Sessions;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The one file that says who the owner is: claimed or not is whether it exists.
pub const OWNER_FILE: &str = "owner.json";
pub const CODE_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Sign-ins that may wait for the one that is hashing. More would only wait longer than a person does.
const HASH_QUEUE: usize = 8;
const OWNER_FORMAT: u32 = 1;

pub struct Auth {
    files: Arc<dyn StateFiles>,
    clock: BootClock,
    witness: Witness,
    inner: Mutex<Inner>,
    queue: Arc<Semaphore>,
    hasher: Arc<Semaphore>,
}

struct Inner {
    ownership: Ownership,
    claims: Limiter,
    logins: Limiter,
    sessions: Sessions,
}

enum Ownership {
    Unclaimed(Offer),
    Claiming(Offer),
    Owned { password_hash: String },
}

#[derive(Clone)]
struct Offer {
    code: ClaimCode,
    made: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnerFile {
    format: u32,
    password_hash: String,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{OWNER_FILE} cannot be read: {0}")]
    Read(#[source] io::Error),
    #[error("{OWNER_FILE} is damaged: {0}")]
    Damaged(String),
    #[error("the kernel gave no randomness: {0}")]
    Random(getrandom::Error),
}

/// Somebody has tried to come in.
#[derive(Debug)]
pub struct Attempt<'a> {
    pub entrance: Entrance,
    pub peer: IpAddr,
    /// Why not; `None` when let in.
    pub denied: Option<&'a Denied>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    Claim,
    SignIn,
    /// A request with a session that is none, or without any where one is needed.
    Session,
}

/// Is told of each attempt. Must not wait.
type Witness = Box<dyn Fn(Attempt<'_>) + Send + Sync>;

/// Why somebody was not let in.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("the claim code is wrong or older than 15 minutes")]
    CodeWrong,
    #[error("the password is wrong")]
    PasswordWrong,
    #[error("there is no such session")]
    NoSession,
    #[error("the password cannot be used: {0}")]
    PasswordWeak(#[from] password::Weak),
    #[error("the appliance has an owner already")]
    AlreadyClaimed,
    #[error("the appliance has no owner yet")]
    NotClaimed,
    #[error("too many wrong attempts")]
    Wait { wait: Duration },
    #[error("too many people sign in at once")]
    Busy,
    #[error("{OWNER_FILE} cannot be written: {0}")]
    Write(#[source] io::Error),
    #[error(transparent)]
    Hash(#[from] password::HashError),
    #[error("the kernel gave no randomness: {0}")]
    Random(getrandom::Error),
    #[error("a task of the console ended early")]
    Lost,
}

impl Auth {
    /// Reads the owner file; without one, makes the first claim code. Blocks for the read.
    pub fn open(files: Arc<dyn StateFiles>, clock: BootClock) -> Result<Self, OpenError> {
        let ownership = match files.read(OWNER_FILE).map_err(OpenError::Read)? {
            None => Ownership::Unclaimed(offer(clock()).map_err(OpenError::Random)?),
            Some(bytes) => Ownership::Owned { password_hash: parse_owner(&bytes)? },
        };
        Ok(Self {
            files,
            clock,
            witness: Box::new(|_| {}),
            inner: Mutex::new(Inner {
                ownership,
                claims: Limiter::default(),
                logins: Limiter::default(),
                sessions: Sessions::default(),
            }),
            queue: Arc::new(Semaphore::new(HASH_QUEUE)),
            hasher: Arc::new(Semaphore::new(1)),
        })
    }

    /// Tells this witness of each attempt from now on, instead of the one before.
    pub fn witnessed_by(self, witness: impl Fn(Attempt<'_>) + Send + Sync + 'static) -> Self {
        Self { witness: Box::new(witness), ..self }
    }

    pub fn is_claimed(&self) -> bool {
        matches!(self.lock().ownership, Ownership::Owned { .. })
    }

    /// The code to show on the local console; a new one when the last has expired, none once there is an owner.
    /// Ask at least once a minute, so that what is shown is what works.
    pub fn claim_code(&self) -> Option<String> {
        let now = (self.clock)();
        let mut inner = self.lock();
        if let Err(error) = renew(&mut inner.ownership, now) {
            tracing::error!(%error, "no new claim code");
            return None;
        }
        match &inner.ownership {
            Ownership::Unclaimed(offer) | Ownership::Claiming(offer) => Some(offer.code.to_string()),
            Ownership::Owned { .. } => None,
        }
    }

    /// Makes the caller the owner and signs it in. Runs to its end even when the client vanishes: a claim is
    /// never left half done.
    pub async fn claim(self: &Arc<Self>, claim: Claim, peer: IpAddr) -> Result<Session, Denied> {
        let begun = password::check_new(&claim.password).map_err(Denied::from);
        let begun = begun.and_then(|()| self.begin_claim(&claim.code, peer));
        if let Err(denied) = begun {
            self.tell(Entrance::Claim, peer, Some(&denied));
            return Err(denied);
        }
        let auth = Arc::clone(self);
        tokio::spawn(async move {
            let stored = auth.store_owner(claim.password).await;
            let finished = auth.finish_claim(stored, peer);
            auth.tell(Entrance::Claim, peer, finished.as_ref().err());
            finished
        })
        .await
        .map_err(|_| Denied::Lost)?
    }

    pub async fn login(self: &Arc<Self>, password: String, peer: IpAddr) -> Result<Session, Denied> {
        let result = self.let_in(password, peer).await;
        self.tell(Entrance::SignIn, peer, result.as_ref().err());
        result
    }

    async fn let_in(&self, password: String, peer: IpAddr) -> Result<Session, Denied> {
        let place = self.place_in_queue()?;
        let stored = self.begin_login(peer)?;
        let turn = self.turn(place).await?;
        let matches = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            password::matches(&password, &stored)
        })
        .await
        .map_err(|_| Denied::Lost)?;
        if !matches {
            return Err(Denied::PasswordWrong);
        }
        let mut inner = self.lock();
        inner.logins.succeeded(peer);
        start_session(&mut inner.sessions, (self.clock)())
    }

    pub fn logout(&self, token: &str) {
        self.lock().sessions.stop(token);
    }

    /// Whether this token belongs to somebody who is signed in.
    pub fn check(&self, token: &str, used: Use) -> Option<Grant> {
        let now = (self.clock)();
        self.lock().sessions.check(token, now, used)
    }

    fn begin_claim(&self, code: &str, peer: IpAddr) -> Result<(), Denied> {
        let now = (self.clock)();
        let mut inner = self.lock();
        if matches!(inner.ownership, Ownership::Owned { .. }) {
            return Err(Denied::AlreadyClaimed);
        }
        inner.claims.attempt(peer, now).map_err(|wait| Denied::Wait { wait })?;
        renew(&mut inner.ownership, now).map_err(Denied::Random)?;
        let Ownership::Unclaimed(offer) = &inner.ownership else { return Err(Denied::AlreadyClaimed) };
        if !offer.code.matches(code) {
            return Err(Denied::CodeWrong);
        }
        inner.ownership = Ownership::Claiming(offer.clone());
        Ok(())
    }

    async fn store_owner(&self, password: String) -> Result<String, Denied> {
        let turn = Arc::clone(&self.hasher).acquire_owned().await.map_err(|_| Denied::Lost)?;
        let files = Arc::clone(&self.files);
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let password_hash = password::hash(&password)?;
            let file = OwnerFile { format: OWNER_FORMAT, password_hash };
            let bytes = serde_json::to_vec(&file).map_err(|e| Denied::Write(e.into()))?;
            files.write(OWNER_FILE, &bytes).map_err(Denied::Write)?;
            Ok(file.password_hash)
        })
        .await
        .map_err(|_| Denied::Lost)?
    }

    fn finish_claim(&self, stored: Result<String, Denied>, peer: IpAddr) -> Result<Session, Denied> {
        let mut inner = self.lock();
        match stored {
            Ok(password_hash) => {
                inner.ownership = Ownership::Owned { password_hash };
                inner.logins.succeeded(peer);
                start_session(&mut inner.sessions, (self.clock)())
            }
            Err(error) => {
                if let Ownership::Claiming(offer) = &inner.ownership {
                    inner.ownership = Ownership::Unclaimed(offer.clone());
                }
                // The code was right: what failed is ours, and must not slow the owner down.
                inner.claims.succeeded(peer);
                Err(error)
            }
        }
    }

    fn begin_login(&self, peer: IpAddr) -> Result<String, Denied> {
        let now = (self.clock)();
        let mut inner = self.lock();
        let Ownership::Owned { password_hash } = &inner.ownership else { return Err(Denied::NotClaimed) };
        let password_hash = password_hash.clone();
        inner.logins.attempt(peer, now).map_err(|wait| Denied::Wait { wait })?;
        Ok(password_hash)
    }

    /// A request was turned away for want of a session.
    pub(crate) fn turned_away(&self, peer: IpAddr) {
        self.tell(Entrance::Session, peer, Some(&Denied::NoSession));
    }

    fn tell(&self, entrance: Entrance, peer: IpAddr, denied: Option<&Denied>) {
        (self.witness)(Attempt { entrance, peer, denied });
    }

    fn place_in_queue(&self) -> Result<OwnedSemaphorePermit, Denied> {
        Arc::clone(&self.queue).try_acquire_owned().map_err(|_| Denied::Busy)
    }

    /// Waits for the hasher; the place in the queue is free again once it is this one's turn.
    async fn turn(&self, _place: OwnedSemaphorePermit) -> Result<OwnedSemaphorePermit, Denied> {
        Arc::clone(&self.hasher).acquire_owned().await.map_err(|_| Denied::Lost)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change of `Inner` is a single assignment or insertion, so a panic elsewhere leaves it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Denied {
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Wait { wait } => Some(*wait),
            Self::Busy => Some(Duration::from_secs(2)),
            _ => None,
        }
    }

    pub fn report(&self) -> Report {
        let why = self.to_string();
        let not_in = "you were not signed in";
        let not_owner = "the appliance was not claimed";
        match self {
            Self::CodeWrong => Report::caller(
                "claim_code_wrong",
                not_owner,
                why,
                "read the current code on the appliance's screen or serial line and type it again",
            ),
            Self::PasswordWrong => Report::caller("unauthorized", not_in, why, "type the password again"),
            Self::NoSession => Report::caller("unauthorized", not_in, why, "sign in"),
            Self::PasswordWeak(_) => Report::caller(
                "password_weak",
                not_owner,
                why,
                format!(
                    "choose one of {} characters or more; several words are fine",
                    password::SHORTEST_CHARACTERS
                ),
            ),
            Self::AlreadyClaimed => Report::caller(
                "conflict",
                not_owner,
                why,
                "sign in with the owner's password: `agentctl login`, or /sign-in in a browser",
            ),
            Self::NotClaimed => Report::caller(
                "conflict",
                not_in,
                why,
                "claim it with the code on its screen: `agentctl claim`, or /claim in a browser",
            ),
            Self::Wait { wait } => Report::caller(
                "too_many_requests",
                not_in,
                why,
                format!("wait {} s, then try again", whole_seconds(*wait)),
            ),
            Self::Busy => Report::environment("too_many_requests", not_in, why, "wait 2 s, then try again"),
            Self::Write(_) => Report::environment(
                "state_not_writable",
                not_owner,
                why,
                "the local console shows what is wrong with the state partition; reboot it, then use the same code",
            ),
            Self::Hash(_) | Self::Random(_) | Self::Lost => {
                Report::bug("sign_in_broken", not_in, why, "try again; if it stays, reboot the appliance")
            }
        }
    }
}

impl OpenError {
    pub fn report(&self) -> Report {
        Report::environment(
            "owner_unknown",
            "nobody can sign in",
            self.to_string(),
            "reboot; if it stays, the state partition is damaged: restore it, or set the appliance up anew with `scripts/flash`",
        )
    }
}

/// A wait as a person and `Retry-After` count it: never too short.
pub fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

fn parse_owner(bytes: &[u8]) -> Result<String, OpenError> {
    let file: OwnerFile = serde_json::from_slice(bytes).map_err(|e| OpenError::Damaged(e.to_string()))?;
    if file.format != OWNER_FORMAT {
        let (found, known) = (file.format, OWNER_FORMAT);
        return Err(OpenError::Damaged(format!("it has format {found}, and this version reads {known}")));
    }
    if !password::is_hash(&file.password_hash) {
        return Err(OpenError::Damaged("it holds no password hash".to_owned()));
    }
    Ok(file.password_hash)
}

/// Puts a new code in the place of an expired one. When that fails the expired one must not be used.
fn renew(ownership: &mut Ownership, now: Duration) -> Result<(), getrandom::Error> {
    if let Ownership::Unclaimed(old) = ownership
        && now.saturating_sub(old.made) >= CODE_LIFETIME
    {
        *old = offer(now)?;
    }
    Ok(())
}

fn offer(now: Duration) -> Result<Offer, getrandom::Error> {
    let mut failed = Ok(());
    let code = ClaimCode::from_random(|| {
        let mut byte = [0];
        if let Err(error) = getrandom::fill(&mut byte) {
            failed = Err(error);
        }
        byte[0]
    });
    failed.map(|()| Offer { code, made: now })
}

fn start_session(sessions: &mut Sessions, now: Duration) -> Result<Session, Denied> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(Denied::Random)?;
    let token = URL_SAFE_NO_PAD.encode(random);
    sessions.start(&token, now);
    Ok(Session { token, expires_in_s: OLDEST.as_secs() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryFiles;
    use std::future::Future;
    use std::net::Ipv4Addr;
    use std::sync::atomic::Ordering;
    use std::task::{Context, Waker};

    const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn scene() -> (Arc<MemoryFiles>, Arc<Auth>, Claim) {
        let files = Arc::new(MemoryFiles::default());
        let auth = Arc::new(Auth::open(files.clone(), Arc::new(|| Duration::from_secs(60))).expect("opens"));
        let code = auth.claim_code().expect("unclaimed");
        (files, auth, Claim { code, password: "correct horse battery".to_owned() })
    }

    #[tokio::test]
    async fn nobody_is_told_of_a_claim_that_is_not_on_disk_and_the_code_still_works() {
        let (files, auth, claim) = scene();
        files.full.store(true, Ordering::SeqCst);
        for _ in 0..7 {
            let refused = auth.claim(claim.clone(), PEER).await.expect_err("the disk is full");
            assert_eq!(refused.report().code, "state_not_writable");
        }
        assert!(!auth.is_claimed());
        files.full.store(false, Ordering::SeqCst);
        auth.claim(claim, PEER).await.expect("claimed");
        assert!(Auth::open(files, Arc::new(|| Duration::ZERO)).expect("opens").is_claimed());
    }

    #[tokio::test]
    async fn a_client_that_vanishes_leaves_no_claim_half_done() {
        let (_files, auth, claim) = scene();
        let mut vanishing = Box::pin(auth.claim(claim.clone(), PEER));
        assert!(vanishing.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(vanishing);
        let refused = auth.claim(claim, PEER).await.expect_err("the first claim goes on");
        assert!(matches!(refused, Denied::AlreadyClaimed));
        let owned = async {
            while !auth.is_claimed() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), owned).await.expect("the first claim ends");
    }

    #[tokio::test]
    async fn a_crowd_at_the_door_is_told_to_wait() {
        let (_files, auth, claim) = scene();
        auth.claim(claim, PEER).await.expect("claimed");
        let crowd = (0..20u8).map(|n| auth.login("not this one at all".to_owned(), [10, 0, 0, n].into()));
        let outcomes = futures::future::join_all(crowd).await;
        let busy = outcomes.iter().filter(|o| matches!(o, Err(Denied::Busy))).count();
        let wrong = outcomes.iter().filter(|o| matches!(o, Err(Denied::PasswordWrong))).count();
        assert_eq!(busy + wrong, 20);
        assert!(wrong >= HASH_QUEUE && busy > 0, "{wrong} were heard, {busy} were not");
    }
}
