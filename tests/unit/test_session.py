"""The membership of a node: what it asks of the store, and what it makes of each answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spinetta import codec, keys, txn
from spinetta.events import (
    Commit,
    CommitDone,
    Effect,
    Entry,
    GrantLease,
    KeepAlive,
    KeptAlive,
    LeaseGranted,
    NoAnswer,
    Notice,
    Read,
    ReadDone,
    Reading,
    Remember,
    Remembered,
    RenewRuntime,
    RevokeLease,
)
from spinetta.model import Incarnation, IncarnationId, LeaseId, Life, NodeId, Revision
from spinetta.session import ADVERTISE_S, POLL_S, RETRY_S, Phase, Session
from tests.builders import cpus, entry, node_record, settings

ME = NodeId("n1")
LIFE = IncarnationId("0000000000000007")
LEASE = LeaseId(7)
KEYS = (keys.node(ME), keys.incarnation(ME), keys.GENERATION, keys.acl_node(ME))
NODE_AT, INC_AT = Revision(20), Revision(21)


def life_entry(state: Life = Life.OPEN, id_: str = LIFE, at: int = INC_AT) -> Entry:
    value = codec.encode_incarnation(Incarnation(IncarnationId(id_), state, "boot", 3.0, 1.0))
    return entry(keys.incarnation(ME), value, at, at)


def node_entry(id_: str = LIFE, at: int = NODE_AT, lease: int = LEASE) -> Entry:
    return entry(keys.node(ME), codec.encode_node(node_record(ME, incarnation=IncarnationId(id_))), at, at, lease)


def says(
    node: Entry | None = None, inc: Entry | None = None, generation: Entry | None = None, acl: Entry | None = None
) -> ReadDone:
    return ReadDone("self", Reading(Revision(30), dict(zip(KEYS, (node, inc, generation, acl), strict=True))))


def begun(incarnation: IncarnationId | None = None) -> Session:
    session = Session(settings(), incarnation)
    session.begin(0.0)
    assert session.poll(0.0) == [Read("self", KEYS)]
    return session


def looks_again_at(session: Session) -> float | None:
    return session.next_s


def active(incarnation: IncarnationId = LIFE) -> Session:
    """A daemon that has gone on with its life."""
    session = begun(incarnation)
    assert isinstance(session.read_done(says(node_entry(), life_entry()), 0.0, nothing_runs=True)[0], Commit)
    session.commit_done(CommitDone("resume", txn.Committed(Revision(22))), 0.0)
    session.poll(0.0)
    session.read_done(says(node_entry(), life_entry(at=22)), 0.0, nothing_runs=True)
    assert session.phase is Phase.ACTIVE
    return session


def commit_of(effects: list[Effect], tag: str) -> txn.Txn:
    return next(e.txn for e in effects if isinstance(e, Commit) and e.tag == tag)


# --- joining -------------------------------------------------------------------------------------------------------


def test_a_new_life_lease_disk_registration() -> None:
    session = begun()
    assert session.read_done(says(), 0.1, nothing_runs=True) == [GrantLease("self", 3)]
    assert session.lease_granted(LeaseGranted("self", LEASE), 0.2) == [Remember(LIFE)]
    (commit,) = session.remembered(Remembered(LIFE, done=True), 0.3)
    assert isinstance(commit, Commit)
    assert commit.tag == "register"
    node, inc, beat = commit.txn.then
    assert isinstance(node, txn.Put)
    assert isinstance(inc, txn.Put)
    assert (node.lease, inc.lease) == (LEASE, 0)
    assert codec.decode_node(node.value).incarnation == LIFE
    made = codec.decode_incarnation(inc.value)
    assert (made.id, made.state, made.lease_ttl_s, made.kill_margin_s) == (LIFE, Life.OPEN, 3, 1.0)
    assert beat == txn.Put(keys.beat(ME))
    assert not session.active
    assert session.commit_done(CommitDone("register", txn.Committed(Revision(31))), 0.4) == []
    assert session.poll(0.4) == [Read("self", KEYS)]
    session.read_done(says(node_entry(at=31), life_entry(at=31)), 0.5, nothing_runs=True)
    assert session.phase is Phase.ACTIVE
    assert session.registration == txn.Registration(ME, Revision(31), Revision(31), Revision(0))


@pytest.mark.parametrize("result", [txn.Committed(Revision(31)), txn.Conflict(Revision(31)), None])
def test_what_the_store_says_next_decides(result: txn.Result | None) -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    session.lease_granted(LeaseGranted("self", LEASE), 0.0)
    session.remembered(Remembered(LIFE, done=True), 0.0)
    assert session.commit_done(CommitDone("register", result), 1.0) == []
    assert session.next_s == (1.0 if result is not None else 1.0 + RETRY_S)


def test_no_answer_to_a_reading_is_no_answer() -> None:
    session = begun(LIFE)
    assert session.read_done(ReadDone("self", None), 1.0, nothing_runs=True) == []
    assert session.phase is Phase.LOOKING
    assert session.incarnation == LIFE
    assert session.next_s == 1.0 + RETRY_S


def test_no_lease_no_registration() -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    assert session.lease_granted(LeaseGranted("self", None), 1.0) == []
    assert session.next_s == 1.0 + RETRY_S


def test_what_cannot_be_written_down_is_not_registered() -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    session.lease_granted(LeaseGranted("self", LEASE), 0.0)
    (notice,) = session.remembered(Remembered(LIFE, done=False), 1.0)
    assert isinstance(notice, Notice)
    assert "cannot be written" in notice.text
    assert session.next_s == 1.0 + POLL_S


def test_leftovers_are_stopped_before_another_life_begins() -> None:
    session = begun()
    assert session.read_done(says(), 1.0, nothing_runs=False) == []
    assert session.must_stop
    assert session.next_s == 1.0 + POLL_S


def test_a_registration_under_way_keeps_its_id() -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    session.lease_granted(LeaseGranted("self", LEASE), 0.0)
    session.remembered(Remembered(LIFE, done=True), 0.0)
    session.commit_done(CommitDone("register", None), 0.0)
    session.poll(RETRY_S)
    assert session.read_done(says(), 0.6, nothing_runs=True) == [GrantLease("self", 3)]
    (commit,) = session.lease_granted(LeaseGranted("self", LeaseId(8)), 0.7)
    assert isinstance(commit, Commit)
    put = commit.txn.then[1]
    assert isinstance(put, txn.Put)
    assert codec.decode_incarnation(put.value).id == LIFE


def test_a_life_that_is_over_gives_its_id_up() -> None:
    session = active()
    session.suspect(1.0)
    session.poll(1.0)
    assert session.read_done(says(), 1.1, nothing_runs=True) == [GrantLease("self", 3)]
    assert session.lease_granted(LeaseGranted("self", LeaseId(9)), 1.2) == [Remember(IncarnationId("0000000000000009"))]


def test_one_lease_is_asked_for_at_a_time() -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    session.suspect(0.0)
    session.poll(0.0)
    assert session.read_done(says(), 0.1, nothing_runs=True) == []
    assert session.next_s == 0.1 + RETRY_S


def test_a_lease_that_is_not_wanted_any_more_is_revoked() -> None:
    session = begun()
    session.read_done(says(), 0.0, nothing_runs=True)
    session.suspect(0.0)
    session.poll(0.0)
    session.read_done(says(node_entry("other"), life_entry(id_="other")), 0.1, nothing_runs=True)
    assert session.phase is Phase.WAITING
    assert session.lease_granted(LeaseGranted("self", LEASE), 0.2) == [RevokeLease(LEASE)]


# --- going on with a life ------------------------------------------------------------------------------------------


def test_a_new_daemon_shuts_out_the_one_before() -> None:
    session = begun(LIFE)
    effects = session.read_done(says(node_entry(), life_entry()), 0.0, nothing_runs=False)
    body = commit_of(effects, "resume")
    assert body == txn.resume(txn.Registration(ME, NODE_AT, INC_AT, Revision(0)), life_entry().value)
    assert not session.active


@pytest.mark.parametrize("result", [txn.Conflict(Revision(22)), None])
def test_it_tries_that_again(result: txn.Result | None) -> None:
    session = begun(LIFE)
    session.read_done(says(node_entry(), life_entry()), 0.0, nothing_runs=False)
    session.commit_done(CommitDone("resume", result), 0.0)
    session.poll(RETRY_S)
    assert commit_of(session.read_done(says(node_entry(), life_entry()), 0.6, nothing_runs=False), "resume")


def test_a_life_whose_lease_ran_out_is_registered_again() -> None:
    session = begun(LIFE)
    generation = entry(keys.GENERATION, b"", 4, 4)
    effects = session.read_done(says(None, life_entry(), generation), 0.0, nothing_runs=False)
    assert effects == [GrantLease("self", 3)]
    (commit,) = session.lease_granted(LeaseGranted("self", LEASE), 0.1)
    assert isinstance(commit, Commit)
    assert commit.tag == "reattach"
    assert commit.txn.when == (
        txn.Absent(keys.node(ME)),
        txn.RevisionIs(keys.incarnation(ME), INC_AT),
        txn.RevisionIs(keys.GENERATION, Revision(4)),
        txn.RevisionIs(keys.acl_node(ME), Revision(0)),
    )


def test_an_earlier_life_must_be_closed_first() -> None:
    session = begun(None)
    (notice,) = session.read_done(says(None, life_entry()), 1.0, nothing_runs=True)
    assert isinstance(notice, Notice)
    assert "earlier life" in notice.text
    assert session.phase is Phase.WAITING
    assert session.must_stop
    assert session.next_s == 1.0 + POLL_S
    session.poll(2.0)
    assert session.read_done(says(None, life_entry()), 2.0, nothing_runs=True) == []  # said once is enough


def test_a_name_that_is_alive_elsewhere() -> None:
    session = begun(IncarnationId("mine"))
    (notice,) = session.read_done(says(node_entry("other"), life_entry(id_="other")), 1.0, nothing_runs=True)
    assert isinstance(notice, Notice)
    assert "--name" in notice.text
    assert session.phase is Phase.WAITING


# --- being condemned -----------------------------------------------------------------------------------------------


def test_condemned_it_stops_all_before_it_says_so() -> None:
    session = begun(LIFE)
    (notice,) = session.read_done(says(None, life_entry(Life.CONDEMNED)), 0.0, nothing_runs=False)
    assert isinstance(notice, Notice)
    assert session.must_stop
    session.poll(POLL_S)
    (commit,) = session.read_done(says(None, life_entry(Life.CONDEMNED)), 1.0, nothing_runs=True)
    assert isinstance(commit, Commit)
    assert commit.tag == "concede"
    dead = codec.encode_incarnation(replace(codec.decode_incarnation(life_entry().value), state=Life.DEAD))
    assert commit.txn == txn.concede(ME, INC_AT, dead)


def test_having_said_so_it_waits_for_the_leader() -> None:
    session = begun(LIFE)
    session.read_done(says(None, life_entry(Life.DEAD)), 1.0, nothing_runs=True)
    assert session.phase is Phase.FENCED
    assert session.next_s == 1.0 + POLL_S
    session.poll(2.0)
    assert session.read_done(says(), 2.0, nothing_runs=True) == [GrantLease("self", 3)]


def test_a_registration_that_comes_after_it_was_given_up_is_ended_by_ourselves() -> None:
    """Seed 840: the machine went down while it registered; the leader saw too many dead nodes to bury this one."""
    session = begun(LIFE)
    session.read_done(says(), 0.0, nothing_runs=True)  # not there: another life is begun
    session.lease_granted(LeaseGranted("self", LeaseId(9)), 0.1)
    session.remembered(Remembered(IncarnationId("0000000000000009"), done=True), 0.2)
    session.commit_done(CommitDone("register", txn.Conflict(Revision(31))), 0.3)
    session.poll(0.3)
    (commit,) = session.read_done(says(node_entry(), life_entry()), 0.4, nothing_runs=True)
    assert isinstance(commit, Commit)
    assert commit.tag == "concede"
    session.commit_done(CommitDone("concede", txn.Committed(Revision(32))), 0.5)
    session.poll(0.5)
    session.read_done(says(None, life_entry(Life.DEAD)), 0.6, nothing_runs=True)
    assert session.phase is Phase.WAITING
    session.poll(0.6 + POLL_S)
    assert session.read_done(says(), 2.0, nothing_runs=True) == [GrantLease("self", 3)]


# --- renewals ------------------------------------------------------------------------------------------------------


def test_a_renewal_counts_from_before_it_was_sent() -> None:
    session = active()
    assert not session.may_start
    effects = session.poll(5.0)
    assert KeepAlive("self", LEASE) in effects
    assert session.registration is not None
    assert commit_of(effects, "renew") == txn.renew(session.registration)
    done = session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 5.9)
    assert done == [RenewRuntime(5.0)]
    assert session.may_start


def test_a_renewal_that_was_not_answered_renews_nothing() -> None:
    session = active()
    session.poll(5.0)
    assert session.commit_done(CommitDone("renew", None), 5.9) == []
    assert not session.may_start
    assert session.active


def test_a_renewal_that_was_refused_raises_a_suspicion() -> None:
    session = active()
    session.poll(5.0)
    session.commit_done(CommitDone("renew", txn.Conflict(Revision(40))), 5.9)
    assert session.registration is None
    assert session.phase is Phase.LOOKING
    assert session.next_s == 5.9


def test_one_renewal_at_a_time_three_in_the_life_of_a_lease() -> None:
    session = active()
    session.poll(5.0)
    session.kept_alive(KeptAlive("self", LEASE, 3.0), 5.1)
    effects = session.poll(6.0)
    assert effects == [KeepAlive("self", LEASE)]  # the renewal of before is still under way
    assert session.next_s is not None
    assert session.next_s <= 7.0


@pytest.mark.parametrize(
    ("ttl_s", "lease", "suspects"),
    [(3.0, LEASE, False), (NoAnswer.UNKNOWN, LEASE, False), (None, LEASE, True), (None, LeaseId(99), False)],
)
def test_what_becomes_of_the_lease(ttl_s: float | NoAnswer | None, lease: LeaseId, suspects: bool) -> None:
    session = active()
    session.kept_alive(KeptAlive("self", lease, ttl_s), 5.0)
    assert (session.registration is None) == suspects


def test_the_generation_is_part_of_the_guard() -> None:
    session = begun(LIFE)
    session.read_done(says(None, life_entry(), entry(keys.GENERATION, b"", 4, 9)), 0.0, nothing_runs=True)
    session.lease_granted(LeaseGranted("self", LEASE), 0.0)
    session.commit_done(CommitDone("reattach", txn.Committed(Revision(40))), 0.0)
    session.poll(0.0)
    session.read_done(says(node_entry(at=40), life_entry(), entry(keys.GENERATION, b"", 4, 9)), 0.0, nothing_runs=True)
    assert session.registration == txn.Registration(ME, Revision(40), INC_AT, Revision(9))


# --- what it says of itself ----------------------------------------------------------------------------------------


def test_news_is_told_once_a_second_and_under_the_lease() -> None:
    session = active()
    session.poll(5.0)
    session.commit_done(CommitDone("advertise", txn.Committed(Revision(41))), 5.1)
    session.describe(replace(session.record, free=cpus(1)))
    effects = session.poll(6.0)
    put = commit_of(effects, "advertise").then[0]
    assert isinstance(put, txn.Put)
    assert put.lease == LEASE
    assert codec.decode_node(put.value).free == cpus(1)
    session.describe(replace(session.record, free=cpus(2)))
    assert not any(isinstance(e, Commit) and e.tag == "advertise" for e in session.poll(6.5))
    session.commit_done(CommitDone("advertise", txn.Committed(Revision(41))), 6.6)
    assert not any(isinstance(e, Commit) and e.tag == "advertise" for e in session.poll(6.9))
    assert commit_of(session.poll(6.0 + ADVERTISE_S), "advertise")


def test_nothing_new_is_not_told() -> None:
    session = active()
    session.poll(5.0)
    session.commit_done(CommitDone("advertise", txn.Committed(Revision(41))), 5.1)
    assert session.told
    assert not any(isinstance(e, Commit) and e.tag == "advertise" for e in session.poll(9.0))


def test_news_that_were_not_answered_are_told_again() -> None:
    session = active()
    session.describe(replace(session.record, free=cpus(1)))
    session.poll(5.0)
    session.commit_done(CommitDone("advertise", None), 5.1)
    assert not session.told
    assert commit_of(session.poll(5.0 + ADVERTISE_S), "advertise")


# --- leaving -------------------------------------------------------------------------------------------------------


def test_leaving() -> None:
    session = active()
    (commit,) = session.deregister()
    assert isinstance(commit, Commit)
    assert session.deregister() == []  # under way
    assert session.commit_done(CommitDone("deregister", txn.Committed(Revision(50))), 6.0) == [RevokeLease(LEASE)]
    assert session.phase is Phase.LEFT


def test_one_who_holds_something_after_all_does_not_leave() -> None:
    session = active()
    session.deregister()
    session.commit_done(CommitDone("deregister", txn.Conflict(Revision(50))), 6.0)
    session.poll(6.0)
    session.read_done(says(node_entry(), life_entry(at=22)), 6.1, nothing_runs=False)
    assert session.phase is Phase.ACTIVE
    assert len(session.deregister()) == 1


def test_a_leave_whose_answer_was_lost_is_recognised() -> None:
    session = active()
    session.deregister()
    session.commit_done(CommitDone("deregister", None), 6.0)
    session.poll(6.0)
    assert session.read_done(says(), 6.1, nothing_runs=True) == []
    assert session.phase is Phase.LEFT
