#!/usr/bin/env python3
"""How long no record comes out while the program of a step is replaced, or the pipeline changed: `python3 benches/replace.py` after
`cargo build --release`.

10,000 records/s go through a ParDo into a file; ten times its program is replaced by `argo-streams ctl replace`, or the pipeline changed by
`ctl apply`: more and fewer containers, a step more and less. Every 0.5 ms it is looked how long the file is; the gap of a change is the
longest time without growth from just before it until half a second after it. Then every record must be there once and in order. Goal: below 250 ms.
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
SPEC = """apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata: {name: replace}
spec:
  - generate: {generator: counter, recordsPerSecond: 10000}
  - groupByKey: {key: .key}
  - parDo: p
    name: p
    command: COMMAND
    ack: line
    containers: CONTAINERS
MORE  - file: {path: out}
    name: out
"""
MORE = "  - parDo: q\n    name: q\n    command: COMMAND\n    ack: line\n"


def spec_text(command, containers, more=""):
    return SPEC.replace("MORE", more).replace("COMMAND", json.dumps(command)).replace("CONTAINERS", str(containers))


def replacing(commands, containers):
    """The first text of the file, and what is asked each time, with the file's new text."""
    return spec_text(commands[0], containers), lambda nth: (None, ["replace", "p", "--", *commands[(nth + 1) % 2]])


def applying(texts):
    return texts[0], lambda nth: (texts[(nth + 1) % len(texts)], ["apply"])


SCENARIOS = {
    f"{name}, {containers} container(s)": replacing(commands, containers)
    for name, commands in {"cat by cat": (["cat"], ["cat"]), "cat by Python": (["cat"], PYTHON)}.items()
    for containers in (1, 3)
} | {
    f"{what}, {name}": applying(texts)
    for name, command in {"cat": ["cat"], "Python": PYTHON}.items()
    for what, texts in {
        "containers 1, 3, 2": [spec_text(command, containers) for containers in (1, 3, 2)],
        "a step more and less": [spec_text(command, 1), spec_text(command, 1, MORE)],
    }.items()
}


def gaps_ms(text, ask, changes=10):
    with tempfile.TemporaryDirectory() as folder:
        spec, out = os.path.join(folder, "p.yaml"), os.path.join(folder, "out")
        with open(spec, "w") as file:
            file.write(text)
        run = subprocess.Popen([BINARY, "run", spec, "--no-live"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not (os.path.exists(out) and os.path.getsize(out) > 10_000):
            time.sleep(0.01)
        gaps = []
        for nth in range(changes):
            text, words = ask(nth)
            if text:
                with open(spec, "w") as file:
                    file.write(text)
            ctl = subprocess.Popen([BINARY, "ctl", spec, *words], stdout=subprocess.DEVNULL)
            longest, size, since, end = 0, os.path.getsize(out), time.monotonic(), None
            while end is None or time.monotonic() < end:
                now, len_now = time.monotonic(), os.path.getsize(out)
                if len_now > size:
                    longest, size, since = max(longest, now - since), len_now, now
                if end is None and ctl.poll() is not None:
                    if ctl.returncode:
                        sys.exit("it was not done")
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


for name, (text, ask) in SCENARIOS.items():
    gaps, count = gaps_ms(text, ask)
    print(
        f"{name}: gap median {statistics.median(gaps):.0f} ms, longest {max(gaps):.0f} ms of {len(gaps)} (goal < 250); "
        f"{count} records, 0 lost, doubled or out of order"
    )
