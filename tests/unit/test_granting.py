"""Who has which units, when listings and starts cross. A runtime whose listings can be held up stands for the shims."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from spinetta import devices
from spinetta.model import Exit
from spinetta.runtime.granting import GrantingRuntime
from spinetta.runtime.protocol import Held, Launch, Runtime
from tests.contract.shims import launch

TWO = (("gpu", ("0:/dev/null", "1:/dev/zero")),)


class Inner:
    """A listing tells of what ran when it was asked for, and comes when `go` is set."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.go = asyncio.Event()

    async def prepare(self, launch: Launch) -> Launch | Exit:
        return launch

    async def start(self, launch: Launch) -> Exit | None:
        self.runs.add(launch.key)
        return None

    async def held(self) -> Sequence[Held]:
        found = [Held(key, 1, "", 0, None) for key in sorted(self.runs)]
        await self.go.wait()
        return found


def granting(inner: Inner, directory: Path) -> GrantingRuntime:
    return GrantingRuntime(cast("Runtime", inner), directory / "units", devices.read(TWO), wait_s=0.05)


async def start(rt: GrantingRuntime, key: str) -> devices.Labels:
    ready = await rt.prepare(replace(launch(key, "true"), countables=(("gpu", 1),)))
    assert isinstance(ready, Launch)
    assert await rt.start(ready) is None
    return ready.units


def test_listings_older_than_a_start_take_nothing_from_it(tmp_path: Path) -> None:
    async def main() -> None:
        inner = Inner()
        rt = granting(inner, tmp_path)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(rt.held())
            await asyncio.sleep(0)  # they have been asked
            assert await start(rt, "a.1") == (("gpu", ("0",)),)
            inner.go.set()
        assert await start(rt, "b.1") == (("gpu", ("1",)),)
        assert rt.labels("a.1") == (("gpu", ("0",)),)

    asyncio.run(main())


def test_listings_that_overlap_are_one(tmp_path: Path) -> None:
    async def main() -> None:
        inner = Inner()
        rt = granting(inner, tmp_path)
        await start(rt, "a.1")
        inner.runs.clear()
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(rt.held())
            await asyncio.sleep(0)
            inner.go.set()
        assert rt.labels("a.1")
        await rt.held()  # that it is gone, the second one says that was begun after the first had ended
        assert not rt.labels("a.1")

    asyncio.run(main())


def test_one_that_was_missed_and_is_started_again_counts_anew(tmp_path: Path) -> None:
    async def main() -> None:
        inner = Inner()
        rt = granting(inner, tmp_path)
        await start(rt, "a.1")
        inner.runs.clear()
        inner.go.set()
        await rt.held()
        inner.go.clear()
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(rt.held())
            await asyncio.sleep(0)
            await start(rt, "a.1")  # asked for again, while what the second listing says is on its way
            inner.go.set()
        assert rt.labels("a.1") == (("gpu", ("0",)),)

    asyncio.run(main())
