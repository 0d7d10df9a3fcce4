#!/usr/bin/env bash
# C programs with the C SDK under Valgrind: a wrong access or a byte that is lost at the end fails. `make sdk-memory` builds what
# it needs: the release binary and the static library.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
valgrind=(valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect)
for program in sdk-c/tests/calls.c tests/identity.c; do
    cc -std=gnu11 -g -O1 -Isdk-c/include -o "$folder/$(basename "$program" .c)" "$program" \
        target/release/libargo_streams.a -lgcc_s -lpthread -ldl -lm
done
env -u AGS_SOCKET "${valgrind[@]}" "$folder/calls"
target/release/argo-streams conform --transport shm --case no-record --case hundred-records --case records-of-64-kib \
    --case only-empty-records -- "${valgrind[@]}" "$folder/identity"
