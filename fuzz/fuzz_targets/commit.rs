//! Any page is a slot or an error; a page that begins with the slot says the same.
#![no_main]

use argo_streams_fuzz::{Page, SHAPE};
use argo_streams_shm_protocol::{CommitPage, CommitPageReader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let reader =
        CommitPageReader::new(Page::new(bytes.get(..SHAPE.len_bytes()).unwrap_or(bytes), SHAPE.len_bytes()), SHAPE);
    for index in 0..2 {
        let _any = (reader.tail(index), reader.acknowledgement(index));
    }
    let Ok(slot) = reader.read() else { return };
    assert_eq!((slot.inputs.len(), slot.outputs.len(), slot.counters.len()), (2, 2, 2));
    assert!(slot.partitions.len() <= 2 && slot.opaque.len() <= 16, "{slot:?}");
    let page = Page::new(&[], SHAPE.len_bytes());
    let _page = CommitPage::create(page.clone(), SHAPE, slot.clone());
    assert_eq!(CommitPageReader::new(page, SHAPE).read().as_ref(), Ok(&slot));
});
