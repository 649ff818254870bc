"""Records to bytes and back, as they are stored; the messages in between are those of `messages`.

Unknown fields written by a newer version are dropped on a rewrite; within one release that cannot happen, and a
rolling upgrade must therefore add fields one release before it relies on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from spinetta import messages
from spinetta.errors import CorruptRecord
from spinetta.model import (
    Beat,
    Completed,
    Holding,
    Incarnation,
    IncarnationId,
    Life,
    NodeId,
    NodeRecord,
    QueueHint,
    Revision,
    Task,
)
from spinetta.v1 import record_pb2 as pb

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def parse(message: M, data: bytes, what: str) -> M:
    """`message`, filled in with a stored value.

    Raises:
        CorruptRecord: it is not of that type.
    """
    try:
        message.ParseFromString(data)
    except DecodeError as e:
        raise CorruptRecord(f"{what} cannot be read: {e}") from e
    return message


def _decoded(message: M, convert: Callable[[M], T], data: bytes, what: str) -> T:
    try:
        return convert(parse(message, data, what))
    except ValueError as e:  # a state or outcome that this version does not know
        raise CorruptRecord(f"{what} cannot be read: {e}") from e


def readable(decode: Callable[[bytes], T], data: bytes) -> T | None:
    """What `decode` makes of a stored value; None when it is corrupt.

    For the agent: anybody with etcdctl can write anything under our keys, and one bad record must neither stop the
    nodes that see it nor hide the good ones behind it.
    """
    try:
        return decode(data)
    except CorruptRecord:
        return None


def encode_task(t: Task) -> bytes:
    """The value of ``/task/UUID``."""
    return messages.task_to_pb(t).SerializeToString(deterministic=True)


def decode_task(data: bytes) -> Task:
    """The value of ``/task/UUID``.

    Raises:
        CorruptRecord: it is no task.
    """
    return _decoded(pb.Task(), messages.task_from_pb, data, "the record of a task")


def encode_hint(h: QueueHint) -> bytes:
    """The value of ``/status/queued/UUID``."""
    return pb.QueueHint(
        resources=messages.resources_to_pb(h.resources),
        tags_required=h.tags_required,
        tags_forbidden=h.tags_forbidden,
        priority=h.priority,
        delay_s=h.delay_s,
        clearance=h.clearance,
        needs=h.needs,
        image=h.image,
    ).SerializeToString(deterministic=True)


def decode_hint(data: bytes) -> QueueHint | None:
    """The value of ``/status/queued/UUID``; None when it is empty or unreadable: the task's record says the same."""
    if not data:
        return None
    try:
        m = parse(pb.QueueHint(), data, "a queue hint")
    except CorruptRecord:
        return None
    return QueueHint(
        messages.resources_from_pb(m.resources),
        tuple(sorted(m.tags_required)),
        tuple(sorted(m.tags_forbidden)),
        m.priority,
        m.delay_s,
        tuple(sorted(m.clearance)),
        tuple(sorted(m.needs)),
        m.image,
    )


def encode_holding(h: Holding) -> bytes:
    """The value of ``/status/running/NODE/UUID``."""
    return pb.Holding(
        attempt=h.attempt,
        incarnation=h.incarnation,
        grace_s=h.grace_s,
        cancel_requested=h.cancel_requested,
        cancel_reason=h.cancel_reason,
        overlap=h.overlap,
    ).SerializeToString(deterministic=True)


def decode_holding(data: bytes) -> Holding:
    """The value of ``/status/running/NODE/UUID``.

    Raises:
        CorruptRecord: it is none.
    """
    m = parse(pb.Holding(), data, "a running key")
    return Holding(m.attempt, IncarnationId(m.incarnation), m.grace_s, m.cancel_requested, m.cancel_reason, m.overlap)


def encode_completed(c: Completed) -> bytes:
    """The value of ``/status/complete/UUID``."""
    return pb.Completed(node=c.node, completed_ms=c.completed_ms).SerializeToString(deterministic=True)


def completed_by(node: NodeId, task: Task) -> bytes:
    """The same, of a task whose end `node` records."""
    return encode_completed(Completed(node, task.completed_ms))


def decode_completed(data: bytes) -> Completed | None:
    """The value of ``/status/complete/UUID``; None when it is empty or unreadable: the task's record says the same."""
    if not data:
        return None
    try:
        m = parse(pb.Completed(), data, "a complete key")
    except CorruptRecord:
        return None
    return Completed(NodeId(m.node), m.completed_ms)


def encode_beat(beat: Beat) -> bytes:
    """The value of ``/beat/NODE``."""
    m = pb.Beat(waiting=sorted(beat.waiting), preparing=sorted(beat.preparing))
    return m.SerializeToString(deterministic=True)


def decode_beat(data: bytes) -> Beat:
    """The value of ``/beat/NODE``; what cannot be read holds nothing back."""
    try:
        m = parse(pb.Beat(), data, "a heartbeat")
    except CorruptRecord:
        return Beat()
    return Beat(frozenset(map(Revision, m.waiting)), frozenset(map(Revision, m.preparing)))


def encode_node(n: NodeRecord) -> bytes:
    """The value of ``/node/NODE``."""
    return messages.node_to_pb(n).SerializeToString(deterministic=True)


def decode_node(data: bytes) -> NodeRecord:
    """The value of ``/node/NODE``.

    Raises:
        CorruptRecord: it is no node.
    """
    return _decoded(pb.Node(), messages.node_from_pb, data, "the record of a node")


def encode_incarnation(i: Incarnation) -> bytes:
    """The value of ``/incarnation/NODE``."""
    return pb.Incarnation(
        id=i.id,
        state=pb.Incarnation.State.ValueType(i.state),
        boot_id=i.boot_id,
        lease_ttl_s=i.lease_ttl_s,
        kill_margin_s=i.kill_margin_s,
        vouched=i.vouched,
    ).SerializeToString(deterministic=True)


def decode_incarnation(data: bytes) -> Incarnation:
    """The value of ``/incarnation/NODE``.

    Raises:
        CorruptRecord: it is none.
    """
    return _decoded(pb.Incarnation(), _incarnation_from_pb, data, "an incarnation")


def _incarnation_from_pb(m: pb.Incarnation) -> Incarnation:
    if m.state == pb.Incarnation.INCARNATION_STATE_UNSPECIFIED:
        raise CorruptRecord("an incarnation has no state")
    return Incarnation(IncarnationId(m.id), Life(m.state), m.boot_id, m.lease_ttl_s, m.kill_margin_s, m.vouched)


def encode_office(node: NodeId) -> bytes:
    """The value of ``/leader/office``."""
    return pb.Office(node=node).SerializeToString(deterministic=True)


def decode_office(data: bytes) -> NodeId:
    """The value of ``/leader/office``."""
    return NodeId(parse(pb.Office(), data, "the office of the leader").node)


def encode_generation(generation: str) -> bytes:
    """The value of ``/generation``."""
    return pb.Generation(id=generation).SerializeToString(deterministic=True)


def decode_generation(data: bytes) -> str:
    """The value of ``/generation``."""
    return parse(pb.Generation(), data, "the generation").id
