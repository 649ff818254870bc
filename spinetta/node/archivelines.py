"""Finished tasks as lines of JSON, for archives and for people with ``zcat`` and ``jq``."""

from __future__ import annotations

import base64
import binascii
import json
import re

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from spinetta import validate
from spinetta.v1 import record_pb2 as pb

ID_IN_LINE = slice(7, 43)
"""Where the id is in a line, which begins with it."""


def line_of(record: bytes, now_ms: int) -> bytes | None:
    """A line for the value of a task's key; None when it is no task.

    Fields that only a later version knows are kept, unread, as ``record``.
    """
    try:
        task = pb.Task.FromString(record)
    except DecodeError:
        return None
    if not validate.is_task_id(task.spec.id):
        return None
    line = {
        "id": task.spec.id,
        "archived_ms": now_ms,
        "task": json_format.MessageToDict(task, preserving_proto_field_name=True),
    }
    known = pb.Task()
    known.CopyFrom(task)
    known.DiscardUnknownFields()
    if known.ByteSize() != task.ByteSize():
        line["record"] = base64.b64encode(record).decode()
    return json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()


_TIME = re.compile(rb'","archived_ms":(\d{1,18})[,}]')


def archived_ms(line: bytes) -> int:
    """When it was archived, as the line tells; 0 when it does not."""
    found = _TIME.match(line, ID_IN_LINE.stop)
    return int(found[1]) if found is not None else 0


def record_of(line: bytes) -> bytes | None:
    """The value of a task's key again; None when the line is no task's."""
    try:
        found = json.loads(line)
        if "record" in found:
            return base64.b64decode(found["record"], validate=True)
        task = json_format.ParseDict(found["task"], pb.Task(), ignore_unknown_fields=True)
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error, json_format.ParseError):
        return None
    return task.SerializeToString() if task.spec.id.encode() == line[ID_IN_LINE] else None
