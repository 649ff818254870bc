"""An attempt whose image is being brought in: it is ended at once, and nothing else is."""

from __future__ import annotations

import asyncio
from typing import cast

from spinetta.agent import Agent
from spinetta.events import Begin, Happening, Prepared, Start, Started, Stop
from spinetta.model import ContainerSpec, Exit, IncarnationId, Reason, Revision
from spinetta.node.driver import Driver
from spinetta.node.launching import LaunchSettings
from spinetta.runtime.protocol import Launch, Runtime
from spinetta.store.protocol import Store
from tests.builders import key_of, settings, spec

LIFE = IncarnationId("life")


class Slow:
    """A runtime whose preparations take until `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.preparing = asyncio.Event()
        self.started: list[str] = []
        self.stopped: list[tuple[str, str]] = []
        self.cancelled = 0

    async def prepare(self, launch: Launch) -> Launch | Exit:
        if launch.wants is None:
            return launch
        self.preparing.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return launch

    async def start(self, launch: Launch) -> Exit | None:
        self.started.append(launch.key)
        return None

    async def stop(self, key: str, why: str) -> None:
        self.stopped.append((key, why))


def start_of(n: int, container: ContainerSpec | None) -> Start:
    return Start(spec(n, container=container), 1, Revision(5), LIFE, 8.0)


async def told(made: Driver) -> Happening:
    return await asyncio.wait_for(made._inbox.get(), 5)


def driver(runtime: Slow) -> Driver:
    return Driver(
        Agent(settings()),
        cast("Store", None),
        cast("Runtime", runtime),
        LaunchSettings("n1", 0, "h:1"),
        remember=lambda _: None,
    )


def test_a_stop_ends_the_preparation_and_nothing_is_started() -> None:
    async def main() -> None:
        runtime = Slow()
        made = driver(runtime)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            made._tasks = tasks
            tasks.create_task(made._start(start_of(1, ContainerSpec("docker://here/a:1"))))
            await runtime.preparing.wait()
            made._carry_out(Stop(key_of(2), "cancelled"))  # another one's
            made._carry_out(Stop(key_of(1), "cancelled"))
            made._carry_out(Stop(key_of(1), "fenced"))  # the first reason stays
            done = await told(made)
        assert isinstance(done, Started)
        assert isinstance(done.exit, Exit)
        assert (done.key, done.exit.reason) == (key_of(1), Reason.CANCELLED)
        assert (runtime.cancelled, runtime.started, runtime.stopped) == (1, [], [(key_of(2), "cancelled")])
        assert not made._preparing

    asyncio.run(main())


def test_a_stop_that_comes_before_the_word_ends_it_and_one_that_comes_after_goes_to_the_runtime() -> None:
    async def main() -> None:
        runtime = Slow()
        runtime.go.set()
        made = driver(runtime)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            made._tasks = tasks
            for n in (1, 2):
                tasks.create_task(made._start(start_of(n, ContainerSpec("docker://here/a:1"))))
            assert {(await told(made)).key for _ in range(2)} == {key_of(1), key_of(2)}  # type: ignore[union-attr]
            made._carry_out(Stop(key_of(1), "cancelled"))
            made._carry_out(Begin(key_of(2)))
            made._carry_out(Stop(key_of(2), "cancelled"))
            ends = {(await told(made)).key for _ in range(2)}  # type: ignore[union-attr]
        assert ends == {key_of(1), key_of(2)}
        assert (runtime.started, runtime.stopped) == ([key_of(2)], [(key_of(2), "cancelled")])
        assert not made._preparing

    asyncio.run(main())


def test_what_is_prepared_is_started_and_a_process_needs_no_preparation() -> None:
    async def main() -> None:
        runtime = Slow()
        made = driver(runtime)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            made._tasks = tasks
            tasks.create_task(made._start(start_of(1, ContainerSpec("docker://here/a:1"))))
            await runtime.preparing.wait()
            await made._start(start_of(2, None))
            assert runtime.started == [key_of(2)]
            assert await told(made) == Started(key_of(2), Revision(5), None)
            runtime.go.set()
            assert await told(made) == Prepared(key_of(1))
            assert runtime.started == [key_of(2)], "the agent has not said that it may"
            made._carry_out(Begin(key_of(2)))  # it runs: nothing to do
            made._carry_out(Begin(key_of(1)))
            assert await told(made) == Started(key_of(1), Revision(5), None)
        assert runtime.started == [key_of(2), key_of(1)]
        assert not made._preparing

    asyncio.run(main())
