#!/usr/bin/env python3
"""How long records of good keys take while one key in a hundred is poison: every record of it fails, is tried again and becomes a dead letter.

One `argo-streams run` at a time: standard input -> groupByKey -> a Python program (framing json) -> standard output. This script writes lines at a
fixed rate, each with the time at which it was due, and reads them back; a second passes before anything counts, so that no start is measured. Clean
and poisoned runs take turns. Usage: python3 benches/on_error.py [--rate N] [--seconds S] [--runs R]
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile, threading, time

PROGRAM = r'''
import json, sys
poison = sys.argv[1] == "poison"
for line in sys.stdin:
    value = json.loads(line)["value"]
    if poison and value["key"] % 100 == 7:
        print('{"error":"poison"}', flush=True)
    else:
        print('{"value":' + json.dumps(value, separators=(",", ":")) + "}", flush=True)
'''
PIPELINE = """apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata:
  name: poison
spec:
  - stdin: {}
  - groupByKey: {key: .key}
  - parDo: program
    name: program
    command: [python3, -E, program.py, %s]
    ack: line
    framing: json
    onError: {attempts: 3, backoff: {initial: 10ms}, deadLetter: dead}
  - log: {}
  - discard: {}
    name: dead
"""
KEYS = 1000


def run(binary, folder, mode, rate, seconds):
    (folder / "program.py").write_text(PROGRAM)
    (folder / "pipeline.yaml").write_text(PIPELINE % mode)
    child = subprocess.Popen([binary, "run", "pipeline.yaml"], cwd=folder,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "errors", "w"))
    waited_ns, last = [], {}
    begin_ns = None

    def read():
        for line in child.stdout:
            now_ns = time.monotonic_ns()
            record = json.loads(line)
            if record["n"] <= last.get(record["key"], -1):
                sys.exit(f"key {record['key']} is out of order at {record['n']}")
            last[record["key"]] = record["n"]
            if record["due"] - begin_ns > 1_000_000_000:
                waited_ns.append(now_ns - record["due"])

    def write(n, due_ns):
        child.stdin.write(b'{"key":%d,"n":%d,"due":%d}\n' % (n * 7919 % KEYS, n, due_ns))
        child.stdin.flush()

    reader = threading.Thread(target=read)
    begin_ns = time.monotonic_ns()
    reader.start()
    # The first one starts nothing late: it is answered when the program runs.
    write(0, begin_ns)
    while not last:
        time.sleep(0.01)
    begin_ns = time.monotonic_ns()
    count = rate * (seconds + 1)
    for n in range(1, count):
        due_ns = begin_ns + n * 1_000_000_000 // rate
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
        write(n, due_ns)
    child.stdin.close()
    reader.join()
    if child.wait() != 0:
        sys.exit(f"the run ended with {child.returncode}: {(folder / 'errors').read_text()[-2000:]}")
    expected = sum(1 for n in range(count) if (n - 1) / rate > 1 and (mode == "clean" or n * 7919 % KEYS % 100 != 7))
    if abs(len(waited_ns) - expected) > 2:
        sys.exit(f"{len(waited_ns)} records of good keys came, {expected} were sent")
    waited_ns.sort()
    return [waited_ns[int(len(waited_ns) * share)] / 1000 for share in (0.5, 0.99, 0.999)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(pathlib.Path(__file__).parent.parent / "target/release/argo-streams"))
    parser.add_argument("--rate", type=int, default=2000)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found = {"clean": [], "poison": []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.runs):
            for mode, values in found.items():
                values.append(run(options.binary, pathlib.Path(scratch), mode, options.rate, options.seconds))
                print("%d %-6s p50 %9.1f us  p99 %9.1f us  p99.9 %9.1f us" % (turn, mode, *values[-1]), flush=True)
    p99 = {mode: statistics.median(p99 for _, p99, _ in values) for mode, values in found.items()}
    print(f"p99 of good keys, median of {options.runs}: clean {p99['clean']:.1f} us, poisoned {p99['poison']:.1f} us: {p99['poison'] / p99['clean']:.2f} times (goal: below 2)")
    print("load:", os.getloadavg())


main()
