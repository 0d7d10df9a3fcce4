//! Keys of JSON records: plain jq paths without building a document
