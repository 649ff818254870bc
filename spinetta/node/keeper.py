"""The leader's care for the number of voters: one step at a time, each decided anew from what is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import grpc

from spinetta import voters
from spinetta.agent import Agent
from spinetta.errors import AlreadyExists
from spinetta.model import NodeRecord
from spinetta.node.seats import OwnSeat
from spinetta.node.trouble import TROUBLE, Teller
from spinetta.store.members import Member, MemberList, MemberStatus
from spinetta.store.process import initial_cluster
from spinetta.trust.dial import Dialer, node_name, stands
from spinetta.v1 import api_pb2 as pb
from spinetta.v1.api_pb2_grpc import PeerStub

log = logging.getLogger("spinetta.node")

LOOK_EVERY_S = 0.5  # whether anything asks for a step: a glance at what is in memory
STEP_EVERY_S = 15.0  # at rest: members may change by other hands
WAIT_EVERY_S = 3.0  # while a voter is away: each look asks all members
LOOK_GAP_S = 60.0  # a leader that did not look for so long has seen nothing of what it did not look at
TAKE_CALL_S = 75.0  # a node starts its member and waits until it is ready
GIVE_UP_CALL_S = 15.0  # it stops its member and puts it away; it finds out by itself, too
REACH_S = 5.0
LEARNER_STALE_S = 90.0  # a learner that has not come up by then is rolled back
TRIES_MAX = 3  # then its node is no candidate for a while, and nobody waits for it
REST_S, REFUSED_S = 30.0, 1800.0  # after a failure, and after the last of them


@dataclass(slots=True)
class _Failures:
    """Of a node, at taking a seat or keeping it."""

    count: int = 0
    until_s: float = 0.0  # it is left alone


class SeatKeeper:
    """Adds, promotes, removes and replaces voters while this node is the leader.

    Args:
        wanted: number of voters.
        replace_after_s: a voter that has been away for so long loses its seat to a spare node; 0: never.
        revoked: which of these nodes are not trusted any more.
        holds_office: asks the store whether this node is the leader still.
    """

    def __init__(
        self,
        agent: Agent,
        seat: OwnSeat,
        wanted: int,
        dialer: Dialer,
        revoked: Callable[[Iterable[str]], Awaitable[frozenset[str]]],
        *,
        replace_after_s: float,
        holds_office: Callable[[], Awaitable[bool]],
    ) -> None:
        self._agent = agent
        self._dialer = dialer
        self._revoked = revoked
        self._holds_office = holds_office
        self._seat = seat
        self._wanted = wanted
        self._absences = voters.Absences(replace_after_s, LOOK_GAP_S)
        self._learner_since_s: dict[int, float] = {}
        self._failures: dict[str, _Failures] = {}  # by peer URL
        self._said = ""

    def records(self) -> tuple[NodeRecord, ...]:
        """All live nodes, this one included."""
        return (self._agent.session.record, *self._agent.peers)

    async def run(self) -> None:
        """Look and step until cancelled."""
        seen: object = None
        next_s, teller = 0.0, Teller(log)
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._agent.leading or not self._seat.member_id:
                seen = None
                self._absences.forget()
                continue
            looks = (
                tuple((r.name, r.leaving, r.candidate, r.etcd_peer_url) for r in self.records()),
                self._agent.leadership.vouched_dead,
            )
            if looks == seen and time.monotonic() < next_s:
                continue
            seen, wait_s = looks, WAIT_EVERY_S
            try:
                wait_s = await self._step()
            except (*TROUBLE, OSError) as e:
                teller.tell(f"the voters cannot be changed now: {e}")
                wait_s = LOOK_EVERY_S
            except grpc.aio.AioRpcError as e:
                teller.tell(f"a node did not do its part in a change of voters: {e.details()}")
                wait_s = LOOK_EVERY_S
            next_s = time.monotonic() + wait_s

    async def _step(self) -> float:
        """Take the next step; how long to wait before the one after it."""
        listed = await self._seat.members.members()
        seen = await self._seat.statuses(listed.members)
        records = self.records()  # once: they may be others after the next await
        nodes = {r.etcd_peer_url: r for r in records}
        revoked = await self._revoked({*(m.name for m in listed.members if m.name), *(r.name for r in records)})
        now_s = time.monotonic()
        seats = self._seats(listed, seen, nodes, now_s)
        for m, seat in zip(listed.members, seats, strict=True):
            if seat.learner and not seat.healthy and not seat.stale and m.peer_url in nodes:
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
        if isinstance(step, voters.Nothing):
            self._say(step.reason)
            if step.settled:
                return STEP_EVERY_S
            return LOOK_EVERY_S if any(s.learner for s in seats) else WAIT_EVERY_S
        if not await self._holds_office():  # this daemon may have slept between the look and now
            return LOOK_EVERY_S
        await self._carry_out(step, listed, nodes)
        return LOOK_EVERY_S

    def _seats(
        self,
        listed: MemberList,
        seen: Mapping[int, MemberStatus | None],
        nodes: Mapping[str, NodeRecord],
        now_s: float,
    ) -> list[voters.Seat]:
        well = {i for i, status in seen.items() if status is not None and status.healthy}
        voting = [m for m in listed.members if not m.learner]
        self._absences.look(now_s, {m.member_id for m in voting if m.member_id not in well or m.peer_url not in nodes})
        learners = {m.member_id for m in listed.members if m.learner}
        self._learner_since_s = {i: self._learner_since_s.get(i, now_s) for i in learners}
        vouched = self._agent.leadership.vouched_dead
        seats = []
        for m in listed.members:
            healthy = m.member_id in well
            stale = m.learner and not healthy and now_s - self._learner_since_s[m.member_id] > LEARNER_STALE_S
            dead = m.name in vouched and m.peer_url not in nodes and not healthy
            gone = not m.learner and (dead or self._absences.gone(m.member_id))
            seats.append(voters.Seat(m.member_id, m.name, m.peer_url, m.learner, healthy, stale, gone))
        return seats

    def _sitter(self, r: NodeRecord, now_s: float, revoked: bool) -> voters.Sitter:
        failures = self._failures.get(r.etcd_peer_url, _Failures())
        waits = failures.until_s > now_s
        candidate = r.candidate and not (waits and failures.count >= TRIES_MAX)
        return voters.Sitter(r.name, r.etcd_peer_url, candidate, r.leaving, revoked, waits, r.etcd_member_id)

    def _failed(self, peer_url: str, *, for_good: bool = False) -> None:
        """A node has not done as a voter: it is left alone, and in the end others are not made to wait for it."""
        now_s = time.monotonic()
        here = {r.etcd_peer_url for r in self.records()}
        self._failures = {u: f for u, f in self._failures.items() if u in here or f.until_s > now_s}
        failures = self._failures.setdefault(peer_url, _Failures())
        if failures.count >= TRIES_MAX:  # that was long ago
            failures.count = 0
        failures.count = TRIES_MAX if for_good else failures.count + 1
        failures.until_s = now_s + (REST_S if failures.count < TRIES_MAX else REFUSED_S)

    def _say(self, text: str) -> None:
        """What is being done or waited for, once: etcd may refuse it for a while."""
        if text != self._said:
            log.info("voters: %s", text)
            self._said = text

    async def _carry_out(self, step: voters.Step, listed: MemberList, nodes: dict[str, NodeRecord]) -> None:
        match step:
            case voters.AddLearner(node, peer_url):
                self._say(f"{node} is to become a learner")
                try:
                    member, after = await self._seat.members.add_learner(peer_url)
                except AlreadyExists:
                    return
                log.info("voters: %s becomes a learner", node)
                await self._take(nodes[peer_url], member, after)
            case voters.Promote(member_id):
                name = _name(listed, member_id)
                self._say(f"learner {name} is to get its vote")
                await self._seat.members.promote(member_id)
                self._failures.pop(_url(listed, member_id), None)
                log.info("voters: %s votes now", name)
            case voters.Remove(member_id, reason, successor):
                name = _name(listed, member_id)
                self._say(f"{name} is to be removed: {reason}" + (f"; {successor} takes its seat" if successor else ""))
                if successor and not await self._answers(successor, nodes):
                    return
                await self._remove(member_id, listed, nodes)
                log.info("voters: %s is removed: %s", name, reason)

    async def _answers(self, name: str, nodes: Mapping[str, NodeRecord]) -> bool:
        """Whether the node that is to have a seat is there: between the two steps there is a voter less."""
        node = next((r for r in nodes.values() if r.name == name), None)
        if node is None:  # another node says that it has the same address: which of them would be added?
            log.warning("voters: %s takes no seat, as another node has its peer URL", name)
            return False
        async with self._dialer.channel(node.address, node_name(node.name)) as channel:
            try:
                async with asyncio.timeout(REACH_S):
                    reached = await stands(channel)
            except TimeoutError:
                reached = False
        if not reached:
            log.info("voters: %s cannot be reached and takes no seat now", name)
            self._failed(node.etcd_peer_url)
        return reached

    async def _take(self, node: NodeRecord, member: Member, listed: MemberList) -> None:
        # Its member has no name before its first start, and must find itself in the list that it is started with.
        names = {m.peer_url: m.name for m in listed.members if m.name} | {member.peer_url: node.name}
        cluster = initial_cluster((names[m.peer_url], m.peer_url) for m in listed.members if m.peer_url in names)
        request = pb.TakeSeatRequest(member_id=member.member_id, initial_cluster=cluster, cluster_id=listed.cluster_id)
        async with self._dialer.channel(node.address, node_name(node.name)) as channel:
            await PeerStub(channel).TakeSeat(request, timeout=TAKE_CALL_S)

    async def _remove(self, member_id: int, listed: MemberList, nodes: dict[str, NodeRecord]) -> None:
        member = next(m for m in listed.members if m.member_id == member_id)
        url = member.peer_url
        if member.learner:
            self._failed(url)
        gone = self._absences.gone(member_id)
        await self._seat.members.remove(member_id)
        if gone and url in nodes and nodes[url].etcd_member_id == member_id:
            # Something is wrong with its etcd, so it is not the next one to be tried. It finds out by itself that it
            # has no seat any more: the next voter is not made to wait for that.
            self._failed(url, for_good=True)
        if member_id == self._seat.member_id:
            await self._seat.give_up(member_id)
        elif url in nodes and not gone:
            node = nodes[url]
            async with self._dialer.channel(node.address, node_name(node.name)) as channel:
                await PeerStub(channel).GiveUpSeat(pb.GiveUpSeatRequest(member_id=member_id), timeout=GIVE_UP_CALL_S)


def _name(listed: MemberList, member_id: int) -> str:
    return next((m.name or m.peer_url for m in listed.members if m.member_id == member_id), str(member_id))


def _url(listed: MemberList, member_id: int) -> str:
    return next((m.peer_url for m in listed.members if m.member_id == member_id), "")
