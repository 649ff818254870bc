"""The leader's care for etcd: history and holes are given up when room is short, one step at a time.

What is to be done is decided by `spinetta.upkeep`, anew from what is there; why so: docs/adr/0025-etcd-upkeep.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from spinetta import keys, units, upkeep
from spinetta.model import Revision
from spinetta.node.health import StoreHealth
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store import maintenance
from spinetta.store.etcd import EtcdStore
from spinetta.upkeep import Care, Compact, Defragment, Disarm, EtcdView, MoveLeader, Past, Rest

log = logging.getLogger("spinetta.node")

COMPACT_S = 60.0  # etcd answers when all of it is forgotten; it goes on when nobody waits any more
OFFICE_READ_S = 3.0


class Leading(Protocol):
    """What is used of the agent."""

    @property
    def leading(self) -> bool:
        """This node holds the leader's office."""
        ...


class Seated(Protocol):
    """What is used of the seat."""

    @property
    def member_id(self) -> int:
        """Of this node's etcd member; 0: it has none."""
        ...


class EtcdCare:
    """Compacts, defragments and disarms while this node is in charge.

    Args:
        agent: tells whether this node holds the leader's office.
        seat: its etcd member.
        store: the cluster's.
        health: how etcd stands.
        pause_s: as for `upkeep.next_care`.
    """

    def __init__(
        self,
        agent: Leading,
        seat: Seated,
        store: EtcdStore,
        health: StoreHealth,
        *,
        pause_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent = agent
        self._seat = seat
        self._store = store
        self._health = health
        self._pause_s = pause_s
        self._clock = clock
        self._past = Past()
        self._said = ""

    async def run(self) -> None:
        """Look and act until cancelled."""
        teller = Teller(log)
        wait_s = upkeep.LOOK_EVERY_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = upkeep.LOOK_EVERY_S
            try:
                if not isinstance(await self.step(), Rest | None):
                    wait_s = upkeep.LOOK_SOON_S
            except TROUBLE as e:
                teller.tell(f"etcd's upkeep has to wait: {e}")

    async def step(self) -> Care | None:
        """Look, and do the one thing that is next; None: this node is not in charge."""
        if not self._seat.member_id or not await self._in_charge():
            self._past = Past()
            return None
        view = await self._health.look()
        now_s = self._clock()
        self._past.look(now_s, view.revision)
        self._past.keep(m.member_id for m in view.members)
        care = upkeep.next_care(view, self._past, now_s, quota_bytes=self._health.quota_bytes, pause_s=self._pause_s)
        self._past.done(care, now_s)  # also when it fails: not again at once
        await self._carry_out(care, view)
        return care

    async def _in_charge(self) -> bool:
        """The leader is; when the store is so full that no leader can be elected, the node of etcd's leader."""
        if self._agent.leading:
            return True
        if not self._health.is_full:
            return False
        view = await self._health.look(max_age_s=upkeep.LOOK_EVERY_S)
        mine = self._seat.member_id
        if not any(m.member_id == mine and m.leader_id == mine for m in view.members):
            return False
        office = await self._store.read([keys.OFFICE], timeout_s=OFFICE_READ_S)
        return office.entries[keys.OFFICE] is None

    async def _carry_out(self, care: Care, view: EtcdView) -> None:
        names = {m.member_id: m.title for m in view.members}
        urls = {m.member_id: m.client_url for m in self._health.members}
        tls = self._store.connections.tls
        match care:
            case Rest(reason):
                if reason and reason != self._said:
                    log.info("etcd's upkeep waits: %s", reason)
                self._said = reason
            case Compact(revision):
                await self._store.compact(Revision(revision), timeout_s=COMPACT_S)
                log.info("etcd: the history before revision %d is given up, to have room", revision)
            case MoveLeader(member_id, to_id):
                log.info("etcd: %s hands its lead to %s, to be defragmented", names[member_id], names[to_id])
                await maintenance.move_leader(urls[member_id], to_id, tls)
            case Defragment(member_id, deadline_s, reason):
                log.info("etcd: %s is defragmented: %s", names[member_id], reason)
                began_s = time.monotonic()
                await maintenance.defragment(urls[member_id], tls, timeout_s=deadline_s)
                took = units.format_duration(round(time.monotonic() - began_s, 1))
                log.info("etcd: %s has been defragmented in %s", names[member_id], took)
            case Disarm(member_id):
                # Any member can do it; this node's may have lost its seat meanwhile.
                url = urls.get(self._seat.member_id) or next(u for u in urls.values() if u)
                await maintenance.disarm(url, member_id, tls)
                log.warning("etcd: there is room again; the alarm NOSPACE of %s is taken back", names.get(member_id))
