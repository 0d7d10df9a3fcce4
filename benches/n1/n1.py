"""N1 in Python with orjson: a line of JSON in, a running sum for each licenseId, a line out. n1.py HOW [one]

HOW is lines (also over named pipes), socket, file, http or shm, as in n1.c."""
import os, sys, time
import orjson

sums = {}


def step(line):
    return answer(orjson.loads(line))


def answer(record):
    key = record["licenseId"]
    total = sums[key] = sums.get(key, 0) + record["amount"]
    return orjson.dumps({"licenseId": key, "sum": total})


def lines(source, sink, one):
    write, flush = sink.write, sink.flush
    for line in source:
        write(step(line) + b"\n")
        if one:
            flush()
    flush()


def over_socket():
    import socket, struct
    head, unpack, pack = struct.Struct("<IBBHQqII"), struct.unpack_from, struct.pack
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["AGS_RECORDS"])
    data = b""
    while more := connection.recv(1 << 20):
        data = data + more if data else more
        answers, at = [], 0
        while len(data) - at >= 4 and len(data) - at - 4 >= unpack("<I", data, at)[0]:
            length, _kind, _flags, _attempt, number, _time, key, attributes = head.unpack_from(data, at)
            answer = step(data[at + 32 + key + attributes:at + 4 + length])
            answers.append(head.pack(28 + len(answer), 4, 0, 0, number, 0, 0, 0) + answer)
            at += 4 + length
        data = data[at:]
        connection.sendall(b"".join(answers))


def file():
    source, target = os.environ["AGS_INPUT_DIRECTORY"], os.environ["AGS_OUTPUT_DIRECTORY"]
    while True:
        names = [name for name in os.listdir(source) if not name.startswith(".")]
        for name in names:
            with open(os.path.join(source, name), "rb") as batch, open(os.path.join(target, name + ".tmp"), "wb") as out:
                lines(batch, out, False)
            os.rename(os.path.join(target, name + ".tmp"), os.path.join(target, name))
            os.unlink(os.path.join(source, name))
        if not names:
            time.sleep(0.0005)


def http():
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 1 << 16

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(b"")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if "Ags-Records" in self.headers:
                self.answer(b"".join(b'{"value":%b}\n' % answer(orjson.loads(line)["value"]) for line in body.splitlines()))
            else:
                self.answer(step(body))

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()


def shm():
    import argo_streams
    with argo_streams.open() as stage:
        for record in stage:
            stage.emit(step(record.payload))


how, one = sys.argv[1], sys.argv[2:] == ["one"]
if how == "lines" and "AGS_INPUT" in os.environ:
    with open(os.environ["AGS_INPUT"], "rb") as source, open(os.environ["AGS_OUTPUT"], "wb") as sink:
        lines(source, sink, one)
elif how == "lines":
    # Buffered, and by line on a terminal, as print() is; PYTHONUNBUFFERED would make it a write a record.
    lines(sys.stdin.buffer, sys.stdout.buffer, one or sys.stdout.isatty())
else:
    {"socket": over_socket, "file": file, "http": http, "shm": shm}[how]()
