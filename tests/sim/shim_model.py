"""A model of the shim: what it promises, without a process. Its clock is that of its machine, told by the caller.

The dead-man's switch: an attempt is killed at the latest renewal + its grace - the margin, with up to the margin for
the machine to get round to it, and none is started at or after that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from spinetta.events import HeldAttempt, Start, attempt_key
from spinetta.model import Exit, Reason, Revision, TaskId

NEVER_S = float("inf")
END_UNSYNCED_S = 0.1  # for so long an end that was told may be lost with the machine's power
REMOVAL_UNSYNCED_S = 5.0  # and what was forgotten may be there again


@dataclass(frozen=True, slots=True)
class Script:
    """What a process would do by itself: run for so long, then exit with this code; `deaf`: only KILL ends it."""

    duration_s: float
    code: int = 0
    deaf: bool = False


@dataclass(slots=True)
class Process:
    """One attempt as the shim holds it. It executes while `exit` is None."""

    key: str
    task: TaskId
    token: Revision
    incarnation: str
    grace_s: float
    started_s: float
    script: Script
    walltime_s: float
    lag_s: float  # how long the machine takes to kill it once its deadline has passed
    ends_s: float = NEVER_S
    why: Reason | None = None
    exit: Exit | None = None
    ended_s: float = -NEVER_S  # when it was told


class ShimModel:
    """One life of a shim, and the records that outlive it on disk."""

    def __init__(
        self,
        kill_margin_s: float,
        script: Callable[[Start], Script],
        lag_s: Callable[[], float] = lambda: 0.0,
        stop_wait_s: float = 0.5,
    ) -> None:
        self.kill_margin_s = kill_margin_s
        self.held: dict[str, Process] = {}
        self.renewed_at_s: float | None = None
        self.short_of = ""  # a countable of which nobody is given any
        self.unfit = False  # nothing can be started: its disk, control groups or process table
        self.obeys_deadline = True  # tests switch it off to see that it is needed
        self.refuses_late = True  # and this
        self._script = script
        self._lag_s = lag_s
        self._stop_wait_s = stop_wait_s
        self._forgotten: dict[tuple[str, str, int], Exit] = {}
        self._removed: list[tuple[float, Process]] = []  # not durably

    # --- asked for by the daemon ---

    def start(self, start: Start, now: float) -> tuple[Process | None, Exit | None]:
        """The process if one was really started, and the answer to the daemon."""
        key = attempt_key(start.spec.id, start.attempt)
        name = (key, start.incarnation, start.token)
        if name in self._forgotten:
            return None, self._forgotten[name]
        if key in self.held:
            return None, self.held[key].exit
        process = Process(
            key,
            start.spec.id,
            start.token,
            start.incarnation,
            start.grace_s,
            now,
            self._script(start),
            start.spec.walltime_s,
            self._lag_s(),
        )
        self.held[key] = process
        if self.refuses_late and self.deadline_s(process) <= now:
            process.exit = Exit(Reason.FENCED, message="too late to start")
            return None, process.exit
        if self.unfit:
            process.exit = Exit(Reason.NODE_UNFIT, message="cannot fork")
            return None, process.exit
        if self.short_of in dict(start.spec.resources.countables):
            process.exit = Exit(Reason.NODE_UNFIT, message="none is free", lacks=self.short_of)
            return None, process.exit
        process.ends_s = now + process.script.duration_s
        if process.walltime_s and process.walltime_s < process.script.duration_s:
            process.ends_s, process.why = now + process.walltime_s, Reason.WALLTIME
        return process, None

    def stop(self, key: str, why: str, now: float) -> None:
        """TERM, and KILL a little later; the first reason stays."""
        process = self.held.get(key)
        if process is None or process.exit is not None:
            return
        at_s = now + (self._stop_wait_s if process.script.deaf else 0.0)
        if at_s < process.ends_s:
            process.ends_s = at_s
            process.why = process.why or Reason(why)

    def renew(self, renewed_at_s: float) -> None:
        """Never moves backwards."""
        if self.renewed_at_s is None or renewed_at_s > self.renewed_at_s:
            self.renewed_at_s = renewed_at_s

    def forget(self, key: str, now: float = -NEVER_S) -> None:
        """Only what has ended; may be repeated."""
        process = self.held.get(key)
        if process is not None and process.exit is not None:
            self._forgotten[key, process.incarnation, process.token] = process.exit
            del self.held[key]
            self._removed = [r for r in self._removed if now - r[0] < REMOVAL_UNSYNCED_S] + [(now, process)]

    def listing(self) -> tuple[HeldAttempt, ...]:
        """All that is not forgotten."""
        return tuple(
            HeldAttempt(p.key, p.token, p.incarnation, p.exit)  # type: ignore[arg-type]
            for p in self.held.values()
        )

    # --- time ---

    def deadline_s(self, process: Process) -> float:
        """At or after it nothing of it may be started, and the killing begins."""
        if self.renewed_at_s is None:
            return -NEVER_S
        return self.renewed_at_s + process.grace_s - self.kill_margin_s

    def _end_s(self, process: Process) -> float:
        if not self.obeys_deadline:
            return process.ends_s
        return min(process.ends_s, self.deadline_s(process) + process.lag_s)

    @property
    def next_s(self) -> float:
        """When the next process ends; infinity when none does."""
        return min((self._end_s(p) for p in self.held.values() if p.exit is None), default=NEVER_S)

    def alive(self) -> list[Process]:
        """What executes."""
        return [p for p in self.held.values() if p.exit is None]

    def advance(self, now: float) -> list[Process]:
        """End what has come to its end by `now`; those processes, in the order in which they did."""
        due = sorted((self._end_s(p), p.key) for p in self.held.values() if p.exit is None and self._end_s(p) <= now)
        return [self._end(self.held[key], at_s) for at_s, key in due]

    def _end(self, process: Process, at_s: float) -> Process:
        killed = at_s < process.ends_s  # by the switch
        process.ended_s = at_s
        ms = int(at_s * 1000)
        if killed:
            process.exit = Exit(Reason.FENCED, signal=9, message="no renewal in time", ended_ms=ms)
        elif process.why is not None:
            process.exit = Exit(process.why, signal=15, ended_ms=ms)
        else:
            process.exit = Exit(Reason.EXIT, process.script.code, ended_ms=ms)
        return process

    def die(self) -> list[Process]:
        """The shim is gone, and with it all that it held; a next one finds the records on disk. What was killed."""
        killed = self.alive()
        for process in killed:
            process.exit = _lost()
        self.renewed_at_s = None
        self._forgotten.clear()
        return killed

    def lose_power(self, now: float, chance: random.Random) -> int:
        """After `die`: what was not synced may be lost. How many records are not what they were.

        What was forgotten is there again with its end, or as a start whose end nobody has seen.
        """
        changed = 0
        for process in self.held.values():
            if now - process.ended_s < END_UNSYNCED_S and chance.random() < 0.7:
                process.exit = _lost()
                changed += 1
        for at_s, process in self._removed:
            if now - at_s < REMOVAL_UNSYNCED_S and process.key not in self.held and chance.random() < 0.7:
                if at_s - process.ended_s < END_UNSYNCED_S:
                    process.exit = _lost()
                self.held[process.key] = process
                changed += 1
        self._removed.clear()
        return changed


def _lost() -> Exit:
    return Exit(Reason.SHIM_LOST, message="ended with the shim that held it")
