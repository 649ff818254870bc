"""Submit: many tasks in few transactions, and the same submit again changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from spinetta import codec, keys, lifecycle, messages, names, payload, txn, validate
from spinetta.errors import AlreadyExists, Denied, InvariantViolation, OutcomeUnknown, StoreUnavailable
from spinetta.model import QueueHint, Task, TaskSpec
from spinetta.node.health import SAME_IDS, StoreHealth
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup
from spinetta.node.services.desk import Asked, short_list
from spinetta.node.services.portions import portions
from spinetta.node.services.sealing import seal_or_refuse
from spinetta.rights import Call, CallerKind
from spinetta.trust.backoff import Backoff
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
    half way, the same call again finishes it. What is written is guarded by the caller's rights, so one that loses them
    meanwhile writes nothing more.
    """

    def __init__(self, port: NodePort, health: StoreHealth | None = None) -> None:
        self._port = port
        self._health = health

    async def submit(self, request: api.SubmitRequest, asked: Asked) -> api.SubmitResponse:
        """Answers once every task is in the store. A task that names no owner belongs to the user who submits it.

        Raises:
            Denied: the caller may not submit for an owner, or is not cleared for a label.
            Busy: it has submitted too many lately; nothing was written.
            UserError: a specification cannot be taken; nothing was written.
            AlreadyExists: an id belongs to another task; those before it have been written.
            StoreUnavailable: nothing was written.
            OutcomeUnknown: some have been written, or may have been: submit again.
        """
        asked.subject = short_list([t.id for t in request.tasks[: validate.SUBMIT_TASKS_MAX]])
        await asked.count_tasks(len(request.tasks))
        try:
            return await self._submit(await self._entries(request, asked), asked)
        except OutcomeUnknown as e:
            e.hint = e.hint or SAME_IDS
            raise

    async def _submit(self, entries: Sequence[_Entry], asked: Asked) -> api.SubmitResponse:
        await self._check_room(entries)
        existed: dict[int, bool] = {}
        for chunk in portions(entries, lambda e: e.size_bytes):
            try:
                existed.update(await self._settle(chunk, asked))
            except (StoreUnavailable, Denied) as e:
                if not existed:
                    raise
                raise OutcomeUnknown(f"{len(existed)} of the tasks have been submitted, the others not: {e}") from e
        return api.SubmitResponse(
            tasks=[api.Submitted(id=e.task.id, existed=existed[e.index]) for e in entries],
        )

    async def _check_room(self, entries: Sequence[_Entry]) -> None:
        """See that the store has room for what is new. Renewals and the ends of tasks are in need of the rest.

        Raises:
            UserError: it has not (``store-full``); nothing was written.
        """
        size_bytes = sum(e.size_bytes for e in entries)
        refusal = await self._health.room_for_submits(size_bytes) if self._health is not None else None
        if refusal is None:
            return
        found = await lookup.read_all(self._port.store, [keys.task(e.task.id) for e in entries])
        if any(found.get(keys.task(e.task.id)) is None for e in entries):
            raise refusal

    async def _entries(self, request: api.SubmitRequest, asked: Asked) -> list[_Entry]:
        specs: list[TaskSpec] = []
        for i, message in enumerate(request.tasks[: validate.SUBMIT_TASKS_MAX + 1]):
            spec = messages.spec_from_pb(message)
            if not spec.owner and asked.caller.kind is CallerKind.USER:
                spec = dataclasses.replace(spec, owner=asked.caller.name)
            specs.append(spec)
            if i % _CONVERTED_PER_TURN == _CONVERTED_PER_TURN - 1:
                await asyncio.sleep(0)
        for i, spec in enumerate(specs):
            names.check_owner(spec.owner, f"tasks[{i}].owner")
        for owner, clearance in {(spec.owner, spec.clearance): None for spec in specs}:
            await asked.check(owner=owner, clearance=clearance)
        specs = await seal_or_refuse(specs, self._port)
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

    async def _settle(self, chunk: Sequence[_Entry], asked: Asked) -> dict[int, bool]:
        """Write the entries of one transaction; which of them existed before."""
        existed: dict[int, bool] = {}
        unknown: OutcomeUnknown | None = None
        wait = Backoff(limits.TRY_WAIT_S, limits.TRY_WAIT_MAX_S)
        for _ in range(limits.TRIES_MAX):
            try:
                result = await self._port.store.commit(txn.batch([e.txn for e in chunk], asked.caller.guards))
            except OutcomeUnknown as e:
                unknown, lost = e, list(chunk)
                await wait.pause()
            except StoreUnavailable as e:
                if unknown is None:
                    raise
                raise OutcomeUnknown("some of the tasks may have been submitted") from e
            else:
                if isinstance(result, txn.Committed):
                    asked.revision = result.revision
                    existed.update((e.index, False) for e, done in zip(chunk, result.nested, strict=True) if done)
                    lost = [e for e, done in zip(chunk, result.nested, strict=True) if not done]
                else:  # the caller's rights have changed; nothing was written
                    lost = list(chunk) if unknown else []
                    await self._look_again(asked, unknown)
                    if not lost:
                        continue
            chunk = await self._read_back(lost, existed, asked, unsure=unknown)
            if not chunk:
                return existed
        raise unknown or StoreUnavailable(f"task {chunk[0].task.id} comes and goes")

    @staticmethod
    async def _look_again(asked: Asked, unknown: OutcomeUnknown | None) -> None:
        try:
            await asked.again()
        except Denied as e:
            if unknown is None:
                raise
            raise OutcomeUnknown(f"some of the tasks may have been submitted before this: {e}") from e

    async def _read_back(
        self, lost: Sequence[_Entry], existed: dict[int, bool], asked: Asked, *, unsure: OutcomeUnknown | None
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
            _check_same(entry, stored, may_see=asked.may(Call.PAYLOAD, stored.spec.owner))
            # After a lost answer the record may be our own: the same clock and node say so.
            ours = unsure is not None and (stored.submitted_ms, stored.submitted_at_node) == (
                entry.task.submitted_ms,
                entry.task.submitted_at_node,
            )
            existed[entry.index] = not ours
        return todo


def _check_same(entry: _Entry, stored: Task, *, may_see: bool) -> None:
    asked, there = payload.comparable(entry.task.spec), payload.comparable(stored.spec)
    if asked == there:
        return
    if not may_see:  # in what they differ would tell what it runs
        raise AlreadyExists(
            f"task {asked.id} belongs to somebody else", field=f"tasks[{entry.index}].id", hint="use a new id"
        )
    part = _difference(asked, there)
    if part == "sealed" and asked.sealed is not None and there.sealed is not None:
        raise AlreadyExists(
            f"task {asked.id} exists, and whether with the same payload cannot be told: it is sealed",
            field=f"tasks[{entry.index}].sealed",
            hint="use a new id for a new task",
        )
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
