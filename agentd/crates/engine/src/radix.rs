//! Whose cells are these, and who has computed this beginning already?
//!
//! A tree of token runs. A *strand* is what one sequence id of the context holds: a path from the top of its
//! domain down to a node. A node is a run of cells that really exist, once, with every sequence id that has its
//! bit set in them. So the tree is the exact shadow of a unified KV cache, which llama.cpp gives no way to count.
//!
//! Two nodes below one parent may begin with the same tokens: two sequences that computed the same text apart from
//! each other have cells of their own.
//!
//! In:    what the plan does with sequences (fork, extend, truncate). Out: who holds the longest beginning of a
//!        prompt, how many cells something would free.
//! True:  the sum of all nodes' lengths is the number of used cells; the holders of a node include those of every
//!        node below it; a strand ends at the end of a node. `check` proves it in the tests.
//! Never: a sequence of one domain is found by another: who may share is decided by the domain alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A sequence of the context. `LLAMA_MAX_SEQ` bounds it to 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SeqId(pub(crate) u16);

/// Who may find whose prefixes: a salt, in effect.
pub(crate) type Domain = Arc<str>;

#[derive(Debug, Default)]
pub(crate) struct Prefixes {
    nodes: Vec<Node>,
    /// Places in `nodes` that hold nothing.
    vacant: Vec<usize>,
    tops: HashMap<Domain, Vec<usize>>,
    strands: BTreeMap<SeqId, Strand>,
    used: u32,
}

#[derive(Debug)]
struct Node {
    parent: Option<usize>,
    tokens: Vec<i32>,
    children: Vec<usize>,
    holders: BTreeSet<SeqId>,
    /// Holders that are pinned: a node without them may be thrown away.
    pins: u32,
}

#[derive(Debug)]
struct Strand {
    domain: Domain,
    end: Option<usize>,
    length: u32,
    pinned: bool,
}

/// How the cells are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    pub(crate) private: u32,
    pub(crate) shared: u32,
    /// Of both: held by nobody who works.
    pub(crate) evictable: u32,
}

impl Prefixes {
    /// Cells that hold something.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// Tokens of a strand; 0 for an id that holds nothing.
    pub(crate) fn length(&self, id: SeqId) -> u32 {
        self.strands.get(&id).map_or(0, |strand| strand.length)
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for node in self.nodes.iter().filter(|node| !node.holders.is_empty()) {
            let cells = node.tokens.len() as u32;
            match node.holders.len() {
                1 => counts.private += cells,
                _ => counts.shared += cells,
            }
            if node.pins == 0 {
                counts.evictable += cells;
            }
        }
        counts
    }

    /// Each run of cells: how many there are, and who holds them.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u32, &BTreeSet<SeqId>)> {
        let held = self.nodes.iter().filter(|node| !node.holders.is_empty());
        held.map(|node| (node.tokens.len() as u32, &node.holders))
    }

    /// The longest beginning of `tokens` that somebody holds, and one who does. `except` does not count.
    pub(crate) fn longest(
        &self,
        domain: &Domain,
        tokens: &[i32],
        except: Option<SeqId>,
    ) -> Option<(SeqId, u32)> {
        let mut best: Option<(usize, u32)> = None;
        let mut open: Vec<(usize, usize)> =
            self.tops.get(domain).into_iter().flatten().map(|node| (*node, 0)).collect();
        while let Some((index, before)) = open.pop() {
            let node = &self.nodes[index];
            if node.holders.iter().all(|holder| Some(*holder) == except) {
                continue;
            }
            let same = common(&node.tokens, &tokens[before..]);
            let reached = before + same;
            if same > 0 && best.is_none_or(|(_, most)| reached as u32 > most) {
                best = Some((index, reached as u32));
            }
            if same == node.tokens.len() && reached < tokens.len() {
                open.extend(node.children.iter().map(|child| (*child, reached)));
            }
        }
        let (index, length) = best?;
        // Any holder will do: the cells are the same.
        let holder = self.nodes[index].holders.iter().find(|holder| Some(**holder) != except)?;
        Some((*holder, length))
    }

    /// Cells at the end of a strand that nobody else holds: what a truncation would free.
    pub(crate) fn private(&self, id: SeqId) -> u32 {
        let mut cells = 0;
        let mut at = self.strands.get(&id).and_then(|strand| strand.end);
        while let Some(index) = at {
            let node = &self.nodes[index];
            if node.holders.len() > 1 {
                break;
            }
            cells += node.tokens.len() as u32;
            at = node.parent;
        }
        cells
    }

    /// Cells among the first `length` of a strand that nobody pinned holds.
    pub(crate) fn evictable_within(&self, id: SeqId, length: u32) -> u32 {
        let (mut cells, mut left) = (0, length);
        for index in self.path(id) {
            let node = &self.nodes[index];
            let here = left.min(node.tokens.len() as u32);
            if node.pins == 0 {
                cells += here;
            }
            left -= here;
        }
        cells
    }

    /// A new pinned strand with the first cells of another; without one, an empty strand.
    pub(crate) fn fork(&mut self, domain: &Domain, id: SeqId, from: Option<(SeqId, u32)>) {
        debug_assert!(!self.strands.contains_key(&id), "{id:?} is in use");
        let (mut end, mut left) = (None, from.map_or(0, |(_, length)| length));
        let length = left;
        for index in from.map(|(source, _)| self.path(source)).unwrap_or_default() {
            if left == 0 {
                break;
            }
            let tokens = self.nodes[index].tokens.len() as u32;
            let taken = if left < tokens { self.split(index, left as usize) } else { index };
            left -= left.min(tokens);
            self.nodes[taken].holders.insert(id);
            self.nodes[taken].pins += 1;
            end = Some(taken);
        }
        debug_assert_eq!(left, 0, "nothing is forked from cells that are not there");
        self.strands.insert(id, Strand { domain: Arc::clone(domain), end, length, pinned: true });
    }

    /// New cells at the end of a strand.
    pub(crate) fn extend(&mut self, id: SeqId, tokens: &[i32]) {
        let Some(strand) = self.strands.get_mut(&id) else { return };
        if tokens.is_empty() {
            return;
        }
        strand.length += tokens.len() as u32;
        self.used += tokens.len() as u32;
        let (end, pinned, domain) = (strand.end, strand.pinned, Arc::clone(&strand.domain));
        if let Some(end) = end
            && self.nodes[end].holders.len() == 1
        {
            self.nodes[end].tokens.extend_from_slice(tokens);
            return;
        }
        let node = Node {
            parent: end,
            tokens: tokens.to_vec(),
            children: Vec::new(),
            holders: BTreeSet::from([id]),
            pins: u32::from(pinned),
        };
        let index = self.place(node);
        match end {
            Some(end) => self.nodes[end].children.push(index),
            None => self.tops.entry(domain).or_default().push(index),
        }
        if let Some(strand) = self.strands.get_mut(&id) {
            strand.end = Some(index);
        }
    }

    /// Leaves a strand its first `length` tokens; says how many cells nobody holds any more.
    pub(crate) fn truncate(&mut self, id: SeqId, length: u32) -> u32 {
        let Some(strand) = self.strands.get(&id) else { return 0 };
        let pin = u32::from(strand.pinned);
        let (mut end, mut has) = (strand.end, strand.length);
        let (domain, mut freed, mut left_by_it) = (Arc::clone(&strand.domain), 0, Vec::new());
        while let Some(index) = end.filter(|_| has > length) {
            let tokens = self.nodes[index].tokens.len() as u32;
            let begin = has - tokens;
            if begin < length {
                // It keeps the upper part, which is the new node.
                let upper = self.split(index, (length - begin) as usize);
                end = Some(upper);
                has = length;
            } else {
                end = self.nodes[index].parent;
                has = begin;
            }
            let node = &mut self.nodes[index];
            node.holders.remove(&id);
            node.pins -= pin;
            if node.holders.is_empty() {
                freed += node.tokens.len() as u32;
                self.remove(index, &domain);
            } else {
                left_by_it.push(index);
            }
        }
        self.used -= freed;
        if let Some(strand) = self.strands.get_mut(&id) {
            strand.end = end;
            strand.length = has;
        }
        // Deepest first: where one holder less makes a node equal to the one below it.
        for index in left_by_it.into_iter().chain(end) {
            for child in self.nodes[index].children.clone() {
                self.join(child);
            }
        }
        freed
    }

    /// Ends a strand; says how many cells nobody holds any more.
    pub(crate) fn release(&mut self, id: SeqId) -> u32 {
        let freed = self.truncate(id, 0);
        self.strands.remove(&id);
        freed
    }

    /// Says whether a strand is of somebody who works.
    pub(crate) fn pin(&mut self, id: SeqId, pinned: bool) {
        let Some(strand) = self.strands.get_mut(&id) else { return };
        if strand.pinned == pinned {
            return;
        }
        strand.pinned = pinned;
        for index in self.path(id) {
            let node = &mut self.nodes[index];
            node.pins = if pinned { node.pins + 1 } else { node.pins - 1 };
        }
    }

    /// The tokens of a strand.
    pub(crate) fn tokens(&self, id: SeqId) -> Vec<i32> {
        self.path(id).into_iter().flat_map(|index| self.nodes[index].tokens.iter().copied()).collect()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Nodes of a strand, from the top.
    fn path(&self, id: SeqId) -> Vec<usize> {
        let mut path = Vec::new();
        let mut at = self.strands.get(&id).and_then(|strand| strand.end);
        while let Some(index) = at {
            path.push(index);
            at = self.nodes[index].parent;
        }
        path.reverse();
        path
    }

    /// Cuts a node in two. The given index stays the lower part, where strands end; the new upper part is returned.
    fn split(&mut self, index: usize, at: usize) -> usize {
        let node = &mut self.nodes[index];
        let lower = node.tokens.split_off(at);
        let upper = Node {
            parent: node.parent,
            tokens: std::mem::replace(&mut node.tokens, lower),
            children: vec![index],
            holders: node.holders.clone(),
            pins: node.pins,
        };
        let parent = node.parent;
        let new = self.place(upper);
        self.nodes[index].parent = Some(new);
        self.replace_child(parent, index, Some(new));
        new
    }

    /// Joins a node with the one above it where the same sequences hold both, so that cuts do not pile up.
    fn join(&mut self, index: usize) {
        let Some(parent) = self.nodes[index].parent else { return };
        if self.nodes[index].holders.is_empty() || self.nodes[parent].holders != self.nodes[index].holders {
            return;
        }
        // Equal holders: nobody ends at the parent, and no other child has a holder.
        let above = std::mem::take(&mut self.nodes[parent].tokens);
        let grandparent = self.nodes[parent].parent;
        let node = &mut self.nodes[index];
        node.tokens.splice(0..0, above);
        node.parent = grandparent;
        self.replace_child(grandparent, parent, Some(index));
        self.vacate(parent);
    }

    fn remove(&mut self, index: usize, domain: &Domain) {
        let parent = self.nodes[index].parent;
        match parent {
            Some(parent) => self.nodes[parent].children.retain(|child| *child != index),
            None => {
                if let Some(tops) = self.tops.get_mut(domain) {
                    tops.retain(|top| *top != index);
                    if tops.is_empty() {
                        self.tops.remove(domain);
                    }
                }
            }
        }
        self.vacate(index);
    }

    fn replace_child(&mut self, parent: Option<usize>, old: usize, new: Option<usize>) {
        let children = match parent {
            Some(parent) => &mut self.nodes[parent].children,
            None => match self.tops.values_mut().find(|tops| tops.contains(&old)) {
                Some(tops) => tops,
                None => return,
            },
        };
        if let (Some(place), Some(new)) = (children.iter_mut().find(|child| **child == old), new) {
            *place = new;
        }
    }

    fn place(&mut self, node: Node) -> usize {
        match self.vacant.pop() {
            Some(index) => {
                self.nodes[index] = node;
                index
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        }
    }

    fn vacate(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.tokens = Vec::new();
        node.children = Vec::new();
        node.holders = BTreeSet::new();
        node.parent = None;
        node.pins = 0;
        self.vacant.push(index);
    }
}

/// Length of the common beginning.
pub(crate) fn common(left: &[i32], right: &[i32]) -> usize {
    left.iter().zip(right).take_while(|(left, right)| left == right).count()
}

#[cfg(test)]
#[path = "radix_tests.rs"]
mod tests;
