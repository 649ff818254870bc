"""What a heartbeat promises: an attempt that its node was not to start cannot have taken it down."""

from __future__ import annotations

from typing import Any

from spinetta import codec, keys, txn
from spinetta.events import CommitDone, KeepAlive
from spinetta.model import NodeId, Outcome, Reason, Revision, State
from tests.builders import key_of, settings, spec, task_id
from tests.sim.direct import Direct, Node, commits, long_tasks, until_wanted

from tests.unit.test_holdings import NOW, SEEN, LIFE, appeared, poll, ready, record  # isort: skip
from tests.unit.test_session import active, commit_of


def beat_of(d: Direct, node: str = "n1") -> frozenset[Revision]:
    kv = d.model.get(keys.beat(NodeId(node)))
    assert kv is not None
    return codec.decode_beat(kv.value)


# --- the session ---------------------------------------------------------------------------------------------------


def test_a_renewal_says_what_waits_and_the_promise_stands_from_then_on() -> None:
    session = active()
    waiting = frozenset({Revision(7), Revision(9)})
    renewal = commit_of(session.poll(5.0, waiting), "renew")
    assert session.registration is not None
    assert renewal == txn.renew(session.registration, codec.encode_beat(waiting))
    assert session.promised == waiting, "it may be in the store from now on"
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 5.1)
    assert session.promised == waiting


def test_a_promise_is_taken_back_by_a_committed_renewal_only() -> None:
    session = active()
    session.poll(5.0, frozenset({Revision(7)}))
    session.commit_done(CommitDone("renew", None), 5.1)  # it may have been made
    session.poll(8.0, frozenset({Revision(8)}))
    assert session.promised == {7, 8}
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 8.1)
    assert session.promised == {8}
    session.poll(12.0)
    assert session.promised == {8}
    session.commit_done(CommitDone("renew", txn.Committed(Revision(41))), 12.1)
    assert session.promised == frozenset()


def test_what_waits_for_a_promise_alone_makes_the_next_renewal_come_at_once() -> None:
    session = active()
    session.poll(5.0, frozenset({Revision(7)}))
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 5.1)
    later = [e for e in session.poll(5.2) if not isinstance(e, KeepAlive)]
    assert later == []
    effects = session.poll(5.2, frozenset(), frozenset({Revision(7)}))
    assert codec.decode_beat(commit_of(effects, "renew").then[0].value) == frozenset()  # type: ignore[union-attr]


# --- the holdings --------------------------------------------------------------------------------------------------


def test_what_is_not_started_waits() -> None:
    held = ready()
    held.follow([appeared(1, token=5)])
    poll(held)
    assert held.waiting == {5}, "its record is being read"
    held.claimed(record(2), Revision(6), codec.decode_holding(codec.encode_holding(held.held[task_id(1)].holding)))
    poll(held, may_start=False)
    assert held.waiting == {5, 6}
    poll(held)
    assert held.waiting == {5}, "the other one has been started"


def test_what_was_promised_is_not_started() -> None:
    held = ready()
    held.follow([appeared(1, token=5)])
    poll(held)
    held.claimed(record(1), Revision(5), held.held[task_id(1)].holding)
    promised = held.poll(NOW, 1, LIFE, SEEN, may_start=True, must_stop=False, promised={Revision(5)})
    assert promised == []
    assert (held.waiting, held.wanted) == (frozenset(), frozenset({Revision(5)}))
    (start,) = poll(held)
    assert getattr(start, "token", None) == 5
    assert (held.waiting, held.wanted) == (frozenset(), frozenset())


# --- the whole -----------------------------------------------------------------------------------------------------


def restarted_with_an_unstarted_task(**fields: Any) -> tuple[Direct, Node]:
    """Its daemon died between claim and start; the next one has promised not to start it yet."""
    d = Direct(settings("n1"), settings("n2"), script=long_tasks)
    d.run(1.0)
    d.node("n1").agent.draining = True
    d.submit(spec(1, **fields))
    n2 = d.node("n2")
    d.perform(n2, until_wanted(d, n2, commits("claim")))
    d.restart(n2)
    until_wanted(d, n2, lambda e: getattr(e, "tag", "") == "held")  # it has no answer to that for now
    d.run(d.now + 1.5)
    return d, n2


def test_a_loss_before_the_start_costs_its_task_nothing() -> None:
    d, n2 = restarted_with_an_unstarted_task()
    kv = d.model.get(keys.running(NodeId("n2"), task_id(1)))
    assert kv is not None
    assert beat_of(d, "n2") == {kv.created}
    assert not n2.shim.alive()
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    task = d.task(task_id(1))
    assert (task.state, task.losses, task.losses_excused) == (State.QUEUED, 0, 1)
    last = task.attempts[-1]
    assert (last.outcome, last.reason) == (Outcome.LOST, Reason.NODE_LOST)
    assert last.message == "node n2 was lost before it had started this"


def test_what_is_to_be_started_once_at_most_is_not_started_again_for_a_heartbeats_sake() -> None:
    """One whose answer was lost may be committed after the next one, and then names what runs."""
    d, n2 = restarted_with_an_unstarted_task(restart_on_node_failure=False)
    kv = d.model.get(keys.running(NodeId("n2"), task_id(1)))
    assert kv is not None
    stale = beat_of(d, "n2")
    assert stale == {kv.created}
    d.restart(n2)
    d.perform(n2, until_wanted(d, n2, lambda e: type(e).__name__ == "Start"))
    assert n2.shim.alive()
    d.model.commit(txn.Txn(then=(txn.Put(keys.beat(NodeId("n2")), codec.encode_beat(stale)),)))
    d.deliver()
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    task = d.task(task_id(1))
    assert (task.state, task.outcome, task.losses, task.losses_excused) == (State.COMPLETE, Outcome.LOST, 1, 0)


def test_a_loss_after_the_start_counts() -> None:
    d = Direct(settings("n1"), settings("n2"), script=long_tasks)
    d.run(1.0)
    d.node("n1").agent.draining = True
    d.submit(spec(1))
    d.run(d.now + 3.0)
    assert [p.key for p in d.node("n2").shim.alive()] == [key_of(1)]
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    assert (d.task(task_id(1)).losses, d.task(task_id(1)).losses_excused) == (1, 0)


def test_the_promise_is_taken_back_before_the_start() -> None:
    d, n2 = restarted_with_an_unstarted_task()
    d.restart(n2)
    until_start = until_wanted(d, n2, lambda e: type(e).__name__ == "Start")
    assert beat_of(d, "n2") == frozenset()
    d.perform(n2, until_start)
    assert n2.shim.alive()


def test_in_the_ordinary_course_nothing_is_promised() -> None:
    """A heartbeat costs nothing but its key."""
    d = Direct(settings(), script=long_tasks)
    for n in range(1, 5):
        d.submit(spec(n))
        d.run(d.now + 1.7)
        assert beat_of(d) == frozenset()
        assert d.node().agent.session.promised == frozenset()


def test_a_heartbeat_that_cannot_be_read_promises_nothing() -> None:
    assert codec.decode_beat(b"\xff\xff") == frozenset()
    assert codec.decode_beat(b"") == frozenset()
    assert codec.encode_beat(()) == b""
