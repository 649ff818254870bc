"""gRPC's statuses as our errors."""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from spinetta.errors import (
    AlreadyExists,
    Compacted,
    Denied,
    InvariantViolation,
    NotFound,
    OutcomeUnknown,
    SpinettaError,
    StoreUnavailable,
    UserError,
)
from spinetta.v1 import api_pb2 as api

DETAIL_KEY = "spinetta-error-bin"
# What is asked for is on a node that does not answer: asking other nodes again at once would not help.
NODE_UNREACHABLE = "node-unreachable"
UNIMPLEMENTED = "unimplemented"
ASK_A_VOTER = "ask-a-voter"  # a worker serves no users
ASK_NODE = "ask-node"  # only the node that has it can show it
_Code = grpc.StatusCode
_LOGIN = "log in with: spinetta login; see also: spinetta whoami"
_PLUGIN_FAILED = "metadata from plugin failed"  # gRPC's words
_TOO_MANY = "oncurrent RPC limit exceeded"  # the same
TOO_MANY_RETRY_S = 0.5  # most calls are over by then
RETRY_AFTER_MAX_S = 10.0  # longer is never asked for
_USERS = frozenset(
    {
        _Code.INVALID_ARGUMENT,
        _Code.FAILED_PRECONDITION,
        _Code.OUT_OF_RANGE,
        _Code.RESOURCE_EXHAUSTED,
        _Code.DATA_LOSS,
    }
)


class Redirected(StoreUnavailable):
    """This node is not the one to ask; nothing was changed.

    Attributes:
        reason: `ASK_A_VOTER` or `ASK_NODE`.
        addresses: of nodes to ask instead.
        object: what to ask for there, when a fragment was asked for: only voters know what it is one of.
    """

    def __init__(self, reason: str, message: str, addresses: tuple[str, ...], object_: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.addresses = addresses
        self.object = object_


class Throttled(StoreUnavailable):
    """This node is asked for too much, by us or by all together; nothing was changed.

    Attributes:
        retry_after_s: how long to leave it alone.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, hint="try again later, or at another node", reason="busy")
        self.retry_after_s = min(max(retry_after_s, 0.0), RETRY_AFTER_MAX_S)


def detail_of(error: grpc.aio.AioRpcError) -> api.ErrorDetail | None:
    """What the node said about the error; None when it was not the node that answered."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return api.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def from_rpc(error: grpc.aio.AioRpcError, address: str, *, writes: bool) -> SpinettaError:
    """What a failed call means for the caller.

    Args:
        error: as raised by gRPC.
        address: of the node that was asked.
        writes: the call would have changed something, so that an answer that never came leaves open whether it did.
    """
    code, detail = error.code(), detail_of(error)
    text = detail.message if detail else (error.details() or code.name)
    where = f"node at {address}"
    if code is _Code.NOT_FOUND and detail:
        return NotFound(text, field=detail.field, hint=detail.hint, reason=detail.reason)
    if code is _Code.ALREADY_EXISTS and detail:
        return AlreadyExists(text, field=detail.field, hint=detail.hint, reason=detail.reason)
    if detail and detail.reason == "compacted":
        return Compacted(0)
    if detail and detail.reason in (ASK_A_VOTER, ASK_NODE):
        return Redirected(detail.reason, f"{where}: {text}", tuple(detail.addresses), detail.object)
    if detail and detail.reason == "busy":
        return Throttled(f"{where}: {text}", detail.retry_after_s)
    if code is _Code.RESOURCE_EXHAUSTED and _TOO_MANY in text:  # gRPC's server refuses before anybody has looked
        return Throttled(f"{where} already answers as many calls as it may", TOO_MANY_RETRY_S)
    if code in (_Code.PERMISSION_DENIED, _Code.UNAUTHENTICATED):
        unknown = code is _Code.UNAUTHENTICATED
        reason = "unauthenticated" if unknown else "denied"
        if detail is None:
            return Denied(f"{where} refuses: {text}", hint=_LOGIN if unknown else "", reason=reason)
        return Denied(text, field=detail.field, hint=detail.hint, reason=detail.reason or reason)
    if (code in _USERS or (detail and detail.reason == NODE_UNREACHABLE)) and detail:
        return UserError(text, field=detail.field, hint=detail.hint, reason=detail.reason)
    if code is _Code.ABORTED:
        return OutcomeUnknown(f"{where}: {text}", hint=detail.hint if detail else "")
    if code is _Code.UNAVAILABLE and detail:
        return StoreUnavailable(f"{where}: {text}", hint=detail.hint, reason=detail.reason)
    if detail is None and _PLUGIN_FAILED in text:
        # Our own side could not read the bearer token's file: nothing was sent.
        return Denied(text.rpartition("error: ")[2], field="bearer_file", reason="unauthenticated")
    if code in (_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.CANCELLED):
        # No word from the node itself: the connection broke or the time is over after the request had gone out.
        what = "did not answer in time" if code is _Code.DEADLINE_EXCEEDED else "went away during the call"
        return OutcomeUnknown(f"{where} {what}") if writes else StoreUnavailable(f"{where} {what}")
    if code is _Code.RESOURCE_EXHAUSTED:
        return UserError(f"{where}: {text}", hint="send less at once", reason="too-large")
    if code is _Code.UNIMPLEMENTED:
        return UserError(
            f"{where} does not know this call: {text}",
            hint="is it a Spinetta node, of the same version?",
            reason=UNIMPLEMENTED,
        )
    return InvariantViolation(f"{where} failed: {text}")
