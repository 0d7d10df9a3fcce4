"""A sum for each key, kept in the stage's keyed state: {"key": "apple", "n": 3} adds 3 to that of its key. The sums are written at the end."""
import json

import argo_streams

with argo_streams.open() as stage:
    for record in stage:
        try:
            amount = int(json.loads(bytes(record.payload))["n"])
        except (ValueError, KeyError, TypeError):
            stage.reject("there is no whole number n in it")
            continue
        key = record.key or b""
        stage.put(key, str(int(stage.get(key) or 0) + amount))
    for key, total in stage.items():
        stage.emit(key + b" " + total)
