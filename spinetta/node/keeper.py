"""The leader's care for the number of voters: one step at a time, each decided anew from what is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

import grpc

from spinetta import voters
from spinetta.agent import Agent
from spinetta.errors import AlreadyExists
from spinetta.model import NodeRecord
from spinetta.node.seats import OwnSeat
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.members import Member, MemberList
from spinetta.store.process import initial_cluster
from spinetta.trust.dial import Dialer, node_name
from spinetta.v1 import api_pb2 as pb
from spinetta.v1.api_pb2_grpc import PeerStub

log = logging.getLogger("spinetta.node")

LOOK_EVERY_S = 0.5  # whether anything asks for a step: a glance at what is in memory
STEP_EVERY_S = 15.0  # at rest: members may change by other hands
SEAT_CALL_S = 75.0  # a node starts its member and waits until it is ready, or puts it away
LEARNER_STALE_S = 90.0  # a learner that has not come up by then is rolled back, and its node left alone as long again


class SeatKeeper:
    """Adds, promotes and removes voters while this node is the leader."""

    def __init__(
        self,
        agent: Agent,
        seat: OwnSeat,
        wanted: int,
        dialer: Dialer,
        revoked: Callable[[Iterable[str]], Awaitable[frozenset[str]]],
    ) -> None:
        self._agent = agent
        self._dialer = dialer
        self._revoked = revoked
        self._seat = seat
        self._wanted = wanted
        self._learner_since_s: dict[int, float] = {}
        self._shunned_until_s: dict[str, float] = {}  # peer URLs whose learner did not come up
        self._said = ""

    def records(self) -> tuple[NodeRecord, ...]:
        """All live nodes, this one included."""
        return (self._agent.session.record, *self._agent.peers)

    async def run(self) -> None:
        """Look and step until cancelled."""
        seen: object = None
        settled, next_s, teller = False, 0.0, Teller(log)
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._agent.leading or not self._seat.member_id:
                seen = None
                continue
            looks = tuple((r.name, r.leaving, r.candidate, r.etcd_peer_url) for r in self.records())
            if settled and looks == seen and time.monotonic() < next_s:
                continue
            try:
                settled = await self._step()
                seen = looks
                next_s = time.monotonic() + STEP_EVERY_S
            except (*TROUBLE, OSError) as e:
                teller.tell(f"the voters cannot be changed now: {e}")
                settled = False
            except grpc.aio.AioRpcError as e:
                teller.tell(f"a node did not do its part in a change of voters: {e.details()}")
                settled = False

    async def _step(self) -> bool:
        """Take the next step; True when there is none to take."""
        listed = await self._seat.members.members()
        seen = await self._seat.statuses(listed.members)
        records = self.records()  # once: they may be others after the next await
        nodes = {r.etcd_peer_url: r for r in records}
        revoked = await self._revoked({*(m.name for m in listed.members if m.name), *(r.name for r in records)})
        now_s = time.monotonic()
        learners = {m.member_id for m in listed.members if m.learner}
        self._learner_since_s = {i: self._learner_since_s.get(i, now_s) for i in learners}
        seats = []
        for m in listed.members:
            status = seen[m.member_id]
            healthy = status is not None and status.healthy
            stale = m.learner and not healthy and now_s - self._learner_since_s[m.member_id] > LEARNER_STALE_S
            seats.append(voters.Seat(m.member_id, m.name, m.peer_url, m.learner, healthy, stale))
            if m.learner and not healthy and not stale and m.peer_url in nodes:
                await self._take(nodes[m.peer_url], m, listed)
        sitters = [self._sitter(r, now_s, r.name in revoked) for r in records]
        sitters += [
            voters.Sitter(m.name, m.peer_url, revoked=True)
            for m in listed.members
            if m.peer_url not in nodes and m.name in revoked
        ]
        me = self._agent.settings.name
        leader = next((s.leader_id for s in seen.values() if s is not None and s.leader_id), 0)
        step = voters.next_step(seats, sitters, wanted=self._wanted, me=me, leader_member_id=leader)
        return await self._carry_out(step, listed, nodes)

    def _sitter(self, r: NodeRecord, now_s: float, revoked: bool) -> voters.Sitter:
        shunned = self._shunned_until_s.get(r.etcd_peer_url, 0.0) > now_s
        candidate = r.candidate and not shunned
        return voters.Sitter(r.name, r.etcd_peer_url, candidate, r.leaving, revoked)

    async def _carry_out(self, step: voters.Step, listed: MemberList, nodes: dict[str, NodeRecord]) -> bool:
        match step:
            case voters.Nothing(reason, settled):
                if reason != self._said:
                    log.info("voters: %s", reason)
                    self._said = reason
                return settled
            case voters.AddLearner(node, peer_url):
                log.info("voters: %s becomes a learner", node)
                try:
                    member, after = await self._seat.members.add_learner(peer_url)
                except AlreadyExists:
                    return False
                await self._take(nodes[peer_url], member, after)
            case voters.Promote(member_id):
                await self._seat.members.promote(member_id)
                log.info("voters: %s votes now", _name(listed, member_id))
            case voters.Remove(member_id, reason):
                log.info("voters: %s is removed: %s", _name(listed, member_id), reason)
                await self._remove(member_id, listed, nodes)
        return False

    async def _take(self, node: NodeRecord, member: Member, listed: MemberList) -> None:
        # Its member has no name before its first start, and must find itself in the list that it is started with.
        names = {m.peer_url: m.name for m in listed.members if m.name} | {member.peer_url: node.name}
        cluster = initial_cluster((names[m.peer_url], m.peer_url) for m in listed.members if m.peer_url in names)
        request = pb.TakeSeatRequest(member_id=member.member_id, initial_cluster=cluster, cluster_id=listed.cluster_id)
        async with self._dialer.channel(node.address, node_name(node.name)) as channel:
            await PeerStub(channel).TakeSeat(request, timeout=SEAT_CALL_S)

    async def _remove(self, member_id: int, listed: MemberList, nodes: dict[str, NodeRecord]) -> None:
        url = next(m.peer_url for m in listed.members if m.member_id == member_id)
        if next(m.learner for m in listed.members if m.member_id == member_id):
            self._shunned_until_s[url] = time.monotonic() + LEARNER_STALE_S
        await self._seat.members.remove(member_id)
        if member_id == self._seat.member_id:
            await self._seat.give_up(member_id)
        elif url in nodes:
            node = nodes[url]
            async with self._dialer.channel(node.address, node_name(node.name)) as channel:
                await PeerStub(channel).GiveUpSeat(pb.GiveUpSeatRequest(member_id=member_id), timeout=SEAT_CALL_S)


def _name(listed: MemberList, member_id: int) -> str:
    return next((m.name or m.peer_url for m in listed.members if m.member_id == member_id), str(member_id))
