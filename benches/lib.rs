//! Benchmarks of the parts. `cargo bench` runs them; `benches/measure.py` measures whole pipelines.
#![forbid(unsafe_code)]
