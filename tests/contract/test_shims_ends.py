"""The shim's own upgrade when shims do not end, or new ones do not begin."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest

from spinetta.cli.node import _end_shim as end_without_a_daemon
from spinetta.errors import RuntimeUnavailable
from spinetta.node.entry import IDENTITY_FILE, note_shims_ended
from spinetta.node.lock import DirectoryLock
from spinetta.runtime import generations, process
from spinetta.runtime.client import cancelled
from spinetta.runtime.shim.wire import SOCKET_NAME
from spinetta.runtime.shims import end_all
from spinetta.store import identity as identities
from spinetta.store.identity import Identity
from tests.contract.oldshims import (
    WAITS,
    alive,
    begin,
    copy_of_the_code,
    ends,
    home,
    installed,
    one_is_left,
    other,
    second,
    shims,
)
from tests.contract.shims import asynchronous, boottime_s, kill_shim, living, shell, until

pytestmark = pytest.mark.contract
_ = (home, other)  # fixtures


@asynchronous
async def test_an_empty_one_that_leaves_something_is_none_of_them_any_more(
    other: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is closed: to ask it would keep all others from their renewals."""
    earlier = await begin(other, home)
    monkeypatch.setattr(generations, "clean", lambda *_: False)
    async with shims(home) as rt:
        assert (len(rt.described()), rt.state_dir, alive(earlier)) == (1, second(home), False)
        await rt.renew(boottime_s())
        assert await rt.held() == []


@pytest.mark.parametrize("trouble", ["folder", "code"])
@asynchronous
async def test_when_no_new_one_comes_up_the_old_one_goes_on(
    other: Path, home: Path, tmp_path: Path, trouble: str
) -> None:
    earlier = await begin(other, home, "old.1")
    code = copy_of_the_code(tmp_path / "new" / "shim", remark="new")
    if trouble == "folder":
        (home / generations.LATER).touch()
    else:
        (code / "main.py").write_text("1 / 0\n")
    with installed(code):
        async with shims(home) as rt:
            assert (rt.shim_pid(), rt.state_dir) == (earlier, home)
            assert "no shim of the installed code can be started" in " ".join(rt.warnings())
            assert await rt.start(shell("new.1", WAITS)) is None
            assert [one.key for one in await rt.held()] == ["new.1", "old.1"]


@asynchronous
async def test_without_descriptors_they_are_looked_after_later(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1")

    def none_left(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with shims(home) as rt:
        await rt.stop("old.1", "cancelled")
        await ends(rt, "old.1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pidfd_open", none_left)
            patch.setattr(generations, "LOCK_WAIT_S", 0.1)
            await rt.forget("old.1")
            await one_is_left(rt)
        assert not rt._tending.done()
        await rt.shutdown_shim()
        assert not alive(rt.shim_pid())
    assert alive(earlier), "it ends by itself when nobody has asked for anything for a while, or at the next start"


@asynchronous
async def test_all_are_ended_whatever_became_of_looking_after_them(other: Path, home: Path) -> None:
    earlier = await begin(other, home, "old.1")

    async def dies() -> None:
        raise AssertionError("a bug")

    async with shims(home) as rt:
        await rt._stop_working()
        rt._tending = asyncio.create_task(dies())
        await until(rt._tending.done)
        await rt.shutdown_shim()
        assert not alive(rt.shim_pid())
        assert not alive(earlier)


@asynchronous
async def test_who_cancels_a_task_can_be_cancelled_meanwhile() -> None:
    """Else a daemon that is told to end would go on looking after its shims for ever."""
    let_go = asyncio.Event()

    async def lingers() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await let_go.wait()

    task = asyncio.create_task(lingers())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(cancelled(task))
    await until(lambda: task.cancelling() > 0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    let_go.set()
    await asyncio.wait([task])
    assert task.cancelled()


@asynchronous
async def test_of_several_of_the_same_code_the_one_with_most_takes_what_is_new(home: Path, other: Path) -> None:
    """A retiring one that dies is replaced by one of the installed code, which clears up."""
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        assert await rt.start(shell("new.2", WAITS)) is None
        newest = rt.shim_pid()
        kill_shim(home)
        await ends(rt, "old.1")
    async with shims(home) as rt:
        assert (rt.shim_pid(), len(rt.described())) == (newest, 2)


@pytest.mark.parametrize("unread", ["attempts", "shim.json", "shim.lock"])
def test_what_cannot_be_seen_is_not_free(home: Path, unread: str) -> None:
    """An end that nobody was told of may be there: the task would run again."""
    folder = second(home)
    (folder / "attempts").mkdir(parents=True)
    if unread == "attempts":
        (folder / unread).rmdir()
    (folder / unread).symlink_to(unread)  # ELOOP, for root as well, as a disk's error would be
    assert generations.is_occupied(folder)
    assert generations.occupied(home) == [folder]
    assert not generations.remove(folder) or unread != "shim.lock"


@pytest.fixture
def slow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something to remove, as if it were millions of files: removing begins with the file `go` of this folder."""
    waits = f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; until [ -e {tmp_path}/go ]"
    (tmp_path / "rm").write_text(f'#!/bin/sh\n{waits}; do sleep 0.05; done; exec /bin/rm "$@"\n')
    (tmp_path / "rm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (home / "generations" / ".gone-2-abcd" / "trash").mkdir(parents=True)
    return tmp_path


@asynchronous
async def test_nobody_waits_for_the_removal_of_what_tasks_left(other: Path, home: Path, slow: Path) -> None:
    """It takes longer than the grace of those that wait for renewals."""
    await begin(other, home, "old.1")
    (home / "trash" / "t").mkdir()
    async with shims(home) as rt:
        assert (home / "generations" / ".gone-2-abcd").exists()
        await rt.stop("old.1", "cancelled")
        await ends(rt, "old.1")
        await rt.forget("old.1")
        await one_is_left(rt)
        await until(lambda: not (home / "trash").exists())
        (slow / "go").touch()
        await until(lambda: not list((home / "generations").glob(".gone-*")))


@pytest.mark.parametrize("for_good", [True, False])
@asynchronous
async def test_who_removes_ends_with_the_daemon_and_the_next_goes_on(
    home: Path, slow: Path, monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    monkeypatch.setattr(generations, "SWEEP_AT_END_S", 0.3)
    async with shims(home) as rt:
        await until((slow / "pid").exists)
        if for_good:
            await rt.shutdown_shim()
    assert not alive(int((slow / "pid").read_text()))
    assert (home / "generations" / ".gone-2-abcd").exists()
    (slow / "go").touch()
    async with shims(home) as rt:
        if for_good:
            await rt.shutdown_shim()
            assert not (home / "generations").exists()
        await until(lambda: not (home / "generations").exists())


def test_damaged_records_of_a_later_one_are_kept(home: Path) -> None:
    folder = second(home)
    (folder / "broken").mkdir(parents=True)
    (folder / "broken" / "t.1.abcd").write_text("damaged")
    assert generations.occupied(home) == []
    (kept,) = (home / "broken").iterdir()
    assert kept.read_text() == "damaged"


@asynchronous
async def test_one_that_cannot_be_ended_keeps_none_other(
    other: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `spinetta node stop`, when there is no daemon."""
    await begin(other, home, "old.1")
    async with shims(home) as rt:
        assert await rt.start(shell("new.1", WAITS)) is None
        newest = rt.shim_pid()
    kill_shim(home)
    (home / SOCKET_NAME).unlink()
    monkeypatch.setattr(process, "ATTACH_LIMIT_S", 0.5)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(home / SOCKET_NAME))
        server.listen()
        answering = asyncio.create_task(_hang_up(server))
        with pytest.raises(RuntimeUnavailable):
            await end_all(home)
        await cancelled(answering)
    assert not alive(newest)
    (home / SOCKET_NAME).unlink()
    assert not await end_all(home), "there is no other"


async def _hang_up(server: socket.socket) -> None:
    server.setblocking(False)
    while True:
        (await asyncio.get_running_loop().sock_accept(server))[0].close()


def test_what_was_scattered_and_is_not_any_more_is_noted(home: Path) -> None:
    path = home.parent / IDENTITY_FILE
    folder = second(home)
    (folder / "attempts").mkdir(parents=True)
    (folder / "attempts" / "t.1").touch()
    identities.save(path, Identity(node="n1", shims="later"))
    note_shims_ended(home.parent)
    assert identities.load(path) == Identity(node="n1", shims="later")
    (folder / "attempts" / "t.1").unlink()
    with DirectoryLock(home.parent):
        note_shims_ended(home.parent)
        assert identities.load(path) == Identity(node="n1", shims="later"), "a daemon runs, and knows better"
    note_shims_ended(home.parent)
    assert identities.load(path) == Identity(node="n1")
    assert not folder.exists()


def test_a_stop_without_a_daemon_removes_what_is_left_for_a_while(
    home: Path, slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "SWEEP_AT_END_S", 0.3)
    assert not end_without_a_daemon(home.parent)
    assert not living(str(home / "generations"))
    assert (home / "generations" / ".gone-2-abcd").exists()
    (slow / "go").touch()
    assert not end_without_a_daemon(home.parent)
    assert not (home / "generations").exists()
