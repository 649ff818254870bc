"""Which queued tasks to claim now: waits that spread the claims, and packing into what is free.

First form: every node is equally priced, so the bid is rank times slot, where rank is the node's place for a task in
rendezvous hashing (Thaler and Ravishankar, 1998) among the nodes that could take it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from spinetta.match import why_never, why_not_now
from spinetta.model import NodeId, NodeRecord, QueueHint, Resources, TaskId
from spinetta.queue import Waiting

SLOT_S = 0.02  # a claim is seen by the others within about 10 ms on a local network
WAIT_MAX_S = 1.0  # every wait is bounded, so nothing starves behind nodes that never come
STARVED_AFTER_S = 30.0  # a task that did not fit for so long gets room kept for it on the node ranked first
CLAIMS_MAX = 60  # in one batch: reading back a lost answer takes two keys each, of 120 that one read may have


def weight(node: NodeId, task: TaskId) -> int:
    """The rendezvous weight of a node for a task: the same everywhere, without coordination."""
    return int.from_bytes(hashlib.blake2b(f"{node}\0{task}".encode(), digest_size=8).digest(), "big")


def rank(me: NodeId, task: TaskId, rivals: Iterable[NodeId]) -> int:
    """How many of `rivals` come before `me` for this task."""
    mine = (weight(me, task), me)
    return sum(1 for r in rivals if r != me and (weight(r, task), r) > mine)


def rivals(hint: QueueHint, peers: Iterable[NodeRecord], *, with_room: bool = True) -> list[NodeId]:
    """Peers that could take the task, as they last described themselves."""
    return [
        p.name
        for p in peers
        if not p.draining
        and not p.leaving
        and not p.unfit
        and why_never(hint, p.capacity, frozenset(p.tags), p.clearances, p.allows) is None
        and (not with_room or why_not_now(hint, p.free) is None)
    ]


def wait_s(me: NodeId, waiting: Waiting, peers: Sequence[NodeRecord]) -> float:
    """How long after first seeing the task this node lets others go first, its own back-off included."""
    if waiting.hint is None:
        return WAIT_MAX_S
    place = rank(me, waiting.id, rivals(waiting.hint, peers))
    return min(place * SLOT_S, WAIT_MAX_S) + waiting.hint.delay_s


@dataclass(frozen=True, slots=True)
class Plan:
    """What to claim now, what waits were computed, and when to look again (None: not before something changes)."""

    claims: tuple[Waiting, ...]
    considered: tuple[Waiting, ...]
    look_again_at_s: float | None


def plan(
    me: NodeId,
    waiting: Iterable[Waiting],
    peers: Sequence[NodeRecord],
    free: Resources,
    now: float,
    *,
    slots: int = CLAIMS_MAX,
) -> Plan:
    """Pack due tasks by priority, then age, into the free resources.

    For a task that has not fitted for `STARVED_AFTER_S` room is kept on the node ranked first for it (whatever is
    free): no task behind it is taken there until it fits. One node only does so, so that the others stay busy.
    """
    considered = [w if w.wait_s is not None else replace(w, wait_s=wait_s(me, w, peers)) for w in waiting if w.hint]
    claims: list[Waiting] = []
    again: list[float] = []
    room = free
    for w in sorted(considered, key=lambda w: (-w.hint.priority if w.hint else 0, w.id)):
        assert w.hint is not None and w.wait_s is not None  # noqa: S101, PT018 - filtered above
        due_s = w.seen_at_s + w.wait_s
        if len(claims) >= min(slots, CLAIMS_MAX):
            break
        if due_s > now:
            again.append(due_s)
        elif w.hint.resources.fits_in(room):
            claims.append(w)
            room = room - w.hint.resources
        else:
            starved_at_s = due_s + STARVED_AFTER_S
            if starved_at_s > now:
                again.append(starved_at_s)
            elif rank(me, w.id, rivals(w.hint, peers, with_room=False)) == 0:
                break
    return Plan(tuple(claims), tuple(considered), min(again) if again else None)
