//! Which of several claims about the same thing holds when?
//!
//! Only claims with exactly the same subject and predicate (folded, spaces evened out) meet here, and only if there
//! is one answer at a time. Everything else coexists, and a question gets all with their dates: guessing
//! contradictions retires what is true (Graphiti issue 1728: 41 % of 3,950 facts, three of four wrongly).
//!
//! Always: the intervals of one claim do not overlap, whatever order they were told in. A source that is believed
//!         less closes nothing that was said by one that is believed more.

use crate::record::Claim;
use unicode_normalization::UnicodeNormalization;

/// A claim that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) seq: u64,
    pub(crate) valid_from_unix_ms: i64,
    pub(crate) valid_to_unix_ms: i64,
    pub(crate) trust: u8,
}

/// What a new claim does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Placement {
    /// These end where the new one begins.
    pub(crate) closes: Vec<u64>,
    /// The new one ends here already: something later is known.
    pub(crate) ends_unix_ms: Option<i64>,
    /// Something that is believed more says otherwise: both stand, and both are shown.
    pub(crate) disputed: bool,
}

pub(crate) fn place(valid_from_unix_ms: i64, trust: u8, standing: &[Standing]) -> Placement {
    let mut placement = Placement::default();
    for old in standing.iter().filter(|old| old.valid_to_unix_ms > valid_from_unix_ms) {
        if old.trust > trust {
            placement.disputed = true;
        } else if old.valid_from_unix_ms > valid_from_unix_ms {
            // Told late: it was true until the other one began.
            let end =
                placement.ends_unix_ms.map_or(old.valid_from_unix_ms, |e| e.min(old.valid_from_unix_ms));
            placement.ends_unix_ms = Some(end);
        } else {
            placement.closes.push(old.seq);
        }
    }
    placement
}

/// Subject and predicate as they are compared.
pub(crate) fn key(claim: &Claim) -> String {
    let even = |text: &str| {
        text.nfkc()
            .flat_map(char::to_lowercase)
            .collect::<String>()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    format!("{}\0{}", even(&claim.subject), even(&claim.predicate))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::life::OPEN_END;
    use proptest::prelude::*;

    fn claim(subject: &str, predicate: &str) -> Claim {
        Claim { subject: subject.into(), predicate: predicate.into(), functional: true }
    }

    #[test]
    fn only_the_same_subject_and_predicate_meet() {
        assert_eq!(key(&claim("Ana ", "lives  in")), key(&claim("ana", "Lives in")));
        assert_ne!(key(&claim("Ana", "lives in")), key(&claim("Anna", "lives in")));
        assert_ne!(key(&claim("Ana", "lives in")), key(&claim("Ana", "lived in")));
        assert_ne!(key(&claim("a b", "c")), key(&claim("a", "b c")));
    }

    #[test]
    fn the_later_closes_and_the_less_believed_does_not() {
        let porto = Standing { seq: 1, valid_from_unix_ms: 10, valid_to_unix_ms: OPEN_END, trust: 70 };
        assert_eq!(place(20, 70, &[porto]).closes, [1]);
        assert_eq!(place(10, 70, &[porto]).closes, [1], "told again for the same time: a correction");
        let late = place(5, 70, &[porto]);
        assert_eq!((late.closes.len(), late.ends_unix_ms), (0, Some(10)));
        let web = place(20, 20, &[porto]);
        assert!(web.closes.is_empty() && web.disputed);
    }

    proptest! {
        /// Whatever order claims of one trust are told in, their intervals tile the time since the first.
        #[test]
        fn intervals_never_overlap(times in proptest::collection::vec(0i64..50, 1..20)) {
            let mut standing: Vec<Standing> = Vec::new();
            for (seq, from) in times.iter().enumerate() {
                let placement = place(*from, 70, &standing);
                for old in &mut standing {
                    if placement.closes.contains(&old.seq) {
                        old.valid_to_unix_ms = *from;
                    }
                }
                standing.push(Standing {
                    seq: seq as u64,
                    valid_from_unix_ms: *from,
                    valid_to_unix_ms: placement.ends_unix_ms.unwrap_or(OPEN_END),
                    trust: 70,
                });
            }
            for at in 0..60i64 {
                let holding =
                    standing.iter().filter(|s| (s.valid_from_unix_ms..s.valid_to_unix_ms).contains(&at)).count();
                let begun = times.iter().any(|from| *from <= at);
                prop_assert_eq!(holding, usize::from(begun), "at {}", at);
            }
        }
    }
}
