from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import codec, messages
from spinetta.errors import CorruptRecord
from spinetta.model import (
    Attempt,
    Holding,
    Incarnation,
    IncarnationId,
    Life,
    NodeId,
    NodeRecord,
    Outcome,
    QueueHint,
    Resources,
    Revision,
    State,
    Task,
    TaskId,
    TaskSpec,
    Usage,
)
from tests.builders import spec

text = st.text(max_size=12)
names = st.lists(text, max_size=4, unique=True).map(lambda ns: tuple(sorted(ns)))
pairs = st.dictionaries(text, text, max_size=4).map(lambda d: tuple(sorted(d.items())))
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
s64 = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
resources = st.builds(Resources.of, u64, u64, u64, st.dictionaries(text, u64, max_size=3))
specs = st.builds(
    TaskSpec,
    id=text.map(TaskId),
    command=st.lists(text, max_size=4).map(tuple),
    name=text,
    labels=pairs,
    env=pairs,
    working_directory=text,
    resources=resources,
    walltime_s=floats,
    tags_required=names,
    tags_forbidden=names,
    priority=st.integers(-(2**31), 2**31 - 1),
    retries=u32,
    retry_backoff_s=floats,
    restart_on_node_failure=st.booleans(),
    owner=text,
    grace_s=floats,
    overlap=st.booleans(),
    losses_allowed=u32,
)
attempts = st.builds(
    Attempt,
    number=u32,
    node=text.map(NodeId),
    incarnation=text.map(IncarnationId),
    token=s64.map(Revision),
    started_ms=s64,
    ended_ms=s64,
    outcome=st.sampled_from(Outcome),
    exit_code=st.none() | st.integers(-(2**31), 2**31 - 1),
    signal=u32,
    reason=text,
    message=text,
    usage=st.builds(Usage, floats, floats, u64),
)
tasks = st.builds(
    Task,
    spec=specs,
    state=st.sampled_from(State),
    outcome=st.sampled_from(Outcome),
    reason=text,
    message=text,
    attempts_started=u32,
    attempts=st.lists(attempts, max_size=3).map(tuple),
    failures=u32,
    losses=u32,
    losses_excused=u32,
    losses_preparing=u32,
    submitted_ms=s64,
    completed_ms=s64,
    submitted_at_node=text,
)
nodes = st.builds(
    NodeRecord,
    name=text.map(NodeId),
    address=text,
    incarnation=text.map(IncarnationId),
    capacity=resources,
    free=resources,
    tags=st.lists(text, max_size=3).map(tuple),
    running=u32,
    draining=st.booleans(),
    leaving=st.booleans(),
    etcd_client_url=text,
    etcd_peer_url=text,
    etcd_member_id=u64,
    candidate=st.booleans(),
    version=text,
    started_ms=s64,
    boot_id=text,
    runtimes=st.lists(text, max_size=3).map(tuple),
    warnings=st.lists(text, max_size=3).map(tuple),
)


@given(tasks)
def test_a_task_comes_back(task: Task) -> None:
    assert codec.decode_task(codec.encode_task(task)) == task


@given(nodes)
def test_a_node_comes_back(node: NodeRecord) -> None:
    assert codec.decode_node(codec.encode_node(node)) == node


@given(st.builds(QueueHint, resources, names, names, st.integers(-(2**31), 2**31 - 1), floats.filter(lambda x: x != 0)))
def test_a_hint_comes_back(hint: QueueHint) -> None:
    assert codec.decode_hint(codec.encode_hint(hint)) == hint


@given(st.builds(Holding, u32, text.map(IncarnationId), floats, st.booleans(), text))
def test_a_holding_comes_back(value: Holding) -> None:
    assert codec.decode_holding(codec.encode_holding(value)) == value


@given(st.builds(Incarnation, text.map(IncarnationId), st.sampled_from(Life), text, floats, floats))
def test_an_incarnation_comes_back(life: Incarnation) -> None:
    assert codec.decode_incarnation(codec.encode_incarnation(life)) == life


@given(text)
def test_small_values_come_back(word: str) -> None:
    assert codec.decode_office(codec.encode_office(NodeId(word))) == word
    assert codec.decode_generation(codec.encode_generation(word)) == word


@given(tasks)
def test_equal_tasks_are_equal_bytes(task: Task) -> None:
    """A submit that is repeated is recognised by its bytes."""
    assert codec.encode_task(task) == codec.encode_task(codec.decode_task(codec.encode_task(task)))


def test_an_absent_wish_to_restart_means_yes() -> None:
    message = messages.spec_to_pb(spec(1, restart_on_node_failure=False))
    assert messages.spec_from_pb(message).restart_on_node_failure is False
    message.ClearField("restart_on_node_failure")
    assert messages.spec_from_pb(message).restart_on_node_failure is True


def test_exit_code_zero_is_not_absent() -> None:
    zero = Attempt(1, NodeId("n"), IncarnationId("i"), exit_code=0)
    assert messages.attempt_from_pb(messages.attempt_to_pb(zero)).exit_code == 0
    none = Attempt(1, NodeId("n"), IncarnationId("i"))
    assert messages.attempt_from_pb(messages.attempt_to_pb(none)).exit_code is None


def test_an_empty_or_unreadable_hint_is_none() -> None:
    assert codec.decode_hint(b"") is None
    assert codec.decode_hint(b"\xff\xff\xff") is None


BROKEN = b"\xff\xff\xff"


@pytest.mark.parametrize(
    "decode",
    [
        codec.decode_task,
        codec.decode_node,
        codec.decode_holding,
        codec.decode_incarnation,
        codec.decode_office,
        codec.decode_generation,
    ],
)
def test_what_is_broken_says_so(decode: Any) -> None:
    with pytest.raises(CorruptRecord, match="cannot be read"):
        decode(BROKEN)


def test_a_record_without_a_state_is_broken() -> None:
    with pytest.raises(CorruptRecord, match="no state"):
        codec.decode_task(b"")
    with pytest.raises(CorruptRecord, match="no state"):
        codec.decode_incarnation(b"")
