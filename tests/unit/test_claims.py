"""The thief: the window while there is room, rounds of claims, and what becomes of lost answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spinetta import codec, keys, lifecycle, txn
from spinetta.bids import Stage
from spinetta.claims import HOLD_OFF_S, LINGER_S, RETRY_S, Claims
from spinetta.events import (
    Change,
    Changed,
    Commit,
    CommitDone,
    Effect,
    Entry,
    List,
    ListDone,
    Listing,
    Read,
    ReadDone,
    Reading,
    Unwatch,
    Watch,
    WatchLost,
)
from spinetta.holdings import Holdings
from spinetta.model import Holding, IncarnationId, NodeId, NodeRecord, Resources, Revision, Task
from spinetta.queue import PAGE_KEYS
from spinetta.steal import CLAIMS_MAX, rank
from tests.builders import BIG, cpus, entry, hint, node_record, queued, settings, task_id

ME = NodeId("n1")
LIFE = IncarnationId("life")
REG = txn.Registration(ME, Revision(3), Revision(3), Revision(0))
LISTED = Revision(100)


@dataclass
class Bench:
    """The claims of one node, and what it would hold."""

    claims: Claims = field(default_factory=lambda: Claims(settings()))
    holdings: Holdings = field(default_factory=lambda: Holdings(ME))
    now: float = 1.0
    free: Resources | None = BIG
    slots: int = 512
    peers: tuple[NodeRecord, ...] = ()
    registration: txn.Registration | None = REG
    incarnation: IncarnationId | None = LIFE

    def poll(self, now: float | None = None) -> list[Effect]:
        self.now = self.now if now is None else now
        return self.claims.poll(self.now, self.registration, self.incarnation, self.free, self.slots, self.peers)

    def opened(self, *rows: Entry, more: bool = False) -> list[Effect]:
        """The window shows these."""
        assert self.poll() == [List("queue", keys.QUEUED, "", PAGE_KEYS)]
        return self.claims.listed(ListDone("queue", Listing(LISTED, rows, more)), self.now)

    def reading(self, *ns: int) -> Bench:
        """A round that has asked for the records of these tasks."""
        self.opened(*(row(n) for n in ns))
        assert self.poll() == [Read("claim", tuple(keys.task(task_id(n)) for n in ns))]
        return self

    def committing(self, *ns: int) -> tuple[Bench, Commit]:
        self.reading(*ns)
        (commit,) = self.read(*(task_entry(n) for n in ns))
        assert isinstance(commit, Commit)
        return self, commit

    def read(self, *entries: Entry) -> list[Effect]:
        rows: dict[str, Entry | None] = {e.key: e for e in entries}
        return self.claims.records_read(ReadDone("claim", Reading(LISTED, rows)), self.now, 1000, self.registration)

    def answer(self, result: txn.Result | None) -> bool:
        return self.claims.answered(CommitDone("claim", result), self.now, self.holdings)

    def read_back(self, *entries: Entry, keys_: tuple[int, ...] = ()) -> list[Effect]:
        rows: dict[str, Entry | None] = {
            k: None for n in keys_ for k in (keys.running(ME, task_id(n)), keys.queued(task_id(n)))
        }
        rows.update({e.key: e for e in entries})
        done = ReadDone("claim-doubt", Reading(Revision(200), rows))
        return self.claims.read_back(done, self.now, self.registration, self.holdings)


def row(
    n: int, resources: Resources | None = None, *, at: int | None = None, empty: bool = False, needs: Sequence[str] = ()
) -> Entry:
    value = b"" if empty else codec.encode_hint(hint(resources, needs=tuple(needs)))
    return entry(keys.queued(task_id(n)), value, at or n, at or n)


def task_entry(n: int, *, at: int | None = None, task: Task | None = None) -> Entry:
    return entry(keys.task(task_id(n)), codec.encode_task(task or queued(n)), 1, at or n)


def running_entry(n: int, token: int, incarnation: str = LIFE, attempt: int = 1) -> Entry:
    value = codec.encode_holding(Holding(attempt, IncarnationId(incarnation), 8.0))
    return entry(keys.running(ME, task_id(n)), value, token, token)


# --- the window ----------------------------------------------------------------------------------------------------


def test_a_hungry_node_lists_then_watches() -> None:
    b = Bench()
    assert b.opened(row(1)) == [Watch("queue", 1, keys.QUEUED, Revision(LISTED + 1))]


def test_a_node_that_may_not_take_anything_does_not_look() -> None:
    for b in (
        Bench(free=None),
        Bench(registration=None),
        Bench(slots=0),
        Bench(free=Resources(memory_bytes=1 << 40)),
    ):
        assert b.poll() == []
        assert b.claims.next_s is None


def test_a_full_node_keeps_its_window_for_a_moment() -> None:
    b = Bench()
    b.opened()
    b.free = cpus(0)
    assert b.poll(5.0) == []
    assert b.claims.next_s == 5.0 + LINGER_S
    assert b.poll(14.9) == []
    assert b.poll(15.0) == [Unwatch("queue")]
    assert b.claims.next_s is None
    b.free = BIG
    assert b.poll(16.0) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]


def test_a_node_that_is_hungry_again_in_time_goes_on() -> None:
    b = Bench()
    b.opened()
    b.free = cpus(0)
    b.poll(5.0)
    b.free = BIG
    assert b.poll(10.0) == []
    assert b.poll(16.0) == []
    assert b.claims.next_s is not None
    assert b.claims.next_s > 16.0


def test_further_pages() -> None:
    b = Bench()
    b.opened(row(1, cpus(99)), row(2, cpus(99)), more=True)
    assert b.poll() == [List("queue", keys.QUEUED, keys.queued(task_id(2)), PAGE_KEYS)]
    assert b.claims.listed(ListDone("queue", Listing(LISTED, (row(3),))), b.now) == []
    assert [type(e) for e in b.poll()] == [Read]


def test_a_page_that_was_not_answered() -> None:
    b = Bench()
    b.poll()
    assert b.claims.listed(ListDone("queue", None), 1.0) == []
    assert b.poll(1.1) == []
    assert b.claims.next_s == 1.0 + RETRY_S
    assert b.poll(1.0 + RETRY_S) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]


def test_a_lost_watch_begins_again_from_the_head() -> None:
    b = Bench()
    b.opened(row(1, cpus(99)), row(2, cpus(99)), more=True)
    b.poll()  # the second page is under way
    b.claims.watch_lost(WatchLost("queue", 1), b.now)
    late = b.claims.listed(ListDone("queue", Listing(Revision(120), (row(9),))), b.now)
    assert late == []
    assert b.claims.window.covered_to == ""
    assert b.poll(b.now + RETRY_S) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]
    again = b.claims.listed(ListDone("queue", Listing(Revision(130), (row(1), row(9)))), b.now)
    assert again == [Watch("queue", 2, keys.QUEUED, Revision(131))]


def test_events_of_an_earlier_watch_are_ignored() -> None:
    b = Bench()
    b.opened()
    change = Change(keys.queued(task_id(1)), row(1, at=101), Revision(101))
    b.claims.changed(Changed("queue", 7, (change,), Revision(101)), b.now)
    assert b.poll() == []
    b.claims.changed(Changed("queue", 1, (change,), Revision(101)), b.now)
    assert len(b.poll()) == 1


def test_it_lists_again_now_and_then() -> None:
    b = Bench()
    b.opened()
    assert b.claims.next_s == 1.0 + b.claims.settings.reconcile_s
    assert b.poll(1.0 + b.claims.settings.reconcile_s) == [List("queue", keys.QUEUED, "", PAGE_KEYS)]


def test_tasks_without_a_hint_are_read_first() -> None:
    b = Bench()
    b.opened(row(1, empty=True))
    assert b.poll() == [Read("hints", (keys.task(task_id(1)),))]
    b.claims.hints_read(ReadDone("hints", Reading(LISTED, {keys.task(task_id(1)): task_entry(1)})), b.now)
    assert b.poll() == [Read("claim", (keys.task(task_id(1)),))]


def test_a_hint_whose_record_is_gone() -> None:
    b = Bench()
    b.opened(row(1, empty=True))
    b.poll()
    b.claims.hints_read(ReadDone("hints", Reading(LISTED, {keys.task(task_id(1)): None})), b.now)
    assert b.poll() == []


def test_hints_that_were_not_answered() -> None:
    b = Bench()
    b.opened(row(1, empty=True))
    b.poll()
    b.claims.hints_read(ReadDone("hints", None), 1.0)
    assert b.poll(1.2) == []
    assert len(b.poll(1.0 + RETRY_S)) == 1


# --- a round -------------------------------------------------------------------------------------------------------


def test_a_round_reads_commits_and_hands_over() -> None:
    b, commit = Bench().committing(1, 2)
    assert commit.tag == "claim"
    assert commit.txn.when == REG.guards()
    first = commit.txn.nested[0]
    assert first.when == (txn.RevisionIs(keys.queued(task_id(1)), Revision(1)),)
    held = next(p for p in first.then if isinstance(p, txn.Put) and p.key == keys.running(ME, task_id(1)))
    assert codec.decode_holding(held.value) == Holding(1, LIFE, 8.0)
    record = next(p for p in first.then if isinstance(p, txn.Put) and p.key == keys.task(task_id(1)))
    assert codec.decode_task(record.value) == lifecycle.claimed(queued(1), ME, LIFE, now_ms=1000)
    assert b.claims.reserved() == cpus(2)
    assert b.answer(txn.Committed(Revision(150), (True, False)))
    assert list(b.holdings.held) == [task_id(1)]
    assert b.holdings.held[task_id(1)].token == 150
    assert b.claims.reserved() == Resources()
    assert b.poll() == []


def test_a_node_that_holds_off_takes_nothing_for_a_while() -> None:
    b = Bench()
    b.opened(row(1))
    b.claims.hold_off(b.now)
    assert b.poll() == []
    assert b.claims.next_s == b.now + HOLD_OFF_S
    b.claims.hints_read(ReadDone("hints", None), b.now)  # a shorter pause does not cut it short
    assert b.poll(b.now + HOLD_OFF_S - 0.1) == []
    assert Read("claim", (keys.task(task_id(1)),)) in b.poll(1.0 + HOLD_OFF_S)


def test_what_a_node_is_short_of_holds_it_off_nothing_else() -> None:
    room = cpus(4, 1 << 33, gpu=2)
    record = node_record(ME, room, allows=("process", "container", "network:bridge"))
    b = Bench(Claims(replace(settings(), record=record)), free=room)
    b.opened(row(1, cpus(1, gpu=1)), row(2, needs=("container", "network:bridge")), row(3, needs=("container",)))
    b.claims.hold_off(b.now, "gpu")
    b.claims.hold_off(b.now, "network:bridge")
    assert b.poll() == [Read("claim", (keys.task(task_id(3)),))]
    b.read()  # it is somebody else's
    assert b.poll(2.0) == []
    b.claims._reconcile_at_s = 100.0  # nothing else wakes it
    assert b.claims.next_s == 1.0 + HOLD_OFF_S
    assert b.poll(0.9 + HOLD_OFF_S) == []
    assert b.poll(1.0 + HOLD_OFF_S) == [Read("claim", (keys.task(task_id(1)), keys.task(task_id(2))))]


def test_one_round_at_a_time() -> None:
    b, _ = Bench().committing(1)
    change = Change(keys.queued(task_id(5)), row(5, at=101), Revision(101))
    b.claims.changed(Changed("queue", 1, (change,), Revision(101)), b.now)
    assert b.poll() == []
    b.answer(txn.Committed(Revision(150), (True,)))
    assert b.poll() == [Read("claim", (keys.task(task_id(5)),))]


def test_a_task_of_its_own_grace() -> None:
    b = Bench().reading(1)
    (commit,) = b.read(task_entry(1, task=queued(1, grace_s=33.0)))
    assert isinstance(commit, Commit)
    put = commit.txn.nested[0].then[1]
    assert isinstance(put, txn.Put)
    assert codec.decode_holding(put.value).grace_s == 33.0


def test_records_that_have_moved_on_are_not_claimed() -> None:
    b = Bench().reading(1, 2)
    (commit,) = b.read(task_entry(1, at=90), task_entry(2))
    assert isinstance(commit, Commit)
    assert len(commit.txn.nested) == 1
    b.answer(txn.Committed(Revision(150), (True,)))
    assert list(b.holdings.held) == [task_id(2)]


def test_nothing_left_to_claim() -> None:
    b = Bench().reading(1)
    assert b.read(task_entry(1, at=90)) == []
    assert b.claims.round is None
    assert b.poll() == []


def test_a_record_that_is_not_queued_is_not_asked_for_for_ever() -> None:
    b = Bench().reading(1)
    assert b.read(task_entry(1, task=lifecycle.claimed(queued(1), ME, LIFE, now_ms=1))) == []
    assert b.poll() == []


def test_no_answer_to_the_records() -> None:
    b = Bench().reading(1)
    assert b.claims.records_read(ReadDone("claim", None), 1.0, 1000, REG) == []
    assert b.poll(1.1) == []
    assert b.poll(1.0 + RETRY_S) == [Read("claim", (keys.task(task_id(1)),))]


def test_a_registration_lost_while_reading() -> None:
    b = Bench().reading(1)
    b.registration = None
    assert b.read(task_entry(1)) == []
    assert b.claims.round is None


def test_a_registration_that_is_refused() -> None:
    b, _ = Bench().committing(1)
    assert not b.answer(txn.Conflict(Revision(150)))
    assert b.claims.round is None


def test_large_records_do_not_outgrow_a_request() -> None:
    big = {"env": (("X", "x" * 400_000),)}
    b = Bench().reading(1, 2, 3, 4)
    (commit,) = b.read(*(task_entry(n, task=queued(n, **big)) for n in (1, 2, 3, 4)))
    assert isinstance(commit, Commit)
    assert 1 <= len(commit.txn.nested) < 4
    assert (
        sum(len(p.value) for t in commit.txn.nested for p in t.then if isinstance(p, txn.Put))
        < 1.1 * txn.BATCH_BYTES_MAX
    )
    b.answer(txn.Committed(Revision(150), (True,) * len(commit.txn.nested)))
    assert len(b.poll()) == 1


def test_one_record_larger_than_a_batch_is_claimed_alone() -> None:
    b = Bench().reading(1)
    (commit,) = b.read(task_entry(1, task=queued(1, env=(("X", "x" * (txn.BATCH_BYTES_MAX + 1)),))))
    assert isinstance(commit, Commit)
    assert len(commit.txn.nested) == 1


def test_a_round_can_be_read_back_at_once() -> None:
    """Two keys for each bid: a read takes 120."""
    assert 2 * CLAIMS_MAX <= 120


# --- lost answers --------------------------------------------------------------------------------------------------


def doubtful(*ns: int) -> Bench:
    b, _ = Bench().committing(*ns)
    assert b.answer(None)
    assert b.claims.round is not None
    assert b.claims.round.stage is Stage.DOUBTFUL
    assert b.claims.next_s == b.now + RETRY_S
    wanted = tuple(k for n in ns for k in (keys.running(ME, task_id(n)), keys.queued(task_id(n))))
    assert b.poll(b.now + RETRY_S) == [Read("claim-doubt", wanted)]
    return b


def test_it_was_won() -> None:
    b = doubtful(1)
    assert b.read_back(running_entry(1, 150), keys_=(1,)) == []
    assert b.holdings.held[task_id(1)].token == 150
    assert b.claims.round is None


def test_it_was_lost() -> None:
    b = doubtful(1)
    assert b.read_back(row(1, at=150), keys_=(1,)) == []
    assert b.holdings.held == {}
    assert b.claims.round is None
    assert b.poll() == []


def test_another_attempt_of_ours_is_not_this_one() -> None:
    b = doubtful(1)
    assert b.read_back(running_entry(1, 150, attempt=2), keys_=(1,)) == []
    assert b.holdings.held == {}


def test_it_may_still_be_under_way_and_is_made_again() -> None:
    b = doubtful(1, 2)
    (commit,) = b.read_back(row(1), running_entry(2, 150), keys_=(1, 2))
    assert isinstance(commit, Commit)
    assert len(commit.txn.nested) == 1
    assert list(b.holdings.held) == [task_id(2)]
    assert b.claims.reserved() == cpus(1)


def test_lost_to_its_own_first_proposal() -> None:
    b = doubtful(1)
    b.read_back(row(1), keys_=(1,))
    assert b.answer(txn.Committed(Revision(160), (False,)))
    assert b.claims.reserved() == cpus(1)  # not given away before it is known
    assert [type(e) for e in b.poll()] == [Read]
    b.read_back(running_entry(1, 155), keys_=(1,))
    assert b.holdings.held[task_id(1)].token == 155
    assert b.claims.reserved() == Resources()


def test_a_refused_second_proposal_decides_nothing() -> None:
    b = doubtful(1)
    b.read_back(row(1), keys_=(1,))
    assert not b.answer(txn.Conflict(Revision(160)))
    assert b.claims.reserved() == cpus(1)
    b.registration = None
    b.poll(b.now + RETRY_S)
    assert b.read_back(row(1), keys_=(1,)) == []  # nothing is claimed without a registration
    assert b.claims.reserved() == cpus(1)


def test_no_answer_to_reading_back() -> None:
    b = doubtful(1)
    assert b.claims.read_back(ReadDone("claim-doubt", None), b.now, REG, b.holdings) == []
    assert [type(e) for e in b.poll(b.now + RETRY_S)] == [Read]


def test_what_the_watch_has_shown_already_is_counted_once() -> None:
    b = doubtful(1, 2)
    assert b.claims.reserved({task_id(1)}) == cpus(1)


def test_a_round_ends_with_its_life() -> None:
    b = doubtful(1)
    b.incarnation = IncarnationId("another")
    b.poll()
    assert b.claims.round is None or b.claims.round.incarnation == "another"
    assert b.read_back(row(1), keys_=(1,)) == []
    c, _ = Bench().committing(1)
    c.claims.life_ended()
    assert c.answer(txn.Committed(Revision(150), (True,)))
    assert c.holdings.held == {}


# --- turns ---------------------------------------------------------------------------------------------------------


def test_ranks_are_computed_anew_when_peers_come_or_go() -> None:
    peers = tuple(node_record(f"n{n}") for n in range(2, 9))
    b = Bench(peers=peers)
    late = max(range(1, 50), key=lambda n: sum(1 for p in peers if _before(p.name, n)))
    b.opened(row(late))
    assert b.poll() == []
    assert b.claims.next_s is not None
    assert b.claims.next_s > b.now
    b.peers = ()
    b.claims.without_wait()
    assert len(b.poll()) == 1


def _before(rival: NodeId, n: int) -> bool:
    return rank(ME, task_id(n), [rival]) == 1


def test_without_news_nothing_is_planned_again() -> None:
    b = Bench(free=cpus(1))
    b.opened(row(1, cpus(4)))
    assert b.poll() == []
    b.free = cpus(4)
    assert b.poll() == []  # it has not been told of the room
    b.claims.touch()
    assert len(b.poll()) == 1
