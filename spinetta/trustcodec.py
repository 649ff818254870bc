"""The records of trust to bytes and back. As in `codec`, unknown fields of a newer version are dropped on a rewrite."""

from __future__ import annotations

import enum
import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from spinetta import access
from spinetta.errors import CorruptRecord
from spinetta.v1 import record_pb2 as pb

T = TypeVar("T")

_MESSAGES: dict[type, type[Message]] = {
    access.Limits: pb.Limits,
    access.NodeAcl: pb.NodeAcl,
    access.UserAcl: pb.UserAcl,
    access.GroupAcl: pb.GroupAcl,
    access.TokenRecord: pb.TokenRecord,
    access.JoinRequest: pb.JoinRequestRecord,
    access.GroupMapping: pb.GroupMapping,
    access.Issuer: pb.Issuer,
    access.Policy: pb.Policy,
    access.Wrap: pb.Wrap,
    access.AuthorityEntry: pb.Authorities.Entry,
    access.Authorities: pb.Authorities,
    access.LabelGeneration: pb.LabelKey.Generation,
    access.LabelKey: pb.LabelKey,
    access.SealedKeyShare: pb.SealedKeyShare,
    access.Envelope: pb.Envelope,
    access.SecretRecord: pb.SecretRecord,
}


def to_pb(value: Any) -> Any:
    """A record of `access` as its message. Their fields have the same names, which a test holds them to."""
    return _MESSAGES[type(value)](**{f.name: _plain(getattr(value, f.name)) for f in fields(value)})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_pb(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, enum.IntEnum) else value


def from_pb(kind: type[T], message: Any) -> T:
    """The record of `access` that a message tells of.

    Raises:
        ValueError: it holds a role or state that this version does not know.
    """
    return kind(**{name: _typed(hint, getattr(message, name)) for name, hint in _hints(typing.cast(Any, kind)).items()})


@functools.cache  # looking them up takes four times as long as all the rest; there are as many as records
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_typed(inner, item) for item in value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        if issubclass(hint, enum.IntEnum):
            return hint(value)
        if is_dataclass(hint):
            return from_pb(hint, value)
    return value


def encode(value: Any) -> bytes:
    """A stored value: of ``/acl/…``, ``/trust/…`` or ``/secret/…``."""
    return bytes(to_pb(value).SerializeToString(deterministic=True))


def decode(kind: type[T], data: bytes) -> T:
    """A stored value.

    Raises:
        CorruptRecord: it is not of that kind. Never to be taken for *no record*.
    """
    try:
        message = _MESSAGES[kind]()
        message.ParseFromString(data)
        return from_pb(kind, message)
    except (DecodeError, ValueError) as e:
        raise CorruptRecord(f"a record of kind {kind.__name__} cannot be read: {e}") from e


def envelope_to_pb(value: access.Envelope) -> pb.Envelope:
    """Part of a task's specification."""
    return typing.cast(pb.Envelope, to_pb(value))


def envelope_from_pb(message: pb.Envelope) -> access.Envelope:
    """Part of a task's specification."""
    return from_pb(access.Envelope, message)
