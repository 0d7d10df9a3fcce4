//! The name under which the shared library is found at run time; the major version is in it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libargo_streams.so.0");
}
