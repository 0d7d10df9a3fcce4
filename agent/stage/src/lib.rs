//! What every stage does, in the agent and in the shim: I/O backends, keys, the stage loop
