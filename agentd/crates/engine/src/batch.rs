//! Which tokens go into the next decode, and may another sequence join?
//!
//! Pure decisions of the chat thread. Cells of the KV cache are promised before a sequence starts, so no
//! sequence ever fails because another one grew: who finds no cells waits in the queue, and who wants to grow
//! past its promise ends with `length` when no cell is free.

/// What a sequence without `max_tokens` is promised at first, and how much it grows by.
const GROWTH_TOKENS: u32 = 256;

/// What one running sequence wants from the next decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demand {
    /// Prompt tokens that are not in the KV cache yet; at least one.
    Prefill(u32),
    /// The token chosen last.
    Decode,
}

/// How many tokens of each sequence the next batch holds, in the order of `demands`.
///
/// Sequences that answer come first with one token each, so a long prompt never makes them wait; prompts share
/// what is left evenly, so a short prompt beside a long one starts to answer soon.
pub(crate) fn shares(demands: &[Demand], capacity: u32) -> Vec<u32> {
    let mut shares = vec![0; demands.len()];
    let mut left = capacity;
    for (share, demand) in shares.iter_mut().zip(demands) {
        if *demand == Demand::Decode && left > 0 {
            *share = 1;
            left -= 1;
        }
    }
    loop {
        let wanting = |(share, demand): (&u32, &Demand)| match demand {
            Demand::Prefill(wanted) => wanted.saturating_sub(*share),
            Demand::Decode => 0,
        };
        let hungry = shares.iter().zip(demands).filter(|pair| wanting(*pair) > 0).count() as u32;
        if hungry == 0 || left == 0 {
            return shares;
        }
        let each = (left / hungry).max(1);
        for (share, demand) in shares.iter_mut().zip(demands) {
            let more = wanting((share, demand)).min(each).min(left);
            *share += more;
            left -= more;
        }
    }
}

/// The ledger of the KV cache: cells are promised, never counted after the fact.
#[derive(Debug)]
pub(crate) struct Cells {
    total: u32,
    promised: u32,
}

impl Cells {
    pub(crate) fn new(total: u32) -> Self {
        Self { total, promised: 0 }
    }

    pub(crate) fn total(&self) -> u32 {
        self.total
    }

    /// Promises exactly this many cells, or none.
    pub(crate) fn promise(&mut self, cells: u32) -> bool {
        let fits = cells <= self.total - self.promised;
        if fits {
            self.promised += cells;
        }
        fits
    }

    /// Promises up to one more portion for a sequence that wants `limit` cells in all and has `has`.
    pub(crate) fn grow(&mut self, has: u32, limit: u32) -> u32 {
        let more = limit.saturating_sub(has).min(GROWTH_TOKENS).min(self.total - self.promised);
        self.promised += more;
        more
    }

    pub(crate) fn release(&mut self, cells: u32) {
        self.promised = self.promised.saturating_sub(cells);
    }
}

/// The most cells a request may come to use, and how many it is promised before it starts.
///
/// `max_tokens` 0 means "until the model ends or the context is full".
pub(crate) fn wish(prompt_tokens: u32, max_tokens: u32, total: u32) -> (u32, u32) {
    let wanted = if max_tokens == 0 { total } else { prompt_tokens.saturating_add(max_tokens) };
    let limit = wanted.min(total);
    let first = if max_tokens == 0 { limit.min(prompt_tokens.saturating_add(GROWTH_TOKENS)) } else { limit };
    (limit, first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_go_before_prompts_and_prompts_share() {
        let demands = [Demand::Prefill(1000), Demand::Decode, Demand::Prefill(10), Demand::Decode];
        assert_eq!(shares(&demands, 256), [244, 1, 10, 1]);
        assert_eq!(shares(&[Demand::Prefill(100), Demand::Prefill(100)], 50), [25, 25]);
        assert_eq!(shares(&[], 50), [0u32; 0]);
    }

    #[test]
    fn a_wish_without_a_bound_is_promised_in_portions() {
        assert_eq!(wish(10, 0, 4096), (4096, 266));
        assert_eq!(wish(10, 50, 4096), (60, 60));
        assert_eq!(wish(4000, 500, 4096), (4096, 4096));
        let mut cells = Cells::new(300);
        assert!(cells.promise(266));
        assert_eq!(cells.grow(266, 4096), 34);
        assert_eq!(cells.grow(300, 4096), 0);
        assert!(!cells.promise(1));
        cells.release(300);
        assert!(cells.promise(300));
    }

    fn demand() -> impl Strategy<Value = Demand> {
        prop_oneof![Just(Demand::Decode), (1u32..5000).prop_map(Demand::Prefill)]
    }

    proptest! {
        #[test]
        fn a_batch_is_full_or_everyone_is_served(
            demands in proptest::collection::vec(demand(), 0..16),
            capacity in 16u32..600,
        ) {
            let shares = shares(&demands, capacity);
            let used: u32 = shares.iter().sum();
            let mut wanted = 0;
            for (share, demand) in shares.iter().zip(&demands) {
                let most = match demand { Demand::Decode => 1, Demand::Prefill(n) => *n };
                prop_assert!(*share <= most);
                // Nobody starves: there are at most as many sequences as places.
                prop_assert!(*share >= 1);
                wanted += most;
            }
            prop_assert_eq!(used, wanted.min(capacity));
        }

        #[test]
        fn cells_are_never_promised_twice(steps in proptest::collection::vec((0u8..3, 0u32..500), 0..60)) {
            let mut cells = Cells::new(1000);
            let mut held: Vec<u32> = Vec::new();
            for (kind, amount) in steps {
                match kind {
                    0 => if cells.promise(amount) { held.push(amount) },
                    1 => if let Some(last) = held.last_mut() { *last += cells.grow(*last, *last + amount) },
                    _ => if let Some(last) = held.pop() { cells.release(last) },
                }
                prop_assert!(held.iter().sum::<u32>() <= 1000);
            }
        }
    }
}
