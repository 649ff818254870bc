"""What goes into requests: arguments checked, and long lists cut into as many requests as they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from spinetta import messages, names, validate
from spinetta.errors import UserError
from spinetta.model import TaskSpec
from spinetta.v1 import api_pb2 as api

T = TypeVar("T")


def parse_nodes(nodes: str | Sequence[str]) -> tuple[str, ...]:
    """Addresses from ``"HOST:PORT,HOST:PORT"`` or a sequence.

    Raises:
        UserError: none, or one that is no address.
    """
    given = nodes.split(",") if isinstance(nodes, str) else list(nodes)
    found = tuple(dict.fromkeys(names.check_address(p, "nodes") for p in given if p.strip()))
    if not found:
        raise UserError("no node is named", field="nodes", hint="HOST:PORT, or several with commas between")
    return found


def node_or_empty(name: str) -> str:
    """A node's name, checked; empty: the node that is asked."""
    return names.check_node_name(name, "node") if name else ""


def check_fragments(ids: Sequence[str]) -> list[str]:
    """Ids of tasks, or beginnings of them.

    Raises:
        UserError: they are none.
    """
    if isinstance(ids, str):
        raise UserError("ids must be a list, not text", field="ids", hint=f"[{ids!r}]")
    return validate.check_fragments(ids, "ids", max(len(ids), 1))


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in order, so many at a time."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def submit_requests(specs: Sequence[TaskSpec]) -> Iterator[api.SubmitRequest]:
    """Requests that hold the tasks in order, each within the limits of number and size."""
    request, size = api.SubmitRequest(), 0
    for spec in specs:
        m = messages.spec_to_pb(spec)
        bytes_ = m.ByteSize() + 8
        if request.tasks and (
            len(request.tasks) == validate.SUBMIT_TASKS_MAX or size + bytes_ > validate.SUBMIT_BYTES_TARGET
        ):
            yield request
            request, size = api.SubmitRequest(), 0
        request.tasks.append(m)
        size += bytes_
    if request.tasks:
        yield request
