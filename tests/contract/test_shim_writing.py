"""When the shim's records are on the disk: before a start; after an end was told, and then in any case."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from spinetta.model import Reason
from spinetta.runtime import launch as launching
from spinetta.runtime.shim import records, wire, writing
from tests.contract.containers import rootfs, script
from tests.contract.shims import asynchronous, end_of, isolate, ran, runtime, shell, state_dir, until

pytestmark = pytest.mark.contract
_ = (isolate, rootfs, state_dir)  # fixtures
LIMIT_S = 30.0
INTENT = {"v": 2, "state": "started", "key": "a.1"}
END = {"v": 2, "state": "ended", "key": "a.1", "exit": {"message": ""}}


class Disk:
    """Syncs as the writing process asks for them: noted, held up, refused."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.turning = threading.Event()
        self.refuses = False

    def fsync(self, fd: int) -> None:
        """In its place."""
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        assert self.turning.wait(LIMIT_S)
        if self.refuses:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced.append(name)


class Asker:
    """The shim's end of the socket."""

    def __init__(self, sock: socket.socket, folder: Path, disk: Disk, serving: threading.Thread) -> None:
        self._sock = sock
        self._serving = serving
        self._lines = wire.Lines()
        self._answers: list[dict[str, Any]] = []
        self.folder = folder
        self.path = folder / "a.1"
        self.disk = disk

    def ask(self, number: int, op: str, **fields: Any) -> None:
        """One request about the record."""
        self._sock.sendall(wire.encode({"n": number, "op": op, "path": str(self.path), **fields}))

    def put(self, number: int, record: dict[str, Any], *, later: bool) -> None:
        """Write it."""
        self.ask(number, "put", record=record, later=later)

    def answer(self) -> dict[str, Any]:
        """The next one."""
        while not self._answers:
            self._answers += [wire.decode(line) for line in self._lines.feed(self._sock.recv(1 << 16))]
        return self._answers.pop(0)

    def told(self) -> tuple[int, str, bool]:
        """Of the next one: what it answers, the error, and whether it is only written."""
        answer = self.answer()
        return answer["n"], answer["error"], bool(answer.get("written"))

    def end(self) -> None:
        """As when the shim ends, or is killed."""
        self.disk.turning.set()
        self._sock.shutdown(socket.SHUT_WR)
        self._serving.join(LIMIT_S)
        assert not self._serving.is_alive()

    def names(self) -> list[str]:
        """What is in the folder."""
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def asker(tmp_path: Path) -> Iterator[Asker]:
    folder = tmp_path / "attempts"
    folder.mkdir()
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT_S)
    disk = Disk()
    serving = threading.Thread(target=writing.Writing(theirs, tmp_path / "log").serve)
    with ours, theirs, mock.patch.object(os, "fsync", disk.fsync):
        serving.start()
        asker = Asker(ours, folder, disk, serving)
        try:
            yield asker
        finally:
            asker.end()


def test_an_intent_is_answered_when_it_and_its_folder_are_synced(asker: Asker) -> None:
    asker.disk.turning.set()
    asker.put(1, INTENT, later=False)
    assert asker.told() == (1, "", False)
    assert asker.disk.synced == [".a.1.tmp", "attempts"]
    assert records.read_records(asker.folder).found == {"a.1": INTENT}


def test_an_end_is_answered_when_it_is_written_and_again_when_it_is_synced(asker: Asker) -> None:
    asker.disk.turning.set()
    asker.put(1, INTENT, later=False)
    asker.answer()
    asker.disk.turning.clear()
    asker.disk.synced.clear()
    asker.put(2, END, later=True)
    assert asker.told() == (2, "", True)
    assert asker.names() == [".a.1.new", "a.1"]
    assert json.loads(asker.path.read_bytes())["state"] == "started"
    asker.disk.turning.set()
    assert asker.told() == (2, "", False)
    assert asker.disk.synced == [".a.1.new", "attempts"]
    assert asker.names() == ["a.1"]
    assert json.loads(asker.path.read_bytes())["state"] == "ended"


def test_an_end_that_is_removed_is_never_synced(asker: Asker) -> None:
    asker.disk.turning.set()
    asker.put(1, INTENT, later=False)
    asker.answer()
    asker.put(2, END, later=True)
    asker.ask(3, "remove")
    assert [asker.told() for _ in range(3)] == [(2, "", True), (2, "", False), (3, "", False)]
    assert asker.disk.synced == [".a.1.tmp", "attempts"]
    assert asker.names() == []


def test_a_sync_that_fails_is_said(asker: Asker) -> None:
    asker.disk.turning.set()
    asker.disk.refuses = True
    asker.put(1, END, later=True)
    assert [asker.told() for _ in range(2)] == [(1, "", True), (1, "Input/output error", False)]
    asker.disk.refuses = False
    asker.put(2, END, later=True)
    assert [asker.told() for _ in range(2)] == [(2, "", True), (2, "", False)]
    assert asker.names() == ["a.1"]


def test_what_a_name_has_left_is_not_taken_for_what_becomes_of_its_next(asker: Asker) -> None:
    """As services are started again, without being forgotten."""
    asker.disk.turning.set()
    asker.put(1, END, later=True)
    asker.put(2, INTENT, later=False)
    assert [asker.told() for _ in range(3)] == [(1, "", True), (1, "", False), (2, "", False)]
    assert asker.names() == ["a.1"]
    assert records.read_records(asker.folder).found == {"a.1": INTENT}


def test_who_writes_is_done_when_all_is_synced(asker: Asker) -> None:
    asker.disk.turning.set()
    for number in range(1, 3 * writing.SYNCS_AT_ONCE):
        asker.path = asker.folder / f"a.{number}"
        asker.put(number, END, later=True)
    asker.end()
    assert len(asker.names()) == 3 * writing.SYNCS_AT_ONCE - 1
    assert not [name for name in asker.names() if name.startswith(".")]
    assert len(asker.disk.synced) >= len(asker.names())


# With a shim ---------------------------------------------------------------------------------------------------------

ENTRY = """
import importlib, os, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIM = Path({shim!r})
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE] + [str(SHIM.parent)]
real = os.fsync


def fsync(fd):
    path = os.readlink(f"/proc/self/fd/{{fd}}")
    while Path(path).parent.name == "attempts" and path.endswith({suffix!r}) and (HERE / "frozen").exists():
        time.sleep(0.005)  # as the kernel would
    if path.endswith({suffix!r}) and (HERE / "broken").exists():
        raise OSError(5, os.strerror(5))
    real(fd)


main = importlib.import_module("shim.main")
importlib.import_module("shim.ending").RECORD_AGAIN_S = 0.05
os.fsync = fsync
sys.exit(main.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def ill_disk(suffix: str, ill: str) -> Iterator[Path]:
    """Shims that are started now wait, or fail, at the sync of such files, for as long as the file is there."""
    with tempfile.TemporaryDirectory(prefix="spinetta-entry-") as folder:
        entry, switch = Path(folder) / "entry", Path(folder) / "entry" / ill
        entry.mkdir()
        (entry / "__main__.py").write_text(ENTRY.format(shim=str(launching.SHIM_DIR), suffix=suffix))
        switch.touch()
        with mock.patch.object(launching, "SHIM_DIR", entry):
            try:
                yield switch
            finally:
                switch.unlink(missing_ok=True)


def inside(shim_pid: int) -> Path:
    """The file system as the shim sees it."""
    return Path(f"/proc/{shim_pid}/root")


def state_of(record: Path) -> str:
    return str(json.loads(record.read_bytes())["state"])


@asynchronous
async def test_nothing_runs_before_its_intent_is_durable(state_dir: Path, isolate: bool, tmp_path: Path) -> None:
    ran_at = tmp_path / "ran"
    with ill_disk(".tmp", "frozen") as frozen:
        async with runtime(state_dir, isolate=isolate) as rt:
            attempt = shell("a.1", f"echo > {ran_at}")
            starting = asyncio.create_task(rt.start(attempt))
            await until(lambda: (state_dir / "attempts" / ".a.1.tmp").exists())
            assert not starting.done()
            assert not ran_at.exists()
            frozen.unlink()
            ended = await starting or await end_of(rt, "a.1")
            assert (ended.exit_code, ran_at.exists()) == (0, True)


@asynchronous
async def test_a_container_is_made_and_not_let_go_before_its_intent_is_durable(state_dir: Path, rootfs: Path) -> None:
    with ill_disk(".tmp", "frozen") as frozen:
        async with runtime(state_dir) as rt:
            starting = asyncio.create_task(rt.start(script(state_dir, rootfs, "a.1", "echo here")))
            log = state_dir / "logs" / "a.1" / "stdout"
            await until(lambda: (inside(rt.shim_pid()) / str(state_dir / "runc/.pid-a.1").lstrip("/")).exists())
            assert not starting.done()
            assert log.read_text() == ""
            frozen.unlink()
            assert (await starting or await end_of(rt, "a.1")).exit_code == 0
            assert log.read_text() == "here\n"


@asynchronous
async def test_an_end_is_told_before_its_sync_and_outlives_the_shim(state_dir: Path, isolate: bool) -> None:
    record = state_dir / "attempts" / "a.1"
    with ill_disk(".new", "frozen"):
        async with runtime(state_dir, isolate=isolate) as rt:
            assert (await ran(rt, shell("a.1", "exit 7"))).exit_code == 7
            assert state_of(record) == "started"
            os.kill(rt.shim_pid(), signal.SIGKILL)  # its writer, without a pid namespace, ends when it can
    async with runtime(state_dir, isolate=isolate) as rt:
        ended = await end_of(rt, "a.1")
        assert (ended.reason, ended.exit_code) == (Reason.EXIT, 7)
        assert state_of(record) == "ended"
        await rt.forget("a.1")
        assert list(record.parent.iterdir()) == []


@asynchronous
async def test_an_end_that_cannot_be_synced_is_tried_again(state_dir: Path) -> None:
    record = state_dir / "attempts" / "a.1"
    with ill_disk(".new", "broken") as broken:
        async with runtime(state_dir) as rt:
            ended = await ran(rt, shell("a.1", "exit 7"))
            assert (ended.exit_code, ended.message) == (7, "")
            said = "a.1: cannot write its exit record, trying again: Input/output error"
            await until(lambda: said in (state_dir / "shim.log").read_text())
            assert state_of(record) == "started"
            broken.unlink()
            await until(lambda: state_of(record) == "ended")


@asynchronous
async def test_a_shim_that_ends_leaves_durable_ends(state_dir: Path, isolate: bool) -> None:
    async with runtime(state_dir, isolate=isolate) as rt:
        assert await rt.start(shell("a.1", "sleep 1000")) is None
        await rt.shutdown_shim(wait_s=0.1)
    record = state_dir / "attempts" / "a.1"
    assert [path.name for path in record.parent.iterdir()] == ["a.1"]
    assert state_of(record) == "ended"
