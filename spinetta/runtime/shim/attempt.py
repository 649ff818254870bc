"""One process that the shim holds: an attempt at a task, or a service of the node."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cgroup import Group, Limits
from .container import Container
from .counters import Counters
from .loop import Timer
from .wire import MESSAGE_CHARS_MAX

ExitDict = dict[str, Any]
NOTHING_USED = Counters()


class Phase(enum.IntEnum):
    """Where it stands; only ever grows."""

    PREPARING = 1  # the intent is being written
    SPAWNING = 2  # forked, the program has not taken over yet
    RUNNING = 3
    ENDING = 4  # the main process has ended: killing what it left, writing the record
    ENDED = 5  # reported; waits to be forgotten


@dataclass
class Held:
    """What is known of one process.

    Attributes:
        stop_why: why we are ending it; empty while we are not.
        status: of the ended main process: (exited, code or signal).
        waiters: called once it runs or has ended.
        end_waiters: called once it has ended.
        forgetters: called with the outcome once its record is removed.
        recorded: its exit record is durable.
        private: what it runs is nobody's business: messages do not name it.
        secrets: content of files by name, until it has been started; never in a record.
        secret_names: of those files.
        keep_scratch_s: how long its scratch directory is to be kept when it is forgotten; 0: not at all.
        keep_part: the part of that directory that is kept; empty: all of it.
        spawn_unfit: it was this node's fault that it could not be started.
        container: None for a plain process. Until it is created `pid` is that of the runtime which does it.
        oom_kills_beside: of processes killed because memory ran out, those that were commands beside it.
        disk_bytes_max: of the scratch directory; 0: no limit.
        disk_used_bytes: what it held when it was found to hold more than that.
        log_bytes_max: of each stream's log, the rest is discarded; 0: no limit.
        open_files: soft and hard limit of the files that each of its processes has open; None: as ours.
    """

    key: str
    service: bool
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdout: str
    stderr: str
    record_path: Path
    scratch: Path | None
    limits: Limits
    walltime_s: float
    grace_s: float
    stop_wait_s: float
    token: int
    incarnation: str
    phase: Phase = Phase.PREPARING
    pid: int = 0
    pidfd: int = -1
    report_fd: int = -1
    report: bytes = b""
    outer_pid: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    stop_why: str = ""
    stop_signal: int = 15
    signalled: bool = False
    status: tuple[bool, int] | None = None
    leftover_since_s: float = 0.0
    spawn_error: str = ""
    spawn_unfit: bool = False
    private: bool = False
    oom_kills_beside: int = 0
    disk_bytes_max: int = 0
    disk_used_bytes: int = 0
    log_bytes_max: int = 0
    open_files: tuple[int, int] | None = None
    keep_scratch_s: int = 0
    keep_part: str = ""
    secrets: dict[str, bytes] = field(default_factory=dict, repr=False)
    secret_names: tuple[str, ...] = ()
    group: Group | None = None
    container: Container | None = None
    exit: ExitDict | None = None
    recorded: bool = False
    has_intent: bool = False
    forgotten: bool = False
    waiters: list[Callable[[], None]] = field(default_factory=list)
    end_waiters: list[Callable[[], None]] = field(default_factory=list)
    forgetters: list[Callable[[str], None]] = field(default_factory=list)
    timers: dict[str, Timer] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """A process of it may be running."""
        return Phase.SPAWNING <= self.phase <= Phase.RUNNING

    @property
    def made_beside(self) -> bool:
        """A container's runtime still runs, whose child the main process is: not ours to wait for yet."""
        return self.container is not None and self.container.maker_fd >= 0

    def intent(self) -> dict[str, Any]:
        """The record written before the fork."""
        keep = {"keep_scratch_s": self.keep_scratch_s, "keep_part": self.keep_part} if self.keep_scratch_s else {}
        return {
            **keep,
            "v": 2,
            "state": "started",
            "key": self.key,
            "token": self.token,
            "incarnation": self.incarnation,
            "started_ms": self.started_ms or now_ms(),
        }

    def ended(self) -> dict[str, Any]:
        """The record that replaces it."""
        return {**self.intent(), "state": "ended", "exit": self.exit}

    def set_timer(self, name: str, timer: Timer) -> None:
        """Keep a timer under a name, replacing the one before."""
        self.cancel_timer(name)
        self.timers[name] = timer

    def cancel_timer(self, *names: str) -> None:
        """Cancel timers by name, if there."""
        for name in names:
            timer = self.timers.pop(name, None)
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Close what is open; no timer fires any more."""
        self.cancel_timer(*list(self.timers))
        made = self.container
        for fd in (self.pidfd, self.report_fd, *((made.fifo_fd, made.maker_fd) if made else ())):
            if fd >= 0:
                os.close(fd)
        if made is not None:
            made.fifo_fd = made.maker_fd = -1
        self.pidfd = self.report_fd = -1


def now_ms() -> int:
    """Wall clock, for people to read; nothing is decided by it."""
    return time.time_ns() // 1_000_000


def make_exit(
    reason: str,
    *,
    exit_code: int | None = None,
    signal: int = 0,
    message: str = "",
    started_ms: int = 0,
    ended_ms: int = 0,
    used: Counters = NOTHING_USED,
) -> ExitDict:
    """How a process ended, as it is stored and sent."""
    return {
        "reason": reason,
        "exit_code": exit_code,
        "signal": signal,
        "message": message[:MESSAGE_CHARS_MAX],
        "started_ms": started_ms,
        "ended_ms": ended_ms or now_ms(),
        **usage_dict(used),
    }


def usage_dict(used: Counters) -> dict[str, float]:
    """What was used, as it is stored and sent; 0 where the machine does not say."""
    return {
        "cpu_user_s": used.cpu_user_s or 0.0,
        "cpu_system_s": used.cpu_system_s or 0.0,
        "memory_peak_bytes": used.memory_peak_bytes or 0,
        "io_read_bytes": used.io_read_bytes or 0,
        "io_write_bytes": used.io_write_bytes or 0,
        "pids_peak": used.pids_peak or 0,
    }
