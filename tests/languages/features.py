"""What conform does not try: attributes, several inputs, an interrupted wait, bytes that are kept too long. tests/languages.rs runs it."""
import sys
import threading

import argo_streams

stage = argo_streams.open()
if stage.name == "one":
    thread = threading.Thread(target=stage.interrupt)
    thread.start()
    try:
        next(iter(stage))
    except argo_streams.Interrupted:
        open(sys.argv[1], "w").close()
    thread.join()
    more = {"key": b"k", "event_time_ns": 5, "attributes": {"hop": "one", "empty": b""}}
    inputs, kept, refused = set(), None, 0
    records = iter(stage)
    while True:
        try:
            record = next(records, None)
        except BufferError:  # a slice is still held: the record is not finished, and the loop goes on when it is let go
            refused += 1
            part.release()
            continue
        if record is None:
            break
        inputs.add(record.input)
        if kept is None:
            kept = record.payload
            part = kept[:1]
        else:
            try:
                kept[0]
            except ValueError:
                refused += 1
        stage.emit(record.payload, **more)
    stage.emit(f"inputs {len(inputs)} kept {'refused' if refused == 3 else refused}", **more)
elif stage.name == "fails":
    for record in stage:
        if record.attempts < int(bytes(record.payload).split()[0]):
            stage.fail("not today")
        else:
            stage.emit(record.payload)
else:
    for record in stage:
        attribute = record.attribute
        words = [attribute("hop"), attribute("empty"), attribute("missing"), record.key, record.event_time_ns]
        stage.emit(f"{words[0].decode()} {words[1] == b''} {words[2] is None} {words[3].decode()} {words[4]} {bytes(record.payload).decode()}".lower())
stage.close()
