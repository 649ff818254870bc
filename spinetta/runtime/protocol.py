"""What a way of running tasks must be able to do. `process` implements it now, containers will."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spinetta import devices
from spinetta.model import ContainerSpec, Exit, Usage

AttemptKey = str
"""Names one attempt on this node for ever: ``TASKID.ATTEMPT``. Also the name of its directory and cgroup."""


@dataclass(frozen=True, slots=True)
class ContainerLaunch:
    """How an attempt is contained; its command, environment and user are in `config`.

    Attributes:
        program: absolute path of the OCI runtime.
        config: of the OCI runtime specification; without the control group and the root, which the shim fills in.
        lower: folders that make up the root file system, topmost first; never written to.
        writable: what the container writes to its root goes to a folder of the attempt's own.
        owner: user and group that own the scratch directory, as the host numbers them.
        sources: of mounts in `config`, those that tasks may change: no link is followed on the way to them any more.
    """

    program: str
    config: Mapping[str, object]
    lower: tuple[str, ...]
    writable: bool
    owner: tuple[int, int]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """All that is needed to start one attempt.

    Attributes:
        key: names the attempt.
        argv: program and arguments.
        env: the whole environment; nothing is inherited.
        working_directory: absolute path; empty: a fresh scratch directory, removed when the attempt is forgotten.
        cpu_millis, memory_bytes, pids_max: limits, 0 for none.
        walltime_s: 0 for none. Counted from the start of the process.
        grace_s: how long it may go on after the latest renewal (see `Runtime.renew`).
        token: the create revision of the running key, kept in the record so that a later daemon knows it.
        incarnation: of the node that claimed it, kept for the same reason.
        stop_wait_s: between TERM and KILL.
        private: what it runs must not be named in messages, which go into the task's record.
        secrets: file names and contents, given to the process in the directory that SPINETTA_SECRETS names: in memory,
            for it alone, gone with it. Never written to disk, nor part of any record, argument or message.
        log_bytes_max: of each of its two logs; what comes after is thrown away. 0: no limit.
        disk_bytes_max: of its scratch directory; it is ended when it has more. 0: no limit.
        keep_scratch_s: for how long its scratch directory is kept aside when the attempt is forgotten, instead of being
            removed. 0: not at all.
        open_files: soft and hard limit of the files that each of its processes may have open; 0: as the node itself.
        countables: whole things that it was granted, such as gpus.
        units: which ones, by label, of those that are given one by one; see `granting`.
        wants: the container that was asked for; None: a plain process.
        container: how it is contained: what `Runtime.prepare` makes of `wants`.
    """

    key: AttemptKey
    argv: Sequence[str] = field(repr=False)
    env: Mapping[str, str] = field(repr=False)
    working_directory: str = field(repr=False)
    cpu_millis: int
    memory_bytes: int
    pids_max: int
    walltime_s: float
    grace_s: float
    token: int
    incarnation: str
    stop_wait_s: float = 10.0
    private: bool = False
    secrets: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    log_bytes_max: int = 0
    disk_bytes_max: int = 0
    keep_scratch_s: float = 0.0
    open_files: tuple[int, int] = (0, 0)
    countables: tuple[tuple[str, int], ...] = ()
    units: devices.Labels = ()
    wants: ContainerSpec | None = field(default=None, repr=False)
    container: ContainerLaunch | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Held:
    """An attempt that the shim knows: running when `exit` is None, ended otherwise."""

    key: AttemptKey
    token: int
    incarnation: str
    started_ms: int
    exit: Exit | None


@dataclass(frozen=True, slots=True)
class Exited:
    """An attempt ended. Repeated until `forget`: after each reconnection all unforgotten exits come again."""

    key: AttemptKey
    exit: Exit


@dataclass(frozen=True, slots=True)
class ShimLost:
    """The connection to the shim broke. If the shim itself is dead, so is everything that it held."""


class Runtime(Protocol):
    """Starts, stops, measures and remembers the attempts of one node. Everything outlives the daemon."""

    def capabilities(self) -> tuple[str, ...]:
        """Names of what this runtime enforces, e.g. ``process``, ``memory-limit``, ``cpu-limit``, ``pid-namespace``."""
        ...

    async def prepare(self, launch: Launch) -> Launch | Exit:
        """Bring in what an attempt needs before it can start, such as its image; the launch to start, or why there is
        none. May take long, and may be cancelled; then nothing of it is kept. A plain process needs nothing.
        """
        ...

    async def start(self, launch: Launch) -> Exit | None:
        """Start an attempt; None when it runs, an `Exit` when it could not be started or its deadline has passed.

        A second start with the same key changes nothing and answers None (or the exit, if it has ended).
        """
        ...

    async def stop(self, key: AttemptKey, why: str) -> None:
        """Ask for the end of an attempt: TERM, then KILL of everything in its cgroup. Its exit will carry `why`.

        `why` is a value of `model.Reason`. Unknown keys are no error. Does not wait for the end.
        """
        ...

    async def renew(self, renewed_at_s: float) -> None:
        """Tell the shim of a committed renewal: the time *before* it was sent, on CLOCK_BOOTTIME.

        An attempt is killed by the shim itself at the latest renewal + its grace - the node's kill margin, and none
        is started at or after that. Never moves backwards.
        """
        ...

    async def forget(self, key: AttemptKey) -> None:
        """The end has been recorded: remove its record, scratch directory and cgroup. Logs stay. May be repeated."""
        ...

    async def held(self) -> Sequence[Held]:
        """All attempts that run or have ended and are not forgotten."""
        ...

    async def usage(self, key: AttemptKey) -> Usage | None:
        """What a running attempt has used so far; None when it is unknown or over."""
        ...

    def events(self) -> AsyncIterator[Exited | ShimLost]:
        """Ends of attempts as they happen, beginning with those not forgotten yet."""
        ...

    def log_path(self, key: AttemptKey, stream: str) -> Path:
        """Where ``stdout`` or ``stderr`` of an attempt is, or would be."""
        ...


class ShimRuntime(Runtime, Protocol):
    """What one shim does, or all of a node's together."""

    @property
    def state_dir(self) -> Path:
        """Where what is new has its scratch directories, and what the shim needs beside them."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """What this machine lacks and what that weakens, for people."""
        ...
