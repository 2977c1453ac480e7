//! What of the KV cache has been put aside, and is there room for more?
//!
//! A ledger of *blobs*: keys and values of some positions of one sequence, in host memory or in a file. Somebody's
//! own (a request that had to step aside) or a cached beginning that nobody works on. The bytes are elsewhere
//! ([`crate::swap`]); this only decides what is kept.
//!
//! True:  each tier holds at most what it was given; a cached beginning goes before a request's own part; first the one
//!        that is nearly all in another, as a conversation's turn is in the next, then the one used longest ago.

use crate::radix::{Domain, common};
use std::collections::BTreeMap;

pub(crate) type BlobId = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    Memory,
    Disk,
}

/// Bytes that each tier may hold, and what a cell needs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Shelves {
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) bytes_per_cell: u64,
}

/// What llama.cpp writes beside keys and values: versions, counts and types of each layer. Generous.
const HEADER_BYTES: u64 = 16 * 1024;
/// Less is computed again sooner than it is looked up.
const WORTH_LOADING_TOKENS: u32 = 32;

/// A blob may go for another that holds it but for this part: a turn's answer and marks, which differ in the next.
const SPARED_OF: u32 = 8;

#[derive(Debug)]
pub(crate) struct Shelf {
    shelves: Shelves,
    blobs: BTreeMap<BlobId, Blob>,
    next: BlobId,
    clock: u64,
}

#[derive(Debug)]
struct Blob {
    from: u32,
    upto: u32,
    bytes: u64,
    tier: Tier,
    /// All tokens up to `upto`, of a cached beginning; `None` for a request's own.
    cached: Option<(Domain, Vec<i32>)>,
    used: u64,
}

/// A cached beginning that goes on where the resident one ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) blob: BlobId,
    /// Positions in the blob.
    pub(crate) from: u32,
    pub(crate) upto: u32,
    /// How far it agrees with what was looked for.
    pub(crate) usable: u32,
}

impl Shelf {
    pub(crate) fn new(shelves: Shelves) -> Self {
        Self { shelves, blobs: BTreeMap::new(), next: 0, clock: 0 }
    }

    pub(crate) fn set_cell_bytes(&mut self, bytes: u64) {
        self.shelves.bytes_per_cell = bytes;
    }

    /// Bytes in memory and on disk.
    pub(crate) fn used(&self) -> (u64, u64) {
        let sum = |tier| self.blobs.values().filter(|blob| blob.tier == tier).map(|blob| blob.bytes).sum();
        (sum(Tier::Memory), sum(Tier::Disk))
    }

    /// A place for these positions; `dropped` gets what had to go for it.
    pub(crate) fn put(
        &mut self,
        (from, upto): (u32, u32),
        cached: Option<(Domain, Vec<i32>)>,
        dropped: &mut Vec<BlobId>,
    ) -> Option<(BlobId, Tier)> {
        let bytes = u64::from(upto - from) * self.shelves.bytes_per_cell + HEADER_BYTES;
        let tier =
            [Tier::Memory, Tier::Disk].into_iter().find(|tier| self.make_room(*tier, bytes, dropped))?;
        self.clock += 1;
        self.next += 1;
        self.blobs.insert(self.next, Blob { from, upto, bytes, tier, cached, used: self.clock });
        Some((self.next, tier))
    }

    pub(crate) fn remove(&mut self, id: BlobId) -> bool {
        self.blobs.remove(&id).is_some()
    }

    /// A blob could not be read. On disk none of the others is trusted then, and none is added.
    pub(crate) fn failed(&mut self, id: BlobId) -> Vec<BlobId> {
        if self.blobs.get(&id).is_none_or(|blob| blob.tier == Tier::Memory) {
            return vec![id];
        }
        self.shelves.disk_bytes = 0;
        self.blobs.iter().filter(|(_, blob)| blob.tier == Tier::Disk).map(|(id, _)| *id).collect()
    }

    #[cfg(test)]
    pub(crate) fn ids(&self) -> std::collections::BTreeSet<BlobId> {
        self.blobs.keys().copied().collect()
    }

    pub(crate) fn has(&self, id: BlobId) -> bool {
        self.blobs.contains_key(&id)
    }

    pub(crate) fn touch(&mut self, id: BlobId) {
        self.clock += 1;
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.used = self.clock;
        }
    }

    /// The cached blob that leads furthest into `tokens` from what is resident already.
    pub(crate) fn find(&self, domain: &Domain, tokens: &[i32], resident: u32) -> Option<Found> {
        let usable = |(id, blob): (&BlobId, &Blob)| {
            let (its_domain, its_tokens) = blob.cached.as_ref()?;
            if its_domain != domain || blob.from > resident {
                return None;
            }
            let usable = (common(its_tokens, tokens) as u32).min(blob.upto);
            (usable >= resident + WORTH_LOADING_TOKENS).then_some(Found {
                blob: *id,
                from: blob.from,
                upto: blob.upto,
                usable,
            })
        };
        self.blobs.iter().filter_map(usable).max_by_key(|found| found.usable)
    }

    /// True when these positions of this text lie here already.
    pub(crate) fn covers(&self, domain: &Domain, tokens: &[i32], from: u32) -> bool {
        self.blobs.values().any(|blob| {
            blob.from <= from
                && blob.cached.as_ref().is_some_and(|(its_domain, its_tokens)| {
                    its_domain == domain && its_tokens.len() >= tokens.len() && its_tokens.starts_with(tokens)
                })
        })
    }

    /// Would little have to be computed again if this one were gone?
    fn is_in_another(&self, id: BlobId) -> bool {
        let Some(blob) = self.blobs.get(&id) else { return false };
        let Some((domain, tokens)) = &blob.cached else { return false };
        let needed = blob.upto - (blob.upto - blob.from) / SPARED_OF;
        let holds = |(other_id, other): (&BlobId, &Blob)| {
            let Some((its_domain, its_tokens)) = &other.cached else { return false };
            let same = *other_id != id && its_domain == domain && other.from <= blob.from;
            same && (common(its_tokens, tokens) as u32).min(other.upto) >= needed
        };
        self.blobs.iter().any(holds)
    }

    fn make_room(&mut self, tier: Tier, bytes: u64, dropped: &mut Vec<BlobId>) -> bool {
        let limit = match tier {
            Tier::Memory => self.shelves.memory_bytes,
            Tier::Disk => self.shelves.disk_bytes,
        };
        let here = |blob: &&Blob| blob.tier == tier;
        let owned: u64 =
            self.blobs.values().filter(here).filter(|b| b.cached.is_none()).map(|b| b.bytes).sum();
        if owned + bytes > limit {
            return false;
        }
        let mut used: u64 = self.blobs.values().filter(here).map(|blob| blob.bytes).sum();
        while used + bytes > limit {
            let cached = self.blobs.iter().filter(|(_, blob)| blob.tier == tier && blob.cached.is_some());
            let mut cached: Vec<(u64, BlobId)> = cached.map(|(id, blob)| (blob.used, *id)).collect();
            cached.sort_unstable();
            let Some((_, oldest)) = cached.first().copied() else { return false };
            let spare = cached.iter().map(|(_, id)| *id).find(|id| self.is_in_another(*id)).unwrap_or(oldest);
            if let Some(blob) = self.blobs.remove(&spare) {
                used -= blob.bytes;
            }
            dropped.push(spare);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shelf(cells_in_memory: u64, cells_on_disk: u64) -> Shelf {
        let bytes = |cells: u64| cells * 1000 + HEADER_BYTES * cells.div_ceil(100);
        Shelf::new(Shelves {
            memory_bytes: bytes(cells_in_memory),
            disk_bytes: if cells_on_disk == 0 { 0 } else { bytes(cells_on_disk) },
            bytes_per_cell: 1000,
        })
    }

    fn text(upto: i32) -> Vec<i32> {
        (0..upto).collect()
    }

    #[test]
    fn own_parts_stay_cached_ones_go_oldest_first() {
        let (mut shelf, here) = (shelf(300, 100), Domain::from("a"));
        let mut dropped = Vec::new();
        let old = shelf.put((0, 100), Some((here.clone(), text(100))), &mut dropped).unwrap().0;
        let newer = shelf.put((0, 100), Some((here.clone(), text(100))), &mut dropped).unwrap().0;
        shelf.touch(old);
        let (own, tier) = shelf.put((50, 150), None, &mut dropped).unwrap();
        assert_eq!((tier, dropped.len()), (Tier::Memory, 0));
        let second = shelf.put((50, 150), None, &mut dropped).unwrap();
        assert_eq!((second.1, dropped.as_slice()), (Tier::Memory, [newer].as_slice()));
        let third = shelf.put((50, 150), None, &mut dropped).unwrap();
        assert_eq!((third.1, dropped.as_slice()), (Tier::Memory, [newer, old].as_slice()));
        // Memory is full of what must not go: the disk, then nothing.
        assert_eq!(shelf.put((50, 150), None, &mut dropped).unwrap().1, Tier::Disk);
        assert_eq!(shelf.put((50, 150), None, &mut dropped), None);
        assert!(shelf.has(own) && shelf.remove(own) && !shelf.has(own));
        assert!(shelf.used().0 <= shelf.shelves.memory_bytes);
    }

    /// A turn of a conversation is nearly all in the next: it goes before what another agent comes back for.
    #[test]
    fn what_is_in_another_goes_first() {
        let (mut shelf, here) = (shelf(330, 0), Domain::from("a"));
        let mut dropped = Vec::new();
        let other = shelf.put((0, 100), Some((here.clone(), vec![-1; 100])), &mut dropped).unwrap().0;
        let turn: Vec<i32> = text(90).into_iter().chain([-5; 10]).collect();
        let turn = shelf.put((0, 100), Some((here.clone(), turn)), &mut dropped).unwrap().0;
        shelf.touch(turn);
        let next = shelf.put((0, 110), Some((here.clone(), text(110))), &mut dropped).unwrap().0;
        assert!(dropped.is_empty());
        let third = shelf.put((0, 80), Some((here.clone(), vec![-2; 80])), &mut dropped).unwrap().0;
        assert_eq!(dropped, [turn], "though it was used last");
        // A domain's cache is nobody else's, and what is only half in another is worth keeping.
        let elsewhere = Some((Domain::from("b"), text(110)));
        shelf.put((0, 110), elsewhere, &mut dropped).unwrap();
        assert_eq!(dropped, [turn, other]);
        shelf
            .put((0, 60), Some((here, text(55).into_iter().chain([-3; 5]).collect())), &mut dropped)
            .unwrap();
        assert_eq!(dropped, [turn, other, next]);
        assert!(shelf.has(third));
    }

    #[test]
    fn a_disk_that_failed_is_not_asked_again() {
        let mut shelf = shelf(100, 300);
        let mut dropped = Vec::new();
        let (own, tier) = shelf.put((0, 100), None, &mut dropped).unwrap();
        assert_eq!(tier, Tier::Memory);
        let on_disk: Vec<BlobId> =
            (0..2).map(|_| shelf.put((0, 100), None, &mut dropped).unwrap().0).collect();
        assert_eq!(shelf.failed(on_disk[1]), on_disk);
        assert_eq!(shelf.put((0, 100), None, &mut dropped), None);
        assert_eq!(shelf.failed(own), [own]);
    }

    #[test]
    fn a_blob_is_found_where_the_resident_part_ends() {
        let (mut shelf, here) = (shelf(1000, 0), Domain::from("a"));
        let mut dropped = Vec::new();
        let cached = Some((here.clone(), text(200)));
        let (id, _) = shelf.put((50, 200), cached, &mut dropped).unwrap();
        let mut wanted = text(150);
        wanted.push(-1);
        assert_eq!(shelf.find(&here, &wanted, 10), None, "there is a hole before it");
        assert_eq!(
            shelf.find(&here, &wanted, 60),
            Some(Found { blob: id, from: 50, upto: 200, usable: 150 })
        );
        assert_eq!(shelf.find(&here, &wanted, 140), None, "not worth it");
        assert_eq!(shelf.find(&Domain::from("b"), &wanted, 60), None);
        assert!(shelf.covers(&here, &text(180), 60) && !shelf.covers(&here, &text(180), 40));
        assert!(!shelf.covers(&here, &text(201), 60));
    }
}
