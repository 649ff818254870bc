"""What tasks have used, and what they have now: for people and for programs. Part of `show`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from spinetta import units
from spinetta.client.views import TaskInfo
from spinetta.model import Usage


def usage_document(u: Usage) -> dict[str, Any]:
    """What was used."""
    return {
        "cpu_user_s": u.cpu_user_s,
        "cpu_system_s": u.cpu_system_s,
        "memory_peak_bytes": u.memory_peak_bytes,
        "io_read_bytes": u.io_read_bytes,
        "io_write_bytes": u.io_write_bytes,
        "pids_peak": u.pids_peak,
    }


def usage_words(u: Usage) -> str:
    """E.g. ``1.25s CPU, 12MiB peak, 3MiB read, 1MiB written, 7 processes``; empty when nothing is known."""
    parts = []
    if u.cpu_user_s or u.cpu_system_s:
        parts.append(f"{units.format_duration(u.cpu_user_s + u.cpu_system_s)} CPU")
    if u.memory_peak_bytes:
        parts.append(f"{units.format_bytes(u.memory_peak_bytes)} peak")
    if u.io_read_bytes:
        parts.append(f"{units.format_bytes(u.io_read_bytes)} read")
    if u.io_write_bytes:
        parts.append(f"{units.format_bytes(u.io_write_bytes)} written")
    if u.pids_peak:
        parts.append(f"{u.pids_peak} process{'' if u.pids_peak == 1 else 'es'}")
    return ", ".join(parts)


def usage_cells(info: TaskInfo) -> tuple[str, str, str]:
    """CPU time so far, and memory and processes now; of a task that has ended, the most it had."""
    if not info.task.attempts:
        return "", "", ""
    u, now = info.task.attempts[-1].usage, info.now
    memory, pids = (now.memory_bytes, now.pids) if now is not None else (u.memory_peak_bytes, u.pids_peak)
    cpu_s = u.cpu_user_s + u.cpu_system_s
    return (
        units.format_duration(cpu_s) if cpu_s else "",
        units.format_bytes(memory) if memory else "",
        str(pids) if pids else "",
    )


def now_words(info: TaskInfo) -> str:
    """What a running task has at this moment, e.g. ``12MiB memory, 3 processes``; empty when that is not known."""
    if info.now is None:
        return ""
    many = "" if info.now.pids == 1 else "es"
    return f"{units.format_bytes(info.now.memory_bytes)} memory, {info.now.pids} process{many}"


def units_words(given: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Labels of units by countable, e.g. ``gpu 0, 1``."""
    return "; ".join(f"{name} {', '.join(labels)}" for name, labels in given)


def now_document(info: TaskInfo) -> dict[str, Any] | None:
    """What a running task has at this moment; None when that is not known."""
    if info.now is None:
        return None
    given = {name: list(labels) for name, labels in info.now.units}
    return {"memory_bytes": info.now.memory_bytes, "pids": info.now.pids, "units": given}
