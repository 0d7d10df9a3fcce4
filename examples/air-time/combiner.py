#!/usr/bin/env python3
"""The same sums in ten lines of Python on standard input and output, to be run with `ack: line`."""
import json, os, sys
field, name = os.environ.get("COMBINE_FIELD", "minutes"), os.environ.get("COMBINE_KEY", "licenseId")
count, total = {}, {}
for line in sys.stdin:
    record = json.loads(line)
    key = record[name]
    count[key], total[key] = count.get(key, 0) + 1, total.get(key, 0) + record[field]
    print(json.dumps({name: key, "rides": count[key], field: total[key]}, separators=(",", ":")))
