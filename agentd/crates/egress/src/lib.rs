//! What may leave an agent's empty network namespace, and how does it get out?
//!
//! In:     a connection from the agent's proxy port, or one caught on a synthetic address; a DNS question; the
//!         agent's [`EgressRules`] and [`Purse`]s.
//! Out:    bytes between that connection and the one address that was decided on; an [`Event`] for each decision.
//! Always: a name is parsed once, by [`name`], and the parsed value is matched, resolved, vetted and dialled.
//!         What is absent from the rules is denied. [`Dial`] takes only a [`Vetted`] address.
//!         TLS is ended where a rule speaks of what is inside ([`ending`]), and nowhere else.
//! Never:  a socket, a resolver, a file or a clock of its own choosing: [`Resolve`] and [`Dial`] are the binary's.
//!
//! Decisions are plain functions ([`rules::decide`], [`address::vet`], the parsers); only [`relay`] does I/O.
//!
//! A secret that the egress puts into a request is looked for in the answer, in the usual encodings too; what that
//! can and cannot find is said in [`secret`].
//!
//! What a tunnel hides stays hidden: a host that itself relays (an open proxy, a CONNECT inside a CONNECT, a
//! `Host` inside TLS that differs from the handshake's name) can be seen only where TLS is ended. Allow such
//! hosts with methods and paths or not at all; byte and time limits bound the rest.
#![forbid(unsafe_code)]

pub mod audit;
pub mod authority;
pub mod budget;
pub mod dns;
pub mod ending;
pub mod hello;
pub mod http1;
pub mod refusal;
pub mod relay;
pub mod rules;
pub mod secret;
pub mod socks5;
pub mod synthetic;

pub use agentd_domain::net::{address, name, pattern};

pub use address::Vetted;
pub use audit::{Audit, Door, Event};
pub use authority::Authority;
pub use budget::{ByteBudget, Purse, Whose};
pub use ending::Ending;
pub use name::{Destination, Host, Name};
pub use pattern::Pattern;
pub use refusal::Refusal;
pub use relay::{Budgets, Checks, Dial, Limits, Policy, Relay, Resolve};
pub use rules::{Decision, EgressRules, Rule, Way, decide};
pub use secret::Secret;
pub use synthetic::Pool;
