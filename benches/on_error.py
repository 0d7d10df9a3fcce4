#!/usr/bin/env python3
"""How long records of good keys take while one key in a hundred is poison: every record of it fails, is tried again and becomes a dead letter.

Runs `argo-streams run` twice in turn, clean and poisoned, over the same records at the same rate, and compares the p99 of the good keys' records from
entering the pipeline to their sink (the sink reads good keys only). Usage: python3 benches/on_error.py [--rate N] [--seconds S] [--runs R]
"""
import argparse, json, os, pathlib, shutil, statistics, subprocess, sys, tempfile

JSON = r'''
import json, sys
poison = sys.argv[1] == "poison"
for line in sys.stdin:
    record = json.loads(line)
    value = record["value"]
    if poison and value["key"] % 100 == 7:
        print('{"error":"poison"}', flush=True)
    else:
        print('{"value":' + json.dumps(value, separators=(",", ":")) + "}", flush=True)
'''

def run(binary, folder, mode, rate, seconds):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "program.py").write_text(JSON)
    count = rate * seconds
    (folder / "pipeline.yaml").write_text(f"""apiVersion: argoproj.io/v1alpha1
kind: Pipeline
metadata:
  name: poison
spec:
  - generate: {{generator: counter, count: {count}, recordsPerSecond: {rate}, keys: 1000}}
  - groupByKey: {{key: .key}}
  - parDo: program
    name: program
    command: [python3, -E, program.py, {mode}]
    ack: line
    framing: json
    onError: {{attempts: 3, backoff: {{initial: 10ms}}, deadLetter: dead}}
  - file: {{path: out}}
    name: out
  - discard: {{}}
    name: dead
""")
    ended = subprocess.run([binary, "run", "pipeline.yaml", "--output", "json"], cwd=folder, capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(f"the run ended with {ended.returncode}: {ended.stderr[-2000:]}")
    steps = {step["name"]: step for step in json.loads(ended.stdout)["steps"]}
    lines = sum(1 for _ in open(folder / "out"))
    return steps, lines, count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(pathlib.Path(__file__).parent.parent / "target/release/argo-streams"))
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found = {"clean": [], "poison": []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.runs):
            for mode in found:
                steps, lines, count = run(options.binary, pathlib.Path(scratch) / mode, mode, options.rate, options.seconds)
                retries = steps["program"].get("retries", {})
                found[mode].append((steps["out"]["end_to_end_p50_us"], steps["out"]["end_to_end_p99_us"]))
                assert lines + steps["program"]["errors"] == count, (lines, steps["program"], count)
                print(f"{turn} {mode:7} p50 {found[mode][-1][0]:9.1f} us  p99 {found[mode][-1][1]:9.1f} us  dead letters {steps['program']['errors']:6} failed attempts {retries.get('failed_attempts_total', 0)}", flush=True)
    p99 = {mode: statistics.median(p99 for _, p99 in values) for mode, values in found.items()}
    print(f"p99 of good keys, median of {options.runs}: clean {p99['clean']:.1f} us, poisoned {p99['poison']:.1f} us, {p99['poison'] / p99['clean']:.2f} times; goal below 2")
    print("load:", os.getloadavg())


main()
