#!/bin/sh
# Links the shared library of the C SDK from the static one, with the versions of argo_streams.map on its symbols: rustc passes
# a version script of its own, and the linker gives only the functions of that one a place.
#
#   link-shared.sh LIBARGO_STREAMS_A OUTPUT
set -eu
[ $# -eq 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
[ -f "$1" ] || { echo "link-shared.sh: $1 is not there: cargo build --release -p argo-streams-sdk-c" >&2; exit 1; }
exec "${CC:-cc}" -shared -o "$2" \
    -Wl,--whole-archive "$1" -Wl,--no-whole-archive \
    -Wl,-soname,libargo_streams.so.0 -Wl,--version-script="$here/argo_streams.map" \
    -Wl,--gc-sections -Wl,--as-needed -Wl,-z,defs -Wl,-z,relro,-z,now -Wl,-S -lgcc_s -lpthread -ldl -lm -lc
