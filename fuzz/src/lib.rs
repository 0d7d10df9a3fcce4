//! Shared bytes that a fuzzer owns: a ring, a page and an extent on the heap.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use argo_streams_shm_protocol::{Bytes, ExtentBytes, PageShape, StateShape, Words};

#[allow(dead_code)]
#[path = "../../shm-protocol/tests/support/heap.rs"]
mod heap;

/// A ring. Clones share it.
#[derive(Clone, Debug)]
pub struct Ring(heap::Heap);

/// A ring that begins with these bytes.
#[must_use]
pub fn ring(bytes: &[u8], capacity: usize) -> Ring {
    let heap = heap::Heap::new(capacity, 4096);
    heap.spoil(|ring| ring.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from));
    Ring(heap)
}

impl Bytes for Ring {
    fn capacity(&self) -> u64 {
        self.0.capacity()
    }
    fn read(&self, position: u64, to: &mut [u8]) {
        self.0.read(position, to);
    }
    fn write(&self, position: u64, from: &[u8]) {
        self.0.write(position, from);
    }
    fn shift(&self, from: u64, to: u64, len: usize) {
        self.0.shift(from, to, len);
    }
    fn read_large(&self, position: u64, to: &mut [u8]) {
        self.0.read_large(position, to);
    }
    fn write_large(&self, position: u64, from: &[u8]) {
        self.0.write_large(position, from);
    }
    fn large_capacity(&self) -> u64 {
        self.0.large_capacity()
    }
}

/// A page or an extent. Clones share it.
#[derive(Clone, Debug)]
pub struct Page(Rc<RefCell<Vec<u8>>>);

impl Page {
    /// A page of this length that begins with `bytes`; the rest is 0.
    #[must_use]
    pub fn new(bytes: &[u8], len_bytes: usize) -> Self {
        let mut page = bytes.to_vec();
        page.resize(len_bytes, 0);
        Self(Rc::new(RefCell::new(page)))
    }

    /// What is on it.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.0.borrow().clone()
    }
}

impl Words for Page {
    fn load(&self, offset: usize, _: Ordering) -> u64 {
        assert!(offset.is_multiple_of(8));
        let bytes = self.0.borrow();
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
    }
    fn store(&self, offset: usize, value: u64, _: Ordering) {
        assert!(offset.is_multiple_of(8));
        self.0.borrow_mut()[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    fn fence(&self, _: Ordering) {}
}

impl ExtentBytes for Page {
    fn len_bytes(&self) -> usize {
        self.0.borrow().len()
    }
    fn read(&self, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0.borrow()[offset..offset + to.len()]);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.0.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
    }
}

/// The shape of the pages here.
pub const SHAPE: PageShape = PageShape { inputs: 2, outputs: 2, partitions: 2, counters: 2, opaque_bytes: 16 };
/// The state here: one extent.
pub const STATE: StateShape = StateShape { limit_bytes: 64 << 10, extent_bytes: 64 << 10 };
/// Bytes of the ring here.
pub const RING_BYTES: usize = 4096;
/// What comes before the bytes of a ring: batch, acknowledged, published.
pub const RING_PREFIX: usize = 24;
