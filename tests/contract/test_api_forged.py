"""Forged identities, and what may come with a call."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta.access import NodeRole
from spinetta.node.services.errors import DETAIL_KEY
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from tests.contract.api_world import Etcd, etcd, etcd_member, failure, run, spec
from tests.contract.rights_world import Pair, Secured, all_of, log_request, secured
from tests.unit.trust_world import CLUSTER, OTHER, World, forge, forged_by

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
FORWARDED = (("spinetta-forwarded", "1"),)


def _guest_made(cluster: Secured) -> Pair:
    from cryptography import x509

    from spinetta.trust import guest
    from spinetta.trust.certificates import key_pem

    issuer = x509.load_pem_x509_certificate(guest.guest_authority_pem()).subject
    uri = f"spiffe://{cluster.world.cluster}/user/root"
    pem, key = forge(guest.guest_authority_key(), issuer, time.time(), uris=[uri], dns=())
    return pem, key_pem(key)


def test_anyone_can_make_a_guest_certificate_and_it_is_worth_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.as_(a, _guest_made(cluster)) as eves,
        ):
            failed = await failure(eves.Submit(api.SubmitRequest(tasks=[spec()])))
            assert failed.code is UNKNOWN
            assert "of no authority that this cluster believes" in failed.text

    run(scenario())


@pytest.mark.parametrize("what", ["another-domain", "node-as-user", "two-names"])
def test_certificates_that_our_authority_would_not_issue(etcd: Etcd, tmp_path: Path, what: str) -> None:
    from spinetta.trust.certificates import key_pem

    uris = {
        "another-domain": [f"spiffe://{OTHER}/user/root"],
        "node-as-user": [f"spiffe://{CLUSTER}/user/../node/a"],
        "two-names": [f"spiffe://{CLUSTER}/user/eve", f"spiffe://{CLUSTER}/user/root"],
    }

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            pem, key = forged_by(cluster.world.authority, time.time(), uris=uris[what], dns=())
            async with cluster.as_(a, (pem, key_pem(key))) as eves:
                assert (await failure(eves.List(api.ListRequest()))).code is UNKNOWN

    run(scenario())


def test_another_clusters_certificate_does_not_even_get_a_connection(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            other = World(time.time(), OTHER)
            for pair in (other.user("root"), World(time.time()).user("root")):  # the latter: the same name, another key
                async with cluster.as_(a, pair) as eves:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await eves.List(api.ListRequest(), timeout=5)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert DETAIL_KEY not in dict(caught.value.trailing_metadata() or ())

    run(scenario())


def test_plain_text_gets_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            grpc.aio.insecure_channel(a.address) as channel,
        ):
            stub: rpc.SpinettaAsyncStub = rpc.SpinettaStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.List(api.ListRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


def test_a_user_cannot_pose_as_a_node_that_passes_on(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            [task] = await a.submit(spec(owner="bob"))
            await a.claim(task)
            a.write_log(task, b"out")
            async with cluster.as_(a, ann) as hers:
                local = log_request(task, local_only=True)
                assert (await failure(all_of(hers.Log(local, metadata=FORWARDED)))).code is DENIED
                assert (await failure(all_of(hers.Log(local)))).code is DENIED
                assert (await failure(hers.Drain(api.DrainRequest(), metadata=FORWARDED))).code is DENIED
                mine = api.SubmitRequest(tasks=[spec()])
                assert (await failure(hers.Submit(mine, metadata=FORWARDED))).code is DENIED

    run(scenario())


@pytest.mark.parametrize("role", NodeRole)
def test_what_a_node_may_pass_on(etcd: Etcd, tmp_path: Path, role: NodeRole) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            n9 = await cluster.node_pair("n9", role)
            [task] = await a.submit(spec(owner="bob"))
            await a.claim(task)
            a.write_log(task, b"out")
            async with cluster.as_(a, n9) as theirs:
                calls: list[Callable[[], Awaitable[Any]]] = [
                    lambda: all_of(theirs.Log(log_request(task, local_only=True), metadata=FORWARDED)),
                    lambda: theirs.Drain(api.DrainRequest(node="a"), metadata=FORWARDED),
                    lambda: theirs.Undrain(api.UndrainRequest(node="a"), metadata=FORWARDED),
                    lambda: all_of(theirs.Leave(api.LeaveRequest(node="a"), metadata=FORWARDED)),
                ]
                for call in calls:
                    if role is NodeRole.VOTER:
                        await call()
                    else:
                        assert (await failure(call())).code is DENIED
                # not local: it would have this node ask on
                assert (await failure(all_of(theirs.Log(log_request(task), metadata=FORWARDED)))).code is DENIED

    run(scenario())


def test_a_certificate_and_a_token_together(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, None) as guests:
                both = await failure(hers.List(api.ListRequest(), metadata=(("authorization", "Bearer x.y.z"),)))
                assert both.code is UNKNOWN
                assert "came together" in both.text
                for authorization in ("Bearer x.y.z", "Basic cm9vdDo=", "Bearer ", ""):
                    failed = await failure(guests.List(api.ListRequest(), metadata=(("authorization", authorization),)))
                    assert failed.code is UNKNOWN, authorization
                two = (("authorization", "Bearer a"), ("authorization", "Bearer b"))
                assert (await failure(guests.List(api.ListRequest(), metadata=two))).code is UNKNOWN

    run(scenario())


def test_huge_metadata(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            for pair in (None, await cluster.user("ann")):
                async with cluster.as_(a, pair) as stub:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await stub.List(api.ListRequest(), metadata=(("x-big", "x" * 100_000),), timeout=5)
                    assert caught.value.code() in (
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.INTERNAL,
                    )
            await a.api.List(api.ListRequest())  # it lives

    run(scenario())
