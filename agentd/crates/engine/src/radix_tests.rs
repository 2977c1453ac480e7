//! Is the tree the exact shadow of a unified KV cache?

use super::*;
use proptest::prelude::*;

impl Prefixes {
    /// Everything that the module's doc calls true.
    pub(crate) fn check(&self) {
        let live = |index: &usize| !self.nodes[*index].holders.is_empty();
        let all: Vec<usize> = (0..self.nodes.len()).filter(live).collect();
        let sum: usize = all.iter().map(|index| self.nodes[*index].tokens.len()).sum();
        assert_eq!(sum as u32, self.used, "used cells");
        let counts = self.counts();
        assert_eq!(counts.private + counts.shared, self.used, "{counts:?}");
        for index in all {
            let node = &self.nodes[index];
            assert!(!node.tokens.is_empty(), "a node without cells");
            let pins = node.holders.iter().filter(|id| self.strands[id].pinned).count();
            assert_eq!(pins as u32, node.pins, "pins");
            for child in &node.children {
                assert_eq!(self.nodes[*child].parent, Some(index));
                assert!(self.nodes[*child].holders.is_subset(&node.holders), "holders grow upwards");
            }
            match node.parent {
                Some(parent) => assert!(self.nodes[parent].children.contains(&index)),
                None => assert_eq!(self.tops.values().filter(|tops| tops.contains(&index)).count(), 1),
            }
        }
        for (id, strand) in &self.strands {
            let path = self.path(*id);
            let length: usize = path.iter().map(|index| self.nodes[*index].tokens.len()).sum();
            assert_eq!(length as u32, strand.length, "length of {id:?}");
            assert!(path.iter().all(|index| self.nodes[*index].holders.contains(id)));
        }
        assert!(self.tops.values().all(|tops| !tops.is_empty()), "empty domains are forgotten");
    }
}

fn domain(name: &str) -> Domain {
    Arc::from(name)
}

fn id(number: u16) -> SeqId {
    SeqId(number)
}

#[test]
fn a_beginning_is_held_once_by_all_who_share_it() {
    let (mut tree, here) = (Prefixes::default(), domain("a"));
    tree.fork(&here, id(0), None);
    tree.extend(id(0), &[1, 2, 3, 4]);
    tree.fork(&here, id(1), Some((id(0), 3)));
    tree.extend(id(1), &[9, 9]);
    tree.check();
    assert_eq!(tree.used(), 6);
    assert_eq!(tree.counts(), Counts { private: 3, shared: 3, evictable: 0 });
    assert_eq!(tree.longest(&here, &[1, 2, 3, 9, 7], None), Some((id(1), 4)));
    assert_eq!(tree.longest(&here, &[1, 2, 3, 9, 7], Some(id(1))), Some((id(0), 3)));
    assert_eq!(tree.longest(&domain("b"), &[1, 2, 3], None), None, "another domain finds nothing");
    assert_eq!((tree.private(id(0)), tree.private(id(1))), (1, 2));
    // Who leaves frees what is its own; the shared part stays for the other, and becomes its own.
    assert_eq!(tree.release(id(0)), 1);
    tree.check();
    assert_eq!(tree.private(id(1)), 5);
    assert_eq!(tree.nodes.iter().filter(|node| !node.holders.is_empty()).count(), 1, "cuts are joined again");
    tree.pin(id(1), false);
    assert_eq!(tree.counts().evictable, 5);
    assert_eq!(tree.release(id(1)), 5);
    assert_eq!(tree.used(), 0);
    tree.check();
}

#[test]
fn the_same_text_computed_twice_has_cells_twice() {
    let (mut tree, here) = (Prefixes::default(), domain("a"));
    for number in 0..2 {
        tree.fork(&here, id(number), None);
        tree.extend(id(number), &[5, 6, 7]);
    }
    assert_eq!(tree.used(), 6);
    assert_eq!(tree.counts().shared, 0);
    assert_eq!(tree.truncate(id(0), 1), 2);
    assert_eq!(tree.longest(&here, &[5, 6, 7, 8], None), Some((id(1), 3)));
    tree.check();
}

/// A unified KV cache in the plainest way: cells with a position, a token and the sequences that hold them.
#[derive(Default)]
struct Cells(Vec<(u32, i32, BTreeSet<SeqId>)>);

impl Cells {
    fn of(&self, id: SeqId) -> Vec<i32> {
        let mut own: Vec<_> = self.0.iter().filter(|cell| cell.2.contains(&id)).collect();
        own.sort_by_key(|cell| cell.0);
        own.iter().map(|cell| cell.1).collect()
    }

    fn remove(&mut self, id: SeqId, from: u32) {
        for cell in self.0.iter_mut().filter(|cell| cell.0 >= from) {
            cell.2.remove(&id);
        }
        self.0.retain(|cell| !cell.2.is_empty());
    }
}

const IDS: u16 = 7;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// After any operations the tree counts what the cells are, strand by strand and in sum.
    #[test]
    fn the_tree_is_the_cells(
        steps in proptest::collection::vec((0u8..5, 0u16..IDS, 0u16..IDS, 0u32..40, 0i32..3), 1..120),
        total in 50u32..400,
    ) {
        let (mut tree, mut cells) = (Prefixes::default(), Cells::default());
        // Even and odd sequences do not know each other.
        let domain_of = |id: u16| domain(if id.is_multiple_of(2) { "even" } else { "odd" });
        let mut alive = BTreeSet::new();
        for (kind, number, other, amount, token) in steps {
            match kind {
                0 if !alive.contains(&number) => {
                    let source = (alive.contains(&other) && other % 2 == number % 2).then_some(other);
                    let from = source.map(|source| (id(source), amount.min(tree.length(id(source)))));
                    tree.fork(&domain_of(number), id(number), from);
                    if let Some((source, length)) = from {
                        for cell in cells.0.iter_mut().filter(|cell| cell.0 < length && cell.2.contains(&source)) {
                            cell.2.insert(id(number));
                        }
                    }
                    alive.insert(number);
                }
                1 if alive.contains(&number) && tree.used() + amount <= total => {
                    let begin = tree.length(id(number));
                    let tokens: Vec<i32> = (0..amount as i32).map(|n| (token + n) % 3).collect();
                    tree.extend(id(number), &tokens);
                    for (place, token) in (begin..).zip(tokens) {
                        cells.0.push((place, token, BTreeSet::from([id(number)])));
                    }
                }
                2 if alive.contains(&number) => {
                    let before = cells.0.len();
                    let private = tree.private(id(number));
                    let had = tree.length(id(number));
                    let length = had.saturating_sub(amount);
                    let freed = tree.truncate(id(number), length);
                    cells.remove(id(number), length);
                    prop_assert_eq!(freed as usize, before - cells.0.len());
                    prop_assert_eq!(freed, private.min(had - length));
                }
                3 if alive.remove(&number) => {
                    tree.release(id(number));
                    cells.remove(id(number), 0);
                }
                4 => tree.pin(id(number), amount.is_multiple_of(2)),
                _ => {}
            }
            tree.check();
            prop_assert_eq!(tree.used() as usize, cells.0.len());
            let shared = cells.0.iter().filter(|cell| cell.2.len() > 1).count();
            prop_assert_eq!(tree.counts().shared as usize, shared);
            let free = total - tree.used();
            prop_assert_eq!(tree.counts().private + tree.counts().shared + free, total);
            for number in &alive {
                prop_assert_eq!(tree.tokens(id(*number)), cells.of(id(*number)));
            }
            let wanted: Vec<i32> = (0..30).map(|n| (token + n) % 3).collect();
            let found = tree.longest(&domain_of(number), &wanted, None).map_or(0, |(_, length)| length);
            let best = alive.iter().filter(|other| **other % 2 == number % 2)
                .map(|other| common(&cells.of(id(*other)), &wanted)).max().unwrap_or(0);
            prop_assert_eq!(found as usize, best, "the longest beginning anybody holds");
        }
    }
}
