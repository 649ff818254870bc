"""What the store says of the rights of nodes: one's own, and those of all, for whoever leads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spinetta import keys, trustcodec
from spinetta.access import NodeAcl
from spinetta.codec import readable
from spinetta.events import Entry
from spinetta.mirror import Delta
from spinetta.model import NodeId, Revision


@dataclass(frozen=True, slots=True)
class Rights:
    """What the leader, or who would be it, knows of the rights of nodes.

    Attributes:
        own: the revision of this node's own; every write in office is guarded by it. 0: no record.
        may_lead: False once they have been revoked, or are not known.
        revoked: nodes whose rights have been taken away: an administrator has already said that they are gone.
    """

    own: Revision = Revision(0)
    may_lead: bool = True
    revoked: frozenset[NodeId] = frozenset()


NO_RIGHTS = Rights()  # nor are any needed: an open cluster


def rights_in(value: bytes) -> NodeAcl | None:
    """A record of rights; None when it cannot be read, which is neither a yes nor a no."""
    return readable(lambda data: trustcodec.decode(NodeAcl, data), value)


class Revocations:
    """Who has been thrown out, as a mirror of ``/acl/node/`` shows it."""

    def __init__(self) -> None:
        self.nodes: frozenset[NodeId] = frozenset()

    def follow(self, deltas: Iterable[Delta]) -> None:
        """Records have changed. One that cannot be read, or is gone, does not say so."""
        for d in deltas:
            node = NodeId(d.key.removeprefix(keys.ACL_NODE))
            acl = rights_in(d.new.value) if d.new is not None else None
            self.nodes = (self.nodes | {node}) if acl is not None and acl.revoked else (self.nodes - {node})

    def rights(self, me: NodeId, records: Mapping[str, Entry], *, needed: bool) -> Rights:
        """What `me` knows when it leads, or would; `needed`: without a record of its own it may not."""
        own = records.get(keys.acl_node(me))
        if own is None:
            return Rights(may_lead=not needed, revoked=self.nodes)
        # One that cannot be read is no reason to give the office up: what the guards let through was approved.
        return Rights(own.modified, me not in self.nodes, self.nodes)
