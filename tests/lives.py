"""The transactions of a node's life, made as its daemon makes them: for tests of who may commit which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spinetta import codec, keys, lifecycle, txn
from spinetta.model import (
    Exit,
    Holding,
    Incarnation,
    IncarnationId,
    LeaseId,
    Life,
    NodeId,
    QueueHint,
    Revision,
    Stored,
    Task,
)
from spinetta.txn import Txn
from tests import builders


def life_of(node: str) -> Incarnation:
    return Incarnation(IncarnationId(f"life-of-{node}"), Life.OPEN, f"boot-of-{node}", 10, 5.0)


def node_value(node: str, **fields: Any) -> bytes:
    return codec.encode_node(builders.node_record(node, **fields))


def submit(task: Task) -> Txn:
    return txn.submit(task.id, codec.encode_task(task), codec.encode_hint(QueueHint.of(task.spec)))


def register(
    node: NodeId, lease: LeaseId, generation: Revision, acl: Revision, *, life: Incarnation | None = None, **fields: Any
) -> Txn:
    begun = codec.encode_incarnation(life or life_of(node))
    return txn.register(node, lease, node_value(node, **fields), begun, generation, acl)


def claim(node: NodeId, queued: Stored, record: Stored, *, grace_s: float = 8.0, **changes: Any) -> Txn:
    """One claim; `changes` to the record that follows from it are what a liar would do."""
    task = lifecycle.claimed(codec.decode_task(record.value), node, life_of(node).id, now_ms=2000)
    holding = Holding(task.attempts_started, life_of(node).id, task.spec.grace_s or grace_s)
    return claim_of(node, queued, replace(task, **changes), holding)


def claim_of(node: NodeId, queued: Stored, task: Task, holding: Holding) -> Txn:
    task_id = keys.parse_task(queued.key)
    return txn.claim(node, task_id, queued.modified, codec.encode_task(task), codec.encode_holding(holding))


def end(
    node: NodeId, running: Stored, record: Stored, how: Exit | None = None, *, knows: bool = True, **changes: Any
) -> Txn:
    """The end of an attempt: a finish or a give-back. `knows`: of a request to cancel, if there is one."""
    task, holding = codec.decode_task(record.value), codec.decode_holding(running.value)
    ended = lifecycle.ended(
        task,
        how or builders.exit_code(),
        running.created,
        cancel_requested=knows and holding.cancel_requested,
        cancel_reason=holding.cancel_reason if knows else "",
        now_ms=4000,
    )
    value = codec.encode_task(replace(ended.task, **changes))
    if ended.event in (lifecycle.Event.FINISH, lifecycle.Event.GIVE_UP):
        return txn.finish(node, task.id, running.created, value)
    hint = codec.encode_hint(QueueHint.of(ended.task.spec, ended.delay_s))
    return txn.give_back(node, task.id, running.modified, value, hint)
