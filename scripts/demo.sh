#!/usr/bin/env bash
# From a fresh Debian 12 machine to a result: set up, start three nodes, run the demonstration on them.
#
#   scripts/demo.sh                 leaves the cluster running, for you to try things on
#   scripts/demo.sh --once          stops it again afterwards
#   scripts/demo.sh --containers    its tasks run in containers, of an image made of this machine's programs
#   scripts/demo.sh --state DIR …   further options go to scripts/devcluster.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
once=""
containers=""
state=${SPINETTA_DEVCLUSTER:-$PWD/.devcluster}
options=()
again=scripts/devcluster.sh # with the option that it does not remember itself
while [ $# -gt 0 ]; do
    case $1 in
        --once) once=yes ;;
        --containers) containers=yes ;;
        --state)
            state=${2:?--state needs a directory}
            options+=(--state "$state")
            again+=" --state $(printf '%q' "$2")"
            shift
            ;;
        -h | --help)
            sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) options+=("$1") ;;
    esac
    shift
done
devcluster() { "$root/scripts/devcluster.sh" "${options[@]}" "$@"; }

began=$SECONDS
"$root/scripts/setup.sh"
if [ -n "$once" ]; then trap 'devcluster down' EXIT; fi
demo=()
if [ -n "$containers" ]; then
    # What tasks in containers may see of a node is its administrator's to say: here the work directory, the steps and
    # the reads.
    files=$(realpath --canonicalize-missing "$state/demo")
    reads=$(realpath --canonicalize-missing /usr/share/doc/bowtie2/examples)
    options+=(--allow "mount-rw:$files,mount:$root/examples,mount:$reads")
fi
devcluster up
echo
if [ -n "$containers" ]; then
    mkdir -p "$files"
    "$root/scripts/demo-image.sh" "$files/image.tar"
    eval "$(devcluster env)"
    while read -r node; do
        spinetta image import "$files/image.tar" --name variants:demo --on "$node" </dev/null
    done < <(spinetta node list --json |
        python -c 'import json, sys; print(*(n["name"] for n in json.load(sys.stdin)["nodes"]), sep="\n")')
    demo=(--image variants:demo)
fi
devcluster demo "${demo[@]}"
echo
echo "all of it took $((SECONDS - began)) s"
if [ -z "$once" ]; then
    cat <<NEXT

The cluster is still running. To go on with it:
  eval "\$($again env)"
  spinetta node list
  spinetta submit --follow -- echo hello
and to stop it and remove what it left:
  $again down
NEXT
fi
