"""Out of the daemon's hands: the lock, the pid namespace, the double fork."""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import proctable, sysapi
from .remains import living_pid

PREVIOUS_GONE_S = 15.0  # for what a killed shim held to die; more only when something is stuck in the kernel
LOOK_AGAIN_S = 0.01

REMOVED_AT_ONCE = 1000  # keeps the arguments short; the rest goes the next time


class CannotStart(Exception):
    """No shim was started. `kind`: ``busy`` (there is one), ``refused`` (no pid namespace), ``failed``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Detached:
    """What the shim got.

    Attributes:
        isolated: PID 1 of a pid namespace.
        outer_pid, start_ticks: our name among the host's processes.
        outer_proc: descriptor of the host's /proc.
        lock_fd: held as long as we live.
    """

    isolated: bool
    outer_pid: int
    start_ticks: int
    outer_proc: int
    lock_fd: int
    warnings: tuple[str, ...]


def take_lock(state_dir: Path, read_identity: Callable[[], Mapping[str, Any]]) -> int:
    """The lock of a state directory, once nothing is left of the shim before us; a descriptor to be kept.

    CannotStart: there is one, or something of an earlier one is stuck.
    """
    lock_fd = os.open(state_dir / "shim.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PREVIOUS_GONE_S
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # A killed shim's writer holds the lock until it has written what it was given.
            identity = read_identity()
            if not identity or living_pid(identity):
                raise CannotStart("busy", "another shim holds the lock") from None
            if time.monotonic() > deadline:
                raise CannotStart(
                    "failed",
                    "the previous shim is dead, but a process of its that writes records has not ended: the disk does "
                    "not answer",
                ) from None
        time.sleep(LOOK_AGAIN_S)
    _await_previous(read_identity())
    return lock_fd


def detach(lock_fd: int, *, isolate: str) -> Detached:
    """Go on as the shim; the process that called this ends. CannotStart when there is nothing to go on with.

    `isolate` is empty to try a pid namespace, else the reason why there is to be none.
    """
    outer_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not isolate:
        try:
            sysapi.unshare(sysapi.CLONE_NEWPID | sysapi.CLONE_NEWNS)
        except OSError as error:
            raise CannotStart("refused", str(error.strerror)) from None
    if os.fork():
        os._exit(0)
    os.setsid()
    if isolate:
        sysapi.set_child_subreaper()
    else:
        try:
            sysapi.make_root_slave()
            sysapi.mount_proc()
        except OSError as error:
            raise CannotStart("refused", str(error.strerror)) from None
    sysapi.set_name("spinetta-shim")
    outer_pid = int(os.readlink("self", dir_fd=outer_proc))
    return Detached(
        isolated=not isolate,
        outer_pid=outer_pid,
        start_ticks=_start_ticks(outer_proc),
        outer_proc=outer_proc,
        lock_fd=lock_fd,
        warnings=(
            (
                f"pid-namespace is missing ({isolate}): should the shim be killed, processes that a task has detached "
                "live on, without a dead-man's switch, until the next shim kills them by their cgroups",
            )
            if isolate
            else ()
        ),
    )


def _start_ticks(outer_proc: int) -> int:
    fd = os.open("self/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=outer_proc)
    try:
        return proctable.parse_stat(os.read(fd, 4096).decode("utf-8", "replace")).start_ticks
    finally:
        os.close(fd)


def _await_previous(identity: Mapping[str, Any]) -> None:
    """Wait until the shim before us has ended altogether.

    A dying process drops its lock before the kernel has killed the pid namespace it was init of; only once its pidfd
    is ready is nothing left of it.
    """
    pid = living_pid(identity)
    if not pid:
        return
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # Again: now the pid cannot become another's between looking and waiting.
        if living_pid(identity) and not select.select([pidfd], [], [], PREVIOUS_GONE_S)[0]:
            raise CannotStart("failed", f"what the previous shim (pid {pid}) held has not died yet")
    finally:
        os.close(pidfd)


def become_remover(folder: Path, names: Sequence[str] | None = None) -> NoReturn:
    """In a fresh child: remove `names` in `folder`, by default all that is there, at low priority, and end."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        if names is None:
            names = os.listdir(folder)  # noqa: PTH208 - only names
        if paths := [str(folder / name) for name in names[:REMOVED_AT_ONCE]]:
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
            os.execvpe("rm", ["rm", "-rf", "--one-file-system", "--", *paths], environment)  # noqa: S606 - nothing is left to the shell
    finally:
        os._exit(0)
