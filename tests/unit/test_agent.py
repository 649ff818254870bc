"""The agent as a whole, driven by hand: one node or few, every effect in order, on the model of etcd."""

from __future__ import annotations

from spinetta import keys
from spinetta.events import (
    Commit,
    LeaveWanted,
    SetCandidate,
    SetDraining,
    Start,
    Watch,
)
from spinetta.model import NodeId, Outcome, State
from spinetta.session import Phase
from tests.builders import cpus, settings, spec, task_id
from tests.sim.direct import Direct, long_tasks
from tests.sim.shim_model import Script


def test_a_node_registers_claims_starts_and_finishes() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    assert n1.agent.session.phase is Phase.ACTIVE
    assert d.task(task_id(1)).state is State.RUNNING
    assert len(n1.shim.alive()) == 1
    d.run(3.0)
    task = d.task(task_id(1))
    assert (task.state, task.outcome, task.attempts_started) == (State.COMPLETE, Outcome.SUCCEEDED, 1)
    assert n1.agent.holdings.empty
    assert not n1.shim.held
    assert sum(isinstance(e, Start) for e in n1.done) == 1


def test_many_tasks_on_three_nodes() -> None:
    d = Direct(settings("n1"), settings("n2"), settings("n3"))
    d.run(1.0)
    for n in range(1, 41):
        d.submit(spec(n))
    d.run(20.0)
    assert {d.task(task_id(n)).outcome for n in range(1, 41)} == {Outcome.SUCCEEDED}
    ran_at = {d.task(task_id(n)).attempts[-1].node for n in range(1, 41)}
    assert ran_at == {"n1", "n2", "n3"}
    assert sum(n.agent.leading for n in d.nodes.values()) == 1


def test_at_rest_little_happens() -> None:
    d = Direct(settings())
    d.run(5.0)
    n1 = d.node()
    before = len(n1.done)
    d.run(15.0)
    assert (len(n1.done) - before) / 10 < 10, n1.done[before:]


def test_a_restarted_daemon_goes_on() -> None:
    d = Direct(settings())
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    started = sum(isinstance(e, Start) for e in n1.done)
    d.restart(n1)
    d.run(4.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert sum(isinstance(e, Start) for e in n1.done) == started == 1


def test_a_dead_node_is_condemned_and_its_task_runs_elsewhere() -> None:
    d = Direct(settings("n1"), settings("n2"))
    d.submit(spec(1))
    d.run(0.5)
    holder = d.task(task_id(1)).attempts[-1].node
    dead = d.nodes.pop(holder)
    assert len(dead.shim.alive()) == 1
    d.run(30.0)
    task = d.task(task_id(1))
    assert task.outcome is Outcome.SUCCEEDED
    assert task.attempts_started == 2
    assert task.losses == 1
    assert d.model.get(keys.incarnation(holder)) is None


def test_a_cancelled_task_is_stopped() -> None:
    d = Direct(settings())
    d.submit(spec(1))
    d.run(0.5)
    d.cancel(task_id(1))
    d.run(0.6)
    assert d.task(task_id(1)).outcome is Outcome.CANCELLED
    assert d.node().agent.holdings.empty


def test_leaving_deregisters() -> None:
    d = Direct(settings())
    d.submit(spec(1))
    d.run(0.5)
    d.tell(d.node(), LeaveWanted(release=False))
    d.run(4.0)
    assert d.node().agent.left
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert d.model.get(keys.node(NodeId("n1"))) is None
    assert d.model.get(keys.incarnation(NodeId("n1"))) is None


def test_a_claim_whose_answer_was_lost_is_read_back() -> None:
    for arrives in (False, True):
        d = Direct(settings())
        n1 = d.node()
        d.run(1.0)
        d.submit(spec(1))
        while not any(isinstance(e, Commit) and e.tag == "claim" for e in n1.pending):
            d.perform(n1, n1.pending.pop(0))
        d.lose(n1, d.take(n1, lambda e: isinstance(e, Commit) and e.tag == "claim"), arrives=arrives)
        d.run(5.0)
        task = d.task(task_id(1))
        assert (task.outcome, task.attempts_started) == (Outcome.SUCCEEDED, 1)


# --- administration ------------------------------------------------------------------------------------------------


def test_a_draining_node_takes_nothing_and_finishes_what_it_has() -> None:
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, SetDraining(True))
    d.submit(spec(2))
    d.run(20.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert d.task(task_id(2)).state is State.QUEUED
    assert not any(isinstance(w, Watch) and w.tag == "queue" for w in n1.watches.values())
    d.tell(n1, SetDraining(False))
    d.run(25.0)
    assert d.task(task_id(2)).outcome is Outcome.SUCCEEDED


def test_leaving_with_release_gives_back_at_once() -> None:
    d = Direct(settings("n1"), script=long_tasks)
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, LeaveWanted(release=True))
    d.run(2.0)
    assert n1.agent.left
    task = d.task(task_id(1))
    assert (task.state, task.attempts[-1].reason, task.losses, task.failures) == (State.QUEUED, "released", 0, 0)


def test_one_who_stays_after_all_takes_tasks_again() -> None:
    """It had been told to give everything back; it must not go on giving back what it takes."""
    d = Direct(settings(), script=lambda _: Script(1.0))
    n1 = d.node()
    d.submit(spec(1))
    d.run(0.5)
    d.tell(n1, SetDraining(True, leaving=True, release=True))
    d.run(2.0)
    assert d.task(task_id(1)).state is State.QUEUED
    d.tell(n1, SetDraining(False))
    d.run(5.0)
    assert (d.task(task_id(1)).outcome, d.task(task_id(1)).attempts_started) == (Outcome.SUCCEEDED, 2)


def test_one_who_may_not_lead_does_not() -> None:
    d = Direct(settings("n1", candidate=False), settings("n2"))
    d.run(5.0)
    assert not d.node("n1").agent.leading
    assert d.node("n2").agent.leading


def test_a_leader_that_may_no_longer_lead_gives_up_the_office() -> None:
    d = Direct(settings("n1"), settings("n2", candidate=False))
    d.run(5.0)
    d.tell(d.node("n1"), SetCandidate(False))
    d.tell(d.node("n2"), SetCandidate(True))
    d.run(12.0)
    assert not d.node("n1").agent.leading
    assert d.node("n2").agent.leading


def test_more_than_half_dead_at_once_is_not_believed() -> None:
    d = Direct(*(settings(f"n{n}") for n in range(1, 6)))
    d.run(2.0)
    leader = next(n for n in d.nodes.values() if n.agent.leading)
    gone = [name for name, n in d.nodes.items() if n is not leader][:3]
    for name in gone:
        del d.nodes[name]
    d.run(30.0)
    assert any("look dead at once" in n for n in leader.notices)
    assert all(d.model.get(keys.incarnation(name)) is not None for name in gone)


def test_fewer_than_half_are_given_up() -> None:
    d = Direct(*(settings(f"n{n}") for n in range(1, 6)))
    d.run(2.0)
    gone = [name for name, n in d.nodes.items() if not n.agent.leading][:2]
    for name in gone:
        del d.nodes[name]
    d.run(30.0)
    assert all(d.model.get(keys.incarnation(name)) is None for name in gone)


def test_a_node_whose_capacity_was_lowered_holds_what_it_has() -> None:
    """It may hold more than it now has; what it says is free must not be negative."""
    d = Direct(settings(capacity=cpus(4)), script=long_tasks)
    n1 = d.node()
    for n in range(1, 5):
        d.submit(spec(n))
    d.run(1.0)
    assert len(n1.shim.alive()) == 4
    n1.settings = settings(capacity=cpus(2))
    d.restart(n1)
    d.run(5.0)
    assert len(n1.shim.alive()) == 4
    assert n1.agent.free().cpu_millis == 0
    assert n1.agent.session.phase is Phase.ACTIVE


def test_it_is_never_to_be_called_again_in_the_past() -> None:
    """Whatever does not answer: the daemon would turn in a tight loop."""
    d = Direct(settings())
    n1 = d.node()
    for n in range(1, 9):
        d.submit(spec(n))
    d.run(1.5)
    for _ in range(400):  # nothing is answered any more, only time passes
        n1.pending.clear()
        next_s = n1.agent.next_s
        assert next_s is not None
        assert next_s > d.now
        d.now = next_s
        d.tell(n1)
