"""What a failed call to etcd means.

A write that failed is *not done* only when that is certain: the text of etcd or gRPC says that it never left or was
refused before it was proposed. Everything else is unknown.
"""

from __future__ import annotations

import asyncio
import enum

import grpc

from spinetta.errors import InvariantViolation, SpinettaError, StoreFull, StoreUnavailable, UserError


class Meaning(enum.Enum):
    """What a failed call says about the request."""

    NOT_DONE = enum.auto()  # certainly; another member may do it
    REFUSED = enum.auto()  # certainly not, and no member will
    UNKNOWN = enum.auto()  # it may have been carried out


class Refused(Exception):
    """Etcd said no. Never leaves `spinetta.store`: its callers know what the text means for them."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"etcd refused: {text}")
        self.code = code
        self.text = text


NOT_DONE_TEXTS = (
    "failed to connect to all addresses",  # gRPC: there was no connection to send it on
    "etcdserver: no leader",  # refused on arrival, because we require one
    "etcdserver: rpc not supported for learner",
    "etcdserver: too many requests",
    "etcdserver: not capable",
)
REFUSED_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.DATA_LOSS,
    }
)
NO_SPACE = "database space exceeded"
CORRUPT = "corrupt cluster"
TOO_LARGE_FOR_SERVER = "grpc: received message larger than max"
TOO_LARGE_FOR_CLIENT = "CLIENT: Received message larger than max"  # with more around it


def meaning_of(code: grpc.StatusCode, text: str) -> Meaning:
    """Judge a failure by what gRPC and etcd say of it.

    A code alone proves nothing: gRPC makes RESOURCE_EXHAUSTED and PERMISSION_DENIED of broken streams too.
    """
    if text.startswith(NOT_DONE_TEXTS):
        return Meaning.NOT_DONE
    if text.startswith("etcdserver: ") and (code in REFUSED_CODES or text == "etcdserver: unhealthy cluster"):
        return Meaning.REFUSED
    return Meaning.REFUSED if text.startswith(TOO_LARGE_FOR_SERVER) else Meaning.UNKNOWN


def refusal(error: Refused) -> SpinettaError:
    """The error of ours that tells the caller what to do about a refusal it did not foresee."""
    text = error.text
    if "request is too large" in text or text.startswith(TOO_LARGE_FOR_SERVER):
        return UserError(
            "the request is larger than the 1.5 MiB that etcd takes", hint="make it smaller", reason="too-large"
        )
    if "too many operations" in text:
        return UserError(
            "more operations than etcd takes in one transaction",
            hint="give it fewer at once; an etcd that Spinetta starts takes as many as Spinetta sends",
            reason="too-many-operations",
        )
    if NO_SPACE in text:
        # Of 64 writes under way when the quota was passed 63 were refused in these words *and* carried out (3.4.23):
        # whether one fits is judged, and answered, after it has been applied.
        return StoreFull(
            "etcd is full (alarm NOSPACE) and takes no new records",
            hint="the cluster makes room by itself when it can: spinetta cluster status",
        )
    if CORRUPT in text:
        return StoreUnavailable(
            "etcd's members do not hold the same (alarm CORRUPT): nothing can be written until an administrator has "
            "said which of them is right",
            hint="see: spinetta cluster status; and the guide to operating, what to do when etcd is corrupt",
            reason="store-corrupt",
        )
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvariantViolation(str(error))
    return StoreUnavailable(str(error))


GONE: tuple[type[BaseException], ...] = (
    asyncio.CancelledError,
    grpc.aio.UsageError,  # the channel has been closed
    asyncio.InvalidStateError,  # the call is over: its end came between two steps of ours
)
"""What gRPC raises when a channel or a call has gone away under its user. Ask `cancelled_ourselves` before going on."""


def cancelled_ourselves() -> bool:
    """Inside `except CancelledError`: is it this task that was cancelled?

    gRPC raises the same error when a channel is closed under a call, and that must not end the task.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
