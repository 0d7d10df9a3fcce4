//! The agent of Argo Streams: run, validate, shim
