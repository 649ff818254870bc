"""What another node's refusal means for this node."""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from spinetta.errors import Denied, OutcomeUnknown, SpinettaError, StoreUnavailable, UserError
from spinetta.node.services.errors import DETAIL_KEY
from spinetta.v1 import api_pb2 as api

_Code = grpc.StatusCode
_TRY_AGAIN = frozenset({_Code.UNAVAILABLE, _Code.CANCELLED, _Code.INTERNAL, _Code.UNKNOWN, _Code.RESOURCE_EXHAUSTED})
_UNKNOWN = frozenset({_Code.ABORTED, _Code.DEADLINE_EXCEEDED})
_REFUSED = frozenset({_Code.PERMISSION_DENIED, _Code.UNAUTHENTICATED})


def error_of(error: grpc.aio.AioRpcError, address: str) -> SpinettaError:
    """A failed call to the node at `address` as one of our errors.

    `OutcomeUnknown`: no answer came. `StoreUnavailable`: try again, or another node. `Denied`, `UserError`: what was
    asked for is refused, with the node's words.
    """
    code, detail = error.code(), _detail(error)
    text = detail.message if detail else (error.details() or code.name.lower())
    if code in _REFUSED:
        return Denied(
            text,
            field=detail.field if detail else "",
            hint=detail.hint if detail else "",
            reason=detail.reason if detail else "denied",
        )
    if code in _UNKNOWN:
        return OutcomeUnknown(f"node at {address}: {text}")
    if code in _TRY_AGAIN:
        return StoreUnavailable(f"node at {address}: {text}")
    if code is _Code.UNIMPLEMENTED:
        return UserError(f"node at {address} does not know this call", hint="is it of the same version?")
    if detail is None:
        return UserError(f"node at {address} refuses: {text}")
    return UserError(text, field=detail.field, hint=detail.hint, reason=detail.reason)


def _detail(error: grpc.aio.AioRpcError) -> api.ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return api.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None
