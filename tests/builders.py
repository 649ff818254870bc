"""Values for tests: sensible defaults, everything overridable, nothing random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spinetta.client.containers import read_mounts
from spinetta.events import Entry, attempt_key
from spinetta.model import (
    ContainerSpec,
    Exit,
    Holding,
    IncarnationId,
    LeaseId,
    NodeId,
    NodeRecord,
    Outcome,
    QueueHint,
    Reason,
    Resources,
    Revision,
    State,
    Task,
    TaskId,
    TaskSpec,
)
from spinetta.queue import Waiting
from spinetta.settings import AgentSettings

GIB = 1 << 30
BIG = Resources.of(cpu_millis=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB)


def task_id(n: int) -> TaskId:
    """The n-th id of a cluster: UUIDs of version 7 in their canonical form, ordered as submitted."""
    return TaskId(f"{n:08x}-0000-7000-8000-{n:012x}")


def node_id(n: int) -> NodeId:
    return NodeId(f"n{n}")


def cpus(n: float, memory_bytes: int = 0, **countables: int) -> Resources:
    return Resources.of(cpu_millis=int(n * 1000), memory_bytes=memory_bytes, countables=countables)


def spec(n: int = 1, resources: Resources | None = None, **fields: Any) -> TaskSpec:
    return TaskSpec(
        id=task_id(n), command=("/bin/true",), resources=cpus(1) if resources is None else resources, **fields
    )


def queued(n: int = 1, **fields: Any) -> Task:
    return Task(spec(n, **fields), State.QUEUED, submitted_ms=1000)


def contained(image: str = "tools", **fields: Any) -> ContainerSpec:
    return ContainerSpec(image, **fields)


def mounted(*texts: str) -> ContainerSpec:
    """A container with these mounts, as people write them."""
    return contained(mounts=read_mounts(texts))


def hint(resources: Resources | None = None, **fields: Any) -> QueueHint:
    return QueueHint(cpus(1) if resources is None else resources, **fields)


def waiting(n: int, resources: Resources | None = None, *, seen_at_s: float = 0.0, **fields: Any) -> Waiting:
    wait_s = fields.pop("wait_s", None)
    return Waiting(task_id(n), Revision(n), hint(resources, **fields), seen_at_s, wait_s)


def node_record(name: str = "n1", capacity: Resources = BIG, tags: Sequence[str] = (), **fields: Any) -> NodeRecord:
    fields.setdefault("free", capacity)
    fields.setdefault("incarnation", IncarnationId(f"life-of-{name}"))
    return NodeRecord(NodeId(name), f"{name}:7000", capacity=capacity, tags=tuple(sorted(tags)), **fields)


def settings(name: str = "n1", capacity: Resources = BIG, tags: Sequence[str] = (), **fields: Any) -> AgentSettings:
    """Short times, so that simulated worlds are small: a lease of 3 s, a grace of 8 s, a margin of 1 s."""
    record = node_record(name, capacity, tags, free=Resources(), incarnation=IncarnationId(""))
    fields.setdefault("boot_id", f"boot-of-{name}")
    fields.setdefault("lease_ttl_s", 3)
    fields.setdefault("grace_s", 8.0)
    fields.setdefault("kill_margin_s", 1.0)
    fields.setdefault("reconcile_s", 20.0)
    return AgentSettings(record, **fields)


def entry(key: str, value: bytes = b"", created: int = 1, modified: int | None = None, lease: int = 0) -> Entry:
    return Entry(key, value, Revision(created), Revision(created if modified is None else modified), LeaseId(lease))


def holding(attempt: int = 1, incarnation: str = "life", grace_s: float = 8.0, **fields: Any) -> Holding:
    return Holding(attempt, IncarnationId(incarnation), grace_s, **fields)


def exit_code(code: int = 0) -> Exit:
    return Exit(Reason.EXIT, code, started_ms=2000, ended_ms=3000)


def key_of(n: int, attempt: int = 1) -> str:
    return attempt_key(task_id(n), attempt)


def outcomes(tasks: Mapping[TaskId, Task]) -> dict[TaskId, Outcome]:
    return {t: task.outcome for t, task in tasks.items()}
