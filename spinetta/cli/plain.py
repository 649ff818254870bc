"""Stored values as plain data, for people and for jq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from spinetta import keys
from spinetta.codec import parse
from spinetta.errors import UserError
from spinetta.v1 import record_pb2 as pb

_BY_PREFIX: tuple[tuple[str, Callable[[], Message]], ...] = (
    (keys.TASK, pb.Task),
    (keys.QUEUED, pb.QueueHint),
    (keys.BLOCKED, pb.QueueHint),
    (keys.RUNNING, pb.Holding),
    (keys.NODE, pb.Node),
    (keys.INCARNATION, pb.Incarnation),
    (keys.OFFICE, pb.Office),
    (keys.GENERATION, pb.Generation),
    (keys.BACKUP, pb.Backup),
    (keys.ACL_NODE, pb.NodeAcl),
    (keys.ACL_USER, pb.UserAcl),
    (keys.ACL_GROUP, pb.GroupAcl),
    (keys.TOKEN, pb.TokenRecord),
    (keys.REQUEST, pb.JoinRequestRecord),
    (keys.POLICY, pb.Policy),
    (keys.AUTHORITY, pb.Authorities),
    (keys.LABEL, pb.LabelKey),
    (keys.SECRET, pb.SecretRecord),  # sealed
)
TYPES: dict[str, Callable[[], Message]] = {
    "task": pb.Task,
    "queued": pb.QueueHint,
    "running": pb.Holding,
    "node": pb.Node,
    "incarnation": pb.Incarnation,
    "office": pb.Office,
    "generation": pb.Generation,
    "backup": pb.Backup,
    "node-acl": pb.NodeAcl,
    "user-acl": pb.UserAcl,
    "group-acl": pb.GroupAcl,
    "token": pb.TokenRecord,
    "request": pb.JoinRequestRecord,
    "policy": pb.Policy,
    "authority": pb.Authorities,
    "label": pb.LabelKey,
    "secret": pb.SecretRecord,
}


def to_dict(key_or_type: str, data: bytes) -> dict[str, Any]:
    """A stored value as plain data for printing, by its key or by a name of `TYPES`.

    Raises:
        UserError: nothing of ours is stored under such a key.
        CorruptRecord: the value is not of that type.
    """
    make = TYPES.get(key_or_type)
    if make is None:
        make = next((m for prefix, m in _BY_PREFIX if key_or_type.startswith(prefix)), None)
    if make is None:
        raise UserError(
            f"no record is stored under {key_or_type!r}",
            field="key",
            hint=f"a key of ours, or one of {', '.join(TYPES)}",
        )
    return _message_to_dict(parse(make(), data, f"the value of {key_or_type}"))


def _message_to_dict(message: Message) -> dict[str, Any]:
    """A message as plain data: field names as in the .proto files, 64-bit numbers as numbers, not strings."""
    plain: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return {k: _numbers(message, k, v) for k, v in plain.items()}


_INT64 = frozenset({3, 4, 6, 16, 18})  # descriptor types (U)INT64, FIXED64, SFIXED64, SINT64: strings in JSON


def _numbers(message: Message, name: str, value: Any) -> Any:
    """Undo protobuf's JSON rule of 64-bit integers as strings: Python and jq both read them as they are."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        is_number = field.message_type.fields_by_name["value"].type in _INT64
        return {k: int(v) if is_number else v for k, v in value.items()}
    if field.message_type is not None:
        inner = getattr(message, name)
        if isinstance(value, list):
            return [{k: _numbers(i, k, x) for k, x in v.items()} for i, v in zip(inner, value, strict=True)]
        return {k: _numbers(inner, k, x) for k, x in value.items()}
    if field.type in _INT64:
        return [int(v) for v in value] if isinstance(value, list) else int(value)
    return value
