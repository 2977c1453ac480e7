//! How does a person, or `agentctl`, see and steer the appliance?
//!
//! Owns:   the management API below `/api/v1/` (its table is in [`agentd_domain::api`]), the web console, the claim,
//!         sessions, the appliance's certificate authority and the TLS port.
//! In:     an [`Appliance`] to ask and steer, [`StateFiles`] to keep secrets in. Out: an axum router and a server.
//! Never:  decisions about agents, models or the machine; they belong to the `Appliance`.
//! Always: nothing but the claim, the sign-in, liveness and assets answers without a session; bodies are bounded
//!         in size and time; every error is a `Report`.
//!
//! The binary wires it:
//!
//! ```text
//! let auth = Arc::new(Auth::open(files.clone(), boot_clock())?);
//! let authority = Authority::open(files)?;
//! authority.refresh(&addresses, now_unix_s)?;
//! let router = router(appliance, auth.clone()).merge(guard(auth, v1));
//! serve_tls(listener, authority.tls_config()?, router, shutdown).await;
//! ```
#![forbid(unsafe_code)]

mod answer;
mod api;
pub mod appliance;
pub mod auth;
pub mod authority;
pub mod clock;
mod gate;
mod guarded;
mod headers;
mod input;
mod memory;
mod router;
mod secrets;
mod serve;
mod state;
#[cfg(test)]
mod testing;
mod web;

pub use appliance::{Appliance, AuditQuery, Flow, Follow, LogQuery, Pending, Residence, Upload};
pub use auth::Auth;
pub use authority::Authority;
pub use clock::{BootClock, boot_clock};
pub use gate::guard;
pub use router::router;
pub use serve::{Limits, Peer, serve_tls, serve_tls_with};
pub use state::StateFiles;
