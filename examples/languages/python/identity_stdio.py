"""The identity on standard input and output: argo-streams conform --strict-bytes -- python3 identity_stdio.py

Bytes and not text, so that every byte is kept. Standard output is a terminal, and each line is written when it is complete."""
import sys

for line in sys.stdin.buffer:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
