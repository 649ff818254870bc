"""Kernel, memory, swap, open files, clocks."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import time
from dataclasses import dataclass

from spinetta import checkup
from spinetta.checkup import Finding, Level
from spinetta.node.detect import cgroup_limits
from spinetta.runtime.detect import read_text

_STA_UNSYNC, _STATUS_AT, _TIMEX_BYTES, _TIME_ERROR = 0x40, 40, 256, 5
_CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds of the time of day and of the clock that nobody sets, read at once."""

    wall_s: float
    steady_s: float


def clocks() -> Clocks:
    """Now."""
    return Clocks(time.time(), time.monotonic())


async def kernel() -> list[Finding]:
    """Its version."""
    return [checkup.judge_kernel("kernel", os.uname().release)]


async def memory() -> list[Finding]:
    """What there is."""
    return [f for f in _memory() if f.check == "memory"]


async def swap() -> list[Finding]:
    """Whether it is on."""
    return [f for f in _memory() if f.check == "swap"]


def _memory() -> list[Finding]:
    sizes = meminfo(read_text("/proc/meminfo"))
    if "MemTotal" not in sizes:
        return [Finding("memory", Level.NOTE, "/proc/meminfo does not say how much there is")]
    total = sizes["MemTotal"]
    _, limit = cgroup_limits()
    return checkup.judge_memory("memory", total, sizes.get("MemAvailable", total), limit, sizes.get("SwapTotal", 0))


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[0].isdigit() and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


async def files() -> list[Finding]:
    """The limit on open files."""
    return [checkup.judge_files("files", *resource.getrlimit(resource.RLIMIT_NOFILE))]


def clock(begun: Clocks) -> list[Finding]:
    """Whether the clock was set since `begun`, and whether anything keeps it right."""
    now = clocks()
    over_s = now.steady_s - begun.steady_s
    return checkup.judge_clock(
        "clock",
        source=read_text(_CLOCK_SOURCE).strip(),
        synchronised=synchronised(),
        stepped_s=(now.wall_s - begun.wall_s) - over_s,
        over_s=over_s,
    )


def synchronised() -> bool | None:
    """Whether the kernel says that a program keeps the clock right; None where it does not tell."""
    if struct.calcsize("P") != 8:
        return None  # the record is another one there
    libc = ctypes.CDLL(None, use_errno=True)
    record = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = libc.adjtimex(record)
    if state < 0:
        return None
    status: int = struct.unpack_from("@i", record.raw, _STATUS_AT)[0]
    return state != _TIME_ERROR and not status & _STA_UNSYNC
