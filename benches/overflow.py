#!/usr/bin/env python3
"""What memory a run takes while a step stands still: `python3 benches/overflow.py [SECONDS]` after `cargo build --release`.

50,000 records/s come for 300 s, and the program behind them reads nothing. Every 10 s the proportional share of memory (PSS) of
the run and all its processes is added up. With `block` the source waits, with the others it never does.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

BINARY = os.environ.get("ARGO_STREAMS_BIN", "target/release/argo-streams")
SECONDS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
SPEC = """apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata: {name: overflow}
spec:
  - generate: {generator: counter, recordsPerSecond: 50000}
  - parDo: still
    name: still
    overflow: POLICY
    command: [sleep, "100000"]
    ack: line
  - discard: {}
"""


def descendants(pid):
    found = [pid]
    for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split():
        found += descendants(int(child))
    return found


def share_mebibytes(pid):
    total = 0
    for process in descendants(pid):
        try:
            with open(f"/proc/{process}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except OSError:
            pass
    return total / 1024


with tempfile.TemporaryDirectory() as folder:
    runs = {}
    for policy in ("block", "dropNewest", "dropOldest", "sample"):
        spec = os.path.join(folder, f"{policy}.yaml")
        with open(spec, "w") as file:
            file.write(SPEC.replace("POLICY", policy))
        run = subprocess.Popen([BINARY, "run", spec, "--grace", "1s"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        runs[policy] = (run, spec, [])
    begin = time.monotonic()
    while time.monotonic() < begin + SECONDS:
        time.sleep(10)
        for run, _, shares in runs.values():
            shares.append(share_mebibytes(run.pid))
    for policy, (run, spec, shares) in runs.items():
        status = subprocess.run([BINARY, "ctl", spec, "status", "--output", "json"], capture_output=True, text=True)
        steps = json.loads(status.stdout)["steps"]
        dropped = steps[-1].get("dropped", {}).get("records", 0)
        print(
            f"{policy}: {steps[0]['out']} records came in {SECONDS} s, {dropped} were dropped; {shares[0]:.1f} MiB after 10 s, at most {max(shares):.1f}, {shares[-1]:.1f} at the end"
        )
        run.terminate()
    for run, *_ in runs.values():
        run.wait()
