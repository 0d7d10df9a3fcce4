//! What one record costs on its way through a ring and a commit, on one core: copying, headers, checking, committing.
//! Between two cores the transfer of cache lines comes on top; `bench ring` will measure that.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

use argo_streams_shm_protocol::layout::DATA_OFFSET;
use argo_streams_shm_protocol::{
    Access, CommitPage, CommitPageReader, Consumer, Kind, PageShape, Producer, Published, ReadPosition, RecordFields,
    RingMapping, Segment, Slot,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

struct Pair {
    producer: Producer<RingMapping>,
    consumer: Consumer<RingMapping>,
    page: CommitPage<argo_streams_shm_protocol::Mapping>,
    reader: CommitPageReader<argo_streams_shm_protocol::Mapping>,
}

fn pair() -> Pair {
    assert_eq!(DATA_OFFSET, 4096);
    let data = Segment::create_data(1, 1, 1, 1 << 20, 1 << 20).unwrap();
    let shape = PageShape::default();
    let page = Segment::create(Kind::Commit, shape.len_bytes() as u64, 1, 1).unwrap();
    Pair {
        producer: Producer::new(data.map_ring(1 << 20, 1 << 20, Access::Writable).unwrap(), 0, 0, 0).unwrap(),
        consumer: Consumer::new(data.map_ring(1 << 20, 1 << 20, Access::ReadOnly).unwrap(), ReadPosition::default(), 0)
            .unwrap(),
        page: CommitPage::create(page.map(Access::Writable).unwrap(), shape, Slot::empty(&shape)),
        reader: CommitPageReader::new(page.map(Access::ReadOnly).unwrap(), shape),
    }
}

impl Pair {
    /// Emits a batch, commits it, reads it, and hands the space back.
    fn pass(&mut self, batch: u32, payload: &[u8]) -> u64 {
        for _ in 0..batch {
            self.producer.emit(&RecordFields::default(), payload).unwrap();
        }
        self.producer.mark_done();
        let (tail, records, bytes) = self.producer.seal(0).unwrap();
        self.page.publish(0, &Published { tail, large_tail: 0, records, bytes, generation: 0, flags: 0 });
        self.page.commit(0);
        self.consumer.take_tail(self.reader.tail(0)).unwrap();
        let mut bytes = 0;
        while let Some(view) = self.consumer.next().unwrap() {
            bytes += view.payload_len as u64;
        }
        self.consumer.set_free(tail);
        self.producer.take_acknowledgement(tail, tail).unwrap();
        bytes
    }
}

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("emit, commit, read, acknowledge");
    for (batch, size) in [(1, 64), (64, 64), (64, 256), (64, 1024)] {
        let (mut pair, payload) = (pair(), vec![7; size]);
        group.throughput(Throughput::Elements(u64::from(batch)));
        group.bench_function(format!("{batch} x {size} B"), |bencher| bencher.iter(|| pair.pass(batch, &payload)));
    }
    group.finish();
}

criterion_group!(benches, ring);
criterion_main!(benches);
