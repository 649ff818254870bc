#!/usr/bin/env bash
# A cluster on this machine, to develop and try things with: nodes n1, n2, … on 127.0.0.1, 127.0.0.2, …
#
#   devcluster.sh up [N]       start N nodes (3), or those of an existing cluster that are not running
#   devcluster.sh status       which nodes there are, and what they say of themselves
#   devcluster.sh demo [ARGS]  run the demonstration on it (examples/variants; ARGS go to demo.py)
#   devcluster.sh logs NODE    follow a node's log
#   devcluster.sh kill NODE    crash a node: kill -9 of its daemon and shim, and with the shim etcd and all tasks
#   devcluster.sh start NODE   start a node that was killed
#   devcluster.sh down         stop everything and remove what it left
#   devcluster.sh env          print what to put in the environment to talk to it
#
# Options, before or after the command:
#   --state DIR     where everything is (default $SPINETTA_DEVCLUSTER, else ./.devcluster)
# and for the first `up`, which remembers them:
#   --base PREFIX   addresses are PREFIX1, PREFIX2, … (default 127.0.0.); another one for a second cluster
#   --port PORT     of the API on each address; etcd takes the two after it (default 7220)
#   --cpus N        what each node offers (default 2, so that tasks spread), and
#   --memory SIZE   (default 2GiB)
#   --workers N     how many of them, the last ones, are workers: they never run an etcd member (default 0)
#   --allow WORDS   what tasks in containers may have on the nodes, e.g. mount:/data,image:/srv/images (default nothing)
#   --tls           a secured cluster: n1 founds it, the others join it with tokens, and you are its administrator
#
# Each node has its name as a tag, and `voter` or `worker`: `spinetta submit --tag n2 …` runs there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
READY_LIMIT_S=90 # a three-node cluster takes about ten seconds; a busy machine several times that
STOP_LIMIT_S=30

die() {
    printf 'devcluster: %s\n' "$@" >&2
    exit 1
}
say() { printf 'devcluster: %s\n' "$*"; }
usage() { sed -n '2,25s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# --- arguments -------------------------------------------------------------------------------------------------

state=${SPINETTA_DEVCLUSTER:-$PWD/.devcluster}
base="" port="" cpus="" memory="" workers="" tls="" allow=""
words=()
while [ $# -gt 0 ]; do
    case $1 in
        --state | --base | --port | --cpus | --memory | --workers | --allow)
            [ $# -ge 2 ] || die "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --tls)
            tls=on
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        demo) # the rest is for the demonstration
            words+=("$@")
            break
            ;;
        -*) die "unknown option $1 (--help lists them)" ;;
        *)
            words+=("$1")
            shift
            ;;
    esac
done
command=${words[0]:-}
argument=${words[1]:-}
[ -n "$command" ] || {
    usage >&2
    exit 2
}
case $state in /*) ;; *) state=$PWD/$state ;; esac
settings=$state/devcluster.settings

for candidate in "${SPINETTA_VENV:-$root/.venv}/bin" "$(dirname "$(command -v spinetta || echo /)")"; do
    if [ -x "$candidate/spinetta" ]; then
        bin=$candidate
        break
    fi
done
[ -n "${bin:-}" ] || die "spinetta is not installed; run $root/scripts/setup.sh"
spinetta=$bin/spinetta

# --- what a cluster is -----------------------------------------------------------------------------------------

load() {
    [ -f "$settings" ] || return 1
    local key value
    while IFS='=' read -r key value; do
        case $key in
            size | made | voters) printf -v "$key" '%s' "$value" ;;
            base | port | cpus | memory | tls | allow)
                # An option that contradicts the running cluster would otherwise be ignored in silence.
                [ -z "${!key}" ] || [ "${!key}" = "$value" ] ||
                    die "the cluster in $state has --$key $value; take it down first, or use another --state"
                printf -v "$key" '%s' "$value"
                ;;
        esac
    done <"$settings"
    speak
}
# With what `spinetta` shows who it is: never what somebody has for another cluster.
speak() {
    SPINETTA_CREDENTIALS=none
    if [ "$tls" = on ]; then SPINETTA_CREDENTIALS=$state/n1/admin.pem; fi
    export SPINETTA_CREDENTIALS
}
need_cluster() { load || die "no cluster in $state; start one with: devcluster.sh up"; }
save() {
    printf '%s\n' "size=$size" "voters=$voters" "made=$made" "base=$base" "port=$port" "cpus=$cpus" "memory=$memory" \
        "tls=$tls" "allow=$allow" >"$settings"
}

names() {
    local i
    for ((i = 1; i <= size; i++)); do echo "n$i"; done
}
address() { echo "$base${1#n}:$port"; }
role() { if [ "${1#n}" -le "${voters:-$size}" ]; then echo voter; else echo worker; fi; }
# Of those that users may ask.
addresses() {
    local name found=()
    for name in $(names); do
        if [ "$tls" != on ] || [ "$(role "$name")" = voter ]; then found+=("$(address "$name")"); fi
    done
    (IFS=, && echo "${found[*]}")
}
check_name() {
    [ -n "$argument" ] || die "which node? there are: $(names | xargs)"
    names | grep -qxF -- "$argument" || die "no node $argument; there are: $(names | xargs)"
}

# --- processes -------------------------------------------------------------------------------------------------

# A pid alone may come to mean another process; together with the time of its start it cannot.
started() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) } # the name, which may hold anything, ends with the last parenthesis
    read -ra stat <<<"$stat"
    [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}
same_process() { [ -n "${2:-}" ] && [ "$(started "$1")" = "$2" ]; }

# daemon NODE, shim NODE: its pid if it runs; after an upgrade there may be several shims for a while.
daemon() {
    local pid since _
    read -r pid since _ 2>/dev/null <"$state/$1.pid" && same_process "$pid" "$since" && echo "$pid"
}
shim() {
    local pid since none=1
    while read -r pid since; do
        if same_process "$pid" "$since"; then
            echo "$pid"
            none=0
        fi
    done < <(identity "$1" | sed -En 's/.*"pid": ?([0-9]+).*"start_ticks": ?([0-9]+).*/\1 \2/p')
    return $none
}
# What each shim wrote of itself, on one line.
identity() {
    local file
    for file in "$state/$1"/shim/shim.json "$state/$1"/shim/generations/*/shim.json; do
        if [ -e "$file" ]; then
            tr '\n' ' ' 2>/dev/null <"$file" || true
            echo # a last line without its end is no line to `read`
        fi
    done
}
# The control groups that the shim made; they outlive it when it is killed.
cgroups() { identity "$1" | sed -En 's/.*"cgroups": ?\[([^]]*)\].*/\1/p' | grep -oE '"/[^"]+"' | tr -d '"'; }

gone() { [ -z "$(daemon "$1")$(shim "$1")" ]; }

start_node() {
    local name=$1 other peers="" pid
    # One that has been in the cluster knows the others; a new one needs to be told.
    for other in $(names); do
        if [ "$other" != "$name" ] && [ -n "$(daemon "$other")" ]; then peers+=,$(address "$other"); fi
    done
    local options=(--name "$name" --address "$(address "$name")" --data-dir "$state/$name"
        --etcd-client-port $((port + 1)) --etcd-peer-port $((port + 2)) --cpus "$cpus" --memory "$memory"
        --tags "$name,$(role "$name")")
    if [ -n "$peers" ]; then options+=(--peers "${peers#,}"); fi
    if [ -n "$allow" ]; then options+=(--allow "$allow"); fi
    if [ "$tls" = on ]; then
        options+=(--tls on)
        if [ "$name" != n1 ] && [ ! -e "$state/$name/trust/current" ]; then # it is not known yet
            make_token "$name"
            options+=(--token-file "$state/$name.token")
        fi
    elif [ "$(role "$name")" = worker ]; then
        options+=(--candidate no)
    fi
    printf '\n--- %s devcluster.sh starts %s\n' "$(date -u +%FT%TZ)" "$name" >>"$state/$name.log"
    local wall_ms
    wall_ms=$(date +%s%3N)
    # A session of its own: a Ctrl-C at this terminal is not meant for it.
    (cd / && exec setsid "$spinetta" node join "${options[@]}" >>"$state/$name.log" 2>&1 </dev/null 9<&-) &
    pid=$!
    echo "$pid $(started "$pid") $wall_ms" >"$state/$name.pid" || die "$name ended at once; see $state/$name.log"
}

# What lets a node in. Whoever reads it could come in, so it is in a file of ours alone.
make_token() {
    rm -f "$state/$1.token"
    (umask 077 && SPINETTA_NODE=$(addresses) "$spinetta" token create --role "$(role "$1")" >"$state/$1.token" 2>>"$state/$1.log") ||
        show_failure "$1" "there is no token for $1"
}

# Crash a node. The shim is PID 1 of its PID namespace: the kernel ends all that is in there with it.
kill_node() {
    local pid
    for pid in $(daemon "$1") $(shim "$1"); do kill -KILL "$pid" 2>/dev/null || true; done
    wait_until 10 gone "$1" || die "$1 is still there 10 s after kill -9"
    # Where there is no such namespace, etcd and the tasks live on in their control groups.
    local group
    for group in $(cgroups "$1"); do
        if [ -d "$group" ]; then
            find "$group" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        fi
    done
}

# Groups without processes that a killed shim left.
remove_cgroups() {
    local group
    for group in $(cgroups "$1"); do
        case $group in */spinetta-*) find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true ;; esac
    done
}

stop_node() {
    "$spinetta" node stop --data-dir "$state/$1" >>"$state/$1.log" 2>&1 || true
    wait_until "$STOP_LIMIT_S" gone "$1" || {
        say "$1 did not stop within $STOP_LIMIT_S s: killing it"
        kill_node "$1"
    }
}

# wait_until LIMIT_S COMMAND…: until the command is true; false when it is not within the limit.
wait_until() {
    local limit=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $limit ] || return 1
        sleep 0.1 # between two looks
    done
}

# --- readiness -------------------------------------------------------------------------------------------------

node_list() { SPINETTA_NODE=$(addresses) SPINETTA_TIMEOUT=5s "$spinetta" node list "$@" 2>/dev/null; }

# Prints the nodes among the arguments that are not ready yet; when they are all there are, also "voters" while there
# are fewer of them than there will be.
# A node that crashed is listed as it was until its lease ends, so what counts is what its present daemon says.
unready() {
    local name since wanted=()
    for name in "$@"; do
        read -r _ _ since 2>/dev/null <"$state/$name.pid" || since=0
        wanted+=("$name=${since:-0}")
    done
    { node_list --json || true; } | "$bin/python" -c '
import json, sys
size, seats, wanted = *map(int, sys.argv[1:3]), dict(w.split("=") for w in sys.argv[3:])
try:
    nodes = {n["name"]: n for n in json.load(sys.stdin)["nodes"]}
except (ValueError, KeyError):  # nobody answers, or with an error
    nodes = {}
up = {name for name, n in nodes.items() if n["status"] in ("ready", "draining") and n["started_ms"] >= int(wanted.get(name, 0))}
missing = [name for name in wanted if name not in up]
voters = sum(bool(n["voter"]) for n in nodes.values())
if len(wanted) == size and voters < (3 if seats >= 3 else 1):
    missing.append("voters")
print(" ".join(missing))
' "$size" "${voters:-$size}" "${wanted[@]}"
}

# Wait until these nodes are ready. When one ends, or none of it comes to pass within the limit, show its log.
await_ready() {
    local limit=$((SECONDS + READY_LIMIT_S)) name missing
    while missing=$(unready "$@") || missing=$*; [ -n "$missing" ]; do
        for name in "$@"; do
            [ -n "$(daemon "$name")" ] || show_failure "$name" "$name ended instead of getting ready"
        done
        [ $SECONDS -lt $limit ] || {
            case $missing in n*) name=${missing%% *} ;; *) name=$1 ;; esac
            show_failure "$name" "not ready within $READY_LIMIT_S s: $missing"
        }
        sleep 0.1 # between two looks
    done
    for name in "$@"; do rm -f "$state/$name.token"; done # used up
}
await_all() {
    local all
    mapfile -t all < <(names)
    await_ready "${all[@]}"
}
# The first node answers, though it is alone yet.
await_first() {
    local limit=$((SECONDS + READY_LIMIT_S))
    while [[ " $(unready n1) " == *" n1 "* ]]; do
        [ -n "$(daemon n1)" ] || show_failure n1 "n1 ended instead of getting ready"
        [ $SECONDS -lt $limit ] || show_failure n1 "n1 did not answer within $READY_LIMIT_S s"
        sleep 0.1 # between two looks
    done
}
show_failure() {
    printf 'devcluster: %s. The end of %s:\n' "$2" "$state/$1.log" >&2
    tail -n 30 "$state/$1.log" >&2 || true
    exit 1
}

# One at a time may change a cluster. The lock is on the directory, so it leaves no file, and ends with this process.
lock() {
    exec 9<"$state"
    flock --timeout 120 9 || die "another devcluster.sh is at work in $state"
}

# --- commands --------------------------------------------------------------------------------------------------

up() {
    local name new=() old=() began=$SECONDS
    case $argument in *[!0-9]* | 0*) die "up takes a number of nodes, not $argument" ;; esac
    [ "${argument:-3}" -le 32 ] || die "$argument nodes are too many for one machine (32)"
    case $workers in *[!0-9]* | 0?*) die "--workers takes a number, not $workers" ;; esac
    [ -z "$workers" ] || [ "$workers" -lt "${argument:-3}" ] || [ -f "$settings" ] ||
        die "$workers workers of ${argument:-3} nodes: at least one must be a voter"
    local fresh=no
    [ -d "$state" ] || fresh=yes
    mkdir -p "$state"
    lock
    if load; then
        [ -z "$argument" ] || [ "$argument" -ge "$size" ] || die "the cluster has $size nodes; it can grow, not shrink"
        [ -n "$voters" ] || [ "${workers:-0}" = 0 ] || die "the cluster has no workers; take it down first"
        [ -z "$workers" ] || [ -z "$voters" ] || [ $((${argument:-$size} - workers)) = "$voters" ] ||
            die "the cluster has $voters voters, and grows by workers; take it down first, or use another --state"
        size=${argument:-$size}
    else
        size=${argument:-3} voters="" base=${base:-127.0.0.} port=${port:-7220} cpus=${cpus:-2} memory=${memory:-2GiB} tls=${tls:-off}
        [ -z "$(ls -A "$state")" ] || die "$state is not empty and holds no cluster of mine"
        made=$fresh # `down` removes only what we made
        if [ "${workers:-0}" -gt 0 ]; then voters=$((size - workers)); fi
        speak
    fi
    save
    for name in $(names); do
        if [ -n "$(daemon "$name")" ]; then continue; fi
        if [ -e "$state/$name" ]; then old+=("$name"); else new+=("$name"); fi
    done
    if [ ${#new[@]} -eq 0 ] && [ ${#old[@]} -eq 0 ]; then
        await_all
        say "$size nodes are up (state in $state)"
        return
    fi
    # Nodes with a past come first, and together: etcd may need several of them before any of them can answer.
    for name in "${old[@]}"; do
        say "starting $name again at $(address "$name")"
        start_node "$name"
    done
    for name in "${new[@]}"; do
        # A cluster begins with one node; it must answer before others can join it.
        if [ "$name" = n2 ]; then await_first; fi
        say "starting $name at $(address "$name")"
        start_node "$name"
    done
    await_all
    say "$size nodes are up after $((SECONDS - began)) s (state in $state)"
}

status() {
    local name pid
    need_cluster
    echo "state: $state"
    for name in $(names); do
        pid=$(daemon "$name" || true)
        printf '%-4s %-18s daemon %-8s shim %s\n' "$name" "$(address "$name")" "${pid:-down}" "$(shim "$name" || echo down)"
    done
    echo
    node_list || {
        echo "no node answers"
        return 1
    }
}

down() {
    local name pids=()
    if ! load; then
        say "no cluster in $state"
        return
    fi
    lock
    for name in $(names); do
        stop_node "$name" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || true; done
    for name in $(names); do gone "$name" || die "$name is still running; see $state/$name.log"; done
    for name in $(names); do remove_cgroups "$name"; done
    for name in $(names); do rm -rf "${state:?}/$name" "$state/$name".{log,pid,token}; done
    rm -rf "${state:?}/demo" "$settings"
    if [ "$made" = yes ]; then rmdir "$state" 2>/dev/null || say "$state holds things of yours and stays"; fi
    say "$size nodes are down"
}

case $command in
    up) up ;;
    status) status ;;
    down) down ;;
    demo)
        need_cluster
        SPINETTA_NODE=$(addresses) exec "$bin/python" "$root/examples/variants/demo.py" --work "$state/demo" "${words[@]:1}"
        ;;
    logs)
        need_cluster
        check_name
        exec tail -n 100 -F "$state/$argument.log"
        ;;
    kill)
        need_cluster
        check_name
        lock
        ! gone "$argument" || die "$argument is not running"
        kill_node "$argument"
        say "$argument is dead; its tasks go back to the queue when the cluster is sure of it"
        ;;
    start)
        need_cluster
        check_name
        lock
        [ -z "$(daemon "$argument")" ] || {
            say "$argument is running"
            exit 0
        }
        start_node "$argument"
        await_ready "$argument"
        say "$argument is up"
        ;;
    env)
        need_cluster
        echo "export SPINETTA_NODE=$(addresses)"
        printf 'export SPINETTA_CREDENTIALS=%q\n' "$SPINETTA_CREDENTIALS"
        echo "export PATH=$bin:\$PATH"
        ;;
    *) die "no command $command (--help lists them)" ;;
esac
