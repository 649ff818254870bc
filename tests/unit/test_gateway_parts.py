"""The small parts of the gateway: what may be seen, how much may be asked, whose a lease is, what is on the wire."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spinetta import codec, gatewaycodec, keys, lifecycle, trustcodec, visibility
from spinetta.access import MEMBERS, NodeAcl, NodeRole
from spinetta.errors import (
    Compacted,
    Denied,
    InvariantViolation,
    OutcomeUnknown,
    SpinettaError,
    StoreUnavailable,
    UserError,
)
from spinetta.gatewaycodec import Busy
from spinetta.model import IncarnationId, LeaseId, NodeId, QueueHint, Revision, Task
from spinetta.node.gateway.fanout import BUFFER_EVENTS, Feed, Item, Subscriber, sees_for
from spinetta.node.gateway.leases import PER_NODE_MAX, Leases
from spinetta.node.gateway.quota import GatewayLimits, Quota
from spinetta.store.protocol import Change, KeyValue
from spinetta.txn import Absent, Committed, Conflict, CreatedAt, Delete, NoneUnder, Put, Result, RevisionIs, Txn
from spinetta.v1 import gateway_pb2 as pb
from tests import builders

ME, OTHER = NodeId("n1"), NodeId("n2")
ACL = NodeAcl(ME, NodeRole.WORKER, effective=("red",))


# --- what may be seen --------------------------------------------------------------------------------------------


def record(task: Task) -> bytes:
    return codec.encode_task(task)


def claimed(node: NodeId, *clearance: str) -> Task:
    return lifecycle.claimed(builders.queued(1, clearance=clearance), node, IncarnationId("x"), now_ms=1)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        (keys.queued(builders.task_id(1)), codec.encode_hint(QueueHint.of(builders.spec(1))), True),
        (keys.queued(builders.task_id(1)), codec.encode_hint(QueueHint.of(builders.spec(1, clearance=("red",)))), True),
        (
            keys.queued(builders.task_id(1)),
            codec.encode_hint(QueueHint.of(builders.spec(1, clearance=(MEMBERS, "red")))),
            True,
        ),
        (
            keys.queued(builders.task_id(1)),
            codec.encode_hint(QueueHint.of(builders.spec(1, clearance=("blue",)))),
            False,
        ),
        (keys.queued(builders.task_id(1)), b"", False),  # the task's record says
        (keys.queued(builders.task_id(1)), b"\xff", False),
        (keys.task(builders.task_id(1)), record(builders.queued(1)), True),
        (keys.task(builders.task_id(1)), record(builders.queued(1, clearance=("blue",))), False),
        (keys.task(builders.task_id(1)), record(claimed(ME, "blue")), True),
        (keys.task(builders.task_id(1)), record(claimed(OTHER)), False),
        (keys.task(builders.task_id(1)), b"\xff", False),
        (keys.running(ME, builders.task_id(1)), b"", True),
        (keys.running(OTHER, builders.task_id(1)), b"", False),
        (keys.running(NodeId("n11"), builders.task_id(1)), b"", False),
        (keys.complete(builders.task_id(1)), b"", False),
        (keys.node(OTHER), b"", True),
        (keys.incarnation(ME), b"", True),
        (keys.incarnation(OTHER), b"", False),
        (keys.beat(OTHER), b"", False),
        (keys.OFFICE, b"", True),
        ("/leader/other", b"", False),
        (keys.GENERATION, b"", True),
        (keys.acl_node(ME), b"\xff", True),
        (keys.acl_node(OTHER), trustcodec.encode(NodeAcl(OTHER, NodeRole.WORKER)), False),
        (keys.acl_node(OTHER), trustcodec.encode(NodeAcl(OTHER, NodeRole.VOTER)), True),
        (keys.acl_node(OTHER), b"\xff", False),
        (keys.acl_user("ann"), b"", True),
        (keys.acl_group("g"), b"", False),
        (keys.token("t"), b"", False),
        (keys.request(OTHER), b"", False),
        (keys.POLICY, b"", False),
        (keys.authority("cluster"), b"", False),
        (keys.label("red"), b"", True),
        (keys.label(MEMBERS), b"", True),
        (keys.label("blue"), b"", False),
        (keys.secret("ann", "db"), b"", False),
        ("/whatever", b"", False),
        ("", b"", False),
    ],
)
def test_what_a_worker_sees(key: str, value: bytes, seen: bool) -> None:
    assert visibility.visible(ME, ACL, key, value) is seen


def test_secrets_of_what_runs_here() -> None:
    mine = replace(claimed(ME), spec=builders.spec(1, owner="ann", secrets=(("db", "file"), ("key", "key"))))
    theirs = replace(claimed(OTHER), spec=builders.spec(2, owner="bob", secrets=(("db", "db"),)))
    waiting = builders.queued(3, owner="cat", secrets=(("db", "db"),))
    found = visibility.secrets_of(ME, [mine, theirs, waiting])
    assert found == {keys.secret("ann", "db"), keys.secret("ann", "key")}
    assert visibility.visible(ME, ACL, keys.secret("ann", "db"), b"", secrets=found)
    assert not visibility.visible(ME, ACL, keys.secret("bob", "db"), b"", secrets=found)


def test_ranges() -> None:
    for prefix in (keys.NODE, keys.QUEUED, keys.LEADER, keys.running_on(ME)):
        assert visibility.listable(ME, prefix)
        assert visibility.watchable(ME, prefix)
    assert visibility.listable(ME, keys.INCARNATION)
    assert not visibility.watchable(ME, keys.INCARNATION)
    for prefix in ("", "/", keys.TASK, keys.RUNNING, keys.running_on(OTHER), keys.ACL, keys.SECRET, keys.NODE[:-1]):
        assert not visibility.listable(ME, prefix)
        assert not visibility.watchable(ME, prefix)


# --- how much ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_calls_are_refilled_and_one_nodes_are_not_anothers() -> None:
    clock = Clock()
    quota = Quota(GatewayLimits(calls_per_s=2, calls_burst=4), clock)
    for _ in range(4):
        with quota.call(ME, 10):
            pass
    with pytest.raises(Busy, match="calls a second"), quota.call(ME, 10):
        pass
    with quota.call(OTHER, 10):
        pass
    clock.now_s = 0.5
    with quota.call(ME, 10):
        pass
    with pytest.raises(Busy), quota.call(ME, 10):
        pass


def test_bytes_may_be_owed_and_are_waited_out() -> None:
    clock = Clock()
    quota = Quota(GatewayLimits(bytes_per_s=100, bytes_burst=200), clock)
    with quota.call(ME, 150):
        quota.charge(ME, 150)
    with pytest.raises(Busy, match="bytes a second"), quota.call(ME, 1):
        pass
    clock.now_s = 1.0
    with quota.call(ME, 1):
        pass


def test_calls_and_watches_at_once() -> None:
    quota = Quota(GatewayLimits(calls_max=2, watches_max=1, voter_watches_max=2), Clock())
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quota.call(ME, 0))
        with pytest.raises(Busy, match="under way"), quota.call(ME, 0):
            pass
    with quota.watch(ME, is_voter=False):
        assert quota.watching == 1
        with pytest.raises(Busy, match="watches open"), quota.watch(ME, is_voter=False):
            pass
        with quota.watch(OTHER, is_voter=True), quota.watch(OTHER, is_voter=True):
            assert quota.watching == 3
    assert quota.watching == 0


def test_idle_accounts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.gateway.quota.ACCOUNTS_MAX", 10)
    clock = Clock()
    quota = Quota(GatewayLimits(), clock)
    with quota.watch(ME, is_voter=False):
        for n in range(100):
            clock.now_s += 10
            with quota.call(NodeId(f"x{n}"), 0):
                pass
        assert len(quota._accounts) <= 11
        assert quota.watching == 1


def test_leases() -> None:
    clock = Clock()
    leases = Leases(clock)
    for n in range(PER_NODE_MAX):
        leases.check_room(ME)
        leases.granted(ME, LeaseId(n), 10)
    with pytest.raises(Busy):
        leases.check_room(ME)
    leases.check_room(OTHER)
    leases.kept(ME, LeaseId(99), 10.0)  # no room: it is found by the node's own key again
    assert LeaseId(99) not in leases.of(ME)
    assert leases.of(OTHER) == frozenset()
    leases.ended(ME, LeaseId(0))
    clock.now_s = 39
    leases.kept(ME, LeaseId(1), 10.0)
    clock.now_s = 41
    assert leases.of(ME) == {LeaseId(1)}
    clock.now_s = 1000
    assert leases.of(ME) == frozenset()
    assert not leases._of


# --- the fan-out -------------------------------------------------------------------------------------------------


def put(key: str, revision: int, value: bytes = b"") -> Change:
    at = Revision(revision)
    return Change(key, KeyValue(key, value, at, at), at)


def test_a_subscriber_is_told_of_what_is_its_own_and_cut_when_it_does_not_read() -> None:
    async def scenario() -> None:
        feed = Feed(keys.RUNNING, Revision(1), asyncio.get_running_loop().create_future())
        group: set[Subscriber] = set()
        mine = Subscriber(keys.running_on(ME), Revision(5), sees_for(ME, ACL, keys.running_on(ME)), group)
        group.add(mine)
        feed.listeners[keys.running_on(ME)] = group
        feed.take_in([put(keys.running(ME, builders.task_id(n)), n) for n in range(1, 8)])
        feed.take_in([put(keys.running(OTHER, builders.task_id(n)), 8) for n in range(3)])
        feed.take_in([put(keys.running(NodeId("n11"), builders.task_id(1)), 9), put("/status/running/odd", 10)])
        assert [item.revision for item in await mine.take(1)] == [5, 6, 7]
        assert await mine.take(0.01) == []
        for revision in range(11, 11 + BUFFER_EVENTS):
            feed.take_in([put(keys.running(ME, builders.task_id(1)), revision)])
        assert len(feed.ring) < BUFFER_EVENTS
        assert feed.ring[0].revision == feed.first
        feed.take_in([put(keys.running(ME, builders.task_id(1)), 1 << 20)])
        with pytest.raises(StoreUnavailable, match="too slow"):
            await mine.take(1)

    asyncio.run(scenario())


def test_the_ring_forgets_whole_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinetta.node.gateway.fanout.RING_EVENTS", 4)

    async def scenario() -> None:
        feed = Feed(keys.NODE, Revision(1), asyncio.get_running_loop().create_future())
        feed.take_in([put(f"/node/{n}", 1) for n in range(3)])
        feed.take_in([put(f"/node/{n}", 2) for n in range(3)])
        assert [item.revision for item in feed.ring] == [2, 2, 2]
        assert feed.first == 2
        feed.take_in([put(f"/node/{n}", 3) for n in range(9)])
        assert (list(feed.ring), feed.ring_bytes, feed.first) == ([], 0, 4)

    asyncio.run(scenario())


def test_deletions_of_the_queue_are_told_to_all_and_of_nothing_else() -> None:
    gone = Change(keys.queued(builders.task_id(1)), None, Revision(3))
    blue = put(
        keys.queued(builders.task_id(1)), 2, codec.encode_hint(QueueHint.of(builders.spec(1, clearance=("blue",))))
    )
    sees = sees_for(ME, ACL, keys.QUEUED)
    assert sees(Item.of(gone))
    assert not sees(Item.of(blue))
    assert not sees_for(ME, ACL, keys.LEADER)(Item.of(put("/leader/x", 1)))
    assert not sees_for(ME, ACL, keys.TASK)(Item.of(put(keys.task(builders.task_id(1)), 1)))


# --- on the wire -------------------------------------------------------------------------------------------------

KEYS = st.binary(max_size=20).map(gatewaycodec.key_from_pb)  # whatever bytes: others may have written them
REVISIONS = st.integers(-(1 << 63), (1 << 63) - 1).map(Revision)
GUARDS = st.one_of(
    st.builds(Absent, KEYS), st.builds(CreatedAt, KEYS, REVISIONS), st.builds(RevisionIs, KEYS, REVISIONS),
    st.builds(NoneUnder, KEYS),
)  # fmt: skip
WRITES = st.one_of(st.builds(Put, KEYS, st.binary(max_size=30), REVISIONS.map(LeaseId)), st.builds(Delete, KEYS))
PLAIN = st.builds(Txn, st.lists(GUARDS, max_size=4).map(tuple), st.lists(WRITES, max_size=4).map(tuple))
TXNS = st.builds(
    Txn, st.lists(GUARDS, max_size=4).map(tuple), st.lists(WRITES, max_size=4).map(tuple),
    st.lists(PLAIN, max_size=3).map(tuple),
)  # fmt: skip


@given(TXNS)
def test_transactions_come_back_as_they_went(body: Txn) -> None:
    data = gatewaycodec.txn_to_pb(body).SerializeToString()
    assert gatewaycodec.txn_from_pb(pb.StoreTxn.FromString(data)) == body


@given(st.binary(max_size=300))
def test_any_bytes_are_a_transaction_or_are_refused(data: bytes) -> None:
    try:
        body = gatewaycodec.txn_from_pb(pb.StoreTxn.FromString(data))
    except (InvariantViolation, DecodeError):
        return
    assert gatewaycodec.txn_from_pb(gatewaycodec.txn_to_pb(body)) == body


@pytest.mark.parametrize(
    "result", [Committed(Revision(5)), Committed(Revision(6), (True, False)), Conflict(Revision(7))]
)
def test_results_come_back_as_they_went(result: Result) -> None:
    assert gatewaycodec.result_from_pb(gatewaycodec.result_to_pb(result)) == result


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("no leader"),
        OutcomeUnknown("no answer"),
        Compacted(77),
        Denied("not you", hint="ask", reason="unauthenticated"),
        Busy("too much"),
        UserError("too large", hint="less", reason="too-large"),
        InvariantViolation("twice"),
    ],
)
def test_errors_come_back_as_they_went(error: SpinettaError) -> None:
    found = gatewaycodec.error_from_bytes(gatewaycodec.error_to_pb(error).SerializeToString())
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "reason", "") == getattr(error, "reason", "")


def test_errors_that_say_nothing() -> None:
    assert gatewaycodec.error_from_bytes(b"") is None
    assert gatewaycodec.error_from_bytes(b"\xff\xff") is None
    assert gatewaycodec.error_from_bytes(b"\x08\x63") is None
    long = gatewaycodec.error_to_pb(StoreUnavailable("x" * 100_000))
    assert long.ByteSize() < 4096


def test_changes_that_are_joined_are_one_message() -> None:
    changes = [put("/a", 3, b"1"), Change("/b", None, Revision(3))]
    data = gatewaycodec.watch_response(
        Revision(3), [gatewaycodec.change_bytes(c.key, c.value, c.revision) for c in changes]
    )
    message = pb.StoreWatchResponse.FromString(data)
    assert message.revision == 3
    assert [(c.entry.key, c.deleted, c.revision) for c in message.changes] == [(b"/a", False, 3), (b"/b", True, 3)]
