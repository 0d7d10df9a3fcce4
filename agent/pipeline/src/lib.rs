//! The pipeline language: from YAML to a checked plan, without any I/O
