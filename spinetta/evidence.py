"""What a worker's transaction is judged by: what the store holds of the keys that it is about.

A guard on a revision that is over can never hold again, as revisions only grow; one on a revision of the future might.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from spinetta import codec, keys, txn, validate
from spinetta.access import NodeAcl
from spinetta.errors import CorruptRecord
from spinetta.model import Incarnation, LeaseId, NodeId, Revision, Stored, Task, TaskId
from spinetta.txn import CreatedAt, Guard, RevisionIs, Txn

T = TypeVar("T")

TIME_MS_MAX = 253_402_300_799_000  # the year 9999


Known = Mapping[str, Stored | None]


class NotAllowed(Exception):
    """The transaction is refused; never leaves the gatekeeper."""


class Over(Exception):
    """It cannot commit any more; never leaves the gatekeeper."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about one worker and the keys of one transaction, at `revision` or later."""

    node: NodeId
    acl: NodeAcl
    known: Known
    revision: Revision
    leases: frozenset[LeaseId]

    def registration(self, when: tuple[Guard, ...]) -> txn.Registration | None:
        """The registration that these guards begin with; None: they do not."""
        created = created_at(when, keys.node(self.node))
        life = seen_at(when, keys.incarnation(self.node))
        generation = seen_at(when, keys.GENERATION)
        acl = seen_at(when, keys.acl_node(self.node))
        if not created or not life or generation is None or acl is None:
            return None
        return txn.Registration(self.node, created, life, generation, acl)

    def stored(self, key: str, *, modified: Revision | None = None, created: Revision | None = None) -> Stored:
        """The entry that a guard is about. Raises when the guard does not hold: `_Over` if it never will."""
        entry = self.known.get(key)
        wanted = modified or created or Revision(0)
        if wanted > self.revision:
            raise NotAllowed(f"{key}: nothing has been written at revision {wanted} yet")
        if entry is None or wanted != (entry.modified if modified else entry.created):
            raise Over(f"{key} has been written or deleted since revision {wanted}")
        return entry

    def life(self, seen: Revision) -> Incarnation:
        """The life of this node whose record was last written at `seen`. Raises as `stored`."""
        entry = self.stored(keys.incarnation(self.node), modified=seen)
        return self.readable(codec.decode_incarnation, entry.value, "the stored incarnation")

    def task(self, task: TaskId) -> tuple[Stored, Task]:
        """A task's entry and record. Raises `NotAllowed` when there is none that can be read."""
        entry = self.known.get(keys.task(task))
        if entry is None:
            raise NotAllowed(f"{task}: there is no such task")
        stored = self.readable(codec.decode_task, entry.value, f"{task}: the stored record")
        if stored.id != task:
            raise NotAllowed(f"{task}: the stored record is of another task")
        return entry, stored

    def check_lease(self, lease: LeaseId) -> None:
        """Raises `Over` when the lease is not known to be this node's."""
        entry = self.known.get(keys.node(self.node))
        if not lease or (lease not in self.leases and (entry is None or entry.lease != lease)):
            # As for one that has run out: the node asks for another. It may have been granted by another voter.
            raise Over("the lease is not known here")

    def readable(self, decode: Callable[[bytes], T], value: bytes, what: str) -> T:
        """What `decode` makes of a value. Raises `NotAllowed` when it cannot be read."""
        try:
            return decode(value)
        except CorruptRecord:
            raise NotAllowed(f"{what} cannot be read") from None


def task_of(part: Txn) -> TaskId | None:
    """The task that a part of a batch says it is about: of its last write."""
    if not part.then or not part.then[-1].key.startswith(keys.TASK):
        return None
    task = part.then[-1].key.removeprefix(keys.TASK)
    return TaskId(task) if validate.is_task_id(task) else None


def seen_at(when: tuple[Guard, ...], key: str) -> Revision | None:
    """The revision at which these guards want `key` to have been written last; None: none of them does."""
    return next((g.revision for g in when if isinstance(g, RevisionIs) and g.key == key), None)


def created_at(when: tuple[Guard, ...], key: str) -> Revision | None:
    """The same of its creation."""
    return next((g.revision for g in when if isinstance(g, CreatedAt) and g.key == key), None)


def time_of(time_ms: int) -> int:
    """A time that a node may tell of."""
    if not 0 <= time_ms <= TIME_MS_MAX:
        raise NotAllowed("a time is no time")
    return time_ms
