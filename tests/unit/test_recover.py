"""The leader's duties: the office, condemning, waiting, putting back, closing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from spinetta import codec, keys, lifecycle, txn
from spinetta.events import (
    CaseTag,
    Commit,
    CommitDone,
    Effect,
    Entry,
    GrantLease,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    List,
    ListDone,
    Listing,
    NoAnswer,
    Notice,
    Read,
    ReadDone,
    Reading,
    RevokeLease,
)
from spinetta.model import Holding, Incarnation, IncarnationId, LeaseId, Life, NodeId, Outcome, Revision, State, Task
from spinetta.recover import BRAKE_NODES_MIN, RETRY_S, Leadership, wait_out_s
from tests.builders import entry, exit_code, queued, settings, task_id

ME = NodeId("n1")
LOST = NodeId("n2")
OWN = IncarnationId("life of n1")
LEASE = LeaseId(7)
OFFICE_AT = Revision(50)
CONDEMNED_AT = Revision(60)
GRACE_S, MARGIN_S, RHO = 8.0, 1.0, 0.01
WAIT_S = GRACE_S * (1 + RHO) + MARGIN_S


def life(node: NodeId, state: Life = Life.OPEN, at: int = 10, id_: str = "") -> Entry:
    record = Incarnation(IncarnationId(id_ or f"life of {node}"), state, "boot", 3.0, MARGIN_S)
    return entry(keys.incarnation(node), codec.encode_incarnation(record), 10, at)


def registered(node: NodeId) -> Entry:
    return entry(keys.node(node), b"", 10, 10)


@dataclass
class Bench:
    """A leader and what its mirrors show."""

    leader: Leadership = field(default_factory=lambda: Leadership(settings()))
    nodes: dict[str, Entry] = field(default_factory=dict)
    lives: dict[str, Entry] | None = field(default_factory=dict)
    office: Entry | None = None
    own: IncarnationId | None = OWN
    now: float = 100.0

    def poll(self, now: float | None = None) -> list[Effect]:
        self.now = self.now if now is None else now
        effects = self.leader.poll(self.now, self.office, self.nodes, self.lives, self.own)
        next_s = self.leader.next_s(self.office is not None)
        assert effects or next_s is None or next_s > self.now, "a tight loop"
        return effects

    def show(self, *entries: Entry) -> None:
        assert self.lives is not None
        for e in entries:
            (self.lives if e.key.startswith(keys.INCARNATION) else self.nodes)[e.key] = e

    def duties(self, now: float | None = None) -> list[Effect]:
        """What is wanted besides keeping the office."""
        return [e for e in self.poll(now) if not isinstance(e, KeepAlive)]

    def kept(self) -> None:
        self.leader.kept_alive(KeptAlive("office", LEASE, 1000.0), self.now)

    def list_done(self, *entries: Entry) -> list[Effect]:
        tag = CaseTag("list", LOST, CONDEMNED_AT)
        done = ListDone(tag, Listing(Revision(70), entries))
        return self.leader.strays_listed(LOST, CONDEMNED_AT, done, self.now)

    def read_done(self, *tasks: Task) -> list[Effect]:
        rows: dict[str, Entry | None] = {keys.task(t.id): entry(keys.task(t.id), codec.encode_task(t)) for t in tasks}
        done = ReadDone(CaseTag("read", LOST, CONDEMNED_AT), Reading(Revision(71), rows))
        return self.leader.strays_read(LOST, CONDEMNED_AT, done, self.now, 9000)


def elected(**fields: object) -> Bench:
    b = Bench(**fields)  # type: ignore[arg-type]
    assert b.poll() == [GrantLease("office", 3)]
    (take,) = b.leader.lease_granted(LeaseGranted("office", LEASE), b.now)
    assert take == Commit("office", txn.take_office(ME, LEASE, codec.encode_office(ME)))
    b.leader.office_answered(CommitDone("office", txn.Committed(OFFICE_AT)), b.now)
    b.office = entry(keys.OFFICE, b"", OFFICE_AT, OFFICE_AT)
    assert b.leader.leading
    b.poll()
    b.kept()
    b.show(life(ME), registered(ME))
    return b


def with_case(state: Life = Life.CONDEMNED) -> Bench:
    """A condemned node whose keys are to be listed."""
    b = elected()
    b.show(life(LOST, state, CONDEMNED_AT))
    assert b.duties() == [List(CaseTag("list", LOST, CONDEMNED_AT), keys.running_on(LOST))]
    return b


def stray(
    n: int = 1, token: int = 40, modified: int | None = None, grace_s: float = GRACE_S, *, cancel: bool = False
) -> Entry:
    held = Holding(1, IncarnationId("life of n2"), grace_s, cancel_requested=cancel)
    return entry(keys.running(LOST, task_id(n)), codec.encode_holding(held), token, modified)


def running(n: int = 1, **fields: object) -> Task:
    return lifecycle.claimed(queued(n, **fields), LOST, IncarnationId("life of n2"), now_ms=1)


# --- the office ----------------------------------------------------------------------------------------------------


def test_nobody_stands_while_somebody_leads() -> None:
    b = Bench(office=entry(keys.OFFICE, b"", 5))
    assert b.poll() == []
    assert b.leader.next_s(True) is None


def test_who_may_not_does_not_stand() -> None:
    b = Bench()
    b.leader.candidate = False
    assert b.poll() == []
    assert b.leader.next_s(False) is None


@pytest.mark.parametrize("result", [txn.Conflict(Revision(50)), None])
def test_an_election_not_won_gives_the_lease_up(result: txn.Result | None) -> None:
    b = Bench()
    b.poll()
    b.leader.lease_granted(LeaseGranted("office", LEASE), b.now)
    assert b.leader.office_answered(CommitDone("office", result), b.now) == [RevokeLease(LEASE)]
    assert not b.leader.leading
    assert b.poll() == []
    assert b.poll(b.now + RETRY_S) == [GrantLease("office", 3)]


def test_no_lease_no_election() -> None:
    b = Bench()
    b.poll()
    assert b.leader.lease_granted(LeaseGranted("office", None), b.now) == []
    assert b.leader.next_s(False) == b.now + RETRY_S


def test_the_office_is_kept_three_times_in_the_life_of_its_lease() -> None:
    b = elected()
    assert b.poll(100.5) == []
    assert b.poll(101.0) == [KeepAlive("office", LEASE)]
    assert b.poll(102.5) == []  # not answered yet: no second one, and no tight loop
    b.leader.kept_alive(KeptAlive("office", LEASE, 3.0), 102.6)
    assert b.poll(102.6) == [KeepAlive("office", LEASE)]


def test_no_answer_keeps_the_office_until_the_lease_must_have_ended() -> None:
    b = elected()
    b.leader.kept_alive(KeptAlive("office", LEASE, 3.0), 100.0)
    b.leader.kept_alive(KeptAlive("office", LEASE, NoAnswer.UNKNOWN), 101.0)
    b.poll(102.9)
    assert b.leader.leading
    assert b.poll(103.0) == [RevokeLease(LEASE)]
    assert not b.leader.leading


def test_a_lease_that_is_gone_ends_the_office() -> None:
    b = elected()
    assert b.leader.kept_alive(KeptAlive("office", LEASE, None), 101.0) == []
    assert not b.leader.leading


def test_a_lease_of_before_says_nothing() -> None:
    b = elected()
    b.leader.kept_alive(KeptAlive("office", LeaseId(3), None), 101.0)
    assert b.leader.leading


def test_a_later_leader_ends_the_office() -> None:
    b = elected()
    b.office = entry(keys.OFFICE, b"", 90)
    assert b.poll() == [RevokeLease(LEASE)]
    assert not b.leader.leading


def test_resigning() -> None:
    b = elected()
    assert b.leader.resign() == [RevokeLease(LEASE)]
    assert not b.leader.leading
    b.office = None
    assert b.poll(200.0) == []
    assert b.leader.resign() == []


def test_who_resigns_while_standing_does_not_come_to_lead() -> None:
    b = Bench()
    b.poll()
    b.leader.resign()
    assert b.leader.lease_granted(LeaseGranted("office", LEASE), b.now) == [RevokeLease(LEASE)]
    c = Bench()
    c.poll()
    c.leader.lease_granted(LeaseGranted("office", LEASE), c.now)
    assert c.leader.resign() == [RevokeLease(LEASE)]
    c.leader.office_answered(CommitDone("office", txn.Committed(OFFICE_AT)), c.now)
    assert not c.leader.leading


# --- condemning ----------------------------------------------------------------------------------------------------


def test_a_node_whose_key_is_gone_is_condemned_once() -> None:
    b = elected()
    b.show(life(LOST))
    (commit,) = b.duties()
    assert isinstance(commit, Commit)
    assert commit.tag == CaseTag("condemn", LOST, Revision(10))
    value = life(LOST, Life.CONDEMNED).value
    assert commit.txn == txn.condemn(txn.OfficeHeld(OFFICE_AT, ME), LOST, Revision(10), value)
    assert b.duties() == []
    b.leader.condemned(LOST, b.now)
    assert b.duties() == []
    assert b.leader.next_s(True) is not None
    assert len(b.duties(b.now + RETRY_S)) == 1  # it was refused or not answered: the record is still open


def test_a_registered_node_is_left_alone() -> None:
    b = elected()
    b.show(life(LOST), registered(LOST))
    assert b.duties() == []


def test_nothing_is_condemned_before_the_lives_are_known() -> None:
    b = elected()
    b.lives = None
    assert b.duties() == []


def test_our_own_registration_is_our_sessions_business() -> None:
    b = elected()
    del b.nodes[keys.node(ME)]
    assert b.duties() == []


def test_an_earlier_life_of_our_own_node_is_condemned() -> None:
    """The only node there is would otherwise wait for ever for a leader that it is itself."""
    b = elected()
    del b.nodes[keys.node(ME)]
    b.own = None
    (commit,) = b.duties()
    assert isinstance(commit, Commit)
    assert commit.tag == CaseTag("condemn", ME, Revision(10))


def test_more_than_half_at_once_are_not_believed() -> None:
    b = elected()
    others = [NodeId(f"n{n}") for n in range(2, 6)]
    b.show(*(life(n) for n in others), registered(others[0]))
    (notice,) = b.duties()
    assert isinstance(notice, Notice)
    assert "3 of 5" in notice.text
    assert b.leader.braking
    assert b.leader.brake == notice.text
    assert b.duties() == []
    b.show(registered(others[1]))
    assert len(b.duties()) == 2
    assert not b.leader.braking


def test_a_word_on_one_of_too_many_is_acted_on() -> None:
    b = elected()
    b.show(life(LOST), life(NodeId("n3")), life(NodeId("n4")))
    assert [type(e) for e in b.duties()] == [Notice]
    b.show(life(LOST, Life.DEAD, CONDEMNED_AT))
    assert b.duties() == [List(CaseTag("list", LOST, CONDEMNED_AT), keys.running_on(LOST))]
    assert b.leader.braking, "nobody has said anything of the others"
    b.list_done(stray())
    assert [type(e) for e in b.duties()] == [Read]


def test_those_that_are_being_buried_count_as_down() -> None:
    b = elected()
    b.show(life(LOST, Life.CONDEMNED, CONDEMNED_AT), life(NodeId("n3")))
    assert any(isinstance(e, Notice) for e in b.duties())


def test_of_two_nodes_one_may_be_believed_to_be_dead() -> None:
    assert BRAKE_NODES_MIN == 3
    b = elected()
    b.show(life(LOST))
    assert [type(e) for e in b.duties()] == [Commit]


# --- a condemned node ----------------------------------------------------------------------------------------------


def test_the_wait_is_long_enough() -> None:
    assert wait_out_s(GRACE_S, MARGIN_S, RHO) == pytest.approx(WAIT_S)


def test_it_waits_reads_puts_back_lists_again_and_closes() -> None:
    b = with_case()
    assert b.list_done(stray()) == []
    due_s = 100.0 + WAIT_S
    assert b.duties(due_s - 0.001) == []
    assert b.duties(due_s) == [Read(CaseTag("read", LOST, CONDEMNED_AT), (keys.task(task_id(1)), keys.beat(LOST)))]
    (commit,) = b.read_done(running())
    assert isinstance(commit, Commit)
    assert commit.tag == CaseTag("requeue", LOST, CONDEMNED_AT)
    assert commit.txn.when == txn.requeue_guards(txn.OfficeHeld(OFFICE_AT, ME), LOST, CONDEMNED_AT)
    (nested,) = commit.txn.nested
    assert nested.when == (txn.RevisionIs(keys.running(LOST, task_id(1)), Revision(40)),)
    record = codec.decode_task(
        next(p.value for p in nested.then if isinstance(p, txn.Put) and p.key == keys.task(task_id(1)))
    )
    assert (record.state, record.losses, record.attempts[-1].reason) == (State.QUEUED, 1, "node-lost")
    assert record.attempts[-1].token == 40
    b.leader.case_answered(commit.tag, CommitDone(commit.tag, txn.Committed(Revision(72), (True,))), b.now)
    assert b.duties() == [List(CaseTag("list", LOST, CONDEMNED_AT), keys.running_on(LOST))]
    (close,) = b.list_done()
    assert close == Commit(
        CaseTag("close", LOST, CONDEMNED_AT), txn.close(txn.OfficeHeld(OFFICE_AT, ME), LOST, CONDEMNED_AT)
    )
    assert b.lives is not None
    del b.lives[keys.incarnation(LOST)]
    assert b.duties() == []


def test_each_task_waits_for_its_own_grace() -> None:
    b = with_case()
    b.list_done(stray(1, grace_s=20.0), stray(2, grace_s=2.0))
    (read,) = b.duties(100.0 + wait_out_s(2.0, MARGIN_S, RHO))
    assert read == Read(CaseTag("read", LOST, CONDEMNED_AT), (keys.task(task_id(2)), keys.beat(LOST)))


def test_a_node_that_says_itself_that_nothing_runs_is_not_waited_for() -> None:
    b = with_case(Life.DEAD)
    b.list_done(stray())
    assert [type(e) for e in b.duties()] == [Read]


def test_who_is_dead_by_an_administrators_word_is_remembered_until_it_is_back() -> None:
    b = elected()
    b.show(life(LOST, Life.DEAD))  # it has said so itself
    b.poll()
    assert b.leader.vouched_dead == frozenset()
    record = Incarnation(IncarnationId("i"), Life.DEAD, "boot", 3.0, MARGIN_S, vouched=True)
    b.show(entry(keys.incarnation(LOST), codec.encode_incarnation(record), 10, 61))
    b.poll()
    assert b.leader.vouched_dead == {LOST}
    assert b.lives is not None
    del b.lives[keys.incarnation(LOST)]  # closed
    b.poll()
    assert b.leader.vouched_dead == {LOST}
    b.show(registered(LOST))
    b.poll()
    assert b.leader.vouched_dead == frozenset()
    del b.nodes[keys.node(LOST)]
    b.show(entry(keys.incarnation(LOST), codec.encode_incarnation(record), 10, 62))
    b.poll()
    assert b.leader.vouched_dead == {LOST}
    b.leader.resign()
    assert b.leader.vouched_dead == frozenset()


def test_a_node_that_says_so_during_the_wait() -> None:
    b = with_case()
    b.list_done(stray())
    b.show(life(LOST, Life.DEAD, 65))
    assert b.duties(101.0) == [List(CaseTag("list", LOST, Revision(65)), keys.running_on(LOST))]
    assert b.list_done(stray()) == []  # of the record before: too late
    done = ListDone(CaseTag("list", LOST, Revision(65)), Listing(Revision(70), (stray(),)))
    b.leader.strays_listed(LOST, Revision(65), done, b.now)
    assert [type(e) for e in b.duties()] == [Read]


def test_the_wait_begins_when_this_leader_saw_the_condemnation() -> None:
    b = with_case()
    b.now = 150.0  # the listing was answered late
    b.list_done(stray())
    assert [type(e) for e in b.duties()] == [Read]
    c = elected(now=500.0)  # another leader, which sees it now
    c.show(life(LOST, Life.CONDEMNED, CONDEMNED_AT))
    c.duties()
    c.list_done(stray())
    assert c.duties(500.0 + WAIT_S - 0.01) == []


def test_no_answers() -> None:
    b = with_case()
    b.leader.strays_listed(LOST, CONDEMNED_AT, ListDone(CaseTag("list", LOST, CONDEMNED_AT), None), b.now)
    assert b.duties() == []
    assert [type(e) for e in b.duties(b.now + RETRY_S)] == [List]
    b.list_done(stray())
    b.duties(b.now + WAIT_S)
    tag = CaseTag("read", LOST, CONDEMNED_AT)
    assert b.leader.strays_read(LOST, CONDEMNED_AT, ReadDone(tag, None), b.now, 1) == []
    assert [type(e) for e in b.duties(b.now + RETRY_S)] == [Read]
    (commit,) = b.read_done(running())
    assert isinstance(commit, Commit)
    assert isinstance(commit.tag, CaseTag)
    b.leader.case_answered(commit.tag, CommitDone(commit.tag, None), b.now)
    assert b.duties() == []
    assert [type(e) for e in b.duties(b.now + RETRY_S)] == [List]


def put_back(b: Bench, task: Task) -> Task | None:
    effects = b.read_done(task)
    if not effects:
        return None
    (commit,) = effects
    assert isinstance(commit, Commit)
    (nested,) = commit.txn.nested
    return codec.decode_task(
        next(p.value for p in nested.then if isinstance(p, txn.Put) and p.key.startswith(keys.TASK))
    )


def due(*strays: Entry) -> Bench:
    b = with_case(Life.DEAD)
    b.list_done(*strays)
    b.duties()
    return b


def test_a_task_that_must_not_start_again_is_lost() -> None:
    record = put_back(due(stray()), running(restart_on_node_failure=False))
    assert record is not None
    assert (record.state, record.outcome) == (State.COMPLETE, Outcome.LOST)


def test_a_task_that_was_to_be_cancelled_is_cancelled() -> None:
    record = put_back(due(stray(cancel=True)), running())
    assert record is not None
    assert record.outcome is Outcome.CANCELLED


def test_a_task_whose_holder_was_faster_is_left_alone() -> None:
    over = lifecycle.ended(running(), exit_code(0), Revision(40), cancel_requested=False, now_ms=1).task
    assert put_back(due(stray()), over) is None
    assert put_back(due(stray()), queued(1)) is None


def test_answers_after_the_office_was_lost_lead_to_nothing() -> None:
    b = with_case()
    b.leader.resign()
    assert b.list_done(stray()) == []
    assert b.read_done(running()) == []
