#!/usr/bin/env bash
# Write docs/inspecting.md: start a cluster, give it a few tasks, and show what etcd holds, as printed.
#
#   scripts/doc-etcdctl.sh > docs/inspecting.md
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parent=$(mktemp -d "${TMPDIR:-/tmp}/spinetta-doc.XXXXXX")
devcluster() { "$root/scripts/devcluster.sh" --state "$parent/cluster" "$@"; }
secured() { "$root/scripts/devcluster.sh" --state "$parent/secured" "$@"; }
finish() {
    devcluster down >&2 || true
    secured down >&2 || true
    rm -rf "$parent"
}
trap finish EXIT

devcluster --base 127.0.42. --port 7220 up 3 >&2
eval "$(devcluster env)"

# show COMMAND: the command and what it prints, as a terminal would.
show() {
    printf '\n```\n$ %s\n' "$1"
    bash -c "$1"
    printf '```\n'
}
# text LINE…: a paragraph.
text() { printf '\n' && printf '%s\n' "$@"; }

spinetta submit --name hello --wait -- echo hello >&2
spinetta submit --name failing --wait -- sh -c 'exit 3' >&2 || true
running=$(spinetta submit --name sleeper --cpus 1 --memory 64MiB -- sleep 600)
waiting=$(spinetta submit --name picky --tag gpu-node --priority 5 -- nvidia-smi)
limit=$((SECONDS + 30))
until spinetta list --state running | grep -q sleeper; do
    [ $SECONDS -lt $limit ] || { echo "the task does not start" >&2 && exit 1; }
    sleep 0.1 # between two looks
done
holder=$(spinetta list --state running --json | python3 -c '
import json, sys
for line in sys.stdin:
    document = json.loads(line)
    for task in document.get("tasks", [document]):
        print(task["node"])' | head -n 1)

cat <<'TEXT'
# Looking inside

Everything that the cluster knows is in etcd, under a few prefixes. [ARCHITECTURE.md](../ARCHITECTURE.md) lists them; here is what
they look like in a cluster of three nodes on which one task has succeeded, one has failed, one runs and one waits. This page is
written by `scripts/doc-etcdctl.sh`, which starts such a cluster and prints what it sees.

Reading is always safe. Never write: the cluster's own writes are guarded, yours would not be.

`spinetta etcdctl` is `etcdctl` with the right endpoints, which it asks a node for. What it takes in a
[secured cluster](#a-secured-cluster), and what there is more to see, is at the end.

## The queue

What waits for a node, in the order of submission (the ids are UUIDs of version 7, which begin with the time):
TEXT
show "spinetta etcdctl get --prefix /status/queued/ --keys-only"
text "The value is a hint: the part of the specification that nodes need to decide whether they may run it." \
    "\`spinetta decode\` shows it, and every other value, as JSON:"
show "spinetta decode /status/queued/$waiting"
text "## What runs, and where"
show "spinetta etcdctl get --prefix /status/running/ --keys-only"
show "spinetta decode /status/running/$holder/$running"
text "The key's *create revision* is the attempt's token: a result counts only under the token it was made under."
show "spinetta etcdctl get /status/running/$holder/$running -w fields | grep -v Value"
text "## What is over"
show "spinetta etcdctl get --prefix /status/complete/ --keys-only"
text "## A task's record"
text "It is the same key from submission to the end; its states and attempts are in the value."
show "spinetta etcdctl get --prefix /task/ --keys-only"
show "spinetta decode /task/$running | python3 -m json.tool"
text "Many at once, one line each, from etcdctl's own JSON:"
show "spinetta etcdctl get --prefix /status/running/ -w json | spinetta decode"
text "## Nodes"
text "Under a lease, so that they vanish with their node:"
show "spinetta etcdctl get --prefix /node/ --keys-only"
show "spinetta decode /node/n1 | python3 -m json.tool"
text "The life-or-death record, which stays until the leader has taken care of all that the node held:"
show "spinetta etcdctl get --prefix /incarnation/ --keys-only"
show "spinetta decode /incarnation/n1"
text "Heartbeats have no value; their revision says that they go on. The leader's office, under a lease of its own:"
show "spinetta etcdctl get --prefix /beat/ --keys-only"
show "spinetta decode /leader/office"
text "## All keys"
show "spinetta etcdctl get --prefix / --keys-only | grep . | sed -E 's,/[0-9a-f]{8}-[0-9a-f-]{27}$,/UUID,' | sort | uniq -c"
text "## etcd itself"
show "spinetta etcdctl member list -w table"
show "spinetta etcdctl endpoint status -w table"
text "## What happened to a task"
text "etcd keeps at least the last hour of history, and a watch can begin in the past. Here are the keys that the task which" \
    "failed has had, one line for each put and each delete. The tests' checker replays a cluster's history in this way."
failed=$(spinetta list --outcome failed -q)
show "timeout 2 spinetta etcdctl watch --rev=1 --prefix /status/ | grep -a $failed"

# --- a secured cluster -------------------------------------------------------------------------------------------

devcluster down >&2
secured --tls --workers 1 --base 127.0.43. --port 7220 up 2 >&2
eval "$(secured env)"
export SPINETTA_DATA_DIR=$parent/secured/n1
label=patient-data
spinetta user set admin --clearance $label >&2
spinetta node grant n2 --clearance $label >&2
limit=$((SECONDS + 30))
until [ "$(printf secret | spinetta secret set db-password --clearance $label 2>/dev/null)" ]; do
    [ $SECONDS -lt $limit ] || { echo "the label gets no key" >&2 && exit 1; }
    sleep 0.2 # between two tries; n2 makes the key
done
open=$(spinetta submit --name cohort-8 -- echo Karamazov)
sealed=$(spinetta submit --name cohort-7 --clearance $label --secret db-password --env PATIENT=Raskolnikov -- printenv PATIENT)
spinetta wait "$open" "$sealed" >&2
token=$(spinetta token list --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["tokens"][0]["id"])')

cat <<'TEXT'

## A secured cluster

What follows is from a second cluster, with one voter `n1`, one worker `n2`, and `n2` cleared for a label. There etcd asks for
a voter's certificate and is shown to nobody else: `spinetta etcdctl` and `spinetta decode` work on a voter's machine, for root or the
user of its node. They find the certificate in the node's data directory, which `--data-dir` or `SPINETTA_DATA_DIR` names if it is not
the usual one.
TEXT
show "spinetta etcdctl member list -w table"
show "spinetta etcdctl get --prefix / --keys-only | grep -E '^/(acl|trust|secret)/'"
text "Who may do what is under \`/acl/\`. A write for somebody is guarded by the revision of his record, so that rights that were" \
    "taken away meanwhile undo it:"
show "spinetta decode /acl/node/n2 | python3 -m json.tool"
show "spinetta decode /acl/user/admin"
text "Of a token there is a salt and a hash, not its secret:"
show "spinetta decode /acl/token/$token | python3 -m json.tool"
text "The certificate authorities' private keys (\`wraps\`: sealed once for each voter), and a label's (sealed for each cleared node):"
show "spinetta decode /trust/authority/cluster | python3 -m json.tool | cut -c1-128"
show "spinetta decode /trust/label/$label | python3 -m json.tool"
text "A secret, sealed where it was set:"
show "spinetta decode /secret/admin/db-password | python3 -m json.tool | cut -c1-128"
text "Of a task with a clearance label the record has that label, the owner, the resources, the names of its secrets and how it ended." \
    "Command, environment, working directory, name and other labels are in \`sealed\`, which only \`n2\` can open:"
show "spinetta decode /task/$sealed | python3 -m json.tool | cut -c1-128"
text "So neither etcd's files nor a copy of them show what it ran. Here two tasks have run: \`echo Karamazov\`, without a label, and" \
    "one with the label whose environment held the other name. How often is either in the files of the voter's etcd?"
show "strings -a \$(find \"\$SPINETTA_DATA_DIR/etcd\" -type f) | grep Karamazov | wc -l"
show "strings -a \$(find \"\$SPINETTA_DATA_DIR/etcd\" -type f) | grep Raskolnikov | wc -l"
