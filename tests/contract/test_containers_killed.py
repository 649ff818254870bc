"""A container whose start is cut off anywhere leaves nothing, and many starts leave no more than none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from spinetta.model import Reason
from tests.contract import churn, faultpoints
from tests.contract.containers import rootfs, script, traces
from tests.contract.shims import asynchronous, end_of, identity, isolate, name_of, runtime, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures

STEPS_S = [step / 1000 for step in range(0, 42, 6)]  # a start takes some 30 ms here, more on a busy machine


def starters(folders: list[str], key: str) -> list[int]:
    """The processes that make a container: of the runtime, and those that become its first."""
    pids: set[int] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            pids |= {int(pid) for pid in (Path(folder) / key / "cgroup.procs").read_text().split()}
    return sorted(pids)


async def kill_starter(folders: list[str], key: str, whom: str, delay_s: float, starting: asyncio.Task[Any]) -> None:
    """So long after the first of them is seen, or when it is there."""

    def there() -> list[int]:
        names = {pid: name_of(pid) for pid in starters(folders, key)}
        return [pid for pid, name in names.items() if name == whom or (whom.endswith("[") and name.startswith(whom))]

    await until(lambda: starting.done() or starters(folders, key))
    await asyncio.sleep(delay_s)
    await until(lambda: starting.done() or there())
    for pid in there():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@asynchronous
@pytest.mark.parametrize("whom", ["runc", "runc:["])
async def test_a_runtime_that_is_killed_on_its_way(state_dir: Path, rootfs: Path, whom: str) -> None:
    """`whom`: runc itself, or what it forks to become the first process."""
    async with runtime(state_dir) as rt:
        reasons, folders = set(), identity(state_dir)["cgroups"]
        for number, delay_s in enumerate(STEPS_S):
            key = f"r.{number}"
            starting = asyncio.create_task(rt.start(script(state_dir, rootfs, key, "exit 0", writable=number % 2 == 1)))
            await kill_starter(folders, key, whom, delay_s, starting)
            ended = await starting or await end_of(rt, key)
            reasons.add(ended.reason)
            assert ended.reason in (Reason.NODE_UNFIT, Reason.EXIT, Reason.SIGNAL), ended
            assert ended.reason is not Reason.EXIT or ended.exit_code == 0, ended
            await until(lambda key=key: not traces(state_dir, key))  # type: ignore[misc]
            await rt.forget(key)
        assert Reason.NODE_UNFIT in reasons
        await until(lambda: not [*(state_dir / "trash").iterdir(), *(state_dir / "scratch").iterdir()])
        pid = rt.shim_pid()
        assert churn.count(state_dir, pid).files == churn.count(state_dir, pid).groups == 0


@pytest.mark.parametrize("isolate", [True, False], ids=["namespace", "subreaper"])
def test_a_shim_that_is_killed_at_any_call(isolate: bool) -> None:
    points = faultpoints.points(isolate=isolate, containers=True)
    parts = (4, 6, 7) if isolate else (5,)
    reached = [faultpoints.once("shim", points * part // 10, isolate=isolate, containers=True) for part in parts]
    assert all(reached)


@pytest.mark.parametrize(
    ("number", "isolate"), [(4, True), (8, False), (12, True), (15, True), (17, False), (19, True)]
)
def test_a_child_that_is_killed_before_the_runtime(number: int, isolate: bool) -> None:
    assert faultpoints.once("child", number, isolate=isolate, containers=True)


def test_many_starts_and_stops_leak_nothing(rootfs: Path) -> None:
    """A thousand by ``python -m tests.contract.churn``."""
    with tempfile.TemporaryDirectory(prefix="spinetta-churn-") as folder:
        before, after = asyncio.run(churn.churn(Path(folder) / "state", rootfs, 60, 4))
    assert churn.leaks(before, after) == []
