"""The size of a terminal in a container, whose other end a container's runtime holds.

The daemon's terminal is the runtime's own; the command has another one, made inside, and the runtime carries the bytes
between the two. A new size too, if it is runc, or crun from 1.8.7 on; before, crun sends the command WINCH, which then
finds the size it had. So the size is set here as well, on the end that the runtime holds; twice the same does nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from collections.abc import Callable

from . import sysapi
from .loop import Loop

AGAIN_S = 0.1
TRIES_MAX = 300  # a runtime that takes longer to make a terminal has other troubles
_MASTER = "ptmx"  # what a terminal's other end is called, wherever it was made
_TIOCGPTN = 0x8004_5430  # on each processor that we know of; only that end has a number


class Sizes:
    """Sizes that commands' terminals are to have, until they have them."""

    def __init__(self, loop: Loop, log: Callable[[str], None]) -> None:
        self._loop = loop
        self._log = log
        self._wanted: dict[int, tuple[int, int, int]] = {}  # by the runtime's pid: its pidfd, rows, columns

    def want(self, pid: int, pidfd: int, rows: int, columns: int) -> None:
        """As soon as this process of a runtime has made a terminal. `forget` it before it is reaped."""
        waits = pid in self._wanted
        self._wanted[pid] = (pidfd, rows, columns)
        if not waits:
            self._try(pid, TRIES_MAX)

    def forget(self, pid: int) -> None:
        """It has ended."""
        self._wanted.pop(pid, None)

    def _try(self, pid: int, tries: int) -> None:
        wanted = self._wanted.get(pid)
        if wanted is None:
            return
        try:
            done = set_size(pid, *wanted)
        except OSError as error:
            self._log(f"a terminal in a container keeps its size: {error}")
            done = True
        if done or tries <= 1:
            del self._wanted[pid]
        else:
            self._loop.call_in(AGAIN_S, lambda: self._try(pid, tries - 1))


def set_size(pid: int, pidfd: int, rows: int, columns: int) -> bool:
    """Give the terminal of a runtime's command this size; the kernel tells the command, if it is another than before.

    Returns whether there was one: it is made after the runtime's program has begun.

    OSError: we may not take hold of the runtime's descriptors, or the kernel cannot (before Linux 5.6).
    """
    found = False
    for number in _masters(pid):
        try:
            fd = sysapi.pidfd_getfd(pidfd, number)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ESRCH):  # closed, or ended, meanwhile
                continue
            raise
        try:
            fcntl.ioctl(fd, _TIOCGPTN, bytes(4))
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
            found = True
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EIO):  # another's file of that name; nobody has it open any more
                raise
        finally:
            os.close(fd)
    return found


def _masters(pid: int) -> list[int]:
    found = []
    folder = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(folder):  # noqa: PTH208 - as proctable does
            try:
                if os.readlink(f"{folder}/{name}").endswith(_MASTER):  # noqa: PTH115
                    found.append(int(name))
            except FileNotFoundError:
                continue
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found
