"""A sum for each key, kept in the stage's keyed state: 'apple 3' for the key 'apple' adds 3 to it. The sums are written at the end."""
import argo_streams

with argo_streams.open() as stage:
    for record in stage:
        try:
            amount = int(bytes(record.payload).split()[-1])
        except (ValueError, IndexError):
            stage.reject("the last word is not a whole number")
            continue
        key = record.key or b""
        stage.put(key, str(int(stage.get(key) or 0) + amount))
    for key, total in stage.items():
        stage.emit(key + b" " + total)
