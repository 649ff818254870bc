"""The data directory: rights, room, and how long a write takes to last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from spinetta import checkup
from spinetta.checkup import Finding, Level, ok
from spinetta.node.fitness import room
from spinetta.runtime.detect import read_text

MEASURE_S = 3.0
ANSWER_S = 20.0  # for a disk that hangs; then what has been measured so far is judged
REMOVE_S = 1.0
WRITE_BYTES = 2048  # an entry of etcd's log
LAID_OUT_BYTES = 16 << 20  # etcd lays its log out in advance, too, so that a write changes no length
WRITES_MAX = 100_000  # in three seconds only memory takes so many
SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "beegfs", "fuse.sshfs"})
PREFIX = ".spinetta-doctor-"
_MEND_RIGHTS = "run this as the user of the node, or choose a --data-dir of your own"

T = TypeVar("T")


async def data_dir(path: Path) -> list[Finding]:
    """Whether a node can keep things there: by writing, running and removing a file."""
    return await _in_thread(lambda: _data_dir(path), lambda: [_hangs("data-dir", path)])


def _data_dir(path: Path) -> list[Finding]:
    where = existing(path)
    found = []
    try:
        with _trial_file(where) as trial:
            trial.write_text("#!/bin/sh\n")
    except OSError as error:
        return [
            Finding(
                "data-dir", Level.PROBLEM, f"{where} cannot be written to: {error.strerror}",
                "a node keeps all it has there", _MEND_RIGHTS,
            )
        ]  # fmt: skip
    if where != path:
        found.append(ok("data-dir", f"{path} is not there yet, and can be made in {where}"))
    else:
        found += _rights(path)
    flags = os.statvfs(where).f_flag
    if flags & os.ST_NOEXEC:
        found.append(
            Finding(
                "data-dir", Level.WARNING, f"{where} is on a file system mounted noexec",
                "tasks cannot run programs that they write into their scratch directory",
                f"mount -o remount,exec {where}",
            )
        )  # fmt: skip
    kind = file_system(where)
    if kind in SHARED:
        found.append(
            Finding(
                "data-dir", Level.WARNING, f"{where} is on a shared file system ({kind})",
                "etcd's log is slow there and its locks may not hold; containers do not run from some",
                "choose a --data-dir on a disk of this machine",
            )
        )  # fmt: skip
    return found


def _rights(path: Path) -> list[Finding]:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    seen = f"{path} is writable ({mode:o}, of user {status.st_uid})"
    if mode & 0o022:
        return [
            Finding(
                "data-dir", Level.PROBLEM, f"{path} can be written to by others ({mode:o})",
                "they can replace this node's keys, logs and programs", f"chmod go-w {path}",
            )
        ]  # fmt: skip
    if status.st_uid not in (0, os.geteuid()):
        return [
            Finding(
                "data-dir",
                Level.WARNING,
                seen,
                "its owner can replace this node's keys",
                f"chown {os.geteuid()} {path}",
            )
        ]
    return [ok("data-dir", seen)]


async def space(path: Path) -> list[Finding]:
    """Room for bytes and files."""

    def look() -> list[Finding]:
        where = existing(path)
        try:
            left = room(where)
        except OSError as error:
            return [Finding("disk", Level.PROBLEM, f"{where} cannot be looked at: {error.strerror}")]
        free_bytes, free_files = left.free_bytes, left.free_files
        return [checkup.judge_space("disk", free_bytes, free_files, str(where), read_only=left.read_only)]

    return await _in_thread(look, lambda: [_hangs("disk", path)])


async def speed(path: Path, measure_s: float = MEASURE_S, *, voter: bool = True) -> list[Finding]:
    """Write a little and make it last, over and over for `measure_s`; judged as etcd's advice has it."""
    where = existing(path)
    times_s: list[float] = []
    stop, over = threading.Event(), threading.Event()

    def measure() -> str:
        try:
            with _trial_file(where) as trial:
                _write(trial, times_s, time.monotonic() + measure_s, stop)
        except OSError as error:
            return error.strerror or "refused"
        finally:
            over.set()
        return ""

    try:
        problem = await _in_thread(measure, lambda: "", measure_s + ANSWER_S)
    finally:
        stop.set()
        over.wait(REMOVE_S)  # its file goes before we do, unless the disk hangs
    if problem and not times_s:
        seen = f"it could not be measured at {where}: {problem}"
        return [Finding("disk-speed", Level.WARNING, seen, "whether etcd can run here is not known", _MEND_RIGHTS)]
    return [checkup.judge_syncs("disk-speed", list(times_s), kind=file_system(where), voter=voter)]


def _write(path: Path, times_s: list[float], until_s: float, stop: threading.Event) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, LAID_OUT_BYTES)
        os.fsync(fd)
        data = os.urandom(WRITE_BYTES)
        while len(times_s) < WRITES_MAX and not stop.is_set():
            begun_s = time.monotonic()
            if begun_s >= until_s:
                break
            os.pwrite(fd, data, len(times_s) * WRITE_BYTES % LAID_OUT_BYTES)
            os.fdatasync(fd)
            times_s.append(time.monotonic() - begun_s)
    finally:
        os.close(fd)


def existing(path: Path) -> Path:
    """The path, or the nearest one above it that is there and may be looked at."""
    while path != path.parent:
        with contextlib.suppress(OSError):
            if path.is_dir():
                return path
        path = path.parent
    return path


@contextlib.contextmanager
def _trial_file(folder: Path) -> Iterator[Path]:
    fd, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    os.close(fd)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on, e.g. ``ext4``; empty when that cannot be told."""
    device = os.stat(path).st_dev  # noqa: PTH116 - the path may be strange, and is there
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(read_text("/proc/self/mountinfo").splitlines()):
        left, dash, right = line.partition(" - ")
        if dash and left.split()[2] == wanted:
            return right.split()[0]
    return ""


def _hangs(check: str, path: Path) -> Finding:
    seen = f"the disk of {path} did not answer within {ANSWER_S:g} s"
    return Finding(check, Level.PROBLEM, seen, "no node can run on it", "see dmesg; choose another --data-dir")


async def _in_thread(work: Callable[[], T], late: Callable[[], T], limit_s: float = ANSWER_S) -> T:
    """What `work` returns, or `late` after the limit.

    In a thread that the end of the program does not wait for: one that a hanging disk holds never ends.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - handed to who waits
            _tell(loop, answer, error=error)
        else:
            _tell(loop, answer, value=value)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        async with asyncio.timeout(limit_s):
            return await answer
    except TimeoutError:
        return late()


def _tell(
    loop: asyncio.AbstractEventLoop,
    answer: asyncio.Future[T],
    *,
    value: T | None = None,
    error: Exception | None = None,
) -> None:
    def settle() -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # the loop has ended, nobody waits
        loop.call_soon_threadsafe(settle)
