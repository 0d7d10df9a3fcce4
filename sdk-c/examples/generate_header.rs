//! Writes `include/argo_streams.h` from the library's source; a test holds the two together.

#[path = "../tests/header/mod.rs"]
mod header;

fn main() {
    std::fs::write(header::path(), header::generate()).expect("the repository can be written");
}
