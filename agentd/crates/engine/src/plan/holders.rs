//! Who holds how much of the cache?
//!
//! A run of cells that several holders' requests fill is divided among these in equal parts, whatever the number of their
//! requests; what does not divide evenly goes to the first by name. Beginnings that are only kept belong to nobody.
//!
//! True:  the cells of all holders and those that may go are together the cells that are used (`agree` in the tests).

use super::*;
use agentd_domain::engine::HolderUsage;
use std::collections::BTreeSet;
use std::time::Instant;

/// Counting looks at each run of cells; steps may take less than a millisecond.
const COUNTED_FOR: Duration = Duration::from_millis(100);

impl Planner {
    /// Sorted by name; only who has a request.
    pub(crate) fn holders(&self) -> Vec<HolderUsage> {
        let mut all: BTreeMap<&str, HolderUsage> = BTreeMap::new();
        let mut owners: BTreeMap<SeqId, &str> = BTreeMap::new();
        for request in self.requests.values() {
            let holder = request.holder.as_str();
            let usage = all
                .entry(holder)
                .or_insert_with(|| HolderUsage { holder: holder.to_owned(), ..HolderUsage::default() });
            if let Some(seq) = request.seq {
                owners.insert(seq, holder);
            }
            if let Some(stored) = request.stored {
                usage.aside_tokens += stored.upto - stored.from;
            }
            if request.running {
                usage.running += 1;
                usage.cells_promised += request.promised.saturating_sub(self.held(request));
            } else {
                usage.waiting += 1;
                usage.put_aside += u32::from(request.reached > 0);
            }
        }
        for (cells, seqs) in self.tree.runs() {
            let among: BTreeSet<&str> = seqs.iter().filter_map(|seq| owners.get(seq)).copied().collect();
            for (part, holder) in parts_of(cells, among.len() as u32).zip(&among) {
                let Some(usage) = all.get_mut(holder) else { continue };
                usage.cells += part;
                if among.len() > 1 {
                    usage.cells_shared += part;
                }
            }
        }
        all.into_values().collect()
    }
}

/// So many parts, as equal as whole numbers can be.
fn parts_of(whole: u32, count: u32) -> impl Iterator<Item = u32> {
    let (each, more) = (whole.checked_div(count).unwrap_or(0), whole.checked_rem(count).unwrap_or(0));
    (0..count).map(move |at| each + u32::from(at < more))
}

/// The last count, for who is asked more often than it changes much.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    last: Vec<HolderUsage>,
    counted: Option<Instant>,
}

impl Holders {
    /// Counts anew when the last time was a tenth of a second ago, or nobody is left.
    pub(crate) fn now(&mut self, planner: &Planner) -> Vec<HolderUsage> {
        let fresh = self.counted.is_some_and(|counted| counted.elapsed() < COUNTED_FOR);
        if !fresh || planner.is_idle() {
            self.last = planner.holders();
            self.counted = Some(Instant::now());
        }
        self.last.clone()
    }
}
