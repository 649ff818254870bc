"""Findings about a machine, and the rules by which what was seen becomes one. `spinetta doctor` shows them."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spinetta import units


class Level(enum.IntEnum):
    """How bad a finding is."""

    OK = 0
    NOTE = 1  # worth knowing, weakens nothing that was asked for
    WARNING = 2  # a node runs, with less than it could have
    PROBLEM = 3  # a node does not run, or not for long

    @property
    def word(self) -> str:
        """For people and programs."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: which check it is of; several may be of one.
        seen: what was seen, in words, with figures.
        weakens: what is the worse for it.
        mend: what to do, a command where there is one.
    """

    check: str
    level: Level
    seen: str
    weakens: str = ""
    mend: str = ""


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, seen)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them."""
    return max((f.level for f in findings), default=Level.OK)


# --- disk --------------------------------------------------------------------------------------------------------

SYNC_GOOD_S = 0.010  # etcd's advice: the 99th percentile of writing to its log
SYNC_BAD_S = 0.100  # etcd's heartbeat interval: members take each other for dead
DISK_LEAST_BYTES = 1 << 30  # etcd's file and log while they are small, task logs
DISK_GOOD_BYTES = 10 << 30  # etcd's quota (2 GiB), twice while it defragments, its log and snapshots, task logs
FILES_LEAST = 10_000


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of the values that `part` of them do not exceed; of none: 0."""
    ordered = sorted(values)
    return ordered[max(math.ceil(part * len(ordered)) - 1, 0)] if ordered else 0.0


def judge_syncs(check: str, times_s: Sequence[float], *, kind: str, voter: bool = True) -> Finding:
    """What the times of writing a little and making it last say about etcd on this disk.

    `kind` is the file system's; `voter`: whether etcd may run here at all.
    """
    if not times_s:
        return Finding(check, Level.WARNING, "not one write was finished while it was measured", _SLOW, _FASTER)
    p50, p99 = percentile(times_s, 0.5), percentile(times_s, 0.99)
    seen = (
        f"a write of 2 KiB lasts after {_ms(p50)} (median), {_ms(p99)} (99 of 100), {_ms(max(times_s))} (longest of "
        f"{len(times_s)}), {kind}"
    )
    if kind in IN_MEMORY:
        return Finding(
            check, Level.WARNING, f"{seen}: that is memory", "all that this node keeps is gone at a restart", _OTHER_DIR
        )
    if p99 < SYNC_GOOD_S:
        return ok(check, seen)
    if not voter:
        return Finding(check, Level.NOTE, seen, "fast enough for a node without etcd", "")
    level = Level.PROBLEM if p99 >= SYNC_BAD_S else Level.WARNING
    return Finding(check, level, seen, _SLOW, _FASTER)


IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_SLOW = "etcd wants less than 10 ms; above it submits and claims are slow, and voters take each other for dead"
_OTHER_DIR = "spinetta node join --data-dir /a/directory/on/a/disk"
_FASTER = "put the data directory on a local SSD (--data-dir), or keep etcd off this machine (--candidate no)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2g} ms" if seconds < 0.0095 else f"{seconds * 1000:.0f} ms"


def judge_space(check: str, free_bytes: int, free_files: int | None, where: str, *, read_only: bool) -> Finding:
    """What the room on the disk of the data directory is enough for."""
    if read_only:
        return Finding(
            check, Level.PROBLEM, f"{where} is on a file system that is mounted read-only",
            "no node can keep anything there", "mount it writable, or choose another: --data-dir",
        )  # fmt: skip
    seen = f"{units.format_bytes(free_bytes)} free at {where}"
    weakens = "etcd may grow to 2 GiB (etcd_quota) and takes as much again while it is defragmented; logs come on top"
    mend = "free some room, choose another --data-dir, or lower --etcd-quota and --log-keep"
    if free_files is not None and free_files < FILES_LEAST:
        return Finding(check, Level.WARNING, f"{seen}, but room for only {free_files} more files", weakens, mend)
    if free_bytes < DISK_LEAST_BYTES:
        return Finding(check, Level.PROBLEM, seen, weakens, mend)
    if free_bytes < DISK_GOOD_BYTES:
        return Finding(check, Level.WARNING, seen, weakens, mend)
    return ok(check, seen)


# --- clock -------------------------------------------------------------------------------------------------------

CLOCK_GOOD = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "xen", "timebase", "tod")
STEP_S = 0.05  # the wall clock against the steady one, over the seconds of the checkup
RATE_GOOD = 0.001  # a clock is bent by 0.0005 at most while it is set


def judge_clock(
    check: str, *, source: str, synchronised: bool | None, stepped_s: float, over_s: float
) -> list[Finding]:
    """What was seen of the clocks. `synchronised` is None where the kernel does not say.

    Nothing rests on the time of day; leases and deadlines rest on the rate of the steady clock.
    """
    found = []
    if abs(stepped_s) > STEP_S:
        found.append(
            Finding(
                check, Level.WARNING, f"the time of day jumped by {stepped_s:+.2f} s within {over_s:.0f} s",
                "certificates and tokens may seem expired, ages in tables are wrong; no task is in danger",
                "let one program set the clock, slowly: apt install chrony",
            )
        )  # fmt: skip
    if synchronised is False:
        found.append(
            Finding(
                check, Level.WARNING, "nothing keeps the time of day right (the kernel's clock is not synchronised)",
                "certificates and tokens may seem expired, ages in tables are wrong; no task is in danger",
                "apt install chrony, or: timedatectl set-ntp true; in a virtual machine or container see to its host",
            )
        )  # fmt: skip
    if source and source not in CLOCK_GOOD:
        found.append(
            Finding(
                check, Level.NOTE, f"the clock source is {source}", "reading the time is slow, and its rate less even",
                "cat /sys/devices/system/clocksource/clocksource0/available_clocksource names others",
            )
        )  # fmt: skip
    if not found:
        kept = "synchronised" if synchronised else "not known to be synchronised"
        found.append(ok(check, f"steady over {over_s:.0f} s, {kept}, source {source or 'unknown'}"))
    return found


# --- memory, files, kernel ---------------------------------------------------------------------------------------

MEMORY_LEAST_BYTES = 512 << 20  # the daemon and etcd, and hardly a task
MEMORY_GOOD_BYTES = 2 << 30
FILES_GOOD, FILES_BAD = 8192, 1024  # each attempt takes some, etcd one for each connection and watch
KERNEL_LEAST, KERNEL_GOOD = (5, 4), (5, 14)


def judge_memory(
    check: str, total_bytes: int, available_bytes: int, limit_bytes: int, swap_bytes: int
) -> list[Finding]:
    """Memory of the machine, less what a control group takes away (0: nothing), and swap."""
    have = min(total_bytes, limit_bytes or total_bytes)
    seen = f"{units.format_bytes(have)}, {units.format_bytes(min(available_bytes, have))} available"
    if limit_bytes and limit_bytes < total_bytes:
        seen += f" (the machine has {units.format_bytes(total_bytes)}, our control group a limit)"
    found = []
    if have < MEMORY_LEAST_BYTES:
        found.append(
            Finding(
                check, Level.PROBLEM, seen, "the daemon and etcd take some 300 MiB", "use a machine with more memory"
            )
        )
    elif have < MEMORY_GOOD_BYTES:
        found.append(Finding(check, Level.NOTE, seen, "room for small tasks only", ""))
    else:
        found.append(ok(check, seen))
    if swap_bytes:
        found.append(
            Finding(
                "swap", Level.NOTE, f"{units.format_bytes(swap_bytes)} of swap are on",
                "etcd and the daemon may be swapped out and answer late; tasks only where cgroups cannot forbid it",
                "swapoff -a, and take it out of /etc/fstab",
            )
        )  # fmt: skip
    else:
        found.append(ok("swap", "off"))
    return found


def judge_files(check: str, soft: int, hard: int) -> Finding:
    """Open files that a process may have; the daemon and the shim raise their own limit to the hard one."""
    seen = f"{hard} open files (soft limit {soft})"
    if hard >= FILES_GOOD:
        return ok(check, seen)
    level = Level.WARNING if hard >= FILES_BAD else Level.PROBLEM
    return Finding(
        check, level, seen, "many tasks, clients or followers of logs at once are refused",
        "ulimit -Hn 65536 before the node starts; LimitNOFILE=65536 in its systemd unit",
    )  # fmt: skip


def judge_kernel(check: str, release: str) -> Finding:
    """The kernel's version; features are tried, so this tells only what will be missing."""
    numbers = release.split("-")[0].split(".")
    try:
        version = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        return Finding(check, Level.NOTE, f"Linux {release}: no version that we know how to read", "", "")
    if version < KERNEL_LEAST:
        return Finding(
            check, Level.PROBLEM, f"Linux {release}", "processes cannot be waited for by descriptor (pidfd, Linux 5.4)",
            "boot a newer kernel",
        )  # fmt: skip
    if version < KERNEL_GOOD:
        return Finding(
            check, Level.NOTE, f"Linux {release}",
            "before 5.11 no overlays for users without root, before 5.14 cgroups are emptied process by process", "",
        )  # fmt: skip
    return ok(check, f"Linux {release}")
