//! What a key costs per record: `cargo bench -p argo-streams-key`.

use std::hint::black_box;

use argo_streams_key::KeyPath;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// A taxi ride of 150 bytes, its key in the middle.
const RIDE: &[u8] = br#"{"rideId":1234567,"start":"2013-01-01T00:15:36.000Z","licenseId":"2013000123","end":"2013-01-01T00:31:12.000Z","minutes":15.6,"fare":[12.5,0.5],"x":1}"#;

fn evaluate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("key of a 150-byte record");
    group.throughput(Throughput::Elements(1));
    let mut key = Vec::with_capacity(64);
    for path in [".licenseId", ".rideId", ".fare[-1]", ".nothing"] {
        let parsed = KeyPath::parse(path).expect("a plain path");
        group.bench_function(path, |bencher| bencher.iter(|| parsed.evaluate(black_box(RIDE), &mut key).is_ok()));
    }
    group.finish();
}

criterion_group!(benches, evaluate);
criterion_main!(benches);
