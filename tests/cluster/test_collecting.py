"""Three real nodes that collect finished tasks, and the leader killed in the middle of it: each task is found once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster, eventually, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

KEEP = 20
TASKS = 150
OPTIONS = (
    "--lease-ttl", "3s", "--grace", "8s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB",
    "--reconcile", "1s", "--collect-keep", str(KEEP), "--collect-after", "0s",
)  # fmt: skip


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path, 3, *OPTIONS) as cluster:
        cluster.wait_voters(3)
        yield cluster


def submit(cluster: Cluster, count: int, node: int = 0) -> list[str]:
    lines = [json.dumps({"command": ["true"], "cpus": 0.1, "name": f"t{i}"}) for i in range(count)]
    done = cluster.cli("submit", "--json", "--file", "-", "--format", "jsonl", stdin="\n".join(lines), node=node)
    return [str(t["id"]) for t in json.loads(done.stdout)["tasks"]]


def ids(cluster: Cluster, *options: str, node: int) -> list[str]:
    return [t["id"] for t in cluster.json("list", "--limit", "0", *options, node=node)["tasks"]]


def test_each_task_is_found_once_when_the_leader_dies_while_it_collects(trio: Cluster) -> None:
    tasks = submit(trio, TASKS)
    eventually(
        lambda: trio.etcdctl("get", "--prefix", "/archive/", "--keys-only").strip(),
        within_s=60, what=f"something is collected\n{trio.tails()}",
    )  # fmt: skip
    leader = next(n["name"] for n in trio.json("node", "list")["nodes"] if n["leader"])
    dead = next(i for i, n in enumerate(trio.nodes) if n.name == leader)
    alive = next(i for i in range(3) if i != dead)
    trio.nodes[dead].crash()
    tasks += submit(trio, KEEP, node=alive)

    def settled() -> bool:
        listed = trio.cli("list", "--limit", "0", "--json", node=alive, check=False)
        states = [t["state"] for t in json.loads(listed.stdout).get("tasks", ())] if listed.returncode == 0 else [""]
        return len(states) == KEEP and set(states) == {"complete"}

    eventually(settled, within_s=120, every_s=1.0, what=f"the next leader goes on\n{trio.tails()}")
    answer = trio.json("list", "--archived", "--limit", "0", node=alive)
    said = trio.cli("list", "--archived", node=alive)
    if leader in answer["silent"]:
        assert f"warning: the archive of node {leader} is not in this list" in said.stderr
    trio.nodes[dead].start(trio.peers_of(trio.nodes[dead]))
    trio.wait_ready(node=alive)
    stored, archived = ids(trio, node=alive), ids(trio, "--archived", node=dead)
    assert len(stored) == KEEP
    assert sorted(stored + archived) == sorted(tasks)
    assert trio.json("list", "--archived", node=dead)["silent"] == {}
    gone = trio.cli("status", archived[0], node=alive, check=False)
    assert gone.returncode != 0
    assert "spinetta list --archived" in gone.stderr
    table = trio.cli("list", "--archived", "--name", "t0", "--outcome", "succeeded", "--since", "1h", node=alive)
    assert len(table.stdout.splitlines()) in (2, 3)
