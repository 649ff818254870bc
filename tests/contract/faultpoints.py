"""Death at the n-th call: a shim that is killed wherever it opens, renames, syncs, forks, kills or removes something.

The shim is the real one, in real processes. It is started through a directory of ours that wraps the functions of `os`
by which it changes the world, counts their calls in one of its processes, and ends that process just before the n-th.
Afterwards another shim, without a fault, has to make everything good.

    python -m tests.contract.faultpoints [--role shim|writer|child] [--subreaper] [--containers] [--from N] [--step N]

goes through all points, one after the other; the tests take some of them. With containers all that it runs is in some.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Exit, Reason
from spinetta.runtime import launch as launching
from spinetta.runtime.process import ProcessRuntime
from spinetta.runtime.protocol import Launch
from spinetta.runtime.shim import remains
from tests.contract.containers import OUTSIDE, make_rootfs, script
from tests.contract.shims import KILL_MARGIN_S, boottime_s, clean_up, groups_of, living, shell, until

ROLES = ("shim", "writer", "child")
STORY_LIMIT_S = 60.0
_SHIM_DIR = launching.SHIM_DIR

ENTRY = """
import functools, importlib, os, signal, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIM = Path({shim!r})
ROLE, NUMBER = {role!r}, {number}
ARMED, HIT = str(HERE / "armed"), str(HERE / "hit")
CALLS = ("open write pwrite ftruncate rename replace unlink rmdir mkdir fsync fork kill killpg pidfd_open waitid "
         "setsid _exit execve chown listdir").split()
state = {{"role": "shim", "count": 0}}
real = {{name: getattr(os, name) for name in CALLS}}


def die():
    try:
        real["unlink"](ARMED)  # once only, whoever of us comes first
    except FileNotFoundError:
        return
    fd = real["open"](HIT, os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(fd)
    if state["role"] == "child":
        real["kill"](os.getpid(), signal.SIGKILL)
    real["_exit"](137)  # the first process of a pid namespace cannot kill itself; the kernel does the rest all the same


def counted(name):
    function = real[name]

    @functools.wraps(function)
    def call(*args, **kwargs):
        if state["role"] == ROLE:
            state["count"] += 1
            if state["count"] == NUMBER:
                die()
        return function(*args, **kwargs)

    return call


def becomes(module, name, role):
    function = getattr(module, name)

    def call(*args, **kwargs):
        state["role"] = role
        state["count"] = 0
        return function(*args, **kwargs)

    setattr(module, name, call)


sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE] + [str(SHIM.parent)]
main = importlib.import_module("shim.main")
becomes(importlib.import_module("shim.disk"), "writer_main", "writer")
becomes(importlib.import_module("shim.child"), "run", "child")
becomes(importlib.import_module("shim.detach"), "become_remover", "janitor")
for name in CALLS:
    setattr(os, name, counted(name))
result = main.main(sys.argv[1:])
(HERE / "count").write_text(str(state["count"]))  # of a shim that has come to its end
sys.exit(result)
"""


@dataclass
class Told:
    """What has been said of each attempt, in order."""

    ends: dict[str, list[Exit]] = field(default_factory=dict)

    def hear(self, key: str, end: Exit | None) -> None:
        if end is not None and (not self.ends.get(key) or self.ends[key][-1] != end):
            self.ends.setdefault(key, []).append(end)


@contextlib.contextmanager
def fault(folder: Path, role: str, number: int) -> Iterator[Path]:
    """Shims that are started now are killed at this point; the file is there once one was."""
    folder.mkdir()
    (folder / "__main__.py").write_text(ENTRY.format(shim=str(_SHIM_DIR), role=role, number=number))
    (folder / "armed").write_text("")
    with mock.patch.object(launching, "SHIM_DIR", folder):
        yield folder / "hit"


def attempts(marker: str, ledger: Path) -> list[Launch]:
    """One that ends by itself, one that fails, and one that must be stopped, with all it has started."""
    note = f"echo $SPINETTA_KEY >> {ledger}; : {marker}; "
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    scripts = {
        "well.1": note + "exit 0",
        "fails.1": note + "touch here; exit 3",
        "stays.1": note + f"(setsid sh -c 'sleep 1000; : {marker}' &) ; sleep 1000; : {marker}",
    }
    return [shell(key, script, env={**env, "SPINETTA_KEY": key}) for key, script in scripts.items()]


def contained_attempts(state_dir: Path, rootfs: Path, marker: str, ledger: Path) -> list[Launch]:
    """The same in containers, one with a root of its own to write to."""
    found = []
    for plain in attempts(marker, Path("/outside") / ledger.name):
        launch = script(state_dir, rootfs, plain.key, plain.argv[-1], env=plain.env, writable=plain.key == "fails.1")
        assert launch.container is not None
        mount = {"destination": "/outside", "type": "bind", "source": str(ledger.parent), "options": ["bind", "rw"]}
        launch.container.config["mounts"].append(mount)  # type: ignore[attr-defined]
        found.append(launch)
    return found


async def _live(state_dir: Path, isolate: bool, launches: list[Launch], told: Told) -> None:
    """What a daemon does: bring up what it holds, end it, forget it. Raises RuntimeUnavailable when a shim dies."""
    async with ProcessRuntime.connect(state_dir, node="n1", kill_margin_s=KILL_MARGIN_S, isolate=isolate) as rt:
        await rt.renew(boottime_s())
        for launch in launches:
            held = {each.key: each.exit for each in await rt.held()}
            told.hear(launch.key, held.get(launch.key))
            if launch.key not in held and launch.key not in told.ends:
                told.hear(launch.key, await rt.start(launch))
        while True:
            held = {each.key: each.exit for each in await rt.held()}
            for key, end in held.items():
                told.hear(key, end)
            missing = {launch.key for launch in launches} - set(held) - set(told.ends)
            if missing:
                raise RuntimeUnavailable(f"a new shim, which does not know {missing}")
            if "stays.1" in held and held["stays.1"] is None:
                await rt.stop("stays.1", Reason.CANCELLED)
            if all(end is not None for end in held.values()):
                break
            await asyncio.sleep(0.01)
        for key in held:
            await rt.forget(key)
        if await rt.held():
            raise RuntimeUnavailable("not all is forgotten")
        await rt.shutdown_shim()


async def story(folder: Path, role: str, number: int, *, isolate: bool, containers: bool = False) -> bool:
    """Live through one death; whether the point was reached. AssertionError: something was not made good."""
    state_dir, outside, marker, told = folder / "state", folder / "outside", uuid.uuid4().hex, Told()
    outside.mkdir()
    ledger = outside / "ledger"
    if containers:
        rootfs = make_rootfs(folder / "rootfs")
        os.chown(outside, OUTSIDE + 1000, OUTSIDE + 1000)
        launches = contained_attempts(state_dir, rootfs, marker, ledger)
    else:
        launches = attempts(marker, ledger)
    state_dir.mkdir()
    name = remains.name_of(state_dir, "n1")
    stale = {str(path) for path in groups_of(name)}  # of a directory before ours with the same number
    try:
        with fault(folder / "entry", role, number) as hit:
            async with asyncio.timeout(STORY_LIMIT_S):
                while True:
                    try:
                        await _live(state_dir, isolate, launches, told)
                        break
                    except RuntimeUnavailable:
                        await asyncio.sleep(0.02)
            reached = hit.exists()
        if (
            reached and set(leftovers(state_dir, name)) - stale
        ):  # killed when all was said and done: the next start finds it
            await _live(state_dir, isolate, [], told)
        lines = ledger.read_text().split() if ledger.exists() else []
        _judge(told, lines)
        await _nothing_left(state_dir, name, marker, stale)
        return reached
    finally:
        clean_up(state_dir)


def _judge(told: Told, lines: list[str]) -> None:
    expected = {"well.1": (Reason.EXIT, 0), "fails.1": (Reason.EXIT, 3), "stays.1": (Reason.CANCELLED, None)}
    for key, ends in told.ends.items():
        assert lines.count(key) <= 1, f"{key} ran more than once"
        assert len(ends) == 1, f"{key} has ended in several ways: {ends}"
        end = ends[0]
        if end.reason in (Reason.FENCED, Reason.NODE_UNFIT):
            assert key not in lines, f"{key} is called not started, and has run: {end}"
        elif end.reason is Reason.SIGNAL:
            assert end.signal == 9, end  # killed before its program had taken over
            assert key not in lines
        elif end.reason is not Reason.SHIM_LOST:
            # A container's command that ends by TERM is told with the exit code of its init.
            code = None if end.reason is Reason.CANCELLED and end.exit_code == 143 else end.exit_code
            assert (end.reason, code) == expected[key], f"{key}: {end}"
            assert key in lines or key == "stays.1"
    assert set(told.ends) == set(expected)


async def _nothing_left(state_dir: Path, name: str, marker: str, stale: set[str]) -> None:
    await until(lambda: not living(marker))
    left = set(leftovers(state_dir, name)) - stale
    assert not left, f"left over: {left}"


def leftovers(state_dir: Path, name: str) -> list[str]:
    """What should have gone with a shim that has ended: files, control groups, mounts."""
    found = (Path(where) / name for where, _, names in os.walk(state_dir) for name in names)  # trash goes meanwhile
    left = [str(path) for path in found if path.name.startswith(".") or path.suffix == ".tmp"]
    for folder in ("attempts", "services", "scratch", "runc", "bundle"):
        left += [str(path) for path in (state_dir / folder).iterdir()]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left += map(str, groups_of(name))
    left += [str(path) for path in Path("/dev/shm").glob(f"{name}*")]
    return left + [line for line in mounts if str(state_dir) in line]


def once(role: str, number: int, *, isolate: bool, containers: bool = False) -> bool:
    """One story in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="spinetta-fault-") as folder:
        return asyncio.run(story(Path(folder), role, number, isolate=isolate, containers=containers))


def points(*, isolate: bool, containers: bool = False) -> int:
    """About how many points the life of a shim has here: it depends on the machine's control groups, and on time."""
    with tempfile.TemporaryDirectory(prefix="spinetta-fault-") as folder:
        asyncio.run(story(Path(folder), "shim", 1_000_000, isolate=isolate, containers=containers))
        return int((Path(folder) / "entry" / "count").read_text())


def main() -> int:
    """Go through the points."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=ROLES, action="append")
    parser.add_argument("--subreaper", action="store_true")
    parser.add_argument("--containers", action="store_true")
    parser.add_argument("--from", dest="first", type=int, default=1)
    parser.add_argument("--step", type=int, default=1)
    options = parser.parse_args()
    failed = 0
    for role in options.role or ROLES:
        number, begun_s = options.first, time.monotonic()
        while True:
            try:
                if not once(role, number, isolate=not options.subreaper, containers=options.containers):
                    break
            except (AssertionError, TimeoutError) as error:
                failed += 1
                _say(f"{role} {number}: {type(error).__name__} {error}")
            number += options.step
        _say(f"{role}: points up to {number - 1}, {time.monotonic() - begun_s:.0f} s, {failed} failed")
    return 1 if failed else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
