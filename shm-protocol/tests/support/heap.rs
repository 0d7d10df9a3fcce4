//! A ring's bytes on the heap, for tests that need no segments.

use std::cell::RefCell;
use std::rc::Rc;

use argo_streams_shm_protocol::Bytes;

/// Ring and room for large records, shared by the clones.
#[derive(Clone, Debug)]
pub(crate) struct Heap {
    ring: Rc<RefCell<Vec<u8>>>,
    large: Rc<RefCell<Vec<u8>>>,
}

impl Heap {
    /// Fresh bytes that are not zero, so that what was never written shows.
    pub(crate) fn new(capacity: usize, large_capacity: usize) -> Self {
        assert!(capacity.is_power_of_two() && large_capacity.is_power_of_two());
        Self {
            ring: Rc::new(RefCell::new(vec![0xa5; capacity])),
            large: Rc::new(RefCell::new(vec![0xa5; large_capacity])),
        }
    }

    /// Changes bytes behind everybody's back.
    pub(crate) fn spoil(&self, change: impl FnOnce(&mut [u8])) {
        change(&mut self.ring.borrow_mut());
    }
}

fn copy_out(bytes: &[u8], position: u64, to: &mut [u8]) {
    assert!(to.len() <= bytes.len(), "a read of {} bytes in a ring of {}", to.len(), bytes.len());
    let begin = usize::try_from(position % bytes.len() as u64).unwrap();
    let first = to.len().min(bytes.len() - begin);
    to[..first].copy_from_slice(&bytes[begin..begin + first]);
    let rest = to.len() - first;
    to[first..].copy_from_slice(&bytes[..rest]);
}

fn copy_in(bytes: &mut [u8], position: u64, from: &[u8]) {
    assert!(from.len() <= bytes.len(), "a write of {} bytes in a ring of {}", from.len(), bytes.len());
    let begin = usize::try_from(position % bytes.len() as u64).unwrap();
    let first = from.len().min(bytes.len() - begin);
    bytes[begin..begin + first].copy_from_slice(&from[..first]);
    bytes[..from.len() - first].copy_from_slice(&from[first..]);
}

impl Bytes for Heap {
    fn capacity(&self) -> u64 {
        self.ring.borrow().len() as u64
    }
    fn read(&self, position: u64, to: &mut [u8]) {
        copy_out(&self.ring.borrow(), position, to);
    }
    fn write(&self, position: u64, from: &[u8]) {
        copy_in(&mut self.ring.borrow_mut(), position, from);
    }
    fn shift(&self, from: u64, to: u64, len: usize) {
        let mut bytes = vec![0; len];
        self.read(from, &mut bytes);
        self.write(to, &bytes);
    }
    fn read_large(&self, position: u64, to: &mut [u8]) {
        copy_out(&self.large.borrow(), position, to);
    }
    fn write_large(&self, position: u64, from: &[u8]) {
        copy_in(&mut self.large.borrow_mut(), position, from);
    }
    fn large_capacity(&self) -> u64 {
        self.large.borrow().len() as u64
    }
}
