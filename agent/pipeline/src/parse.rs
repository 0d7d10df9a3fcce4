//! stub

use crate::{Plan, SpecError};

/// Reads and checks a pipeline.
pub fn parse(text: &[u8], origin: &str) -> Result<Plan, Vec<SpecError>> {
    let _ = text;
    Err(crate::error::bounded(vec![SpecError {
        origin: origin.to_owned(),
        path: "document".to_owned(),
        line: None,
        column: None,
        found: "a stub".to_owned(),
        expected: "patience".to_owned(),
        suggestion: crate::error::suggestion("", []),
    }]))
}
