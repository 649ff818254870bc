"""Every guard of `spinetta.txn`, found by looking: each function that makes a transaction is called with made-up
arguments, and what guards its result is listed. A new function, or a new guard, is found without being told of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spinetta import keys, txn
from spinetta.model import LeaseId, NodeId, Revision, TaskId

_MADE_UP: dict[str, Any] = {
    "NodeId": NodeId("N"),
    "TaskId": TaskId("U"),
    "LeaseId": LeaseId(1),
    "Revision": Revision(7),
    "bytes": b"",
    "str": keys.queued(TaskId("U")),
    "Guard": txn.RevisionIs(keys.acl_user("WHO"), Revision(7)),
}
_HELPERS = {"batch", "size_bytes", "leading", "life_guard", "rights_guard"}  # they add no guard of their own


@dataclass(frozen=True, slots=True)
class Found:
    """One guard. `owner` and `index` name it, as in ``condemn[2]``; `guard` is what it asks for."""

    owner: str
    index: int
    guard: txn.Guard

    @property
    def name(self) -> str:
        """As it is told in the documents."""
        return f"{self.owner}[{self.index}]"

    def text(self) -> str:
        """What it asks for, in words; N stands for the node, U for the task."""
        match self.guard:
            case txn.Absent(key):
                return f"`{key}` does not exist"
            case txn.CreatedAt(key):
                return f"`{key}` is the one that was created then"
            case txn.RevisionIs(key):
                return f"`{key}` has not been written since it was read"
            case txn.NoneUnder(prefix):
                return f"nothing under `{prefix}`"


def made_up(annotation: str) -> Any:
    """A value of a type by its name, as the functions of `txn` spell it."""
    annotation = annotation.strip()
    if annotation in _MADE_UP:
        return _MADE_UP[annotation]
    for sequence in ("Sequence[", "tuple["):
        if annotation.startswith(sequence):
            return (made_up(annotation[len(sequence) : -1].split(",")[0]),)
    kind: Any = getattr(txn, annotation, None)
    if not hasattr(kind, "__dataclass_fields__"):
        raise LookupError(f"tests/sim/enumerated.py does not know how to make up a {annotation}")
    return kind(*(made_up(str(f.type)) for f in dataclasses.fields(kind)))


def _call(function: Callable[..., Any], *first: Any) -> Any:
    parameters = list(inspect.signature(function).parameters.values())[len(first) :]
    return function(*first, *(made_up(str(p.annotation)) for p in parameters))


def functions() -> dict[str, Callable[..., Any]]:
    """What makes transactions or their outer guards, by name; methods with the name of their class."""
    found: dict[str, Callable[..., Any]] = {}
    for name, thing in vars(txn).items():
        if getattr(thing, "__module__", "") != txn.__name__ or name.startswith("_") or name in _HELPERS:
            continue
        if inspect.isfunction(thing):
            found[name] = thing
        elif inspect.isclass(thing) and hasattr(thing, "guards"):
            found[f"{name}.guards"] = thing.guards
    return found


def guards() -> list[Found]:
    """All of them, in the order of the module; those nested as ``NAME each[INDEX]``, then ``NAME each 2[INDEX]``."""
    found: list[Found] = []
    for name, function in functions().items():
        cls, _, method = name.partition(".")
        made = _call(function, made_up(cls)) if method else _call(function)
        if isinstance(made, txn.Txn):
            found += [Found(name, i, g) for i, g in enumerate(made.when)]
            for n, each in enumerate(made.nested, 1):
                sort = f"{name} each" + (f" {n}" if n > 1 else "")
                found += [Found(sort, i, g) for i, g in enumerate(each.when)]
        else:
            found += [Found(name, i, g) for i, g in enumerate(made)]
    return found
