"""Which leases were granted to whom, as far as this voter knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from spinetta.gatewaycodec import Busy
from spinetta.model import LeaseId, NodeId

PER_NODE_MAX = 8  # a node has one, and for a moment another when it begins anew
SLACK_S = 30.0  # a lease may live longer than its time: etcd begins anew after a change of its leader


@dataclass(slots=True)
class Leases:
    """Memory of one voter. What it has forgotten, or another voter granted, is found by the node's own key."""

    clock: Callable[[], float] = time.monotonic
    _of: dict[NodeId, dict[LeaseId, tuple[int, float]]] = field(default_factory=dict)

    def of(self, node: NodeId) -> frozenset[LeaseId]:
        """Those that may still live."""
        now_s = self.clock()
        mine = {lease: found for lease, found in self._of.get(node, {}).items() if found[1] > now_s}
        if mine:
            self._of[node] = mine
        else:
            self._of.pop(node, None)
        return frozenset(mine)

    def check_room(self, node: NodeId) -> None:
        """Raises `Busy` when the node has as many as a node may have."""
        if len(self.of(node)) >= PER_NODE_MAX:
            raise Busy(f"{node} has {PER_NODE_MAX} leases already", hint="they run out by themselves")

    def granted(self, node: NodeId, lease: LeaseId, ttl_s: int) -> None:
        """It is this node's, and lives as long from now on."""
        self._of.setdefault(node, {})[lease] = (ttl_s, self.clock() + ttl_s + SLACK_S)

    def kept(self, node: NodeId, lease: LeaseId, ttl_s: float) -> None:
        """It has been renewed."""
        if len(self.of(node) | {lease}) <= PER_NODE_MAX:
            self.granted(node, lease, int(ttl_s))

    def ended(self, node: NodeId, lease: LeaseId) -> None:
        """It is no more."""
        self._of.get(node, {}).pop(lease, None)
        if not self._of.get(node):
            self._of.pop(node, None)
