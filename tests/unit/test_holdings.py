"""What a node holds: its keys in the store and its processes, brought together."""

from __future__ import annotations

import pytest

from spinetta import codec, keys, lifecycle, txn
from spinetta.attempt import GiveBack, Step
from spinetta.events import (
    AttemptEnded,
    Commit,
    CommitDone,
    Effect,
    Entry,
    Forget,
    HeldAttempt,
    ListRuntime,
    NoAnswer,
    Read,
    ReadDone,
    Reading,
    RuntimeListed,
    Start,
    Started,
    Stop,
)
from spinetta.holdings import RETRY_S, Holdings
from spinetta.mirror import Delta
from spinetta.model import (
    ContainerSpec,
    Exit,
    Holding,
    IncarnationId,
    NodeId,
    Outcome,
    Reason,
    Resources,
    Revision,
    State,
    Task,
)
from spinetta.processes import STOP_AGAIN_S
from tests.builders import cpus, entry, exit_code, holding, key_of, queued, task_id

ME = NodeId("n1")
LIFE = IncarnationId("life")
NOW = 10.0
SEEN = Revision(3)  # of our incarnation


def ready() -> Holdings:
    """Both truths are known, and empty."""
    held = Holdings(ME)
    held.runtime_listed(RuntimeListed(()), NOW)
    held.listed({}, Revision(1))
    return held


def poll(held: Holdings, now: float = NOW, *, may_start: bool = True, must_stop: bool = False) -> list[Effect]:
    return held.poll(now, 5000, LIFE, SEEN, may_start=may_start, must_stop=must_stop)


def record(n: int = 1, **fields: object) -> Task:
    return lifecycle.claimed(queued(n, **fields), ME, LIFE, now_ms=1)


def key_entry(n: int = 1, token: int = 5, modified: int | None = None, **fields: object) -> Entry:
    value = codec.encode_holding(Holding(1, LIFE, 8.0, **fields))  # type: ignore[arg-type]
    return entry(keys.running(ME, task_id(n)), value, token, modified)


def appeared(n: int = 1, token: int = 5, modified: int | None = None, **fields: object) -> Delta:
    new = key_entry(n, token, modified, **fields)
    return Delta(new.key, None, new, new.modified)


def vanished(n: int = 1, revision: int = 9) -> Delta:
    return Delta(keys.running(ME, task_id(n)), key_entry(n), None, Revision(revision))


def claimed(n: int = 1, token: int = 5, **fields: object) -> Holdings:
    held = ready()
    held.claimed(record(n, **fields), Revision(token), holding(1, LIFE))
    return held


def running(n: int = 1, token: int = 5, **fields: object) -> Holdings:
    held = claimed(n, token, **fields)
    (start,) = poll(held)
    assert isinstance(start, Start)
    held.started(Started(key_of(n), Revision(token), None), NOW)
    assert poll(held) == []
    return held


def records(*tasks: Task, revision: int = 20) -> ReadDone:
    rows: dict[str, Entry | None] = {keys.task(t.id): entry(keys.task(t.id), codec.encode_task(t)) for t in tasks}
    return ReadDone("held", Reading(Revision(revision), rows))


def written(effects: list[Effect]) -> list[Task]:
    """The records that a batch of ends would write."""
    (commit,) = (e for e in effects if isinstance(e, Commit))
    assert commit.tag == "finish"
    return [
        codec.decode_task(p.value)
        for t in commit.txn.nested
        for p in t.then
        if isinstance(p, txn.Put) and p.value and p.key.startswith(keys.TASK)
    ]


# --- the way of an attempt -----------------------------------------------------------------------------------------


def test_claimed_started_ended_recorded_forgotten() -> None:
    held = claimed()
    (start,) = poll(held)
    assert start == Start(record().spec, 1, Revision(5), LIFE, 8.0)
    assert poll(held) == []
    held.started(Started(key_of(1), Revision(5), None), NOW)
    assert poll(held) == []
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    (task,) = written(poll(held))
    assert (task.state, task.outcome, task.attempts[-1].token) == (State.COMPLETE, Outcome.SUCCEEDED, 5)
    assert poll(held) == []
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    assert poll(held) == [Forget(key_of(1))]
    assert held.empty
    assert held.nothing_runs


def test_nothing_is_judged_before_both_truths_are_known() -> None:
    held = Holdings(ME)
    held.claimed(record(), Revision(5), holding(1, LIFE))
    assert poll(held) == []
    held.runtime_listed(RuntimeListed((HeldAttempt("stray.1", Revision(3), LIFE, None),)), NOW)
    assert poll(held) == []
    assert not held.nothing_runs
    held.listed({keys.running(ME, task_id(1)): key_entry()}, Revision(6))
    assert poll(held) == [Stop("stray.1", "fenced"), Start(record().spec, 1, Revision(5), LIFE, 8.0)]


def test_nothing_is_started_without_a_renewal() -> None:
    held = claimed()
    assert poll(held, may_start=False) == []
    assert len(poll(held)) == 1


def test_an_attempt_that_ends_before_the_answer_to_its_start() -> None:
    held = claimed()
    poll(held)
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    assert written(poll(held))[0].outcome is Outcome.SUCCEEDED
    held.started(Started(key_of(1), Revision(5), None), NOW)
    assert poll(held) == []
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    assert poll(held) == [Forget(key_of(1))]


def test_an_attempt_that_could_not_be_started() -> None:
    held = claimed()
    poll(held)
    held.started(Started(key_of(1), Revision(5), Exit(Reason.SPAWN_FAILED, message="no such file")), NOW)
    (task,) = written(poll(held))
    assert (task.outcome, task.reason, task.message) == (Outcome.FAILED, "spawn-failed", "no such file")


def test_ends_gather_while_one_batch_is_under_way() -> None:
    held = ready()
    for n in (1, 2, 3):
        held.claimed(record(n), Revision(4 + n), holding(1, LIFE))
    poll(held)
    for n in (1, 2, 3):
        held.started(Started(key_of(n), Revision(4 + n), None), NOW)
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    assert [t.id for t in written(poll(held))] == [task_id(1)]
    held.attempt_ended(AttemptEnded(key_of(2), exit_code(0)))
    held.attempt_ended(AttemptEnded(key_of(3), exit_code(0)))
    assert poll(held) == []
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    assert [t.id for t in written(poll(held))] == [task_id(2), task_id(3)]


def test_ends_are_recorded_under_the_life_that_is_known() -> None:
    held = running()
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    assert held.poll(NOW, 1, LIFE, Revision(0), may_start=True, must_stop=False) == []
    (commit,) = poll(held)
    assert isinstance(commit, Commit)
    assert commit.txn.when == txn.finish_guards(ME, SEEN, Revision(0))
    held.finished(CommitDone("finish", txn.Conflict(Revision(9))), NOW)
    later = NOW + RETRY_S
    assert [type(e) for e in poll(held, later)] == [Read]
    held.doubts_read(still_there(), later)
    assert len(written(poll(held, later))) == 1


def test_a_retry_goes_back_to_the_queue_with_its_wait() -> None:
    held = running(retries=1, retry_backoff_s=7.0)
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(1)))
    (commit,) = poll(held)
    assert isinstance(commit, Commit)
    (nested,) = commit.txn.nested
    assert nested.when == (txn.RevisionIs(keys.running(ME, task_id(1)), Revision(5)),)
    hint = next(p for p in nested.then if isinstance(p, txn.Put) and p.key == keys.queued(task_id(1)))
    found = codec.decode_hint(hint.value)
    assert found is not None
    assert found.delay_s == 7.0


# --- the store -----------------------------------------------------------------------------------------------------


def test_a_key_found_in_the_store_is_read_then_started() -> None:
    held = ready()
    held.follow([appeared()])
    assert not held.all_read
    assert poll(held) == [Read("held", (keys.task(task_id(1)),))]
    assert poll(held) == []
    held.read_done(records(record()), NOW)
    assert held.all_read
    assert held.demand() == cpus(1)
    assert [type(e) for e in poll(held)] == [Start]


def test_a_record_that_was_not_read_is_read_again() -> None:
    held = ready()
    held.follow([appeared()])
    poll(held)
    held.read_done(ReadDone("held", None), NOW)
    assert poll(held) == []
    assert held.next_s == NOW + RETRY_S
    assert len(poll(held, NOW + RETRY_S)) == 1


@pytest.mark.parametrize(
    "task",
    [
        queued(1),
        lifecycle.ended(record(), exit_code(0), Revision(5), cancel_requested=False, now_ms=1).task,
        lifecycle.claimed(queued(1), NodeId("n2"), LIFE, now_ms=1),
        lifecycle.claimed(queued(1), ME, IncarnationId("another life"), now_ms=1),
    ],
)
def test_a_record_that_has_moved_on_means_that_the_key_has_gone(task: Task) -> None:
    held = ready()
    held.follow([appeared()])
    poll(held)
    held.read_done(records(task), NOW)
    assert held.held == {}
    held.follow([appeared()])  # late news
    assert held.held == {}


def test_late_news_of_a_claim_does_not_bring_it_back() -> None:
    held = running()
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    poll(held)
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    poll(held)
    held.follow([appeared()])
    assert held.empty
    held.follow([vanished()])
    held.follow([appeared(token=15)])  # it has come back for another attempt
    assert not held.empty


def test_a_late_answer_to_a_claim_that_is_over() -> None:
    held = ready()
    held.follow([appeared(), vanished()])
    held.claimed(record(), Revision(5), holding(1, LIFE))
    assert held.held == {}
    other = ready()
    other.listed({}, Revision(7))  # shown to be gone by a listing
    other.claimed(record(), Revision(5), holding(1, LIFE))
    assert other.held == {}


def test_a_key_that_vanished_fences_its_process() -> None:
    held = running()
    held.follow([vanished()])
    assert poll(held) == [Stop(key_of(1), "fenced")]
    held.attempt_ended(AttemptEnded(key_of(1), Exit(Reason.FENCED, signal=15)))
    assert poll(held) == [Forget(key_of(1))]


def test_a_listing_that_does_not_show_it_fences_its_process() -> None:
    held = running(token=5)
    held.listed({}, Revision(4))  # older than the claim
    assert poll(held) == []
    held.listed({}, Revision(6))
    assert poll(held) == [Stop(key_of(1), "fenced")]


def test_a_request_to_cancel() -> None:
    held = running()
    held.follow([appeared(modified=8, cancel_requested=True)])
    assert poll(held) == [Stop(key_of(1), "cancelled")]
    assert poll(held) == []
    held.attempt_ended(AttemptEnded(key_of(1), Exit(Reason.CANCELLED, signal=15)))
    assert written(poll(held))[0].outcome is Outcome.CANCELLED


def test_what_is_being_prepared_is_told_to_end_at_once() -> None:
    """Its image may take an hour; the runtime knows nothing of it yet."""
    held = claimed(container=ContainerSpec("docker://here/tool:1"))
    (start,) = poll(held)
    assert isinstance(start, Start)
    held.follow([appeared(modified=8, cancel_requested=True)])
    assert poll(held) == [Stop(key_of(1), "cancelled")]
    assert poll(held, NOW + 1) == []
    assert poll(held, NOW + STOP_AGAIN_S) == [Stop(key_of(1), "cancelled")]
    held.started(Started(key_of(1), Revision(5), Exit(Reason.CANCELLED)), NOW + STOP_AGAIN_S)
    (ended,) = written(poll(held, NOW + STOP_AGAIN_S))
    assert ended.outcome is Outcome.CANCELLED


def test_a_process_that_is_being_started_is_told_to_end_once_it_runs() -> None:
    held = claimed()
    poll(held)
    held.follow([appeared(modified=8, cancel_requested=True)])
    assert poll(held) == []
    held.started(Started(key_of(1), Revision(5), None), NOW)
    assert poll(held) == [Stop(key_of(1), "cancelled")]


def test_what_is_being_prepared_and_no_longer_ours_is_told_to_end() -> None:
    held = claimed(container=ContainerSpec("docker://here/tool:1"))
    poll(held)
    held.follow([vanished()])
    assert poll(held) == [Stop(key_of(1), "fenced")]
    assert not held.nothing_runs
    held.started(Started(key_of(1), Revision(5), Exit(Reason.FENCED)), NOW)
    assert poll(held) == [Forget(key_of(1))]
    assert held.nothing_runs


def test_a_request_to_cancel_before_the_start() -> None:
    held = claimed()
    held.follow([appeared(modified=8, cancel_requested=True)])
    (task,) = written(poll(held))
    assert (task.outcome, task.attempts[-1].message) == (Outcome.CANCELLED, "before it was started")


def test_older_news_does_not_take_a_request_back() -> None:
    held = running()
    held.follow([appeared(modified=8, cancel_requested=True), appeared(modified=5)])
    assert poll(held) == [Stop(key_of(1), "cancelled")]


# --- lost answers --------------------------------------------------------------------------------------------------


def ended() -> Holdings:
    held = running(retries=1)
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(1)))
    poll(held)
    return held


def still_there(modified: int = 5, **fields: object) -> ReadDone:
    found = key_entry(1, 5, modified, **fields)
    return ReadDone("doubtful", Reading(Revision(30), {found.key: found}))


def test_an_end_whose_answer_was_lost_is_read_back_then_recorded_again() -> None:
    held = ended()
    held.finished(CommitDone("finish", None), NOW)
    assert poll(held) == []
    later = NOW + RETRY_S
    assert poll(held, later) == [Read("doubtful", (keys.running(ME, task_id(1)),))]
    held.doubts_read(still_there(), later)
    assert len(written(poll(held, later))) == 1


def test_an_end_that_was_recorded_after_all() -> None:
    held = ended()
    held.finished(CommitDone("finish", None), NOW)
    poll(held, NOW + RETRY_S)
    held.doubts_read(ReadDone("doubtful", Reading(Revision(30), {keys.running(ME, task_id(1)): None})), NOW + 1)
    assert poll(held, NOW + 1) == [Forget(key_of(1))]


def test_no_answer_to_reading_back() -> None:
    held = ended()
    held.finished(CommitDone("finish", None), NOW)
    poll(held, NOW + RETRY_S)
    held.doubts_read(ReadDone("doubtful", None), NOW + 1)
    assert len(poll(held, NOW + 1 + RETRY_S)) == 1


def test_an_end_refused_because_of_a_request_is_told_otherwise() -> None:
    held = ended()
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (False,))), NOW)
    assert poll(held) == []  # not at once
    later = NOW + RETRY_S
    assert len(poll(held, later)) == 1
    held.doubts_read(still_there(8, cancel_requested=True), later)
    (task,) = written(poll(held, later))
    assert task.outcome is Outcome.CANCELLED


def test_a_key_that_another_has_taken_meanwhile() -> None:
    held = ended()
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (False,))), NOW)
    poll(held, NOW + RETRY_S)
    new = key_entry(1, 15)
    held.doubts_read(ReadDone("doubtful", Reading(Revision(30), {new.key: new})), NOW + RETRY_S)
    assert poll(held, NOW + RETRY_S) == [Forget(key_of(1))]


def test_a_start_that_was_not_answered_is_asked_for() -> None:
    held = claimed()
    poll(held)
    held.started(Started(key_of(1), Revision(5), NoAnswer.UNKNOWN), NOW)
    assert poll(held) == []
    assert not held.nothing_runs
    later = NOW + RETRY_S
    assert poll(held, later) == [ListRuntime()]
    assert poll(held, later) == []
    held.runtime_listed(RuntimeListed(()), later)
    assert [type(e) for e in poll(held, later)] == [Start]


def test_a_listing_that_was_not_answered_is_asked_for_again() -> None:
    held = claimed()
    poll(held)
    held.started(Started(key_of(1), Revision(5), NoAnswer.UNKNOWN), NOW)
    poll(held, NOW + RETRY_S)
    assert held.next_s == NOW + RETRY_S + STOP_AGAIN_S
    assert poll(held, NOW + RETRY_S + STOP_AGAIN_S) == [ListRuntime()]


def test_a_start_that_is_under_way_is_not_called_off() -> None:
    """Neither 'not started', nor a stop that might overtake it."""
    held = claimed()
    poll(held)
    held.follow([appeared(modified=8, cancel_requested=True)])
    assert poll(held) == []
    held.runtime_listed(RuntimeListed(()), NOW)  # asked before the start
    assert poll(held) == []
    held.started(Started(key_of(1), Revision(5), None), NOW)
    assert poll(held) == [Stop(key_of(1), "cancelled")]


def test_a_request_to_end_is_made_again() -> None:
    held = running()
    held.follow([vanished()])
    poll(held)
    assert held.next_s == NOW + STOP_AGAIN_S
    assert poll(held, NOW + STOP_AGAIN_S) == [Stop(key_of(1), "fenced")]
    assert held.next_s == NOW + 2 * STOP_AGAIN_S
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), 20.0)
    assert poll(held, 20.0) == [Stop(key_of(1), "fenced")]


# --- the runtime ---------------------------------------------------------------------------------------------------


def test_after_a_restart_a_process_is_found_again() -> None:
    held = Holdings(ME)
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), NOW)
    held.follow([appeared()])
    held.listed({key_entry().key: key_entry()}, Revision(6))
    assert poll(held) == [Read("held", (keys.task(task_id(1)),))]
    held.read_done(records(record()), NOW)
    assert poll(held) == []
    assert held.held[task_id(1)].step is Step.RUNNING


def test_after_a_restart_an_end_is_found_again() -> None:
    held = Holdings(ME)
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, exit_code(3)),)), NOW)
    held.follow([appeared()])
    held.listed({key_entry().key: key_entry()}, Revision(6))
    poll(held)
    held.read_done(records(record()), NOW)
    assert written(poll(held))[0].attempts[-1].exit_code == 3


def test_a_process_of_another_token_is_a_stray() -> None:
    held = running(token=5)
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(4), LIFE, None),)), NOW)
    assert poll(held)[0] == Stop(key_of(1), "fenced")


def test_a_dead_shim_gives_its_attempts_back() -> None:
    held = running()
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, Exit(Reason.SHIM_LOST)),)), NOW)
    (task,) = written(poll(held))
    assert (task.state, task.losses) == (State.QUEUED, 1)


def test_a_running_attempt_that_the_runtime_does_not_show_is_asked_for_once_more() -> None:
    held = running()
    held.runtime_listed(RuntimeListed(()), NOW)
    assert poll(held) == []
    assert not held.nothing_runs
    assert poll(held, NOW + RETRY_S) == [ListRuntime()]
    held.runtime_listed(RuntimeListed(()), NOW + RETRY_S)
    assert [type(e) for e in poll(held, NOW + RETRY_S)] == [Start]


def test_an_older_listing_does_not_undo_an_end() -> None:
    held = running()
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), NOW)
    assert written(poll(held))[0].outcome is Outcome.SUCCEEDED
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    assert poll(held) == [Forget(key_of(1))]
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), NOW)
    assert poll(held) == [Forget(key_of(1))]
    assert held.nothing_runs


def test_an_end_told_twice() -> None:
    held = running()
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    poll(held)
    held.attempt_ended(AttemptEnded(key_of(1), exit_code(0)))
    held.finished(CommitDone("finish", txn.Committed(Revision(9), (True,))), NOW)
    assert poll(held) == [Forget(key_of(1))]
    assert held.attempt_ended(AttemptEnded(key_of(1), exit_code(0))) == [Forget(key_of(1))]
    assert held.empty


# --- giving back ---------------------------------------------------------------------------------------------------


def test_fenced_it_stops_all_and_gives_back_what_was_not_started() -> None:
    held = running()
    held.claimed(record(2), Revision(6), holding(1, LIFE))
    effects = poll(held, must_stop=True)
    assert effects[0] == Stop(key_of(1), "fenced")
    assert [t.id for t in written(effects)] == [task_id(2)]


def test_released() -> None:
    held = running()
    held.give_back(GiveBack.ALL)
    assert poll(held) == [Stop(key_of(1), "released")]
    held.attempt_ended(AttemptEnded(key_of(1), Exit(Reason.RELEASED, signal=15)))
    (task,) = written(poll(held))
    assert (task.state, task.losses, task.failures) == (State.QUEUED, 0, 0)


def test_what_another_life_holds_is_not_touched() -> None:
    held = ready()
    held.follow([appeared()])
    poll(held)
    held.read_done(records(record()), NOW)
    assert held.poll(NOW, 1, IncarnationId("mine"), SEEN, may_start=True, must_stop=True) == []
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), NOW)
    assert held.poll(NOW, 1, IncarnationId("mine"), SEEN, may_start=False, must_stop=True) == [
        Stop(key_of(1), "fenced")
    ]


def test_demand_is_what_is_held() -> None:
    held = ready()
    assert held.demand() == Resources()
    held.claimed(record(1, resources=cpus(2)), Revision(5), holding(1, LIFE))
    held.claimed(record(2, resources=cpus(1)), Revision(6), holding(1, LIFE))
    assert held.demand() == cpus(3)
    assert held.counted() == {task_id(1), task_id(2)}
    held.follow([vanished(1)])
    assert held.demand() == cpus(1)


# --- rights --------------------------------------------------------------------------------------------------------


def cleared(held: Holdings, *labels: str) -> list[Effect]:
    return held.poll(
        NOW, 5000, LIFE, SEEN, may_start=True, must_stop=False, acl_seen=Revision(8), clearances=frozenset(labels)
    )


def test_what_is_no_longer_covered_is_stopped() -> None:
    held = running(clearance=("red",))
    held.runtime_listed(RuntimeListed((HeldAttempt(key_of(1), Revision(5), LIFE, None),)), NOW)
    assert cleared(held, "red") == []
    assert cleared(held, "blue") == [Stop(key_of(1), Reason.RELEASED.value)]


def test_what_is_no_longer_covered_is_not_started() -> None:
    held = claimed(clearance=("red",))
    (commit,) = cleared(held)
    assert isinstance(commit, Commit)
    assert commit.txn.when == txn.finish_guards(ME, SEEN, Revision(8))
    (task,) = written([commit])
    assert (task.state, task.attempts[-1].reason) == (State.QUEUED, Reason.RELEASED.value)
