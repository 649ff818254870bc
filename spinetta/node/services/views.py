"""Tasks as the API shows them, filters over them, and answers that fit into one message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from google.protobuf.message import DecodeError

from spinetta import validate
from spinetta.errors import CorruptRecord, UserError
from spinetta.node.services import limits
from spinetta.store.protocol import KeyValue
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb

log = logging.getLogger(__name__)

_PAYLOAD: tuple[Literal["command", "env", "working_directory", "sealed", "secrets"], ...] = (
    "command",
    "env",
    "working_directory",
    "sealed",
    "secrets",
)


def view(entry: KeyValue) -> api.TaskView:
    """A stored task. Whether its cancel has been requested is not in its record: see `lookup.add_holdings`.

    Raises:
        CorruptRecord: the value is no task.
    """
    try:
        task = pb.Task.FromString(entry.value)
    except DecodeError as e:
        raise CorruptRecord(f"the record under {entry.key} cannot be read: {e}") from e
    return api.TaskView(
        task=task,
        node=task.attempts[-1].node if task.attempts else "",
        revision=entry.modified,
    )


def readable(entry: KeyValue) -> api.TaskView | None:
    """As `view`, but None for a record that is no task: among many, one bad one must not hide the others."""
    try:
        return view(entry)
    except CorruptRecord as e:
        log.warning("left out of an answer: %s", e)
        return None


def is_complete(v: api.TaskView) -> bool:
    """The task has ended."""
    return v.task.state == pb.COMPLETE


class Wanted:
    """A filter, checked."""

    def __init__(self, f: api.Filter) -> None:
        """Check the filter.

        Raises:
            UserError: it contains something that can match nothing.
        """
        validate.check_filter(sorted(f.labels.items()), f.owner, f.name, f.node)
        for i, state in enumerate(f.states):
            if state not in pb.State.values() or state == pb.STATE_UNSPECIFIED:
                raise UserError(f"there is no state {state}", field=f"filter.states[{i}]", hint="1 to 4")
        for i, outcome in enumerate(f.outcomes):
            if outcome not in pb.Outcome.values():
                raise UserError(f"there is no outcome {outcome}", field=f"filter.outcomes[{i}]", hint="0 to 4")
        self.states = frozenset(f.states)
        self.node = f.node
        self.is_selective = bool(
            f.outcomes or f.labels or f.owner or f.name or f.node
        )  # most of what is read may not match
        self._outcomes = frozenset(f.outcomes)
        self._labels = dict(f.labels)
        self._owner = f.owner
        self._name = f.name

    def matches(self, v: api.TaskView) -> bool:
        """All that is asked for holds."""
        task = v.task
        return (
            (not self.states or task.state in self.states)
            and (not self._outcomes or task.outcome in self._outcomes)
            and (not self.node or v.node == self.node)
            and (not self._owner or task.spec.owner == self._owner)
            and (not self._name or task.spec.name == self._name)
            and all(task.spec.labels.get(k) == value for k, value in self._labels.items())
        )


def slim(v: api.TaskView) -> api.TaskView:
    """The same without the bulky parts: of the specification id, name and owner, of the attempts the last one."""
    out = api.TaskView()
    out.CopyFrom(v)
    out.task.spec.CopyFrom(pb.TaskSpec(id=v.task.spec.id, name=v.task.spec.name, owner=v.task.spec.owner))
    del out.task.attempts[:-1]
    out.spec_omitted = True
    return out


def fitting(views: Sequence[api.TaskView]) -> list[api.TaskView]:
    """The views, the later ones without their specification when all together would be too large to send."""
    out: list[api.TaskView] = []
    room = limits.ANSWER_BYTES_MAX
    for v in views:
        size = v.ByteSize() + 8
        out.append(v if size <= room else slim(v))
        room -= size
    return out


def packed(views: Iterable[api.TaskView]) -> Iterator[list[api.TaskView]]:
    """The views in portions that can be sent; never an empty one."""
    out: list[api.TaskView] = []
    room = limits.ANSWER_BYTES_MAX
    for v in views:
        size = v.ByteSize() + 8
        if out and size > room:
            yield out
            out, room = [], limits.ANSWER_BYTES_MAX
        out.append(v)
        room -= size
    if out:
        yield out


def withhold(views: Iterable[api.TaskView], may_see: Callable[[str], bool]) -> None:
    """Take out of each view what only some may see of others' tasks: what they run, and what went wrong in words.

    Args:
        views: changed in place.
        may_see: told the owner.
    """
    for v in views:
        if may_see(v.task.spec.owner):
            continue
        for field in _PAYLOAD:
            v.task.spec.ClearField(field)
        v.task.ClearField("message")
        for attempt in v.task.attempts:
            attempt.ClearField("message")
        v.withheld = True
