//! How far is a source believed?
//!
//! What a web page or a tool says is data. It may be remembered as something that was said, but it must not become
//! what the agent is, or how it works: instructions planted in a page would then be obeyed for ever (OWASP ASI06;
//! MINJA, arXiv 2601.05504, plants them with above 95 % success where nothing asks for the source).

use crate::record::{Role, SourceKind};

/// In hundredths. The order is what matters: who is below may not replace what was said above.
pub(crate) fn of(source: SourceKind) -> u8 {
    match source {
        SourceKind::User => 100,
        SourceKind::Agent => 70,
        SourceKind::Tool => 40,
        SourceKind::Web => 20,
        SourceKind::Recall => 0,
    }
}

/// Below this a source is data only.
pub(crate) const TRUSTED: u8 = 60;

/// May this source say something of this kind?
pub(crate) fn may_be(source: SourceKind, role: Role) -> bool {
    match role {
        Role::Identity | Role::Procedure => of(source) >= TRUSTED,
        Role::Event | Role::Fact | Role::Preference | Role::Insight => true,
    }
}

/// Recalled text that is told again would make itself more true with every turn: one peer's store held 97.8 % of
/// such echoes (mem0 issue 4573).
pub(crate) fn is_echo(source: SourceKind) -> bool {
    source == SourceKind::Recall
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [SourceKind; 5] =
        [SourceKind::User, SourceKind::Agent, SourceKind::Tool, SourceKind::Web, SourceKind::Recall];

    #[test]
    fn the_user_is_believed_most_and_an_echo_not_at_all() {
        assert!(ALL.is_sorted_by(|a, b| of(*a) > of(*b)));
        assert_eq!((of(SourceKind::User), of(SourceKind::Recall)), (100, 0));
    }

    #[test]
    fn strangers_cannot_say_who_the_agent_is() {
        for source in [SourceKind::Tool, SourceKind::Web, SourceKind::Recall] {
            assert!(!may_be(source, Role::Identity) && !may_be(source, Role::Procedure));
            assert!(may_be(source, Role::Fact));
        }
        assert!(may_be(SourceKind::User, Role::Identity) && may_be(SourceKind::Agent, Role::Procedure));
    }
}
