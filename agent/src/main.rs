//! The binary `argo-streams`.
fn main() {}
