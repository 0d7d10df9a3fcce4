//! Shared-memory segments, rings, commit pages and the handshake of Argo Streams (PROTOCOL.md)
