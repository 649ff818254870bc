"""Whatever comes to the API's port as a request: a clear status, and the node lives on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from spinetta.access import UserRole
from spinetta.node.services import limits
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb
from tests.contract.api_world import Etcd, etcd, etcd_member, run, spec
from tests.contract.rights_world import secured

__all__ = ["etcd", "etcd_member"]

METHODS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming, method.input_type)
    for service in api.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
CALLS = 400
UNCLEAR = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
BUG = "nobody thought of"


def garbled(chance: random.Random, whole: bytes) -> bytes:
    """Noise, or a true request with a few bytes changed, cut or repeated."""
    if chance.random() < 0.3:
        return chance.randbytes(chance.choice([0, 1, 10, 1000, 100_000]))
    data = bytearray(whole)
    for _ in range(chance.randint(0, 4)):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        data = data[: chance.randint(0, len(data))]
    return bytes(data * chance.choice([1, 1, 1, 2, 50]))


def true_requests(task: str) -> list[bytes]:
    messages = [
        api.SubmitRequest(tasks=[spec(), spec(owner="bob")]),
        api.CancelRequest(ids=[task], reason="r"),
        api.ListRequest(filter=api.Filter(owner="ann", labels={"a": "b"}), page_size=3, newest_first=True),
        api.WatchRequest(ids=[task], from_revision=1),
        api.LogRequest(id=task, follow=True, tail_bytes=3, attempt=1),
        api.WaitRequest(ids=[task], timeout_s=0.1, any=True),
        api.LeaveRequest(node="a", timeout_s=1.0),
        api.ListArchivedRequest(filter=api.Filter(owner="ann"), page_size=3, since_ms=1, newest_first=True),
        api.PullImageRequest(reference="docker://r.invalid/a:1", name="a:1"),
        api.RemoveImageRequest(image="sha256:00", force=True, node="a"),
        api.ReadArchiveRequest(limit=3, after=task, since_ms=1),
        api.SampleRequest(ids=[task]),
        api.ArchiveRequest(records=[pb.Task(spec=spec(), state=pb.COMPLETE).SerializeToString()]),
        api.TakeSeatRequest(member_id=7, initial_cluster="x", cluster_id="y"),
    ]
    return [m.SerializeToString() for m in messages]


@pytest.mark.parametrize("who", ["guest", "user", "admin", "node"])
def test_noise_from_everybody(
    etcd: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    monkeypatch.setattr(limits, "GUEST_CALLS_PER_S", 10_000.0)  # what is sent shall be looked at
    monkeypatch.setattr(limits, "GUESTS_CALLS_PER_S", 10_000.0)
    monkeypatch.setattr(limits, "GUEST_OPEN_MAX", 60)
    chance = random.Random(f"noise {who}")

    async def scenario() -> None:
        async with secured(etcd, tmp_path) as cluster, cluster.serving() as a:
            [task] = await a.submit(spec(owner="ann"))
            await a.claim(task)
            a.write_log(task, b"out")
            pairs: dict[str, Any] = {
                "guest": lambda: _none(),
                "user": lambda: cluster.user("ann"),
                "admin": lambda: cluster.user("root2", UserRole.ADMIN),
                "node": lambda: cluster.node_pair("n9"),
            }
            async with cluster.channel(a.address, "a", await pairs[who]()) as channel:
                truths = true_requests(task)

                async def one() -> grpc.StatusCode:
                    path, is_stream, _ = chance.choice(METHODS)
                    data = garbled(chance, chance.choice(truths))
                    return await _send(channel, path, data, is_stream=is_stream)

                for _ in range(CALLS // 40):
                    codes = await asyncio.gather(*(one() for _ in range(40)))
                    assert not set(codes) & set(UNCLEAR), codes
            assert (await a.get(task)).task.spec.owner == "ann"
            assert len(a.server.desk.callers.acl._entries) < 10

    run(scenario())
    assert BUG not in caplog.text


async def _none() -> None:
    return None


async def _send(channel: grpc.aio.Channel, path: str, data: bytes, *, is_stream: bool) -> grpc.StatusCode:
    """Send it, and read at most a few answers."""
    method: Any = channel.unary_stream(path) if is_stream else channel.unary_unary(path)
    call = method(data)
    try:
        async with asyncio.timeout(0.3 if is_stream else 2):
            if is_stream:
                for _ in range(3):
                    if await call.read() is grpc.aio.EOF:
                        break
            else:
                await call
    except grpc.aio.AioRpcError as e:
        code: grpc.StatusCode = e.code()
        return code
    except TimeoutError:  # a stream with no news, a wait
        return grpc.StatusCode.OK
    finally:
        call.cancel()
    return grpc.StatusCode.OK
