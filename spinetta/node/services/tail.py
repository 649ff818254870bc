"""Reading a log file that may still grow."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from spinetta import validate
from spinetta.errors import UserError
from spinetta.node.services import limits
from spinetta.node.threads import in_thread
from spinetta.runtime.shim import logcap

CUT_BEHIND_BYTES_MAX = (
    16 << 20
)  # written behind the mark of a cut log before it is cut again, a tenth of a second later


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a log and where they begin."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """What is wanted of a log: from `offset`, or the last `tail_bytes` if that is not 0; `limit_bytes` 0: all."""

    offset: int = 0
    tail_bytes: int = 0
    limit_bytes: int = 0


class Progress(Protocol):
    """Knows whether the attempt that writes the log is over."""

    @property
    def over(self) -> bool:
        """Nothing will be written any more."""
        ...

    async def moved(self, timeout_s: float) -> None:
        """Return when something has happened to the task, or after the time."""
        ...


class NoLog(UserError):
    """There is no such file."""

    reason = "no-log"


async def tail(path: Path, span: Span, progress: Progress | None, name: Callable[[], str]) -> AsyncIterator[Part]:
    """The bytes of a file; with `progress`, also those that are still to come, until its writer is over.

    Args:
        path: the file.
        span: which part of it.
        progress: None: what is there now, and no more.
        name: what to call the log in messages.

    Raises:
        NoLog: it does not exist, and nobody will create it.
        UserError: it cannot be read (``log-unreadable``), ends before the offset (``out-of-range``), or became shorter
            while it was read (``log-truncated``) and that not because it was cut at its limit: then the line that says
            so comes last, whatever was read before of what was cut away.
    """
    fd = await _open(path, progress, name)
    try:
        size = _size(fd)
        position = max(size - span.tail_bytes, 0) if span.tail_bytes else span.offset
        while position > size:
            if (last := await in_thread(partial(_cut_end, fd, size))) is not None:
                yield last
                await _over(progress)
                return
            if progress is None or progress.over:
                raise UserError(
                    f"{name()} has {size} bytes", field="offset", reason="out-of-range", hint=f"at most {size}"
                )
            await progress.moved(limits.LOG_POLL_MAX_S)
            size = _size(fd)
        left = span.limit_bytes or None
        if progress is None:  # a writer that is faster than the reader must not keep the call from ending
            left = min(left or size, size - position)
        delay_s = limits.LOG_POLL_MIN_S
        before = min(position, logcap.MARKER_BYTES_MAX)
        seen, _ = _read(fd, position - before, before, name)  # what came last, for a marker in two parts
        shorter = -1  # what it was found to be
        while left is None or left > 0:
            # Looked at before reading: what was written before the end is then read after it was seen.
            over = progress is None or progress.over
            want = validate.LOG_CHUNK_BYTES if left is None else min(left, validate.LOG_CHUNK_BYTES)
            data, size = await in_thread(partial(_read, fd, position, want, name))
            if size < position:
                if (last := await in_thread(partial(_cut_end, fd, size))) is not None:
                    yield last
                    await _over(progress)
                    return
                if progress is None or size == shorter:
                    raise _truncated(name, size, position)
                shorter = size  # written to again since it was cut, perhaps: then it is cut again in a moment
                await progress.moved(limits.LOG_POLL_MAX_S)
                continue
            if data:
                end = logcap.end_of_cut(seen + data, position - len(seen))
                if end >= 0:
                    if data := data[: max(end - len(seen), 0)]:
                        yield Part(position, data)
                    await _over(progress)
                    return
                yield Part(position, data)
                seen = (seen + data)[-logcap.MARKER_BYTES_MAX :]
                position += len(data)
                left = None if left is None else left - len(data)
                delay_s = limits.LOG_POLL_MIN_S
                continue
            if over or progress is None:
                return
            await progress.moved(delay_s)
            delay_s = min(delay_s * 2, limits.LOG_POLL_MAX_S)
    finally:
        os.close(fd)


async def _open(path: Path, progress: Progress | None, name: Callable[[], str]) -> int:
    delay_s = limits.LOG_POLL_MIN_S
    while True:
        over = progress is None or progress.over
        try:
            # Without O_NONBLOCK a FIFO in its place would hold us for ever.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if over or progress is None:
                raise NoLog(f"{name()} does not exist", field="id", hint="it may have been cleared away") from None
        except OSError as e:
            raise _unreadable(name, e.strerror or str(e)) from e
        else:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
            raise _unreadable(name, "it is not a file")
        await progress.moved(delay_s)
        delay_s = min(delay_s * 2, limits.LOG_POLL_MAX_S)


def _unreadable(name: Callable[[], str], why: str) -> UserError:
    return UserError(
        f"{name()} cannot be read: {why}", field="id", reason="log-unreadable", hint="see the node's data directory"
    )


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _read(fd: int, position: int, want: int, name: Callable[[], str]) -> tuple[bytes, int]:
    """What is there, and at least how long the file is then."""
    try:
        data = os.pread(fd, want, position)
        return data, position + len(data) if data else _size(fd)
    except OSError as e:
        raise _unreadable(name, e.strerror or str(e)) from e


def _cut_end(fd: int, size: int) -> Part | None:
    """The line that says that a log is cut, if that is so: what was written behind it since is about to go."""
    begin = max(size - CUT_BEHIND_BYTES_MAX, 0)
    data = os.pread(fd, size - begin, begin)
    if (end := logcap.end_of_cut(data, begin)) < 0:
        return None
    at = data.rfind(logcap.MARKER_BEGINS, 0, end)
    return Part(begin + at, data[at:end])


async def _over(progress: Progress | None) -> None:
    """Of a log that is cut nothing more is to come, but who follows waits for the end of the task."""
    while progress is not None and not progress.over:
        await progress.moved(limits.LOG_POLL_MAX_S)


def _truncated(name: Callable[[], str], size: int, position: int) -> UserError:
    return UserError(
        f"{name()} became shorter while it was read: {size} bytes, {position} had been read",
        field="id",
        reason="log-truncated",
        hint="start again from offset 0",
    )
