"""Whether this machine is fit for tasks: room and rights on its disk, room for processes, memory. For `node list`."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from spinetta import units

LOOK_EVERY_S = 5.0
ANSWER_S = 10.0  # a disk that has not told of its room for so long hangs
FULL_BYTES_MAX = 32 << 20  # records and logs of some dozens of short tasks, and etcd's next segments on a voter
FULL_PART = 50  # of a small disk: one in so many
FULL_BYTES_MIN = 64 << 10
FULL_FILES = 16
MEMORY_BYTES_MIN = 32 << 20  # to start a process, with its pages, and to hear of its end
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Room:
    """What is left: of the disk, and whether more is asked of it than before a node called unfit is fit again."""

    free_bytes: int
    total_bytes: int
    free_files: int | None  # None: this file system has no such limit
    read_only: bool


def room(data_dir: Path) -> Room:
    """What is left on the disk of `data_dir`. OSError when it does not say."""
    found = os.statvfs(data_dir)
    blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    return Room(
        blocks * found.f_frsize,
        found.f_blocks * found.f_frsize,
        found.f_ffree if found.f_files else None,
        bool(found.f_flag & os.ST_RDONLY),
    )


def why_unfit(data_dir: Path, left: Room, *, was_unfit: bool) -> str:
    """Why no task should be started on this disk; empty when one may.

    A node that was unfit has to find twice as much room: it must not waver.
    """
    factor = 2 if was_unfit else 1
    if left.read_only:
        return f"its data directory {data_dir} is on a disk that is read-only"
    least = max(FULL_BYTES_MIN, min(FULL_BYTES_MAX, left.total_bytes // FULL_PART))
    if left.free_bytes < least * factor:
        # Not how much is left: the text would change with every look, and each change is told to all.
        return f"the disk of its data directory {data_dir} is full: {units.format_bytes(least)} must be free"
    if left.free_files is not None and left.free_files < FULL_FILES * factor:
        return f"the disk of its data directory {data_dir} has no room for more files"
    return ""


def no_process() -> str:
    """Why no process can be started; empty when one can. Threads come out of the same limits."""
    probe = threading.Thread(target=lambda: None, name="probe", daemon=True)
    try:
        probe.start()
    except (RuntimeError, MemoryError):
        return "no more processes can be started: a limit on processes (pids) or memory is reached"
    probe.join()
    return ""


def no_memory(meminfo: Path = _MEMINFO) -> str:
    """Why there is no memory to start anything with; empty when there is, or when this machine does not say."""
    try:
        lines = meminfo.read_text("ascii", "replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if name == "MemAvailable" and words and words[0].isdigit():
            least = units.format_bytes(MEMORY_BYTES_MIN)
            return f"memory is used up: less than {least} left" if int(words[0]) * 1024 < MEMORY_BYTES_MIN else ""
    return ""


class Fitness:
    """Looks now and then. Never waits for a disk that does not answer longer than `ANSWER_S`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._asked: asyncio.Future[Room] | None = None
        self._why = ""

    async def look(self) -> str:
        """Why this machine is not fit for tasks now; empty when it is."""
        self._why = no_process() or no_memory() or await self._disk()
        return self._why

    async def _disk(self) -> str:
        if self._asked is None:
            self._asked = asyncio.ensure_future(asyncio.to_thread(room, self._data_dir))
        done, _ = await asyncio.wait((self._asked,), timeout=ANSWER_S)
        if not done:
            return f"the disk of its data directory {self._data_dir} does not answer"
        asked, self._asked = self._asked, None
        try:
            left = asked.result()
        except OSError as e:
            return f"its data directory {self._data_dir} cannot be looked at: {e.strerror}"
        return why_unfit(self._data_dir, left, was_unfit=bool(self._why))

    def close(self) -> None:
        """Nobody waits any more."""
        if self._asked is not None:
            self._asked.cancel()
