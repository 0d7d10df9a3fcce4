//! The only file that touches shared bytes.
//!
//! What another process may write is never a Rust reference here: words are atomics, bytes are copied in and out through
//! raw pointers. A peer that writes while we copy can make the copy a mixture of old and new bytes; every reader checks
//! the copy and uses nothing else.
//!
//! The algorithms in `ring` and `commit` borrow their words and bytes through [`Words`] and [`Bytes`], because the model
//! checker's atomics have another size than real ones.
#![allow(unsafe_code, reason = "mapping memory and touching it is what this file is for")]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::layout::DATA_OFFSET;

/// Shared u64 words at byte offsets.
pub trait Words {
    /// Reads the word at `offset`. Another process may change it at any time.
    fn load(&self, offset: usize, order: Ordering) -> u64;
    /// Writes the word at `offset`.
    fn store(&self, offset: usize, value: u64, order: Ordering);
    /// Writes words one behind the other from `offset` on, in no promised order: what somebody else's release store publishes.
    #[inline]
    fn store_row<const COUNT: usize>(&self, offset: usize, values: [u64; COUNT]) {
        for (index, value) in values.into_iter().enumerate() {
            self.store(offset + index * 8, value, Ordering::Relaxed);
        }
    }
    /// A fence between loads and stores of this process's view.
    fn fence(&self, order: Ordering);
    /// Tells the processor that the word at `offset` is read soon.
    fn prepare_load(&self, _offset: usize) {}
}

/// Shared bytes at logical positions that wrap at the capacity.
pub trait Bytes {
    /// Bytes before the positions wrap; a power of two.
    fn capacity(&self) -> u64;
    /// Copies bytes out. What a hostile peer writes meanwhile may be half in the copy.
    fn read(&self, position: u64, to: &mut [u8]);
    /// Copies one little-endian word out.
    fn read_word(&self, position: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(position, &mut bytes);
        u64::from_le_bytes(bytes)
    }
    /// Tells the processor that `len` bytes from `position` on are read soon.
    fn prepare_read(&self, _position: u64, _len: u64) {}
    /// Copies bytes in.
    fn write(&self, position: u64, from: &[u8]);
    /// Copies a record's head in, and behind it its payload.
    fn write_record(&self, position: u64, head: [u8; 8], payload: &[u8]) {
        self.write(position, &head);
        self.write(position + 8, payload);
    }
    /// Copies bytes in past the caches where the processor can. For batches that a reader on a far core takes next: its first
    /// touch then finds them in memory, and not in the writer's cache. Later stores, a release store as well, may be seen before
    /// these bytes until [`Bytes::fence_streams`].
    fn stream(&self, position: u64, from: &[u8]) {
        self.write(position, from);
    }
    /// Orders everything that was streamed before every later store.
    fn fence_streams(&self) {}
    /// Tells the processor that `len` bytes from `position` on are written soon.
    fn prepare_write(&self, _position: u64, _len: u64) {}
    /// Moves `len` bytes that are not published yet; the places may overlap.
    fn shift(&self, from: u64, to: u64, len: usize);
    /// Copies large bytes out of the room for large records.
    fn read_large(&self, position: u64, to: &mut [u8]);
    /// Copies large bytes in.
    fn write_large(&self, position: u64, from: &[u8]);
    /// Bytes in the room for large records.
    fn large_capacity(&self) -> u64;
}

/// Who may write through a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads and copies out only.
    ReadOnly,
    /// Stores and copies in too.
    Writable,
}

/// A whole segment as words: commit pages, session pages, state.
pub struct Mapping {
    base: NonNull<u8>,
    len_bytes: usize,
    access: Access,
}

// SAFETY: the mapping is owned by this value, which gives out no references to it; its words are atomics and its bytes are copied.
unsafe impl Send for Mapping {}
// SAFETY: as above: all access through `&Mapping` is atomic or a copy whose mixture the reader expects.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("len_bytes", &self.len_bytes)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl Mapping {
    /// Maps `len_bytes` of a segment. The segment must be at least that long and sealed against shrinking, which
    /// [`crate::Segment`] has checked. Children made by fork do not inherit it.
    ///
    /// # Errors
    /// What the kernel says to mmap.
    pub fn new(segment: BorrowedFd<'_>, len_bytes: usize, access: Access) -> rustix::io::Result<Self> {
        // SAFETY: a fresh mapping at an address that the kernel picks; nothing else owns it.
        let base = unsafe { mmap(std::ptr::null_mut(), len_bytes, protection(access), MapFlags::SHARED, segment, 0) }?;
        // SAFETY: the range was just mapped and is ours.
        unsafe { madvise(base, len_bytes, Advice::LinuxDontFork) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { base, len_bytes, access })
    }

    /// Length of the mapping.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Address of the first byte: for handing to C, which keeps to offsets that were checked.
    #[must_use]
    pub fn base(&self) -> *const u8 {
        self.base.as_ptr()
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        let [word] = self.row(offset);
        word
    }

    /// So many words from `offset` on.
    #[inline]
    fn row<const COUNT: usize>(&self, offset: usize) -> &[AtomicU64; COUNT] {
        assert!(
            offset.is_multiple_of(8) && self.len_bytes.checked_sub(COUNT * 8).is_some_and(|last| offset <= last),
            "{COUNT} words at {offset} in a mapping of {}",
            self.len_bytes
        );
        // SAFETY: in bounds by the assertion above.
        let pointer = unsafe { self.base.as_ptr().add(offset) };
        let pointer = pointer.cast::<[AtomicU64; COUNT]>();
        // SAFETY: aligned, as the base is page-aligned and the offset a multiple of 8; in bounds by the assertion; every process
        // touches these words atomically; the mapping lives as long as `self`.
        unsafe { &*pointer }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        assert!(
            offset.checked_add(to.len()).is_some_and(|end| end <= self.len_bytes),
            "read of {} at {offset}",
            to.len()
        );
        // SAFETY: in bounds by the assertion above.
        let from = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: `to` is private memory, so the two cannot overlap; a peer's writes only make the copy a mixture.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(self.access == Access::Writable, "a read-only mapping is never written");
        assert!(
            offset.checked_add(from.len()).is_some_and(|end| end <= self.len_bytes),
            "write of {} at {offset}",
            from.len()
        );
        // SAFETY: in bounds by the assertion above.
        let to = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: `from` is private memory, so the two cannot overlap; the mapping is writable by the assertion.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Whether the bytes at `offset` are these. Compares in place, without a copy.
    #[must_use]
    pub fn equals(&self, offset: usize, bytes: &[u8]) -> bool {
        assert!(
            offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len_bytes),
            "compare of {} at {offset}",
            bytes.len()
        );
        // SAFETY: in bounds by the assertion above.
        let base = unsafe { self.base.as_ptr().add(offset) };
        bytes.iter().enumerate().all(|(i, byte)| {
            // SAFETY: `i` is below the length that was checked.
            let place = unsafe { base.add(i) };
            // SAFETY: in bounds, as above; a volatile read is never torn for one byte.
            let mapped = unsafe { place.read_volatile() };
            mapped == *byte
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length and unmapped only here. A failure would leave the mapping, which harms nobody.
        let _ignored = unsafe { munmap(self.base.as_ptr().cast(), self.len_bytes) };
    }
}

impl Words for Mapping {
    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        u64::from_le(self.word(offset).load(order))
    }

    #[inline]
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        assert!(self.access == Access::Writable, "a read-only mapping is never written");
        self.word(offset).store(value.to_le(), order);
    }

    #[inline]
    fn store_row<const COUNT: usize>(&self, offset: usize, values: [u64; COUNT]) {
        assert!(self.access == Access::Writable, "a read-only mapping is never written");
        for (word, value) in self.row::<COUNT>(offset).iter().zip(values) {
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    #[inline]
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }

    #[inline]
    fn prepare_load(&self, offset: usize) {
        let word = self.word(offset).as_ptr();
        stream::prepare_read(word.cast::<u8>(), size_of::<u64>());
    }
}

impl<W: Words + ?Sized> Words for &W {
    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        (**self).load(offset, order)
    }
    #[inline]
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        (**self).store(offset, value, order);
    }
    #[inline]
    fn store_row<const COUNT: usize>(&self, offset: usize, values: [u64; COUNT]) {
        (**self).store_row(offset, values);
    }
    #[inline]
    fn fence(&self, order: Ordering) {
        (**self).fence(order);
    }
    #[inline]
    fn prepare_load(&self, offset: usize) {
        (**self).prepare_load(offset);
    }
}

/// The bytes of a ring, mapped twice in a row so that a record is always contiguous, and behind them the room for large
/// records, also twice: `[ring][ring again][large][large again]`.
pub struct RingMapping {
    base: NonNull<u8>,
    capacity: u64,
    large_capacity: u64,
    access: Access,
}

// SAFETY: as for `Mapping`: owned, no references given out, bytes are copied.
unsafe impl Send for RingMapping {}
// SAFETY: as above. Writing through `&RingMapping` is the producer's only, which one thread owns (see `Producer`).
unsafe impl Sync for RingMapping {}

impl fmt::Debug for RingMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMapping")
            .field("capacity", &self.capacity)
            .field("large_capacity", &self.large_capacity)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl RingMapping {
    /// Maps the data segment of a ring. Capacities are powers of two and multiples of the page size, and the segment is
    /// at least as long as they say and sealed against shrinking, which [`crate::Segment`] has checked.
    ///
    /// # Errors
    /// What the kernel says to mmap.
    pub fn new(
        segment: BorrowedFd<'_>,
        capacity: u64,
        large_capacity: u64,
        access: Access,
    ) -> rustix::io::Result<Self> {
        assert!(capacity.is_power_of_two() && large_capacity.is_power_of_two(), "capacities were checked before");
        let (ring, large) = (to_usize(capacity), to_usize(large_capacity));
        let total = 2 * ring + 2 * large;
        // Reserved first in one piece, so that the four mappings below can only replace address space that is ours.
        // SAFETY: a fresh inaccessible reservation at an address that the kernel picks.
        let reserved = unsafe {
            mmap_anonymous(std::ptr::null_mut(), total, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        let base = NonNull::new(reserved.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        // Owns the reservation from here on, so that an error below unmaps it.
        let mapping = Self { base, capacity, large_capacity, access };
        let large_in_file = DATA_OFFSET as u64 + capacity;
        for (at, len, in_file) in [
            (0, ring, DATA_OFFSET as u64),
            (ring, ring, DATA_OFFSET as u64),
            (2 * ring, large, large_in_file),
            (2 * ring + large, large, large_in_file),
        ] {
            // SAFETY: `at` is below `total`.
            let place = unsafe { base.as_ptr().add(at) };
            // SAFETY: replaces a part of our own reservation, and nothing else.
            unsafe {
                mmap(
                    place.cast(),
                    len,
                    protection(access),
                    MapFlags::SHARED | MapFlags::FIXED,
                    segment.as_fd(),
                    in_file,
                )
            }?;
        }
        // SAFETY: the whole range is ours.
        unsafe { madvise(reserved, total, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// Address of the first byte: for handing to C, which keeps to offsets that were checked.
    #[must_use]
    pub fn base(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// Length of the whole mapping, both halves of both parts.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        2 * to_usize(self.capacity) + 2 * to_usize(self.large_capacity)
    }

    /// Where the bytes of a position begin in the mapping; `len` bytes from there are contiguous when `len` is at most the capacity.
    #[must_use]
    #[inline]
    pub fn offset_of(&self, position: u64) -> usize {
        to_usize(position & (self.capacity - 1))
    }

    /// The same for a position in the room for large records.
    #[must_use]
    #[inline]
    pub fn offset_of_large(&self, position: u64) -> usize {
        2 * to_usize(self.capacity) + to_usize(position & (self.large_capacity - 1))
    }

    /// Copies `to.len()` bytes out from `offset` of the mapping.
    ///
    /// # Panics
    /// When the range is not inside of the mapping: offsets are checked by who makes them.
    #[inline]
    pub fn read_at(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: in bounds by `at`; `to` is private memory, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes from `offset` of the mapping to the end of `to`.
    ///
    /// # Panics
    /// When the range is not inside of the mapping.
    #[inline]
    pub fn append_to(&self, offset: usize, len: usize, to: &mut Vec<u8>) {
        let from = self.at(offset, len);
        to.reserve(len);
        let spare = to.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        // SAFETY: in bounds by `at`; at least `len` bytes are spare by `reserve`, and private.
        unsafe { std::ptr::copy_nonoverlapping(from, spare, len) }
        // SAFETY: these `len` bytes were just initialised.
        unsafe { to.set_len(to.len() + len) }
    }

    /// Runs `look` on the bytes in place. Only for bytes whose producer is this process, or for a reader that is right
    /// whatever it sees; a peer's writes during `look` may show.
    ///
    /// # Panics
    /// When the range is not inside of the mapping.
    #[inline]
    pub fn with_bytes<R>(&self, offset: usize, len: usize, look: impl FnOnce(*const u8, usize) -> R) -> R {
        look(self.at(offset, len), len)
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len_bytes()),
            "{len} bytes at {offset} are not in the ring"
        );
        // SAFETY: in bounds by the assertion above.
        unsafe { self.base.as_ptr().add(offset) }
    }

    #[inline]
    fn writable_at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(self.access == Access::Writable, "a read-only mapping is never written");
        self.at(offset, len)
    }
}

impl Drop for RingMapping {
    fn drop(&mut self) {
        // SAFETY: reserved by `new` with this length and unmapped only here. A failure would leave it, which harms nobody.
        let _ignored = unsafe { munmap(self.base.as_ptr().cast(), self.len_bytes()) };
    }
}

impl<B: Bytes> Bytes for std::sync::Arc<B> {
    fn capacity(&self) -> u64 {
        (**self).capacity()
    }
    #[inline]
    fn read(&self, position: u64, to: &mut [u8]) {
        (**self).read(position, to);
    }
    #[inline]
    fn write(&self, position: u64, from: &[u8]) {
        (**self).write(position, from);
    }
    #[inline]
    fn read_word(&self, position: u64) -> u64 {
        (**self).read_word(position)
    }
    #[inline]
    fn prepare_read(&self, position: u64, len: u64) {
        (**self).prepare_read(position, len);
    }
    #[inline]
    fn stream(&self, position: u64, from: &[u8]) {
        (**self).stream(position, from);
    }
    #[inline]
    fn fence_streams(&self) {
        (**self).fence_streams();
    }
    #[inline]
    fn write_record(&self, position: u64, head: [u8; 8], payload: &[u8]) {
        (**self).write_record(position, head, payload);
    }
    #[inline]
    fn prepare_write(&self, position: u64, len: u64) {
        (**self).prepare_write(position, len);
    }
    fn shift(&self, from: u64, to: u64, len: usize) {
        (**self).shift(from, to, len);
    }
    fn read_large(&self, position: u64, to: &mut [u8]) {
        (**self).read_large(position, to);
    }
    fn write_large(&self, position: u64, from: &[u8]) {
        (**self).write_large(position, from);
    }
    fn large_capacity(&self) -> u64 {
        (**self).large_capacity()
    }
}

impl Bytes for RingMapping {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    #[inline]
    fn read(&self, position: u64, to: &mut [u8]) {
        assert!(to.len() as u64 <= self.capacity, "more than the ring holds");
        self.read_at(self.offset_of(position), to);
    }

    #[inline]
    fn write(&self, position: u64, from: &[u8]) {
        assert!(from.len() as u64 <= self.capacity, "more than the ring holds");
        let to = self.writable_at(self.offset_of(position), from.len());
        // SAFETY: in bounds and writable by `writable_at`; `from` is private memory, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    #[inline]
    fn read_word(&self, position: u64) -> u64 {
        let from = self.at(self.offset_of(position), 8);
        // SAFETY: in bounds by `at`; a peer's writes only make the word a mixture.
        u64::from_le(unsafe { from.cast::<u64>().read_unaligned() })
    }

    #[inline]
    fn prepare_read(&self, position: u64, len: u64) {
        let len = to_usize(len.min(self.capacity));
        let from = self.at(self.offset_of(position), len);
        stream::prepare_read(from, len);
    }

    #[inline(always)]
    fn write_record(&self, position: u64, head: [u8; 8], payload: &[u8]) {
        assert!(payload.len() as u64 + 8 <= self.capacity, "more than the ring holds");
        let to = self.writable_at(self.offset_of(position), payload.len() + 8);
        // SAFETY: in bounds and writable by `writable_at`, which was asked for eight bytes and the payload.
        unsafe { to.cast::<[u8; 8]>().write_unaligned(head) }
        // SAFETY: as above.
        let to = unsafe { to.add(8) };
        // SAFETY: in bounds and writable, as above; `payload` is private memory, so the two cannot overlap.
        unsafe { copy_short(payload, to) }
    }

    #[inline]
    fn stream(&self, position: u64, from: &[u8]) {
        assert!(from.len() as u64 <= self.capacity, "more than the ring holds");
        let to = self.writable_at(self.offset_of(position), from.len());
        // SAFETY: in bounds and writable by `writable_at`; `from` is private memory, so the two cannot overlap.
        unsafe { stream::copy(from, to) }
    }

    #[inline]
    fn fence_streams(&self) {
        stream::fence();
    }

    #[inline]
    fn prepare_write(&self, position: u64, len: u64) {
        let len = to_usize(len.min(self.capacity));
        let at = self.writable_at(self.offset_of(position), len);
        stream::prepare_write(at, len);
    }

    fn shift(&self, from: u64, to: u64, len: usize) {
        assert!(len as u64 <= self.capacity, "more than the ring holds");
        // Both in the same copy of the ring: seen from the lower position, which is less than a capacity away.
        let low = from.min(to);
        let base = self.offset_of(low);
        let source = self.writable_at(base + to_usize(from - low), len);
        let target = self.writable_at(base + to_usize(to - low), len);
        // SAFETY: both in bounds and writable; `copy` allows overlap. Nothing of it is published, so no peer reads it.
        unsafe { std::ptr::copy(source, target, len) }
    }

    fn read_large(&self, position: u64, to: &mut [u8]) {
        assert!(to.len() as u64 <= self.large_capacity, "more than the room for large records holds");
        self.read_at(self.offset_of_large(position), to);
    }

    fn write_large(&self, position: u64, from: &[u8]) {
        assert!(from.len() as u64 <= self.large_capacity, "more than the room for large records holds");
        let to = self.writable_at(self.offset_of_large(position), from.len());
        // SAFETY: in bounds and writable by `writable_at`; `from` is private memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    fn large_capacity(&self) -> u64 {
        self.large_capacity
    }
}

/// Copies a slice into private memory of the same length, the short ones without a call.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub(crate) fn copy_private(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "as long as what is copied there");
    // SAFETY: as long, by the assertion; a mutable slice overlaps no other.
    unsafe { copy_short(from, to.as_mut_ptr()) }
}

/// Copies `from` to `to`: up to two lines without a call of the C library, which took a fifth of what a record of 64 B costs.
/// What is no pair of blocks is copied by two that overlap.
///
/// # Safety
/// `to` is valid for writes of `from.len()` bytes and does not overlap `from`.
#[inline(always)]
unsafe fn copy_short(from: &[u8], to: *mut u8) {
    /// Copies the first and the last `LEN` bytes: all, of at least `LEN` and at most twice as many.
    ///
    /// # Safety
    /// As for [`copy_short`].
    #[inline(always)]
    unsafe fn two_blocks<const LEN: usize>(from: &[u8], to: *mut u8) {
        let (Some(first), Some(last)) = (from.first_chunk::<LEN>(), from.last_chunk::<LEN>()) else { return };
        // SAFETY: `from` is at least as long as the block, so `to` has that room by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(first.as_ptr(), to, LEN) }
        // SAFETY: within the room of `from.len()` bytes.
        let to_last = unsafe { to.add(from.len() - LEN) };
        // SAFETY: as for the first block.
        unsafe { std::ptr::copy_nonoverlapping(last.as_ptr(), to_last, LEN) }
    }
    match from.len() {
        // SAFETY: the caller's promise, here and below.
        8..=16 => unsafe { two_blocks::<8>(from, to) },
        // SAFETY: as above.
        17..=32 => unsafe { two_blocks::<16>(from, to) },
        // SAFETY: as above.
        33..=64 => unsafe { two_blocks::<32>(from, to) },
        // SAFETY: as above.
        65..=128 => unsafe { two_blocks::<64>(from, to) },
        // SAFETY: as above.
        _ => unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) },
    }
}

/// Stores that go past the caches. An ordinary store first takes the line from the core that read it last; where the two
/// cores share no cache, that transfer is what bounds a ring (notes/shm.md, 3: 2.2 against 12 GB/s).
mod stream {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _MM_HINT_ET0, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence,
        _mm_stream_si128, _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };

    /// A whole line at a time is what a write-combining buffer takes.
    #[cfg(target_arch = "x86_64")]
    const STEP: usize = 64;

    /// Copies `from` to `to` past the caches; [`fence`] orders that. Where the processor has no such stores (today: everything
    /// but x86-64) this is an ordinary copy.
    ///
    /// # Safety
    /// `to` is valid for writes of `from.len()` bytes and does not overlap `from`.
    #[inline]
    pub(super) unsafe fn copy(from: &[u8], to: *mut u8) {
        #[cfg(target_arch = "x86_64")]
        {
            let head = to.align_offset(STEP).min(from.len());
            let (first, rest) = from.split_at(head);
            // SAFETY: the caller's promise, for the first `head` bytes.
            unsafe { std::ptr::copy_nonoverlapping(first.as_ptr(), to, head) }
            // SAFETY: at most one behind the end of the caller's range.
            let to = unsafe { to.add(head) };
            let (lines, last) = rest.split_at(rest.len() & !(STEP - 1));
            if std::arch::is_x86_feature_detected!("avx512f") {
                // SAFETY: the processor has AVX-512; `to` is on a line and valid for `lines` by the caller's promise.
                unsafe { lines_avx512(lines, to) }
            } else if std::arch::is_x86_feature_detected!("avx") {
                // SAFETY: as above, with AVX.
                unsafe { lines_avx(lines, to) }
            } else {
                // SAFETY: as above; SSE2 is part of x86-64.
                unsafe { lines_sse2(lines, to) }
            }
            // SAFETY: still within the caller's range.
            let to = unsafe { to.add(lines.len()) };
            // SAFETY: the caller's promise, for the last bytes.
            unsafe { std::ptr::copy_nonoverlapping(last.as_ptr(), to, last.len()) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        // SAFETY: the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
    }

    /// Orders what was streamed before every later store. Without it readers saw a new epoch over old bytes in up to 97% of
    /// commits (DESIGN.md, 4.3).
    #[inline]
    pub(super) fn fence() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of x86-64.
        unsafe {
            _mm_sfence();
        }
    }

    /// Asks for the lines from `at` on in a state in which they can be written, or to be read where the build is not told that
    /// its processors know the former (`prefetchw` by hand made no difference: near, 64 B, Zen 4).
    #[inline]
    pub(super) fn prepare_write(at: *mut u8, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for offset in (0..len).step_by(STEP) {
            let line = at.wrapping_add(offset).cast::<i8>();
            // SAFETY: a prefetch of any address has no effect but on time.
            unsafe {
                _mm_prefetch::<_MM_HINT_ET0>(line);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _no_such_hint = (at, len);
    }

    /// Asks for the lines from `at` on.
    #[inline]
    pub(super) fn prepare_read(at: *mut u8, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for offset in (0..len).step_by(STEP) {
            let line = at.wrapping_add(offset).cast::<i8>();
            // SAFETY: a prefetch of any address has no effect but on time.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(line);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _no_such_hint = (at, len);
    }

    /// # Safety
    /// AVX-512 is there; `to` is on a line and valid for writes of `from.len()`, a multiple of a line.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn lines_avx512(from: &[u8], to: *mut u8) {
        for (number, line) in from.chunks_exact(STEP).enumerate() {
            // SAFETY: a chunk has 64 bytes.
            let value = unsafe { _mm512_loadu_si512(line.as_ptr().cast::<__m512i>()) };
            // SAFETY: within the caller's range.
            let place = unsafe { to.add(number * STEP) };
            // SAFETY: aligned to 64 and in range.
            unsafe { _mm512_stream_si512(place.cast::<__m512i>(), value) }
        }
    }

    /// # Safety
    /// AVX is there; the rest as above.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx")]
    unsafe fn lines_avx(from: &[u8], to: *mut u8) {
        for (number, half) in from.chunks_exact(STEP / 2).enumerate() {
            // SAFETY: a chunk has 32 bytes.
            let value = unsafe { _mm256_loadu_si256(half.as_ptr().cast::<__m256i>()) };
            // SAFETY: within the caller's range.
            let place = unsafe { to.add(number * STEP / 2) };
            // SAFETY: aligned to 32 and in range.
            unsafe { _mm256_stream_si256(place.cast::<__m256i>(), value) }
        }
    }

    /// # Safety
    /// As above.
    #[cfg(target_arch = "x86_64")]
    unsafe fn lines_sse2(from: &[u8], to: *mut u8) {
        for (number, quarter) in from.chunks_exact(STEP / 4).enumerate() {
            // SAFETY: a chunk has 16 bytes.
            let value = unsafe { _mm_loadu_si128(quarter.as_ptr().cast::<__m128i>()) };
            // SAFETY: within the caller's range.
            let place = unsafe { to.add(number * STEP / 4) };
            // SAFETY: aligned to 16 and in range.
            unsafe { _mm_stream_si128(place.cast::<__m128i>(), value) }
        }
    }

    #[cfg(test)]
    mod tests {
        /// A neighbour's mapping of what is sealed cannot be made writable afterwards, whoever asks.
        #[test]
        fn a_mapping_of_what_is_sealed_stays_read_only() {
            use rustix::mm::{MprotectFlags, mprotect};

            use crate::{Access, Kind, Mapping, Segment};

            let segment = Segment::create(Kind::Commit, 8192, 1, 1).unwrap();
            let owner = segment.map(Access::Writable).unwrap();
            segment.seal().unwrap();
            let neighbour = segment.map(Access::ReadOnly).unwrap();
            let protect = |mapping: &Mapping| {
                let flags = MprotectFlags::READ | MprotectFlags::WRITE;
                // SAFETY: the whole of a mapping that its `Mapping` keeps alive; more rights take nothing away from anybody.
                unsafe { mprotect(mapping.base.as_ptr().cast(), mapping.len_bytes, flags) }
            };
            assert_eq!(protect(&neighbour), Err(rustix::io::Errno::ACCESS));
            assert_eq!(protect(&owner), Ok(()), "the refusal is for the seal, and not for the call");
        }

        /// Every alignment of the target and every length around the steps, by each way that this processor has.
        #[test]
        fn copies_every_byte_and_no_other() {
            let from: Vec<u8> = (0..300).map(|i| u8::try_from(i % 251).unwrap()).collect();
            for at in 0..70 {
                for len in (0..200).chain([255, 256, 257, 300]) {
                    let mut to = vec![0xee_u8; 400];
                    let target = to[at..at + len].as_mut_ptr();
                    // SAFETY: `target` has `len` bytes.
                    unsafe { super::copy(&from[..len], target) };
                    assert_eq!(to[at..at + len], from[..len], "{len} bytes at {at}");
                    assert!(to[..at].iter().chain(&to[at + len..]).all(|byte| *byte == 0xee), "{len} bytes at {at}");
                    to.fill(0xee);
                    super::super::copy_private(&from[..len], &mut to[at..at + len]);
                    assert_eq!(to[at..at + len], from[..len], "{len} bytes at {at}, private");
                    assert!(to[..at].iter().chain(&to[at + len..]).all(|byte| *byte == 0xee), "{len} bytes at {at}");
                }
            }
            #[cfg(target_arch = "x86_64")]
            for lines in [super::lines_sse2, |from: &[u8], to: *mut u8| {
                // SAFETY: every x86-64 of the last ten years has AVX; the rest is the caller's promise below.
                unsafe { super::lines_avx(from, to) }
            }] {
                let mut to = vec![0_u8; 4 * super::STEP];
                let head = to.as_ptr().align_offset(super::STEP);
                // SAFETY: on a line, with two lines of room.
                unsafe { lines(&from[..2 * super::STEP], to[head..].as_mut_ptr()) };
                assert_eq!(to[head..head + 2 * super::STEP], from[..2 * super::STEP]);
            }
        }
    }
}

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::ReadOnly => ProtFlags::READ,
        Access::Writable => ProtFlags::READ | ProtFlags::WRITE,
    }
}

/// Positions are reduced to less than a capacity before, and capacities are at most [`crate::limits::RING_CAPACITY_BYTES_MAX`].
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the protocol is for 64-bit machines only, checked below")]
fn to_usize(value: u64) -> usize {
    value as usize
}
const _: () = assert!(size_of::<usize>() == 8, "the protocol is for 64-bit machines only");
