"""What a heartbeat promises: an attempt that its node was not to start cannot have taken it down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spinetta import codec, keys, lifecycle, txn
from spinetta.events import Begin, CommitDone, Forget, KeepAlive, Prepared, Start, Started, Stop
from spinetta.holdings import NAMED_AFTER_S
from spinetta.model import Beat, ContainerSpec, Exit, NodeId, Outcome, Reason, Revision, State
from spinetta.session import RETRY_S
from spinetta.settings import AgentSettings
from tests.builders import key_of, settings, spec, task_id
from tests.sim.direct import Direct, Node, commits, long_tasks, until_wanted

from tests.unit.test_holdings import NOW, SEEN, LIFE, appeared, claimed, poll, ready, record, running  # isort: skip
from tests.unit.test_session import active, commit_of


def beat_of(d: Direct, node: str = "n1") -> Beat:
    kv = d.model.get(keys.beat(NodeId(node)))
    assert kv is not None
    return codec.decode_beat(kv.value)


# --- the session ---------------------------------------------------------------------------------------------------


def test_a_renewal_says_what_waits_and_the_promise_stands_from_then_on() -> None:
    session = active()
    unstarted = Beat(frozenset({Revision(7), Revision(9)}), frozenset({Revision(8)}))
    renewal = commit_of(session.poll(5.0, unstarted), "renew")
    assert session.registration is not None
    assert renewal == txn.renew(session.registration, codec.encode_beat(unstarted))
    assert session.promised == {7, 8, 9}, "it may be in the store from now on"
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 5.1)
    assert session.promised == {7, 8, 9}


def test_a_promise_is_taken_back_by_a_committed_renewal_only() -> None:
    session = active()
    session.poll(5.0, Beat(frozenset({Revision(7)})))
    session.commit_done(CommitDone("renew", None), 5.1)  # it may have been made
    session.poll(8.0, Beat(frozenset({Revision(8)})))
    assert session.promised == {7, 8}
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 8.1)
    assert session.promised == {8}
    session.poll(12.0)
    assert session.promised == {8}
    session.commit_done(CommitDone("renew", txn.Committed(Revision(41))), 12.1)
    assert session.promised == frozenset()


def test_what_waits_for_a_promise_alone_makes_the_next_renewal_come_at_once() -> None:
    session = active()
    session.poll(5.0, Beat(frozenset({Revision(7)})))
    session.commit_done(CommitDone("renew", txn.Committed(Revision(40))), 5.1)
    later = [e for e in session.poll(5.2) if not isinstance(e, KeepAlive)]
    assert later == []
    effects = session.poll(5.2, Beat(), frozenset({Revision(7)}))
    assert codec.decode_beat(commit_of(effects, "renew").then[0].value) == Beat()  # type: ignore[union-attr]


def test_however_much_is_wanted_a_renewal_that_failed_is_not_made_again_at_once() -> None:
    session = active()
    session.poll(5.0, Beat(frozenset({Revision(7)})))
    wanted = frozenset({Revision(7)})
    assert session.poll(5.05, Beat(), wanted) == [], "one is under way"
    session.commit_done(CommitDone("renew", None), 5.1)
    assert session.poll(5.1, Beat(), wanted) == []
    assert session.next_s == 5.1 + RETRY_S
    commit_of(session.poll(5.1 + RETRY_S, Beat(), wanted), "renew")


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


TOOLS = ContainerSpec("tools")


def contains(name: str = "n1", **fields: Any) -> AgentSettings:
    """The settings of a node that runs containers."""
    made = settings(name, **fields)
    return replace(made, record=replace(made.record, allows=("process", "container")))


def test_what_it_needs_is_brought_in_and_it_begins_when_that_is_here() -> None:
    held = claimed(1, 5, container=TOOLS)
    (start,) = poll(held)
    assert isinstance(start, Start)
    assert poll(held, NOW + NAMED_AFTER_S / 2) == []
    assert (held.waiting, held.preparing) == (frozenset(), frozenset()), "an image that is here takes no longer"
    poll(held, NOW + NAMED_AFTER_S)
    assert held.waiting == frozenset()
    assert held.preparing == {5}
    held.prepared(key_of(1))
    assert poll(held, NOW + 9.0) == [Begin(key_of(1))]
    assert held.preparing == frozenset()
    assert poll(held, NOW + 9.1) == [], "it is told once"
    held.started(Started(key_of(1), Revision(5), None), NOW + 9.2)
    assert poll(held, NOW + 9.2) == []


def test_what_is_prepared_begins_no_sooner_than_the_promise_is_taken_back() -> None:
    held = claimed(1, 5, container=TOOLS)
    poll(held)
    held.prepared(key_of(1))
    assert held.poll(NOW + 9.0, 1, LIFE, SEEN, may_start=True, must_stop=False, promised={Revision(5)}) == []
    assert held.preparing == frozenset()
    assert held.wanted == {5}
    assert poll(held, NOW + 9.0, may_start=False) == [], "not before this life stands"
    assert held.preparing == {5}
    assert poll(held, NOW + 9.0) == [Begin(key_of(1))]


def test_what_is_prepared_and_no_longer_ours_is_stopped() -> None:
    held = claimed(1, 5, container=TOOLS)
    poll(held)
    held.prepared(key_of(1))
    held.listed({}, Revision(50))
    assert poll(held) == [Stop(key_of(1), "fenced")]
    held.started(Started(key_of(1), Revision(5), Exit(Reason.FENCED)), NOW)
    assert poll(held) == [Forget(key_of(1))]
    assert held.empty


def test_what_was_told_to_begin_is_not_stopped_before_it_is_known_to_run() -> None:
    """Until then the runtime does not know it, and would forget the request."""
    held = claimed(1, 5, container=TOOLS)
    poll(held)
    held.prepared(key_of(1))
    assert poll(held) == [Begin(key_of(1))]
    assert poll(held, must_stop=True) == []
    held.started(Started(key_of(1), Revision(5), None), NOW)
    assert poll(held, must_stop=True) == [Stop(key_of(1), "fenced")]


def test_news_of_a_preparation_that_is_over_changes_nothing() -> None:
    held = running(1, 5)
    held.prepared(key_of(1))
    held.prepared("another.1")
    assert poll(held) == []


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
    assert beat_of(d, "n2") == Beat(frozenset({kv.created}))
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
    assert stale == Beat(frozenset({kv.created}))
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


def preparing_on_n2(**fields: Any) -> tuple[Direct, Node]:
    """Its image is being brought in there, and that takes longer than a heartbeat."""
    d = Direct(contains("n1"), contains("n2"), script=long_tasks)
    d.has_images = False
    d.run(1.0)
    d.node("n1").agent.draining = True
    d.submit(spec(1, container=TOOLS, **fields))
    d.run(d.now + 6.0)
    n2 = d.node("n2")
    assert list(n2.preparing) == [key_of(1)]
    return d, n2


def test_a_loss_while_its_image_comes_in_costs_its_task_nothing() -> None:
    d, n2 = preparing_on_n2(losses_allowed=0)
    kv = d.model.get(keys.running(NodeId("n2"), task_id(1)))
    assert kv is not None
    assert beat_of(d, "n2") == Beat(frozenset(), frozenset({kv.created}))
    assert not n2.shim.alive()
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    task = d.task(task_id(1))
    assert (task.state, task.losses, task.losses_excused, task.losses_preparing) == (State.QUEUED, 0, 1, 1)
    assert task.attempts[-1].message == "node n2 was lost while it brought in what this needs"


def test_an_image_that_takes_down_node_after_node_is_given_up() -> None:
    d = Direct(settings("n1"), script=long_tasks)
    d.has_images = False
    d.run(1.0)
    d.submit(spec(1, container=TOOLS, losses_allowed=1))
    lost = 0
    while d.task(task_id(1)).state is not State.COMPLETE:
        name = f"m{lost}"
        d.add(contains(name, candidate=False))
        d.run(d.now + 60.0, stop=lambda name=name: bool(d.node(name).preparing))  # type: ignore[misc]
        assert d.node(name).preparing
        d.run(d.now + 6.0)  # a heartbeat names it
        del d.nodes[NodeId(name)]
        d.run(d.now + 60.0, stop=lambda: d.task(task_id(1)).state is not State.RUNNING)
        lost += 1
        assert lost <= lifecycle.PREPARING_LOSSES_MAX + 2, "it goes round for ever"
    task = d.task(task_id(1))
    assert (task.outcome, task.losses, task.losses_preparing) == (Outcome.LOST, 2, lifecycle.PREPARING_LOSSES_MAX)
    assert lost == lifecycle.PREPARING_LOSSES_MAX + 2
    assert "2 nodes were lost under it, allowed are 1" in task.message


def test_what_is_brought_in_begins_once_no_heartbeat_names_it() -> None:
    d, n2 = preparing_on_n2()
    d.tell(n2, Prepared(key_of(1)))
    begin = until_wanted(d, n2, lambda e: isinstance(e, Begin))
    assert beat_of(d, "n2") == Beat()
    d.perform(n2, begin)
    assert n2.shim.alive()
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    assert (d.task(task_id(1)).losses, d.task(task_id(1)).losses_excused) == (1, 0)


def test_what_is_here_already_is_started_without_a_word() -> None:
    d = Direct(contains(), script=long_tasks)
    d.run(1.0)
    d.submit(spec(1, container=TOOLS))
    before = d.now
    until_wanted(d, d.node(), lambda e: isinstance(e, Begin))
    assert d.now - before < 1.0
    assert beat_of(d) == Beat()


def test_a_daemon_that_dies_with_an_image_half_here_leaves_it_to_the_next_one() -> None:
    d, n2 = preparing_on_n2()
    d.restart(n2)
    d.has_images = True
    d.run(d.now + 2.0)
    assert [p.key for p in n2.shim.alive()] == [key_of(1)]
    assert beat_of(d, "n2") == Beat()


def test_what_is_to_be_started_once_at_most_is_lost_with_its_image() -> None:
    d, _ = preparing_on_n2(restart_on_node_failure=False)
    del d.nodes[NodeId("n2")]
    d.run(d.now + 20.0)
    task = d.task(task_id(1))
    assert (task.state, task.outcome, task.losses) == (State.COMPLETE, Outcome.LOST, 1)


def test_the_promise_is_taken_back_before_the_start() -> None:
    d, n2 = restarted_with_an_unstarted_task()
    d.restart(n2)
    until_start = until_wanted(d, n2, lambda e: type(e).__name__ == "Start")
    assert beat_of(d, "n2") == Beat()
    d.perform(n2, until_start)
    assert n2.shim.alive()


def test_in_the_ordinary_course_nothing_is_promised() -> None:
    """A heartbeat costs nothing but its key."""
    d = Direct(settings(), script=long_tasks)
    for n in range(1, 5):
        d.submit(spec(n))
        d.run(d.now + 1.7)
        assert beat_of(d) == Beat()
        assert d.node().agent.session.promised == frozenset()


def test_a_heartbeat_that_cannot_be_read_promises_nothing() -> None:
    assert codec.decode_beat(b"\xff\xff") == Beat()
    assert codec.decode_beat(b"") == Beat()
    assert codec.encode_beat(Beat()) == b""
