"""What is started again under the name of something that has ended, of which not all could be removed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.runtime.shim.cgroup import DEPTH_MAX
from tests.contract.shims import ENV, asynchronous, groups_of, isolate, ran, runtime, shell, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, state_dir)  # fixtures


@asynchronous
async def test_what_is_left_of_a_service_does_not_take_the_next_one_with_it(state_dir: Path, isolate: bool) -> None:
    log, name = state_dir / "log", f"svc-{state_dir.parent.name}"
    deep = "/".join(["d"] * (DEPTH_MAX + 5))
    # Groups below its own, further down than anybody looks: its group cannot be removed, which is tried for a while.
    text = 'for top in $(awk \'$3 == "cgroup2" { print $2 }\' /proc/mounts); do mkdir -p "$top$(sed -n s/^0:://p '
    text += f'/proc/self/cgroup)/{deep}"; done'
    made: list[Path] = []
    async with runtime(state_dir, isolate=isolate) as rt:
        try:
            await rt.start_service(name, ["/bin/sh", "-c", text], ENV, "/", log)

            async def has_ended() -> bool:
                found = await rt.service(name)
                return found is not None and found.exit is not None

            while not await has_ended():  # noqa: ASYNC110 - asked, not waited for a time; the test has a limit
                await asyncio.sleep(0.01)
            made = [path for path in groups_of(f"service@{name}") if (path / "d").is_dir()]
            if not made:
                pytest.skip("no version 2 of control groups is mounted")
            second = await rt.start_service(name, ["/bin/sleep", "1000"], ENV, "/", log)
            log_of_shim = state_dir / "shim.log"
            for _round in range(30):  # there were a dozen tries meanwhile
                assert await rt.service(name) == second, log_of_shim.read_text()
                await asyncio.sleep(0.02)
        finally:
            for path in made:
                for where, _folders, _files in os.walk(path, topdown=False):
                    if where != str(path):
                        os.rmdir(where)  # noqa: PTH106
        await rt.stop_service(name)
        await until(lambda: not groups_of(f"service@{name}"))


@asynchronous
async def test_the_end_of_another_attempt_of_the_same_name_is_not_told_as_its_own(state_dir: Path) -> None:
    """When a store is restored from a backup, numbers of attempts come again."""
    async with runtime(state_dir) as rt:
        assert (await ran(rt, shell("a.1", "exit 3"))).exit_code == 3
        for other in (shell("a.1", "exit 4", token=8), shell("a.1", "exit 4", incarnation="i2")):
            with pytest.raises(RuntimeUnavailable, match="not forgotten yet"):
                await rt.start(other)
        again = await rt.start(shell("a.1", "exit 4"))  # the very same
        assert again is not None
        assert again.exit_code == 3
        await rt.forget("a.1")
        assert (await ran(rt, shell("a.1", "exit 4", token=8))).exit_code == 4
