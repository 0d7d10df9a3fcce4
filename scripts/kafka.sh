#!/usr/bin/env bash
# A real Kafka cluster on this machine for tests and demos: KRaft, one JVM per
# broker, broker and controller in the same process, plaintext on 127.0.0.1.
#
#   kafka.sh start  DIR [PORT] [--brokers N]   start, or start again what is down
#   kafka.sh stop   DIR [NODE]                 clean shutdown of all nodes or one
#   kafka.sh kill   DIR [NODE]                 SIGKILL, for fault tests
#   kafka.sh status DIR                        one line per node
#   kafka.sh guard  DIR [PORT] [--brokers N]   start, wait for the end of stdin, then
#                                              kill all nodes and remove DIR
#   kafka.sh fetch                             get the jars, if they are not there
#
# `start` prints the bootstrap servers on stdout and nothing else; everything
# meant for people goes to stderr. The data stays in DIR: a later `start DIR`
# brings the same cluster back, on the same ports, with the same records.
#
# `guard` is for tests: whoever holds the other end of its stdin may end in any
# way, by SIGKILL too, and no broker is left behind.
#
# Node i of N listens on PORT+2(i-1) for clients and on the port after it for
# the controllers. PORT is 9092 unless given.
#
# Environment:
#   JAVA_HOME          a Java 17 or later; otherwise the `java` on PATH
#   KAFKA_HEAP         the -Xmx of each node, 512m unless given
#   KAFKA_JVM_FLAGS    added at the end of the JVM's flags
#   KAFKA_PROPERTIES   a file appended to every server.properties when the
#                      cluster is first made; a later line wins over ours
#   KAFKA_JARS         a folder of jars to use as they are (no mvn is run)
#   KAFKA_LOG_LEVEL    of server.log, INFO unless given when the cluster is made
#   KAFKA_READY_SECS   how long to wait for the brokers, 90 unless given
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
java=${JAVA_HOME:+$JAVA_HOME/bin/}java

say() { printf 'kafka: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '5,11s/^# //p' "$0" >&2; exit 2; }

# Kafka's own id format: 16 bytes, base64url, no padding. A leading '-' is
# refused by its argument parser.
uuid() {
    local id
    while id=$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=') && [[ $id == -* ]]; do :; done
    printf '%s' "$id"
}

# Prints the folder that holds the jars, filling it the first time. The folder
# is named after the pom, so a changed version is a new folder; it is filled
# under another name and renamed, so a half-filled one is never used.
jars() {
    if [[ -n ${KAFKA_JARS:-} ]]; then
        printf '%s' "$KAFKA_JARS"
        return
    fi
    local root key dir
    root=${XDG_CACHE_HOME:-$HOME/.cache}/kafka-broker
    key=$(sha256sum "$here/kafka-pom.xml" | cut -c 1-12)
    dir=$root/$key
    if [[ ! -d $dir ]]; then
        mkdir -p "$root"
        exec 9>"$root/lock"
        flock 9
        if [[ ! -d $dir ]]; then
            say "fetching the jars into $dir"
            rm -rf "$dir.part"
            mvn -q -B -ntp -f "$here/kafka-pom.xml" dependency:copy-dependencies \
                -DincludeScope=runtime -DoutputDirectory="$dir.part" >&2 ||
                die "mvn could not fetch the jars"
            mv "$dir.part" "$dir"
        fi
        exec 9>&-
    fi
    printf '%s' "$dir"
}

client_port() { echo $((port + 2 * ($1 - 1))); }

bootstrap() {
    local i list=
    for ((i = 1; i <= brokers; i++)); do list+=${list:+,}127.0.0.1:$(client_port "$i"); done
    printf '%s\n' "$list"
}

# The pid of a node if it is running. The command line is compared too: after a
# reboot the number in the file can belong to anything.
running() {
    local pid
    pid=$(cat "$dir/node-$1/pid" 2>/dev/null) || return 1
    [[ -r /proc/$pid/cmdline ]] &&
        tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$dir/node-$1/server.properties" &&
        printf '%s' "$pid"
}

load() {
    [[ -f $dir/cluster ]] || die "no cluster in $dir"
    # shellcheck disable=SC1091
    source "$dir/cluster"
}

# Writes the configuration and formats the storage of every node.
make_cluster() {
    local i node rf isr id quorum='' voters=''
    rf=$((brokers < 3 ? brokers : 3))
    isr=$((rf > 2 ? 2 : 1))
    for ((i = 1; i <= brokers; i++)); do
        quorum+=${quorum:+,}127.0.0.1:$(($(client_port "$i") + 1))
        voters+=${voters:+,}$i@127.0.0.1:$(($(client_port "$i") + 1)):$(uuid)
    done
    id=$(uuid)

    mkdir -p "$dir"
    cat >"$dir/log4j2.properties" <<EOF
status = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %m (%c{1})%n%throwable
rootLogger.level = ${KAFKA_LOG_LEVEL:-INFO}
rootLogger.appenderRef.out.ref = out
# Every component prints its whole configuration, 2,000 lines a start.
logger.config.name = org.apache.kafka.common.config.AbstractConfig
logger.config.level = WARN
EOF
    for ((i = 1; i <= brokers; i++)); do
        node=$dir/node-$i
        mkdir -p "$node"
        cat >"$node/server.properties" <<EOF
process.roles=broker,controller
node.id=$i
controller.quorum.bootstrap.servers=$quorum
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$(client_port "$i"),CONTROLLER://127.0.0.1:$(($(client_port "$i") + 1))
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$node/data

# A test names its topics; a typing error must not make one.
auto.create.topics.enable=false
default.replication.factor=$rf
min.insync.replicas=$isr

# The internal topics. 50 partitions of each is sized for a real cluster, and
# here costs a few hundred files and seconds of start.
offsets.topic.num.partitions=4
offsets.topic.replication.factor=$rf
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=$rf
transaction.state.log.min.isr=$isr
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=$rf
share.coordinator.state.topic.min.isr=$isr

# Retention goes by the records' own timestamps: with the default of 7 days a
# record stamped last year is deleted within minutes. Keep everything.
log.retention.ms=-1

# The first member of a group would wait 3 s for others.
group.initial.rebalance.delay.ms=0
# Members of a group hear of a rebalance at their next heartbeat. The broker
# sets that pace for group.protocol=consumer (5 s by default); a classic client
# sets its own, but no session below 6 s is accepted by default.
group.consumer.heartbeat.interval.ms=500
group.consumer.min.heartbeat.interval.ms=500
group.consumer.session.timeout.ms=6000
group.consumer.min.session.timeout.ms=1000
group.min.session.timeout.ms=1000
# A transaction past its timeout is aborted at the next sweep (10 s by default).
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000

# How long a dead broker counts as alive (9 s by default): its partitions have
# no leader for that long, and its own restart is refused as a duplicate.
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000

# Footprint: the cleaner alone reserves 128 MiB of heap by default.
log.cleaner.threads=1
log.cleaner.dedupe.buffer.size=8388608
num.network.threads=2
num.io.threads=4
EOF
        if [[ -n ${KAFKA_PROPERTIES:-} ]]; then
            printf '\n' >>"$node/server.properties"
            cat "$KAFKA_PROPERTIES" >>"$node/server.properties"
        fi
    done

    # One JVM for each node, all at once: it is start-up time and nothing else.
    local pids=()
    for ((i = 1; i <= brokers; i++)); do
        "$java" -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xshare:auto \
            -Dlog4j2.configurationFile="$dir/log4j2.properties" -cp "$classpath" \
            kafka.tools.StorageTool format --cluster-id "$id" \
            --initial-controllers "$voters" \
            --config "$dir/node-$i/server.properties" >"$dir/node-$i/format.log" 2>&1 &
        pids+=($!)
    done
    for ((i = 1; i <= brokers; i++)); do
        wait "${pids[$((i - 1))]}" || die "formatting node $i failed, see $dir/node-$i/format.log"
    done
    # Written last: a folder without this file is not a cluster.
    printf 'port=%d\nbrokers=%d\n' "$port" "$brokers" >"$dir/cluster"
}

start_node() {
    local node=$dir/node-$1
    [[ ! -f $node/server.log ]] || mv "$node/server.log" "$node/server.log.before"
    # Stopping at the first compiler halves the time to start, which a test pays
    # each time; a run that measures throughput can ask for the second one with
    # KAFKA_JVM_FLAGS=-XX:TieredStopAtLevel=4.
    # shellcheck disable=SC2086
    setsid "$java" -Xmx"${KAFKA_HEAP:-512m}" -XX:+UseSerialGC -Xss512k \
        -XX:TieredStopAtLevel=1 -XX:+ExitOnOutOfMemoryError -Djava.awt.headless=true \
        -Dlog4j2.configurationFile="$dir/log4j2.properties" ${KAFKA_JVM_FLAGS:-} \
        -cp "$classpath" kafka.Kafka "$node/server.properties" \
        >"$node/server.log" 2>&1 </dev/null 9>&- &
    echo $! >"$node/pid"
}

# "Kafka Server started" comes after the controller has unfenced the broker,
# that is, when a client's first request will be answered.
wait_ready() {
    local node=$dir/node-$1 end=$((SECONDS + ${KAFKA_READY_SECS:-90}))
    until grep -qs 'Kafka Server started' "$node/server.log"; do
        # Our own child: `running` would not know it before it has become java.
        kill -0 "$(cat "$node/pid")" 2>/dev/null || { tail -n 20 "$node/server.log" >&2; die "node $1 ended, see $node/server.log"; }
        ((SECONDS < end)) || die "node $1 is not ready, see $node/server.log"
        sleep 0.1
    done
}

cmd_start() {
    local i want_port=$1 want_brokers=$2 up=()
    classpath="$(jars)/*"
    if [[ -f $dir/cluster ]]; then
        load
        [[ -z $want_port || $want_port == "$port" ]] || die "$dir was made for port $port"
        [[ -z $want_brokers || $want_brokers == "$brokers" ]] || die "$dir was made for $brokers broker(s)"
    else
        port=${want_port:-9092} brokers=${want_brokers:-1}
        rm -rf "$dir"/node-*
        make_cluster
    fi
    for ((i = 1; i <= brokers; i++)); do
        running "$i" >/dev/null && continue
        start_node "$i"
        up+=("$i")
    done
    for i in "${up[@]}"; do wait_ready "$i"; done
    bootstrap
}

# Nodes are asked together and waited for together: the last of a quorum to be
# asked has no controller left to say goodbye to.
cmd_signal() {
    local signal=$1 only=$2 i pid end
    load
    local -A asked=()
    for ((i = 1; i <= brokers; i++)); do
        [[ -z $only || $only == "$i" ]] || continue
        pid=$(running "$i") || continue
        kill -s "$signal" "$pid"
        asked[$i]=$pid
    done
    end=$((SECONDS + 10))
    for i in "${!asked[@]}"; do
        while running "$i" >/dev/null; do
            if ((SECONDS >= end)); then
                say "node $i did not stop in 10 s, killing it"
                kill -s KILL "${asked[$i]}" || true
                end=$((SECONDS + 10))
            fi
            sleep 0.05
        done
        rm -f "$dir/node-$i/pid"
    done
}

cmd_status() {
    local i pid
    load
    for ((i = 1; i <= brokers; i++)); do
        if pid=$(running "$i"); then
            printf '%d 127.0.0.1:%d running pid %d, %d MiB\n' "$i" "$(client_port "$i")" "$pid" \
                "$(awk '/^VmRSS/ { print int($2 / 1024) }' "/proc/$pid/status")"
        else
            printf '%d 127.0.0.1:%d down\n' "$i" "$(client_port "$i")"
        fi
    done
}

cmd_guard() {
    trap '' HUP INT TERM
    local status=0
    (cmd_start "$1" "$2") || status=$?
    ((status != 0)) || cat >/dev/null || true
    # Somebody may be starting a killed node again at this moment: look until
    # nothing new can turn up.
    local _
    for _ in 1 2 3; do
        [[ ! -f $dir/cluster ]] || (cmd_signal KILL '')
        sleep 0.1
    done
    ((status != 0)) || rm -rf "$dir"
    return "$status"
}

if [[ ${1:-} == fetch && $# -eq 1 ]]; then
    folder=$(jars)
    say "jars: $folder"
    exit
fi
[[ $# -ge 2 ]] || usage
command=$1
dir=$(realpath -m -- "$2")
shift 2
case $command in
start | guard)
    want_port='' want_brokers=''
    while [[ $# -gt 0 ]]; do
        case $1 in
        --brokers) [[ ${2:-} =~ ^[1-9]$ ]] || usage; want_brokers=$2; shift 2 ;;
        *) [[ $1 =~ ^[0-9]+$ && -z $want_port ]] || usage; want_port=$1; shift ;;
        esac
    done
    "cmd_$command" "$want_port" "$want_brokers"
    ;;
stop) cmd_signal TERM "${1:-}" ;;
kill) cmd_signal KILL "${1:-}" ;;
status) cmd_status ;;
*) usage ;;
esac
