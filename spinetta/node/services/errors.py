"""The one place where errors become answers.

===================  =====================  ===========================================================
error                status                 the caller should
===================  =====================  ===========================================================
UserError            INVALID_ARGUMENT       mend the input (or another status, by its reason: see below)
NotFound             NOT_FOUND
AlreadyExists        ALREADY_EXISTS
Denied               PERMISSION_DENIED      ask an administrator; UNAUTHENTICATED: show who it is
Busy                 RESOURCE_EXHAUSTED     wait as long as the detail says, and try again
AskElsewhere         FAILED_PRECONDITION    ask one of the addresses in the detail
StoreUnavailable     UNAVAILABLE            try again: nothing was changed
RuntimeUnavailable   UNAVAILABLE            the same
OutcomeUnknown       ABORTED                read back: it may have happened
Compacted            OUT_OF_RANGE           list again
Fenced               UNAVAILABLE            ask another node
InvariantViolation   INTERNAL               report it; the node's log has the whole story
anything else        INTERNAL               the same
===================  =====================  ===========================================================
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio

from spinetta.errors import (
    AlreadyExists,
    AskElsewhere,
    Busy,
    Compacted,
    Denied,
    Fenced,
    InvariantViolation,
    NotFound,
    OutcomeUnknown,
    RuntimeUnavailable,
    SpinettaError,
    StoreUnavailable,
    UserError,
)
from spinetta.node.hub import closing
from spinetta.v1 import api_pb2 as api

T = TypeVar("T")
log = logging.getLogger(__name__)

DETAIL_KEY = "spinetta-error-bin"
_TEXT_CHARS_MAX = 1000  # gRPC refuses trailers beyond 8 kB
_ADDRESSES_MAX = 8  # more voters than there can be

BY_REASON = {
    "ambiguous": grpc.StatusCode.FAILED_PRECONDITION,
    "no-log": grpc.StatusCode.NOT_FOUND,
    "not-started": grpc.StatusCode.FAILED_PRECONDITION,
    "not-running": grpc.StatusCode.FAILED_PRECONDITION,
    "cannot-start": grpc.StatusCode.FAILED_PRECONDITION,
    "shim-version": grpc.StatusCode.FAILED_PRECONDITION,
    "unreadable": grpc.StatusCode.FAILED_PRECONDITION,
    "log-unreadable": grpc.StatusCode.FAILED_PRECONDITION,
    "log-truncated": grpc.StatusCode.DATA_LOSS,
    "out-of-range": grpc.StatusCode.OUT_OF_RANGE,
    "corrupt": grpc.StatusCode.DATA_LOSS,
    "node-alive": grpc.StatusCode.FAILED_PRECONDITION,
    "node-unreachable": grpc.StatusCode.UNAVAILABLE,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "store-full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "ask-a-voter": grpc.StatusCode.FAILED_PRECONDITION,
    "ask-node": grpc.StatusCode.FAILED_PRECONDITION,
    "changed": grpc.StatusCode.FAILED_PRECONDITION,
}


class Context(Protocol):
    """What is used of a gRPC context."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> NoReturn:
        """End the call with an error."""
        ...


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS_MAX else text[: _TEXT_CHARS_MAX - 1] + "…"


def describe(error: SpinettaError) -> tuple[grpc.StatusCode, api.ErrorDetail]:
    """The status and the detail of an error."""
    code, reason = _code(error)
    if isinstance(error, UserError):
        detail = api.ErrorDetail(
            field=_short(error.field), reason=reason, message=_short(error.message), hint=_short(error.hint)
        )
        if isinstance(error, Busy):
            detail.retry_after_s = error.retry_after_s
        elif isinstance(error, AskElsewhere):
            detail.addresses.extend(error.addresses[:_ADDRESSES_MAX])
            detail.object = error.object
        return code, detail
    if isinstance(error, StoreUnavailable | OutcomeUnknown) and error.hint:
        hint = error.hint
    else:
        hint = {
            "outcome-unknown": "it may have happened: read back before trying again",
            "compacted": "list again, and watch from the revision of that list",
            "fenced": "ask another node",
            "bug": "please report it with the log of the node",
        }.get(reason, "nothing was changed: try again")
    return code, api.ErrorDetail(reason=reason, message=_short(str(error)), hint=hint)


def _code(error: SpinettaError) -> tuple[grpc.StatusCode, str]:
    match error:
        case NotFound():
            return grpc.StatusCode.NOT_FOUND, error.reason
        case AlreadyExists():
            return grpc.StatusCode.ALREADY_EXISTS, error.reason
        case Denied():
            return BY_REASON.get(error.reason, grpc.StatusCode.PERMISSION_DENIED), error.reason
        case UserError():
            return BY_REASON.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT), error.reason
        case StoreUnavailable():
            return grpc.StatusCode.UNAVAILABLE, error.reason
        case RuntimeUnavailable():
            return grpc.StatusCode.UNAVAILABLE, "unavailable"
        case OutcomeUnknown():
            return grpc.StatusCode.ABORTED, "outcome-unknown"
        case Compacted():
            return grpc.StatusCode.OUT_OF_RANGE, "compacted"
        case Fenced():
            return grpc.StatusCode.UNAVAILABLE, "fenced"
        case _:
            return grpc.StatusCode.INTERNAL, "bug"


async def refuse(context: Context, error: Exception) -> NoReturn:
    """End the call with what `error` means for the caller."""
    if isinstance(error, grpc.aio.AioRpcError):  # another node's answer, passed on as it is
        detail = next((v for k, v in error.trailing_metadata() or () if k == DETAIL_KEY), None)
        extra = ((DETAIL_KEY, detail),) if isinstance(detail, bytes) else ()
        await context.abort(error.code(), error.details() or "", extra)
    if not isinstance(error, SpinettaError):
        log.error("a call failed in a way nobody thought of", exc_info=error)
        error = InvariantViolation("the node met an error nobody thought of")
    elif isinstance(error, InvariantViolation):
        log.critical("invariant violated: %s", error, exc_info=error)
        error = InvariantViolation("the node found a contradiction in the cluster's records")
    code, detail_message = describe(error)
    text = detail_message.message
    if detail_message.field:
        text = f"{detail_message.field}: {text}"
    if detail_message.hint:
        text = f"{text} ({detail_message.hint})"
    await context.abort(code, _short(text), ((DETAIL_KEY, detail_message.SerializeToString()),))


def busy(what: str, limit: int) -> Busy:
    """A limit on what is open at once has been reached."""
    return Busy(
        f"this node already serves {limit} {what}", retry_after_s=1.0, hint="try again later or at another node"
    )


async def answer(context: Any, call: Awaitable[T]) -> T:
    """Await a call that needs no right; its errors end the RPC with a status. All others go through the `Desk`."""
    try:
        return await call
    except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the client gets a status, the log the rest
        await refuse(context, error)


async def stream(context: Any, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Pass on a stream; its errors end the RPC with a status."""
    try:
        async with closing(items):
            async for item in items:
                yield item
    except Exception as error:  # noqa: BLE001 - as in `answer`
        await refuse(context, error)
