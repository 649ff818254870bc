#!/usr/bin/env bash
# From a fresh Debian 12 machine to a result: set up, start three nodes, run the demonstration on them.
#
#   scripts/demo.sh                 leaves the cluster running, for you to try things on
#   scripts/demo.sh --once          stops it again afterwards
#   scripts/demo.sh --state DIR …   further options go to scripts/devcluster.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
once=""
options=()
again=scripts/devcluster.sh # with the option that it does not remember itself
while [ $# -gt 0 ]; do
    case $1 in
        --once) once=yes ;;
        --state)
            options+=(--state "${2:?--state needs a directory}")
            again+=" --state $(printf '%q' "$2")"
            shift
            ;;
        -h | --help)
            sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
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
devcluster up
echo
devcluster demo
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
