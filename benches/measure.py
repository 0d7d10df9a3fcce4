#!/usr/bin/env python3
"""Measures whole pipelines with the release binary: latency at fixed rates, an idle pipeline, the start, memory, air-time.

    python3 benches/measure.py            after `make examples`

Prints one line a number, with the load and the distance of the two cores (near: they share a cache; far: they do not) in the
same run. Nothing here is a test: numbers of a busy or far-placed machine differ, and the lines say how it was.
"""
import json, os, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = str(ROOT / "target/release/argo-streams")
HEAD = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: numbers\nspec:\n"
SECONDS = float(os.environ.get("NUMBERS_SECONDS", "6"))


def load():
    return open("/proc/loadavg").read().split()[0]


def compile_relay(folder):
    relay = str(folder / "relay")
    subprocess.run(["cc", "-O2", "-o", relay, str(ROOT / "benches/relay.c"), "-I", str(ROOT / "sdk-c/include"),
                    str(ROOT / "target/release/libargo_streams.a"), "-lpthread", "-ldl", "-lm", "-lgcc_s"], check=True)
    return relay


def run(folder, steps, *arguments, name="p.yaml"):
    path = folder / name
    path.write_text(HEAD + steps)
    done = subprocess.run([BINARY, "run", str(path), "--output", "json", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("%s\nexit %d: %s" % (steps, done.returncode, done.stderr[-2000:]))
    return json.loads(done.stdout.splitlines()[-1])


def latency(folder, relay):
    for rate in (10, 100, 10_000):
        steps = ("  - generate: {generator: bytes, sizeBytes: 128, recordsPerSecond: %d}\n"
                 "  - parDo: a\n    command: [%s]\n    transport: shm\n  - parDo: b\n    command: [%s]\n    transport: shm\n  - discard: {}\n" % (rate, relay, relay))
        before = load()
        summary = run(folder, steps, "--duration", "%gs" % SECONDS)
        sink = summary["steps"][3]
        print("generate -> C -> C -> discard, %6d records/s: end to end p50 %.0f us, p99 %.0f us (%d records, load %s)" %
              (rate, sink["end_to_end_p50_us"], sink["end_to_end_p99_us"], sink["in"], before))


def saturated(folder, relay):
    steps = ("  - generate: {generator: bytes, sizeBytes: 128, count: 3000000}\n"
             "  - parDo: a\n    command: [%s]\n    transport: shm\n  - parDo: b\n    command: [%s]\n    transport: shm\n  - discard: {}\n" % (relay, relay))
    begin, cpu = time.time(), sum(os.times()[2:4])
    run(folder, steps)
    seconds, cpu = time.time() - begin, sum(os.times()[2:4]) - cpu
    print("the same, saturated, 3,000,000 records of 128 B: %.2f million records/s, %.2f us of CPU a record over all processes" % (3 / seconds, cpu / 3))


def tree(root):
    children, found = {}, [root]
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = open("/proc/%s/stat" % entry).read()
            except OSError:
                continue
            children.setdefault(int(stat[stat.rindex(")") + 2:].split()[1]), []).append(int(entry))
    for process in found:
        found += children.get(process, [])
    return found


def ticks(processes):
    total = 0
    for process in processes:
        stat = open("/proc/%d/stat" % process).read()
        total += sum(int(field) for field in stat[stat.rindex(")") + 2:].split()[11:13])
    return total


def resident(process):
    fields = dict(line.split(":") for line in open("/proc/%d/smaps_rollup" % process) if ":" in line and "kB" in line)
    return int(fields["Rss"].split()[0]), int(fields["Pss"].split()[0])


def idle_start_memory(folder):
    path = folder / "idle.yaml"
    out = folder / "idle.out"
    path.write_text(HEAD + "  - stdin: {}\n  - parDo: a\n    command: [cat]\n    ack: line\n  - parDo: b\n    command: [cat]\n    ack: line\n  - file: {path: %s, truncate: true}\n" % out)
    starts = []
    for _ in range(7):
        out.write_bytes(b"")
        begin = time.time()
        running = subprocess.Popen([BINARY, "run", str(path)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running.stdin.write(b"first\n")
        running.stdin.flush()
        while not out.read_bytes():
            time.sleep(0.001)
        starts.append((time.time() - begin) * 1000)
        if len(starts) < 7:
            running.stdin.close()
            running.wait()
    print("start to first output through two programs: median %.0f ms, slowest %.0f ms of 7 (load %s)" % (statistics.median(starts), max(starts), load()))
    time.sleep(2)
    processes = tree(running.pid)
    begin = ticks(processes)
    time.sleep(10)
    print("idle, two programs: %.2f%% of a core for all %d processes" % ((ticks(processes) - begin) / os.sysconf("SC_CLK_TCK") / 10 * 100, len(processes)))
    shims = [p for p in processes if p != running.pid and "argo-streams" in open("/proc/%d/cmdline" % p).read().split("\0")[0]]
    rss, pss = resident(running.pid)
    print("memory: agent %.1f MiB resident (%.1f MiB its share), each shim %s" %
          (rss / 1024, pss / 1024, ", ".join("%.1f (%.1f)" % tuple(x / 1024 for x in resident(p)) for p in shims)))
    running.stdin.close()
    running.wait()


def air_time(folder):
    flights = ROOT / "examples/air-time/flights-jan2013.ndjson.gz"
    combiner = ROOT / "examples/work-time/build/combiner"
    fill = folder / "fill.ndjson"
    import gzip
    fill.write_bytes(gzip.open(flights).read() * 20)
    count = fill.read_bytes().count(b"\n")
    steps = ("  - kafka: {topic: flights}\n  - groupByKey: {key: .tailnum}\n  - parDo: combiner\n    command: [%s]\n    env:\n"
             "      - {name: COMBINE_FIELD, value: distance}\n      - {name: COMBINE_KEY, value: tailnum}\n  - discard: {}\n" % combiner)
    begin, cpu = time.time(), sum(os.times()[2:4])
    run(folder, steps, "--kafka-fill", "flights=%s" % fill, "--until", "end")
    seconds, cpu = time.time() - begin, sum(os.times()[2:4]) - cpu
    print("air-time from the embedded Kafka, filling included: %.0f records/s, %.2f us of CPU a record over all processes (%d records)" % (count / seconds, cpu / count * 1e6, count))
    plain = ROOT / "target/release/examples/plain_air_time"
    if not plain.exists():
        print("the same in one plain program: not built; cargo build --release -p argo-streams-benches --examples")
        return
    cpu = sum(os.times()[2:4])
    seconds = float(subprocess.run([str(plain), str(fill)], capture_output=True, text=True, check=True).stdout.split()[1])
    cpu = sum(os.times()[2:4]) - cpu
    print("the same in one plain program: %.0f records/s, %.2f us of CPU a record" % (count / seconds, cpu / count * 1e6))


def main():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            print("machine:%s, %d CPUs, Linux %s" % (line.split(":")[1].rstrip(), os.cpu_count(), os.uname().release))
            break
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay = compile_relay(folder)
        latency(folder, relay)
        saturated(folder, relay)
        idle_start_memory(folder)
        air_time(folder)


main()
