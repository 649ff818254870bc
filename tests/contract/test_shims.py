"""The shim's own upgrade, with real shims: one of the installed code takes what is new, the one before it finishes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Reason
from spinetta.runtime import generations
from spinetta.runtime.execs import open_command
from spinetta.runtime.protocol import Exited
from spinetta.runtime.shims import Shims
from tests.contract.oldshims import copy_of_the_code, home, installed, old, one_shim, other, shims
from tests.contract.shims import KILL_MARGIN_S, asynchronous, boottime_s, identity, isolate, kill_shim, shell, until

pytestmark = pytest.mark.contract
_ = (home, isolate, old, other)  # fixtures
LIMIT_S = 30.0
LIMITS_SAID = ('["process", *LIMITS, OPEN_FILES_LIMIT, ', '["process", ')
WAITS = "echo begun; while [ ! -e go ]; do sleep 0.05; done; echo done"


def pid_of(folder: Path) -> int:
    return int(identity(folder)["pid"])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def second(home: Path) -> Path:
    return home / "generations" / "2"


async def ends(rt: Shims, *keys: str) -> dict[str, list[Exited]]:
    """What is told of these, until there is an end of each."""
    told: dict[str, list[Exited]] = {}
    async with asyncio.timeout(LIMIT_S):
        async for event in rt.events():
            if isinstance(event, Exited):
                told.setdefault(event.key, []).append(event)
            if set(keys) <= set(told):
                return told
    raise AssertionError("the events ended")


async def one_is_left(rt: Shims) -> None:
    await until(lambda: len(rt.described()) == 1)


async def begin(code: Path, home: Path, *keys: str, isolate: bool = True, **changes: object) -> int:
    """A shim of this code with attempts that wait for a file ``go`` in their scratch directories; its pid."""
    with installed(code):
        async with one_shim(home, isolate=isolate) as rt:
            for key in keys:
                assert await rt.start(shell(key, WAITS, **changes)) is None
            return rt.shim_pid()


def go(folder: Path, key: str) -> None:
    (folder / "scratch" / key / "go").touch()


@asynchronous
async def test_the_old_one_finishes_and_a_new_one_takes_what_is_new(old: Path, home: Path, isolate: bool) -> None:
    earlier = await begin(old, home, "old.1", isolate=isolate, keep_scratch_s=60)
    async with shims(home, isolate=isolate) as rt:
        assert [shim.retiring for shim in rt.described()] == [False, True]
        assert rt.described()[1].attempts == 1
        assert "goes on with 1 attempt" in " ".join(rt.warnings())
        assert rt.shim_pid() != earlier
        assert alive(earlier)
        assert rt.state_dir == second(home)
        assert await rt.start(shell("new.1", WAITS, keep_scratch_s=60)) is None
        assert [held.key for held in await rt.held()] == ["new.1", "old.1"]
        assert rt.state_dir_of("old.1") == home
        assert rt.state_dir_of("new.1") == second(home)
        assert await rt.start(shell("old.1", "echo twice")) is None, "it is held, and is not to run again"
        async with open_command(rt.state_dir_of("old.1"), "old.1", ["sh", "-c", "exit 7"]) as command:
            assert [item async for item in command.outputs()]
        assert await rt.usage("old.1") is not None
        assert await rt.usage("new.1") is not None
        go(home, "old.1")
        told = await ends(rt, "old.1")
        assert [one.exit.exit_code for one in told["old.1"]] == [0]
        await rt.forget("old.1")
        await one_is_left(rt)
        await until(lambda: not alive(earlier))
        go(second(home), "new.1")
        told = await ends(rt, "new.1")
        assert set(told) == {"new.1"}, "an end that was forgotten is told again"
        await rt.forget("new.1")
        for key in ("old.1", "new.1"):
            assert rt.log_path(key, "stdout").read_text() == "begun\ndone\n"
        await until(lambda: len(list((home / "kept").iterdir())) == 2)
        assert await rt.start(shell("old.1", "echo twice")) is not None, "a late start of what the old one had held"
        assert rt.warnings() == rt._newest.runtime.warnings()
    async with shims(home, isolate=isolate) as rt:
        assert [shim.retiring for shim in rt.described()] == [False]
        assert (await rt.held(), rt.state_dir) == ([], second(home))


@asynchronous
async def test_one_that_holds_nothing_is_replaced_where_it_is(old: Path, home: Path) -> None:
    earlier = await begin(old, home)
    async with shims(home) as rt:
        assert (rt.shim_pid() != earlier, alive(earlier)) == (True, False)
        assert (len(rt.described()), rt.state_dir) == (1, home)
        latest = rt.shim_pid()
    async with shims(home) as rt:
        assert rt.shim_pid() == latest, "the same code is left alone"


@asynchronous
async def test_when_the_old_one_dies_only_its_own_are_lost(other: Path, home: Path) -> None:
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        kill_shim(home)
        told = await ends(rt, "old.1")
        assert [one.exit.reason for one in told["old.1"]] == [Reason.SHIM_LOST]
        held = {one.key: one.exit for one in await rt.held()}
        assert held["new.1"] is None
        await rt.forget("old.1")
        await one_is_left(rt)
        go(second(home), "new.1")
        assert (await ends(rt, "new.1"))["new.1"][-1].exit.exit_code == 0


@asynchronous
async def test_when_the_new_one_dies_the_old_one_goes_on(other: Path, home: Path) -> None:
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        kill_shim(second(home))
        told = await ends(rt, "new.1")
        assert told["new.1"][-1].exit.reason is Reason.SHIM_LOST
        await rt.renew(boottime_s())
        assert await rt.start(shell("new.2", "true")) is None, "another is started in its place"
        go(home, "old.1")
        assert (await ends(rt, "old.1"))["old.1"][-1].exit.exit_code == 0


@asynchronous
async def test_a_machine_that_went_down_in_between_comes_back_with_one(other: Path, home: Path) -> None:
    """Whatever had not been told is told, and the directories of later shims go."""
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        assert await rt.start(shell("new.2", "exit 3")) is None
        await ends(rt, "new.2")
    kill_shim(home)
    kill_shim(second(home))
    async with shims(home) as rt:
        assert rt.state_dir == home
        told = await ends(rt, "old.1", "new.1", "new.2")
        assert {key: len(each) for key, each in told.items()} == {"old.1": 1, "new.1": 1, "new.2": 1}
        assert told["new.2"][0].exit.exit_code == 3
        assert {told[key][0].exit.reason for key in ("old.1", "new.1")} == {Reason.SHIM_LOST}
        for key in told:
            await rt.forget(key)
        await one_is_left(rt)
        await until(lambda: not second(home).exists())


@asynchronous
async def test_what_was_not_told_when_all_was_stopped_is_told_afterwards(other: Path, home: Path) -> None:
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        assert rt.are_scattered()
        await rt.shutdown_shim()
        assert not any([await generations.listens(each) for each in (home, second(home))])
        assert rt.are_scattered(), "the end of what ran there is on disk there, and nowhere else"
    async with shims(home) as rt:
        told = await ends(rt, "old.1", "new.1")
        assert {one[0].exit.reason for one in told.values()} == {Reason.RELEASED}
        for key in told:
            await rt.forget(key)
        await one_is_left(rt)
        await until(lambda: not second(home).exists())
        assert (rt.state_dir, rt.are_scattered()) == (home, False)


@asynchronous
async def test_a_dead_one_is_cleared_up_beside_one_that_lives(other: Path, home: Path) -> None:
    """What holds etcd, perhaps, goes on with it; the one that was started to clear up ends."""
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        newest = rt.shim_pid()
    kill_shim(home)
    async with shims(home) as rt:
        assert rt.shim_pid() == newest
        assert (await ends(rt, "old.1"))["old.1"][0].exit.reason is Reason.SHIM_LOST
        await rt.forget("old.1")
        await one_is_left(rt)
        assert rt.shim_pid() == newest


@asynchronous
async def test_each_has_its_deadline_and_each_is_renewed(other: Path, home: Path) -> None:
    grace_s = KILL_MARGIN_S + 1.0
    earlier = await begin(other, home, "old.1", "old.2", grace_s=grace_s)
    async with shims(home) as rt:
        await rt.renew(boottime_s())
        assert await rt.start(shell("new.1", WAITS, grace_s=grace_s)) is None
        until_s = boottime_s() + grace_s + 0.5
        while boottime_s() < until_s:
            await rt.renew(boottime_s())
            await asyncio.sleep(0.2)
        assert {one.key: one.exit for one in await rt.held()} == {"old.1": None, "old.2": None, "new.1": None}
        # One that does not answer keeps no renewal from the other …
        os.kill(earlier, signal.SIGSTOP)
        try:
            until_s = boottime_s() + grace_s + 0.5
            renewals = []
            while boottime_s() < until_s:
                renewals.append(asyncio.create_task(rt.renew(boottime_s())))
                await asyncio.sleep(0.2)
            assert await rt._newest.runtime.usage("new.1") is not None
        finally:
            os.kill(earlier, signal.SIGCONT)
        await asyncio.gather(*renewals, return_exceptions=True)
        # … and without renewals all come to their end.
        told = await ends(rt, "old.1", "old.2", "new.1")
        assert {each[-1].exit.reason for each in told.values()} == {Reason.FENCED}


@asynchronous
async def test_a_service_moves_when_nothing_else_is_left(other: Path, home: Path, tmp_path: Path) -> None:
    async def started(rt: object, script: str = "exec sleep 1000") -> object:
        argv = ["/bin/sh", "-c", script]
        return await rt.start_service("etcd", argv, {"PATH": "/usr/bin:/bin"}, str(tmp_path), tmp_path / "log")  # type: ignore[attr-defined]

    with installed(other):
        async with one_shim(home) as rt:
            assert await rt.start(shell("old.1", WAITS)) is None
            first = await started(rt)
    async with shims(home) as set_:
        assert await set_.service("etcd") == first
        assert await started(set_) == first, "two of them"
        assert not set_.strands("etcd"), "it would have to wait for the attempt all the same"
        go(home, "old.1")
        await ends(set_, "old.1")
        await set_.forget("old.1")
        await until(lambda: set_.strands("etcd"))
        assert "goes on with etcd" in " ".join(set_.warnings())
        # A daemon that dies between stop and start: the next one finds that none runs, and starts it.
        ended = await set_.stop_service("etcd")
        assert ended is not None
        assert ended.exit is not None
    async with shims(home) as set_:
        found = await set_.service("etcd")
        assert found is None or found.exit is not None
        again = await started(set_)
        assert again != first
        assert await set_.service("etcd") == again
        await one_is_left(set_)
        assert await set_.service("etcd") == again
    async with shims(home) as set_:
        assert await set_.service("etcd") == again
        await set_.shutdown_shim()


@asynchronous
async def test_there_are_only_so_many(home: Path, tmp_path: Path) -> None:
    codes = [copy_of_the_code(tmp_path / str(n) / "shim", remark=str(n)) for n in range(generations.GENERATIONS_MAX)]
    for n, code in enumerate(codes):
        with installed(code):
            async with shims(home) as rt:
                assert len(rt.described()) == n + 1
                assert await rt.start(shell(f"old.{n}", WAITS)) is None
    async with shims(home) as rt:
        assert len(rt.described()) == generations.GENERATIONS_MAX
        assert "no more are started" in " ".join(rt.warnings())
        assert rt.state_dir == home / "generations" / str(generations.GENERATIONS_MAX), "the latest there is"
        assert await rt.start(shell("new.1", WAITS)) is None
        go(home, "old.0")
        await ends(rt, "old.0")
        await rt.forget("old.0")
        await until(lambda: len(rt.described()) == generations.GENERATIONS_MAX - 1)
    async with shims(home) as rt:
        assert rt.state_dir == home, "there is room for the installed code again"
        assert len(await rt.held()) == generations.GENERATIONS_MAX
        await rt.shutdown_shim()


@asynchronous
async def test_going_back_to_the_code_before(other: Path, home: Path) -> None:
    """A daemon of that version, which knows of upgrades: the shim that was retiring takes what is new."""
    earlier = await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
    with installed(other):
        async with shims(home) as rt:
            assert rt.shim_pid() == earlier
            assert [shim.attempts for shim in rt.described() if shim.retiring] == [1]
            go(second(home), "new.1")
            await ends(rt, "new.1")
            await rt.forget("new.1")
            await one_is_left(rt)
            await until(lambda: not second(home).exists())


async def unanswered(name: str) -> None:
    raise RuntimeUnavailable(f"nobody says whether {name} runs")


@asynchronous
async def test_one_that_does_not_say_what_it_holds_is_not_taken_for_one_with_nothing(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1")
    async with shims(home) as rt:
        os.kill(earlier, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):  # before its own limit, after which it is RuntimeUnavailable
                await asyncio.wait_for(rt.held(), 1.0)
        finally:
            os.kill(earlier, signal.SIGCONT)
        assert [one.key for one in await rt.held()] == ["old.1"]
        (retiring,) = rt._retiring
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retiring.runtime, "service", unanswered)
            with pytest.raises(RuntimeUnavailable):  # etcd may run there
                await rt.start_service("etcd", ["/bin/true"], {}, "/", home / "log")
            with pytest.raises(RuntimeUnavailable):
                await rt.service("etcd")


@asynchronous
async def test_limits_that_a_shim_does_not_know_are_told(home: Path, tmp_path: Path) -> None:
    """Of one from before there were any: what asks for none is no trouble."""
    code = copy_of_the_code(tmp_path / "code" / "shim", says_its_code=False)
    for name, change in (("wire.py", ("PROTOCOL_VERSION = 2", "PROTOCOL_VERSION = 1")), ("main.py", LIMITS_SAID)):
        text = (code / name).read_text()
        assert text.count(change[0]) == 1, change
        (code / name).write_text(text.replace(*change))
    await begin(code, home, "old.1")
    async with one_shim(home) as rt:
        plain = rt.warnings()
        assert await rt.start(shell("new.1", "true")) is None
        assert rt.warnings() == plain
        assert await rt.start(shell("new.2", "true", log_bytes_max=1, disk_bytes_max=1, open_files=(9, 9))) is None
        told = " ".join(rt.warnings()[len(plain) :])
        for limit in ("log-limit", "disk-limit", "open-files-limit"):
            assert f"{limit} is missing: this node's shim is of an older version" in told
    await begin(copy_of_the_code(tmp_path / "two" / "shim", says_its_code=False), home)
    async with shims(home) as upgraded:
        assert await upgraded.start(shell("new.3", "true", log_bytes_max=1, disk_bytes_max=1)) is None
        assert "log-limit" not in " ".join(upgraded.warnings())


@asynchronous
async def test_a_service_alone_is_not_ended_for_an_upgrade(other: Path, home: Path, tmp_path: Path) -> None:
    """A voter's restart is for the cluster to allow."""
    with installed(other):
        async with one_shim(home) as rt:
            first = await rt.start_service("etcd", ["/bin/sleep", "1000"], {}, str(tmp_path), tmp_path / "log")
    async with shims(home) as found:
        assert len(found.described()) == 2
        assert found.strands("etcd")
        assert await found.service("etcd") == first


@pytest.mark.parametrize("left", ["shim.sock", "attempts/t.1", "lock", ""])
def test_what_shows_that_a_directory_is_not_free(home: Path, left: str) -> None:
    """Each alone; one with nothing is removed."""
    folder = second(home)
    (folder / "attempts").mkdir(parents=True)
    (folder / "shim.lock").touch()
    with (folder / "shim.lock").open() as lock:
        if left == "lock":  # of a shim that is just starting, or of the process that writes for one that died
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif left:
            (folder / left).touch()
        assert generations.occupied(home) == ([folder] if left else [])
        assert folder.exists() == bool(left)


DAEMON = """
import asyncio, sys
from pathlib import Path
from spinetta.runtime.shims import Shims

async def main():
    async with Shims.connect(Path(sys.argv[1]), node="n1", kill_margin_s=1.0):
        print("up", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@asynchronous
async def test_a_daemon_that_is_killed_in_the_midst(other: Path, home: Path) -> None:
    """At any moment of it: the next one finds what there is, and nothing twice."""
    await begin(other, home, "old.1")
    for n in range(6):
        daemon = subprocess.Popen([sys.executable, "-c", DAEMON, str(home)], stdout=subprocess.PIPE)  # noqa: ASYNC220
        try:
            if n:
                await asyncio.sleep(0.25 + 0.12 * n)  # of some 1 s; not to wait for anything, but to strike anywhere
            else:
                assert daemon.stdout is not None
                await asyncio.to_thread(daemon.stdout.readline)
        finally:
            daemon.kill()
            daemon.communicate()
        if n % 2:
            kill_shim(second(home))
    async with shims(home) as rt:
        assert [one.key for one in await rt.held()] == ["old.1"]
        assert sorted(shim.retiring for shim in rt.described()) == [False, True]
        assert rt.state_dir == second(home)
        assert await rt.start(shell("new.1", "exit 4")) is None
        go(home, "old.1")
        told = await ends(rt, "old.1", "new.1")
        assert {key: one[-1].exit.exit_code for key, one in told.items()} == {"old.1": 0, "new.1": 4}
        await rt.forget("old.1")
        await one_is_left(rt)
