//! The job of air-time as a plain program in one process: reads the same topic of an embedded Kafka, sums by aircraft, and
//! prints records/s and CPU. What a pipeline of processes costs is to be seen beside this.
//!
//! `plain_air_time FILE`: the lines of FILE are filled into the topic first, no faster than they are read.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, clippy::panic, reason = "a measurement")]

use std::collections::HashMap;
use std::io::BufRead;
use std::time::{Duration, Instant};

use argo_streams_kafka::{Embedded, EmbeddedOptions, FillRecord, Filler, FillerOptions};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

fn main() {
    let path = std::env::args().nth(1).unwrap_or_else(|| panic!("plain_air_time FILE"));
    let embedded = Embedded::start(EmbeddedOptions { topics: vec![("flights".into(), 4)] }).unwrap();
    let begin = Instant::now();
    let lines = std::io::BufReader::new(std::fs::File::open(path).unwrap()).split(b'\n').map_while(Result::ok);
    let records = lines.map(|payload| FillRecord { key: None, payload, timestamp_ms: None });
    let filler =
        Filler::start(FillerOptions::new(embedded.bootstrap_servers(), "flights", 4), Box::new(records)).unwrap();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", embedded.bootstrap_servers())
        .set("group.id", "plain")
        .set("enable.auto.commit", "false")
        .set("fetch.queue.backoff.ms", "10")
        .create()
        .unwrap();
    let mut partitions = TopicPartitionList::new();
    for partition in 0..4 {
        partitions.add_partition_offset("flights", partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&partitions).unwrap();
    let mut sums: HashMap<String, (u64, u64)> = HashMap::new();
    let mut count = 0_u64;
    let mut out = 0_usize;
    loop {
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            filler.progress(message.partition(), message.offset() + 1);
            let flight: serde_json::Value = serde_json::from_slice(message.payload().unwrap_or_default()).unwrap();
            let (Some(tail), Some(distance)) = (flight["tailnum"].as_str(), flight["distance"].as_u64()) else {
                continue;
            };
            let sum = sums.entry(tail.to_owned()).or_default();
            *sum = (sum.0 + 1, sum.1 + distance);
            out += format!("{{\"tailnum\":\"{tail}\",\"rides\":{},\"distance\":{}}}", sum.0, sum.1).len();
            count += 1;
        }
        let status = filler.status();
        if status.done && count >= status.filled {
            break;
        }
    }
    println!("{count} {:.6} {out}", begin.elapsed().as_secs_f64());
}
