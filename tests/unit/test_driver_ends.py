"""Ends that the runtime tells of, while one of its shims does not say what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from spinetta.agent import Agent
from spinetta.errors import RuntimeUnavailable
from spinetta.events import AttemptEnded, Happening, RuntimeListed
from spinetta.model import Exit, Reason
from spinetta.node import driver as drivers
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.runtime.feed import Hub
from spinetta.runtime.protocol import Exited, Held, Runtime, ShimLost
from spinetta.store.protocol import Store
from tests.builders import settings

ENDED = Exit(Reason.CANCELLED)


class Troubled:
    """A runtime of which one shim hangs while `hangs` is set."""

    def __init__(self) -> None:
        self.hub: Hub[Exited | ShimLost] = Hub()
        self.hangs = asyncio.Event()
        self.asked = asyncio.Queue[None]()

    async def held(self) -> Sequence[Held]:
        self.asked.put_nowait(None)
        if self.hangs.is_set():
            self.hub.put("late", Exited("late", ENDED))  # of another shim, while this one is waited for
            raise RuntimeUnavailable("the shim does not answer")
        return []

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        return self.hub.open()


async def told(made: Driver) -> Happening:
    return await asyncio.wait_for(made._inbox.get(), 5)


async def follow(runtime: Troubled, made: Driver) -> None:
    """First one that hangs from the start: nothing is told before a listing. Then one that hangs later."""
    following = asyncio.create_task(made._follow_runtime())
    try:
        for _ in range(3):
            await asyncio.wait_for(runtime.asked.get(), 5)
        assert made._inbox.empty()
        runtime.hangs.clear()
        assert await told(made) == RuntimeListed(())
        runtime.hangs.set()
        runtime.hub.put("shim", ShimLost())
        assert await told(made) == AttemptEnded("late", ENDED)
        runtime.hub.put("b.1", Exited("b.1", ENDED))
        while (found := await told(made)) == AttemptEnded("late", ENDED):  # it is asked again and again
            pass
        assert found == AttemptEnded("b.1", ENDED)
        runtime.hangs.clear()
        while (found := await told(made)) == AttemptEnded("late", ENDED):
            pass
        assert found == RuntimeListed(())
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def test_one_that_hangs_keeps_back_no_end_of_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drivers, "RUNTIME_RETRY_S", 0.02)
    monkeypatch.setattr(drivers, "UNLISTED_S", 0.1, raising=False)

    async def main() -> None:
        runtime = Troubled()
        runtime.hangs.set()
        made = Driver(
            Agent(settings()),
            cast("Store", None),
            cast("Runtime", runtime),
            LaunchSettings("n1", 0, "h:1"),
            remember=lambda _: None,
        )
        await follow(runtime, made)

    asyncio.run(main())
    assert sum("the runtime does not answer" in line for line in caplog.messages) == 1  # not at each try
