"""Transactions, answers and errors to the messages of the gateway and back; no records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from spinetta.errors import (
    Compacted,
    Denied,
    InvariantViolation,
    OutcomeUnknown,
    SpinettaError,
    StoreUnavailable,
    UserError,
)
from spinetta.model import LeaseId, Member, Membership, Revision, Stored
from spinetta.txn import Absent, Committed, Conflict, CreatedAt, Delete, Guard, NoneUnder, Put, Result, RevisionIs, Txn
from spinetta.v1 import gateway_pb2 as pb

SERVICE = "spinetta.v1.Gateway"
ERROR_KEY = "spinetta-store-error-bin"
MESSAGE_BYTES_MAX = 1_600_000  # a transaction as large as etcd takes (1.5 MiB), and what is around it
TEXT_CHARS_MAX = 1000  # of an error: gRPC refuses trailers beyond 8 kB


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service, for both sides."""

    name: str
    request: type[Message]
    response: type[Message]
    writes: bool = False

    @property
    def path(self) -> str:
        """As gRPC calls it."""
        return f"/{SERVICE}/{self.name}"

    @property
    def encode_request(self) -> Callable[[Any], bytes]:
        """Message to bytes."""
        return self.request.SerializeToString

    @property
    def encode_response(self) -> Callable[[Any], bytes]:
        """Message to bytes; bytes are taken for a message that has been encoded."""
        return _encoded


def _encoded(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


COMMIT = Method("Commit", pb.StoreCommitRequest, pb.StoreCommitResponse, writes=True)
READ = Method("Read", pb.StoreReadRequest, pb.StoreReadResponse)
LIST = Method("List", pb.StoreListRequest, pb.StoreListResponse)
WATCH = Method("Watch", pb.StoreWatchRequest, pb.StoreWatchResponse)
GRANT_LEASE = Method("GrantLease", pb.StoreGrantLeaseRequest, pb.StoreGrantLeaseResponse, writes=True)
KEEP_ALIVE = Method("KeepAlive", pb.StoreKeepAliveRequest, pb.StoreKeepAliveResponse)
REVOKE_LEASE = Method("RevokeLease", pb.StoreRevokeLeaseRequest, pb.StoreRevokeLeaseResponse, writes=True)
MEMBERS = Method("Members", pb.StoreMembersRequest, pb.StoreMembersResponse)


def key_to_pb(key: str) -> bytes:
    """A key as it is sent. Keys of others need not be UTF-8 and must survive the way back."""
    return key.encode("utf-8", "surrogateescape")


def key_from_pb(key: bytes) -> str:
    """The reverse of `key_to_pb`."""
    return key.decode("utf-8", "surrogateescape")


# --- transactions -------------------------------------------------------------------------------------------------


def txn_to_pb(txn: Txn) -> pb.StoreTxn:
    """Value to message.

    Raises:
        InvariantViolation: it nests more than one level deep.
    """
    if any(each.nested for each in txn.nested):
        raise InvariantViolation("transactions nest one level deep")
    return pb.StoreTxn(
        when=[_guard_to_pb(guard) for guard in txn.when],
        then=[_write_to_pb(write) for write in txn.then],
        nested=[txn_to_pb(each) for each in txn.nested],
    )


def txn_from_pb(message: pb.StoreTxn) -> Txn:
    """Message to value.

    Raises:
        InvariantViolation: no transaction of ours: a guard or write of no kind, or too deeply nested.
    """
    if any(part.nested for part in message.nested):
        raise InvariantViolation("transactions nest one level deep")
    return Txn(
        tuple(_guard_from_pb(guard) for guard in message.when),
        tuple(_write_from_pb(write) for write in message.then),
        tuple(txn_from_pb(part) for part in message.nested),
    )


def _guard_to_pb(guard: Guard) -> pb.StoreGuard:
    match guard:
        case Absent(key):
            return pb.StoreGuard(absent=key_to_pb(key))
        case CreatedAt(key, revision):
            return pb.StoreGuard(created_at=pb.StoreGuard.KeyRevision(key=key_to_pb(key), revision=revision))
        case RevisionIs(key, revision):
            return pb.StoreGuard(revision_is=pb.StoreGuard.KeyRevision(key=key_to_pb(key), revision=revision))
        case NoneUnder(prefix):
            return pb.StoreGuard(none_under=key_to_pb(prefix))


def _guard_from_pb(message: pb.StoreGuard) -> Guard:
    match message.WhichOneof("kind"):
        case "absent":
            return Absent(key_from_pb(message.absent))
        case "created_at":
            return CreatedAt(key_from_pb(message.created_at.key), Revision(message.created_at.revision))
        case "revision_is":
            return RevisionIs(key_from_pb(message.revision_is.key), Revision(message.revision_is.revision))
        case "none_under":
            return NoneUnder(key_from_pb(message.none_under))
        case _:
            raise InvariantViolation("a guard of no kind")


def _write_to_pb(write: Put | Delete) -> pb.StoreWrite:
    if isinstance(write, Put):
        return pb.StoreWrite(put=pb.StoreWrite.Put(key=key_to_pb(write.key), value=write.value, lease=write.lease))
    return pb.StoreWrite(delete=key_to_pb(write.key))


def _write_from_pb(message: pb.StoreWrite) -> Put | Delete:
    match message.WhichOneof("kind"):
        case "put":
            return Put(key_from_pb(message.put.key), message.put.value, LeaseId(message.put.lease))
        case "delete":
            return Delete(key_from_pb(message.delete))
        case _:
            raise InvariantViolation("a write of no kind")


def result_to_pb(result: Result) -> pb.StoreCommitResponse:
    """Value to message."""
    if isinstance(result, Conflict):
        return pb.StoreCommitResponse(revision=result.revision)
    return pb.StoreCommitResponse(committed=True, revision=result.revision, nested=result.nested)


def result_from_pb(message: pb.StoreCommitResponse) -> Result:
    """Message to value."""
    if not message.committed:
        return Conflict(Revision(message.revision))
    return Committed(Revision(message.revision), tuple(message.nested))


# --- keys and changes ---------------------------------------------------------------------------------------------


def entry_to_pb(entry: Stored, *, key_only: bool = False) -> pb.StoreEntry:
    """Value to message."""
    return pb.StoreEntry(
        key=key_to_pb(entry.key),
        value=b"" if key_only else entry.value,
        created=entry.created,
        modified=entry.modified,
        lease=entry.lease,
    )


def entry_from_pb(message: pb.StoreEntry) -> tuple[str, bytes, Revision, Revision, LeaseId]:
    """Key, value, the revisions of its creation and of its last change, lease."""
    return (
        key_from_pb(message.key),
        message.value,
        Revision(message.created),
        Revision(message.modified),
        LeaseId(message.lease),
    )


def change_bytes(key: str, entry: Stored | None, revision: Revision) -> bytes:
    """One change, encoded as part of a `StoreWatchResponse`: encoded messages that are joined are one message."""
    change = pb.StoreChange(
        entry=pb.StoreEntry(key=key_to_pb(key)) if entry is None else entry_to_pb(entry),
        deleted=entry is None,
        revision=revision,
    )
    return pb.StoreWatchResponse(changes=[change]).SerializeToString()


def watch_response(revision: Revision, changes: Iterable[bytes] = ()) -> bytes:
    """A message of a watch, of changes that have been encoded."""
    return pb.StoreWatchResponse(revision=revision).SerializeToString() + b"".join(changes)


# --- what etcd says of itself -------------------------------------------------------------------------------------


def membership_to_pb(membership: Membership) -> pb.StoreMembersResponse:
    """Value to message."""
    return pb.StoreMembersResponse(
        cluster_id=membership.cluster_id,
        leader_member_id=membership.leader_member_id,
        members=[
            pb.StoreMembersResponse.Member(
                name=m.name,
                member_id=m.member_id,
                client_url=m.client_url,
                peer_url=m.peer_url,
                learner=m.learner,
                unhealthy=not m.healthy,
            )
            for m in membership.members
        ],
        alarms=membership.alarms,
    )


def membership_from_pb(message: pb.StoreMembersResponse) -> Membership:
    """Message to value."""
    members = tuple(
        Member(m.name, m.member_id, m.client_url, m.peer_url, m.learner, not m.unhealthy) for m in message.members
    )
    return Membership(message.cluster_id, message.leader_member_id, members, tuple(message.alarms))


# --- errors -------------------------------------------------------------------------------------------------------


class Busy(UserError):
    """The caller asks for too much at once; nothing was done."""

    reason = "busy"


def error_to_pb(error: SpinettaError) -> pb.StoreError:
    """Error to message."""
    if isinstance(error, UserError):
        kind = pb.StoreError.INVALID
        if isinstance(error, Denied):
            kind = pb.StoreError.DENIED
        elif error.reason == Busy.reason:
            kind = pb.StoreError.BUSY
        return pb.StoreError(kind=kind, message=_short(error.message), hint=_short(error.hint), reason=error.reason)
    text = _short(str(error))
    match error:
        case StoreUnavailable():
            return pb.StoreError(kind=pb.StoreError.UNAVAILABLE, message=text)
        case OutcomeUnknown():
            return pb.StoreError(kind=pb.StoreError.UNKNOWN_OUTCOME, message=text)
        case Compacted():
            return pb.StoreError(kind=pb.StoreError.COMPACTED, compact_revision=error.compact_revision)
        case _:
            return pb.StoreError(kind=pb.StoreError.MALFORMED, message=text)


def error_from_bytes(data: bytes) -> SpinettaError | None:
    """The error in a trailer; None when it says nothing that this version understands."""
    message = pb.StoreError()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    match message.kind:
        case pb.StoreError.UNAVAILABLE:
            return StoreUnavailable(message.message)
        case pb.StoreError.UNKNOWN_OUTCOME:
            return OutcomeUnknown(message.message)
        case pb.StoreError.COMPACTED:
            return Compacted(message.compact_revision)
        case pb.StoreError.DENIED:
            return Denied(message.message, hint=message.hint, reason=message.reason or None)
        case pb.StoreError.BUSY:
            return Busy(message.message, hint=message.hint)
        case pb.StoreError.INVALID:
            return UserError(message.message, hint=message.hint, reason=message.reason or None)
        case pb.StoreError.MALFORMED:
            return InvariantViolation(message.message)
        case _:
            return None


def _short(text: str) -> str:
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"
