"""Out of the daemon's hands: the lock, the pid namespace, the double fork."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import proctable, sysapi
from .wire import IDENTITY_NAME

PREVIOUS_GONE_S = 15.0  # for what a killed shim held to die; more only when something is stuck in the kernel

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


def detach(state_dir: Path, *, isolate: str) -> Detached:
    """Go on as the shim; the process that called this ends. CannotStart when there is nothing to go on with.

    `isolate` is empty to try a pid namespace, else the reason why there is to be none.
    """
    lock_fd = os.open(state_dir / "shim.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotStart("busy", "another shim holds the lock") from None
    _await_previous(state_dir)
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


def _await_previous(state_dir: Path) -> None:
    """Wait until the shim before us has ended altogether.

    A dying process drops its lock before the kernel has killed the pid namespace it was init of; only once its pidfd
    is ready is nothing left of it.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        identity = json.loads((state_dir / IDENTITY_NAME).read_bytes())
        if identity["boot_id"] != proctable.boot_id():
            return
        pidfd = os.pidfd_open(identity["pid"])
        try:
            # After opening: now the pid cannot become another's between looking and waiting.
            process = proctable.read(identity["pid"])
            if process is None or process.start_ticks != identity["start_ticks"]:
                return
            ready, _, _ = select.select([pidfd], [], [], PREVIOUS_GONE_S)
        finally:
            os.close(pidfd)
        if not ready:
            raise CannotStart("failed", f"what the previous shim (pid {identity['pid']}) held has not died yet")


def become_remover(folder: Path) -> NoReturn:
    """In a fresh child: remove all that is in `folder`, at low priority, and end."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        names = [str(folder / name) for name in os.listdir(folder)[:REMOVED_AT_ONCE]]  # noqa: PTH208 - only names, and not all
        if names:
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
            os.execvpe("rm", ["rm", "-rf", "--one-file-system", "--", *names], environment)  # noqa: S606 - nothing is left to the shell
    finally:
        os._exit(0)
