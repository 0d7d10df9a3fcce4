#!/usr/bin/env python3
"""How long no record comes out while the program of a step is replaced: `python3 benches/replace.py` after `cargo build --release`.

10,000 records/s go through a ParDo into a file; ten times its program is replaced by `argo-streams ctl`. Every 0.5 ms it is looked
how long the file is; the gap of a replacement is the longest time without growth from just before it until half a second after
it. Then every record must be there once and in order. Goal: below 250 ms.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

BINARY = os.environ.get("ARGO_STREAMS_BIN", "target/release/argo-streams")
PYTHON = ["python3", "-c", "import sys\nfor line in sys.stdin: print(line, end='')"]
PROGRAMS = {"cat": (["cat"], ["cat"]), "cat to Python": (["cat"], PYTHON)}
SPEC = """apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata: {name: replace}
spec:
  - generate: {generator: counter, recordsPerSecond: 10000}
  - groupByKey: {key: .key}
  - parDo: p
    name: p
    command: [cat]
    ack: line
    containers: CONTAINERS
  - file: {path: out}
"""


def gaps_ms(commands, containers, replacements=10):
    with tempfile.TemporaryDirectory() as folder:
        spec, out = os.path.join(folder, "p.yaml"), os.path.join(folder, "out")
        with open(spec, "w") as file:
            file.write(SPEC.replace("CONTAINERS", str(containers)))
        run = subprocess.Popen([BINARY, "run", spec, "--no-live"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not (os.path.exists(out) and os.path.getsize(out) > 10_000):
            time.sleep(0.01)
        gaps = []
        for nth in range(replacements):
            ctl = subprocess.Popen([BINARY, "ctl", spec, "replace", "p", "--", *commands[(nth + 1) % 2]], stdout=subprocess.DEVNULL)
            longest, size, since, end = 0, os.path.getsize(out), time.monotonic(), None
            while end is None or time.monotonic() < end:
                now, len_now = time.monotonic(), os.path.getsize(out)
                if len_now > size:
                    longest, size, since = max(longest, now - since), len_now, now
                if end is None and ctl.poll() is not None:
                    if ctl.returncode:
                        sys.exit("it was not replaced")
                    end = now + 0.5
                time.sleep(0.0005)
            gaps.append(longest * 1e3)
        subprocess.run([BINARY, "ctl", spec, "drain"], check=True, stdout=subprocess.DEVNULL)
        _, words = run.communicate(timeout=60)
        if run.returncode:
            sys.exit(f"the run ended with {run.returncode}: {words.decode()}")
        last, ids = {}, []
        with open(out) as file:
            for line in file:
                record = json.loads(line)
                if last.get(record["key"], -1) >= record["id"]:
                    sys.exit(f"out of order: {line}")
                last[record["key"]] = record["id"]
                ids.append(record["id"])
        if sorted(ids) != list(range(len(ids))):
            sys.exit("lost or doubled")
        return gaps, len(ids)


for name, commands in PROGRAMS.items():
    for containers in (1, 3):
        gaps, count = gaps_ms(commands, containers)
        print(
            f"{name}, {containers} container(s): gap median {statistics.median(gaps):.0f} ms, longest {max(gaps):.0f} ms of {len(gaps)} (goal < 250); "
            f"{count} records, 0 lost, doubled or out of order"
        )
