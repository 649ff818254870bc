"""The checker finds what it is for: each promise is broken once, in a forged history, ledger or acknowledgement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from spinetta import codec, keys
from spinetta.model import Exit, Life, Outcome, Reason, Resources, State, TaskId, TaskSpec
from tests.cluster.nemesis import checker
from tests.cluster.nemesis.forged import ONE, TIMES, A, B, Forged
from tests.cluster.nemesis.plan import KINDS, plan


@pytest.fixture
def forged() -> Forged:
    made = Forged()
    made.join(A)
    made.join(B)
    made.wait(1)
    return made


def moved(forged: Forged) -> None:
    """A task that loses its node and succeeds on the other: nothing is wrong with that."""
    forged.submit()
    forged.claim(A)
    forged.tell("B", 1, A)
    forged.lose(A, 10.1, ((1, A),))
    forged.run(B, 2)


def test_a_good_history_is_good(forged: Forged, tmp_path: Path) -> None:
    moved(forged)
    cancelled = TaskId(ONE[:-1] + "2")
    forged.submit(cancelled, "cancelled-waiting")
    forged.cancel_waiting(cancelled)
    present = {keys.task(t): (int(json.loads(line)["r"]), "") for t in forged.tasks for line in written(forged, t)[-1:]}
    verdict = forged.judge(tmp_path, present)
    assert verdict.good, verdict.text()
    assert not verdict.excused


def written(forged: Forged, task: TaskId) -> list[str]:
    return [line for line in forged.lines if json.loads(line)["k"] == keys.task(task)]


def test_a_task_may_leave_the_store_once_it_has_ended(forged: Forged, tmp_path: Path) -> None:
    moved(forged)
    forged.write(**{keys.task(ONE): None, keys.complete(ONE): None})
    verdict = forged.judge(tmp_path)
    assert verdict.good, verdict.text()


def removed_while_it_runs(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.write(**{keys.task(ONE): None, keys.running(A, ONE): None})


def back_from_the_archive(f: Forged) -> None:
    f.submit()
    f.run(A, 1)
    f.write(**{keys.task(ONE): None, keys.complete(ONE): None})
    f.write(**{keys.task(ONE): codec.encode_task(f.tasks[ONE]), keys.complete(ONE): b""})


def lost_record(f: Forged) -> None:
    moved(f)
    f.acks.append(json.dumps({"t": 1, "op": "sent", "ids": ["018f-x"], "kinds": ["short"]}))
    f.acks.append(json.dumps({"t": 1, "op": "acknowledged", "ids": ["018f-x"]}))


def never_ends(f: Forged) -> None:
    f.submit()
    f.claim(A)


def never_answered(f: Forged) -> None:
    f.submit(answered=False)
    f.run(A, 1)


def wrong_outcome(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.tell("E", 1, A, " 1")
    f.end(Exit(Reason.EXIT, exit_code=1, started_ms=1))


def given_up(f: Forged) -> None:
    f.submit(spec=TaskSpec(ONE, ("true",), resources=Resources(100), losses_allowed=0))
    f.claim(A)
    f.lose(A, 10.1)


def recorded_twice(f: Forged) -> None:
    moved(f)
    f.put(replace(f.tasks[ONE], completed_ms=99), {})


def went_back_and_ended_again(f: Forged) -> None:
    f.submit()
    f.run(A, 1)
    f.put(replace(f.tasks[ONE], state=State.QUEUED, outcome=Outcome.NONE),
          {keys.complete(ONE): None, keys.queued(ONE): b""})  # fmt: skip
    f.wait(1)
    f.run(B, 2)


def wrong_token(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.tell("E", 1, A, " 0")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1), token=1)


def not_in_ledger(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def killed_by_the_ledger(f: Forged) -> None:
    """The store says it ended well; it never told so."""
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def other_node_in_ledger(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, B)
    f.tell("E", 1, B, " 0")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def other_code_in_ledger(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.tell("E", 1, A, " 1")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def never_claimed(f: Forged) -> None:
    f.submit()
    f.run(A, 1)
    f.wait(1)
    f.tell("B", 2, B)


def started_twice(f: Forged) -> None:
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.tell("B", 1, A)
    f.tell("E", 1, A, " 0")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def started_after_its_cancel(f: Forged) -> None:
    f.submit(kind="cancelled-waiting")
    f.cancel_waiting()
    f.wait(1)
    f.tell("B", 1, B)


def cancel_told_and_not_done(f: Forged) -> None:
    f.submit(kind="cancelled-at-once")
    f.cancel_told()
    f.run(A, 1)


def two_at_once(f: Forged) -> None:
    """Put back before the first one is dead; it goes on, within its deadline."""
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.lose(A, 0, ((1, A),))
    f.claim(B)
    f.tell("B", 2, B)
    f.wait(1, ((1, A), (2, B)))
    f.tell("E", 2, B, " 0")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def past_its_deadline(f: Forged) -> None:
    """Alone, but 11 s after the last renewal of its node."""
    f.submit()
    f.claim(A)
    f.tell("B", 1, A)
    f.silent.add(A)
    f.wait(11, ((1, A),))
    f.silent.clear()
    f.wait(1)
    f.tell("E", 1, A, " 0")
    f.end(Exit(Reason.EXIT, exit_code=0, started_ms=1))


def before_any_renewal(f: Forged) -> None:
    f.submit()
    f.lines = [line for line in f.lines if keys.beat(A) not in line]
    f.silent.add(A)
    f.run(A, 1)


def condemned_claims(f: Forged) -> None:
    f.submit()
    f.write(**f.life(A, Life.CONDEMNED))
    f.run(A, 1)


def two_statuses(f: Forged) -> None:
    f.submit()
    f.run(A, 1)
    f.write(**{keys.queued(ONE): b""})


def too_much_at_once(f: Forged) -> None:
    f.submit(spec=TaskSpec(ONE, ("true",), resources=Resources(2001)))
    f.run(A, 1)


INVARIANTS = "the history keeps the invariants"
BROKEN: dict[Callable[[Forged], None], set[str]] = {
    removed_while_it_runs: {INVARIANTS, "an acknowledged task comes to an end"},
    back_from_the_archive: {INVARIANTS},
    lost_record: {"an acknowledged task is never lost"},
    never_ends: {"an acknowledged task comes to an end"},
    never_answered: {"a submit is answered in the end"},
    wrong_outcome: {"a task ends as it should"},
    given_up: {"a task ends as it should"},
    recorded_twice: {INVARIANTS},
    went_back_and_ended_again: {INVARIANTS, "a result is recorded once"},
    wrong_token: {INVARIANTS},
    not_in_ledger: {"a recorded result is that of an attempt that ran"},
    killed_by_the_ledger: {"a recorded result is that of an attempt that ran"},
    other_node_in_ledger: {"a recorded result is that of an attempt that ran"},
    other_code_in_ledger: {"a recorded result is that of an attempt that ran"},
    never_claimed: {"only what was claimed is started"},
    started_twice: {"an attempt is started once"},
    started_after_its_cancel: {
        "a task whose cancel was acknowledged while it waited never starts", "only what was claimed is started",
    },
    cancel_told_and_not_done: {"a task whose cancel was acknowledged while it waited never starts"},
    two_at_once: {"at most one attempt of a task executes at any time"},
    past_its_deadline: {"nothing runs past its deadline"},
    before_any_renewal: {"nothing runs past its deadline"},
    condemned_claims: {INVARIANTS},
    two_statuses: {INVARIANTS},
    too_much_at_once: {INVARIANTS},
}  # fmt: skip


@pytest.mark.parametrize("story", BROKEN, ids=lambda story: story.__name__)
def test_each_broken_promise_is_found(forged: Forged, tmp_path: Path, story: Callable[[Forged], None]) -> None:
    story(forged)
    assert set(forged.judge(tmp_path).wrong) == BROKEN[story]


def test_a_task_that_allows_it_may_run_twice_at_once(forged: Forged, tmp_path: Path) -> None:
    forged.submit(spec=TaskSpec(ONE, ("true",), resources=Resources(100), overlap=True))
    forged.claim(A)
    forged.tell("B", 1, A)
    forged.lose(A, 0, ((1, A),))
    forged.run(B, 2)
    forged.tell("H", 1, A)
    verdict = forged.judge(tmp_path)
    assert verdict.good, verdict.text()
    assert verdict.excused == {"two attempts at once, of a task that allows it": 1}


@pytest.mark.parametrize("story", [two_at_once, past_its_deadline])
def test_only_a_shim_that_was_denied_the_cpu_is_excused(
    forged: Forged, tmp_path: Path, story: Callable[[Forged], None]
) -> None:
    story(forged)
    elsewhere = checker.Hit("stop-shim", (B,), 990, forged.now_s)
    short = checker.Hit("stop-shim", (A,), 1001, 1001.5)
    other = checker.Hit("stop-daemon", (A,), 990, forged.now_s)
    forged.hits = [short, other] + ([elsewhere] if story is past_its_deadline else [])
    assert not forged.judge(tmp_path).good
    forged.hits = [checker.Hit("stop-shim", (A,), 1001, forged.now_s)]
    verdict = forged.judge(tmp_path)
    assert verdict.good, verdict.text()
    assert sum(verdict.excused.values()) == 1


def test_a_history_with_a_hole_is_found(forged: Forged, tmp_path: Path) -> None:
    forged.submit()
    forged.run(A, 1)
    verdict = forged.judge(tmp_path, {keys.task(ONE): (forged.revision + 5, "")})
    assert set(verdict.wrong) == {"the history is whole"}
    forged.lines.remove(written(forged, ONE)[1])
    assert INVARIANTS in forged.judge(tmp_path).wrong


def test_a_schedule_is_its_seed_and_has_every_kind() -> None:
    long = plan(3, 3600, TIMES)
    assert long == plan(3, 3600, TIMES) != plan(4, 3600, TIMES)
    assert {f.kind for f in long} == set(KINDS)
    assert all(a.at_s <= b.at_s for a, b in pairwise(long))
    assert max(f.at_s + f.hold_s for f in long) <= 3600
    assert {f.kind for f in plan(3, 600, TIMES, ["cut"])} <= {"cut", "kill-daemon", "stop-daemon", "term-daemon"}
