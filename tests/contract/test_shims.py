"""The shim's own upgrade, with real shims: one of the installed code takes what is new, the one before it finishes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from spinetta.model import Reason
from spinetta.runtime import generations
from spinetta.runtime.execs import open_command
from tests.contract.oldshims import (
    WAITS,
    alive,
    begin,
    copy_of_the_code,
    ends,
    go,
    home,
    installed,
    old,
    one_is_left,
    one_shim,
    other,
    second,
    shims,
)
from tests.contract.shims import KILL_MARGIN_S, asynchronous, boottime_s, isolate, kill_shim, shell, until

pytestmark = pytest.mark.contract
_ = (home, isolate, old, other)  # fixtures


@asynchronous
async def test_the_old_one_finishes_and_a_new_one_takes_what_is_new(old: Path, home: Path, isolate: bool) -> None:
    earlier = await begin(old, home, "old.1", "old.2", isolate=isolate, keep_scratch_s=60)
    async with shims(home, isolate=isolate) as rt:
        assert [shim.retiring for shim in rt.described()] == [False, True]
        assert rt.described()[1].attempts == 2
        assert "goes on with 2 attempts" in " ".join(rt.warnings())
        assert rt.shim_pid() != earlier
        assert alive(earlier)
        assert rt.state_dir == second(home)
        assert await rt.start(shell("new.1", WAITS, keep_scratch_s=60)) is None
        assert [held.key for held in await rt.held()] == ["new.1", "old.1", "old.2"]
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
        assert await rt.start(shell("old.1", "echo twice")) is not None, "a late start, while the old one is there"
        go(home, "old.2")
        await ends(rt, "old.2")
        await rt.forget("old.2")
        await one_is_left(rt)
        await until(lambda: not alive(earlier))
        go(second(home), "new.1")
        told = await ends(rt, "new.1")
        assert set(told) == {"new.1"}, "an end that was forgotten is told again"
        await rt.forget("new.1")
        for key in ("old.1", "new.1"):
            assert rt.log_path(key, "stdout").read_text() == "begun\ndone\n"
        await until(lambda: len(list((home / "kept").iterdir())) == 3)
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
    grace_s = KILL_MARGIN_S + 2.5  # more than a shim takes to start on a busy machine
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
