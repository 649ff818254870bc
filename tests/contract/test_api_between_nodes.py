"""Secured nodes among each other: logs passed on or pointed to, workers that send people to voters."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta.access import NodeRole, UserRole
from spinetta.client import AsyncClient
from spinetta.trust.credentials import UserCredentials
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, announce, etcd, etcd_member, failure, run, spec
from tests.contract.rights_world import SecuredNode, all_of, log_request, sealed, secured

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


async def text_of(stream: Any) -> bytes:
    return b"".join([chunk.data for chunk in await all_of(stream)])


async def made_on(node: SecuredNode, task: pb.TaskSpec, by: SecuredNode) -> str:
    """A task that runs on a node, with a log there; an admin has submitted it."""
    await by.submit(task)
    await node.claim(task.id)
    node.write_log(task.id, b"out")
    return task.id


@pytest.mark.parametrize("role", NodeRole)
def test_a_voter_passes_on_logs_drains_and_leaves(etcd: Etcd, tmp_path: Path, role: NodeRole) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a, cluster.serving("b", role) as b:
            task = await made_on(b, spec(owner="ann"), a)
            ann, op = await cluster.user("ann"), await cluster.user("op", UserRole.OPERATOR)
            async with cluster.as_(a, ann) as hers, cluster.as_(a, op) as ops:
                assert await text_of(hers.Log(log_request(task))) == b"out"
                assert (await failure(hers.Drain(api.DrainRequest(node="b")))).code is DENIED
                await ops.Drain(api.DrainRequest(node="b"))
                await ops.Undrain(api.UndrainRequest(node="b"))
                assert b.port.draining == [True, False]
                assert (await all_of(ops.Leave(api.LeaveRequest(node="b"))))[-1].done
            assert ("drain", "node a", "drain b", "ok", 0) in b.port.audited
            assert ("drain", "user op", "drain b", "ok", 0) in a.port.audited

    run(scenario())


def test_who_answers_at_a_nodes_address_must_be_that_node(etcd: Etcd, tmp_path: Path) -> None:
    """A worker that has taken another's address is shown nothing and is not believed."""

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("evil", NodeRole.WORKER) as evil,
        ):
            await announce(cluster.store, "good", evil.address)
            failed = await failure(a.api.Drain(api.DrainRequest(node="good")))
            assert failed.detail.reason == "node-unreachable"
            assert evil.port.draining == []
            assert evil.port.audited == []

    run(scenario())


def test_peers_follow_a_renewed_certificate(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving("a") as a, cluster.serving("b") as b:
            task = await made_on(b, spec(), a)
            assert await text_of(a.read_log_raw(task)) == b"out"
            old = await cluster.node_acl("a")
            certificate, key = await cluster.node_pair("a")  # for another key
            assert a.port.credentials is not None
            a.port.credentials.update(node_pem=certificate, node_key_pem=key)
            assert (await cluster.node_acl("a")).key_hash != old.key_hash
            assert await text_of(a.read_log_raw(task)) == b"out"

    run(scenario())


def test_an_uncleared_voter_points_to_the_node_that_has_the_log(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("c", clearances=["gene"]) as c,
            cluster.serving("w", NodeRole.WORKER, clearances=["gene"]) as w,
        ):
            await cluster.label("gene")
            ann = await cluster.user("ann", clearances=("gene",))
            bob = await cluster.user("bob", UserRole.OPERATOR)
            task = sealed(clearance=["gene"])
            async with cluster.as_(a, ann) as hers:
                await hers.Submit(api.SubmitRequest(tasks=[task]))
            await w.claim(task.id)
            w.write_log(task.id, b"out")
            async with cluster.as_(a, ann) as at_a, cluster.as_(c, ann) as at_c, cluster.as_(w, ann) as at_w:
                failed = await failure(all_of(at_a.Log(log_request(task.id[-12:]))))
                assert (failed.code, failed.detail.reason) == (PRECONDITION, "ask-node")
                assert list(failed.detail.addresses) == [w.address]
                assert failed.detail.object == task.id
                assert await text_of(at_w.Log(log_request(task.id))) == b"out"  # there it is told
                assert await text_of(at_c.Log(log_request(task.id))) == b"out"  # a cleared voter passes it on
            for node in (a, c, w):
                async with cluster.as_(node, bob) as his:
                    failed = await failure(all_of(his.Log(log_request(task.id))))
                    assert failed.code is DENIED
                    assert "bob is not cleared for gene" in failed.text
            # nor does the holder give it to a voter that is not cleared, whatever that one says
            n9 = await cluster.node_pair("n9")
            async with cluster.as_(w, n9) as theirs:
                passed_on = theirs.Log(log_request(task.id, local_only=True), metadata=(("spinetta-forwarded", "1"),))
                assert (await failure(all_of(passed_on))).code is DENIED

    run(scenario())


def test_our_client_finds_its_way(etcd: Etcd, tmp_path: Path) -> None:
    """It knows a voter that is not cleared, and a fragment of an id; the log lies on a worker."""

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER, clearances=["gene"]) as w,
        ):
            w.port.voters = (a.address,)
            await cluster.label("gene")
            certificate, key = await cluster.user("ann", clearances=("gene",))
            task = sealed(clearance=["gene"])
            async with cluster.as_(a, (certificate, key)) as hers:
                await hers.Submit(api.SubmitRequest(tasks=[task]))
            await w.claim(task.id)
            w.write_log(task.id, b"out")
            credentials = UserCredentials.create(cluster.world.ca, certificate, key)
            async with AsyncClient([a.address], credentials=credentials) as client:
                assert b"".join([c.data async for c in client.log(task.id[-12:])]) == b"out"
                assert (await client.get(task.id)).id == task.id

    run(scenario())


def test_a_worker_sends_people_to_voters(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving("a") as a,
            cluster.serving("w", NodeRole.WORKER) as w,
        ):
            w.port.voters = (a.address,)
            here, there = await made_on(w, spec(owner="ann"), a), await made_on(a, spec(owner="ann"), a)
            ann = await cluster.user("ann")
            async with cluster.as_(w, ann) as hers:
                calls: list[Awaitable[Any]] = [
                    hers.Submit(api.SubmitRequest(tasks=[spec()])),
                    hers.Cancel(api.CancelRequest(ids=[here])),
                    hers.Get(api.GetRequest(ids=[here])),
                    hers.List(api.ListRequest()),
                    all_of(hers.Watch(api.WatchRequest())),
                    hers.Wait(api.WaitRequest(ids=[here])),
                    hers.ListNodes(api.ListNodesRequest()),
                    all_of(hers.Log(log_request(there))),
                    all_of(hers.Log(log_request(here[-12:]))),  # it may not search for what a fragment means
                ]
                for call in calls:
                    failed = await failure(call)
                    assert (failed.code, failed.detail.reason) == (PRECONDITION, "ask-a-voter")
                    assert list(failed.detail.addresses) == [a.address]
                assert await text_of(hers.Log(log_request(here))) == b"out"
                assert (await failure(hers.Drain(api.DrainRequest()))).code is DENIED  # what she may not is no redirect
            assert (await failure(w.api.Drain(api.DrainRequest(node="w")))).detail.reason == "ask-a-voter"
            bob = await cluster.user("bob")
            async with cluster.as_(w, bob) as his:
                assert (await failure(all_of(his.Log(log_request(here))))).code is DENIED

    run(scenario())
