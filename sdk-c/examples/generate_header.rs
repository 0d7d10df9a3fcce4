//! Writes `include/argo_streams.h` from the library's source; a test holds the two together.

#[path = "../tests/header/mod.rs"]
#[expect(clippy::mod_module_files, reason = "shared with a test, which would take header.rs for a test of its own")]
mod header;

fn main() {
    std::fs::write(header::path(), header::generate()).expect("the repository can be written");
}
