#!/usr/bin/env python3
"""Checks the end of `make demo`: the table that the logger printed against sums computed here, by another implementation
of the same deterministic stream (agent/src/generator.rs says how rides are made).

check.py SUMMARY.json TABLE RIDES
"""
import heapq, json, math, re, sys

MASK = (1 << 64) - 1


class Random:
    """SplitMix64."""
    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        word = self.state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        return word ^ (word >> 31)


def sums(rides, seed=1, keys=1000):
    """Rides and minutes of each license."""
    random, log_of_all = Random(seed), math.log(keys + 1.0)
    count, minutes = {}, {}
    for _ in range(rides):
        ride = 2 + (random.next() % 9) * (random.next() % 9)
        unit = (random.next() >> 11) / (1 << 53)
        key = "TX-%05d" % min(max(int(math.exp(unit * log_of_all)) - 1, 0), keys - 1)
        count[key] = count.get(key, 0) + 1
        minutes[key] = minutes.get(key, 0) + ride
    return count, minutes


def main():
    summary, words, rides = json.load(open(sys.argv[1])), open(sys.argv[2], errors="replace").read(), int(sys.argv[3])
    count, minutes = sums(rides)
    steps = {step["name"]: step for step in summary["steps"]}
    read = steps["kafka-0"]["out"]
    if read != rides:
        sys.exit("demo: only %d of %d rides were read in the time given; give it more: make demo DEMO_SECONDS=60" % (read, rides))
    for name in ("pardo-2", "pardo-3"):
        if steps[name]["in"] != rides or steps[name]["errors"]:
            sys.exit("demo: %s read %d of %d rides, %d errors" % (name, steps[name]["in"], rides, steps[name]["errors"]))
    table = dict((license, (int(n), int(m))) for license, n, m in re.findall(r"(TX-\d{5})\s+(\d+)\s+(\d+)\s*$", words, re.M))
    if len(table) < min(10, len(count)):
        sys.exit("demo: the logger's table has %d rows" % len(table))
    wrong = [license for license, row in table.items() if row != (count[license], minutes[license])]
    top = [license for license in heapq.nlargest(10, minutes, key=lambda license: (minutes[license], license))]
    if wrong or not set(top) & set(table):
        sys.exit("demo: the table is wrong for %s" % wrong)
    edges = {(edge["from"], edge["to"]): edge for edge in summary["edges"]}
    hop = edges[("pardo-2", "pardo-3")]
    print("demo: %d rides, %d licenses; the table agrees with an independent computation" % (rides, len(count)))
    print("demo: combiner -> logger over shared memory: %d records, p50 %.1f us, p99 %.1f us" % (hop["records"], hop["p50_us"], hop["p99_us"]))


main()
