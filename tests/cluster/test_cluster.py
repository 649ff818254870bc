"""Three real nodes: what users see, and what must hold when parts of them die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta import keys
from spinetta.model import NodeId
from tests.cluster.harness import CLIENT_PORT, Cluster, eventually, running_cluster
from tests.cluster.history import check_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICK = ("--lease-ttl", "5s", "--grace", "8s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("trio"), 3, *QUICK) as cluster:
        cluster.wait_voters(3)
        yield cluster


def endpoint(cluster: Cluster, node: int = 0) -> str:
    return f"http://{cluster.nodes[node].host}:{CLIENT_PORT}"


def submit(cluster: Cluster, *argv: str, options: tuple[str, ...] = (), node: int = 0) -> str:
    done = cluster.cli("submit", "--json", *options, "--", *argv, node=node)
    return str(json.loads(done.stdout)["tasks"][0]["id"])


def states(cluster: Cluster, node: int = 0) -> dict[str, str]:
    listed = cluster.json("list", "--limit", "0", node=node)
    return {t["id"]: t["state"] for t in listed["tasks"]}


def test_submit_at_a_status_and_log_at_b_cancel_at_c(trio: Cluster) -> None:
    task = submit(trio, "sh", "-c", "echo begun; exec sleep 300", node=0)
    eventually(lambda: trio.json("status", task, node=1)["tasks"][0]["state"] == "running", within_s=60, what="it runs")
    follower = subprocess.Popen(
        [sys.executable, "-m", "spinetta.cli", "log", "-f", task],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "SPINETTA_NODE": trio.nodes[1].address},
    )  # fmt: skip
    assert follower.stdout is not None
    assert follower.stdout.readline() == "begun\n"
    trio.cli("cancel", task, node=2)
    out, err = follower.communicate(timeout=30)
    assert (out, err) == ("", "") or "cancelled" in err
    ended = trio.json("status", task, node=0)["tasks"][0]
    assert (ended["state"], ended["outcome"], ended["reason"]) == ("complete", "cancelled", "cancelled")


def test_exit_code_reason_and_usage_are_told_by_every_node(trio: Cluster) -> None:
    task = submit(trio, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert trio.cli("wait", task, node=1, check=False).returncode == 1
    for node in range(3):
        seen = trio.json("status", task, node=node)["tasks"][0]
        assert (seen["outcome"], seen["attempts"][-1]["exit_code"], seen["reason"]) == ("failed", 7, "exit")
        assert trio.cli("log", task, node=node).stdout == "out\n"
        assert trio.cli("log", "--stderr", task, node=node).stdout == "err\n"


def until(file: Path, code: int) -> list[str]:
    """A command that ends with this code once the file is there, however long the machine takes."""
    return ["sh", "-c", f"while [ ! -e '{file}' ]; do sleep 0.1; done; exit {code}"]


def test_tasks_spread_over_idle_nodes(trio: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    tasks = [submit(trio, *until(go, 0), options=("--cpus", "3")) for _ in range(3)]
    eventually(lambda: all(states(trio)[t] == "running" for t in tasks), within_s=60, what="all run")
    nodes = {t["node"] for t in trio.json("status", *tasks)["tasks"]}
    go.touch()
    trio.cli("wait", *tasks)
    assert nodes == {"n1", "n2", "n3"}


def test_a_daemon_restarted_under_running_tasks_loses_nothing(tmp_path: Path) -> None:
    # With a lease that three daemons which start at once on a busy machine keep: a node is given up after it.
    calm = ("--lease-ttl", "30s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "4", "--memory", "2GiB")
    with running_cluster(tmp_path, 3, *calm) as cluster:
        cluster.wait_voters(3)
        go = tmp_path / "go"
        lines = [json.dumps({"command": until(go, i), "cpus": 0.5}) for i in range(6)]
        submitted = cluster.cli("submit", "--json", "--file", "-", "--format", "jsonl", stdin="\n".join(lines))
        tasks = [t["id"] for t in json.loads(submitted.stdout)["tasks"]]
        eventually(lambda: all(states(cluster)[t] == "running" for t in tasks), within_s=60, what="all run")
        for node in cluster.nodes:
            node.kill_daemon()
        for node in cluster.nodes:
            node.start(cluster.peers_of(node))
        cluster.wait_ready()
        go.touch()
        cluster.cli("wait", *tasks, check=False)
        for i, seen in enumerate(cluster.json("status", *tasks)["tasks"]):
            assert len(seen["attempts"]) == 1, seen
            assert seen["attempts"][0]["exit_code"] == i
        check_history(endpoint(cluster))


def test_every_task_completes_once_though_a_node_dies_in_the_middle(trio: Cluster, tmp_path: Path) -> None:
    lines = [
        json.dumps({"command": ["sh", "-c", f"sleep 0.3; echo {i}"], "cpus": 1, "memory": "16MiB"}) for i in range(200)
    ]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(lines))
    submitted = json.loads(trio.cli("submit", "--json", "--file", str(file)).stdout)
    ids = [t["id"] for t in submitted["tasks"]]
    assert len(set(ids)) == 200
    victim = trio.nodes[2]

    def some_done() -> bool:
        mine = states(trio)
        return sum(mine[i] == "complete" for i in ids) >= 30

    eventually(some_done, within_s=60, what="30 tasks are done")
    victim.crash()
    trio.cli("wait", *ids, timeout_s=150)
    seen = {t["id"]: t for t in trio.json("status", *ids)["tasks"]}
    assert {seen[i]["outcome"] for i in ids} == {"succeeded"}
    checker = check_history(endpoint(trio))
    assert {checker.recorded[i] for i in ids} == {1}
    listed = {n["name"]: n for n in trio.json("node", "list")["nodes"]}
    assert (listed[victim.name]["status"], listed[victim.name]["voter"]) == ("lost", True)
    victim.start(trio.peers_of(victim))
    trio.wait_ready()


def test_a_word_that_a_node_is_dead_saves_the_wait(trio: Cluster, tmp_path: Path) -> None:
    """Its task may go without renewals for an hour; nobody waits for that when an administrator knows better."""
    victim, go = trio.nodes[2], tmp_path / "go"
    tasks = [submit(trio, *until(go, 0), options=("--cpus", "3", "--grace", "1h")) for _ in range(3)]
    eventually(lambda: all(states(trio)[t] == "running" for t in tasks), within_s=60, what="all run")
    alive = trio.cli("node", "confirm-dead", victim.name, "--yes", check=False)
    assert alive.returncode == 2
    assert f"node {victim.name} is alive" in alive.stderr

    def status() -> str:
        return str({n["name"]: n["status"] for n in trio.json("node", "list")["nodes"]}[victim.name])

    victim.crash()
    eventually(lambda: status() in ("lost", "condemned"), within_s=60, what="its lease has run out")
    assert json.loads(trio.cli("node", "confirm-dead", victim.name, "--yes", "--json").stdout)["running"] == 1
    go.touch()
    trio.cli("wait", *tasks)
    attempts = {len(t["attempts"]) for t in trio.json("status", *tasks)["tasks"]}
    assert attempts == {1, 2}
    check_history(endpoint(trio))
    victim.start(trio.peers_of(victim))
    trio.wait_ready()


def test_etcdctl_shows_the_schema_of_the_design(trio: Cluster) -> None:
    task = submit(trio, "sleep", "60", options=("--tag", "no-such-tag"))
    assert f"/status/queued/{task}" in trio.etcdctl("get", "--prefix", "/status/queued/", "--keys-only").split()
    via_cli = trio.cli("etcdctl", "get", "--prefix", "/task/", "--keys-only", node=1)
    assert f"/task/{task}" in via_cli.stdout.split()
    decoded = json.loads(trio.cli("decode", f"/task/{task}").stdout)
    assert decoded["spec"]["command"] == ["sleep", "60"]
    trio.cli("cancel", task)
    assert trio.etcdctl("get", "--prefix", "/status/complete/" + task, "--keys-only").split() == [
        f"/status/complete/{task}"
    ]


def test_drain_and_undrain(trio: Cluster) -> None:
    trio.cli("node", "drain", "n2", node=0)
    tasks = [submit(trio, "true", options=("--cpus", "0.1")) for _ in range(12)]
    trio.cli("wait", *tasks)
    assert "n2" not in {t["attempts"][-1]["node"] for t in trio.json("status", *tasks)["tasks"]}
    trio.cli("node", "undrain", "n2", node=2)
    listed = {n["name"]: n["status"] for n in trio.json("node", "list", node=1)["nodes"]}
    assert listed["n2"] == "ready"


def test_the_daemon_ends_on_sigterm_and_tasks_go_on(trio: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    task = submit(trio, *until(go, 5), options=("--cpus", "0.1", "--grace", "60s"))
    eventually(lambda: states(trio)[task] == "running", within_s=60, what="it runs")
    name = trio.json("status", task)["tasks"][0]["node"]
    node = next(n for n in trio.nodes if n.name == name)
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(60) == 0
    node.start(trio.peers_of(node))
    other = next(i for i, n in enumerate(trio.nodes) if n is not node)
    trio.wait_ready(node=other)
    go.touch()
    trio.cli("wait", task, node=other, check=False)
    seen = trio.json("status", task, node=other)["tasks"][0]
    assert (len(seen["attempts"]), seen["attempts"][0]["exit_code"]) == (1, 5)


def test_a_daemon_that_ended_in_order_may_be_away_for_longer_than_a_lease(tmp_path: Path) -> None:
    go = tmp_path / "go"
    options = ("--lease-ttl", "3s", "--grace", "60s", "--kill-margin", "2s", "--cpus", "2", "--memory", "1GiB")
    with running_cluster(tmp_path, 2, *options) as cluster:
        cluster.wait_ready(node=0)
        cluster.cli("node", "drain", "n1")
        task = submit(cluster, *until(go, 7), options=("--cpus", "0.1"))
        eventually(lambda: states(cluster)[task] == "running", within_s=60, what="it runs")
        node = cluster.nodes[1]
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(60) == 0
        away_s = time.monotonic()
        while time.monotonic() < away_s + 3 * 3.0:
            shown = cluster.etcdctl("get", "--prefix", "--keys-only", keys.NODE).split()
            assert keys.node(NodeId("n2")) in shown, f"given up after {time.monotonic() - away_s:.1f} s"
            time.sleep(0.5)  # between two looks
        node.start(cluster.peers_of(node))
        cluster.wait_ready(1, node=1)  # the other one is drained
        go.touch()
        cluster.cli("wait", task, check=False)
        seen = cluster.json("status", task)["tasks"][0]
        assert (len(seen["attempts"]), seen["attempts"][0]["exit_code"]) == (1, 7)
