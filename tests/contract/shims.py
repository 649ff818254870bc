"""Real shims for tests: state directories that are cleaned up whatever happened, and waiting with a limit."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from spinetta.model import Exit
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.processes import open_process
from spinetta.runtime.protocol import Exited, Launch
from spinetta.runtime.shim import proctable
from spinetta.runtime.shim.cgroup import sweep

LIMIT_S = 30.0
KILL_MARGIN_S = 1.0
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test function."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(120):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return run


def identity(state_dir: Path) -> dict[str, Any]:
    """What the shim wrote of itself; empty before."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads((state_dir / "shim.json").read_bytes())
        assert isinstance(value, dict)
        return value
    return {}


def kill_shim(state_dir: Path) -> None:
    """SIGKILL to the shim of a state directory, if it lives; returns when it is gone, and has written its last."""
    who = identity(state_dir)
    if not who:
        return
    with contextlib.ExitStack() as opened:
        shim = _pidfd(opened, who["pid"])
        process = proctable.read(who["pid"])
        if shim is None or process is None or process.start_ticks != who["start_ticks"]:
            return
        # Without a PID namespace the process that writes its records ends a moment later, by itself.
        writers = [_pidfd(opened, c.pid) for c in children(who["pid"]) if name_of(c.pid) == "spinetta-writer"]
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(shim, signal.SIGKILL)
        for ends in (shim, *writers):
            assert ends is None or select.select([ends], [], [], LIMIT_S)[0], "the shim does not die"


def _pidfd(opened: contextlib.ExitStack, pid: int) -> int | None:
    try:
        fd = open_process(pid)
    except ProcessLookupError:
        return None
    opened.callback(os.close, fd)
    return fd


def clean_up(state_dir: Path) -> None:
    """End the shim and all it held, and remove its cgroups."""
    folders = [Path(folder) for folder in identity(state_dir).get("cgroups", [])]
    kill_shim(state_dir)
    assert sweep(folders, LIMIT_S) == []


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spinetta-shim-") as folder:
        path = Path(folder) / "state"
        try:
            yield path
        finally:
            clean_up(path)


@pytest.fixture(params=["namespace", "subreaper"])
def isolate(request: pytest.FixtureRequest) -> bool:
    """Every contract holds with a pid namespace and without."""
    return bool(request.param == "namespace")


@asynccontextmanager
async def runtime(state_dir: Path, *, isolate: bool = True, renewed: bool = True) -> AsyncIterator[ProcessRuntime]:
    async with ProcessRuntime.connect(state_dir, node="n1", kill_margin_s=KILL_MARGIN_S, isolate=isolate) as rt:
        if renewed:
            await rt.renew(boottime_s())
        yield rt


def launch(key: str, *argv: str, **changes: Any) -> Launch:
    fields: dict[str, Any] = {
        "env": ENV,
        "working_directory": "",
        "cpu_millis": 0,
        "memory_bytes": 0,
        "pids_max": 0,
        "walltime_s": 0.0,
        "grace_s": 600.0,
        "token": 7,
        "incarnation": "i1",
        "stop_wait_s": 10.0,
    }
    return Launch(key=key, argv=argv, **{**fields, **changes})


def shell(key: str, script: str, **changes: Any) -> Launch:
    return launch(key, "/bin/sh", "-c", script, **changes)


async def end_of(rt: ProcessRuntime, key: str, limit_s: float = LIMIT_S) -> Exit:
    """Wait for the end of an attempt."""
    async with asyncio.timeout(limit_s):
        async for event in rt.events():
            if isinstance(event, Exited) and event.key == key:
                return event.exit
    raise AssertionError(f"the events ended before {key}")


async def ran(rt: ProcessRuntime, attempt: Launch) -> Exit:
    """Start an attempt and wait for its end."""
    ended = await rt.start(attempt)
    return ended if ended is not None else await end_of(rt, attempt.key)


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the world outside has no events for us
            await asyncio.sleep(0.01)


def living(marker: str) -> list[int]:
    """Pids of living processes with `marker` in their command line, ourselves not counted."""
    found = []
    for process in proctable.read_all():
        if process.state in "ZX" or process.pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                found.append(process.pid)
    return found


def children(pid: int) -> list[proctable.Process]:
    return [process for process in proctable.read_all() if process.parent == pid]


def groups_of(name: str) -> list[Path]:
    """All control groups of a name, in all hierarchies. Others come and go meanwhile."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line}
    return sorted({Path(where) / name for mount in mounts for where, below, _ in os.walk(mount) if name in below})


def files_below(folder: Path) -> Iterator[Path]:
    """All files, while some go and others come, as in the trash of a shim that runs; what is read may be gone."""
    for where, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(where) / name).is_file())


def files_with(folder: Path, *needles: bytes) -> list[Path]:
    """Files below a folder that hold one of these."""
    found = []
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            found += [path] if any(needle in data for needle in needles) else []
    return found


def name_of(pid: int) -> str:
    """Of a process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
