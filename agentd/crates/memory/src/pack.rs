//! How do many short rows fill the pages of a file?
//!
//! redb splits a full page in the middle, so rows that come with rising numbers leave every page half empty; and
//! each sealed row is 28 bytes longer than its content. So entries stand together in blocks that fill one page,
//! sealed as a whole and, where they are text, squeezed (LZ4) before.
//!
//! Owns:    four tables of blocks ([`RECORDS`], [`LIVES`], [`COARSE`], [`FINE`]) and the count of each one's entries.
//! In:      entries under sequence numbers. Out: the same, by number or in order.
//! Always:  the key of a block is the number it was begun with, and every entry from there to the next key is in
//!          it. What a transaction changes is kept beside the blocks until [`Pack::flush`]; reading sees it at once.
//! Squeezed and sealed: the length of a block tells how alike its texts are. All texts of a store are one agent's,
//!          or those of one shared knowledge; nobody but who holds the disk sees lengths of blocks (budgets count
//!          what was told, not what it takes), and that person sees times and sizes of the file in any case.
//! Threads: none of its own; a pack belongs to one transaction.

use crate::error::{Damage, StoreError};
use crate::seal::{Nonces, Row, SEAL_BYTES, Seal};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Number a block was begun with, to a sealed block.
type Blocks = TableDefinition<'static, u64, &'static [u8]>;

/// How the entries of one table are kept.
pub(crate) struct Shape {
    table: Blocks,
    row: Row,
    /// A sealed block is at most so long, unless it holds a single entry that is longer.
    block_bytes: usize,
    packing: Packing,
    /// Its place among the counts of entries.
    place: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Plain,
    Squeezed,
}

/// Pages of redb, less what a leaf with one pair of an eight-byte key needs. Lives change alone and are asked for alone.
const PAGE_BYTES: usize = 4096 - 16;
/// A question opens such a block for each of some dozen entries, which a larger one would make slower.
const TWO_PAGES_BYTES: usize = 2 * 4096 - 16;
/// For what is read all together.
const FOUR_PAGES_BYTES: usize = 4 * 4096 - 16;

/// Texts.
pub(crate) static RECORDS: Shape = Shape {
    table: TableDefinition::new("record_block"),
    row: Row::RecordBlock,
    block_bytes: TWO_PAGES_BYTES,
    packing: Packing::Squeezed,
    place: 0,
};
/// What changes while the text stays.
pub(crate) static LIVES: Shape = Shape {
    table: TableDefinition::new("life_block"),
    row: Row::LifeBlock,
    block_bytes: PAGE_BYTES,
    packing: Packing::Squeezed,
    place: 1,
};
/// First parts of vectors, each after the number of its embedder: read all together, when the index is loaded.
pub(crate) static COARSE: Shape = Shape {
    table: TableDefinition::new("coarse_block"),
    row: Row::CoarseBlock,
    block_bytes: FOUR_PAGES_BYTES,
    packing: Packing::Plain,
    place: 2,
};
/// Second parts of vectors: some dozens are read for a question.
pub(crate) static FINE: Shape = Shape {
    table: TableDefinition::new("fine_block"),
    row: Row::FineBlock,
    block_bytes: TWO_PAGES_BYTES,
    packing: Packing::Plain,
    place: 3,
};

/// How many entries each table holds, in the order of [`Shape::place`].
pub(crate) type Entries = [u64; 4];

impl Shape {
    pub(crate) fn count(&self, entries: &Entries) -> u64 {
        entries[self.place]
    }

    fn content_bytes(&self) -> usize {
        self.block_bytes - SEAL_BYTES
    }
}

/// More than one entry: at most so long before it is squeezed, so that reading one of them stays cheap.
const RAW_BYTES_MOST: usize = 48 * 1024;
/// A block that says it is longer than this was not written here.
const RAW_BYTES_LIMIT: usize = 1024 * 1024;
const ENTRIES_MOST: usize = 1024;

const PLAIN: u8 = 0;
const SQUEEZED: u8 = 1;

/// One table of blocks in one transaction.
pub(crate) struct Pack<T> {
    shape: &'static Shape,
    table: T,
    /// The block that was opened last: neighbours are often asked for one after another.
    last: RefCell<Option<Rc<Opened>>>,
    /// Not yet in a block; none: removed.
    changed: BTreeMap<u64, Option<Vec<u8>>>,
    /// How much shorter squeezing made the last block: what the next one is begun with.
    ratio: f32,
}

/// A block's entries.
#[derive(Debug, PartialEq, Eq)]
struct Opened {
    key: u64,
    raw: Vec<u8>,
    /// Number, beginning and end of each, in rising order.
    entries: Vec<(u64, usize, usize)>,
}

impl Opened {
    fn get(&self, seq: u64) -> Option<&[u8]> {
        let at = self.entries.binary_search_by_key(&seq, |(seq, _, _)| *seq).ok()?;
        let (_, from, to) = self.entries.get(at)?;
        self.raw.get(*from..*to)
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &[u8])> {
        self.entries.iter().filter_map(|(seq, from, to)| Some((*seq, self.raw.get(*from..*to)?)))
    }
}

impl Pack<ReadOnlyTable<u64, &'static [u8]>> {
    pub(crate) fn read(txn: &ReadTransaction, shape: &'static Shape) -> Result<Self, StoreError> {
        Ok(Self::of(txn.open_table(shape.table)?, shape))
    }
}

impl<'txn> Pack<Table<'txn, u64, &'static [u8]>> {
    pub(crate) fn write(txn: &'txn WriteTransaction, shape: &'static Shape) -> Result<Self, StoreError> {
        Ok(Self::of(txn.open_table(shape.table)?, shape))
    }

    pub(crate) fn insert(&mut self, seq: u64, content: Vec<u8>) {
        self.changed.insert(seq, Some(content));
    }

    pub(crate) fn remove(&mut self, seq: u64) {
        self.changed.insert(seq, None);
    }

    /// Writes what was changed into the blocks, and how many entries there are now into `entries`.
    pub(crate) fn flush(
        &mut self,
        seal: &Seal,
        nonces: &mut Nonces,
        entries: &mut Entries,
    ) -> Result<(), StoreError> {
        let mut changed = std::mem::take(&mut self.changed);
        while let Some(first) = changed.keys().next().copied() {
            let old = self.block_at(seal, first)?;
            let next = self.table.range(first.saturating_add(1)..)?.next().transpose()?;
            let next = next.map(|(key, _)| key.value());
            // All from here to the next block's key belong into this block.
            let rest = match next {
                Some(key) => changed.split_off(&key),
                None => BTreeMap::new(),
            };
            let here = std::mem::replace(&mut changed, rest);
            // What was opened for this is about to be written over.
            self.last.take();
            let (before, after) = self.rewrite(seal, nonces, old.as_deref(), here)?;
            let count = &mut entries[self.shape.place];
            *count = (*count + after).saturating_sub(before);
        }
        Ok(())
    }

    /// Puts the changes into one block, which may become several or none; says how many entries it had and has.
    fn rewrite(
        &mut self,
        seal: &Seal,
        nonces: &mut Nonces,
        old: Option<&Opened>,
        here: BTreeMap<u64, Option<Vec<u8>>>,
    ) -> Result<(u64, u64), StoreError> {
        let before = old.map_or(0, |old| old.entries.len() as u64);
        let all = merged(old, &here);
        let mut left = all.as_slice();
        // The block keeps its key while it has entries: a smaller number than its first one's does no harm.
        let mut key = old.map(|old| old.key);
        if left.is_empty()
            && let Some(key) = key
        {
            self.table.remove(key)?;
        }
        while let Some((first, _)) = left.first() {
            let key = key.take().unwrap_or(*first);
            let (taken, content) = self.cut(key, left);
            let sealed = seal.seal(nonces, self.shape.row, &key.to_be_bytes(), &content)?;
            self.table.insert(key, sealed.as_slice())?;
            left = left.get(taken..).unwrap_or_default();
        }
        Ok((before, all.len() as u64))
    }

    /// As many of the first entries as fill a block, and the block; at least one.
    fn cut(&mut self, key: u64, entries: &[(u64, &[u8])]) -> (usize, Vec<u8>) {
        let room = self.shape.content_bytes();
        match self.shape.packing {
            Packing::Plain => {
                let taken = first_within(entries, room - 3);
                (taken, block(key, &entries[..taken], Packing::Plain))
            }
            Packing::Squeezed => {
                let raw_bytes = ((room as f32 * self.ratio) as usize).clamp(room, RAW_BYTES_MOST);
                let mut taken = first_within(entries, raw_bytes);
                let mut content = block(key, &entries[..taken], Packing::Squeezed);
                // Too much is halved towards what fits; too little is tried with more, once.
                while content.len() > room && taken > 1 {
                    taken = (taken * room * 31 / 32 / content.len()).clamp(1, taken - 1);
                    content = block(key, &entries[..taken], Packing::Squeezed);
                }
                let more = first_within(entries, RAW_BYTES_MOST).min(taken * room * 63 / 64 / content.len());
                if more > taken {
                    let larger = block(key, &entries[..more], Packing::Squeezed);
                    if larger.len() <= room {
                        (taken, content) = (more, larger);
                    }
                }
                let raw: usize = entries[..taken].iter().map(|(_, content)| content.len()).sum();
                if taken < entries.len() {
                    self.ratio = raw as f32 / content.len() as f32;
                }
                (taken, content)
            }
        }
    }
}

impl<T: ReadableTable<u64, &'static [u8]>> Pack<T> {
    fn of(table: T, shape: &'static Shape) -> Self {
        Self { shape, table, last: RefCell::new(None), changed: BTreeMap::new(), ratio: 1.5 }
    }

    pub(crate) fn get(&self, seal: &Seal, seq: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(seal, seq, <[u8]>::to_vec)
    }

    pub(crate) fn contains(&self, seal: &Seal, seq: u64) -> Result<bool, StoreError> {
        Ok(self.with(seal, seq, |_| ())?.is_some())
    }

    /// What `look` makes of the entry, if there is one.
    pub(crate) fn with<R>(
        &self,
        seal: &Seal,
        seq: u64,
        look: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>, StoreError> {
        if let Some(changed) = self.changed.get(&seq) {
            return Ok(changed.as_deref().map(look));
        }
        Ok(self.block_at(seal, seq)?.and_then(|block| block.get(seq).map(look)))
    }

    /// All entries in rising order, with what this transaction changed.
    pub(crate) fn for_each(
        &self,
        seal: &Seal,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut changed = self.changed.iter().peekable();
        for row in self.table.iter()? {
            let (key, sealed) = row?;
            let block = open(seal, self.shape, key.value(), sealed.value())?;
            for (seq, content) in block.iter() {
                while let Some((new, content)) = changed.next_if(|(new, _)| **new < seq) {
                    content.as_ref().map_or(Ok(()), |content| each(*new, content))?;
                }
                match changed.next_if(|(new, _)| **new == seq) {
                    None => each(seq, content)?,
                    Some((_, Some(content))) => each(seq, content)?,
                    Some((_, None)) => {}
                }
            }
        }
        for (new, content) in changed {
            content.as_ref().map_or(Ok(()), |content| each(*new, content))?;
        }
        Ok(())
    }

    /// Entries below this number, from the last back, until `each` says that it is enough. Only what is in blocks.
    pub(crate) fn back_from(
        &self,
        seal: &Seal,
        before: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result<Going, StoreError>,
    ) -> Result<(), StoreError> {
        for row in self.table.range(..before)?.rev() {
            let (key, sealed) = row?;
            let block = open(seal, self.shape, key.value(), sealed.value())?;
            for (seq, content) in block.iter().rev().filter(|(seq, _)| *seq < before) {
                if each(seq, content)? == Going::Enough {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The block in which this number stands, if any.
    fn block_at(&self, seal: &Seal, seq: u64) -> Result<Option<Rc<Opened>>, StoreError> {
        let here = |block: &&Rc<Opened>| {
            block.key <= seq && block.entries.last().is_some_and(|(last, _, _)| seq <= *last)
        };
        if let Some(block) = self.last.borrow().as_ref().filter(here) {
            return Ok(Some(Rc::clone(block)));
        }
        let Some(row) = self.table.range(..=seq)?.next_back() else { return Ok(None) };
        let (key, sealed) = row?;
        let block = Rc::new(open(seal, self.shape, key.value(), sealed.value())?);
        *self.last.borrow_mut() = Some(Rc::clone(&block));
        Ok(Some(block))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Going {
    On,
    Enough,
}

/// A block's entries with the changes to them, in order.
fn merged<'a>(old: Option<&'a Opened>, here: &'a BTreeMap<u64, Option<Vec<u8>>>) -> Vec<(u64, &'a [u8])> {
    let mut all = Vec::with_capacity(old.map_or(0, |old| old.entries.len()) + here.len());
    let mut new = here.iter().peekable();
    let content = |(seq, content): (&u64, &'a Option<Vec<u8>>)| Some((*seq, content.as_deref()?));
    for (seq, kept) in old.into_iter().flat_map(Opened::iter) {
        while let Some(earlier) = new.next_if(|(new, _)| **new < seq) {
            all.extend(content(earlier));
        }
        match new.next_if(|(new, _)| **new == seq) {
            None => all.push((seq, kept)),
            Some(changed) => all.extend(content(changed)),
        }
    }
    all.extend(new.filter_map(content));
    all
}

/// How many of the first entries are no longer together than this; at least one.
fn first_within(entries: &[(u64, &[u8])], bytes: usize) -> usize {
    let mut sum = 0;
    // Three bytes of length and one of distance are what nearly every entry needs.
    let fits = |(_, content): &&(u64, &[u8])| {
        sum += content.len() + 4;
        sum <= bytes
    };
    entries.iter().take(ENTRIES_MOST).take_while(fits).count().max(1)
}

/// A block's content: how it is packed, then (squeezed: the length before, 4 bytes) how many entries (2 bytes), for
/// each two varints (distance from the number before, first: from the key; length), then the entries.
fn block(key: u64, entries: &[(u64, &[u8])], packing: Packing) -> Vec<u8> {
    let bytes: usize = entries.iter().map(|(_, content)| content.len() + 4).sum();
    let mut out = Vec::with_capacity(bytes + 8);
    out.push(PLAIN);
    out.extend((entries.len() as u16).to_le_bytes());
    let mut before = key;
    for (seq, content) in entries {
        put_varint(&mut out, seq - before);
        put_varint(&mut out, content.len() as u64);
        before = *seq;
    }
    entries.iter().for_each(|(_, content)| out.extend_from_slice(content));
    if packing == Packing::Squeezed {
        let raw = &out[1..];
        let mut squeezed = vec![0; 5 + lz4_flex::block::get_maximum_output_size(raw.len())];
        squeezed[0] = SQUEEZED;
        squeezed[1..5].copy_from_slice(&(raw.len() as u32).to_le_bytes());
        // A buffer of that size always suffices; if it did not, the block would stay as it is.
        if let Ok(length) = lz4_flex::block::compress_into(raw, &mut squeezed[5..])
            && length + 5 < out.len()
        {
            squeezed.truncate(5 + length);
            return squeezed;
        }
    }
    out
}

fn open(seal: &Seal, shape: &Shape, key: u64, sealed: &[u8]) -> Result<Opened, Damage> {
    let mut content = Vec::new();
    let opened = seal.open(shape.row, &key.to_be_bytes(), sealed, &mut content).map(<[u8]>::len);
    content.truncate(opened.ok_or(Damage::Sealed { seq: key })?);
    unpack(key, content).ok_or(Damage::Packed { seq: key })
}

fn unpack(key: u64, content: Vec<u8>) -> Option<Opened> {
    let (packing, rest) = content.split_first()?;
    let (raw, start) = match *packing {
        PLAIN => (content, 1),
        SQUEEZED => {
            let (length, squeezed) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            if length > RAW_BYTES_LIMIT {
                return None;
            }
            let mut raw = vec![0; length];
            (lz4_flex::block::decompress_into(squeezed, &mut raw).ok()? == length).then_some((raw, 0))?
        }
        _ => return None,
    };
    let count = usize::from(u16::from_le_bytes(*raw.get(start..)?.first_chunk()?));
    let (mut at, mut seq) = (start + 2, key);
    let mut entries = Vec::with_capacity(count);
    let mut lengths = 0usize;
    for i in 0..count {
        let distance = take_varint(&raw, &mut at)?;
        // Only the first may stand at the key itself.
        if i > 0 && distance == 0 {
            return None;
        }
        seq = seq.checked_add(distance)?;
        let length = usize::try_from(take_varint(&raw, &mut at)?).ok()?;
        entries.push((seq, lengths, lengths.checked_add(length)?));
        lengths = lengths.checked_add(length)?;
    }
    for (_, from, to) in &mut entries {
        (*from, *to) = (from.checked_add(at)?, to.checked_add(at)?);
    }
    (at + lengths == raw.len()).then_some(Opened { key, raw, entries })
}

/// LEB128, as in Protocol Buffers.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn take_varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The numbers that a sealed block holds, if it opens.
#[cfg(test)]
pub(crate) fn numbers_in(seal: &Seal, shape: &Shape, key: u64, sealed: &[u8]) -> Vec<u64> {
    open(seal, shape, key, sealed).map_or(Vec::new(), |block| block.iter().map(|(seq, _)| seq).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;
    use redb::{Database, ReadableDatabase};
    use zeroize::Zeroizing;

    fn seal() -> Seal {
        Seal::new(&Zeroizing::new([7; 32]))
    }

    fn database() -> Database {
        Database::builder().create_with_backend(InMemoryBackend::new()).unwrap()
    }

    type Model = BTreeMap<u64, Vec<u8>>;

    fn all<T: ReadableTable<u64, &'static [u8]>>(pack: &Pack<T>) -> Model {
        let mut found = Model::new();
        let add = |seq, content: &[u8]| {
            assert!(found.insert(seq, content.to_vec()).is_none());
            Ok(())
        };
        pack.for_each(&seal(), add).unwrap();
        found
    }

    const SHAPES: [&Shape; 3] = [&RECORDS, &COARSE, &FINE];

    #[derive(Debug, Clone)]
    enum Step {
        Put(u64, usize),
        Remove(u64),
        Flush,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let length = prop_oneof![0usize..600, 3000usize..6000];
        let step = prop_oneof![
            6 => (0u64..300, length).prop_map(|(seq, length)| Step::Put(seq, length)),
            2 => (0u64..300).prop_map(Step::Remove),
            1 => Just(Step::Flush),
        ];
        proptest::collection::vec(step, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_pack_is_a_map(shape in 0..SHAPES.len(), rounds in proptest::collection::vec(steps(), 1..4)) {
            let shape = SHAPES[shape];
            let (database, seal, mut nonces) = (database(), seal(), Nonces::new());
            let (mut model, mut entries) = (Model::new(), Entries::default());
            for round in rounds {
                let txn = database.begin_write().unwrap();
                {
                    let mut pack = Pack::write(&txn, shape).unwrap();
                    for step in round {
                        match step {
                            Step::Put(seq, length) => {
                                let content: Vec<u8> = (0..length).map(|i| (i as u64 * seq % 251) as u8).collect();
                                pack.insert(seq, content.clone());
                                model.insert(seq, content);
                            }
                            Step::Remove(seq) => {
                                pack.remove(seq);
                                model.remove(&seq);
                            }
                            Step::Flush => pack.flush(&seal, &mut nonces, &mut entries).unwrap(),
                        }
                        prop_assert_eq!(pack.get(&seal, 17).unwrap(), model.get(&17).cloned());
                    }
                    prop_assert_eq!(&all(&pack), &model);
                    pack.flush(&seal, &mut nonces, &mut entries).unwrap();
                    prop_assert_eq!(&all(&pack), &model);
                }
                txn.commit().unwrap();
                prop_assert_eq!(shape.count(&entries), model.len() as u64);
                let txn = database.begin_read().unwrap();
                let pack = Pack::read(&txn, shape).unwrap();
                for seq in 0..300 {
                    prop_assert_eq!(pack.get(&seal, seq).unwrap(), model.get(&seq).cloned());
                }
                let mut back = Vec::new();
                pack.back_from(&seal, 200, |seq, _| { back.push(seq); Ok(Going::On) }).unwrap();
                prop_assert!(back.iter().rev().eq(model.range(..200).map(|(seq, _)| seq)));
            }
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = unpack(3, bytes);
        }
    }

    /// Found by the test above: the block that a flush had opened was taken for the one that it wrote.
    #[test]
    fn what_was_flushed_twice_is_read_as_it_was_written_last() {
        let (database, seal, mut nonces) = (database(), seal(), Nonces::new());
        let mut entries = Entries::default();
        let txn = database.begin_write().unwrap();
        let mut pack = Pack::write(&txn, &RECORDS).unwrap();
        for content in [&b"first"[..], b"second"] {
            pack.insert(17, content.to_vec());
            pack.flush(&seal, &mut nonces, &mut entries).unwrap();
            assert_eq!(pack.get(&seal, 17).unwrap().unwrap(), content);
        }
    }

    /// Told one by one or a thousand at a time: pages are full, but for the last.
    #[test]
    fn entries_that_come_in_order_fill_their_pages() {
        for (shape, length, at_once) in
            [(&FINE, 384, 1), (&FINE, 384, 500), (&COARSE, 392, 7), (&RECORDS, 450, 3)]
        {
            let (database, seal, mut nonces) = (database(), seal(), Nonces::new());
            let mut entries = Entries::default();
            let mut random = 1u64;
            for chunk in 0..(600 / at_once) {
                let txn = database.begin_write().unwrap();
                {
                    let mut pack = Pack::write(&txn, shape).unwrap();
                    for i in 0..at_once {
                        let content = (0..length).map(|_| {
                            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                            (random >> 60) as u8
                        });
                        pack.insert((chunk * at_once + i) as u64, content.collect());
                    }
                    pack.flush(&seal, &mut nonces, &mut entries).unwrap();
                }
                txn.commit().unwrap();
            }
            let txn = database.begin_read().unwrap();
            let pack = Pack::read(&txn, shape).unwrap();
            let mut lengths: Vec<usize> =
                pack.table.iter().unwrap().map(|r| r.unwrap().1.value().len()).collect();
            lengths.pop();
            let full = lengths.iter().filter(|l| **l > shape.block_bytes * 17 / 20).count();
            assert!(full * 10 >= lengths.len() * 9, "{:?}: {lengths:?}", shape.row);
            assert!(lengths.iter().all(|l| *l <= shape.block_bytes), "{lengths:?}");
        }
    }

    #[test]
    fn the_layout_is_the_one_of_the_format_page() {
        let content = block(5, &[(5, b"ab"), (200, b"c")], Packing::Plain);
        assert_eq!(content, [0, 2, 0, 0, 2, 0xC3, 1, 1, b'a', b'b', b'c']);
        let text = b"again and again and again and again and again";
        let squeezed = block(0, &[(0, text)], Packing::Squeezed);
        assert_eq!((squeezed[0], &squeezed[1..5]), (1, &[2 + 2 + 45, 0, 0, 0][..]));
        assert_eq!(unpack(0, squeezed).unwrap().get(0), Some(&text[..]));
    }
}
