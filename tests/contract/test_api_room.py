"""Submits while the store is nearly full, and calls while there is none, at a real server."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest

from spinetta.node.health import StoreHealth
from spinetta.node.services.server import serve
from spinetta.store.etcd import EtcdStore
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from tests.contract.api_world import Etcd, HandNode, etcd, etcd_member, failure, new_id, run, spec

__all__ = ["etcd", "etcd_member"]

pytestmark = pytest.mark.contract

MIB = 1 << 20


def test_nothing_new_is_taken_near_the_quota_and_what_is_there_is_told(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = EtcdStore([etcd.endpoint])
        health = StoreHealth(store.connections, 1 << 40, lambda: "abc")
        port = HandNode("a", store, tmp_path)
        async with (
            serve(port, ["127.0.0.1:0"], store_health=health) as server,
            grpc.aio.insecure_channel(server.addresses[0]) as channel,
        ):
            stub: rpc.SpinettaAsyncStub = rpc.SpinettaStub(channel)
            await health.glance()
            there, new = spec(new_id()), spec(new_id())
            await stub.Submit(api.SubmitRequest(tasks=[there]))
            health.quota_bytes = 1  # whatever is in it is too much
            failed = await failure(stub.Submit(api.SubmitRequest(tasks=[new])))
            assert (failed.code, failed.detail.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "store-full")
            assert "nothing was submitted" in failed.detail.message
            assert "etcd_quota" in failed.detail.hint
            failed = await failure(stub.Submit(api.SubmitRequest(tasks=[there, new])))
            assert failed.detail.reason == "store-full"
            again = await stub.Submit(api.SubmitRequest(tasks=[there]))
            assert [t.existed for t in again.tasks] == [True]
            found = await stub.Get(api.GetRequest(ids=[there.id]))
            assert len(found.tasks) == 1
            await stub.Cancel(api.CancelRequest(ids=[there.id]))
            described = await stub.DescribeCluster(api.DescribeClusterRequest())
            assert described.has_majority
            assert described.voters[0].healthy
            assert described.voters[0].db_in_use_bytes > 0
            assert "nothing can be submitted" in described.notices[0]
            nodes = await stub.ListNodes(api.ListNodesRequest())
            assert described.notices[0].split(":")[1] in " ".join(nodes.notices)
            health.quota_bytes = 1 << 40
            await stub.Submit(api.SubmitRequest(tasks=[new]))
        await store.close()

    run(scenario())
