//! Which hosts may an agent reach, and how are they written?
//!
//! Names, addresses, patterns and rules: values that a manifest holds, a plan lists, `agentctl` prints, and the
//! egress decides by. A name is read once, by [`name`]; everything else takes the parsed value.
//! Never: a lookup, a socket. Who may be reached at which moment is decided by `agentd-egress`.

pub mod address;
pub mod name;
pub mod pattern;
pub mod rule;

pub use address::{Reach, Vetted};
pub use name::{Destination, Host, Name};
pub use pattern::Pattern;
pub use rule::{EgressRules, Rule};
