# Two commands: `make demo` sets everything up and runs the main job; `make test` sets everything up and passes all tests.
SHELL := /bin/bash
DEMO_SECONDS ?= 20
PREFIX ?= /usr/local
BINARY := target/release/argo-streams

# The shared library of the C SDK, with versions on its symbols.
SDK_SHARED := target/release/sdk/libargo_streams.so.0
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

.PHONY: bench-n1 shim shim-musl sdk sdk-install sdk-memory demo test test-rust test-loom check build examples install crash kills hostile-rate test-aarch64 single-step fuzz bench bench-peers setup-build setup-test setup-peers setup-aarch64 clean

build: setup-build
	cargo build --release --workspace

setup-build:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test

setup-peers:
	@scripts/setup.sh peers

setup-aarch64:
	@scripts/setup.sh aarch64

# The shim as a static program, for containers: target/static/argo-streams-shim.
shim: setup-build
	@scripts/shim.sh

# The same with musl, a third smaller and without io_uring: target/static/MACHINE-musl/argo-streams-shim. SHIM_MACHINE=aarch64 makes it
# for a gateway, with no other compiler than Rust's.
SHIM_MACHINE := $(shell uname -m)
shim-musl: setup-build
	@scripts/shim.sh musl $(SHIM_MACHINE)

# The protocol and the C library for aarch64, and the protocol's tests under an emulator; but those that step through a process,
# which the emulator does not let them, and loom's, which are the same everywhere.
AARCH64 := aarch64-unknown-linux-gnu
AARCH64_RUNNER := qemu-aarch64 -L /usr/aarch64-linux-gnu
test-aarch64: setup-aarch64
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		cargo build --release --target $(AARCH64) -p argo-streams-shm-protocol -p argo-streams-sdk-c
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$(AARCH64_RUNNER)" AGS_RUNNER="$(AARCH64_RUNNER)" \
		cargo test --release --target $(AARCH64) -p argo-streams-shm-protocol --lib \
		--test golden --test hostile --test kills --test ring --test simulation --test stage
	@# The emulator can start the shim, and no more: it has no PR_SET_CHILD_SUBREAPER, without which the shim refuses to work.
	@scripts/shim.sh musl aarch64
	qemu-aarch64 $${CARGO_TARGET_DIR:-target}/static/aarch64-musl/argo-streams-shim --help >/dev/null

# The C programs of the examples, against the library just built.
examples: build
	$(MAKE) -C examples/work-time LIBDIR=$(CURDIR)/target/release

# The proposal's pipeline on a deterministic stream of taxi rides, from an embedded Kafka.
demo: examples
	@scripts/demo.sh $(DEMO_SECONDS)

test: setup-test examples shim shim-musl test-rust test-loom
	@echo "make test: everything passed"

test-rust:
	cargo test --release --workspace

# Every interleaving of publish, consume, commit and sleep; a target folder of its own, because loom's build differs.
test-loom:
	scripts/loom.sh

# Format, lints and documentation, as CI checks them.
check:
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release -p argo-streams-shim --features program --all-targets -- -D warnings
	# The C library's documentation is its header.
	RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --exclude argo-streams-sdk-c

# 200 random kills of ParDos while air-time runs from real Kafka to Kafka; exact sums, no id lost or doubled.
crash: setup-test examples
	AGS_KILLS=200 cargo test --release -p argo-streams-tests --test kafka -- --nocapture killed

# Each of three stages killed KILLS times at random moments, over rings and keyed state: some ten minutes.
KILLS ?= 10000
kills: setup-test
	for victim in source combiner sink; do \
		AGS_VICTIM=$$victim AGS_KILLS=$(KILLS) cargo test --release -p argo-streams-shm-protocol --test kills || exit 1; \
	done

# How fast a healthy chain is beside each way of being hostile, over its rate beside a program that only spins: two minutes.
hostile-rate: setup-test
	AGS_HOSTILE_RATE=5 cargo test --release -p argo-streams-tests --test hostile

# A stage killed behind every instruction of a record, one process each: about 29,000 of them, two minutes.
single-step: setup-test
	AGS_SINGLE_STEP=all cargo test --release -p argo-streams-shm-protocol --test single_step

# Everything that parses foreign bytes, FUZZ_SECONDS each (nightly and `cargo install cargo-fuzz --locked`).
FUZZ_SECONDS ?= 600
fuzz:
	for target in control ring commit state attributes; do \
		(cd fuzz && CARGO_TARGET_DIR=$(CURDIR)/target-fuzz cargo +nightly fuzz run $$target -- \
			-max_total_time=$(FUZZ_SECONDS) -print_final_stats=1) || exit 1; \
	done

bench: examples
	cargo bench

# N1 of the numbers: JSON in, key, sum, out, through each transport in C, Rust and Python; some ten minutes.
bench-n1: build
	cargo build --release -p argo-streams-benches --example n1
	python3 benches/n1.py --json target/n1.json

# The binary with iceoryx2 and Aeron as peers of `argo-streams bench ring`, in a target folder of its own: it links libraries
# that the ordinary binary does without.
bench-peers: setup-peers
	PATH="$(CURDIR)/target-peers/tools/bin:$$PATH" CARGO_TARGET_DIR=target-peers \
		cargo build --release -p argo-streams-agent --features peers
	@echo "make bench-peers: target-peers/release/argo-streams bench ring --goals"

install: build shim sdk-install
	install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/argo-streams
	install -D -m 755 target/static/argo-streams-shim $(DESTDIR)$(PREFIX)/bin/argo-streams-shim

# The C SDK alone: both libraries, the headers for C and C++, and what pkg-config wants to know.
sdk: setup-build
	cargo build --release -p argo-streams-sdk-c
	mkdir -p $(dir $(SDK_SHARED))
	sdk-c/link-shared.sh target/release/libargo_streams.a $(SDK_SHARED)

sdk-install: sdk
	install -D -m 644 sdk-c/include/argo_streams.h $(DESTDIR)$(PREFIX)/include/argo_streams.h
	install -D -m 644 sdk-c/cpp/argo_streams.hpp $(DESTDIR)$(PREFIX)/include/argo_streams.hpp
	install -D -m 644 target/release/libargo_streams.a $(DESTDIR)$(PREFIX)/lib/libargo_streams.a
	install -D -m 755 $(SDK_SHARED) $(DESTDIR)$(PREFIX)/lib/libargo_streams.so.0
	ln -sf libargo_streams.so.0 $(DESTDIR)$(PREFIX)/lib/libargo_streams.so
	mkdir -p $(DESTDIR)$(PREFIX)/lib/pkgconfig
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' sdk-c/argo-streams.pc.in \
		> $(DESTDIR)$(PREFIX)/lib/pkgconfig/argo-streams.pc

# The library's own tests, whose C programs are built with ASan and UBSan, and then programs under Valgrind: every call without an
# agent, and records of all sizes with one.
sdk-memory: setup-test sdk
	cargo build --release -p argo-streams-agent
	cargo test --release -p argo-streams-sdk-c
	scripts/sdk-valgrind.sh

clean:
	cargo clean
	rm -rf examples/*/build
