//! Benchmarks of the parts. `cargo bench` runs them; `benches/numbers.py` measures whole pipelines.
#![forbid(unsafe_code)]
