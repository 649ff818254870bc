"""How a process ends: noticed, what it left is killed, counted, written down, reaped, reported. In that order."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

from . import proctable, sysapi
from .attempt import Held, Phase, make_exit, now_ms
from .counters import Counters, with_ended
from .disk import Writer
from .judging import judge, status_of
from .loop import Loop, now_s
from .spawn import read_report
from .wire import MESSAGE_CHARS_MAX

LEFTOVER_WAIT_S = 10.0  # for killed processes to go; past it (stuck in the kernel) the end is reported all the same
RECORD_WAIT_S = 5.0  # for the disk; past it the end is reported unrecorded, and the writing goes on
RECORD_AGAIN_S = 5.0
MARKS_MAX = 1024  # logs that are to be marked as cut once the disk has room
MARK_TRIES_MAX = 17280  # a day
REMOVE_TRIES_MAX = 100
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
_STUCK = "some of its processes are stuck in the kernel and could not be killed"
_DELAYS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Ending:
    """The way from a dead process to a reported end. `ended` is called once for each.

    Attributes:
        unreaped: pids of main processes that are ours to reap, in time.
        helpers: gives the pids of the shim's own children.
        companions: gives the pids of commands that were started beside an attempt.
        passed: says whether that the main process has ended so is the end; None: it was a step of a container's start.
        clear_container: removes what a container runtime has made for an ended attempt.
    """

    def __init__(self, loop: Loop, writer: Writer, log: Callable[[str], None], ended: Callable[[Held], None]) -> None:
        self._loop = loop
        self._writer = writer
        self._log = log
        self._ended = ended
        self.unreaped: set[int] = set()
        self.helpers: Callable[[], set[int]] = set
        self.companions: Callable[[Held], set[int]] = lambda _held: set()
        self.passed: Callable[[Held, tuple[bool, int]], tuple[bool, int] | None] = lambda _held, status: status
        self.clear_container: Callable[[Held], None] = lambda _held: None
        self._marks = 0
        self._emptying: dict[tuple[bool, str], Held] = {}  # by what a group is called, those whose group resists

    def noticed(self, held: Held) -> bool:
        """Look whether the main process has ended; if so set its end going. True when it has."""
        if held.phase >= Phase.ENDING:
            return True
        if held.pidfd < 0 or held.made_beside:
            return False
        try:
            # WNOWAIT: it stays a zombie until its exit is on disk.
            result = os.waitid(os.P_PIDFD, held.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Its container's runtime, which had made it, has failed after all and waited for it. How it ended nobody
            # will say; to look again, which its descriptor has us do at once and for ever, would not help.
            if not _is_over(held.pidfd):
                return False
            seen = False, int(signal.SIGKILL)
        else:
            if result is None:
                return False
            seen = result.si_code == os.CLD_EXITED, result.si_status
        status = self.passed(held, seen)
        if status is None:
            return False
        held.status = status
        held.ended_ms = now_ms()
        held.phase = Phase.ENDING
        held.cancel_timer("walltime", "kill", "create", "begin", "signal")
        if held.pidfd >= 0:
            self._loop.unwatch(held.pidfd)
        if held.report_fd >= 0:
            if held.container is None:
                read_report(held)
            self._loop.unwatch(held.report_fd)
            os.close(held.report_fd)
            held.report_fd = -1
        held.leftover_since_s = now_s()
        self._clear(held, 0)
        return True

    def on_pidfd(self, held: Held) -> None:
        """The kernel says that the main process has ended."""
        self.noticed(held)

    def kill_all(self, held: Held, *, thoroughly: bool) -> None:
        """One round of SIGKILL to everything that belongs to it.

        Not `thoroughly` at first: many may have to die within the kill margin, and going through every group of each
        takes fifty times as long.
        """
        if held.group and held.group.kills:
            if thoroughly or not held.group.kill_at_once():
                held.group.kill()
        else:
            # First of all: once the main process is dead its children are ours, and nobody can tell whose they were.
            self._kill_family(held)
        if held.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held.pidfd, signal.SIGKILL)
        # Not reaped yet, so neither the group's nor the session's number can be another's.
        for pid in (held.pid, *((held.container.maker,) if held.container and held.made_beside else ())):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _kill_family(self, held: Held) -> bool:
        """Without cgroups an orphan cannot be told to be this one's, unless there is no other that it could be of."""
        beside = self.companions(held)
        others = (self.unreaped | self.helpers()) - {held.pid} - beside
        left = proctable.kill_family(held.pid, others, strays=self.unreaped - beside == {held.pid})
        for pid in beside:
            left = proctable.kill_family(pid, others, strays=False) or left
        return left

    def finish(self, held: Held) -> None:
        """Record the end (`held.exit`) if anything was recorded before, then report it."""
        held.phase = Phase.ENDING
        if held.has_intent:
            held.set_timer("report", self._loop.call_in(RECORD_WAIT_S, lambda: self._late(held)))
            self.record(held)
        else:
            self._report(held)

    def record(self, held: Held) -> None:
        """Write the exit record, until it is written or forgotten."""
        if held.log_bytes_max and held.phase is not Phase.ENDED:
            self._writer.put_end(
                held.record_path,
                held.ended(),
                [held.stdout, held.stderr],
                held.log_bytes_max,
                lambda remark: self._remark(held, remark),
                lambda: self._written(held),
                lambda error: self._recorded(held, error),
            )
            return
        self._writer.put_later(
            held.record_path, held.ended(), lambda: self._written(held), lambda error: self._recorded(held, error)
        )

    def drop(self, held: Held) -> None:
        """Forgotten: stop writing its record, reap it, close everything."""
        held.forgotten = True
        held.cancel_timer("record")
        self._reap(held)

    def _clear(self, held: Held, tries: int) -> None:
        """Kill what the main process left, and look again until nothing is left."""
        if held.group and held.group.kills:
            left = held.group.populated()
            if left:
                held.group.kill()
        else:
            left = self._kill_family(held)
        if left and now_s() - held.leftover_since_s < LEFTOVER_WAIT_S:
            delay_s = _DELAYS_S[min(tries, len(_DELAYS_S) - 1)]
            held.set_timer("clear", self._loop.call_in(delay_s, lambda: self._clear(held, tries + 1)))
            return
        if held.exit is None:
            self._judge(held, stuck=left)
            self.finish(held)
            # While the end is written: should we die on the way, the next shim removes what is left of them.
            self._remove_group(held, 0)
            self.clear_container(held)

    def _judge(self, held: Held, *, stuck: bool) -> None:
        """Decide what to call the end."""
        counters = with_ended(held.group.counters() if held.group else Counters(), sysapi.ended_usage(held.pidfd))
        exit_code, number = status_of(held)
        reason, message = judge(held, counters, succeeded=exit_code == 0)
        held.exit = make_exit(
            reason,
            exit_code=exit_code,
            signal=number,
            message=message or (_STUCK if stuck else ""),
            started_ms=held.started_ms,
            ended_ms=held.ended_ms,
            used=counters,
        )

    def begins(self, held: Held) -> None:
        """Another of its name that has ended leaves it the groups, whatever is in them: they are this one's now."""
        self._emptying.pop((held.service, held.key), None)

    def _remove_group(self, held: Held, tries: int) -> None:
        name = held.service, held.key
        if tries and self._emptying.get(name) is not held:
            return  # what is in it now belongs to another
        self._emptying.pop(name, None)
        if held.group is None or held.group.remove():
            return
        if tries >= REMOVE_TRIES_MAX:
            self._log(f"{held.key}: its cgroup cannot be removed; the next start of a shim will try again")
            return
        # Something is in it that was not seen before: a process that had moved, or one that takes its time to die.
        held.group.kill()
        self._emptying[name] = held
        delay_s = _DELAYS_S[min(tries, len(_DELAYS_S) - 1)]
        self._loop.call_in(delay_s, lambda: self._remove_group(held, tries + 1))

    def _written(self, held: Held) -> None:
        """Its end outlives us: it may be told. That the disk has it as well is not waited for, see ADR 0040."""
        if not held.forgotten:
            self._reap(held)
            self._report(held)

    def _recorded(self, held: Held, error: str) -> None:
        if held.forgotten:
            return
        if error:
            self._log(f"{held.key}: cannot write its exit record, trying again: {error}")
            held.set_timer("record", self._loop.call_in(RECORD_AGAIN_S, lambda: self.record(held)))
            remark = f"its exit could not be recorded: {error}"
            if error in _FULL and held.phase is not Phase.ENDED and not held.service:
                # It wrote to the same disk, straight into its files: nobody but itself was told that they are full.
                remark += "; its logs may be cut"
                self._mark_cut(Path(held.stderr), 0)
            self._report(held, remark)
            return
        held.recorded = True
        self._reap(held)
        self._report(held)

    def _mark_cut(self, log: Path, tries: int) -> None:
        """Say so in the log as well, once there is room."""
        if not tries:
            if self._marks >= MARKS_MAX:
                return
            self._marks += 1

        def done(error: str) -> None:
            if error and tries < MARK_TRIES_MAX:
                self._loop.call_in(RECORD_AGAIN_S, lambda: self._mark_cut(log, tries + 1))
            else:
                self._marks -= 1

        self._writer.mark(log, done)

    def _late(self, held: Held) -> None:
        self._log(f"{held.key}: the disk has not taken its exit record for {RECORD_WAIT_S} s")
        self._report(held, "its exit is not recorded yet: the disk does not answer")

    def _report(self, held: Held, remark: str = "") -> None:
        held.cancel_timer("report")
        if held.phase is Phase.ENDED:
            return
        held.phase = Phase.ENDED
        self._remark(held, remark)
        self._ended(held)

    @staticmethod
    def _remark(held: Held, remark: str) -> None:
        if remark and held.exit is not None and remark not in held.exit["message"]:
            parts = (held.exit["message"], remark)
            held.exit["message"] = "; ".join(part for part in parts if part)[:MESSAGE_CHARS_MAX]

    def _reap(self, held: Held) -> None:
        if held.pidfd >= 0:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, held.pidfd, os.WEXITED | os.WNOHANG)
            self.unreaped.discard(held.pid)
        held.close()


def _is_over(pidfd: int) -> bool:
    look = select.poll()
    look.register(pidfd, select.POLLIN)
    return bool(look.poll(0))
