"""Removing old logs of tasks: the oldest first, beyond a size or an age, never of an attempt that is still held."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from spinetta.runtime.clocks import SteppedClock as SteppedClock

log = logging.getLogger("spinetta.node")

REMOVED = "etcd.removed"
REMOVED_KEEP_S = 30 * 86400.0  # for a person to look at; it may have gigabytes


@dataclass(frozen=True, slots=True)
class LogDirectory:
    """The logs of one attempt: the time of the last write and their size."""

    path: Path
    written_s: float
    size_bytes: int


def too_many(
    logs: Collection[LogDirectory],
    *,
    now_s: float,
    keep_bytes: int,
    keep_s: float,
    since_s: float = -math.inf,
) -> list[LogDirectory]:
    """Which logs to remove: those older than `keep_s`, then the oldest until the rest is at most `keep_bytes`.

    0 for a limit means that there is none. No age counts from before `since_s`.
    """
    total_bytes = sum(d.size_bytes for d in logs)
    doomed = []
    for d in sorted(logs, key=lambda d: (d.written_s, d.path)):
        if (keep_s and now_s - max(d.written_s, since_s) > keep_s) or (keep_bytes and total_bytes > keep_bytes):
            doomed.append(d)
            total_bytes -= d.size_bytes
    return doomed


def measure(path: Path) -> LogDirectory | None:
    """The logs in a directory; None when it has gone meanwhile, or cannot be looked at."""
    written_s, size_bytes = 0.0, 0
    try:
        for file in path.iterdir():
            stat = file.stat()
            written_s = max(written_s, stat.st_mtime)
            size_bytes += stat.st_size
    except FileNotFoundError:
        return None
    except OSError as e:
        log.warning("the logs in %s cannot be looked at: %s", path, e.strerror)
        return None
    return LogDirectory(path, written_s, size_bytes)


def sweep_logs(
    logs_dir: Path,
    held: Collection[str],
    *,
    now_s: float,
    keep_bytes: int,
    keep_s: float,
    since_s: float = -math.inf,
) -> int:
    """Remove what is too much; how many attempts' logs were removed."""
    if not logs_dir.is_dir():
        return 0
    found = [m for d in logs_dir.iterdir() if d.is_dir() and d.name not in held and (m := measure(d)) is not None]
    doomed = too_many(found, now_s=now_s, keep_bytes=keep_bytes, keep_s=keep_s, since_s=since_s)
    for d in doomed:
        shutil.rmtree(d.path, ignore_errors=True)
    if doomed:
        log.info("removed the logs of %d ended attempts", len(doomed))
    return len(doomed)


def sweep_removed(data_dir: Path, *, now_s: float, since_s: float = -math.inf, keep_s: float = REMOVED_KEEP_S) -> bool:
    """Remove the data of a voter's seat that was given up long ago; whether there was any. Not what was put aside when
    the cluster was made anew without it (``etcd.of-…``): that may hold what the cluster lacks."""
    path = data_dir / REMOVED
    try:
        given_up_s = path.lstat().st_ctime  # renaming sets it
    except FileNotFoundError:
        return False
    if now_s - max(given_up_s, since_s) <= keep_s:
        return False
    shutil.rmtree(path, ignore_errors=True)
    log.info("removed %s, the data of a seat that was given up more than %d days ago", path, keep_s // 86400)
    return True
