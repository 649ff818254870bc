"""Submit: many tasks in few transactions, and the same submit again changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from spinetta import codec, keys, lifecycle, txn, validate
from spinetta.errors import AlreadyExists, InvariantViolation, OutcomeUnknown, StoreUnavailable
from spinetta.model import QueueHint, Task, TaskSpec
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup
from spinetta.node.services.portions import portions
from spinetta.v1 import api_pb2 as api

_CONVERTED_PER_TURN = 100  # specifications checked before other calls get a turn: about 5 ms


@dataclass(frozen=True, slots=True)
class _Entry:
    index: int
    task: Task
    txn: txn.Txn
    size_bytes: int


class Submitter:
    """Puts tasks into the queue.

    Nothing is written unless every specification is good. After that each task stands for itself: when the call fails
    half way, the same call again finishes it.
    """

    def __init__(self, port: NodePort) -> None:
        self._port = port

    async def submit(self, request: api.SubmitRequest) -> api.SubmitResponse:
        """Answers once every task is in the store.

        Raises:
            UserError: a specification cannot be taken; nothing was written.
            AlreadyExists: an id belongs to another task; those before it have been written.
            StoreUnavailable: nothing was written.
            OutcomeUnknown: some have been written, or may have been: submit again.
        """
        entries = await self._entries(request)
        existed: dict[int, bool] = {}
        for chunk in portions(entries, lambda e: e.size_bytes):
            try:
                existed.update(await self._settle(chunk))
            except StoreUnavailable as e:
                if not existed:
                    raise
                raise OutcomeUnknown(f"{len(existed)} of the tasks have been submitted, the others not") from e
        return api.SubmitResponse(
            tasks=[api.Submitted(id=e.task.id, existed=existed[e.index]) for e in entries],
        )

    async def _entries(self, request: api.SubmitRequest) -> list[_Entry]:
        specs: list[TaskSpec] = []
        for i, message in enumerate(request.tasks[: validate.SUBMIT_TASKS_MAX + 1]):
            specs.append(codec.spec_from_pb(message))
            if i % _CONVERTED_PER_TURN == _CONVERTED_PER_TURN - 1:
                await asyncio.sleep(0)
        validate.check_submit(specs, grace_min_s=self._port.grace_min_s)
        now_ms = self._port.wall_ms()
        out = []
        for i, spec in enumerate(specs):
            task = lifecycle.submitted(spec, now_ms=now_ms, at_node=self._port.name)
            record, hint = codec.encode_task(task), codec.encode_hint(QueueHint.of(spec))
            size = len(record) + len(hint) + 200  # and two keys
            out.append(_Entry(i, task, txn.submit(task.id, record, hint), size))
            if i % _CONVERTED_PER_TURN == _CONVERTED_PER_TURN - 1:
                await asyncio.sleep(0)
        return out

    async def _settle(self, chunk: Sequence[_Entry]) -> dict[int, bool]:
        """Write the entries of one transaction; which of them existed before."""
        existed: dict[int, bool] = {}
        unknown: OutcomeUnknown | None = None
        for n in range(limits.TRIES_MAX):
            try:
                result = await self._port.store.commit(txn.batch([e.txn for e in chunk]))
            except OutcomeUnknown as e:
                unknown, lost = e, list(chunk)
                await asyncio.sleep(limits.TRY_WAIT_S * 2**n)
            except StoreUnavailable as e:
                if unknown is None:
                    raise
                raise OutcomeUnknown("some of the tasks may have been submitted") from e
            else:
                if not isinstance(result, txn.Committed):
                    raise InvariantViolation(f"a transaction without guards conflicted at {result.revision}")
                existed.update((e.index, False) for e, done in zip(chunk, result.nested, strict=True) if done)
                lost = [e for e, done in zip(chunk, result.nested, strict=True) if not done]
            chunk = await self._read_back(lost, existed, unsure=unknown)
            if not chunk:
                return existed
        raise unknown or StoreUnavailable(f"task {chunk[0].task.id} comes and goes")

    async def _read_back(
        self, lost: Sequence[_Entry], existed: dict[int, bool], *, unsure: OutcomeUnknown | None
    ) -> list[_Entry]:
        """Which of these are still to be written; what is there already goes into `existed`."""
        if not lost:
            return []
        try:
            found = await lookup.read_all(self._port.store, [keys.task(e.task.id) for e in lost])
        except StoreUnavailable as e:
            if unsure is None:
                raise
            raise OutcomeUnknown("some of the tasks may have been submitted") from e
        todo = []
        for entry in lost:
            there = found.get(keys.task(entry.task.id))
            if there is None:
                todo.append(entry)
                continue
            stored = codec.decode_task(there.value)
            _check_same(entry, stored)
            # After a lost answer the record may be our own: the same clock and node say so.
            ours = unsure is not None and (stored.submitted_ms, stored.submitted_at_node) == (
                entry.task.submitted_ms,
                entry.task.submitted_at_node,
            )
            existed[entry.index] = not ours
        return todo


def _check_same(entry: _Entry, stored: Task) -> None:
    asked, there = entry.task.spec, stored.spec
    if asked == there:
        return
    part = _difference(asked, there)
    raise AlreadyExists(
        f"task {asked.id} exists with another {part.split('.')[-1]}",
        field=f"tasks[{entry.index}].{part}",
        hint="use a new id for a new task",
    )


def _difference(a: TaskSpec, b: TaskSpec) -> str:
    for f in dataclasses.fields(TaskSpec):
        if getattr(a, f.name) == getattr(b, f.name):
            continue
        if f.name == "resources":
            for r in dataclasses.fields(a.resources):
                if getattr(a.resources, r.name) != getattr(b.resources, r.name):
                    return f"resources.{r.name}"
        return f.name
    raise InvariantViolation(f"specifications differ in no field: {a} {b}")
