#!/usr/bin/env bash
# The loom models of the shared-memory protocol, in a target folder of their own: loom's atomics make another build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=${LOOM_TARGET_DIR:-target-loom} RUSTFLAGS="--cfg loom"
exec cargo test --release -p argo-streams-shm-protocol --test loom
