"""Removing scratch directories of ended attempts that were kept: when their time is over, or there are too many."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("spinetta.node")

BLOCK_BYTES = 512  # st_blocks counts these, whatever the file system's own are


@dataclass(frozen=True, slots=True)
class Kept:
    """One of them: since when it is kept, for how long, and how much it takes on disk."""

    path: Path
    since_s: float
    keep_s: float
    size_bytes: int


def doomed(kept: Collection[Kept], *, now_s: float, keep_bytes: int, set_at_s: float = -math.inf) -> list[Kept]:
    """Which to remove: those whose time is over, then the oldest until the rest is at most `keep_bytes` (0: any).

    No time counts from before `set_at_s`, when the clock was set.
    """
    total_bytes = sum(k.size_bytes for k in kept)
    out = []
    for k in sorted(kept, key=lambda k: (k.since_s, k.path)):
        if now_s - max(k.since_s, set_at_s) > k.keep_s or (keep_bytes and total_bytes > keep_bytes):
            out.append(k)
            total_bytes -= k.size_bytes
    return out


class ScratchSweep:
    """Sweeps one directory again and again, and measures what is in it only once: nothing in it changes any more."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self._folder = folder
        self._keep_bytes = keep_bytes
        self._sizes: dict[str, int] = {}

    def sweep(self, *, now_s: float, set_at_s: float = -math.inf) -> int:
        """Remove what is to go; how many. OSError: it cannot be looked at."""
        found = self._look()
        going = doomed(found, now_s=now_s, keep_bytes=self._keep_bytes, set_at_s=set_at_s)
        for kept in going:
            shutil.rmtree(kept.path, ignore_errors=True)  # what is left is tried again
            self._sizes.pop(kept.path.name, None)
        if going:
            log.info("removed %d kept scratch directories", len(going))
        return len(going)

    def _look(self) -> list[Kept]:
        try:
            names = sorted(path.name for path in self._folder.iterdir())
        except FileNotFoundError:
            return []
        self._sizes = {name: size for name, size in self._sizes.items() if name in set(names)}
        found = []
        for name in names:
            seconds = name.partition("@")[2]
            path = self._folder / name
            try:
                since_s = path.lstat().st_ctime  # moving it there has set it
            except FileNotFoundError:
                continue
            if name not in self._sizes:
                self._sizes[name] = size_of(path)
            found.append(Kept(path, since_s, float(seconds) if seconds.isdigit() else 0.0, self._sizes[name]))
        return found


def size_of(folder: Path) -> int:
    """What it takes on disk; links are not followed, and what cannot be looked at counts nothing."""
    total = 0
    for at, _, files, fd in os.fwalk(folder, follow_symlinks=False):
        for name in (at, *files):
            try:
                seen = os.stat(name, dir_fd=fd if name is not at else None, follow_symlinks=False)
            except OSError:
                continue
            total += seen.st_blocks * BLOCK_BYTES
    return total
