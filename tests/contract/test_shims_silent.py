"""The shim's own upgrade beside a shim that does not answer: the others' tasks are looked after all the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spinetta.errors import RuntimeUnavailable
from spinetta.model import Reason
from spinetta.runtime import recorded, succession
from spinetta.runtime.shim.records import beside, put_beside, seal
from tests.contract.oldshims import WAITS, alive, begin, ends, go, home, installed, one_is_left, one_shim, other, shims
from tests.contract.shims import asynchronous, boottime_s, children, name_of, shell, until

pytestmark = pytest.mark.contract
_ = (home, other)  # fixtures


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "ANSWER_LIMIT_S", 2.0)
    monkeypatch.setattr(succession, "ATTACH_LIMIT_S", 3.0)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynchronous
async def test_one_that_is_stopped_keeps_nobody_from_the_others(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        newest, before = rt.shim_pid(), [(one.key, one.token, one.incarnation) for one in await rt.held()]
    with stopped(earlier):
        async with shims(home) as rt:
            assert rt.shim_pid() == newest
            assert all(one.exit is None for one in await rt.held())
            found = [(one.key, one.token, one.incarnation) for one in await rt.held()]
            assert found == before, "what it holds is not known to have ended"
            assert "does not answer, and what it holds is taken for running, 1 attempt" in " ".join(rt.warnings())
            assert [(shim.retiring, shim.attempts) for shim in rt.described()] == [(False, 1), (True, 1)]
            assert rt.are_scattered()
            await rt.renew(boottime_s())
            for asked in (rt.start(shell("old.1", "echo twice")), rt.stop("old.1", "cancelled"), rt.usage("old.1")):
                with pytest.raises(RuntimeUnavailable):
                    await asked
            with pytest.raises(RuntimeUnavailable):
                await rt.forget("old.1")
            assert await rt.usage("new.1") is not None
            assert await rt.service("etcd") is None, "it has no record of one"
    async with shims(home) as rt:
        assert not any(member.silent for member in rt._members)


@asynchronous
async def test_when_it_answers_it_is_one_like_the_others(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1", "old.2")
    with stopped(earlier), pytest.raises(RuntimeUnavailable):  # there is no other whose tasks could be looked after
        async with shims(home):
            pass
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
    with stopped(earlier):
        go(home, "old.1")
        async with shims(home) as rt:
            assert [one.exit for one in await rt.held()] == [None] * 3
            os.kill(earlier, signal.SIGCONT)
            await until(lambda: not rt._retiring[0].silent)
            assert (await ends(rt, "old.1"))["old.1"][-1].exit.exit_code == 0
            go(home, "old.2")
            assert (await ends(rt, "old.2"))["old.2"][-1].exit.exit_code == 0
            assert [one.key for one in await rt.held() if one.exit is None] == ["new.1"]
            for key in ("old.1", "old.2"):
                await rt.forget(key)
            await one_is_left(rt)
            assert await rt.start(shell("old.1", "echo twice")) is not None, "a late start"


@asynchronous
async def test_one_that_was_killed_and_whose_writer_hangs(other: Path, home: Path) -> None:
    """It has the lock, so nobody can clear up yet."""
    earlier = await begin(other, home, "old.1", isolate=False)
    async with shims(home, isolate=False) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
    (writer,) = [child.pid for child in children(earlier) if name_of(child.pid) == "spinetta-writer"]
    with stopped(writer):
        os.kill(earlier, signal.SIGKILL)
        async with shims(home, isolate=False) as rt:
            assert {one.key: one.exit for one in await rt.held()} == {"old.1": None, "new.1": None}
            os.kill(writer, signal.SIGCONT)
            told = await ends(rt, "old.1")
            assert told["old.1"][-1].exit.reason is Reason.SHIM_LOST
            await until(lambda: not any(member.silent for member in rt._members))
            await rt.forget("old.1")
            await one_is_left(rt)


@asynchronous
async def test_etcd_may_run_in_one_that_is_silent(other: Path, home: Path, tmp_path: Path) -> None:
    with installed(other):
        async with one_shim(home) as first:
            await first.start_service("etcd", ["/bin/sleep", "1000"], {}, str(tmp_path), tmp_path / "log")
            earlier = first.shim_pid()
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        newest = rt.shim_pid()
    with stopped(earlier):
        async with shims(home) as rt:
            with pytest.raises(RuntimeUnavailable):
                await rt.service("etcd")
            with pytest.raises(RuntimeUnavailable):
                await rt.start_service("etcd", ["/bin/true"], {}, "/", tmp_path / "log")
            assert await rt.service("another") is None
            assert not rt.strands("etcd"), "it cannot be stopped there"
            with pytest.raises(RuntimeUnavailable):
                await rt.shutdown_shim()
            assert not alive(newest), "it keeps none other"


def test_records_are_read_without_changing_anything(tmp_path: Path) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    for key, number in (("t.1", 1), ("t.2", 2)):
        put_beside(folder / key, b"")
        record = seal({"v": 2, "state": "started", "token": number, "incarnation": "i", "started_ms": 10 * number})
        beside(folder / key).write_text(json.dumps(record))
    beside(folder / "t.1").rename(folder / "t.1")
    (folder / "t.2").write_text("of before")
    (folder / "t.3").write_text("damaged")
    (folder / ".t.4.tmp").write_text("half")
    names = sorted(path.name for path in folder.iterdir())
    found = [(one.key, one.token, one.incarnation, one.started_ms, one.exit) for one in recorded.attempts(tmp_path)]
    assert found == [("t.1", 1, "i", 10, None), ("t.2", 2, "i", 20, None), ("t.3", 0, "", 0, None)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert recorded.services(tmp_path) == ()
