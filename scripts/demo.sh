#!/usr/bin/env bash
# The proposal's pipeline, byte for byte, on live data: an embedded Kafka is filled with taxi rides, two C programs on the
# SDK combine and log them. Ends with a table that is compared with an independent computation.
#
#   demo.sh [SECONDS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-20}
rides=${DEMO_RIDES:-400000}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
binary=target/release/argo-streams

echo "demo: $rides taxi rides through examples/work-time/pipeline.yaml, at most $seconds s" >&2
LOGGER_TABLE="$out/table" "$binary" run examples/work-time/pipeline.yaml \
    --image some-combiner-image="examples/work-time/build/combiner" \
    --image some-logger-image="examples/work-time/build/logger" \
    --kafka-fill "taxirides=taxiRides:$rides" --until end --duration "${seconds}s" --output json \
    >"$out/summary.json"

cat "$out/table"
python3 examples/work-time/check.py "$out/summary.json" "$out/table" "$rides"
