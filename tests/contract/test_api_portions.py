"""Splitting what is sent and what is written: nothing lost, nothing too large."""

from __future__ import annotations

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from spinetta import txn
from spinetta.model import Revision
from spinetta.node.services import follow, limits, views
from spinetta.node.services.portions import portions
from spinetta.store.protocol import Change, KeyValue
from spinetta.v1 import api_pb2 as api
from spinetta.v1 import record_pb2 as pb


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2000), st.booleans()), min_size=1, max_size=40),
    room=st.integers(1, 5000),
)
def test_a_client_may_resume_after_any_portion_and_lose_nothing(steps: list[tuple[int, int, bool]], room: int) -> None:
    revision, changes = 1, []
    for i, (step, size, deleted) in enumerate(steps):
        revision += step
        key, at = f"/task/{i}", Revision(revision)
        changes.append(Change(key, None if deleted else KeyValue(key, b"x" * size, at, at), at))
    with mock.patch.object(limits, "ANSWER_BYTES_MAX", room):
        parts = list(follow._portions(changes))
    assert [c for part, _ in parts for c in part] == changes
    sent: list[Change] = []
    for part, resume in parts:
        assert part
        assert len(part) == 1 or sum(300 + len(c.value.value if c.value else b"") for c in part) <= room
        sent += part
        assert all(c in sent for c in changes if c.revision <= resume)
    assert parts[-1][1] == changes[-1].revision


@given(st.lists(st.integers(0, 1_500_000), max_size=300))
def test_portions_of_transactions(sizes: list[int]) -> None:
    parts = list(portions(sizes, lambda s: s))
    assert [s for part in parts for s in part] == sizes
    for part in parts:
        assert 0 < len(part) <= txn.NESTED_MAX
        assert len(part) == 1 or sum(part) <= txn.BATCH_BYTES_MAX


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(1, 1000))
def test_answers_fit(sizes: list[int], room: int) -> None:
    shown = [
        api.TaskView(task=pb.Task(spec=pb.TaskSpec(id=str(i), name="n", command=["x" * size])))
        for i, size in enumerate(sizes)
    ]
    with mock.patch.object(limits, "ANSWER_BYTES_MAX", room):
        parts = list(views.packed(shown))
        fitted = views.fitting(shown)
    assert [v for part in parts for v in part] == shown
    assert all(len(part) == 1 or sum(v.ByteSize() for v in part) <= room for part in parts)
    assert [(v.task.spec.id, v.task.spec.name) for v in fitted] == [(str(i), "n") for i in range(len(sizes))]
    assert sum(v.ByteSize() for v in fitted if not v.spec_omitted) <= room
    assert all(not v.task.spec.command for v in fitted if v.spec_omitted)
