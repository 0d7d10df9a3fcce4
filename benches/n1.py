#!/usr/bin/env python3
"""N1: JSON in, key, sum, out, through each transport, in C, Rust and Python: CPU a record of all processes.

    make bench-n1                 N1_RUNS=5 N1_RECORDS=400000 by default, some ten minutes
    python3 benches/n1.py --json FILE --only NAME...

The job: lines of 117 B with one of 10,000 keys; each gives one line with the sum of its key so far. `argo-streams run` reads them from a
file and discards what comes out; beside it run `cat FILE | stage | cat` over pipes, the same with a raw pseudo-terminal as
output, and the stage alone from the file. Each program is the same file in all cases (benches/n1, benches/examples/n1.rs).

CPU is user and system time of the whole process tree, from the kernel, as the difference between many records and a fifth of them,
so that no start is in it. The variants run in turns, so that what the machine does meets all of them; medians, and the least and most.
Before that each variant's output of 20,000 records is compared with the bare loop's, byte by byte.
"""
import argparse, hashlib, json, os, platform, resource, statistics, subprocess, sys, tempfile, time, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = str(ROOT / "target/release/argo-streams")
HEAD = "apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: n1\nspec:\n"
RUNS = int(os.environ.get("N1_RUNS", "5"))
RECORDS = int(os.environ.get("N1_RECORDS", "400000"))
CHECKED = 20_000
# Fewer records where each takes longer: a request for each takes 30 to 150 us.
SLOW = {"line": 2, "one": 2, "http": 4, "http one": 20}

# What a goal compares with what: the variant, the bare one (None: microseconds), and the bound.
GOALS = [
    ("c shm", None, 0.40), ("rust shm", None, 0.40), ("python shm", "python loop", 1.15),
    *((f"{language} stdio block", f"{language} pipe", 1.3) for language in ("c", "rust", "python")),
    *((f"{language} stdio line", f"{language} terminal", 1.3) for language in ("c", "rust", "python")),
]


def programs():
    subprocess.run(["cc", "-O2", "-Wall", "-o", str(ROOT / "target/n1-c"), str(ROOT / "benches/n1/n1.c"), "-I", str(ROOT / "sdk-c/include"),
                    str(ROOT / "target/release/libargo_streams.a"), "-lpthread", "-ldl", "-lm", "-lgcc_s", "-lutil"], check=True)
    python = ROOT / "target/n1-python"
    if not (python / "bin/python3").exists():
        venv.create(python, with_pip=True)
        subprocess.run([python / "bin/pip", "install", "-q", "orjson", "setuptools"], check=True)
    subprocess.run([python / "bin/pip", "install", "-q", "--force-reinstall", str(ROOT / "sdk-c/python")], check=True)
    return {
        "c": [str(ROOT / "target/n1-c")],
        "rust": [str(ROOT / "target/release/examples/n1")],
        "python": [str(python / "bin/python3"), str(ROOT / "benches/n1/n1.py")],
    }


def record(number):
    # A key as a hash would scatter it, and an amount that no two neighbours share.
    key, amount = number * 7919 % 10_000, number * 31 % 997
    line = '{"eventId":"e%09d","licenseId":"L%05d","amount":%d,"city":"Springfield","note":"' % (number, key, amount)
    return line + "x" * (114 - len(line)) + '"}\n'


def write_input(path, count):
    with open(path, "w") as out:
        out.writelines(map(record, range(count)))


def pipeline(how, command, sink):
    return HEAD + "  - file: {path: %s}\n  - parDo: n1\n    command: %s\n%s  - %s\n" % ("INPUT", json.dumps(command), how, sink)


def variants(commands):
    """Name, and what makes a shell command or a pipeline of it."""
    found = {}
    for language, command in commands.items():
        bare = " ".join(command)
        found[f"{language} loop"] = ("sh", f"{bare} lines < INPUT > OUTPUT")
        found[f"{language} pipe"] = ("sh", f"cat INPUT | {bare} lines | cat > OUTPUT")
        found[f"{language} pipe one"] = ("sh", f"cat INPUT | {bare} lines one | cat > OUTPUT")
        # The bare end of a pseudo-terminal counts lines and keeps none. `one` is what C and Rust do on a terminal.
        found[f"{language} terminal"] = ("count", f"cat INPUT | {commands['c'][0]} terminal {bare} lines one")
        stdio = "    transport: stdio\n    ack: line\n"
        found[f"{language} stdio block"] = ("run", stdio + "    buffering: block\n", command + ["lines"])
        found[f"{language} stdio block one"] = ("run", stdio + "    buffering: block\n", command + ["lines", "one"])
        found[f"{language} stdio line"] = ("run", stdio, command + ["lines", "one"])
        found[f"{language} fifo"] = ("run", "    transport: fifo\n    ack: line\n", command + ["lines"])
        found[f"{language} fifo one"] = ("run", "    transport: fifo\n    ack: line\n", command + ["lines", "one"])
        found[f"{language} exit"] = ("run", "    ack: exit\n", command + ["lines"])
        found[f"{language} file"] = ("run", "    transport: file\n", command + ["file"])
        found[f"{language} socket"] = ("run", "    transport: socket\n", command + ["socket"])
        found[f"{language} shm"] = ("run", "    transport: shm\n", command + ["shm"])
        found[f"{language} shm one"] = ("run", "    transport: shm\n    batch: {records: 1}\n", command + ["shm"])
        found[f"{language} http"] = ("run", "    transport: http\n    batch: {records: 100}\n", command + ["http"])
        found[f"{language} http one"] = ("run", "    transport: http\n", command + ["http"])
    return found


def scale(name):
    return max((part for words, part in SLOW.items() if set(words.split()) <= set(name.split())), default=1)


def run(folder, variant, source, output):
    """CPU seconds of everything, and how many records left."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if variant[0] == "run":
        path = folder / "n1.yaml"
        sink = "discard: {}" if output == "/dev/null" else "file: {path: %s, truncate: true}" % output
        path.write_text(pipeline(variant[1], variant[2], sink).replace("INPUT", source))
        done = subprocess.run([BINARY, "run", str(path), "--output", "json"], capture_output=True, text=True)
    else:
        text = variant[1].replace("INPUT", source).replace("OUTPUT", output)
        done = subprocess.run(["bash", "-c", "set -o pipefail; " + text], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("%s\nexit %d: %s" % (variant, done.returncode, done.stderr[-3000:]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = json.loads(done.stdout.splitlines()[-1])["steps"][-1]["in"] if variant[0] == "run" else None
    if variant[0] == "count":
        count = int(done.stdout)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, count


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()



def check(folder, found):
    source, output = str(folder / "checked"), str(folder / "out")
    write_input(source, CHECKED)
    expected = None
    for name, variant in found.items():
        if name.endswith(" exit"):
            continue  # A process for each batch has the sums of its batch only.
        _seconds, count = run(folder, variant, source, output)
        if variant[0] == "count":
            if count != CHECKED:
                sys.exit(f"{name}: {count} lines for {CHECKED}")
            continue
        # Answers of eight HTTP connections are made side by side: a key's records are far apart, but only the set is certain.
        expected = expected or digest(output)
        if " http" in name:
            continue
        if digest(output) != expected:
            sys.exit(f"{name}: its output is not the bare loop's")


def placement():
    return {"load": open("/proc/loadavg").read().split()[:3], "cpus": os.cpu_count(), "processor": next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"),
        "kernel": platform.release(), "time": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "revision": subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", metavar="FILE", help="write everything there")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="words that a variant's name must have one of, such as shm")
    arguments = arguments.parse_args()
    found = variants(programs())
    with tempfile.TemporaryDirectory(prefix="n1-") as folder:
        folder = Path(folder)
        before = placement()
        check(folder, {name: v for name, v in found.items() if not arguments.only or set(name.split()) & {*arguments.only, "loop"}})
        if arguments.only:
            found = {name: v for name, v in found.items() if set(name.split()) & set(arguments.only)}
        sources = {}
        for name in found:
            for count in (RECORDS // scale(name), RECORDS // scale(name) // 5):
                if count not in sources:
                    sources[count] = str(folder / f"in-{count}")
                    write_input(sources[count], count)
        taken = {name: [] for name in found}
        for _ in range(RUNS):
            for name, variant in found.items():
                many, few = RECORDS // scale(name), RECORDS // scale(name) // 5
                seconds = {}
                for count in (few, many):
                    seconds[count], left = run(folder, variant, sources[count], "/dev/null")
                    if left not in (None, count):
                        sys.exit(f"{name}: {left} records left of {count}")
                taken[name].append((seconds[many] - seconds[few]) / (many - few) * 1e6)
        after = placement()
    print("N1, CPU of all processes, us a record: median of %d [least, most]; %d records less a fifth of them" % (RUNS, RECORDS))
    print("load before %s, after %s; %s, %d cores, revision %s" % (" ".join(before["load"]), " ".join(after["load"]), before["processor"], before["cpus"], before["revision"]))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, values in taken.items():
        print("%-24s %8.3f  [%.3f, %.3f]" % (name, medians[name], min(values), max(values)))
    goals = []
    for name, bare, bound in GOALS:
        if name not in medians or (bare and bare not in medians):
            continue
        # By run, so that a slow minute counts on both sides.
        value = statistics.median(a / b for a, b in zip(taken[name], taken[bare])) if bare else medians[name]
        goals.append({"name": name, "to": bare, "value": value, "bound": bound, "met": value <= bound})
        print("%s %s: %.2f%s (goal %.2f)" % ("met   " if value <= bound else "MISSED", name, value, f" x {bare}" if bare else " us", bound))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"before": before, "after": after, "runs": RUNS, "records": RECORDS, "us": taken, "goals": goals}, indent=1))


main()
