"""How a process ends: noticed, what it left is killed, counted, recorded on disk, reaped, reported. In that order."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

from . import proctable, sysapi
from .attempt import Held, Phase, make_exit, now_ms
from .cgroup import Counters
from .disk import Writer
from .loop import Loop, now_s
from .spawn import read_report

LEFTOVER_WAIT_S = 10.0  # for killed processes to go; past it (stuck in the kernel) the end is reported all the same
RECORD_WAIT_S = 5.0  # for the disk; past it the end is reported unrecorded, and the writing goes on
RECORD_AGAIN_S = 5.0
MARKS_MAX = 1024  # logs that are to be marked as cut once the disk has room
MARK_TRIES_MAX = 17280  # a day
REMOVE_TRIES_MAX = 100
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
_DELAYS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Ending:
    """The way from a dead process to a reported end. `ended` is called once for each.

    Attributes:
        unreaped: pids of main processes that are ours to reap, in time.
        helpers: gives the pids of the shim's own children.
    """

    def __init__(self, loop: Loop, writer: Writer, log: Callable[[str], None], ended: Callable[[Held], None]) -> None:
        self._loop = loop
        self._writer = writer
        self._log = log
        self._ended = ended
        self.unreaped: set[int] = set()
        self.helpers: Callable[[], set[int]] = set
        self._marks = 0

    def noticed(self, held: Held) -> bool:
        """Look whether the main process has ended; if so set its end going. True when it has."""
        if held.phase >= Phase.ENDING:
            return True
        if held.pidfd < 0:
            return False
        # WNOWAIT: it stays a zombie until its exit is on disk.
        result = os.waitid(os.P_PIDFD, held.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return False
        held.status = (result.si_code == os.CLD_EXITED, result.si_status)
        held.ended_ms = now_ms()
        held.phase = Phase.ENDING
        held.cancel_timer("walltime", "kill")
        self._loop.unwatch(held.pidfd)
        if held.report_fd >= 0:
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
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(held.pid, signal.SIGKILL)

    def _kill_family(self, held: Held) -> bool:
        """Without cgroups an orphan cannot be told to be this one's, unless there is no other that it could be of."""
        others = (self.unreaped | self.helpers()) - {held.pid}
        return proctable.kill_family(held.pid, others, strays=self.unreaped == {held.pid})

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
        self._writer.put(held.record_path, held.ended(), lambda error: self._recorded(held, error))

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

    def _judge(self, held: Held, *, stuck: bool) -> None:
        """Decide what to call the end."""
        counters = held.group.counters() if held.group else Counters()
        usage = sysapi.ended_usage(held.pidfd) or (0.0, 0.0, 0)
        exited, number = held.status or (True, 0)
        message = "some of its processes are stuck in the kernel and could not be killed" if stuck else ""
        if held.spawn_error:
            reason, message = "node-unfit" if held.spawn_unfit else "spawn-failed", held.spawn_error
        elif held.stop_why and held.signalled:
            reason, message = held.stop_why, message or _why_stopped(held)
        elif counters.oom_kills:
            reason, message = "out-of-memory", _why_out_of_memory(held.limits.memory_bytes, counters)
        else:
            reason = "exit" if exited else "signal"
        failed = bool(held.spawn_error)
        held.exit = make_exit(
            reason,
            exit_code=number if exited and not failed else None,
            signal=0 if exited else number,
            message=message,
            started_ms=held.started_ms,
            ended_ms=held.ended_ms,
            user_s=usage[0] if counters.cpu_user_s is None else counters.cpu_user_s,
            system_s=usage[1] if counters.cpu_system_s is None else counters.cpu_system_s,
            peak_bytes=usage[2] if counters.memory_peak_bytes is None else counters.memory_peak_bytes,
        )
        self._remove_group(held, 0)

    def _remove_group(self, held: Held, tries: int) -> None:
        if held.group is None or held.group.remove():
            return
        if tries >= REMOVE_TRIES_MAX:
            self._log(f"{held.key}: its cgroup cannot be removed; the next start of a shim will try again")
            return
        # Something is in it that was not seen before: a process that had moved, or one that takes its time to die.
        held.group.kill()
        delay_s = _DELAYS_S[min(tries, len(_DELAYS_S) - 1)]
        self._loop.call_in(delay_s, lambda: self._remove_group(held, tries + 1))

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
        if remark and held.exit is not None:
            held.exit["message"] = "; ".join(part for part in (held.exit["message"], remark) if part)
        self._ended(held)

    def _reap(self, held: Held) -> None:
        if held.pidfd >= 0:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, held.pidfd, os.WEXITED | os.WNOHANG)
            self.unreaped.discard(held.pid)
        held.close()


def _why_stopped(held: Held) -> str:
    match held.stop_why:
        case "walltime":
            return f"ran longer than its wall time of {held.walltime_s:g} s"
        case "fenced":
            # The daemon asks for it when the others have given the node up; else our own deadline has passed.
            without = f"had no contact for the grace of {held.grace_s:g} s, less the kill margin"
            return f"killed: its node was given up by the others, or {without}"
        case _:
            return ""


def _why_out_of_memory(limit_bytes: int, counters: Counters) -> str:
    """Its own limit or the machine's: the kernel counts both alike, but it was near its own only in the first case."""
    peak = counters.memory_peak_bytes
    if limit_bytes and (peak is None or peak > limit_bytes - limit_bytes // 10):
        return f"killed for exceeding its memory limit of {limit_bytes} bytes"
    return "killed because memory ran out around it: the machine's, or that of a group above the task's"
