"""Whoever has etcdctl can write anything under our keys: no node dies of it, and the good tasks go on."""

from __future__ import annotations

import pytest

from spinetta import keys, txn
from spinetta.codec import encode_hint, encode_holding, encode_task
from spinetta.lifecycle import submitted
from spinetta.model import NodeId, Outcome, QueueHint, State, TaskId
from spinetta.session import Phase
from spinetta.v1 import record_pb2 as pb
from tests.builders import holding, settings, spec, task_id
from tests.sim.direct import Direct

GARBAGE = b"\xff\xff not a record"
FUTURE = pb.Task(state=pb.State.ValueType(9)).SerializeToString()  # a state that a later version may know
BAD = task_id(900)
LOST = NodeId("lost")


def put(d: Direct, key: str, value: bytes) -> None:
    assert isinstance(d.model.commit(txn.Txn(then=(txn.Put(key, value),))), txn.Committed)
    d.deliver()


@pytest.mark.parametrize("value", [b"", GARBAGE, FUTURE])
@pytest.mark.parametrize(
    "key",
    [
        keys.task(BAD),
        keys.queued(BAD),
        keys.queued(TaskId("")),
        keys.queued(TaskId("../..")),
        keys.complete(BAD),
        keys.running(NodeId("n1"), BAD),
        keys.running(NodeId("n1"), TaskId("")),
        keys.RUNNING + "n1",
        keys.running(LOST, BAD),
        keys.running(LOST, TaskId("")),
        keys.node(LOST),
        keys.NODE,
        keys.incarnation(LOST),
        keys.INCARNATION,
        keys.beat(LOST),
        keys.GENERATION,
        keys.OFFICE,
        keys.LEADER + "x",
    ],
)
def test_garbage_before_and_after_the_start(key: str, value: bytes) -> None:
    d = Direct(settings("n1"), settings("n2"))
    put(d, key, value)
    d.submit(spec(1))
    d.run(5.0)
    put(d, key, value)
    d.submit(spec(2))
    d.run(60.0)
    if key == keys.GENERATION:  # a new generation fences all that runs on purpose; see below
        return
    assert [d.task(task_id(n)).outcome for n in (1, 2)] == [Outcome.SUCCEEDED] * 2


@pytest.mark.parametrize("hint", [b"", encode_hint(QueueHint.of(spec(900)))])
@pytest.mark.parametrize("record", [b"", GARBAGE, FUTURE, encode_task(submitted(spec(7), now_ms=0, at_node="x"))])
def test_a_queued_task_whose_record_is_garbage_blocks_nobody(hint: bytes, record: bytes) -> None:
    d = Direct(settings("n1"), settings("n2"))
    put(d, keys.task(BAD), record)
    put(d, keys.queued(BAD), hint)
    d.submit(spec(1))
    d.submit(spec(901))
    d.run(60.0)
    assert [d.task(task_id(n)).outcome for n in (1, 901)] == [Outcome.SUCCEEDED] * 2
    assert all(n.agent.session.phase is Phase.ACTIVE for n in d.nodes.values())


def test_the_life_of_a_node_is_overwritten() -> None:
    d = Direct(settings("n1"), settings("n2"))
    d.submit(spec(1))
    d.run(0.5)
    holder = d.task(task_id(1)).attempts[-1].node
    put(d, keys.incarnation(holder), GARBAGE)
    d.run(90.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED
    assert d.node(holder).agent.session.phase is Phase.ACTIVE
    assert d.model.get(keys.incarnation(holder)) is not None


def test_the_record_of_a_running_task_and_its_key_are_overwritten() -> None:
    d = Direct(settings("n1"))
    d.submit(spec(1))
    d.run(0.5)
    put(d, keys.running(NodeId("n1"), task_id(1)), GARBAGE)
    put(d, keys.task(task_id(1)), GARBAGE)
    d.run(30.0)
    assert d.task(task_id(1)).outcome is Outcome.SUCCEEDED  # its holder knows better than what was written over it


def test_a_restarted_daemon_finds_garbage_where_its_task_was() -> None:
    d = Direct(settings("n1"))
    d.submit(spec(1))
    d.submit(spec(2))
    d.run(0.5)
    put(d, keys.task(task_id(1)), GARBAGE)
    d.restart(d.node())
    d.run(30.0)
    assert d.task(task_id(2)).outcome is Outcome.SUCCEEDED
    assert not d.node().shim.alive()


@pytest.mark.parametrize("record", [None, GARBAGE])
def test_a_key_of_a_dead_node_without_a_task_does_not_make_the_leader_run_in_circles(record: bytes | None) -> None:
    d = Direct(settings("n1"), settings("n2"))
    d.run(1.0)
    dead = d.nodes.pop(NodeId("n2"))
    put(d, keys.running(dead.settings.name, BAD), encode_holding(holding()))
    if record is not None:
        put(d, keys.task(BAD), record)
    d.submit(spec(1))
    d.run(40.0)
    before = len(d.node().done)
    d.run(50.0)
    assert (len(d.node().done) - before) / 10 < 15, d.node().done[-20:]
    assert d.task(task_id(1)).state is State.COMPLETE
