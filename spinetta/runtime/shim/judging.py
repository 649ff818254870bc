"""What to call an end: which limit it was, told apart by the kernel's counters and by what we did ourselves."""

from __future__ import annotations

from .attempt import Held
from .container import Stage
from .counters import Counters

SIGNALS = range(1, 65)
SHOWN_AS = 128  # what is added to a signal's number by a container's first process, whose own end it cannot be


def status_of(held: Held) -> tuple[int | None, int]:
    """Exit code and signal: both of a container's command that ended by a signal; neither if it was never started."""
    exited, number = held.status or (True, 0)
    if held.spawn_error:
        return None, 0 if exited else number
    if not exited:
        return None, number
    started = held.container is not None and held.container.stage is Stage.STARTED
    return number, number - SHOWN_AS if started and number - SHOWN_AS in SIGNALS else 0


def judge(held: Held, counters: Counters, *, succeeded: bool) -> tuple[str, str]:
    """The reason of an end and what is to be said of it.

    `succeeded`: its main process ended by itself with exit code 0. What we did comes first, then what the kernel did;
    a process that could not be made explains a failure, of a success it is only worth a remark.
    """
    refused, oom_kills = counters.pids_refused, max(counters.oom_kills - held.oom_kills_beside, 0)
    # A container's own start takes memory and threads, too, and its limits may be too low even for that.
    short = held.container is not None and (held.container.too_small or oom_kills)
    if held.spawn_error and not short and not (held.container and refused):
        return "node-unfit" if held.spawn_unfit else "spawn-failed", held.spawn_error
    if held.stop_why and held.signalled:
        reason, message = held.stop_why, _why_stopped(held)
    elif oom_kills or short:
        reason, message = "out-of-memory", _why_out_of_memory(held.limits.memory_bytes, counters)
    elif refused and not succeeded:
        return "out-of-pids", _why_out_of_pids(held.limits.pids_max, refused)
    else:
        reason, message = "signal" if status_of(held)[1] else "exit", ""
    remark = _why_out_of_pids(held.limits.pids_max, refused) if refused else ""
    return reason, "; ".join(part for part in (message, remark) if part)


def _why_stopped(held: Held) -> str:
    match held.stop_why:
        case "walltime":
            return f"ran longer than its wall time of {held.walltime_s:g} s"
        case "disk-limit":
            return (
                f"its scratch directory held {held.disk_used_bytes} bytes, more than its disk limit of "
                f"{held.disk_bytes_max} bytes"
            )
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


def _why_out_of_pids(limit: int, refused: int) -> str:
    times = "once" if refused == 1 else f"{refused} times"
    whose = f"its limit is {limit}" if limit else "the limit is that of a group above the task's"
    return f"it could not make another process or thread, {times}: {whose}"
