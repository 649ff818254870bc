"""What of a task is sealed when it carries a clearance label: taken out of a specification, and put back.

Also the *purposes* that sealed things are bound to: a box opens only under the purpose that it was sealed for, so none
can be moved to another task, owner or set of labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from google.protobuf.message import DecodeError

from spinetta.access import Envelope
from spinetta.errors import CorruptRecord
from spinetta.model import TaskSpec
from spinetta.v1 import record_pb2 as pb


def framed(*parts: str) -> bytes:
    """Texts as bytes that no other texts give: each behind its length."""
    raw = [part.encode() for part in parts]
    return b"".join(len(r).to_bytes(4, "big") + r for r in raw)


def task_purpose(task_id: str, labels: Iterable[str]) -> bytes:
    """What the payload of a task is sealed for."""
    return framed("task", task_id, *sorted(labels))


def secret_purpose(owner: str, name: str, labels: Iterable[str]) -> bytes:
    """What the content of a secret is sealed for; the same for all of its versions."""
    return framed("secret", owner, name, *sorted(labels))


def encode_payload(spec: TaskSpec) -> bytes:
    """What is to be sealed of a specification."""
    return pb.SealedPayload(
        name=spec.name,
        labels=dict(spec.labels),
        command=spec.command,
        env=dict(spec.env),
        working_directory=spec.working_directory,
    ).SerializeToString(deterministic=True)


def hollow(spec: TaskSpec, envelope: Envelope) -> TaskSpec:
    """The specification with its payload in the envelope only."""
    return replace(spec, command=(), env=(), working_directory="", name="", labels=(), sealed=envelope)


def with_payload(spec: TaskSpec, data: bytes) -> TaskSpec:
    """The specification with what was opened put back: to be run, never to be stored.

    Raises:
        CorruptRecord: it is no payload. The message tells nothing of what is in it.
    """
    try:
        m = pb.SealedPayload.FromString(data)
    except DecodeError:
        raise CorruptRecord("what was sealed is not the payload of a task") from None
    return replace(
        spec,
        command=tuple(m.command),
        env=tuple(sorted(m.env.items())),
        working_directory=m.working_directory,
        name=m.name,
        labels=tuple(sorted(m.labels.items())),
        sealed=None,
    )


def comparable(spec: TaskSpec) -> TaskSpec:
    """What two submits of the same task have in common: its key's shares may have been sealed anew meanwhile."""
    return spec if spec.sealed is None else replace(spec, sealed=replace(spec.sealed, shares=()))
