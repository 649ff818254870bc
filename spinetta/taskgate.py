"""What a worker may write about tasks: the claim of one that it is cleared for, and the end of its own attempt.

The record that follows is computed here from the stored one. What the worker says is compared with it, and is believed
only in what it alone can know: when its attempt began, how it ended, and what it used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from spinetta import codec, keys, lifecycle, txn, validate
from spinetta.access import MEMBERS
from spinetta.evidence import Evidence, NotAllowed, Over, created_at, seen_at, time_of
from spinetta.model import (
    Attempt,
    Exit,
    Holding,
    Incarnation,
    QueueHint,
    Reason,
    Revision,
    State,
    Task,
    TaskId,
)
from spinetta.txn import Put, RevisionIs, Txn

MESSAGE_CHARS_MAX = 4096  # of an attempt's end: what our shim says has a line or two; it is kept for 16 attempts


def claim(by: Evidence, task: TaskId, part: Txn, life: Incarnation) -> Txn:
    """One claim of a batch, as it may be committed: under the record that was looked at, and made here.

    Raises:
        NotAllowed: the worker may not make it.
    """
    seen = seen_at(part.when, keys.queued(task))
    if not seen or len(part.then) != 3 or not isinstance(held := part.then[1], Put):
        raise NotAllowed(f"{task}: not a claim")
    if not isinstance(put := part.then[2], Put):
        raise NotAllowed(f"{task}: not a claim")
    if part != txn.claim(by.node, task, seen, put.value, held.value):
        raise NotAllowed(f"{task}: not a claim")
    try:
        by.stored(keys.queued(task), modified=seen)
    except Over:
        return _lost(part)
    entry, stored = by.task(task)
    if stored.state is not State.QUEUED:
        raise NotAllowed(f"{task}: its record does not say that it is queued")
    missing = sorted(set(stored.spec.clearance) - {*by.acl.effective, MEMBERS})
    if missing:
        raise NotAllowed(f"{task}: {by.node} is not cleared for {', '.join(missing)}")
    record = by.readable(codec.decode_task, put.value, f"{task}: the record")
    if not record.attempts:
        raise NotAllowed(f"{task}: a claim begins an attempt")
    began_ms = time_of(record.attempts[-1].started_ms)
    expected = lifecycle.claimed(stored, by.node, life.id, now_ms=began_ms)
    if record != expected:
        raise NotAllowed(f"{task}: a claim may change nothing of a task but begin this node's attempt")
    holding = by.readable(codec.decode_holding, held.value, f"{task}: the holding")
    grace_s = stored.spec.grace_s or holding.grace_s
    if not 0 < grace_s <= validate.GRACE_MAX_S:
        raise NotAllowed(f"{task}: a grace is between 0 and {validate.GRACE_MAX_S:g} s")
    if holding != Holding(expected.attempts_started, life.id, grace_s, overlap=stored.spec.overlap):
        raise NotAllowed(f"{task}: the holding is not of this attempt")
    made = txn.claim(by.node, task, seen, codec.encode_task(expected), codec.encode_holding(holding))
    return _guarded(made, keys.task(task), entry.modified)


def end(by: Evidence, task: TaskId, part: Txn, life: Incarnation) -> Txn:
    """One finish or give-back of a batch, likewise.

    Raises:
        NotAllowed: the worker may not make it.
    """
    running = keys.running(by.node, task)
    if len(part.then) != 3 or not isinstance(mark := part.then[1], Put) or not isinstance(put := part.then[2], Put):
        raise NotAllowed(f"{task}: neither a finish nor a give-back")
    token, seen = created_at(part.when, running), seen_at(part.when, running)
    over = bool(token) and part == txn.finish(by.node, task, token or Revision(0), put.value, mark.value)
    again = bool(seen) and part == txn.give_back(by.node, task, seen or Revision(0), put.value, mark.value)
    if not over and not again:
        raise NotAllowed(f"{task}: neither a finish nor a give-back")
    try:
        held = by.stored(running, created=token) if over else by.stored(running, modified=seen)
    except Over:
        return _lost(part)
    holding = codec.readable(codec.decode_holding, held.value)
    entry, stored = by.task(task)
    if holding is None or holding.incarnation != life.id or not lifecycle.is_attempt(stored, by.node, holding):
        raise NotAllowed(f"{task}: the attempt is not of this life of {by.node}")
    record = by.readable(codec.decode_task, put.value, f"{task}: the record")
    # A request to cancel does not fence its holder, who may finish without having seen it; a give-back would lose
    # it and is guarded by the revision seen.
    asked = (True, False) if over and holding.cancel_requested else (holding.cancel_requested,)
    end = _ended(stored, record, held.created, holding.cancel_reason, asked)
    if end is None:
        raise NotAllowed(f"{task}: an end may change nothing of a task but what follows from the end of this attempt")
    value = codec.encode_task(end.task)
    if over is not (end.task.state is State.COMPLETE):
        raise NotAllowed(f"{task}: this end {'gives the task back' if over else 'is the end of the task'}")
    if over:
        completed = codec.completed_by(by.node, end.task)
        made = txn.finish(by.node, task, held.created, value, completed)
    else:
        hint = codec.encode_hint(QueueHint.of(end.task.spec, end.delay_s))
        made = txn.give_back(by.node, task, held.modified, value, hint)
    return _guarded(made, keys.task(task), entry.modified)


def _guarded(part: Txn, key: str, modified: Revision) -> Txn:
    """Under the revision at which the record was looked at as well."""
    return replace(part, when=(*part.when, RevisionIs(key, modified)))


def _lost(part: Txn) -> Txn:
    """A part that cannot commit: its guards as they are, and nothing else."""
    return Txn(when=part.when)


def _ended(
    stored: Task, record: Task, token: Revision, cancel_reason: str, asked: tuple[bool, ...]
) -> lifecycle.Ended | None:
    """The end that `record` tells of; None when no end of the running attempt leads to it."""
    if not record.attempts:
        return None
    last = record.attempts[-1]
    _check_end(last)
    try:
        reason = Reason(last.reason)
    except ValueError:
        return None
    exit_ = Exit(reason, last.exit_code, last.signal, last.message, last.started_ms, last.ended_ms, last.usage)
    now_ms = time_of(record.completed_ms) or last.ended_ms
    # A process that never started has no start of its own, and its attempt keeps the time of the claim.
    starts = {last.started_ms, 0} if last.started_ms == stored.attempts[-1].started_ms else {last.started_ms}
    for started_ms, cancelled in product(sorted(starts), asked):
        end = lifecycle.ended(
            stored,
            replace(exit_, started_ms=started_ms),
            token,
            cancel_requested=cancelled,
            cancel_reason=cancel_reason if cancelled else "",
            now_ms=now_ms,
        )
        if end.task == record:
            return end
    return None


def _check_end(last: Attempt) -> None:
    time_of(last.started_ms)
    time_of(last.ended_ms)
    usage = last.usage
    if len(last.message) > MESSAGE_CHARS_MAX:
        raise NotAllowed(f"what is said of an end has at most {MESSAGE_CHARS_MAX} characters")
    if not all(math.isfinite(s) and s >= 0 for s in (usage.cpu_user_s, usage.cpu_system_s)):
        raise NotAllowed("what an attempt has used is a number, and not less than nothing")
