"""Cancel: waiting tasks at once, running ones through their holder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spinetta import codec, keys, lifecycle, txn, validate
from spinetta.errors import Denied, InvariantViolation, OutcomeUnknown, StoreUnavailable
from spinetta.model import Outcome, State, Task, TaskId
from spinetta.node.port import NodePort
from spinetta.node.services import limits, lookup
from spinetta.node.services.desk import Asked, short_list
from spinetta.node.services.portions import portions
from spinetta.store.protocol import READ_KEYS_MAX, KeyValue, Snapshot
from spinetta.trust.backoff import Backoff
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb

_GROUP = READ_KEYS_MAX // 3  # a task, its queue key and its blocked key in one read
_KEYS_BYTES = 1500  # of one transition: three keys, and a request with its reason
_REQUEST = b""  # in place of a record: the holder was asked


@dataclass(frozen=True, slots=True)
class _Move:
    """A transition tried for a task, and the record it would leave (None: the record stays)."""

    task: TaskId
    txn: txn.Txn
    record: bytes | None


class Canceller:
    """Cancels tasks.

    A waiting task is over once this answers: its queue key is gone by the same transaction, so no node can claim it
    any more. A running one has been asked to stop; its node does the rest, and if the node is lost, the leader will.
    """

    def __init__(self, port: NodePort) -> None:
        self._port = port

    async def cancel(self, request: api.CancelRequest, asked: Asked) -> api.CancelResponse:
        """Cancel each of the tasks; nothing is done unless all of them exist and the caller may cancel each.

        Raises:
            Denied: one is not the caller's to cancel.
            NotFound: one does not exist.
            StoreUnavailable: none was cancelled.
            OutcomeUnknown: some have been cancelled, or may have been: ask again.
        """
        validate.check_reason(request.reason)
        store = self._port.store
        ids = await lookup.resolve(self._port, request.ids, limit=validate.GET_IDS_MAX)
        present = await lookup.read_all(store, [keys.task(i) for i in ids])
        for task_id, field in ids.items():
            if keys.task(task_id) not in present:
                raise lookup.missing(task_id, field)
        asked.subject = short_list(list(ids))
        for owner in {codec.decode_task(entry.value).spec.owner: None for entry in present.values()}:
            await asked.check(owner=owner)
        answers: dict[TaskId, api.Cancelled] = {}
        for group in _groups(list(ids)):
            try:
                answers.update(await self._settle(group, ids, request.reason, asked))
            except (StoreUnavailable, Denied) as e:
                if not answers:
                    raise
                raise OutcomeUnknown(f"{len(answers)} of the tasks have been cancelled, the others not: {e}") from e
        return api.CancelResponse(tasks=[answers[i] for i in ids])

    async def _settle(
        self, group: Sequence[TaskId], fields: dict[TaskId, str], reason: str, asked: Asked
    ) -> dict[TaskId, api.Cancelled]:
        answers: dict[TaskId, api.Cancelled] = {}
        sent: dict[TaskId, bytes] = {}  # records whose transaction got no answer
        unknown: OutcomeUnknown | None = None
        wait = Backoff(2 * limits.TRY_WAIT_S, limits.TRY_WAIT_MAX_S)
        for n in range(limits.TRIES_MAX):
            if n:
                await wait.pause()
            portion: list[_Move] = []
            try:
                moves = await self._look(group, fields, reason, answers, sent)
                for portion in portions(moves, lambda m: len(m.record or _REQUEST) + _KEYS_BYTES):
                    batch = txn.batch([m.txn for m in portion], asked.caller.guards)
                    if not self._note(portion, await self._port.store.commit(batch), answers, asked):
                        await asked.again()  # its rights have changed; nothing was written
                        break
            except Denied as e:
                if unknown is None and not answers:
                    raise
                raise OutcomeUnknown(f"some of the tasks may have been cancelled before this: {e}") from e
            except OutcomeUnknown as e:
                unknown = e
                sent.update((m.task, m.record or _REQUEST) for m in portion)
            except StoreUnavailable as e:
                if unknown is None and not answers:
                    raise
                raise OutcomeUnknown("some of the tasks may have been cancelled") from e
            group = [t for t in group if t not in answers]
            if not group:
                return answers
        moved = f"task {group[0]} changed hands {limits.TRIES_MAX} times meanwhile"
        raise unknown or (OutcomeUnknown(moved) if answers else StoreUnavailable(moved))

    @staticmethod
    def _note(moves: Sequence[_Move], result: txn.Result, answers: dict[TaskId, api.Cancelled], asked: Asked) -> bool:
        """Note what has been done; False when the caller's guards did not hold."""
        if not isinstance(result, txn.Committed):
            return False
        asked.revision = result.revision
        for move, done in zip(moves, result.nested, strict=True):
            if done:
                state = pb.RUNNING if move.record is None else pb.COMPLETE
                answers[move.task] = api.Cancelled(id=move.task, state=state)
        return True

    async def _look(
        self,
        group: Sequence[TaskId],
        fields: dict[TaskId, str],
        reason: str,
        answers: dict[TaskId, api.Cancelled],
        sent: dict[TaskId, bytes],
    ) -> list[_Move]:
        """Where each task stands now: what needs no write is answered, the rest comes back as transitions."""
        wanted = [k for t in group for k in (keys.task(t), keys.queued(t), keys.blocked(t))]
        snapshot = await self._port.store.read(wanted)
        moves: list[_Move] = []
        running: list[Task] = []
        for task_id in group:
            entry = snapshot.entries[keys.task(task_id)]
            if entry is None:
                raise lookup.missing(task_id, fields[task_id])
            task = codec.decode_task(entry.value)
            if task.state is State.COMPLETE:
                ours = sent.get(task_id) == entry.value or (
                    sent.get(task_id) == _REQUEST and task.outcome is Outcome.CANCELLED
                )
                answers[task_id] = api.Cancelled(id=task_id, state=pb.COMPLETE, was_complete=not ours)
            elif task.state is State.RUNNING:
                running.append(task)
            else:
                moves.append(self._waiting(task, snapshot, reason))
        if running:
            moves += await self._running(running, reason, answers)
        return moves

    def _waiting(self, task: Task, snapshot: Snapshot, reason: str) -> _Move:
        key = keys.queued(task.id) if task.state is State.QUEUED else keys.blocked(task.id)
        status = snapshot.entries[key]
        if status is None:  # read at one revision: invariant 1 is broken
            raise InvariantViolation(f"task {task.id} is {task.state.name} without {key}: {task}")
        over = lifecycle.cancelled_waiting(task, reason or "cancelled while it waited", now_ms=self._port.wall_ms())
        record = codec.encode_task(over)
        completed = codec.completed_by(self._port.name, over)
        return _Move(task.id, txn.cancel_waiting(task.id, key, status.modified, record, completed), record)

    async def _running(self, tasks: Sequence[Task], reason: str, answers: dict[TaskId, api.Cancelled]) -> list[_Move]:
        """Requests to the holders. A task that has moved on since it was read gets none, and is looked at again."""
        held = {t.id: keys.running(t.attempts[-1].node, t.id) for t in tasks if t.attempts}
        snapshot = await self._port.store.read(list(held.values()))
        moves = []
        for task in tasks:
            entry: KeyValue | None = snapshot.entries.get(held.get(task.id, ""))
            if entry is None:
                continue
            holding = codec.decode_holding(entry.value)
            if holding.cancel_requested:
                answers[task.id] = api.Cancelled(id=task.id, state=pb.RUNNING)
                continue
            asked = replace(holding, cancel_requested=True, cancel_reason=reason)
            node = task.attempts[-1].node
            moves.append(
                _Move(
                    task.id,
                    txn.cancel_running(node, task.id, entry.modified, codec.encode_holding(asked)),
                    None,
                )
            )
        return moves


def _groups(ids: Sequence[TaskId]) -> Iterator[Sequence[TaskId]]:
    for i in range(0, len(ids), _GROUP):
        yield ids[i : i + _GROUP]
