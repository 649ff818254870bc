"""Which images a node lets go of: by age, then by size, never one that is in use or pinned."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass


class Why(enum.StrEnum):
    """Why an image goes."""

    AGE = "unused for too long"
    SIZE = "too much is kept"
    MARKED = "it was to be removed as soon as nothing uses it"


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as far as this decision goes.

    Attributes:
        size_bytes: what it takes on the disk.
        used_s: when something last used it, wall clock.
        is_held: something uses it now, or is about to.
        is_pinned: an administrator wants it kept.
        is_marked: an administrator wants it gone.
    """

    digest: str
    size_bytes: int
    used_s: float
    is_held: bool = False
    is_pinned: bool = False
    is_marked: bool = False


def choose(
    images: Iterable[Stored],
    *,
    now_s: float,
    keep_bytes: int,
    keep_s: float,
    since_s: float = -math.inf,
    known_s: float = math.inf,
) -> list[tuple[str, Why]]:
    """Digests of those to remove, each with the reason, the longest unused first.

    Args:
        images: all there are.
        now_s: wall clock.
        keep_bytes: for all together; those that may not go count, so that less of the others stays. 0: any amount.
        keep_s: how long one may be unused; 0: for ever.
        since_s: no age counts from before, as the clock was set then.
        known_s: since when nobody has set the clock. What was used after now was used when the clock was ahead, which
            was before: it counts from then, or it would stay until the time comes.
    """
    known = list(images)
    total_bytes = sum(i.size_bytes for i in known)
    out: list[tuple[str, Why]] = []
    for image in sorted(known, key=lambda i: (not i.is_marked, i.used_s, i.digest)):
        if image.is_held:
            continue
        why = None
        if image.is_marked:
            why = Why.MARKED
        elif image.is_pinned:
            continue
        elif keep_s and now_s - max(image.used_s if image.used_s <= now_s else min(known_s, now_s), since_s) > keep_s:
            why = Why.AGE
        elif keep_bytes and total_bytes > keep_bytes:
            why = Why.SIZE
        if why is not None:
            out.append((image.digest, why))
            total_bytes -= image.size_bytes
    return out
