#!/bin/sh
# Each batch as it came, over files (transport: file): write beside, rename, remove the batch.
while :; do
  for batch in "$AGS_INPUT_DIRECTORY"/*; do
    [ -e "$batch" ] || { sleep 0.005; continue; }
    out="$AGS_OUTPUT_DIRECTORY/${batch##*/}"
    cp "$batch" "$out.tmp" && mv "$out.tmp" "$out" && rm "$batch"
  done
done
