"""Reading the process table."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_SHORT_BYTES = 1 << 16


@dataclass(frozen=True)
class Process:
    """A line of the process table. `start_ticks` counts from the boot: with the pid it names a process for ever."""

    pid: int
    state: str
    parent: int
    session: int
    start_ticks: int


def parse_stat(content: str) -> Process:
    """From the text of /proc/PID/stat. The name may hold anything, also spaces and parentheses."""
    head, _, tail = content.rpartition(")")
    fields = tail.split()
    return Process(int(head.split(" ", 1)[0]), fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def text_of(path: str) -> str:
    """A file of the kernel's that is not long: one that it gives at a time. OSError: it is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _SHORT_BYTES).decode("utf-8", "replace")
    finally:
        os.close(fd)


def read(pid: int | str, proc: str = "/proc") -> Process | None:
    """One process; None when it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return parse_stat(text_of(f"{proc}/{pid}/stat"))
    return None


def read_all() -> list[Process]:
    """All processes that we can see."""
    found = (read(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - no paths needed
    return [process for process in found if process is not None]


def name_of(pid: int) -> str:
    """Of the program that it runs, or what it calls itself; empty when it is gone."""
    with contextlib.suppress(OSError):
        return text_of(f"/proc/{pid}/comm").strip()
    return ""


def handles(pid: int, number: int) -> bool:
    """Whether it has a handler for a signal: the first of a pid namespace gets no other, unless it waits for it."""
    with contextlib.suppress(OSError, ValueError):
        for line in text_of(f"/proc/{pid}/status").splitlines():
            name, _, mask = line.partition(":\t")
            if name == "SigCgt":
                return bool(int(mask, 16) >> (number - 1) & 1)
    return False


def leads_another_group(pid: int) -> bool:
    """Whether a process has a child that leads a process group of its own: an init has started its command."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        children = [process.pid for process in read_all() if process.parent == pid]
    for child in children:
        with contextlib.suppress(OSError):
            if os.getpgid(child) == child:
                return True
    return False


def kill_session(session: int, not_before_ticks: int = 0) -> bool:
    """SIGKILL to all living processes of a session; True when there were any."""
    some = False
    for process in read_all():
        if process.session != session or process.state in "ZX" or process.start_ticks < not_before_ticks:
            continue
        some = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)
    return some


def kill_family(main: int, spared: Collection[int], *, strays: bool) -> bool:
    """SIGKILL to what belongs to the process `main`, which is not reaped yet; True when any of it was living.

    Its session and all its descendants; with `strays` also our own children and theirs: orphans that became ours. Not
    those of `spared`, nor their descendants. For want of cgroups.
    """
    table = read_all()
    me = os.getpid()
    family = {process.pid for process in table if process.session == main} | {main}
    if strays:
        family |= {process.pid for process in table if process.parent == me}
    family -= set(spared)
    while True:
        more = {process.pid for process in table if process.parent in family} - family - set(spared)
        if not more:
            break
        family |= more
    some = False
    for process in table:
        if process.pid in family and process.pid != me and process.state not in "ZX":
            some = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
    return some


def boot_id() -> str:
    """Changes with every boot; empty when unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""
