"""What a group's processes have used, as its control files say it, of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from .hierarchy import read_text
from .sysapi import EndedUsage

GROUPS_MAX = 16  # made inside of ours that are looked at: a container's is the only one that we know of
PROCESSES_MAX = 256  # whose own counts of input and output are added up at one look


@dataclass(frozen=True)
class Counters:
    """What a group's processes have used; None where the machine does not say.

    Attributes:
        oom_kills: processes killed because memory ran out.
        pids_refused: processes and threads that were not made because there were too many.
        io_read_bytes, io_write_bytes: from and to disks, as far as the kernel puts it down to the group.
        pids_peak: the most processes and threads at once.
    """

    cpu_user_s: float | None = None
    cpu_system_s: float | None = None
    memory_peak_bytes: int | None = None
    oom_kills: int = 0
    pids_refused: int = 0
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pids_peak: int | None = None


@dataclass(frozen=True)
class Now:
    """What they use at this moment; None where the machine does not say."""

    memory_bytes: int | None = None
    pids: int | None = None


def flat(path: Path) -> dict[str, int]:
    """A file of ``name number`` lines; empty when it cannot be read."""
    values = {}
    with contextlib.suppress(OSError):
        for line in read_text(path).splitlines():
            name, _, value = line.partition(" ")
            if value.isdigit():
                values[name] = int(value)
    return values


def single(path: Path) -> int | None:
    """A file that holds one number; None when it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return int(read_text(path))
    return None


def parse_io_v1(text: str) -> tuple[int, int]:
    """Bytes read and written, from ``blkio.throttle.io_service_bytes``: lines of ``8:0 Read 4096``."""
    read = write = 0
    for line in text.splitlines():
        match line.split():
            case [_, "Read", number] if number.isdigit():
                read += int(number)
            case [_, "Write", number] if number.isdigit():
                write += int(number)
    return read, write


def parse_io_v2(text: str) -> tuple[int, int]:
    """Bytes read and written, from ``io.stat``: lines of ``8:0 rbytes=4096 wbytes=0 rios=1 …``."""
    read = write = 0
    for line in text.splitlines():
        for field in line.split()[1:]:
            name, _, number = field.partition("=")
            if number.isdigit():
                read += int(number) if name == "rbytes" else 0
                write += int(number) if name == "wbytes" else 0
    return read, write


def read_counters(v2: Path | None, v2_controllers: AbstractSet[str], v1: Mapping[str, Path]) -> Counters:
    """Use so far of the groups at these places."""
    user: float | None = None
    system: float | None = None
    if v2:
        stat = flat(v2 / "cpu.stat")  # there with or without the cpu controller
        if "user_usec" in stat:
            user, system = stat["user_usec"] / 1e6, stat.get("system_usec", 0) / 1e6
    elif path := v1.get("cpuacct"):
        user_ns, system_ns = single(path / "cpuacct.usage_user"), single(path / "cpuacct.usage_sys")
        if user_ns is not None and system_ns is not None:
            user, system = user_ns / 1e9, system_ns / 1e9
    peak: int | None = None
    oom_kills = 0
    if path := v1.get("memory"):
        peak = single(path / "memory.max_usage_in_bytes")
        oom_kills = flat(path / "memory.oom_control").get("oom_kill", 0)
    elif v2 and "memory" in v2_controllers:
        peak = single(v2 / "memory.peak")
        oom_kills = flat(v2 / "memory.events").get("oom_kill", 0)
    refused, pids_peak = 0, None
    if pids := v1.get("pids") or (v2 if "pids" in v2_controllers else None):
        refused, pids_peak = _refused(pids), single(pids / "pids.peak")
    read, write = _io(v2, v2_controllers, v1)
    return Counters(user, system, peak, oom_kills, refused, read, write, pids_peak)


def read_now(v2: Path | None, v2_controllers: AbstractSet[str], v1: Mapping[str, Path]) -> Now:
    """Use at this moment."""
    memory: int | None = None
    if path := v1.get("memory"):
        memory = single(path / "memory.usage_in_bytes")
    elif v2 and "memory" in v2_controllers:
        memory = single(v2 / "memory.current")
    pids = v1.get("pids") or (v2 if "pids" in v2_controllers else None)
    return Now(memory, single(pids / "pids.current") if pids else None)


def processes_io(pids: list[int]) -> tuple[int, int]:
    """Bytes that these processes have read from disks and dirtied, each by itself; of those that are gone nothing.

    For while they run. Newer kernels count nothing in version 1's blkio group as long as nobody throttles the disk, and
    none ever put what is written later, from the cache, down to it.
    """
    read = write = 0
    for pid in pids[:PROCESSES_MAX]:
        with contextlib.suppress(OSError):
            said = {name: value for name, _, value in (line.partition(": ") for line in _lines(pid))}
            read += int(said.get("read_bytes", "0"))
            write += int(said.get("write_bytes", "0"))
    return read, write


def with_ended(counters: Counters, ended: EndedUsage | None) -> Counters:
    """Altogether, with what the kernel says of the ended main process and of those that it has waited for."""
    if ended is None:
        return counters
    return replace(
        counters,
        cpu_user_s=ended.user_s if counters.cpu_user_s is None else counters.cpu_user_s,
        cpu_system_s=ended.system_s if counters.cpu_system_s is None else counters.cpu_system_s,
        memory_peak_bytes=ended.peak_bytes if counters.memory_peak_bytes is None else counters.memory_peak_bytes,
        io_read_bytes=max(counters.io_read_bytes or 0, ended.io_read_bytes),
        io_write_bytes=max(counters.io_write_bytes or 0, ended.io_write_bytes),
    )


def _refused(group: Path) -> int:
    """Processes that were not made: before Linux 6.12 counted where they were wanted, in a container's group inside."""
    found = [flat(group / "pids.events").get("max", 0)]
    with contextlib.suppress(OSError), os.scandir(group) as entries:
        inner = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        found += [flat(path / "pids.events").get("max", 0) for path in inner[:GROUPS_MAX]]
    return max(found)


def _lines(pid: int) -> list[str]:
    return read_text(Path(f"/proc/{pid}/io")).splitlines()


def _io(v2: Path | None, v2_controllers: AbstractSet[str], v1: Mapping[str, Path]) -> tuple[int | None, int | None]:
    if path := v1.get("blkio"):
        for name in ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"):
            with contextlib.suppress(OSError):
                return parse_io_v1(read_text(path / name))
    elif v2 and "io" in v2_controllers:
        with contextlib.suppress(OSError):
            return parse_io_v2(read_text(v2 / "io.stat"))
    return None, None
