"""Much of what costs the sender little."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from typing import Any

import grpc.aio
import psutil

from spinetta.v1 import trust_pb2 as pb
from spinetta.v1.trust_pb2_grpc import TrustStub
from tests.attacks.fortress import GUEST, METHODS, VIEWER, Fortress, Stage, _as_is
from tests.contract.api_world import eventually

CALLS = 2000
ANSWER_MAX_S = 5.0  # for others, meanwhile: generous, as the machine is shared
GROWTH_BYTES_MAX = 48 << 20


def test_calls_begun_and_cancelled_by_the_thousand(stage: Stage) -> None:
    async def scenario(f: Fortress) -> None:
        before = len(asyncio.all_tasks())
        async with f.channel(GUEST) as door, f.channel(VIEWER) as channel:
            stub: Any = TrustStub(channel)
            await stub.WhoAmI(pb.WhoAmIRequest())
            gc.collect()
            size = psutil.Process(os.getpid()).memory_info().rss
            slowest_s = 0.0
            for n in range(CALLS):
                call = door.unary_stream(METHODS["Health.Watch"].path, _as_is, _as_is)(b"", timeout=10)
                await asyncio.sleep(0)
                call.cancel()
                if n % 200 == 0:
                    began_s = time.monotonic()
                    assert (await stub.WhoAmI(pb.WhoAmIRequest(), timeout=ANSWER_MAX_S)).name == "vic"
                    slowest_s = max(slowest_s, time.monotonic() - began_s)
            assert slowest_s < ANSWER_MAX_S
            gc.collect()
            assert psutil.Process(os.getpid()).memory_info().rss - size < GROWTH_BYTES_MAX
        await eventually(lambda: len(asyncio.all_tasks()) <= before, within_s=40, what="nothing is left")

    stage.run(scenario)


def test_one_call_with_requests_without_end(stage: Stage) -> None:
    """A method that takes one request reads one."""

    async def scenario(f: Fortress) -> None:
        async with f.channel(VIEWER) as channel:
            call: Any = channel.stream_unary(METHODS["Spinetta.List"].path, _as_is, _as_is)(timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has been answered
                for _ in range(10_000):
                    await call.write(b"")
            await call.code()
            stub: Any = TrustStub(channel)
            assert (await stub.WhoAmI(pb.WhoAmIRequest(), timeout=ANSWER_MAX_S)).name == "vic"

    stage.run(scenario)
