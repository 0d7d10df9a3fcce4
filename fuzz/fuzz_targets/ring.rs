//! A reader over any bytes, from any position: every record that it shows lies in its batch, and it comes to an end.
#![no_main]

use argo_streams_fuzz::{RING_BYTES, RING_PREFIX, ring};
use argo_streams_shm_protocol::{Bytes, Consumer, ReadPosition, RecordView, copy_unread};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((prefix, bytes)) = input.split_at_checked(RING_PREFIX) else { return };
    let word = |at: usize| u64::from_le_bytes(prefix[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
    let (at, tail) = (ReadPosition { batch: word(0), acknowledged: word(1) }, word(2));
    let heap = ring(bytes, RING_BYTES);
    let to = ring(&[], RING_BYTES);
    // What an agent does with the ring of a dead stage.
    let _refused = copy_unread(&heap, &to, at.batch, tail);
    let Ok(mut consumer) = Consumer::new(heap.clone(), at, tail) else { return };
    let Ok(mut in_runs) = Consumer::new(heap.clone(), at, tail) else { return };
    let mut scratch = vec![0; RING_BYTES];
    for count in 0.. {
        assert!(count <= RING_BYTES / 8, "more records than fit");
        let before = consumer.position();
        let mut of_run = RecordView::default();
        let taken = in_runs.read_plain(1, |_, header, record, _| {
            of_run.set_plain(header, record);
            true
        });
        let Ok(Some(view)) = consumer.next() else { return assert_eq!(taken, 0) };
        if taken == 0 {
            assert_eq!(in_runs.next(), Ok(Some(view)));
        } else {
            assert_eq!(of_run, view);
        }
        assert_eq!(in_runs.read_position(), consumer.read_position());
        let end = consumer.position();
        assert!(before < end && end <= tail, "{before} to {end}, published are {tail}");
        assert!(view.position < view.end && view.end <= end, "{view:?} ends behind {end}");
        let mut part = |position: u64, len: usize| {
            assert!(position >= view.position && position + len as u64 <= view.end, "{view:?}");
            heap.read(position, &mut scratch[..len]);
        };
        part(view.key_position.max(view.position), view.key_len);
        part(view.attributes_position.max(view.position), view.attributes_len);
        if view.large {
            assert!(view.payload_len as u64 <= heap.large_capacity(), "{view:?}");
            heap.read_large(view.payload_position, &mut vec![0; view.payload_len]);
        } else {
            part(view.payload_position, view.payload_len);
        }
        let resumed = consumer.read_position();
        assert!(resumed.batch <= resumed.acknowledged, "{resumed:?}");
    }
});
