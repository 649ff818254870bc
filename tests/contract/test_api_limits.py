"""Too much of anything from one caller, and calls that never come to a point."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spinetta.access import Limits, Policy, UserRole
from spinetta.node.services import limits
from spinetta.v1 import api_pb2 as api
from tests.contract.api_world import Etcd, etcd, etcd_member, eventually, failure, run, spec
from tests.contract.rights_world import all_of, secured

__all__ = ["etcd", "etcd_member"]

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_limit_hit_and_recovered(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann = await cluster.user("ann", limits=Limits(calls_per_s=2.0))
            bob = await cluster.user("bob")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, bob) as his:
                for _ in range(20):
                    await hers.ListNodes(api.ListNodesRequest())
                failed = await failure(_until_itfails(hers))
                assert (failed.code, failed.detail.reason) == (BUSY, "busy")
                assert 0 < failed.detail.retry_after_s <= limits.BUSY_MAX_S
                await his.ListNodes(api.ListNodesRequest())
                await asyncio.sleep(failed.detail.retry_after_s)
                await hers.ListNodes(api.ListNodesRequest())
                assert "busy" not in str(a.port.audited)

    run(scenario())


async def _until_itfails(stub: Any) -> None:
    while True:
        await stub.ListNodes(api.ListNodesRequest())


def test_a_submit_beyond_the_policys_rate_writes_nothing(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster:
            await cluster.policy(Policy(limits=Limits(tasks_per_s=0.5)))
            async with cluster.serving() as a:
                ann = await cluster.user("ann")
                async with cluster.as_(a, ann) as hers:
                    await hers.Submit(api.SubmitRequest(tasks=[spec() for _ in range(10)]))
                    failed = await failure(hers.Submit(api.SubmitRequest(tasks=[spec()])))
                    assert (failed.code, failed.detail.reason) == (BUSY, "busy")
                    assert len((await hers.List(api.ListRequest())).tasks) == 10

    run(scenario())


def test_refusals_use_up_what_one_may_ask_for(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            eve = await cluster.user("eve", UserRole.VIEWER, limits=Limits(calls_per_s=0.01))
            async with cluster.as_(a, eve) as hers:
                codes = [(await failure(hers.Drain(api.DrainRequest()))).code for _ in range(3)]
                assert codes == [DENIED, BUSY, BUSY]

    run(scenario())


def test_streams_of_one_caller(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAMS_PER_CALLER_MAX", 3)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            ann, bob = await cluster.user("ann"), await cluster.user("bob")
            async with cluster.as_(a, ann) as hers, cluster.as_(a, bob) as his:
                calls = [hers.Watch(api.WatchRequest()) for _ in range(3)]
                for call in calls:
                    await call.read()
                assert (await failure(all_of(hers.Watch(api.WatchRequest())))).code is BUSY
                await hers.List(api.ListRequest())  # calls that are over at once are not streams
                await his.Watch(api.WatchRequest()).read()
                for call in calls:
                    call.cancel()

                async def again() -> bool:
                    call = hers.Watch(api.WatchRequest())
                    try:
                        await call.read()
                    except grpc.aio.AioRpcError:
                        return False
                    finally:
                        call.cancel()
                    return True

                await eventually(again)

    run(scenario())


def test_guests_cannot_use_up_a_nodes_streams(etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GUEST_OPEN_MAX", 2)

    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.channel(a.address, "a", None) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            calls = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for call in calls:
                assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await failure(health.Watch(health_pb2.HealthCheckRequest()).read())).code is BUSY
            await a.api.List(api.ListRequest())
            for call in calls:
                call.cancel()
            await eventually(lambda: _checked(health))

    run(scenario())


@pytest.mark.parametrize("is_guest", [True, False])
def test_calls_whose_requests_never_come(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_guest: bool
) -> None:
    """Each would hold one of the server's calls for ever."""
    monkeypatch.setattr(limits, "GUEST_OPEN_MAX", 5)
    monkeypatch.setattr(limits, "CALLS_OPEN_PER_CALLER_MAX", 5)
    monkeypatch.setattr(limits, "REQUEST_S", 1.0)

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            pair = None if is_guest else await cluster.user("ann")
            async with cluster.channel(a.address, "a", pair) as channel:
                methods: list[Any] = [
                    channel.stream_unary("/spinetta.v1.Spinetta/Submit"),
                    channel.stream_stream("/spinetta.v1.Spinetta/Watch"),
                ]
                calls: list[Any] = [methods[n % 2]() for n in range(10)]
                codes = [await call.code() for call in calls]
                assert codes == [BUSY] * 10  # five at once, five when their time was over
                texts = [str(await call.details()) for call in calls]
                assert sum("has not arrived" in t for t in texts) == 5
                await a.api.List(api.ListRequest())
                assert a.server.desk.throttle.open_now == 0

    run(scenario())


def test_an_empty_and_a_garbled_request(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.channel(a.address, "a", await cluster.user("ann")) as channel,
        ):
            empty: Any = channel.stream_unary("/spinetta.v1.Spinetta/List")()
            await empty.done_writing()
            assert await empty.code() is grpc.StatusCode.INVALID_ARGUMENT
            for method in ("List", "Nothing"):
                garbled: Any = channel.unary_unary(f"/spinetta.v1.Spinetta/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await garbled(b"\xff" * 1000)
                assert (caught.value.code() is grpc.StatusCode.UNIMPLEMENTED) == (method == "Nothing")
            await a.api.List(api.ListRequest())

    run(scenario())


async def _checked(health: Any) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await health.Check(health_pb2.HealthCheckRequest())
        return True
    return False


def test_a_guest_that_knocks_all_the_time(etcd: Etcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            secured(etcd, tmp_path) as cluster,
            cluster.serving() as a,
            cluster.as_(a, None) as guest,
        ):
            codes = [(await failure(guest.List(api.ListRequest()))).code for _ in range(30)]
            assert codes[0] is UNKNOWN
            assert codes[-1] is BUSY
            assert len(a.port.audited) < 20  # nor does it fill the audit log
            await a.api.List(api.ListRequest())

    run(scenario())
