"""Which finished tasks leave the store: due by age and by number, archived first, guarded, bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from spinetta import codec, collect, keys, txn
from spinetta.collect import Collector, before, born_ms
from spinetta.events import (
    Archive,
    Archived,
    CollectTag,
    Commit,
    CommitDone,
    Effect,
    List,
    ListDone,
    Listing,
    Notice,
    Read,
    ReadDone,
)
from spinetta.model import Completed, NodeId, Outcome, Revision, State, Task, TaskId
from tests.builders import queued, settings
from tests.sim.direct import answer_of
from tests.sim.etcd_model import EtcdModel

ME, OTHER = NodeId("n1"), NodeId("n2")
DAY_MS = 86_400_000
NOW_MS = 1_800_000_000_000  # ids carry times, so the clock must be of their kind
AFTER_S, RECONCILE_S = 7 * 86400.0, 20.0
SETTLE_MS = int(2 * RECONCILE_S * 1000)


def id_at(ms: int, n: int = 0) -> TaskId:
    digits = f"{ms:012x}7{n:03x}8{n:015x}"
    return TaskId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")


def ended(task: TaskId, completed_ms: int) -> Task:
    task_ = queued(1)
    return replace(
        task_,
        spec=replace(task_.spec, id=task),
        state=State.COMPLETE,
        outcome=Outcome.SUCCEEDED,
        completed_ms=completed_ms,
    )


@dataclass
class Bench:
    """A collector, a store, and archives that keep what they are given unless told otherwise."""

    collector: Collector
    etcd: EtcdModel = field(default_factory=EtcdModel)
    now: float = 0.0
    now_ms: int = NOW_MS
    live: set[NodeId] = field(default_factory=lambda: {ME, OTHER})
    refuses: set[NodeId] = field(default_factory=set)
    archived: dict[NodeId, list[TaskId]] = field(default_factory=dict)
    log: list[Effect] = field(default_factory=list)
    office: txn.OfficeHeld | None = None
    meddle: Callable[[Effect], None] = lambda _: None
    says: Callable[[Archive], Archived] | None = None

    def __post_init__(self) -> None:
        taken = self.etcd.commit(txn.take_office(ME, self.etcd.grant_lease(1000), b"n1"))
        self.office = txn.OfficeHeld(taken.revision, ME)

    def finish(self, completed_ms: int, *, node: NodeId | None = OTHER, submitted_ms: int = 0, n: int = 0) -> TaskId:
        task = id_at(submitted_ms or completed_ms - 1000, n)
        value = codec.encode_completed(Completed(node, completed_ms)) if node else b""
        record = codec.encode_task(ended(task, completed_ms))
        self.etcd.commit(txn.Txn(then=(txn.Put(keys.task(task), record), txn.Put(keys.complete(task), value))))
        return task

    def left(self) -> list[TaskId]:
        records = [keys.parse_task(e.key) for e in self.etcd.list(keys.TASK).entries]
        assert records == [keys.parse_task(e.key) for e in self.etcd.list(keys.COMPLETE).entries]
        return records

    def archive(self, effect: Archive) -> Archived:
        if self.says is not None:
            return self.says(effect)
        ids = [codec.decode_task(r).id for r in effect.records]
        if effect.node in self.refuses:
            return Archived(effect.office, effect.node, frozenset(), "its disk is full")
        self.archived.setdefault(effect.node, []).extend(ids)
        return Archived(effect.office, effect.node, frozenset(ids))

    def passes(self, seconds: float) -> Bench:
        """Let time go on, answering all that is asked."""
        until = self.now + seconds
        while True:
            todo = self.collector.poll(self.now, self.office, {keys.node(n) for n in self.live})
            while todo:
                effect = todo.pop(0)
                self.log.append(effect)
                self.meddle(effect)
                match effect:
                    case Notice():
                        continue
                    case Archive():
                        event: Archived | CommitDone | ReadDone | ListDone = self.archive(effect)
                    case _:
                        answer = answer_of(self.etcd, effect)
                        assert isinstance(answer, (CommitDone, ReadDone, ListDone))
                        event = answer
                todo += self.collector.took(event, self.now, self.now_ms)
            next_s = self.collector.next_s
            if next_s is None or next_s > until:
                break
            self.now_ms += int(1000 * max(next_s - self.now, 0))
            self.now = max(self.now, next_s)
        self.now_ms += int(1000 * (until - self.now))
        self.now = until
        return self

    def asked(self, kind: type[Effect]) -> list[Effect]:
        return [e for e in self.log if isinstance(e, kind)]


def bench(*, after_s: float = AFTER_S, keep: int = 100, **more: object) -> Bench:
    made = settings("n1", reconcile_s=RECONCILE_S, collect_after_s=after_s, collect_keep=keep)
    return Bench(Collector(made), **more)  # type: ignore[arg-type]


def test_what_ended_long_ago_leaves_and_the_rest_stays() -> None:
    b = bench()
    old, young = b.finish(NOW_MS - 8 * DAY_MS), b.finish(NOW_MS - 6 * DAY_MS)
    b.passes(5)
    assert b.left() == [young]
    assert b.archived == {OTHER: [old]}
    assert [e.key for e in b.etcd.list(keys.ARCHIVE).entries] == [keys.archive(OTHER)]


def test_the_time_of_the_end_counts_not_that_of_the_submission() -> None:
    b = bench()
    task = b.finish(NOW_MS - DAY_MS, submitted_ms=NOW_MS - 30 * DAY_MS)
    b.passes(100)
    assert b.left() == [task]
    b.now_ms += 7 * DAY_MS
    b.passes(30)
    assert b.left() == []


def test_too_many_leave_by_submission_the_oldest_first() -> None:
    b = bench(after_s=0, keep=3)
    ids = [b.finish(NOW_MS - DAY_MS + i, n=i) for i in range(10)]
    b.passes(5)
    assert b.left() == ids[-3:]


def test_nothing_leaves_before_those_who_wait_have_seen_it() -> None:
    b = bench(after_s=1, keep=1)
    for i in range(5):
        b.finish(NOW_MS, n=i)
    b.passes(2 * RECONCILE_S - 1)
    assert len(b.left()) == 5
    b.passes(RECONCILE_S + 1)
    assert b.left() == []


def test_switched_off_nothing_is_even_asked() -> None:
    b = bench(after_s=0, keep=0)
    b.finish(NOW_MS - 1000 * DAY_MS)
    b.passes(1000)
    assert (b.log, b.collector.next_s) == ([], None)


def test_without_the_office_nothing_is_asked() -> None:
    b = bench()
    b.office = None
    b.finish(NOW_MS - 8 * DAY_MS)
    assert b.passes(1000).log == []


@pytest.mark.parametrize("why", ["gone", "said nothing"])
def test_the_leader_archives_for_those_who_cannot(why: str) -> None:
    b = bench()
    if why == "gone":
        b.live = {ME}
        task = b.finish(NOW_MS - 8 * DAY_MS)
    else:
        task = b.finish(NOW_MS - 8 * DAY_MS, node=None)
    b.passes(5)
    assert b.archived == {ME: [task]}


def test_a_value_that_does_not_tell_is_no_reason_to_collect_early() -> None:
    """The record says when it ended."""
    b = bench(keep=1)
    tasks = [b.finish(NOW_MS, node=None, submitted_ms=NOW_MS - 30 * DAY_MS, n=i) for i in range(3)]
    b.passes(5)
    assert b.left() == tasks
    assert b.asked(Archive) == []


def test_what_no_archive_has_stays() -> None:
    b = bench()
    b.refuses = {OTHER}
    kept, gone = b.finish(NOW_MS - 9 * DAY_MS), b.finish(NOW_MS - 8 * DAY_MS, node=ME)
    b.passes(5)
    assert b.left() == [kept]
    assert b.archived == {ME: [gone]}
    b.passes(100)
    notices = [e.text for e in b.log if isinstance(e, Notice)]
    assert notices == ["node n2 does not archive its finished tasks, which stay: its disk is full"]


def test_one_that_refuses_for_long_does_not_fill_the_store() -> None:
    b = bench()
    b.refuses = {OTHER}
    task = b.finish(NOW_MS - 9 * DAY_MS)
    b.passes(collect.ELSEWHERE_AFTER_S - RECONCILE_S)
    assert b.left() == [task]
    b.passes(3 * RECONCILE_S)
    assert b.left() == []
    assert b.archived == {ME: [task]}


def test_the_leaders_own_full_disk_keeps_everything() -> None:
    b = bench()
    b.live, b.refuses = {ME}, {ME}
    task = b.finish(NOW_MS - 9 * DAY_MS)
    b.passes(5000)
    assert b.left() == [task]
    b.refuses.clear()
    b.passes(2 * RECONCILE_S)
    assert b.left() == []


def test_only_what_the_archive_confirms_and_was_given_is_deleted() -> None:
    b = bench()
    one, two = b.finish(NOW_MS - 9 * DAY_MS), b.finish(NOW_MS - 8 * DAY_MS)
    other = b.finish(NOW_MS - 8 * DAY_MS, node=ME, n=7)
    b.says = lambda e: Archived(e.office, e.node, frozenset({one, other}) if e.node == OTHER else frozenset())
    b.passes(5)
    assert b.left() == sorted([two, other])


@pytest.mark.parametrize("what", ["record", "status", "office", "rights"])
def test_each_guard_of_the_deletion_holds(what: str) -> None:
    """Somebody writes between the reading and the deletion: nothing is deleted."""
    b = bench()
    task = b.finish(NOW_MS - 9 * DAY_MS)

    def meddle(effect: Effect) -> None:
        if isinstance(effect, Commit):
            key = {
                "record": keys.task(task),
                "status": keys.complete(task),
                "office": keys.OFFICE,
                "rights": keys.acl_node(ME),
            }[what]
            kept = b.etcd.get(key)
            if what == "office":
                b.etcd.commit(txn.Txn(then=(txn.Delete(key),)))
            b.etcd.commit(txn.Txn(then=(txn.Put(key, kept.value if kept is not None else b""),)))

    b.meddle = meddle
    b.passes(5)
    assert b.asked(Commit)
    assert b.left() == [task]


@pytest.mark.parametrize("what", ["nothing of it can be read", "it runs", "it is another"])
def test_a_record_that_is_not_a_finished_task_is_never_deleted(what: str) -> None:
    b = bench()
    task = b.finish(NOW_MS - 9 * DAY_MS)
    record = {
        "nothing of it can be read": b"\xff\xff",
        "it runs": codec.encode_task(replace(ended(task, 1), state=State.RUNNING)),
        "it is another": codec.encode_task(ended(id_at(NOW_MS), 1)),
    }[what]
    b.etcd.commit(txn.Txn(then=(txn.Put(keys.task(task), record),)))
    other = b.finish(NOW_MS - 8 * DAY_MS)
    b.passes(500)
    assert b.left() == [task]
    assert b.archived == {OTHER: [other]}
    assert len(b.asked(Notice)) == 1


def test_keys_that_are_no_tasks_and_keys_without_a_record_are_left_alone() -> None:
    b = bench()
    b.etcd.commit(txn.Txn(then=(txn.Put(keys.COMPLETE + "0"), txn.Put(keys.complete(id_at(5)), b"?"))))
    b.finish(NOW_MS - 9 * DAY_MS)
    b.passes(100)
    assert b.etcd.list(keys.TASK).entries == ()
    assert len(b.etcd.list(keys.COMPLETE).entries) == 2


def test_answers_to_an_earlier_office_are_ignored() -> None:
    b = bench()
    b.finish(NOW_MS - 9 * DAY_MS)
    old = Revision(1)
    assert b.office is not None
    b.collector.poll(0.0, b.office, ())
    for late in (
        Archived(old, OTHER, frozenset()),
        ListDone(CollectTag("page", old), Listing(Revision(5), ())),
        ReadDone(CollectTag("read", old), None),
        CommitDone(CollectTag("drop", old), None),
    ):
        assert b.collector.took(late, 0.0, NOW_MS) == []


@pytest.mark.parametrize(("silent", "empty"), [(List, ListDone), (Read, ReadDone), (Commit, CommitDone)])
def test_no_answer_from_the_store_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, silent: type[Effect], empty: Callable[..., ListDone]
) -> None:
    b = bench()
    b.finish(NOW_MS - 9 * DAY_MS)
    real, lost = answer_of, [True]

    def answer(etcd: EtcdModel, effect: Effect) -> object:
        if lost and isinstance(effect, silent):
            lost.clear()
            return empty(effect.tag, None)  # type: ignore[union-attr]
        return real(etcd, effect)

    monkeypatch.setitem(globals(), "answer_of", answer)
    b.passes(3)
    assert len(b.left()) == 1
    b.passes(2 * RECONCILE_S)
    assert b.left() == []


def test_a_pass_is_in_pages_and_reads_nothing_behind_what_can_be_due() -> None:
    b = bench(keep=0)
    for i in range(250):
        b.finish(NOW_MS - 9 * DAY_MS + i, n=i)
    young = [b.finish(NOW_MS - DAY_MS + i * 60_000, n=i) for i in range(500)]
    b.passes(RECONCILE_S)
    assert b.left() == young
    lists = [e for e in b.log if isinstance(e, List)]
    assert all(0 < e.limit <= collect.PAGE_KEYS for e in lists)
    assert len(lists) <= 7, "it has read on into what is too young"
    assert all(len(e.txn.nested) <= collect.PAGE_KEYS + 1 for e in b.log if isinstance(e, Commit))  # and who has them


def test_pages_are_of_windows_of_time_where_there_are_many() -> None:
    """A limited range counts what lies behind it."""
    b = bench(after_s=0, keep=1)
    for i in range(400):
        b.finish(NOW_MS - 9 * DAY_MS + i, n=i)
    b.passes(5)
    assert len(b.left()) == 1
    whole = [e for e in b.log if isinstance(e, List) and e.prefix == keys.COMPLETE]
    assert len(whole) <= 3  # the count, the first page, the end
    assert sum(isinstance(e, List) for e in b.log) >= 5


def test_what_is_not_due_and_old_does_not_hide_what_is() -> None:
    """Tasks that waited long and have just ended are passed over, many in one pass, the rest in the next."""
    b = bench(keep=0)
    many = collect.PAGE_KEYS * (collect.IDLE_PAGES_MAX + 2)
    for i in range(many):
        b.finish(NOW_MS - DAY_MS, submitted_ms=NOW_MS - 30 * DAY_MS + i, n=i & 0xFFF)
    b.finish(NOW_MS - 9 * DAY_MS)
    b.passes(RECONCILE_S)
    pages = sum(isinstance(e, List) for e in b.log)
    assert pages <= collect.IDLE_PAGES_MAX + 2
    b.passes(3 * RECONCILE_S)
    assert len(b.left()) == many


def test_records_travel_in_bounded_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "BATCH_BYTES_MAX", 500)
    b = bench()
    for i in range(40):
        b.finish(NOW_MS - 9 * DAY_MS + i, n=i)
    b.passes(RECONCILE_S)
    assert b.left() == []
    sent = [sum(map(len, e.records)) for e in b.log if isinstance(e, Archive)]
    assert len(sent) > 3
    assert max(sent) <= 500


def test_the_largest_batch_keeps_within_etcds_limits() -> None:
    assert collect.PAGE_KEYS < txn.NESTED_MAX
    b = bench()
    for i in range(collect.PAGE_KEYS):
        b.finish(NOW_MS - 9 * DAY_MS + i, n=i)
    b.passes(5)
    assert b.left() == []
    assert [len(e.txn.nested) for e in b.log if isinstance(e, Commit)] == [collect.PAGE_KEYS + 1]  # and who has them
    assert collect.PAGE_KEYS + collect.NODES_MAX <= txn.NESTED_MAX


def test_tasks_of_many_nodes_go_in_turns() -> None:
    b = bench()
    nodes = [NodeId(f"m{i:03}") for i in range(collect.PAGE_KEYS)]
    b.live |= set(nodes)
    for i, name in enumerate(nodes):
        b.finish(NOW_MS - 9 * DAY_MS + i, node=name, n=i)
    b.passes(RECONCILE_S)
    assert b.left() == []
    assert sorted(b.archived) == nodes
    assert all(len(e.txn.nested) <= 2 * collect.NODES_MAX for e in b.log if isinstance(e, Commit))
    assert [keys.parse_node(e.key) for e in b.etcd.list(keys.ARCHIVE).entries] == nodes


def test_ids_tell_their_time_and_their_neighbour() -> None:
    task = id_at(NOW_MS, 1)
    assert born_ms(task) == NOW_MS
    assert before(task) < task
    assert before(id_at(1)) < id_at(1)
