"""The agent as a whole, driven by hand: one node or few, every effect in order, on the model of etcd."""

from __future__ import annotations

from spinetta import keys
from spinetta.events import Commit, LeaveWanted, Start
from spinetta.model import NodeId, Outcome, State
from spinetta.session import Phase
from tests.builders import settings, spec, task_id
from tests.sim.direct import Direct


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
