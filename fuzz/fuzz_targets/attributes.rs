//! Any bytes are attributes up to where they are none; these encode to the same bytes.
#![no_main]

use argo_streams_shm_protocol::{attributes_encode, attributes_iter};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let attributes: Vec<(&[u8], &[u8])> = attributes_iter(bytes).collect();
    let texts: Vec<(&str, &[u8])> =
        attributes.iter().map_while(|(name, value)| Some((std::str::from_utf8(name).ok()?, *value))).collect();
    let mut encoded = Vec::new();
    attributes_encode(texts.iter().copied(), &mut encoded);
    assert!(bytes.starts_with(&encoded));
});
