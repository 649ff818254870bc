"""Etcd's way from a shim that has nothing else left to the one that takes what is new: one voter at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

from spinetta import accesstxn
from spinetta.errors import OutcomeUnknown, StoreUnavailable
from spinetta.model import Membership, NodeId
from spinetta.node.renewal import RESTART_LEASE_S
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.protocol import Store
from spinetta.store.supervisor import SERVICE
from spinetta.txn import Committed

log = logging.getLogger("spinetta.node")

LOOK_EVERY_S = 5.0  # a look at memory; only when there is something to move is the cluster asked


class Stranding(Protocol):
    """What is used of the shims."""

    def strands(self, name: str) -> bool:
        """Whether a service is all that a shim goes on for."""
        ...


class Seated(Protocol):
    """What is used of the seat."""

    @property
    def member_id(self) -> int:
        """Of this node's etcd member; 0: it has none."""
        ...

    async def membership(self) -> Membership:
        """Etcd's members, and how they are."""
        ...

    async def restart(self) -> None:
        """Stop etcd in order and start it again: in the newest shim."""
        ...


class EtcdMove:
    """Restarts this node's etcd when a shim of other code goes on for it alone.

    Only while every voter is well, so that a majority stays, and with the same right that a restart for new
    authorities takes, so that no two voters restart at once. Should the daemon be killed between stop and start, the
    next one starts etcd as always.
    """

    def __init__(self, shims: Stranding, seat: Seated, store: Store, name: NodeId) -> None:
        self._shims = shims
        self._seat = seat
        self._store = store
        self._name = name

    async def run(self) -> None:
        """Look and move until cancelled."""
        teller = Teller(log)
        while True:
            try:
                if self._seat.member_id and self._shims.strands(SERVICE) and (why := await self.step()):
                    teller.tell(f"etcd stays in a shim of other code: {why}", logging.INFO)
            except TROUBLE as e:
                teller.tell(f"etcd cannot be moved to the new shim now: {e}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def step(self) -> str:
        """Move it if that does no harm now; else why not."""
        members = (await self._seat.membership()).members
        if unwell := [m.name or "a new member" for m in members if not m.healthy or m.learner]:
            return f"not every member is well and votes: {', '.join(unwell)}"
        lease = await self._store.grant_lease(RESTART_LEASE_S)
        try:
            if not isinstance(await self._store.commit(accesstxn.take_restart(self._name, lease)), Committed):
                return "another voter restarts its etcd"
            log.info("restarting etcd, in the new shim")
            await self._seat.restart()
        finally:
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown):  # then it ends by itself
                await self._store.revoke_lease(lease)
        return ""
