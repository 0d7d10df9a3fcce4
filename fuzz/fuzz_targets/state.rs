//! State over any bytes: it is refused as damaged, or it attaches. Then it holds what is put, and attaches again as it was.
#![no_main]

use std::collections::BTreeMap;

use argo_streams_fuzz::{Page, STATE};
use argo_streams_shm_protocol::layout::state::BLOCKS_OFFSET;
use argo_streams_shm_protocol::{KeyedState, StateCursor};
use libfuzzer_sys::fuzz_target;

fn all(state: &KeyedState<Page>) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
    let (mut found, mut cursor, mut batches) = (BTreeMap::new(), StateCursor::all(), 0);
    while !cursor.is_over {
        let show = |key: &[u8], value: &[u8]| {
            assert!(found.insert(key.to_vec(), value.to_vec()).is_none(), "a key is there twice");
        };
        cursor = state.iterate(cursor, 7, 1 << 20, show).ok()?;
        batches += 1;
        assert!(batches < 10_000, "an iteration without an end");
    }
    Some(found)
}

fuzz_target!(|input: &[u8]| {
    let Some((epoch, bytes)) = input.split_first_chunk::<8>() else { return };
    // Epochs count commits; the greatest numbers are tags that are no epochs.
    let epoch = u64::from_le_bytes(*epoch) >> 8;
    let len_bytes = STATE.extent_len_bytes(0) as usize;
    let blocks = bytes.get(..len_bytes - BLOCKS_OFFSET).unwrap_or(bytes);
    let extent = Page::new(&[&[0; BLOCKS_OFFSET], blocks].concat(), len_bytes);
    let Ok(mut state) = KeyedState::attach(vec![extent.clone()], STATE, epoch) else { return };
    let Some(mut expected) = all(&state) else { return };
    for key in [&b"a key"[..], b"another", b"a key"] {
        if state.put(key, b"a value").is_ok() {
            expected.insert(key.to_vec(), b"a value".to_vec());
        }
    }
    if let Some(key) = expected.keys().next().cloned()
        && state.delete(&key).is_ok()
    {
        expected.remove(&key);
    }
    state.mark_done();
    state.committed(epoch + 1);
    assert_eq!(all(&state).expect("nobody else writes it"), expected);
    let again = KeyedState::attach(vec![extent], STATE, epoch + 1).expect("what a state wrote is a state");
    assert_eq!(all(&again).expect("no damage"), expected);
});
