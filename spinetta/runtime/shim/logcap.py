"""A log that may not grow for ever: its first part is kept, a line says that it is cut, the rest is discarded.

The task goes on, and goes on writing: whoever looks again cuts again.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

MARKER_BEGINS = b"\n[spinetta: this log is cut here: its limit is "
BLOCK_BYTES = 512  # of st_blocks, whatever the disk's
ROOM_BYTES = 64 << 20  # that a log's blocks may take beyond twice its limit: file systems reserve some in advance
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_MARKER = re.compile(re.escape(MARKER_BEGINS) + rb"(\d{1,19})(GiB|MiB|KiB| bytes)\]\n")
MARKER_BYTES_MAX = len(MARKER_BEGINS) + 19 + len(b" bytes]\n")


def marker(bytes_max: int) -> bytes:
    """What a log that is cut ends with."""
    for name, size in _UNITS:
        if bytes_max and bytes_max % size == 0:
            return MARKER_BEGINS + f"{bytes_max // size}{name}]\n".encode()
    return MARKER_BEGINS + f"{bytes_max} bytes]\n".encode()


def end_of_cut(data: bytes, offset: int) -> int:
    """Where in `data`, which begins at `offset` of a log, a cut log ends; -1: no cut is in it.

    A marker counts where a log of the size that it names ends. What comes after it is about to be discarded.
    """
    for found in _MARKER.finditer(data):
        units = {name.encode(): size for name, size in _UNITS}
        limit = int(found[1]) * units.get(found[2], 1)
        if offset + found.end() == max(limit, len(found[0])):
            return found.end()
    return -1


def cut(path: str, bytes_max: int) -> bool:
    """Cut a log if it is longer than that; True when it is cut, now or before. OSError: it cannot be looked at.

    What is left, marker and all, has `bytes_max` bytes (or those of the marker alone).
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return False
        end = marker(bytes_max)
        kept = max(bytes_max - len(end), 0)
        if found.st_size < kept + len(end) and not hoards(found, bytes_max):
            return False
        if found.st_size == kept + len(end):
            return os.pread(fd, len(end), kept) == end
        # The marker first: whoever reads meanwhile finds it, and what is written meanwhile lies behind it.
        os.pwrite(fd, end, kept)
        os.ftruncate(fd, kept + len(end))
        return True
    finally:
        os.close(fd)


def hoards(found: os.stat_result, bytes_max: int) -> bool:
    """Whether it takes far more room than its length tells: who may write to it may also reserve blocks behind it."""
    return found.st_blocks * BLOCK_BYTES > 2 * bytes_max + ROOM_BYTES


def cut_all(paths: Sequence[str], bytes_max: int) -> str:
    """Cut those that are too long; what to say of those that are cut, empty if none is."""
    names = []
    for path in paths:
        try:
            if cut(path, bytes_max):
                names.append(Path(path).name)
        except OSError:
            continue  # a broken disk: its end is to be recorded all the same
    if not names:
        return ""
    size = marker(bytes_max).removeprefix(MARKER_BEGINS).decode().rstrip("]\n")
    return f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} cut at the limit of {size}"
