#!/usr/bin/env bash
# Set up for development (scripts/setup.sh --dev) and run checks and tests.
#
#   scripts/test.sh                    everything, as CI does
#   scripts/test.sh lint               generated code in step, ruff, mypy, import-linter, shellcheck
#   scripts/test.sh unit [ARGS…]       pure modules; seconds
#   scripts/test.sh sim [ARGS…]        many nodes in a simulated world
#   scripts/test.sh contract [ARGS…]   the same tests against models and the real thing
#   scripts/test.sh attacks [ARGS…]    what must not work, tried against a secured cluster
#   scripts/test.sh cluster [ARGS…]    real nodes on this machine
#   scripts/test.sh machines [ARGS…]   the same tests in machines with other control groups (SPINETTA_MACHINES=all: many more)
#   scripts/test.sh demo               the demonstration on a cluster of its own, as processes and in containers
#
# ARGS go to pytest. Several names may follow each other. Root (or a machine that lets you use cgroups and PID
# namespaces) is needed for all of contract, attacks, cluster and machines; without, the tests that need it are skipped and say so.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
export SPINETTA_VENV=${SPINETTA_VENV:-$root/.venv}
bin=$SPINETTA_VENV/bin
names="lint unit sim contract attacks cluster machines demo"
section_limit_s=3600 # none takes half of it; past it something hangs

reports=$(mktemp -d "${TMPDIR:-/tmp}/spinetta-test.XXXXXX")
trap 'rm -rf "$reports"' EXIT
failed=()
table=()

# section NAME COMMAND…: a heading, the command, its time and how it ended.
section() {
    local name=$1 started=$SECONDS status=0
    shift
    printf '\n=== %s ===\n' "$name"
    # On a terminal in the foreground, so that Ctrl-C reaches the tests; else with its whole process group.
    local foreground=()
    if [ -t 0 ]; then foreground=(--foreground); fi
    timeout "${foreground[@]}" --kill-after=30 "$section_limit_s" "$@" || status=$?
    local verdict=ok
    if [ "$status" -ne 0 ]; then
        verdict="FAILED ($status)"
        failed+=("$name")
    fi
    table+=("$(printf '%-27s %6d s  %s' "$name" $((SECONDS - started)) "$verdict")")
}

lint() {
    section "generated code" "$bin/python" scripts/genproto.py --check
    section "ruff check" "$bin/ruff" check .
    section "ruff format" "$bin/ruff" format --check .
    section "mypy" "$bin/mypy"
    section "import-linter" "$bin/lint-imports" --no-cache
    local scripts
    mapfile -t scripts < <(git ls-files -z '*.sh' .ci/run | tr '\0' '\n')
    section "shellcheck" shellcheck "${scripts[@]}"
}

# layer NAME ARGS…: one layer of tests; its numbers go to the total.
layer() {
    local name=$1
    shift
    section "$name tests" "$bin/python" -m pytest "tests/$name" --junitxml "$reports/$name.xml" "$@"
}

demo() {
    # A state directory and addresses of its own, so that a cluster of the developer's is not in the way.
    local state
    state=$(mktemp -d "${TMPDIR:-/tmp}/spinetta-demo.XXXXXX")
    local own=(--once --state "$state/cluster" --base "127.$((RANDOM % 200 + 20)).$((RANDOM % 250 + 1)).")
    section "demonstration" scripts/demo.sh "${own[@]}"
    section "demonstration in containers" scripts/demo.sh --containers "${own[@]}"
    rm -rf "$state"
}

total() {
    "$bin/python" - "$reports" <<'PYTHON'
import pathlib, sys, xml.etree.ElementTree as xml
count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
reports = sorted(pathlib.Path(sys.argv[1]).glob("*.xml"))
for report in reports:
    for suite in xml.parse(report).getroot().iter("testsuite"):
        for name in count:
            count[name] += int(suite.get(name, 0))
bad = count["failures"] + count["errors"]
if reports:
    print(f"total: {count['tests'] - bad - count['skipped']} passed, {bad} failed, {count['skipped']} skipped")
PYTHON
}

case ${1:-} in -h | --help)
    sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

wanted=()
while [ $# -gt 0 ] && [[ " $names all " == *" $1 "* ]]; do
    if [ "$1" = all ]; then wanted=(); else wanted+=("$1"); fi
    shift
done
if [ ${#wanted[@]} -eq 0 ]; then
    [ $# -eq 0 ] || { echo "test.sh: no part $1; there are: $names" >&2 && exit 2; }
    read -ra wanted <<<"lint demo unit sim contract attacks machines cluster"
fi

scripts/setup.sh --dev || exit 1
cores=$(nproc)
for part in "${wanted[@]}"; do
    case $part in
        lint) lint ;;
        demo) demo ;;
        # Spread over the cores where nothing is timed; real nodes get the machine to themselves.
        unit | sim | contract | attacks | machines) layer "$part" --numprocesses "$cores" "$@" ;;
        cluster) layer cluster "$@" ;;
        *) echo "test.sh: $part is listed and does nothing" >&2 && exit 2 ;;
    esac
done

printf '\n=== summary ===\n'
printf '%s\n' "${table[@]}"
total
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[*]}"
    exit 1
fi
