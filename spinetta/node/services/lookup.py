"""Finding tasks by id or by a unique fragment of one, with bounded work."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from spinetta import codec, keys, units, validate
from spinetta.errors import NotFound, UserError
from spinetta.model import NodeId, TaskId
from spinetta.node.port import NodePort
from spinetta.node.services import limits, ordered, views
from spinetta.store.protocol import KeyValue, Store
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb


async def read_all(store: Store, wanted: Collection[str]) -> dict[str, KeyValue]:
    """Those of the keys that exist. Read in groups, each at its own revision."""
    todo = list(wanted)
    found: dict[str, KeyValue] = {}
    for i in range(0, len(todo), limits.READ_KEYS):
        snapshot = await store.read(todo[i : i + limits.READ_KEYS])
        found.update((k, entry) for k, entry in snapshot.entries.items() if entry is not None)
    return found


def missing(fragment: str, field: str) -> NotFound:
    """The error for a task that is not there."""
    hint = "finished tasks leave the store some time after their end: see spinetta list --archived"
    if validate.is_task_id(fragment):
        age_s = time.time() - int(fragment[:8] + fragment[9:13], 16) / 1000
        hint = f"by its id it was submitted {units.format_duration(age_s)} ago; {hint}" if age_s >= 1 else hint
    return NotFound(f"there is no task {fragment}", field=field, hint=hint)


async def resolve(port: NodePort, texts: Sequence[str], *, limit: int, field: str = "ids") -> dict[TaskId, str]:
    """The ids that these ids or fragments mean, in their order, each once, with the field that named it.

    Whole ids are not looked up.

    Raises:
        NotFound: a fragment fits no task.
        UserError: a fragment fits several, cannot be part of an id, or there are none or too many.
    """
    fragments = validate.check_fragments(texts, field, limit)
    return await _resolve(port.store, {f"{field}[{i}]": f for i, f in enumerate(fragments)}, port.wall_ms())


async def resolve_one(port: NodePort, text: str, *, field: str = "id") -> TaskId:
    """As `resolve`, for a single one."""
    found = await _resolve(port.store, {field: validate.id_fragment(text, field)}, port.wall_ms())
    return next(iter(found))


async def _resolve(store: Store, fragments: Mapping[str, str], now_ms: int) -> dict[TaskId, str]:
    out: dict[TaskId, str] = {}
    recent: tuple[TaskId, ...] | None = None
    for where, fragment in fragments.items():
        if validate.is_task_id(fragment):
            out.setdefault(TaskId(fragment), where)
            continue
        page = await store.list(keys.TASK + fragment, limit=limits.CANDIDATES_MAX + 1, keys_only=True)
        hits = [keys.parse_task(e.key) for e in page.entries]
        if not hits and validate.may_be_suffix(fragment):
            if recent is None:
                found = await ordered.newest_first(
                    store, keys.TASK, before="", limit=limits.FRAGMENT_SCAN_MAX, now_ms=now_ms
                )
                recent = found.ids
            hits = [t for t in recent if validate.matches(fragment, t)]
        if not hits:
            raise missing(fragment, where)
        if len(hits) > 1:
            shown = ", ".join(hits[: limits.CANDIDATES_MAX])
            more = " and more" if len(hits) > limits.CANDIDATES_MAX else ""
            raise UserError(
                f"{fragment} fits {shown}{more}", field=where, reason="ambiguous", hint="give more of the id"
            )
        out.setdefault(hits[0], where)
    return out


async def read_views(store: Store, ids: Collection[TaskId]) -> dict[TaskId, api.TaskView]:
    """Those of the tasks that exist, with whether a cancel has been requested of those that run."""
    records = await read_all(store, [keys.task(i) for i in ids])
    out = {i: views.view(records[keys.task(i)]) for i in ids if keys.task(i) in records}
    await add_holdings(store, out.values())
    return out


async def add_holdings(store: Store, shown: Collection[api.TaskView]) -> None:
    """Fill in `cancel_requested` of running tasks. One that has moved on since keeps False."""
    running = {
        keys.running(NodeId(v.node), TaskId(v.task.spec.id)): v for v in shown if v.task.state == pb.RUNNING and v.node
    }
    for key, entry in (await read_all(store, running)).items():
        holding = codec.readable(codec.decode_holding, entry.value)
        running[key].cancel_requested = holding is not None and holding.cancel_requested
