from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from spinetta import lifecycle
from spinetta.errors import InvariantViolation
from spinetta.lifecycle import PREPARING_LOSSES_MAX, RETRY_DELAY_MAX_S, TRANSITIONS, Event, Reached
from spinetta.model import (
    ATTEMPTS_KEPT_MAX,
    Exit,
    IncarnationId,
    NodeId,
    Outcome,
    Reason,
    Revision,
    State,
    Task,
    Usage,
)
from tests.builders import exit_code, holding, queued, spec, task_id

ME = NodeId("n1")
LIFE = IncarnationId("life")
TOKEN = Revision(42)
NOW_MS = 5000

# The whole square, written down a second time on purpose: what is not here is refused.
ALLOWED = {
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


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair_is_listed_or_refused(state: State, event: Event) -> None:
    if (state, event) in ALLOWED:
        assert lifecycle.after(state, event) is ALLOWED[state, event]
    else:
        assert (state, event) not in TRANSITIONS
        with pytest.raises(InvariantViolation, match=event.value):
            lifecycle.after(state, event)


def test_nothing_leaves_complete() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] is State.COMPLETE]


def running(**fields: object) -> Task:
    return lifecycle.claimed(queued(1, **fields), ME, LIFE, now_ms=NOW_MS)


def end(task: Task, exit_: Exit, *, cancel: bool = False, reached: Reached = Reached.EXECUTING) -> lifecycle.Ended:
    return lifecycle.ended(task, exit_, TOKEN, cancel_requested=cancel, reached=reached, now_ms=9000)


def test_a_submitted_task_waits() -> None:
    task = lifecycle.submitted(spec(3), now_ms=7, at_node="n9")
    assert task == Task(spec(3), State.QUEUED, submitted_ms=7, submitted_at_node="n9")
    assert task.id == task_id(3)


def test_a_claim_begins_an_attempt() -> None:
    task = running()
    assert task.state is State.RUNNING
    assert task.attempts_started == 1
    last = task.attempts[-1]
    assert (last.number, last.node, last.incarnation, last.started_ms) == (1, ME, LIFE, NOW_MS)
    assert (last.outcome, last.token, last.ended_ms) == (Outcome.NONE, 0, 0)


@pytest.mark.parametrize("state", [State.BLOCKED, State.RUNNING, State.COMPLETE])
def test_only_queued_tasks_are_claimed(state: State) -> None:
    with pytest.raises(InvariantViolation):
        lifecycle.claimed(replace(queued(), state=state), ME, LIFE, now_ms=1)


def test_old_attempts_are_dropped_from_the_record_but_counted() -> None:
    task = queued()
    for _ in range(ATTEMPTS_KEPT_MAX + 5):
        task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
        task = end(task, Exit(Reason.RELEASED)).task
    assert task.attempts_started == ATTEMPTS_KEPT_MAX + 5
    assert len(task.attempts) == ATTEMPTS_KEPT_MAX
    assert task.attempts[-1].number == task.attempts_started


def test_a_task_that_node_after_node_cannot_start_waits_longer_each_time() -> None:
    """Each node rests after such a start: a task that none can start must not keep all of them from the others."""
    task, delays_s = queued(), []
    for reason in (*[Reason.NODE_UNFIT] * 6, Reason.RELEASED, Reason.NODE_UNFIT):
        ended = end(lifecycle.claimed(task, ME, LIFE, now_ms=1), Exit(reason))
        task = ended.task
        delays_s.append(ended.delay_s)
    assert delays_s == [5.0, 10.0, 20.0, 40.0, 80.0, 80.0, 0.0, 5.0]
    assert task.state is State.QUEUED
    assert (task.failures, task.losses) == (0, 0)


# --- how an attempt's end becomes its task's -----------------------------------------------------------------------

# exit, retries, restart, cancel requested -> event, outcome of the attempt, state, outcome of the task, reason
ENDS = [
    # by itself
    (exit_code(0), 0, True, False, Event.FINISH, Outcome.SUCCEEDED, Outcome.SUCCEEDED, "exit"),
    (exit_code(0), 3, True, True, Event.FINISH, Outcome.SUCCEEDED, Outcome.SUCCEEDED, "exit"),
    (exit_code(3), 0, True, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "exit"),
    (exit_code(3), 1, True, False, Event.RETRY, Outcome.FAILED, Outcome.NONE, ""),
    (exit_code(3), 1, True, True, Event.FINISH, Outcome.CANCELLED, Outcome.CANCELLED, "cancelled"),
    (Exit(Reason.SIGNAL, signal=11), 0, True, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "signal"),
    (
        Exit(Reason.OUT_OF_MEMORY, signal=9),
        0,
        True,
        False,
        Event.FINISH,
        Outcome.FAILED,
        Outcome.FAILED,
        "out-of-memory",
    ),
    (Exit(Reason.OUT_OF_MEMORY, signal=9), 2, True, False, Event.RETRY, Outcome.FAILED, Outcome.NONE, ""),
    (Exit(Reason.OUT_OF_PIDS, 3), 0, True, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "out-of-pids"),
    (Exit(Reason.OUT_OF_PIDS, 3), 1, True, False, Event.RETRY, Outcome.FAILED, Outcome.NONE, ""),
    (Exit(Reason.OUT_OF_PIDS, 3), 1, True, True, Event.FINISH, Outcome.CANCELLED, Outcome.CANCELLED, "cancelled"),
    (Exit(Reason.DISK_LIMIT, signal=9), 0, False, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "disk-limit"),
    (Exit(Reason.DISK_LIMIT, signal=9), 1, False, False, Event.RETRY, Outcome.FAILED, Outcome.NONE, ""),
    (Exit(Reason.WALLTIME, signal=15), 0, True, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "walltime"),
    (Exit(Reason.WALLTIME, signal=15), 1, True, False, Event.RETRY, Outcome.FAILED, Outcome.NONE, ""),
    (Exit(Reason.FENCED), 0, False, False, Event.RELEASE, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.NODE_UNFIT), 0, True, False, Event.RELEASE, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.SPAWN_FAILED), 0, True, False, Event.FINISH, Outcome.FAILED, Outcome.FAILED, "spawn-failed"),
    # by its user
    (Exit(Reason.CANCELLED, signal=15), 5, True, True, Event.FINISH, Outcome.CANCELLED, Outcome.CANCELLED, "cancelled"),
    (
        Exit(Reason.CANCELLED, signal=15),
        5,
        True,
        False,
        Event.FINISH,
        Outcome.CANCELLED,
        Outcome.CANCELLED,
        "cancelled",
    ),
    # by its node
    (Exit(Reason.RELEASED, signal=15), 0, True, False, Event.RELEASE, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.RELEASED, signal=15), 0, False, False, Event.RELEASE, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.RELEASED, signal=15), 0, True, True, Event.FINISH, Outcome.CANCELLED, Outcome.CANCELLED, "cancelled"),
    # with its node
    (Exit(Reason.NODE_LOST), 0, True, False, Event.NODE_LOST, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.NODE_LOST), 0, False, False, Event.GIVE_UP, Outcome.LOST, Outcome.LOST, "node-lost"),
    (Exit(Reason.NODE_LOST), 0, True, True, Event.FINISH, Outcome.CANCELLED, Outcome.CANCELLED, "cancelled"),
    (Exit(Reason.SHIM_LOST), 0, True, False, Event.NODE_LOST, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.FENCED, signal=9), 0, True, False, Event.NODE_LOST, Outcome.LOST, Outcome.NONE, ""),
    (Exit(Reason.FENCED, signal=9), 0, False, False, Event.GIVE_UP, Outcome.LOST, Outcome.LOST, "fenced"),
]


@pytest.mark.parametrize(("exit_", "retries", "restart", "cancel", "event", "of_attempt", "of_task", "reason"), ENDS)
def test_ends(
    exit_: Exit,
    retries: int,
    restart: bool,
    cancel: bool,
    event: Event,
    of_attempt: Outcome,
    of_task: Outcome,
    reason: str,
) -> None:
    ended = end(running(retries=retries, restart_on_node_failure=restart), exit_, cancel=cancel)
    assert ended.event is event
    assert ended.task.state is TRANSITIONS[State.RUNNING, event]
    assert ended.task.outcome is of_task
    assert ended.task.reason == reason
    last = ended.task.attempts[-1]
    assert (last.outcome, last.token, last.reason) == (of_attempt, TOKEN, exit_.reason.value)
    assert (last.exit_code, last.signal) == (exit_.exit_code, exit_.signal)
    assert (ended.task.completed_ms != 0) == (ended.task.state is State.COMPLETE)


def test_every_reason_has_a_row() -> None:
    assert {row[0].reason for row in ENDS} == set(Reason)


def test_failures_and_losses_are_counted_apart() -> None:
    task = running(retries=1)
    task = end(task, Exit(Reason.NODE_LOST)).task
    task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
    task = end(task, Exit(Reason.NODE_LOST)).task
    assert (task.failures, task.losses) == (0, 2)
    task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
    again = end(task, exit_code(1))
    assert again.event is Event.RETRY
    assert (again.task.failures, again.task.losses) == (1, 2)
    task = lifecycle.claimed(again.task, ME, LIFE, now_ms=1)
    over = end(task, exit_code(1))
    assert over.event is Event.FINISH
    assert over.task.outcome is Outcome.FAILED


@pytest.mark.parametrize("allowed", [0, 1, 5])
def test_a_task_that_loses_more_nodes_than_it_may_is_given_up(allowed: int) -> None:
    task = queued(losses_allowed=allowed)
    events = []
    for _ in range(allowed + 1):
        task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
        ended = end(task, Exit(Reason.NODE_LOST, message="node n1 was lost"))
        events.append(ended.event)
        task = ended.task
    assert events == [Event.NODE_LOST] * allowed + [Event.GIVE_UP]
    assert (task.outcome, task.failures, task.losses) == (Outcome.LOST, 0, allowed + 1)
    under = "1 node was" if allowed == 0 else f"{allowed + 1} nodes were"
    assert task.message == f"node n1 was lost; {under} lost under it, allowed are {allowed}"


def test_a_loss_under_a_task_that_was_not_started_costs_nothing() -> None:
    task = queued(losses_allowed=0, restart_on_node_failure=False)
    for _ in range(3):
        task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
        ended = end(task, Exit(Reason.NODE_LOST), reached=Reached.WAITING)
        assert ended.event is Event.NODE_LOST
        task = ended.task
    assert (task.state, task.losses, task.losses_excused) == (State.QUEUED, 0, 3)


def test_losses_while_its_image_came_in_are_excused_only_so_often() -> None:
    """An image whose unpacking takes down node after node must not go round for ever."""
    task = queued(losses_allowed=2)
    seen = []
    for _ in range(PREPARING_LOSSES_MAX + 3):
        task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
        ended = end(task, Exit(Reason.NODE_LOST), reached=Reached.PREPARING)
        seen.append((ended.event, ended.task.losses, ended.task.losses_excused))
        task = ended.task
    excused = [(Event.NODE_LOST, 0, n + 1) for n in range(PREPARING_LOSSES_MAX)]
    counted = [(Event.NODE_LOST, n + 1, PREPARING_LOSSES_MAX) for n in range(2)]
    assert seen == [*excused, *counted, (Event.GIVE_UP, 3, PREPARING_LOSSES_MAX)]


def test_losses_of_what_was_not_touched_are_no_losses_while_it_was_prepared() -> None:
    task = queued(losses_allowed=0)
    for _ in range(PREPARING_LOSSES_MAX + 2):
        task = end(lifecycle.claimed(task, ME, LIFE, now_ms=1), Exit(Reason.NODE_LOST), reached=Reached.WAITING).task
    for _ in range(PREPARING_LOSSES_MAX):
        task = end(lifecycle.claimed(task, ME, LIFE, now_ms=1), Exit(Reason.NODE_LOST), reached=Reached.PREPARING).task
    assert (task.state, task.losses, task.losses_preparing) == (State.QUEUED, 0, PREPARING_LOSSES_MAX)
    assert task.losses_excused == 2 * PREPARING_LOSSES_MAX + 2


def test_why_it_was_given_up_is_told() -> None:
    over = end(running(restart_on_node_failure=False), Exit(Reason.NODE_LOST, message="node n1 was lost")).task
    assert over.message == "node n1 was lost; it is not to be started again after that"


def test_back_off_doubles_up_to_an_hour() -> None:
    task = queued(retries=100, retry_backoff_s=10.0)
    delays = []
    for _ in range(12):
        task = lifecycle.claimed(task, ME, LIFE, now_ms=1)
        ended = end(task, exit_code(1))
        delays.append(ended.delay_s)
        task = ended.task
    assert delays[:4] == [10.0, 20.0, 40.0, 80.0]
    assert max(delays) == delays[-1] == RETRY_DELAY_MAX_S


def test_losses_wait_for_nothing() -> None:
    assert end(running(retry_backoff_s=10.0, retries=1), Exit(Reason.NODE_LOST)).delay_s == 0.0


def test_times_and_usage_of_the_attempt_are_kept() -> None:
    usage = Usage(1.5, 0.5, 1 << 20)
    task = end(running(), Exit(Reason.EXIT, 0, started_ms=6000, ended_ms=7000, usage=usage)).task
    last = task.attempts[-1]
    assert (last.started_ms, last.ended_ms, last.usage) == (6000, 7000, usage)
    assert task.completed_ms == 9000


def test_times_that_the_runtime_does_not_know_are_filled_in() -> None:
    last = end(running(), Exit(Reason.SHIM_LOST)).task.attempts[-1]
    assert (last.started_ms, last.ended_ms) == (NOW_MS, 9000)


def test_an_end_without_a_beginning_is_a_bug() -> None:
    with pytest.raises(InvariantViolation, match="never began"):
        end(replace(queued(), state=State.RUNNING), exit_code(0))


@pytest.mark.parametrize("exit_", [exit_code(0), Exit(Reason.RELEASED), Exit(Reason.NODE_LOST), Exit(Reason.CANCELLED)])
@pytest.mark.parametrize("state", [State.BLOCKED, State.QUEUED, State.COMPLETE])
def test_only_running_tasks_end(state: State, exit_: Exit) -> None:
    with pytest.raises(InvariantViolation):
        end(replace(running(), state=state), exit_)


def test_cancelled_while_waiting() -> None:
    task = lifecycle.cancelled_waiting(queued(), "changed my mind", now_ms=8)
    assert (task.state, task.outcome, task.reason, task.message, task.completed_ms) == (
        State.COMPLETE,
        Outcome.CANCELLED,
        "cancelled",
        "changed my mind",
        8,
    )
    blocked = lifecycle.cancelled_waiting(replace(queued(), state=State.BLOCKED), "", now_ms=8)
    assert blocked.outcome is Outcome.CANCELLED
    with pytest.raises(InvariantViolation):
        lifecycle.cancelled_waiting(running(), "", now_ms=8)


def test_which_attempt_a_record_is_of() -> None:
    task = running()
    assert lifecycle.is_attempt(task, ME, holding(1, LIFE))
    assert not lifecycle.is_attempt(task, NodeId("n2"), holding(1, LIFE))
    assert not lifecycle.is_attempt(task, ME, holding(2, LIFE))
    assert not lifecycle.is_attempt(task, ME, holding(1, "another"))
    assert not lifecycle.is_attempt(end(task, exit_code(0)).task, ME, holding(1, LIFE))
    assert not lifecycle.is_attempt(queued(), ME, holding(1, LIFE))
