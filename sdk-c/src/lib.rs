//! The C library of Argo Streams
