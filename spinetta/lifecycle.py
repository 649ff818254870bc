"""The life of a task: one table of (state, event) pairs, and the record that each event leaves behind."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spinetta.errors import InvariantViolation
from spinetta.model import (
    ATTEMPTS_KEPT_MAX,
    Attempt,
    Exit,
    Holding,
    IncarnationId,
    NodeId,
    Outcome,
    Reason,
    Revision,
    State,
    Task,
    TaskSpec,
)

UNFIT_DELAY_S = 5.0  # a task that an unfit node gave back: time for another to take it
UNFIT_DELAY_MAX_S = 80.0  # it doubles up to this: it may be the task that no node can start, and each rests after it
RETRY_DELAY_MAX_S = 3600.0  # back-off doubles up to an hour: longer waits look like a hang


# Of nodes that died while they brought in what a task needs. Nothing of it had run, so they cost it nothing; but what
# is brought in may be what takes them down (an image that fills memory as it is unpacked), and three are no chance.
PREPARING_LOSSES_MAX = 3


class Reached(enum.Enum):
    """How far an attempt had come when its node was lost, as far as is known."""

    WAITING = "waiting"  # its node had promised not to start it, and had not touched it
    PREPARING = "preparing"  # its node had promised the same, and brought in what it needs
    EXECUTING = "executing"  # or it may have been


class Event(enum.Enum):
    """What can happen to a task."""

    UNBLOCK = "unblock"
    CLAIM = "claim"
    FINISH = "finish"  # the attempt's end is the task's end
    RETRY = "retry"  # the task failed and has tries left
    RELEASE = "release"  # its node gives it back unharmed
    NODE_LOST = "node-lost"  # its node died and it may start again
    GIVE_UP = "give-up"  # its node died and it may not
    CANCEL = "cancel"  # while waiting; a running task is cancelled through its holder's FINISH


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.BLOCKED, Event.UNBLOCK): State.QUEUED,
    (State.BLOCKED, Event.CANCEL): State.COMPLETE,
    (State.QUEUED, Event.CLAIM): State.RUNNING,
    (State.QUEUED, Event.CANCEL): State.COMPLETE,
    (State.RUNNING, Event.FINISH): State.COMPLETE,
    (State.RUNNING, Event.RETRY): State.QUEUED,
    (State.RUNNING, Event.RELEASE): State.QUEUED,
    (State.RUNNING, Event.NODE_LOST): State.QUEUED,
    (State.RUNNING, Event.GIVE_UP): State.COMPLETE,
}


def after(state: State, event: Event) -> State:
    """The state that `event` leads to.

    Raises:
        InvariantViolation: the pair is not in the table; the caller should have looked first.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise InvariantViolation(f"a task that is {state.name} cannot {event.value}") from None


@dataclass(frozen=True, slots=True)
class Ended:
    """What the end of an attempt means for its task: the event, the new record, and the wait before a retry."""

    event: Event
    task: Task
    delay_s: float = 0.0


def submitted(spec: TaskSpec, *, now_ms: int, at_node: str) -> Task:
    """The record of a new task."""
    return Task(spec=spec, state=State.QUEUED, submitted_ms=now_ms, submitted_at_node=at_node)


def claimed(task: Task, node: NodeId, incarnation: IncarnationId, *, now_ms: int) -> Task:
    """The record once `node` has taken the task: a new attempt has begun."""
    attempt = Attempt(task.attempts_started + 1, node, incarnation, started_ms=now_ms)
    return replace(
        task,
        state=after(task.state, Event.CLAIM),
        attempts_started=attempt.number,
        attempts=(*task.attempts, attempt)[-ATTEMPTS_KEPT_MAX:],
    )


def is_attempt(task: Task, node: NodeId, holding: Holding) -> bool:
    """Whether the record is of this very attempt, still running."""
    if task.state is not State.RUNNING or not task.attempts:
        return False
    last = task.attempts[-1]
    return (last.number, last.node, last.incarnation) == (holding.attempt, node, holding.incarnation)


def cancelled_waiting(task: Task, message: str, *, now_ms: int) -> Task:
    """The record of a task cancelled before any node took it (or between two attempts)."""
    return replace(
        task,
        state=after(task.state, Event.CANCEL),
        outcome=Outcome.CANCELLED,
        reason=Reason.CANCELLED.value,
        message=message,
        completed_ms=now_ms,
    )


_LOSSES = frozenset({Reason.NODE_LOST, Reason.SHIM_LOST, Reason.FENCED})


def ended(
    task: Task,
    exit_: Exit,
    token: Revision,
    *,
    cancel_requested: bool,
    cancel_reason: str = "",
    reached: Reached = Reached.EXECUTING,
    now_ms: int,
) -> Ended:
    """What follows from the end of the running attempt.

    A process that ended by itself with exit code 0 has succeeded even if a cancel was on its way: its work is done.
    Otherwise a requested cancel comes before any retry or requeue. Losses of the node and failures of the task are
    counted apart: failures are paid for out of `TaskSpec.retries`, losses out of `TaskSpec.losses_allowed`, because a
    task that takes its node down would else be passed on for ever. `reached`: when its node had promised not to start
    it, its program cannot have been the cause, and the loss costs nothing; what was being brought in for it can have
    been, and so that is excused `PREPARING_LOSSES_MAX` times.
    """
    if exit_.reason is Reason.EXIT and exit_.exit_code == 0:
        return _over(task, Event.FINISH, Outcome.SUCCEEDED, exit_, token, now_ms)
    if cancel_requested or exit_.reason is Reason.CANCELLED:
        return _over(task, Event.FINISH, Outcome.CANCELLED, exit_, token, now_ms, cancel_reason)
    if exit_.reason is Reason.RELEASED:
        return _again(task, Event.RELEASE, Outcome.LOST, exit_, token, now_ms)
    ran = exit_.started_ms or exit_.signal or exit_.exit_code is not None
    never_ran = exit_.reason is Reason.FENCED and not ran
    if never_ran or exit_.reason is Reason.NODE_UNFIT:  # neither the task's failure nor a loss
        return _again(task, Event.RELEASE, Outcome.LOST, exit_, token, now_ms, _unfit_delay_s(task))
    if exit_.reason in _LOSSES and _is_excused(task, reached):
        preparing = task.losses_preparing + (reached is Reached.PREPARING)
        task = replace(task, losses_excused=task.losses_excused + 1, losses_preparing=preparing)
        return _again(task, Event.NODE_LOST, Outcome.LOST, exit_, token, now_ms)
    if exit_.reason in _LOSSES:
        task = replace(task, losses=task.losses + 1)
        if not task.spec.restart_on_node_failure:
            why = f"{exit_.message}; it is not to be started again after that"
        elif task.losses > task.spec.losses_allowed:
            were = "node was" if task.losses == 1 else "nodes were"
            why = f"{exit_.message}; {task.losses} {were} lost under it, allowed are {task.spec.losses_allowed}"
        else:
            return _again(task, Event.NODE_LOST, Outcome.LOST, exit_, token, now_ms)
        return _over(task, Event.GIVE_UP, Outcome.LOST, exit_, token, now_ms, why.removeprefix("; "))
    task = replace(task, failures=task.failures + 1)
    if task.failures <= task.spec.retries:
        delay_s = min(task.spec.retry_backoff_s * 2.0 ** (task.failures - 1), RETRY_DELAY_MAX_S)
        return _again(task, Event.RETRY, Outcome.FAILED, exit_, token, now_ms, delay_s)
    return _over(task, Event.FINISH, Outcome.FAILED, exit_, token, now_ms)


def _unfit_delay_s(task: Task) -> float:
    """The wait after an attempt that its node could not start, by how many before it in a row could not be either."""
    before = itertools.takewhile(lambda a: a.reason == Reason.NODE_UNFIT.value, reversed(task.attempts[:-1]))
    return min(UNFIT_DELAY_S * 2.0 ** sum(1 for _ in before), UNFIT_DELAY_MAX_S)


def _is_excused(task: Task, reached: Reached) -> bool:
    if reached is Reached.PREPARING:
        return task.losses_preparing < PREPARING_LOSSES_MAX
    return reached is Reached.WAITING


def _close_attempt(task: Task, outcome: Outcome, exit_: Exit, token: Revision, now_ms: int) -> Task:
    if not task.attempts:
        raise InvariantViolation(f"task {task.id} ends an attempt that never began: {task}")
    last = replace(
        task.attempts[-1],
        token=token,
        started_ms=exit_.started_ms or task.attempts[-1].started_ms,
        ended_ms=exit_.ended_ms or now_ms,
        outcome=outcome,
        exit_code=exit_.exit_code,
        signal=exit_.signal,
        reason=exit_.reason.value,
        message=exit_.message,
        usage=exit_.usage,
    )
    return replace(task, attempts=(*task.attempts[:-1], last))


def _over(
    task: Task, event: Event, outcome: Outcome, exit_: Exit, token: Revision, now_ms: int, message: str = ""
) -> Ended:
    task = _close_attempt(task, outcome, exit_, token, now_ms)
    reason = Reason.CANCELLED if outcome is Outcome.CANCELLED else exit_.reason
    return Ended(
        event,
        replace(
            task,
            state=after(task.state, event),
            outcome=outcome,
            reason=reason.value,
            message=message or exit_.message,
            completed_ms=now_ms,
        ),
    )


def _again(
    task: Task,
    event: Event,
    outcome: Outcome,
    exit_: Exit,
    token: Revision,
    now_ms: int,
    delay_s: float = 0.0,
) -> Ended:
    task = _close_attempt(task, outcome, exit_, token, now_ms)
    return Ended(event, replace(task, state=after(task.state, event)), delay_s)
