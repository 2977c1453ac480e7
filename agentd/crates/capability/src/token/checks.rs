//! Which check of a token is replaced by "allow", so that an attack on it can be shown to be one?
//!
//! None, and nothing else is compiled, but in this crate's own tests: `tests/attacks.rs` shows each attack refused
//! with all checks, and successful without the one that it is aimed at.

/// What a token has to pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// So many bytes of text at most.
    Size,
    /// So many blocks at most.
    Depth,
    /// A block holds the Datalog that follows from what it says, and no other.
    Profile,
    /// Only a block that somebody signed names a holder.
    Kind,
    /// All blocks hang together, and the first is the appliance's.
    Signature,
    /// Who signed a handing-on is the appliance.
    Signer,
    /// A later block takes away and never gives: no comparison that could be left out, so only the control has it.
    #[cfg(test)]
    Subset,
    /// It has not ended and was not revoked.
    InForce,
    /// Who shows it is whom it names.
    Holder,
}

#[cfg(not(test))]
#[inline(always)]
pub(super) fn stands(_: Check) -> bool {
    true
}

#[cfg(test)]
pub(super) use in_tests::{believe, stands, without};

#[cfg(test)]
mod in_tests {
    use super::Check;
    use agentd_domain::rights::Narrowing;
    use agentd_domain::token::Inspected;
    use std::cell::RefCell;

    thread_local! {
        static GONE: RefCell<Vec<Check>> = const { RefCell::new(Vec::new()) };
    }

    pub fn stands(check: Check) -> bool {
        GONE.with_borrow(|gone| !gone.contains(&check))
    }

    /// What comes out when these checks are replaced by "allow".
    pub fn without<T>(checks: &[Check], run: impl FnOnce() -> T) -> T {
        GONE.set(checks.to_vec());
        let result = run();
        GONE.set(Vec::new());
        result
    }

    /// Without [`Check::Subset`] a block is taken at its word.
    pub fn believe(said: &mut Inspected, by: &Narrowing) {
        if stands(Check::Subset) {
            return;
        }
        let rights = &mut said.rights;
        let sets = [
            (&mut rights.api, &by.api),
            (&mut rights.read, &by.read),
            (&mut rights.calls, &by.calls),
            (&mut rights.net, &by.net),
        ];
        for (has, asked) in sets {
            if let Some(asked) = asked {
                has.clone_from(asked);
            }
        }
        rights.limits.extend(by.limits.clone());
        said.expires_unix_s = by.expires_unix_s.or(said.expires_unix_s);
    }
}
