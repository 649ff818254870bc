"""Writes that the store refuses as they are: ends say less and are recorded, claims are left, none is made for ever."""

from __future__ import annotations

from spinetta import keys, txn
from spinetta.attempt import REFUSED_AGAIN_MAX_S, SHORT_CHARS
from spinetta.claims import RETRY_S as CLAIM_RETRY_S
from spinetta.events import AttemptEnded, Commit, CommitDone, Notice, Read, Rejected, Started
from spinetta.holdings import RETRY_S, Holdings
from spinetta.model import Exit, Outcome, Reason, Revision
from tests.builders import holding, key_of, task_id
from tests.unit.test_claims import LISTED, Bench, row, task_entry
from tests.unit.test_holdings import LIFE, NOW, poll, ready, record, written

TOO_LARGE = Rejected("the request is larger than the 1.5 MiB that etcd takes")
DONE = txn.Committed(Revision(30), (True,))


def ended(*ns: int, message: str = "x" * 1000) -> Holdings:
    """Attempts that have failed, with much to say, and whose ends are to be recorded."""
    held = ready()
    for n in ns:
        held.claimed(record(n), Revision(5), holding(1, LIFE))
    poll(held)
    for n in ns:
        held.started(Started(key_of(n), Revision(5), None), NOW)
        held.attempt_ended(AttemptEnded(key_of(n), Exit(Reason.SPAWN_FAILED, message=message)))
    return held


def answer(held: Holdings, result: txn.Result | Rejected | None, now: float = NOW) -> list[Notice]:
    return [e for e in held.finished(CommitDone("finish", result), now) if isinstance(e, Notice)]


def test_an_end_that_is_too_large_says_less_then_nothing_and_is_recorded() -> None:
    held = ended(1)
    lengths, now = [], NOW
    for _ in range(2):
        (task,) = written(poll(held, now))
        lengths.append(len(task.message))
        (notice,) = answer(held, TOO_LARGE, now)
        assert key_of(1) in notice.text
        assert "1.5 MiB" in notice.text
    (task,) = written(poll(held, now))
    assert (lengths[0], SHORT_CHARS < lengths[1] < 200, task.message) == (1000, True, "")
    assert (task.outcome, task.reason) == (Outcome.FAILED, Reason.SPAWN_FAILED.value)
    assert answer(held, DONE) == []
    assert not held.held


def test_nothing_left_to_cut_it_is_tried_ever_more_rarely_and_others_are_recorded_meanwhile() -> None:
    held = ended(1)
    now, waits = NOW, []
    for _ in range(12):
        assert written(poll(held, now))
        answer(held, TOO_LARGE, now)
        then = held.next_s
        assert then is not None
        waits.append(then - now)
        if then > now:
            assert poll(held, now) == []
        now = then
    assert waits == sorted(waits)
    assert waits[-1] == REFUSED_AGAIN_MAX_S
    held.claimed(record(2), Revision(6), holding(1, LIFE))
    now -= 1  # the first one is not to be tried yet
    poll(held, now)
    held.started(Started(key_of(2), Revision(6), None), now)
    held.attempt_ended(AttemptEnded(key_of(2), Exit(Reason.EXIT, exit_code=0)))
    (task,) = written(poll(held, now))
    assert task.id == task_id(2)


def test_a_batch_that_is_refused_is_recorded_in_parts_without_reading_back() -> None:
    held = ended(1, 2, 3, 4)
    assert len(written(poll(held))) == 4
    assert answer(held, TOO_LARGE) == []
    assert poll(held) == []  # not at once
    now, parts = NOW, []
    while held.held:
        now += RETRY_S
        effects = poll(held, now)
        assert not any(isinstance(e, Read) for e in effects)
        tasks = written(effects)
        parts.append([t.id for t in tasks])
        bad = any(t.id == task_id(2) and t.message for t in tasks)
        answer(held, TOO_LARGE if bad else txn.Committed(Revision(30), (True,) * len(tasks)), now)
    one, two, three, four = (task_id(n) for n in (1, 2, 3, 4))
    assert parts == [[one, two], [one], [two, three], [two], [three], [four], [two], [two]]
    held.claimed(record(6), Revision(9), holding(1, LIFE))  # and the next ones go together again
    held.claimed(record(7), Revision(9), holding(1, LIFE))
    poll(held, now)
    for n in (6, 7):
        held.started(Started(key_of(n), Revision(9), None), now)
        held.attempt_ended(AttemptEnded(key_of(n), Exit(Reason.EXIT, exit_code=0)))
    assert len(written(poll(held, now))) == 2


def test_what_was_refused_keeps_nobody_awake_while_it_cannot_be_recorded() -> None:
    """A time that is past would have the agent asked again and again, without a pause."""
    held, now = ended(1), NOW
    while held.next_s is None or held.next_s <= now:
        assert written(poll(held, now))
        answer(held, TOO_LARGE, now)
    then = held.next_s
    held.poll(then, 5000, LIFE, Revision(0), may_start=False, must_stop=False)  # under which revision is not known
    assert held.next_s is None or held.next_s > then
    assert written(poll(held, then))


def test_an_unknown_answer_is_still_read_back() -> None:
    held = ended(1)
    assert written(poll(held))
    assert answer(held, None) == []
    assert [e.tag for e in poll(held, NOW + RETRY_S) if isinstance(e, Read)] == ["doubtful"]


# --- claims --------------------------------------------------------------------------------------------------------


def rejected(b: Bench) -> list[Notice]:
    return [e for e in b.claims.rejected(TOO_LARGE, b.now) if isinstance(e, Notice)]


def test_claims_that_are_refused_together_are_made_fewer_until_it_shows_which_one_it_is() -> None:
    b, commit = Bench().committing(1, 2, 3, 4)
    assert len(commit.txn.nested) == 4
    assert rejected(b) == []
    assert b.claims.reserved().cpu_millis == 0  # nothing of it can commit any more
    assert b.poll() == []  # a pause
    sizes, now = [], b.now
    for _ in range(2):
        now += CLAIM_RETRY_S
        (ask,) = b.poll(now)
        assert isinstance(ask, Read)
        (made,) = b.read(*(task_entry(n) for n in (1, 2, 3, 4) if keys.task(task_id(n)) in ask.keys))
        assert isinstance(made, Commit)
        sizes.append(len(made.txn.nested))
        notices = rejected(b)
    assert sizes == [2, 1]
    (notice,) = notices
    assert task_id(1) in notice.text
    (ask,) = b.poll(now + CLAIM_RETRY_S)
    assert isinstance(ask, Read)
    assert keys.task(task_id(1)) not in ask.keys  # it is left, and the next one is taken


def test_after_a_claim_that_went_well_more_are_made_at_once_again() -> None:
    b, _ = Bench().committing(1, 2, 3, 4)
    rejected(b)
    now, sizes, left = b.now, [], [1, 2, 3, 4]
    while left:
        now += CLAIM_RETRY_S
        (ask,) = b.poll(now)
        assert isinstance(ask, Read)
        taken = [n for n in left if keys.task(task_id(n)) in ask.keys]
        b.read(*(task_entry(n) for n in taken))
        sizes.append(len(taken))
        b.answer(txn.Committed(Revision(LISTED + len(sizes)), (True,) * len(taken)))
        left = [n for n in left if n not in taken]
    assert sizes == [2, 2]
    assert set(b.holdings.held) == {task_id(n) for n in (1, 2, 3, 4)}


def test_a_claim_whose_answer_was_lost_before_is_read_back_when_the_next_is_refused() -> None:
    b, _ = Bench().committing(1)
    b.answer(None)
    (ask,) = b.poll(b.now + CLAIM_RETRY_S)
    assert isinstance(ask, Read)
    (again,) = b.read_back(row(1), keys_=(1,))
    assert isinstance(again, Commit)
    assert rejected(b) == []
    (ask,) = b.poll(b.now + CLAIM_RETRY_S)
    assert isinstance(ask, Read)
    assert ask.tag == "claim-doubt"
