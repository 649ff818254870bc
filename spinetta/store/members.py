"""What etcd says of itself, and changes of its membership."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from spinetta.errors import AlreadyExists, SpinettaError, StoreUnavailable
from spinetta.store import wire
from spinetta.store.connection import (
    CONNECT_S,
    REQUIRE_LEADER,
    Connection,
    Connections,
    normal_endpoints,
)
from spinetta.store.failures import Refused, refusal
from spinetta.store.tls import TlsSource

# What etcd says when it will say otherwise soon: too many changes at once, or members not all connected for 5 s.
TRY_LATER = (
    "etcdserver: unhealthy cluster",
    "etcdserver: too many learner members in cluster",
    "etcdserver: can only promote a learner member which is in sync with leader",
    "etcdserver: re-configuration failed due to not enough started members",
)


@dataclass(frozen=True, slots=True)
class Member:
    """One member. `name` and `client_urls` are empty until it has started for the first time."""

    member_id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool

    @property
    def peer_url(self) -> str:
        """The first peer URL; our members have one."""
        return self.peer_urls[0] if self.peer_urls else ""

    @property
    def client_url(self) -> str:
        """The first client URL; empty until it has started."""
        return self.client_urls[0] if self.client_urls else ""


@dataclass(frozen=True, slots=True)
class MemberList:
    """All members. `cluster_id` as etcd prints it, hexadecimal."""

    cluster_id: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """How one member is.

    Attributes:
        leader_id: member id of etcd's leader; 0: it knows of none.
        db_bytes, db_in_use_bytes: the database's file, and what of it is not free.
        errors: what it complains of itself, alarms included.
        serves: it has answered a read as well, which takes it and a majority; True where that was not asked.
        applied: how far it has come in the log of all changes.
        revision: of the store, as it has it.
    """

    cluster_id: str
    member_id: int
    leader_id: int
    version: str
    db_bytes: int
    db_in_use_bytes: int
    learner: bool
    errors: tuple[str, ...]
    applied: int = 0
    revision: int = 0
    serves: bool = True

    @property
    def healthy(self) -> bool:
        """It takes part: it knows a leader, and answers more than what it has in memory."""
        return self.leader_id != 0 and self.serves


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm: ``NOSPACE`` or ``CORRUPT``, or a number that we do not know. We read them and never raise them."""

    member_id: int
    name: str


class Members:
    """The membership of the etcd behind a store: ``Members(store.connections)``.

    Each call raises `StoreUnavailable` for *try later*: nobody answers, or etcd finds the time wrong (a change is
    going on, the learner is not in sync, not all members have been connected for 5 s). A change that may have been made
    raises `OutcomeUnknown`: read `members` back.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def members(self, *, timeout_s: float = 5.0) -> MemberList:
        """All members, as of now: not what one that lags behind remembers."""
        connection = await self._connections.pick(timeout_s)
        try:
            # 3.4 answers MemberList from the member's own state; a linearizable read first makes it catch up.
            probe = wire.range_request(wire.ALL_KEYS, b"", keys_only=True)
            with connection.use() as stubs:
                await stubs.kv.Range(probe, timeout=timeout_s, metadata=REQUIRE_LEADER)
                response = await stubs.cluster.MemberList(
                    wire.member_list(), timeout=timeout_s, metadata=REQUIRE_LEADER
                )
        except grpc.aio.AioRpcError as error:
            connection.hold()
            raise StoreUnavailable(f"{connection.endpoint}: {error.details()}") from error
        return MemberList(hex_id(response.header.cluster_id), _members(response.members))

    async def add_learner(self, peer_url: str, *, timeout_s: float = 10.0) -> tuple[Member, MemberList]:
        """Add a member without a vote; it, and all members there are now.

        Raises also:
            AlreadyExists: a member has this peer URL.
        """
        try:
            response = await self._change(_member_add, wire.member_add(peer_url), timeout_s)
        except Refused as error:
            if "Peer URLs already exists" in error.text:
                raise AlreadyExists(f"etcd has a member at {peer_url} already") from error
            raise _later(error) from error
        found = MemberList(hex_id(response.header.cluster_id), _members(response.members))
        return _members([response.member])[0], found

    async def promote(self, member_id: int, *, timeout_s: float = 10.0) -> None:
        """Give a learner its vote. No error when it has it already."""
        try:
            await self._change(_member_promote, wire.member_promote(member_id), timeout_s)
        except Refused as error:
            if error.text != "etcdserver: can only promote a learner member":
                raise _later(error) from error

    async def remove(self, member_id: int, *, timeout_s: float = 10.0) -> None:
        """Remove a member; it stops by itself. No error when there is none of this id."""
        try:
            await self._change(_member_remove, wire.member_remove(member_id), timeout_s)
        except Refused as error:
            if error.text != "etcdserver: member not found":
                raise _later(error) from error

    async def alarms(self, *, timeout_s: float = 5.0) -> tuple[Alarm, ...]:
        """Alarms raised by any member."""
        try:
            response = await self._connections.call(_alarm, wire.alarm_list(), timeout_s=timeout_s, write=False)
        except Refused as error:
            raise refusal(error) from error
        return tuple(
            Alarm(each.memberID, wire.ALARM_NAMES.get(each.alarm, f"alarm {each.alarm}")) for each in response.alarms
        )

    async def _change(self, method: Callable[[wire.Stubs], Any], request: wire.Message, timeout_s: float) -> Any:
        return await self._connections.call(method, request, timeout_s=timeout_s, write=True)


async def status(
    endpoint: str, tls: TlsSource | None = None, *, timeout_s: float = 2.0, with_read: bool = False
) -> MemberStatus:
    """How the member at one endpoint is; learners answer too. `tls` as for `EtcdStore`.

    `with_read`: ask a voter for a read as well: one whose disk is stuck still tells its status. Twice the time at most.

    Raises:
        StoreUnavailable: it does not answer.
        UserError: not an endpoint.
    """
    connection = Connection(normal_endpoints([endpoint], secured=tls is not None)[0], tls)
    try:
        if not await connection.ready(min(timeout_s, CONNECT_S)):
            raise StoreUnavailable(f"{endpoint}: {connection.trouble}")
        with connection.use() as stubs:
            response = await stubs.maintenance.Status(wire.status(), timeout=timeout_s)
            found = member_status(response)
            if with_read and found.leader_id and not found.learner:
                found = replace(found, serves=await _reads(stubs, timeout_s))
    except grpc.aio.AioRpcError as error:
        raise StoreUnavailable(f"{endpoint}: {error.details()}") from error
    finally:
        await connection.close()
    return found


async def _reads(stubs: wire.Stubs, timeout_s: float) -> bool:
    """Whether it answers a linearizable read of nothing, for which its own log of changes must go forward."""
    request = wire.range_request(wire.ALL_KEYS, b"", keys_only=True)
    try:
        await stubs.kv.Range(request, timeout=timeout_s, metadata=REQUIRE_LEADER)
    except grpc.aio.AioRpcError:
        return False
    return True


def member_status(response: Any) -> MemberStatus:
    """What a member answered to `wire.status()`."""
    return MemberStatus(
        cluster_id=hex_id(response.header.cluster_id),
        member_id=response.header.member_id,
        leader_id=response.leader,
        version=response.version,
        db_bytes=response.dbSize,
        db_in_use_bytes=response.dbSizeInUse,
        learner=response.isLearner,
        errors=tuple(response.errors),
        applied=response.raftAppliedIndex,
        revision=response.header.revision,
    )


async def statuses(
    members: Iterable[Member], tls: TlsSource | None = None, *, timeout_s: float = 2.0
) -> dict[int, MemberStatus | None]:
    """How each member is, a read included, by its id; None for those that do not answer. `tls` as for `EtcdStore`.

    All are asked at once, over new connections: an old one to a frozen member looks well for a while.
    """

    async def one(member: Member) -> MemberStatus | None:
        if not member.client_url:
            return None
        try:
            return await status(member.client_url, tls, timeout_s=timeout_s, with_read=True)
        except StoreUnavailable:
            return None

    wanted = tuple(members)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(one(member)) for member in wanted]
    return {member.member_id: task.result() for member, task in zip(wanted, asked, strict=True)}


def hex_id(number: int) -> str:
    """A cluster or member id as etcd prints it."""
    return f"{number:x}"


def _later(error: Refused) -> SpinettaError:
    return StoreUnavailable(f"try later: {error.text}") if error.text in TRY_LATER else refusal(error)


def _members(found: Iterable[Any]) -> tuple[Member, ...]:
    return tuple(
        Member(each.ID, each.name, tuple(each.peerURLs), tuple(each.clientURLs), each.isLearner) for each in found
    )


def _member_add(stubs: wire.Stubs) -> Any:
    return stubs.cluster.MemberAdd


def _member_promote(stubs: wire.Stubs) -> Any:
    return stubs.cluster.MemberPromote


def _member_remove(stubs: wire.Stubs) -> Any:
    return stubs.cluster.MemberRemove


def _alarm(stubs: wire.Stubs) -> Any:
    return stubs.maintenance.Alarm
