#!/usr/bin/env bash
# Builds the shim as a static program.
#
#   shim.sh                with glibc, for this machine: target/static/argo-streams-shim
#   shim.sh musl [MACHINE] with musl, for this machine or x86_64 or aarch64:
#                          target/static/MACHINE-musl/argo-streams-shim
#
# Not beside target/release/argo-streams: the agent takes a shim that lies
# beside it, and this one is not rebuilt when the agent is.
#
# glibc with crt-static comes with the toolchain. musl is a target that rustup
# adds; it has all that a program needs in it, so that another machine's takes
# no compiler but Rust's own linker. It works with epoll alone: tokio-uring does
# not compile for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

libc=${1:-gnu}
machine=${2:-$(uname -m)}
target=$machine-unknown-linux-$libc
folder=${CARGO_TARGET_DIR:-target}
case $libc in
gnu) file=$folder/static/argo-streams-shim flags='-C target-feature=+crt-static' ;;
musl) file=$folder/static/$machine-musl/argo-streams-shim flags= ;;
*)
    echo "shim.sh: found \"$libc\", expected nothing or musl" >&2
    exit 2
    ;;
esac
[[ $libc == gnu ]] || rustup target add "$target"

# Only for this target: build scripts and procedural macros are made for the
# machine itself and must stay dynamic.
variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")
settings=("${variable}_RUSTFLAGS=$flags")
[[ $machine == "$(uname -m)" ]] || settings+=("${variable}_LINKER=rust-lld")
env "${settings[@]}" \
    cargo build --profile shim -p argo-streams-shim --features program --bin argo-streams-shim --target "$target"
mkdir -p "$(dirname "$file")"
# A running shim keeps its file: a new one takes the name.
cp "$folder/$target/shim/argo-streams-shim" "$file.new"
mv "$file.new" "$file"
printf 'shim: %s for %s, %s bytes\n' "$file" "$target" "$(stat -c %s "$file")"
