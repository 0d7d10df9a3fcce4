#!/usr/bin/env python3
"""Runs that take much longer by the clock than by the processor: what every thread of the run does meanwhile.

    python3 benches/stalls.py PIPELINE [--runs 200] [--limit SECONDS]

Runs `argo-streams run PIPELINE` (one that ends by itself) again and again. Of a run that is not over behind the limit (by default
twice the median of the first five) it prints three times, 0.3 s apart, the state, the processor time and what each thread waits for in
the kernel. A thread of this program looks every 20 ms how late it is, so that pauses of the whole machine are not taken for stalls.
Exit code 1 if a run was over the limit while the machine was not.
"""
import argparse, glob, json, statistics, subprocess, sys, threading, time
from pathlib import Path

BINARY = str(Path(__file__).resolve().parent.parent / "target/release/argo-streams")
LOOK_S = 0.02
PAUSE_S = 0.25


def watch(pauses):
    last = time.monotonic()
    while True:
        time.sleep(LOOK_S)
        now = time.monotonic()
        if now - last > PAUSE_S:
            pauses.append((last, now))
        last = now


def threads(process):
    children = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
    for owner in [str(process), *children]:
        for task in sorted(glob.glob(f"/proc/{owner}/task/*")):
            try:
                words = Path(task, "stat").read_text().rsplit(")", 1)[1].split()
                name, waits_in = Path(task, "comm").read_text().strip(), Path(task, "wchan").read_text()
                print(f"  {owner} {name}: state {words[0]}, user {words[11]}, system {words[12]} ticks, in {waits_in}")
            except OSError:
                pass  # It has ended meanwhile.


def run(pipeline, limit):
    """Seconds, and whether it was over the limit."""
    begin = time.monotonic()
    process = subprocess.Popen([BINARY, "run", pipeline, "--output", "json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    is_over = False
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        is_over = True
        for _ in range(3):
            print(f"not over after {time.monotonic() - begin:.2f} s:")
            threads(process.pid)
            time.sleep(0.3)
        text, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the run ended with code {process.returncode}")
    if is_over:
        print(json.dumps(json.loads(text.splitlines()[-1])["steps"]))
    return time.monotonic() - begin, is_over


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--limit", type=float, help="seconds")
    arguments = parser.parse_args()
    pauses = []
    threading.Thread(target=watch, args=(pauses,), daemon=True).start()
    first = [run(arguments.pipeline, None)[0] for _ in range(5)]
    limit = arguments.limit or 2 * statistics.median(first)
    times, stalls = first, 0
    for _ in range(arguments.runs):
        begin = time.monotonic()
        seconds, is_over = run(arguments.pipeline, limit)
        times.append(seconds)
        stalls += is_over and not any(end > begin for _, end in pauses)
    print(f"{len(times)} runs: median {statistics.median(times):.2f} s, longest {max(times):.2f} s; "
          f"{stalls} over {limit:.2f} s, {len(pauses)} pauses of the machine")
    sys.exit(1 if stalls else 0)


if __name__ == "__main__":
    main()
