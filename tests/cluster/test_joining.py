"""Joining, refusals to join, seats of voters, leaving: on real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinetta.errors import UserError
from spinetta.node.join import introduce
from spinetta.trust.certificates import CLOCK_SKEW_MAX_S
from spinetta.trust.dial import Dialer
from tests.cluster.harness import API_PORT, CLIENT_PORT, Cluster, Node, alive, eventually, free_base, running_cluster
from tests.cluster.history import check_history

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUICK = ("--lease-ttl", "3s", "--grace", "8s", "--kill-margin", "2s", "--cpus", "2", "--memory", "1GiB")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("single"), 1, *QUICK) as cluster:
        yield cluster


def refused(node: Node, peers: list[str], **env: str) -> tuple[int, str]:
    """Start a node that must not come up; its exit code and what it said."""
    node.start(peers, env)
    assert node.process is not None
    code = node.process.wait(60)
    said = node.log.read_text()
    assert "Traceback" not in said, said
    assert node.shim_pid() is None, "a refused node leaves no shim behind"
    return code, said


def test_a_name_that_is_alive_is_refused(single: Cluster) -> None:
    twin = single.add(name="twin", start=False)
    twin.name = "n1"
    code, said = refused(twin, [single.nodes[0].address])
    assert code == 2
    assert "a node named n1 is alive in this cluster" in said
    assert "--name" in said
    single.nodes.remove(twin)


def test_an_unreachable_peer_is_named(single: Cluster, tmp_path: Path) -> None:
    base = free_base(2)
    node = Node("lost", f"{base}1", tmp_path / "lost", tmp_path / "lost.log", QUICK)
    code, said = refused(node, [f"{base}2:{API_PORT}"])
    assert code == 2
    assert f"no peer can be reached: {base}2:{API_PORT}" in said
    assert not (node.data_dir / "identity.json").exists(), "a node that could not join may be given another name"


def test_something_else_at_the_peers_address_is_recognised(single: Cluster, tmp_path: Path) -> None:
    base = free_base(2)
    node = Node("lost", f"{base}1", tmp_path / "lost", tmp_path / "lost.log", QUICK)
    code, said = refused(node, [f"{single.nodes[0].host}:{CLIENT_PORT}"])  # etcd
    assert code == 2
    assert "no node of Spinetta" in said


@pytest.mark.parametrize("port", [API_PORT, CLIENT_PORT])
def test_a_port_in_use_is_named(tmp_path: Path, port: int) -> None:
    base = free_base(1)
    node = Node("busy", f"{base}1", tmp_path / "busy", tmp_path / "busy.log", QUICK)
    with socket.socket() as taken:
        taken.bind((f"{base}1", port))
        taken.listen()
        code, said = refused(node, [])
    assert code == 2
    assert f"cannot listen on {base}1:{port}" in said
    node.stop()


def test_a_data_directory_in_use_is_refused(single: Cluster) -> None:
    first = single.nodes[0]
    second = Node("n9", f"{single.base}3", first.data_dir, first.log.with_name("second.log"), QUICK)
    second.start()
    assert second.process is not None
    assert second.process.wait(60) == 2
    said = second.log.read_text()
    assert "a daemon runs on" in said


def test_a_data_directory_of_another_node_or_cluster_is_refused(single: Cluster, tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1, *QUICK) as other:
        founder = other.nodes[0]
        worker = other.add("--candidate", "no")
        other.wait_ready()
        worker.stop()
        code, said = refused(worker, [single.nodes[0].address])
        assert code == 2
        assert "data directory belongs to cluster" in said
        worker.name = "someone"
        code, said = refused(worker, [founder.address])
        assert code == 2
        assert "belongs to node n2, not someone" in said


def test_clocks_that_are_apart_are_refused(single: Cluster) -> None:
    late_ms = int((time.time() + CLOCK_SKEW_MAX_S + 60) * 1000)
    with pytest.raises(UserError, match=r"this machine's clock and that of n1 .* are 1m\d+s apart|NTP"):
        asyncio.run(
            introduce([single.nodes[0].address], name="new", returning=False, wall_ms=late_ms, dialer=Dialer.open())
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--etcd-program", "no-etcd-of-this-name"), "etcd-server"),
        (("--runtimes", "container", "--container-program", "/nowhere/runc"), "spinetta doctor"),
    ],
)
def test_a_missing_program_is_named_with_what_to_do(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    base = free_base(1)
    node = Node("bare", f"{base}1", tmp_path / "bare", tmp_path / "bare.log", (*QUICK, *options))
    code, said = refused(node, [])
    assert code == 2
    assert says in said
    node.stop()


def test_without_what_runs_containers_a_node_runs_processes(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1, *QUICK, "--container-program", "/nowhere/runc") as cluster:
        (node,) = cluster.json("node", "list")["nodes"]
        assert node["allows"] == ["process"]
        assert any("no containers here" in words for words in node["warnings"])
        cluster.cli("submit", "--wait", "--", "true")


def test_an_etcd_that_corrupts_data_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\necho 'etcd Version: 3.5.1'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    base = free_base(1)
    node = Node("old", f"{base}1", tmp_path / "old", tmp_path / "old.log", (*QUICK, "--etcd-program", str(program)))
    code, said = refused(node, [])
    assert code == 2
    assert "etcd 3.5.1 corrupts data" in said
    node.stop()


def test_a_wiped_member_is_never_started_empty(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1, *QUICK) as cluster:
        node = cluster.nodes[0]
        node.crash()
        shutil.rmtree(node.data_dir / "etcd")
        code, said = refused(node, [])
        assert code == 2
        assert "its data is gone" in said
        assert "could lose what the cluster has committed" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--tls", "off"), "is off loopback, where plain text is not spoken"), ((), "the address is not of this machine")],
    ids=["plain text", "secured"],
)
def test_an_address_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    far = "192.0.2.7"  # of a network for documentation (RFC 5737): no machine has it
    node = Node("far", far, tmp_path / "far", tmp_path / "far.log", (*QUICK, *options))
    code, said = refused(node, [])
    assert code == 2
    assert says in said


def test_two_clusters_begun_at_one_address_are_told_apart(tmp_path: Path) -> None:
    """Same name, same address, one after the other: the data of the first is not that of the second."""
    base = free_base(1)
    first = Node("n1", f"{base}1", tmp_path / "first", tmp_path / "first.log", QUICK)
    second = Node("n1", f"{base}1", tmp_path / "second", tmp_path / "second.log", QUICK)
    ids = []
    for node in (first, second):
        cluster = Cluster(tmp_path, base, QUICK, [node])
        node.start()
        try:
            cluster.wait_ready()
            ids.append(json.loads((node.data_dir / "identity.json").read_text())["cluster_id"])
        finally:
            node.stop()
    assert ids[0] != ids[1]
    shutil.rmtree(first.data_dir / "etcd")
    shutil.copytree(second.data_dir / "etcd", first.data_dir / "etcd")
    code, said = refused(first, [])
    assert code == 2
    assert f"holds the data of cluster {ids[1]}" in said


def test_one_three_voters_a_worker_and_leaving(tmp_path: Path) -> None:
    """Never resting at two: the second node waits for the third, the fourth takes over the seat of one that leaves."""
    with running_cluster(tmp_path, 2, *QUICK) as cluster:
        cluster.wait_voters(1)
        cluster.add()
        cluster.wait_ready()
        cluster.wait_voters(3)
        worker = cluster.add("--candidate", "no")
        cluster.wait_ready()
        task = json.loads(cluster.cli("submit", "--json", "--", "true", node=3).stdout)["tasks"][0]["id"]
        cluster.cli("wait", task, node=3)
        cluster.add()
        cluster.wait_ready()
        leaver = cluster.nodes[1]
        cluster.cli("node", "leave", leaver.name, node=0, timeout_s=120)
        assert leaver.process is not None
        assert leaver.process.wait(30) == 0
        listed = {n["name"]: n for n in cluster.json("node", "list", node=0)["nodes"]}
        assert leaver.name not in listed
        assert sorted(n for n in listed if listed[n]["voter"]) == ["n1", "n3", "n5"]
        assert not listed[worker.name]["voter"]
        assert leaver.shim_pid() is None
        check_history(f"http://{cluster.nodes[0].host}:{CLIENT_PORT}")


def test_a_stopped_node_leaves_nothing_running(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1, *QUICK) as cluster:
        node = cluster.nodes[0]
        cluster.cli("submit", "--", "sleep", "1000")
        eventually(
            lambda: cluster.json("list", "--limit", "0")["tasks"][0]["state"] == "running", within_s=60, what="it runs"
        )
        shim = node.shim_pid()
        assert shim is not None
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGINT)
        assert node.process.wait(40) == 0
        eventually(lambda: not alive(shim), within_s=60, what="the shim ends")
        node.start()
        cluster.wait_ready()
        again = cluster.json("list", "--limit", "0")["tasks"][0]
        assert again["state"] in ("queued", "running")
        assert again["attempts"][0]["reason"] == "released"


def test_a_node_whose_disk_is_full_leaves_the_tasks_to_others(tmp_path: Path) -> None:
    """It cannot start anything; the tasks neither fail nor wait for it."""
    with running_cluster(tmp_path, 1, *QUICK) as cluster:
        small = tmp_path / "n2"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "spinetta-test", str(small)], check=True)
        try:
            cluster.add("--candidate", "no")
            cluster.wait_ready()
            with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * 4096)
            tasks = [
                json.loads(cluster.cli("submit", "--json", "--cpus", "0.1", "--", "true").stdout)["tasks"][0]["id"]
                for _ in range(12)
            ]
            cluster.cli("wait", *tasks, timeout_s=90)
            ended = cluster.json("status", *tasks)["tasks"]
            assert {t["outcome"] for t in ended} == {"succeeded"}
            tried = [a for t in ended for a in t["attempts"] if a["node"] == "n2"]
            assert tried, "the full node took some"
            assert {a["reason"] for a in tried} == {"node-unfit"}
            cluster.nodes[1].stop()
        finally:
            subprocess.run(["umount", "-l", str(small)], check=True)
