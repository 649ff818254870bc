"""Garbage under our keys in a live cluster, put there as anybody with etcdctl can: the node goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from spinetta import codec, keys, txn
from spinetta.lifecycle import submitted
from spinetta.model import NodeId, QueueHint, TaskId, TaskSpec
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
        eventually(lambda: "nobody" in cluster.cli("node", "list").stdout, within_s=10, what="the made-up node")
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        eventually(
            lambda: cluster.etcdctl("get", "--keys-only", keys.complete(NO_NAME)).strip(),
            within_s=20,
            what="the end of a task that no node can start",
        )
        listed = cluster.json("list")["tasks"]
        assert {t["reason"] for t in listed} == {"exit", "spawn-failed"}
        assert cluster.cli("submit", "--wait", "--", "true").returncode == 0
        assert alive(daemon.pid)
