"""The leader's round: what it finds, in which time, and that it leaves alone what is merely under way."""

from __future__ import annotations

import pytest

from spinetta import keys, sweep, txn
from spinetta.events import List, Read
from spinetta.model import NodeId, Outcome, Revision, State
from spinetta.sweep import PAGE_KEYS, PAGE_S, ROUND, Sweep
from tests.builders import cpus, key_of, settings, spec, task_id
from tests.sim.direct import Direct, Node, long_tasks, until_wanted

N1 = NodeId("n1")
ROUND_S = PAGE_S * (len(ROUND) + 2)


def by_hand(d: Direct, *writes: txn.Write) -> None:
    d.model.commit(txn.Txn(then=writes))
    d.deliver()


def mendings(node: Node) -> list[str]:
    return [text for text in node.notices if text.startswith("mending")]


def one_node(**fields: object) -> Direct:
    d = Direct(settings(**fields), script=long_tasks)  # type: ignore[arg-type]
    d.run(1.0)
    assert d.node().agent.leading
    return d


def test_a_task_whose_queue_key_is_gone_runs_all_the_same() -> None:
    d = one_node()
    d.submit(spec(1, cpus(64)))  # more than there is: it waits
    by_hand(d, txn.Delete(keys.queued(task_id(1))))
    d.run(d.now + ROUND_S)
    assert d.model.get(keys.queued(task_id(1))) is not None
    assert mendings(d.node()) == [f"mending: task {task_id(1)} is QUEUED, but {keys.queued(task_id(1))} was missing"]


def test_keys_of_nobodys_task_are_removed() -> None:
    d = one_node()
    by_hand(
        d, txn.Put(keys.queued(task_id(8))), txn.Put(keys.complete(task_id(9))), txn.Put(keys.running(N1, task_id(7)))
    )
    d.run(d.now + 2 * ROUND_S)
    assert not d.model.list("/status/").entries


def test_what_a_lost_node_of_no_life_held_goes_back() -> None:
    """Its incarnation was removed by hand, and with it what the leader goes by."""
    d = Direct(settings("n1", candidate=True), settings("n2", candidate=False), script=long_tasks)
    d.run(1.0)
    d.node("n1").agent.draining = True
    d.submit(spec(1))
    d.run(d.now + 3.0)
    assert d.task(task_id(1)).attempts[-1].node == "n2"
    del d.nodes[NodeId("n2")]
    by_hand(d, txn.Delete(keys.incarnation(NodeId("n2"))), txn.Delete(keys.node(NodeId("n2"))))
    wait_s = d.node().settings.reconcile_s + 60.0
    d.run(d.now + ROUND_S)
    assert d.task(task_id(1)).state is State.RUNNING, "it may still run: nothing is put back before the wait"
    d.run(d.now + wait_s + 2 * ROUND_S)
    assert d.task(task_id(1)).state is State.QUEUED
    assert d.task(task_id(1)).attempts[-1].outcome is Outcome.LOST


def test_a_running_key_that_was_spoilt_holds_its_task_up_for_a_while_only() -> None:
    """The process was ended for want of its key: the loss is recorded, and the task runs again."""
    d = one_node()
    d.submit(spec(1))
    d.run(d.now + 2.0)
    key = keys.running(N1, task_id(1))
    by_hand(d, txn.Put(key, b"\xff\xff"))
    d.restart(d.node())  # a new daemon cannot read it, and leaves the key alone
    d.run(d.now + 2 * ROUND_S + 10.0)
    task = d.task(task_id(1))
    assert [a.reason for a in task.attempts[:-1]] == ["fenced"]
    assert task.state is State.RUNNING
    assert [p.key for p in d.node().shim.alive()] == [key_of(1, 2)]


def test_a_record_that_nobody_can_read_is_told_of_once_and_kept() -> None:
    d = one_node()
    by_hand(d, txn.Put(keys.task(task_id(1)), b"\xff"), txn.Put(keys.queued(task_id(1))))
    d.run(d.now + 3 * ROUND_S)
    told = [text for text in d.node().notices if "cannot be read" in text]
    assert len(told) == 1
    assert d.model.get(keys.queued(task_id(1))) is not None


def test_many_pages() -> None:
    d = one_node()
    count = PAGE_KEYS + 5
    for n in range(1, count + 1):
        d.submit(spec(n, cpus(64)))
    by_hand(d, *(txn.Delete(keys.queued(task_id(n))) for n in range(1, count + 1)))
    d.run(d.now + 4 * ROUND_S)
    assert len(d.model.list(keys.QUEUED).entries) == count


def test_what_is_merely_under_way_is_left_alone() -> None:
    """Each page is old when its other half is read: tasks come, run and end all the time."""
    d = Direct(settings(reconcile_s=5.0))
    for n in range(1, 300):
        if n % 3 == 0:
            d.run(d.now + 0.5)
        d.submit(spec(n))
    d.run(d.now + ROUND_S)
    assert mendings(d.node()) == []


def test_nobody_goes_round_without_the_office() -> None:
    d = one_node()
    d.submit(spec(1, cpus(64)))
    agent = d.node().agent
    asked = until_wanted(d, d.node(), lambda e: isinstance(e, List) and e.tag == "sweep")
    before = agent.sweep
    agent.leadership.resign()
    d.tell(d.node())
    assert agent.sweep is not before
    assert not agent.sweep.begun
    d.perform(d.node(), asked)  # a late answer is nobody's
    assert not [e for e in d.node().pending if isinstance(e, Read) and str(e.tag).startswith("sweep")]


@pytest.mark.parametrize("step", ["sweep", "sweep-page", "sweep-look"])
def test_a_question_that_was_not_answered_is_asked_again(step: str) -> None:
    d = one_node()
    d.submit(spec(1, cpus(64)))
    by_hand(d, txn.Delete(keys.queued(task_id(1))))
    n1 = d.node()
    d.lose(n1, until_wanted(d, n1, lambda e: isinstance(e, List | Read) and e.tag == step))
    d.run(d.now + 2 * ROUND_S)
    assert d.model.get(keys.queued(task_id(1))) is not None


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SUSPECTS_MAX", 3)
    d = one_node()
    for n in range(1, 10):
        d.submit(spec(n, cpus(64)))
    by_hand(d, *(txn.Delete(keys.queued(task_id(n))) for n in range(1, 10)))
    d.run(d.now + 4 * ROUND_S)
    assert len(d.model.list(keys.QUEUED).entries) == 9, "what did not fit is found in the next rounds"


def test_a_task_that_its_record_places_elsewhere_is_looked_at_there_however_much_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "LOOK_MAX", 1)
    d = one_node()
    for n in (1, 2):
        d.submit(spec(n))
    d.run(d.now + 1.0)
    extra = [keys.running(NodeId("n9"), task_id(n)) for n in (1, 2)]
    by_hand(d, *(txn.Put(key) for key in extra))
    n1 = d.node()
    asked = until_wanted(d, n1, lambda e: isinstance(e, Read) and e.tag == "sweep-look")
    monkeypatch.setattr(sweep, "SUSPECTS_MAX", 1)  # as full as can be
    d.perform(n1, asked)
    d.run(d.now + 2 * ROUND_S)
    assert all(d.model.get(key) is None for key in extra)
    assert all(d.model.get(keys.running(N1, task_id(n))) is not None for n in (1, 2))


def test_a_round_begins_with_a_pause() -> None:
    office = txn.OfficeHeld(Revision(1), N1)
    fresh = Sweep(settings())
    assert fresh.next_s is None
    assert fresh.poll(100.0, office) == []
    assert fresh.next_s == 100.0 + PAGE_S
    (first,) = fresh.poll(100.0 + PAGE_S, office)
    assert first == List("sweep", ROUND[0], "", PAGE_KEYS)
