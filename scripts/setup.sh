#!/usr/bin/env bash
# Installs what this project needs on a Debian machine that has cargo.
#
#   setup.sh build    what `cargo build` and the demo need (the default)
#   setup.sh test     that, and what the tests need: Java and Apache Kafka,
#                     Python, Valgrind, Clang, podman, Docker, containerd, Go,
#                     Node, and Java 22 or later
#   setup.sh peers    what `make bench-peers` needs beside `build`: Clang, the
#                     headers that Aeron's C sources want, and their cmake
#   setup.sh aarch64  what `make test-aarch64` needs beside `build`: a cross
#                     compiler, an emulator, and Rust's library for aarch64
#
# May be run any number of times. What is there already is skipped, and then
# the network is not touched. Packages come by apt-get (through sudo unless run
# as root), the toolchain by rustup as rust-toolchain.toml pins it, and Kafka's
# jars by mvn as kafka-pom.xml pins them, each from wherever that client is
# configured to look.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '4,12s/^# //p' "$0" >&2; exit 2; }

as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "neither root nor sudo; please run: $*"
    fi
}

installed() { [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

# Installs those of the packages that are missing.
packages() {
    local name missing=()
    for name in "$@"; do
        installed "$name" || missing+=("$name")
    done
    if [[ ${#missing[@]} -eq 0 ]]; then
        say "packages: all there"
        return
    fi
    command -v apt-get >/dev/null || die "no apt-get; please install by hand: ${missing[*]}"
    say "packages: installing ${missing[*]}"
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}"
}

# The first use of cargo in the checkout makes rustup fetch the pinned toolchain.
toolchain() {
    command -v cargo >/dev/null || die "no cargo: install rustup first"
    (cd "$here/.." && cargo --version >&2)
}

java_is_new_enough() {
    local version
    version=$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1) || return 1
    [[ -n $version && $version -ge 17 ]]
}

# Aeron's C sources want cmake 3.30 or later. Where the machine's is older, pip
# has it, in a virtual environment of its own.
new_cmake() {
    local version tools=$here/../target-peers/tools
    version=$(PATH="$tools/bin:$PATH" cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
    if [[ -n $version && $(printf '%s\n' 3.30 "$version" | sort -V | head -n 1) == 3.30 ]]; then
        say "cmake $version"
        return
    fi
    say "cmake ${version:-none}: installing a newer one into target-peers/tools"
    python3 -m venv "$tools" || { packages python3-venv; python3 -m venv "$tools"; }
    "$tools/bin/pip" install -q 'cmake>=3.30'
}

case ${1:-build} in
build | test | peers | aarch64) ;;
*) usage ;;
esac

# librdkafka is built from source: a C compiler, make, and the headers of zlib
# and OpenSSL.
packages build-essential pkg-config zlib1g-dev libssl-dev python3
toolchain
if [[ ${1:-build} == test ]]; then
    # pip builds the Python binding in an environment of its own, perl is a program that `ctl` replaces another one by.
    # podman, Docker and containerd start the containers of tests/shim.rs, some of
    # them with a shell in it.
    packages valgrind clang perl python3-dev python3-venv pkg-config \
        podman crun docker.io containerd runc busybox-static
    java_is_new_enough || packages default-jre-headless
    java_is_new_enough || die "Kafka needs Java 17 or later, and this one is older"
    command -v mvn >/dev/null || packages maven
    "$here/kafka.sh" fetch
    # The bindings of other languages, each with its own client.
    command -v go >/dev/null || packages golang-go
    command -v node >/dev/null || packages nodejs
    command -v npm >/dev/null || packages npm
    [[ -f $(dirname "$(readlink -f "$(command -v node)")")/../include/node/node_api.h ]] || packages libnode-dev
    "$here/java22.sh" fetch
fi
if [[ ${1:-} == peers ]]; then
    packages clang libclang-dev libbsd-dev uuid-dev
    new_cmake
fi
if [[ ${1:-} == aarch64 ]]; then
    packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    (cd "$here/.." && rustup target add aarch64-unknown-linux-gnu >&2)
fi
say "done"
