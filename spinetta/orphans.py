"""What of a task does not agree with the rest of it, and how it is mended.

Every transaction of ours leaves a task with one status key that agrees with its record (invariant 1), so there is
nothing to mend unless another hand wrote: somebody with etcdctl, a restored backup, a bug. Then a task would wait for
ever, or its key would keep a node from being closed. The leader goes round slowly, looks at whatever seems odd at one
revision, and mends what can be mended without losing anything; the record is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spinetta import codec, keys, lifecycle, txn
from spinetta.events import Entry
from spinetta.model import Exit, Holding, Life, NodeId, QueueHint, Reason, Revision, State, Task, TaskId
from spinetta.recover import wait_out_s
from spinetta.settings import AgentSettings

STOP_S = 15.0  # TERM, ten seconds, KILL: how long a holder takes to end what is no longer its own


@dataclass(frozen=True, slots=True)
class Mending:
    """What puts a task right.

    Attributes:
        body: to be committed under the office.
        why: for the log.
        wait_s: nothing of the attempt can still run so long after this was first seen, if all stays as it is.
    """

    body: txn.Txn
    why: str
    wait_s: float = 0.0


def wanted_keys(task: TaskId, nodes: Iterable[NodeId]) -> tuple[str, ...]:
    """All that must be seen at one revision to judge a task that these nodes hold, or should."""
    own = (keys.task(task), keys.queued(task), keys.blocked(task), keys.complete(task))
    return (*own, *(k for n in sorted(nodes) for k in (keys.running(n, task), keys.incarnation(n))))


def status_key(task: Task) -> str | None:
    """The key that must be there, by the record; None when the record itself makes no sense."""
    match task.state:
        case State.QUEUED:
            return keys.queued(task.id)
        case State.BLOCKED:
            return keys.blocked(task.id)
        case State.COMPLETE:
            return keys.complete(task.id)
        case State.RUNNING:
            node = holder(task)
            return keys.running(node, task.id) if node is not None else None


def holder(task: Task | None) -> NodeId | None:
    """The node that runs it, by the record; None when none does."""
    return task.attempts[-1].node if task is not None and task.state is State.RUNNING and task.attempts else None


def _status_value(task: Task, settings: AgentSettings) -> bytes:
    """What stands in the status key of a task that waits or has ended."""
    match task.state:
        case State.QUEUED:
            return codec.encode_hint(QueueHint.of(task.spec))
        case State.COMPLETE:
            return codec.completed_by(settings.name, task)
        case _:
            return b""


def mending(
    task: TaskId, seen: Mapping[str, Entry | None], settings: AgentSettings, *, now_ms: int
) -> Mending | str | None:
    """How to put a task right: None when nothing is wrong, text when only a person can.

    Args:
        task: its id.
        seen: `wanted_keys`, all at one revision.
        settings: of the leader.
        now_ms: wall clock, for the record.
    """
    entry = seen.get(keys.task(task))
    status = {
        k: e for k, e in seen.items() if e is not None and k != keys.task(task) and not k.startswith(keys.INCARNATION)
    }
    if entry is None:
        if not status:
            return None
        gone = tuple(txn.RevisionIs(k, e.modified) for k, e in status.items())
        deletes = tuple(txn.Delete(k) for k in status)
        return Mending(txn.Txn((txn.Absent(keys.task(task)), *gone), deletes), f"task {task} has no record")
    record = codec.readable(codec.decode_task, entry.value)
    expected = status_key(record) if record is not None and record.id == task else None
    if record is None or expected is None:
        return f"the record of task {task} cannot be read; it stays as it is until somebody has mended or removed it"
    unchanged = txn.RevisionIs(entry.key, entry.modified)
    extra = {k: e for k, e in status.items() if k != expected}
    if extra:
        guards = (unchanged, *(txn.RevisionIs(k, e.modified) for k, e in extra.items()))
        body = txn.Txn(guards, tuple(txn.Delete(k) for k in extra))
        return Mending(body, f"task {task} is {record.state.name}, but there was also {', '.join(sorted(extra))}")
    if record.state is State.RUNNING:
        return _running(record, expected, status.get(expected), seen, unchanged, settings, now_ms)
    if expected in status:
        return None
    value = _status_value(record, settings)
    body = txn.Txn((unchanged, txn.Absent(expected)), (txn.Put(expected, value),))
    return Mending(body, f"task {task} is {record.state.name}, but {expected} was missing")


def _running(
    record: Task,
    key: str,
    held: Entry | None,
    seen: Mapping[str, Entry | None],
    unchanged: txn.Guard,
    settings: AgentSettings,
    now_ms: int,
) -> Mending | None:
    last = record.attempts[-1]
    grace_s = record.spec.grace_s or settings.grace_s
    holding = codec.readable(codec.decode_holding, held.value) if held is not None else None
    if held is not None and (holding is None or not lifecycle.is_attempt(record, last.node, holding)):
        # As the claim wrote it. The holder, if it lives, goes on; if it does not, the leader can put the task back.
        claimed = Holding(last.number, last.incarnation, grace_s, overlap=record.spec.overlap)
        body = txn.Txn((unchanged, txn.RevisionIs(key, held.modified)), (txn.Put(key, codec.encode_holding(claimed)),))
        return Mending(body, f"{key} did not agree with the record of its task")
    inc = seen.get(keys.incarnation(last.node))
    life = codec.readable(codec.decode_incarnation, inc.value) if inc is not None else None
    if held is not None and inc is not None and (life is None or life.state is not Life.OPEN):
        return None  # a condemned life: the leader puts back what it held, and closes it
    if held is not None and life is not None and life.id == last.incarnation:
        return None
    # The holder may not have heard that it lost the task: it finds out when it compares, and then has to end it.
    margin_s = life.kill_margin_s if life is not None else settings.kill_margin_s
    grace_s = max(grace_s, holding.grace_s if holding is not None else 0.0)
    wait_s = wait_out_s(grace_s, margin_s, settings.clock_rate_error) + settings.reconcile_s + STOP_S
    why = f"{key} was missing" if held is None else f"{key} is of a life that has been closed"
    lost = Exit(Reason.NODE_LOST, message=why, ended_ms=now_ms)
    asked, said = (holding.cancel_requested, holding.cancel_reason) if holding is not None else (False, "")
    token = held.created if held is not None else Revision(0)
    end = lifecycle.ended(record, lost, token, cancel_requested=asked, cancel_reason=said, now_ms=now_ms)
    status = status_key(end.task)
    assert status is not None  # noqa: S101 - an ended attempt leaves a task that is queued or complete
    value = _status_value(end.task, settings)
    guards = (
        unchanged,
        txn.RevisionIs(key, held.modified if held is not None else Revision(0)),
        txn.RevisionIs(keys.incarnation(last.node), inc.modified if inc is not None else Revision(0)),
        txn.Absent(status),
    )
    writes = (txn.Delete(key), txn.Put(status, value), txn.Put(keys.task(record.id), codec.encode_task(end.task)))
    return Mending(txn.Txn(guards, writes), f"task {record.id}: {why}", wait_s)
