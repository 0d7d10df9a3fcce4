//! The blocks of a state: where they are, which are free, and how free ones are split and joined.
//!
//! Extents hold blocks in a row, and each says its length and its tag. What is decided is decided from private memory: two
//! bits for each 64 bytes say where blocks begin and which of them are free. So once a state is attached, no length that
//! somebody else scribbled into it moves a block. Two free neighbours are one block at once, so space that was used in
//! one size can be used in every other.
//!
//! Every change of the row is one 8-byte store of a length, before which the bytes are such that both the old and the new row
//! are right: a split writes the header of the rest first, a join covers a block that is free by its tag. A kill between
//! any two stores leaves a row of blocks.

use std::sync::atomic::Ordering;

use super::{ExtentBytes, StateError, StateShape};
use crate::layout::state;

/// Blocks begin at multiples of this and are as long as a multiple of it; so are all numbers here.
pub(super) const UNIT: usize = state::BLOCK_ALIGN;
/// Free blocks below this many units are sorted by their length, longer ones in eighths of an octave.
const EXACT_BINS: u32 = 32;
/// The longest block of the largest extent is in the last bin.
const BINS: usize = 256;
/// Of a bin of different lengths so many are looked at for one that fits, before a longer one is cut.
const LOOKS_MAX: usize = 32;

#[derive(Debug)]
struct Extent<M> {
    bytes: M,
    /// Units that it has, and that hold blocks or its header; no block was ever behind these.
    units: u32,
    used: u32,
    /// Of each 64 units: where blocks begin, and which of these are free.
    marks: Vec<[u64; 2]>,
}

/// All extents of a state.
#[derive(Debug)]
pub(super) struct Space<M> {
    extents: Vec<Extent<M>>,
    shape: StateShape,
    /// log2 of the units from one extent to the next.
    shift: u32,
    /// The extent at whose end new blocks are made.
    current: usize,
    bins: Vec<Bin>,
    /// One bit for each bin with something right in it.
    occupied: [u64; BINS / 64],
    free_units: u64,
    free_blocks: usize,
}

/// Free blocks of about one length. Some that stand here are not free any more, or of another length; the marks tell.
#[derive(Debug, Default)]
struct Bin {
    blocks: Vec<u32>,
    /// How many of them are right.
    right: usize,
}

/// What there is where a new block was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Another extent may come, and has room for it.
    Growing,
    /// None will.
    Full,
}

fn bin_of(units: u32) -> usize {
    if units < EXACT_BINS {
        return units as usize;
    }
    let log = units.ilog2();
    (32 + (log - 5) * 8 + (units >> (log - 3) & 7)) as usize
}

impl<M: ExtentBytes> Space<M> {
    pub(super) fn new(shape: StateShape) -> Self {
        let shift = shape.extent_bytes.max(UNIT as u64).ilog2() - UNIT.ilog2();
        let bins = (0..BINS).map(|_| Bin::default()).collect();
        Self {
            extents: Vec::new(),
            shape,
            shift,
            current: 0,
            bins,
            occupied: [0; BINS / 64],
            free_units: 0,
            free_blocks: 0,
        }
    }

    /// Adds an extent. What it holds is for the caller to walk.
    pub(super) fn add_extent(&mut self, bytes: M) -> Result<usize, StateError> {
        let extent = self.extents.len();
        let expected = usize::try_from(self.shape.extent_len_bytes(extent as u64)).unwrap_or(0);
        if expected == 0 || bytes.len_bytes() < expected {
            return Err(StateError::Damaged { extent, offset: 0, what: "the extent is not as long as the grant says" });
        }
        let units = u32::try_from(expected / UNIT).unwrap_or(0);
        let header = u32::try_from(state::BLOCKS_OFFSET / UNIT).unwrap_or(0);
        let marks = vec![[0; 2]; units.div_ceil(64) as usize];
        self.extents.push(Extent { bytes, units, used: header, marks });
        Ok(extent)
    }

    pub(super) fn shape(&self) -> StateShape {
        self.shape
    }

    pub(super) fn extents(&self) -> usize {
        self.extents.len()
    }

    /// Bytes that ever held a block, and the header of the first extent.
    pub(super) fn used_bytes(&self) -> usize {
        let blocks: usize = self.extents.iter().map(|extent| extent.used as usize * UNIT - state::BLOCKS_OFFSET).sum();
        blocks + state::BLOCKS_OFFSET
    }

    pub(super) fn free_bytes(&self) -> usize {
        usize::try_from(self.free_units).unwrap_or(usize::MAX).saturating_mul(UNIT)
    }

    pub(super) fn free_blocks(&self) -> usize {
        self.free_blocks
    }

    /// Bytes behind the last blocks of the extents that are not full.
    pub(super) fn untouched_bytes(&self) -> usize {
        let behind = self.extents.iter().skip(self.current);
        behind.map(|extent| (extent.units - extent.used) as usize * UNIT).sum()
    }

    /// A block's extent and offset in it.
    #[inline]
    pub(super) fn place(&self, block: u32) -> (&M, usize) {
        let extent = self.extents.get((block >> self.shift) as usize).expect("blocks are numbered by their extents");
        (&extent.bytes, (block & ((1 << self.shift) - 1)) as usize * UNIT)
    }

    /// A block's extent and offset, for errors.
    pub(super) fn damaged(&self, block: u32, what: &'static str) -> StateError {
        let offset = (block & ((1 << self.shift) - 1)) as usize * UNIT;
        StateError::Damaged { extent: (block >> self.shift) as usize, offset, what }
    }

    #[inline]
    pub(super) fn load(&self, block: u32, field: usize) -> u64 {
        let (bytes, offset) = self.place(block);
        bytes.load(offset + field, Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn store(&self, block: u32, field: usize, value: u64, order: Ordering) {
        let (bytes, offset) = self.place(block);
        bytes.store(offset + field, value, order);
    }

    pub(super) fn fence(&self, order: Ordering) {
        if let Some(extent) = self.extents.first() {
            extent.bytes.fence(order);
        }
    }

    /// Walks the blocks of an extent that was just added, in their order. `is_alive` says of each whether it counts; what does
    /// not is freed, and joined with its neighbours.
    pub(super) fn walk(
        &mut self,
        extent: usize,
        mut is_alive: impl FnMut(&Self, u32, usize) -> Result<bool, StateError>,
    ) -> Result<(), StateError> {
        let base = u32::try_from(extent << self.shift).unwrap_or(0);
        // The free blocks just before the one that is looked at: freed in one piece.
        let mut run: Option<u32> = None;
        let Some(units) = self.extents.get(extent).map(|extent| extent.units) else { return Ok(()) };
        while let Some(at) = self.extents.get(extent).map(|extent| extent.used).filter(|at| *at < units) {
            let block = base + at;
            let len_bytes = self.load(block, state::BLOCK_LEN);
            if len_bytes == 0 {
                break;
            }
            let len_units = u32::try_from(len_bytes / UNIT as u64).unwrap_or(u32::MAX);
            if !len_bytes.is_multiple_of(UNIT as u64) || len_units > units - at {
                return Err(self.damaged(block, "the length of a block is impossible"));
            }
            let alive = is_alive(self, block, usize::try_from(len_bytes).unwrap_or(0))?;
            if let Some(extent) = self.extents.get_mut(extent) {
                extent.used += len_units;
            }
            if !alive {
                run = run.or(Some(block));
                continue;
            }
            if let Some(first) = run.take() {
                self.join_run(first, block - first);
            }
            self.set_mark(0, block, true);
        }
        if let (Some(first), Some(used)) = (run, self.extents.get(extent).map(|extent| extent.used)) {
            self.join_run(first, base + used - first);
        }
        Ok(())
    }

    /// Makes one free block of free ones in a row.
    fn join_run(&mut self, first: u32, units: u32) {
        self.store(first, state::BLOCK_LEN, u64::from(units) * UNIT as u64, Ordering::Release);
        self.set_mark(0, first, true);
        self.add_free(first, units);
    }

    /// A block of so many units with the tag PENDING.
    pub(super) fn allocate(&mut self, units: u32) -> Result<u32, NoRoom> {
        let block = match self.take_free(units) {
            Some(block) => block,
            None => self.take_new(units)?,
        };
        // The tag that says "nothing here counts" is there before any byte of the new content.
        self.fence(Ordering::Release);
        Ok(block)
    }

    fn take_free(&mut self, units: u32) -> Option<u32> {
        if self.free_units < u64::from(units) {
            return None;
        }
        let own = bin_of(units);
        let found = if units < EXACT_BINS { None } else { self.fitting(own, units) };
        let block = match found {
            Some(block) => block,
            None => {
                let from = if units < EXACT_BINS { own } else { own + 1 };
                self.any_of(self.occupied_from(from)?)?
            }
        };
        let len = self.len_units(block);
        self.remove_free(block, len);
        if len > units {
            // The header of the rest is whole before the block's length lets a walk find it.
            let rest = block + units;
            self.store(rest, state::TAG, state::TAG_FREE, Ordering::Relaxed);
            self.store(rest, state::BLOCK_LEN, u64::from(len - units) * UNIT as u64, Ordering::Relaxed);
            self.store(block, state::BLOCK_LEN, u64::from(units) * UNIT as u64, Ordering::Release);
            self.set_mark(0, rest, true);
            self.add_free(rest, len - units);
        }
        self.store(block, state::TAG, state::TAG_PENDING, Ordering::Relaxed);
        Some(block)
    }

    fn occupied_from(&self, from: usize) -> Option<usize> {
        let mut ahead = u64::MAX << (from % 64);
        for (place, word) in self.occupied.iter().enumerate().skip(from / 64) {
            if word & ahead != 0 {
                return Some(place * 64 + (word & ahead).trailing_zeros() as usize);
            }
            ahead = u64::MAX;
        }
        None
    }

    fn occupy(&mut self, bin: usize, is_occupied: bool) {
        if let Some(word) = self.occupied.get_mut(bin / 64) {
            let bit = 1 << (bin % 64);
            *word = if is_occupied { *word | bit } else { *word & !bit };
        }
    }

    /// One of a bin of different lengths that is long enough, among the last that came.
    fn fitting(&self, bin: usize, units: u32) -> Option<u32> {
        let blocks = self.bins.get(bin)?.blocks.iter().rev().take(LOOKS_MAX);
        blocks.copied().find(|block| self.is_in_bin(*block, bin) && self.len_units(*block) >= units)
    }

    /// The last of a bin that is really there; wrong ones are dropped on the way.
    fn any_of(&mut self, bin: usize) -> Option<u32> {
        loop {
            let block = *self.bins.get(bin)?.blocks.last()?;
            if self.is_in_bin(block, bin) {
                return Some(block);
            }
            self.bins.get_mut(bin)?.blocks.pop();
        }
    }

    fn is_in_bin(&self, block: u32, bin: usize) -> bool {
        self.mark(1, block) && bin_of(self.len_units(block)) == bin
    }

    /// A block behind the last one of the first extent that has room.
    fn take_new(&mut self, units: u32) -> Result<u32, NoRoom> {
        let header = u32::try_from(state::BLOCKS_OFFSET / UNIT).unwrap_or(0);
        let extent_units = u32::try_from(self.shape.extent_len_bytes(0) / UNIT as u64).unwrap_or(0);
        loop {
            let last = self.extents.len().saturating_sub(1);
            let Some(extent) = self.extents.get_mut(self.current) else { return Err(NoRoom::Full) };
            let at = extent.used;
            let left = extent.units - at;
            let block = u32::try_from(self.current << self.shift).unwrap_or(0) + at;
            if left >= units {
                extent.used += units;
                if left > units {
                    // Whatever is behind the row stays behind it: attaching stopped at a length of 0 without a look at the
                    // rest (it would take memory for every page of a sparse extent), and a stage before may have written there.
                    self.store(block + units, state::BLOCK_LEN, 0, Ordering::Relaxed);
                }
                // The tag first: a block becomes one by its length, and must not count from its first moment.
                self.store(block, state::TAG, state::TAG_PENDING, Ordering::Relaxed);
                self.store(block, state::BLOCK_LEN, u64::from(units) * UNIT as u64, Ordering::Release);
                self.set_mark(0, block, true);
                return Ok(block);
            }
            if self.current == last {
                let may_grow = (self.extents.len() as u64) < self.shape.extents_max();
                let fits = units <= extent_units.saturating_sub(header);
                return Err(if may_grow && fits { NoRoom::Growing } else { NoRoom::Full });
            }
            if left > 0 {
                // What is left at the end is a free block for something shorter.
                extent.used += left;
                self.store(block, state::TAG, state::TAG_FREE, Ordering::Relaxed);
                self.store(block, state::BLOCK_LEN, u64::from(left) * UNIT as u64, Ordering::Release);
                self.set_mark(0, block, true);
                self.add_joined(block, left);
            }
            self.current += 1;
        }
    }

    /// Says that nothing in a block counts any more. Its neighbours are joined to it if they are free.
    pub(super) fn release(&mut self, block: u32) {
        // What is free already, or was joined with its neighbours, cannot be freed again, whatever its bytes say.
        if !self.mark(0, block) || self.mark(1, block) {
            return;
        }
        // Before whatever is written next, so that a later tombstone's release cannot overtake this one.
        self.store(block, state::TAG, state::TAG_FREE, Ordering::Release);
        self.fence(Ordering::Release);
        let len = self.len_units(block);
        self.add_joined(block, len);
    }

    fn add_joined(&mut self, block: u32, units: u32) {
        let (mut first, mut len) = (block, units);
        let next = block + units;
        if self.mark(1, next) {
            let more = self.len_units(next);
            self.remove_free(next, more);
            self.set_mark(0, next, false);
            len += more;
        }
        if let Some(before) = self.start_before(block)
            && self.mark(1, before)
        {
            let more = block - before;
            self.remove_free(before, more);
            self.set_mark(0, block, false);
            (first, len) = (before, len + more);
        }
        if len != units {
            self.store(first, state::BLOCK_LEN, u64::from(len) * UNIT as u64, Ordering::Release);
        }
        self.add_free(first, len);
    }

    fn add_free(&mut self, block: u32, units: u32) {
        self.set_mark(1, block, true);
        self.free_units += u64::from(units);
        self.free_blocks += 1;
        let number = bin_of(units);
        let Some(bin) = self.bins.get_mut(number) else { return };
        bin.right += 1;
        bin.blocks.push(block);
        let is_mostly_wrong = bin.blocks.len() > 2 * bin.right + 64;
        self.occupy(number, true);
        if is_mostly_wrong {
            let Some(bin) = self.bins.get_mut(number) else { return };
            let mut blocks = std::mem::take(&mut bin.blocks);
            blocks.retain(|block| self.is_in_bin(*block, number));
            blocks.sort_unstable();
            blocks.dedup();
            if let Some(bin) = self.bins.get_mut(number) {
                bin.blocks = blocks;
            }
        }
    }

    fn remove_free(&mut self, block: u32, units: u32) {
        self.set_mark(1, block, false);
        self.free_units -= u64::from(units);
        self.free_blocks -= 1;
        let number = bin_of(units);
        let Some(bin) = self.bins.get_mut(number) else { return };
        bin.right -= 1;
        if bin.right == 0 {
            self.occupy(number, false);
        }
    }

    /// Length of a block in bytes.
    #[inline]
    pub(super) fn len_bytes(&self, block: u32) -> usize {
        self.len_units(block) as usize * UNIT
    }

    /// From a block to the next one, or to the end of the row.
    #[inline]
    fn len_units(&self, block: u32) -> u32 {
        let Some(extent) = self.extents.get((block >> self.shift) as usize) else { return 0 };
        let at = block & ((1 << self.shift) - 1);
        let mut word = ((at + 1) / 64) as usize;
        let mut ahead = u64::MAX.checked_shl((at + 1) % 64).unwrap_or(0);
        while let Some([starts, _]) = extent.marks.get(word) {
            let found = starts & ahead;
            if found != 0 {
                return u32::try_from(word * 64).unwrap_or(0) + found.trailing_zeros() - at;
            }
            if word * 64 >= extent.used as usize {
                break;
            }
            ahead = u64::MAX;
            word += 1;
        }
        extent.used - at
    }

    /// The block before a block.
    fn start_before(&self, block: u32) -> Option<u32> {
        let extent = self.extents.get((block >> self.shift) as usize)?;
        let at = block & ((1 << self.shift) - 1);
        let mut word = (at / 64) as usize;
        let mut behind = (1_u64 << (at % 64)) - 1;
        loop {
            let found = extent.marks.get(word)?[0] & behind;
            if found != 0 {
                return Some(block - at + u32::try_from(word * 64).unwrap_or(0) + 63 - found.leading_zeros());
            }
            behind = u64::MAX;
            word = word.checked_sub(1)?;
        }
    }

    /// 0: whether a block begins here; 1: whether it is free.
    #[inline]
    fn mark(&self, which: usize, block: u32) -> bool {
        let at = block & ((1 << self.shift) - 1);
        let marks =
            self.extents.get((block >> self.shift) as usize).and_then(|extent| extent.marks.get((at / 64) as usize));
        marks.and_then(|marks| marks.get(which)).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    #[inline]
    fn set_mark(&mut self, which: usize, block: u32, is_set: bool) {
        let at = block & ((1 << self.shift) - 1);
        let extent = self.extents.get_mut((block >> self.shift) as usize);
        let marks = extent.and_then(|extent| extent.marks.get_mut((at / 64) as usize));
        if let Some(word) = marks.and_then(|marks| marks.get_mut(which)) {
            let bit = 1 << (at % 64);
            *word = if is_set { *word | bit } else { *word & !bit };
        }
    }
}
