"""Transactions on ``/acl`` and ``/trust`` as values. As in `txn`: encoded values in, keys and guards out.

Each takes the revisions of what was read to decide (0: it did not exist), and `guards`, the acl record of whoever
asks: rights that are taken away meanwhile make a conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spinetta import keys
from spinetta.model import LeaseId, NodeId, Revision
from spinetta.txn import Absent, Delete, Guard, Put, RevisionIs, Txn, Write

Guards = tuple[Guard, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """A key as it was read: the decision rests on it."""

    key: str
    revision: Revision

    def guard(self) -> Guard:
        """It is still so."""
        return RevisionIs(self.key, self.revision)


@dataclass(frozen=True, slots=True)
class Change:
    """A new value for a key that was read."""

    seen: Seen
    value: bytes

    def write(self) -> Write:
        """The write alone."""
        return Put(self.seen.key, self.value)


def found(records: Sequence[tuple[str, bytes]]) -> Txn:
    """The first records of a cluster. Conflict: it has been founded; read by whom."""
    return Txn(when=(Absent(keys.authority("cluster")),), then=tuple(Put(k, v) for k, v in records))


def change(changes: Sequence[Change], guards: Guards = (), seen: Sequence[Seen] = ()) -> Txn:
    """Write records anew, all or none. `seen`: what else the decision rests on. Conflict: read again, decide anew."""
    return Txn(
        when=(*guards, *(s.guard() for s in seen), *(c.seen.guard() for c in changes)),
        then=tuple(c.write() for c in changes),
    )


def admit(token: Change, acl: Change, more: Sequence[Change], seen: Sequence[Seen]) -> Txn:
    """A token is redeemed: one use less, the node's rights, and `more`: its groups touched, and for a voter the
    authorities' keys sealed to it too.

    `seen` holds the request's key and the policy, so that neither has changed. Conflict: somebody has used the token,
    the name is taken, or the rules have changed.
    """
    return change((token, acl, *more), seen=seen)


def knock(token: Change, request: Change, seen: Sequence[Seen]) -> Txn:
    """A token is redeemed for a request that an administrator has to decide. `seen`: the node's acl key, the policy."""
    return change((token, request), seen=seen)


def approve(request: Seen, acl: Change, more: Sequence[Change], seen: Sequence[Seen], guards: Guards) -> Txn:
    """An administrator lets a node in. `more`: as for `admit`."""
    made = change((acl, *more), guards, (request, *seen))
    return Txn(when=made.when, then=(*made.then, Delete(request.key)))


def remove(seen: Seen, guards: Guards, more: Sequence[Change] = (), also: Sequence[Seen] = ()) -> Txn:
    """A record goes; others may have to change with it."""
    made = change(more, guards, (seen, *also))
    return Txn(when=made.when, then=(*made.then, Delete(seen.key)))


def revoke_node(node: NodeId, acl: Change, wraps: Sequence[Change], another: Seen | None, guards: Guards) -> Txn:
    """A node may do nothing any more. Its registration goes with it, so that the leader condemns it at once.

    `another`: the acl of a voter that stays: of two administrators who revoke the last two voters, one loses.
    """
    made = change((acl, *wraps), guards, () if another is None else (another,))
    return Txn(when=made.when, then=(*made.then, Delete(keys.node(node))))


def take_restart(node: NodeId, lease: LeaseId) -> Txn:
    """The right to restart one's etcd now, bound to a lease. Conflict: another voter restarts."""
    return Txn(when=(Absent(keys.ETCD_RESTART),), then=(Put(keys.ETCD_RESTART, node.encode(), lease),))
