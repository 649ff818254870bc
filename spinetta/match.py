"""May a task run here? None, or the reason why not. The same reasons answer `why`."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from spinetta import openfiles, units
from spinetta.access import MEMBERS
from spinetta.container import CONTAINER, PROCESS, refusals
from spinetta.model import QueueHint, Resources


class Obstacle(enum.Enum):
    """Kinds of reasons against running a task on a node."""

    NOT_CLEARED = "not-cleared"  # for a label that the task carries, itself or through one of its groups
    TAG_MISSING = "tag-missing"
    TAG_FORBIDDEN = "tag-forbidden"
    NOT_ALLOWED = "not-allowed"  # by the node's administrator, or not possible there
    TOO_LARGE = "too-large"  # for the node even when it is empty
    NO_ROOM = "no-room"  # now; later perhaps


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a task cannot run on a node."""

    obstacle: Obstacle
    detail: str


def uncleared(wanted: Collection[str], clearances: Collection[str]) -> list[str]:
    """Labels that these effective clearances do not cover, sorted. Every approved node is cleared for `MEMBERS`."""
    return sorted(label for label in set(wanted) if label != MEMBERS and label not in clearances)


def why_never(
    hint: QueueHint,
    capacity: Resources,
    tags: frozenset[str],
    clearances: Collection[str] = (),
    allows: Collection[str] = (),
) -> Reason | None:
    """Why this node could not run the task even when empty; None when it could.

    `clearances` are the effective ones: granted to the node and to every group that it is in. `allows`: what its
    administrator lets tasks have, see `container.refusals`.
    """
    if hint.clearance:
        lacking = uncleared(hint.clearance, clearances)
        if lacking:
            return Reason(Obstacle.NOT_CLEARED, f"the node is not cleared for {', '.join(lacking)}")
    missing = [t for t in hint.tags_required if t not in tags]
    if missing:
        return Reason(Obstacle.TAG_MISSING, f"the node lacks the tag {', '.join(missing)}")
    unwanted = [t for t in hint.tags_forbidden if t in tags]
    if unwanted:
        return Reason(Obstacle.TAG_FORBIDDEN, f"the task forbids the node's tag {', '.join(unwanted)}")
    if refused := refusals(hint.needs, allows):
        files = [number for word in refused if (number := openfiles.number_of(word)) is not None]
        if len(files) < len(refused):
            return Reason(Obstacle.NOT_ALLOWED, _not_allowed(refused))
        return Reason(Obstacle.TOO_LARGE, _too_few_files(max(files), openfiles.most(allows)))
    if not hint.resources.fits_in(capacity):
        return Reason(Obstacle.TOO_LARGE, shortfall(hint.resources, capacity))
    return None


def _not_allowed(refused: list[str]) -> str:
    if CONTAINER in refused:
        return "the node runs no containers"
    if PROCESS in refused:
        return "the node runs tasks in containers only, and this one names no image"
    return f"the node does not allow {', '.join(w for w in refused if openfiles.number_of(w) is None)}"


def _too_few_files(wanted: int, there: int) -> str:
    if not there:
        return "the node is of a version that sets no limit on open files"
    return f"{wanted} open files wanted, at most {there} there"


def why_not_now(hint: QueueHint, free: Resources) -> Reason | None:
    """Why the task does not fit into what is free; None when it does."""
    if hint.resources.fits_in(free):
        return None
    return Reason(Obstacle.NO_ROOM, shortfall(hint.resources, free))


def shortfall(wanted: Resources, room: Resources) -> str:
    """Which components do not fit, for people."""
    parts = []
    if wanted.cpu_millis > room.cpu_millis:
        cores = "core" if wanted.cpu_millis == 1000 else "cores"
        parts.append(
            f"{units.format_cpus(wanted.cpu_millis)} {cores} wanted, {units.format_cpus(room.cpu_millis)} there"
        )
    if wanted.memory_bytes > room.memory_bytes:
        parts.append(_too_few_bytes(wanted.memory_bytes, room.memory_bytes, "memory"))
    if wanted.disk_bytes > room.disk_bytes:
        parts.append(_too_few_bytes(wanted.disk_bytes, room.disk_bytes, "disk"))
    counts = dict(room.countables)
    parts += [
        f"{n} {name} wanted, {counts.get(name, 0)} there" for name, n in wanted.countables if n > counts.get(name, 0)
    ]
    return "; ".join(parts)


def _too_few_bytes(wanted: int, there: int, what: str) -> str:
    short, short_there = units.format_bytes(wanted), units.format_bytes(there)
    if short == short_there:  # "8GiB wanted, 8GiB there" would explain nothing
        return f"{wanted} bytes of {what} wanted, {there} there"
    return f"{short} {what} wanted, {short_there} there"
