//! Keys by plain paths, which the grant's routes may ask of a stage. Programs in jq are the agent's.
//!
//! The same few lines stand in `agent/stage`; that crate brings a runtime, which a C program must not get.

use argo_streams_key::KeyPath;
use argo_streams_shm_protocol::stage::KeyEvaluator;

struct PathKey(KeyPath);

impl KeyEvaluator for PathKey {
    fn evaluate(&mut self, payload: &[u8], key_out: &mut Vec<u8>) -> Result<(), String> {
        self.0.evaluate(payload, key_out).map_err(|error| error.to_string())
    }
}

/// The key factory of this library.
pub(crate) fn path_keys(expression: &str) -> Result<Box<dyn KeyEvaluator>, String> {
    match KeyPath::parse(expression) {
        Some(path) => Ok(Box::new(PathKey(path))),
        None => Err("it is a jq program, which only the agent evaluates".to_owned()),
    }
}
