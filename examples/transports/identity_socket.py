"""Gives each record back as it came, over the unix socket: `transport: socket`. docs/pardo.md says what the parts mean."""
import os, socket, struct
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["AGS_RECORDS"])
data = b""
while True:
    more = s.recv(1 << 20)
    if not more: break
    data = data + more if data else more
    answers, at = [], 0
    while len(data) - at >= 4 and len(data) - at - 4 >= (length := struct.unpack_from("<I", data, at)[0]):
        kind, flags, attempt, number, time, key, attributes = struct.unpack_from("<BBHQqII", data, at + 4)
        payload = data[at + 32 + key + attributes:at + 4 + length]
        answers.append(struct.pack("<IBBHQqII", 28 + len(payload), 4, 0, 0, number, 0, 0, 0) + payload)
        at += 4 + length
    data = data[at:]
    s.sendall(b"".join(answers))
