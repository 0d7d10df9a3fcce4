#!/usr/bin/env bash
# Builds the shim as a static program.
#
#   shim.sh [FILE]    FILE is target/static/argo-streams-shim by default
#
# Not beside target/release/argo-streams: the agent takes a shim that lies
# beside it, and this one is not rebuilt when the agent is.
#
# glibc with crt-static, which comes with the toolchain. Not musl: tokio-uring
# does not build for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

machine=$(uname -m)
target=$machine-unknown-linux-gnu
folder=${CARGO_TARGET_DIR:-target}
file=${1:-$folder/static/argo-streams-shim}

# Only for this target: build scripts and procedural macros are made for the
# machine itself and must stay dynamic.
variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_RUSTFLAGS
env "$variable=-C target-feature=+crt-static" \
    cargo build --profile shim -p argo-streams-shim --features program --bin argo-streams-shim --target "$target"
mkdir -p "$(dirname "$file")"
# A running shim keeps its file: a new one takes the name.
cp "$folder/$target/shim/argo-streams-shim" "$file.new"
mv "$file.new" "$file"
printf 'shim: %s for %s, %s bytes\n' "$file" "$target" "$(stat -c %s "$file")"
