"""Looking at etcd's members, also while they have no leader, and the work that `upkeep` names, done to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import grpc

from spinetta.errors import StoreUnavailable
from spinetta.store import wire
from spinetta.store.connection import CONNECT_S, Connection, Connections, normal_endpoints
from spinetta.store.failures import GONE, cancelled_ourselves
from spinetta.store.members import Member, MemberStatus, member_status
from spinetta.store.tls import TlsSource
from spinetta.upkeep import EtcdView, MemberView

ASK_S = 1.5  # a member answers this from memory; longer means frozen, blocked or cut off
_ALARM = re.compile(r"memberID:(\d+) alarm:(\w+)")


async def own_status(connections: Connections, *, timeout_s: float = ASK_S) -> MemberStatus:
    """How the nearest member is, over the connection that is there anyway; also one that has no leader.

    Raises:
        StoreUnavailable: it does not answer.
    """
    connection = await connections.pick(timeout_s)
    with _failures(connection.endpoint), connection.use() as stubs:
        return member_status(await stubs.maintenance.Status(wire.status(), timeout=timeout_s))


async def look(
    endpoints: Sequence[str], known: Iterable[Member] = (), tls: TlsSource | None = None, *, timeout_s: float = ASK_S
) -> tuple[EtcdView, tuple[Member, ...]]:
    """All members as they are now, and their list for the next time; takes twice `timeout_s` at most.

    Needs no majority: each member is asked on its own, and the list is that of the one which has come furthest.

    Args:
        endpoints: of the members that this node talks to, ``HOST:PORT``.
        known: the members of the last time, for when nobody answers now.
        tls: as for `EtcdStore`.
    """
    asked = normal_endpoints(endpoints, secured=tls is not None)
    async with asyncio.TaskGroup() as group:
        tasks = {e: group.create_task(_ask(e, tls, timeout_s, with_list=True)) for e in asked}
    found = {e: task.result() for e, task in tasks.items()}
    lists = [answer for answer in found.values() if answer is not None and answer[1]]
    members = max(lists, key=lambda each: each[0].applied)[1] if lists else tuple(known)
    statuses = {answer[0].member_id: answer[0] for answer in found.values() if answer is not None}
    others = {m.member_id: m.client_url for m in members if m.client_url and m.member_id not in statuses}
    async with asyncio.TaskGroup() as group:
        more = {
            i: group.create_task(_ask(e, tls, timeout_s, with_list=False))
            for i, url in others.items()
            if (e := normal_endpoints([url], secured=tls is not None)[0]) not in found
        }
    statuses |= {i: answer[0] for i, task in more.items() if (answer := task.result()) is not None}
    return view_of(members, statuses), members


def view_of(members: Iterable[Member], statuses: dict[int, MemberStatus]) -> EtcdView:
    """What the members say, as `upkeep` understands it."""
    alarms = {
        (int(member), name)
        for status in statuses.values()
        for text in status.errors
        for member, name in _ALARM.findall(text)
    }
    views = []
    for m in sorted(members, key=lambda m: (m.name, m.member_id)):
        s = statuses.get(m.member_id)
        if s is None:
            views.append(MemberView(m.member_id, m.name, not m.learner, answers=False))
        else:
            views.append(
                MemberView(
                    m.member_id,
                    m.name,
                    not m.learner,
                    leader_id=s.leader_id,
                    version=s.version,
                    db_bytes=s.db_bytes,
                    in_use_bytes=s.db_in_use_bytes,
                    applied=s.applied,
                )
            )
    revision = max((s.revision for s in statuses.values()), default=0)
    return EtcdView(tuple(views), tuple(sorted(alarms)) if statuses else None, revision)


async def defragment(client_url: str, tls: TlsSource | None = None, *, timeout_s: float) -> None:
    """Rewrite a member's file without holes; it answers nobody meanwhile. Harmless to repeat.

    Raises:
        StoreUnavailable: it did not answer in time; it may go on with it all the same.
    """
    await _call(client_url, tls, lambda stubs: stubs.maintenance.Defragment(wire.defragment(), timeout=timeout_s))


async def move_leader(client_url: str, to_id: int, tls: TlsSource | None = None, *, timeout_s: float = 5.0) -> None:
    """Let etcd's leader, whose URL this is, hand on its lead.

    Raises:
        StoreUnavailable: it does not answer, is not the leader, or the other one could not take it.
    """
    await _call(client_url, tls, lambda stubs: stubs.maintenance.MoveLeader(wire.move_leader(to_id), timeout=timeout_s))


async def disarm(client_url: str, member_id: int, tls: TlsSource | None = None, *, timeout_s: float = 5.0) -> None:
    """Take back the alarm NOSPACE that this member has raised. Harmless to repeat.

    Raises:
        StoreUnavailable: no answer in time.
    """
    await _call(client_url, tls, lambda stubs: stubs.maintenance.Alarm(wire.alarm_disarm(member_id), timeout=timeout_s))


# --- inside --------------------------------------------------------------------------------------------------------


async def _ask(
    endpoint: str, tls: TlsSource | None, timeout_s: float, *, with_list: bool
) -> tuple[MemberStatus, tuple[Member, ...]] | None:
    """What a member says of itself, and whom it knows of; None when it does not answer."""
    try:
        async with asyncio.timeout(timeout_s), _connected(endpoint, tls, timeout_s) as stubs:
            status = member_status(await stubs.maintenance.Status(wire.status(), timeout=timeout_s))
            if not with_list:
                return status, ()
            # Its own list, which needs no majority and may be behind.
            listed = await stubs.cluster.MemberList(wire.member_list(), timeout=timeout_s)
    except (StoreUnavailable, TimeoutError):
        return None
    members = tuple(Member(m.ID, m.name, tuple(m.peerURLs), tuple(m.clientURLs), m.isLearner) for m in listed.members)
    return status, members


async def _call(client_url: str, tls: TlsSource | None, call: Callable[[wire.Stubs], Any]) -> None:
    endpoint = normal_endpoints([client_url], secured=tls is not None)[0]
    async with _connected(endpoint, tls, CONNECT_S) as stubs:
        await call(stubs)


@contextlib.asynccontextmanager
async def _connected(endpoint: str, tls: TlsSource | None, timeout_s: float) -> AsyncIterator[wire.Stubs]:
    """One member over a connection of its own, so that nothing of the store's waits for it."""
    connection = Connection(endpoint, tls)
    try:
        if not await connection.ready(min(timeout_s, CONNECT_S)):
            raise StoreUnavailable(f"{endpoint}: {connection.trouble}")
        with _failures(endpoint), connection.use() as stubs:
            yield stubs
    finally:
        await connection.close()


@contextlib.contextmanager
def _failures(endpoint: str) -> Any:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise StoreUnavailable(f"{endpoint}: {error.details() or error.code().name}") from error
    except GONE as error:
        if cancelled_ourselves():
            raise
        raise StoreUnavailable(f"{endpoint}: the connection was closed") from error
