"""Garbage under our keys in a live cluster, put there as anybody with etcdctl can: the node goes on."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from spinetta import codec, keys, txn
from spinetta.access import MEMBERS
from spinetta.lifecycle import submitted
from spinetta.model import NodeId, QueueHint, TaskId, TaskSpec
from spinetta.node.keyring import KINDS
from spinetta.store.etcd import EtcdStore
from tests.cluster.harness import alive, eventually, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

GARBAGE = b"\xff\xff not a record"
NO_NAME = TaskId("..")  # neither a directory nor a cgroup can be called like this


def test_a_node_outlives_what_it_cannot_read(tmp_path: Path) -> None:
    spec = TaskSpec(NO_NAME, ("true",))
    record = codec.encode_task(submitted(spec, now_ms=1, at_node="by hand"))
    puts = (
        txn.Put(keys.task(NO_NAME), record),
        txn.Put(keys.queued(NO_NAME), codec.encode_hint(QueueHint.of(spec))),
        txn.Put(keys.task(TaskId("x")), GARBAGE),
        txn.Put(keys.queued(TaskId("x")), b""),
        txn.Put(keys.complete(TaskId("x")), GARBAGE),
        txn.Put(keys.RUNNING + "made-up", GARBAGE),
        txn.Put(keys.running(NodeId("nobody"), TaskId("x")), GARBAGE),
        txn.Put(keys.node(NodeId("nobody")), GARBAGE),
        txn.Put(keys.incarnation(NodeId("nobody")), GARBAGE),
    )

    async def write(endpoint: str) -> None:
        store = EtcdStore([endpoint])
        assert isinstance(await store.commit(txn.Txn(then=puts)), txn.Committed)
        await store.close()

    with running_cluster(tmp_path, 1, "--reconcile", "1s") as cluster:  # so that all is read again and again
        daemon = cluster.nodes[0].process
        assert daemon is not None
        asyncio.run(write(cluster.json("node", "list")["nodes"][0]["etcd_client_url"]))
        eventually(lambda: "nobody" in cluster.cli("node", "list").stdout, within_s=60, what="the made-up node")
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        eventually(
            lambda: cluster.etcdctl("get", "--keys-only", keys.complete(NO_NAME)).strip(),
            within_s=60,
            what="the end of a task that no node can start",
        )
        listed = cluster.json("list")["tasks"]
        assert {t["reason"] for t in listed} == {"exit", "spawn-failed"}
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        assert alive(daemon.pid)


def test_the_leader_mends_what_another_hand_has_spoilt(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1) as cluster:
        waiting = cluster.cli("submit", "--cpus", "1000", "--", "true").stdout.strip()  # more than there is
        done = cluster.cli("submit", "--wait", "--", "true").stdout.split()[0]
        cluster.etcdctl("del", keys.queued(TaskId(waiting)))
        cluster.etcdctl("del", keys.complete(TaskId(done)))
        nobodys = TaskId("01890a5d-ac96-774b-bcce-b302099a8057")
        cluster.etcdctl("put", "--", keys.queued(nobodys), "x")
        for key, there in (
            (keys.queued(TaskId(waiting)), True),
            (keys.complete(TaskId(done)), True),
            (keys.queued(nobodys), False),
        ):

            def is_mended(key: str = key, there: bool = there) -> bool:
                return (key in cluster.etcdctl("get", "--keys-only", key)) is there

            eventually(is_mended, within_s=90, what=f"{key} to be {'back' if there else 'gone'}")
        log = cluster.nodes[0].log.read_text(errors="replace")
        assert log.count("mending: ") == 3, log[-3000:]


def test_a_secured_node_outlives_rights_and_keys_that_it_cannot_read(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 2, "--lease-ttl", "3s", "--kill-margin", "2s", secured=True, workers=1) as cluster:
        voter, worker = cluster.nodes[0], cluster.nodes[1]
        daemons = [n.process.pid for n in (voter, worker) if n.process is not None]
        before = {n.name: len(n.log.read_text(errors="replace").splitlines()) for n in (voter, worker)}
        for key in (
            keys.ACL, keys.ACL_NODE, keys.ACL_USER + "eve", keys.ACL_GROUP + "g", keys.TOKEN + "t", keys.REQUEST + "r",
            keys.ACL_NODE + "n9", keys.NODE + "n9", keys.POLICY, keys.AUTHORITY, keys.LABEL + "phi", keys.LABEL,
            keys.SECRET + "ann/s", keys.SECRET, keys.LABEL + MEMBERS, *(keys.authority(kind) for kind in KINDS),
        ):  # fmt: skip
            cluster.etcdctl("put", "--", key, "\udcff\udcff not a record")
        # What needs none of these records works as before.
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        eventually(
            lambda: "cannot be read" in voter.log.read_text(errors="replace"), within_s=60, what="it is told in the log"
        )
        cluster.etcdctl("del", keys.POLICY)  # how it is mended
        cluster.cli("policy", "set", "--node-certificate", "30d")
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        assert all(alive(pid) for pid in daemons)
        for node in (voter, worker):
            lines = node.log.read_text(errors="replace").splitlines()[before[node.name] :]
            assert "Traceback" not in "\n".join(lines)
            told = Counter(line.partition(" spinetta")[2] for line in lines if "cannot be read" in line)
            assert all(n <= 2 for n in told.values()), told


def test_nodes_whose_own_rights_cannot_be_read_wait_for_them(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 2, "--lease-ttl", "3s", "--kill-margin", "2s", secured=True, workers=1) as cluster:
        daemons = [n.process.pid for n in cluster.nodes if n.process is not None]
        for name in ("n1", "n2"):
            cluster.etcdctl("put", "--", keys.acl_node(NodeId(name)), "\udcff\udcff not a record")
        task = cluster.cli("submit", "--", "true").stdout.strip()
        assert cluster.cli("wait", "--timeout", "8s", task, check=False).returncode != 0
        assert cluster.etcdctl("get", "--prefix", "--keys-only", keys.COMPLETE).strip() == ""
        assert all(alive(pid) for pid in daemons)
        for node in cluster.nodes:
            text = node.log.read_text(errors="replace")
            assert "Traceback" not in text, text[-3000:]
            assert len(text.splitlines()) < 200
