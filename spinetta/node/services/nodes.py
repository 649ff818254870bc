"""Nodes and the cluster: who is there, how they are, and leaving them in peace."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from uuid import uuid4

from spinetta import codec, keys, messages, names, txn, validate
from spinetta.errors import Denied, NotFound, OutcomeUnknown, StoreUnavailable, UserError
from spinetta.model import Incarnation, IncarnationId, Life, Membership, NodeId, Revision
from spinetta.node.health import StoreHealth
from spinetta.node.hub import closing
from spinetta.node.port import NodePort
from spinetta.node.services import limits
from spinetta.node.services.desk import Asked
from spinetta.node.services.forwarding import is_for, passed_on
from spinetta.node.services.peers import FORWARDED, Peers
from spinetta.node.trouble import TROUBLE
from spinetta.store.protocol import KeyValue
from spinetta.trust.backoff import Backoff
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import api_pb2_grpc as rpc
from spinetta.v1 import record_pb2 as pb

HEALTH_AGE_S = 5.0  # of what a list of nodes tells of etcd
AWAY = frozenset({"lost", "condemned", "dead", "unreadable"})  # statuses of nodes that nothing can be given to
LEAVE_TIMEOUT_MAX_S = validate.WALLTIME_MAX_S  # to wait for running tasks: as long as one may run


class Beats:
    """How long ago each node's heartbeat was seen to change. They carry no time, and clocks differ anyway."""

    def __init__(self, port: NodePort, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._clock = clock
        self._seen: dict[NodeId, tuple[Revision, float | None]] = {}

    async def run(self) -> None:
        """Look now and then, so that the first question gets a useful answer. Runs until it is cancelled."""
        while True:
            with contextlib.suppress(*TROUBLE):  # an age that grows meanwhile is the truth
                await self.look()
            await asyncio.sleep(limits.BEAT_POLL_S)

    async def look(self) -> None:
        """Read all heartbeats."""
        page = await self._port.store.list(keys.BEAT, keys_only=True)
        first = not self._seen
        seen: dict[NodeId, tuple[Revision, float | None]] = {}
        for entry in page.entries:
            name = keys.parse_node(entry.key)
            before = self._seen.get(name)
            if before is not None and before[0] == entry.modified:
                seen[name] = before
            else:  # when we look for the first time it may be of any age
                seen[name] = (entry.modified, None if first else self._clock())
        self._seen = seen

    def age_ms(self, name: NodeId) -> int:
        """Milliseconds since the change was seen; -1 when none has been."""
        at = self._seen.get(name, (0, None))[1]
        return -1 if at is None else int((self._clock() - at) * 1000)


class Nodes:
    """Answers about nodes, and passes on what is meant for another one."""

    def __init__(self, port: NodePort, peers: Peers, beats: Beats, health: StoreHealth | None = None) -> None:
        self._port = port
        self._health = health
        self._peers = peers
        self._beats = beats

    async def list_nodes(self) -> api.ListNodesResponse:
        """All nodes: those alive, those whose earlier life has not been closed yet, and lost ones that have a seat."""
        store = self._port.store
        alive = {keys.parse_node(e.key): e for e in (await store.list(keys.NODE)).entries}
        lives = {keys.parse_node(e.key): e for e in (await store.list(keys.INCARNATION)).entries}
        office = (await store.read([keys.OFFICE])).entries[keys.OFFICE]
        leader = codec.readable(codec.decode_office, office.value) if office is not None else None
        await self._beats.look()
        notices: list[str] = []
        try:
            membership = await self._port.membership()
        except StoreUnavailable as e:
            membership = Membership("", 0, ())
            notices.append(f"etcd's members are not known: {e}")
        views = [
            self._view(name, alive.get(name), lives.get(name), membership, leader=leader)
            for name in sorted(alive.keys() | lives.keys() | {NodeId(m.name) for m in membership.members if m.name})
        ]
        if leader is None:
            notices.append("no node holds the office of the leader at the moment")
        if self._health is not None:  # it tells of alarms in more words
            membership = replace(membership, alarms=())
            notices += self._health.notices(await self._health.look(max_age_s=HEALTH_AGE_S))
        notices += _notices(views, membership)
        notices += seat_notices(views, membership)
        return api.ListNodesResponse(nodes=views, notices=notices)

    def _view(
        self,
        name: NodeId,
        record: KeyValue | None,
        life: KeyValue | None,
        membership: Membership,
        *,
        leader: NodeId | None,
    ) -> api.NodeView:
        said = codec.readable(codec.decode_node, record.value) if record is not None else None
        node = messages.node_to_pb(said) if said is not None else pb.Node(name=name)
        incarnation = codec.readable(codec.decode_incarnation, life.value) if life is not None else None
        if incarnation is not None:
            node.incarnation = incarnation.id
        if incarnation is not None and incarnation.state is not Life.OPEN:
            status = incarnation.state.name.lower()
        elif (record is not None and said is None) or (life is not None and incarnation is None):
            status = "unreadable"
        elif record is None:
            status = "lost"
        else:
            status = "leaving" if node.leaving else "draining" if node.draining else "unfit" if node.unfit else "ready"
        member = next((m for m in membership.members if _is_member(node, m.member_id, m.name)), None)
        return api.NodeView(
            node=node,
            voter=member is not None and not member.learner,
            leader=name == leader,
            etcd_leader=member is not None and member.member_id == membership.leader_member_id,
            status=status,
            beat_age_ms=self._beats.age_ms(name),
        )

    async def drain(self, request: api.DrainRequest, asked: Asked) -> None:
        """Stop a node taking tasks, and give back what was asked for.

        Raises:
            UserError: `force` without `release`; or it drains, but cannot write that down.
        """
        if request.force and not request.release:
            raise UserError("force is for tasks that are given back", field="force", hint="with release only")
        name = request.node
        if is_for(self._port.name, name, asked):
            await self._port.set_draining(True, release=request.release, force=request.force)
            return
        stub = await self._other(name)
        with passed_on(name):
            await stub.Drain(request, timeout=limits.FORWARD_TIMEOUT_S, metadata=(FORWARDED,))

    async def undrain(self, name: str, asked: Asked) -> None:
        """Let a node take tasks again."""
        if is_for(self._port.name, name, asked):
            await self._port.set_draining(False)
            return
        stub = await self._other(name)
        with passed_on(name):
            request = api.UndrainRequest(node=name)
            await stub.Undrain(request, timeout=limits.FORWARD_TIMEOUT_S, metadata=(FORWARDED,))

    async def leave(self, request: api.LeaveRequest, asked: Asked) -> AsyncIterator[api.LeaveProgress]:
        """Make a node leave; ends with `done`."""
        if not 0 <= request.timeout_s <= LEAVE_TIMEOUT_MAX_S:
            raise UserError(
                f"{request.timeout_s:g} s is out of range", field="timeout_s", hint=f"0 to {LEAVE_TIMEOUT_MAX_S:g} s"
            )
        if is_for(self._port.name, request.node, asked):
            timeout_s = request.timeout_s if request.HasField("timeout_s") else None
            async with closing(self._port.leave(timeout_s)) as steps:
                async for step in steps:
                    yield api.LeaveProgress(step=step.step, running=step.running, done=step.done)
            return
        call = (await self._other(request.node)).Leave(request, metadata=(FORWARDED,))
        try:
            with passed_on(request.node):
                async for progress in call:
                    yield progress
        finally:
            call.cancel()

    async def confirm_dead(self, name: str, asked: Asked) -> api.ConfirmDeadResponse:
        """Write an administrator's word that nothing of a lost node's life runs any more."""
        names.check_node_name(name, "node")
        unknown: OutcomeUnknown | None = None
        wait = Backoff(2 * limits.TRY_WAIT_S, limits.TRY_WAIT_MAX_S)
        for n in range(limits.TRIES_MAX):
            if n:
                await wait.pause()
            try:
                done = await self._vouch(NodeId(name), asked)
            except OutcomeUnknown as e:
                unknown = e
                continue
            except (StoreUnavailable, Denied) as e:
                raise unknown or e from e
            if done is not None:
                return api.ConfirmDeadResponse(
                    incarnation=done.incarnation, running=done.running, was_dead=done.was_dead and unknown is None
                )
            await asked.again()
        raise unknown or StoreUnavailable(f"the record of node {name} changed {limits.TRIES_MAX} times meanwhile")

    async def _vouch(self, node: NodeId, asked: Asked) -> api.ConfirmDeadResponse | None:
        """One try; None when what was read has changed before it was written."""
        store = self._port.store
        found = (await store.read([keys.node(node), keys.incarnation(node)])).entries
        record, entry = found[keys.node(node)], found[keys.incarnation(node)]
        if record is None and entry is None and await self._has_seat(node):
            # Its life has been closed already, but its voter's seat waits. The leader closes this one at once.
            life, seen = Incarnation(IncarnationId(str(uuid4())), Life.CONDEMNED, "", 0.0, 0.0), Revision(0)
        else:
            life, seen = self._lost(node, record, entry)
        held = len((await store.list(keys.running_on(node), keys_only=True)).entries)
        if not life.vouched:
            dead = codec.encode_incarnation(replace(life, state=Life.DEAD, vouched=True))
            result = await store.commit(txn.confirm_dead(node, seen, dead, asked.caller.guards))
            if not isinstance(result, txn.Committed):
                return None
            asked.revision = result.revision
        return api.ConfirmDeadResponse(incarnation=life.id, running=held, was_dead=life.state is Life.DEAD)

    async def _has_seat(self, node: NodeId) -> bool:
        return any(m.name == node for m in (await self._port.membership()).members)

    @staticmethod
    def _lost(node: NodeId, record: KeyValue | None, life: KeyValue | None) -> tuple[Incarnation, Revision]:
        if record is not None:
            raise UserError(
                f"node {node} is alive: it has renewed its lease",
                field="node",
                reason="node-alive",
                hint="if it was stopped just now, wait until `spinetta node list` shows it as lost; "
                "to be rid of one that lives: spinetta node leave, or spinetta node revoke",
            )
        if life is None:
            raise NotFound(f"no node {node} is lost", field="node", hint="see `spinetta node list`")
        read = codec.readable(codec.decode_incarnation, life.value)
        if read is None:
            raise UserError(
                f"the record of node {node}'s life cannot be read",
                field="node",
                reason="corrupt",
                hint=f"its tasks are put back anyway; see: spinetta etcdctl get {keys.incarnation(node)}",
            )
        return read, life.modified

    async def describe(self) -> api.DescribeClusterResponse:
        """What a joining node needs to know, and how the voters are; also while they have no majority."""
        if self._health is not None:
            return await self._described(self._health)
        membership = await self._port.membership()
        generation = (await self._port.store.read([keys.GENERATION])).entries[keys.GENERATION]
        return api.DescribeClusterResponse(
            cluster_id=membership.cluster_id,
            voters=[
                api.Voter(
                    name=m.name,
                    member_id=m.member_id,
                    client_url=m.client_url,
                    peer_url=m.peer_url,
                    learner=m.learner,
                )
                for m in membership.members
            ],
            node=self._port.name,
            wall_ms=self._port.wall_ms(),
            version=self._port.version,
            generation=codec.decode_generation(generation.value) if generation is not None else "",
        )

    async def _described(self, health: StoreHealth) -> api.DescribeClusterResponse:
        view = await health.look()
        members = {m.member_id: m for m in health.members}
        front = max((m.applied for m in view.members), default=0)
        answer = api.DescribeClusterResponse(
            cluster_id=health.cluster_id,
            node=self._port.name,
            wall_ms=self._port.wall_ms(),
            version=self._port.version,
            has_majority=view.has_majority,
            quota_bytes=health.quota_bytes,
            notices=health.notices(view),
        )
        for m in view.members:
            known = members.get(m.member_id)
            answer.voters.add(
                name=m.name,
                member_id=m.member_id,
                client_url=known.client_url if known is not None else "",
                peer_url=known.peer_url if known is not None else "",
                learner=not m.voter,
                answers=m.answers,
                healthy=m.healthy,
                leader=m.healthy and m.leader_id == m.member_id,
                version=m.version,
                db_bytes=m.db_bytes,
                db_in_use_bytes=m.in_use_bytes,
                behind=front - m.applied if m.answers else 0,
                alarms=[name for member, name in view.alarms or () if member == m.member_id],
            )
        if view.has_majority:
            with contextlib.suppress(StoreUnavailable):  # lost since then
                found = (await self._port.store.read([keys.GENERATION])).entries[keys.GENERATION]
                answer.generation = codec.decode_generation(found.value) if found is not None else ""
        return answer

    async def _other(self, name: str) -> rpc.SpinettaAsyncStub:
        names.check_node_name(name, "node")
        try:
            record = await self._peers.record(NodeId(name))
        except UserError:  # not known, or not alive
            lost = next((m for m in (await self._port.membership()).members if m.name == name), None)
            if lost is None:
                raise
            raise UserError(
                f"node {name} is lost, but its voter's seat is kept for it",
                field="node",
                reason="node-unreachable",
                hint=f"start it again; or, if it will not come back: spinetta node confirm-dead {name}",
            ) from None
        return await self._peers.stub(record)


def seat_notices(views: list[api.NodeView], membership: Membership) -> list[str]:
    """What becomes of the seats of voters that are away, or whose etcd is not well."""
    here = {v.node.name: v.node for v in views if v.status not in AWAY}
    taken = {m.peer_url for m in membership.members}
    spares = [n for n in here.values() if n.candidate and not n.leaving and n.etcd_peer_url not in taken]
    notices = []
    for m in membership.members:
        if m.learner or (m.healthy and m.name in here):
            continue
        what = "is away" if m.name not in here else "has an etcd that does not answer, or makes no progress"
        then = (
            "another node takes its seat if that lasts (setting voter_replace_after)"
            if spares
            else "no other node could take its seat: let one more join"
        )
        notices.append(f"voter {m.name or m.peer_url} {what}; {then}")
    return notices


def _is_member(node: pb.Node, member_id: int, name: str) -> bool:
    return node.etcd_member_id == member_id if node.etcd_member_id else node.name == name


def _notices(views: list[api.NodeView], membership: Membership) -> list[str]:
    """What an administrator should know: alarms, and how many more voters may be lost."""
    notices = [v.node.brake for v in views if v.leader and v.node.brake]
    notices += [f"node {v.node.name} takes no tasks: {v.node.unfit}" for v in views if v.node.unfit]
    notices += [f"etcd alarm: {alarm}" for alarm in membership.alarms]
    voters = [m for m in membership.members if not m.learner]
    if not voters:
        return notices
    here = sum(1 for v in views if v.voter and v.status in ("ready", "draining", "leaving", "unfit"))
    margin = here - (len(voters) // 2 + 1)
    if len(voters) == 1:
        notices.append("there is one voter only: if it is lost, so is the cluster's record")
    elif margin < 0:
        notices.append(f"only {here} of {len(voters)} voters are alive: fewer than a majority")
    elif margin == 0:
        notices.append(f"{here} of {len(voters)} voters are alive: if one more is lost, the cluster stands still")
    return notices
