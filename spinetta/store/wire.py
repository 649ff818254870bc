"""Between our values and etcd's messages: the only place that touches the untyped protocol stubs.

The stubs are those that `aetcd` ships; why not its client: docs/adr/0002-etcd-client.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from aetcd import rpc
from grpc.aio import Channel

from spinetta import keys
from spinetta.errors import InvariantViolation
from spinetta.model import LeaseId, Revision
from spinetta.store.protocol import Change, KeyValue
from spinetta.txn import Absent, Committed, Conflict, CreatedAt, Delete, Guard, NoneUnder, Put, Result, RevisionIs, Txn

Message: TypeAlias = Any
"""A protobuf message of etcd's API; the stubs carry no types."""

TAKEN_WHEN_FULL = (keys.BEAT, keys.OFFICE, keys.INCARNATION)
"""What alone is written by a renewal, by the election of the leader, and by the condemning of a dead node."""

ALL_KEYS = b"\0"  # as key and range end: everything


@dataclass(frozen=True, slots=True)
class Stubs:
    """Etcd's services over one channel."""

    kv: Any
    watch: Any
    lease: Any
    cluster: Any
    maintenance: Any


def stubs(channel: Channel) -> Stubs:
    """The services that we use."""
    return Stubs(
        kv=rpc.KVStub(channel),
        watch=rpc.WatchStub(channel),
        lease=rpc.LeaseStub(channel),
        cluster=rpc.ClusterStub(channel),
        maintenance=rpc.MaintenanceStub(channel),
    )


def encode(key: str) -> bytes:
    """A key as etcd holds it. Keys of others need not be UTF-8 and must survive the way back."""
    return key.encode("utf-8", "surrogateescape")


def decode(key: bytes) -> str:
    """The reverse of `encode`."""
    return key.decode("utf-8", "surrogateescape")


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of a prefix; the empty prefix means all keys."""
    if not prefix:
        return ALL_KEYS, ALL_KEYS
    low = encode(prefix)
    kept = low.rstrip(b"\xff")  # bytes that have no successor
    return low, kept[:-1] + bytes((kept[-1] + 1,)) if kept else ALL_KEYS


# --- transactions ----------------------------------------------------------------------------------------------


def txn_request(txn: Txn) -> Message:
    """The request for a transaction."""
    operations = [_write(write) for write in txn.then]
    if txn.then and not txn.nested and all(write.key.startswith(TAKEN_WHEN_FULL) for write in txn.then):
        # Etcd's quota does not look into nested transactions, so a store that is full still takes them: nothing that
        # runs is killed for want of room, and somebody is there to make room. See docs/adr/0025-etcd-upkeep.md.
        operations = [rpc.RequestOp(request_txn=rpc.TxnRequest(success=operations))]
    for each in txn.nested:
        if each.nested:
            raise InvariantViolation("transactions nest one level deep")
        operations.append(rpc.RequestOp(request_txn=_plain(each)))
    request = rpc.TxnRequest(compare=[_compare(guard) for guard in txn.when], success=operations)
    if not operations:
        # etcd answers a transaction without operations from the member's own, perhaps stale, state: a linearizable
        # read on both branches makes it ask the leader.
        probe = rpc.RequestOp(request_range=rpc.RangeRequest(key=ALL_KEYS, count_only=True))
        request.success.append(probe)
        request.failure.append(probe)
    return request


def _plain(txn: Txn) -> Message:
    return rpc.TxnRequest(
        compare=[_compare(guard) for guard in txn.when], success=[_write(write) for write in txn.then]
    )


def txn_result(txn: Txn, response: Message) -> Result:
    """What etcd answered to `txn_request(txn)`."""
    revision = Revision(response.header.revision)
    if not response.succeeded:
        return Conflict(revision)
    if not txn.nested:
        return Committed(revision)
    nested = response.responses[len(txn.then) :]
    return Committed(revision, tuple(each.response_txn.succeeded for each in nested))


def _compare(guard: Guard) -> Message:
    compare = rpc.Compare  # its default result is EQUAL
    match guard:
        case RevisionIs(key, revision):
            return compare(target=compare.MOD, key=encode(key), mod_revision=revision)
        case CreatedAt(key, revision):
            return compare(target=compare.CREATE, key=encode(key), create_revision=revision)
        case Absent(key):
            return compare(target=compare.CREATE, key=encode(key), create_revision=0)
        case NoneUnder(prefix):
            # An empty range compares as one key that does not exist; every key that does fails it.
            low, end = prefix_range(prefix)
            return compare(target=compare.CREATE, key=low, range_end=end, create_revision=0)


def _write(write: Put | Delete) -> Message:
    if isinstance(write, Put):
        put = rpc.PutRequest(key=encode(write.key), value=write.value, lease=write.lease)
        return rpc.RequestOp(request_put=put)
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=encode(write.key)))


# --- reading ---------------------------------------------------------------------------------------------------


def read_request(keys: Sequence[str]) -> Message:
    """Single keys at one revision: a transaction of reads, which etcd keeps linearizable."""
    return rpc.TxnRequest(success=[rpc.RequestOp(request_range=rpc.RangeRequest(key=encode(key))) for key in keys])


def read_result(response: Message) -> tuple[KeyValue | None, ...]:
    """What `read_request` brought, in its order."""
    ranges = (each.response_range.kvs for each in response.responses)
    return tuple(key_value(kvs[0]) if kvs else None for kvs in ranges)


def range_request(
    low: bytes, end: bytes, *, limit: int = 0, keys_only: bool = False, descending: bool = False, revision: int = 0
) -> Message:
    """Keys of [low, end); of `low` alone when `end` is empty."""
    order = rpc.RangeRequest.DESCEND if descending else rpc.RangeRequest.NONE
    return rpc.RangeRequest(
        key=low, range_end=end, limit=limit, keys_only=keys_only, sort_order=order, revision=revision
    )


def key_value(kv: Message) -> KeyValue:
    """A key as etcd sent it."""
    return KeyValue(
        decode(kv.key), kv.value, Revision(kv.create_revision), Revision(kv.mod_revision), LeaseId(kv.lease)
    )


# --- watching --------------------------------------------------------------------------------------------------


def watch_create(prefix: str, start: int) -> Message:
    """The request that opens a watch; `fragment`, because etcd otherwise sends any number of MB in one message."""
    low, end = prefix_range(prefix)
    create = rpc.WatchCreateRequest(key=low, range_end=end, start_revision=start, fragment=True, progress_notify=True)
    return rpc.WatchRequest(create_request=create)


def watch_progress() -> Message:
    """Asks a watch stream for a sign of life."""
    return rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())


def change(event: Message) -> Change:
    """One event of a watch."""
    kv = event.kv
    if event.type == rpc.Event.DELETE:
        return Change(decode(kv.key), None, Revision(kv.mod_revision))
    value = key_value(kv)
    return Change(value.key, value, value.modified)


# --- leases, cluster, maintenance ------------------------------------------------------------------------------


def lease_grant(ttl_s: int) -> Message:
    """A new lease; etcd chooses its id."""
    return rpc.LeaseGrantRequest(TTL=ttl_s)


def lease_revoke(lease: LeaseId) -> Message:
    """End a lease."""
    return rpc.LeaseRevokeRequest(ID=lease)


def lease_keep_alive(lease: LeaseId) -> Message:
    """Renew a lease once."""
    return rpc.LeaseKeepAliveRequest(ID=lease)


def compaction(revision: int) -> Message:
    """Forget history."""
    return rpc.CompactionRequest(revision=revision, physical=True)


def member_list() -> Message:
    """Who the members are."""
    return rpc.MemberListRequest()


def member_add(peer_url: str) -> Message:
    """A new learner."""
    return rpc.MemberAddRequest(peerURLs=[peer_url], isLearner=True)


def member_promote(member_id: int) -> Message:
    """A learner becomes a voter."""
    return rpc.MemberPromoteRequest(ID=member_id)


def member_remove(member_id: int) -> Message:
    """A member is gone for good."""
    return rpc.MemberRemoveRequest(ID=member_id)


def status() -> Message:
    """How one member is."""
    return rpc.StatusRequest()


def snapshot_request() -> Message:
    """All that a member has, as of now."""
    return rpc.SnapshotRequest()


def alarm_list() -> Message:
    """Alarms raised anywhere; a plain read (the default action is GET)."""
    return rpc.AlarmRequest()


def alarm_disarm(member_id: int) -> Message:
    """Take back a member's alarm NOSPACE."""
    return rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, memberID=member_id, alarm=1)


def defragment() -> Message:
    """Rewrite one member's file without holes."""
    return rpc.DefragmentRequest()


def move_leader(member_id: int) -> Message:
    """Hand etcd's lead to this member."""
    return rpc.MoveLeaderRequest(targetID=member_id)


ALARM_NAMES = {1: "NOSPACE", 2: "CORRUPT"}
