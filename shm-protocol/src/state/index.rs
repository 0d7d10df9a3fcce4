//! From the hash of a key to its block: private memory, one table for each key group.
//!
//! A table is sorted by the hash: an entry's home is where its hash would be if all were spread evenly, and those that
//! find it taken move on, in order (linear probing). So a look-up mostly touches one cache line, the keys of a group can be
//! walked in an order that neither growing nor changes disturb, and making room for one more moves one group's entries
//! only, of 256: with 10 million keys 40,000 of them, in a fraction of a millisecond.

use crate::key::{KEY_GROUPS, key_group};

/// The smallest table has 8 homes.
const HOMES_BITS_MIN: u32 = 3;

/// Blocks by the hash of their keys.
#[derive(Debug)]
pub(super) struct Index {
    tables: Vec<Table>,
    entries: usize,
}

/// One key group. `slots` is empty, or has 2^`bits` homes and behind them room for those that were pushed beyond the last.
/// An entry has a part of the hash above (its 32 bits below the group) and the block below; 0 is none: no block has number 0.
#[derive(Debug, Default)]
struct Table {
    slots: Vec<u64>,
    bits: u32,
    entries: usize,
}

/// Where an entry is. Valid until the next change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    group: usize,
    slot: usize,
}

/// The 32 bits of a hash below its group.
pub(super) fn part_of(hash: u64) -> u32 {
    // The mask keeps 32 bits, so the cast loses none.
    u32::try_from(hash >> 24 & 0xffff_ffff).unwrap_or(0)
}

fn entry(part: u32, block: u32) -> u64 {
    u64::from(part) << 32 | u64::from(block)
}

fn part(entry: u64) -> u32 {
    u32::try_from(entry >> 32).unwrap_or(0)
}

fn block(entry: u64) -> u32 {
    u32::try_from(entry & 0xffff_ffff).unwrap_or(0)
}

impl Index {
    pub(super) fn new() -> Self {
        Self { tables: (0..KEY_GROUPS).map(|_| Table::default()).collect(), entries: 0 }
    }

    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Bytes of memory that it takes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.tables.iter().map(|table| table.slots.capacity() * 8).sum()
    }

    /// The entry of this hash whose block is the wanted one.
    #[inline]
    pub(super) fn find(&self, hash: u64, mut is_wanted: impl FnMut(u32) -> bool) -> Option<(Place, u32)> {
        let group = key_group(hash);
        let table = self.tables.get(group)?;
        let wanted = part_of(hash);
        let home = table.home(wanted);
        for (further, entry) in table.slots.get(home..)?.iter().copied().enumerate() {
            if entry == 0 || part(entry) > wanted {
                return None;
            }
            if part(entry) == wanted && is_wanted(block(entry)) {
                return Some((Place { group, slot: home + further }, block(entry)));
            }
        }
        None
    }

    /// Puts another block in the place of an entry's.
    #[inline]
    pub(super) fn replace(&mut self, place: Place, block: u32) {
        if let Some(slot) = self.tables.get_mut(place.group).and_then(|table| table.slots.get_mut(place.slot)) {
            *slot = entry(part(*slot), block);
        }
    }

    pub(super) fn insert(&mut self, hash: u64, block: u32) {
        if let Some(table) = self.tables.get_mut(key_group(hash)) {
            table.insert(part_of(hash), block);
            self.entries += 1;
        }
    }

    pub(super) fn remove(&mut self, place: Place) {
        if let Some(table) = self.tables.get_mut(place.group) {
            table.remove(place.slot);
            self.entries -= 1;
        }
    }

    /// Entries of a group, sorted by their part of the hash, beginning with part `from`.
    pub(super) fn walk(&self, group: usize, from: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let slots = self.tables.get(group).map_or(&[][..], |table| table.slots.get(table.home(from)..).unwrap_or(&[]));
        slots
            .iter()
            .filter(move |entry| **entry != 0 && part(**entry) >= from)
            .map(|entry| (part(*entry), block(*entry)))
    }

    /// Makes a group's table of entries that are sorted by their part: for the beginning, when none is there.
    pub(super) fn fill(&mut self, group: usize, sorted: &[(u32, u32)]) {
        if let Some(table) = self.tables.get_mut(group) {
            self.entries = self.entries - table.entries + sorted.len();
            table.build(sorted.iter().map(|(part, block)| entry(*part, *block)), sorted.len());
        }
    }
}

impl Table {
    #[inline]
    fn home(&self, part: u32) -> usize {
        if self.slots.is_empty() { 0 } else { (part >> (32 - self.bits)) as usize }
    }

    /// Lays sorted entries out, in a table of a size that fits their number.
    fn build(&mut self, sorted: impl Iterator<Item = u64>, count: usize) {
        self.entries = count;
        if count == 0 {
            (self.slots, self.bits) = (Vec::new(), 0);
            return;
        }
        // Half to three quarters full from here: 2.5 looks on average before the next growth.
        self.bits = HOMES_BITS_MIN.max((count * 4 / 3 + 1).next_power_of_two().trailing_zeros()).min(31);
        let homes = 1_usize << self.bits;
        // Zeros from the kernel for large tables: nothing is touched twice.
        self.slots = vec![0; homes + 32];
        let mut next = 0;
        for entry in sorted {
            let at = self.home(part(entry)).max(next);
            if at >= self.slots.len() {
                self.slots.resize(at + 32, 0);
            }
            if let Some(slot) = self.slots.get_mut(at) {
                *slot = entry;
            }
            next = at + 1;
        }
    }

    fn rebuild(&mut self, count: usize) {
        let old = std::mem::take(&mut self.slots);
        let entries = self.entries;
        self.build(old.into_iter().filter(|entry| *entry != 0), count);
        self.entries = entries;
    }

    fn insert(&mut self, wanted: u32, block: u32) {
        if self.slots.is_empty() || self.entries * 4 >= 3 << self.bits {
            self.rebuild((self.entries + 1) * 3 / 2);
        }
        self.entries += 1;
        let home = self.home(wanted);
        let mut at = home;
        while self.slots.get(at).is_some_and(|entry| *entry != 0 && part(*entry) <= wanted) {
            at += 1;
        }
        let free = self.slots.get(at..).and_then(|slots| slots.iter().position(|entry| *entry == 0));
        let end = free.map_or(self.slots.len(), |further| at + further);
        if end == self.slots.len() {
            // Pushed beyond the last home. Doubling would not help where all have one hash, so the row gets longer.
            self.slots.resize(end + 32, 0);
        }
        self.slots.copy_within(at..end, at + 1);
        if let Some(slot) = self.slots.get_mut(at) {
            *slot = entry(wanted, block);
        }
    }

    fn remove(&mut self, slot: usize) {
        self.entries -= 1;
        // Those behind it that are not at home move one nearer.
        let mut end = slot + 1;
        while self.slots.get(end).is_some_and(|entry| *entry != 0 && self.home(part(*entry)) < end) {
            end += 1;
        }
        if end <= self.slots.len() {
            self.slots.copy_within(slot + 1..end, slot);
            if let Some(last) = self.slots.get_mut(end - 1) {
                *last = 0;
            }
        }
        // So that a walk does not look at a table of what was once there.
        if self.bits > HOMES_BITS_MIN && self.entries * 8 < 1 << self.bits {
            self.rebuild(self.entries * 3 / 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[expect(clippy::cast_possible_truncation, reason = "random bits")]
    /// Against a sorted map, with many equal parts and homes at both ends.
    #[test]
    fn finds_what_is_there_in_order() {
        let mut index = Index::new();
        let mut expected = BTreeMap::new();
        let mut random = 1_u64;
        for round in 1..40_000_u32 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let crowd =
                [0x01 << 56, (0xffff_ffff << 24) | 0xff, random & 0xff_ffff_ffff, random][random as usize >> 7 & 3];
            let hash = crowd & !0xff_ffff;
            if random >> 40 & 3 > 0 || expected.is_empty() {
                index.insert(hash, round);
                expected.insert((hash, round), ());
            } else {
                let place = random as usize % expected.len();
                let (hash, block) = *expected.keys().nth(place).unwrap();
                let (place, found) = index.find(hash, |found| found == block).unwrap();
                assert_eq!(found, block);
                index.remove(place);
                expected.remove(&(hash, block));
                assert!(index.find(hash, |found| found == block).is_none());
            }
            if round % 4000 == 0 {
                let mut walked: Vec<(u64, u32)> = (0..KEY_GROUPS)
                    .flat_map(|group| {
                        index
                            .walk(group, 0)
                            .map(move |(part, block)| ((group as u64) << 56 | u64::from(part) << 24, block))
                    })
                    .collect();
                assert!(walked.is_sorted_by_key(|(hash, _)| *hash), "in the order of the hash");
                walked.sort_unstable();
                assert_eq!(walked, expected.keys().copied().collect::<Vec<_>>());
                assert_eq!(index.entries(), expected.len());
            }
        }
        while let Some((hash, block)) = expected.keys().next().copied() {
            let (place, _) = index.find(hash, |found| found == block).unwrap();
            index.remove(place);
            expected.remove(&(hash, block));
        }
        assert!(index.memory_bytes() < 256 * 64 * 8, "an empty index has no memory of what it was");
    }
}
