"""Keys of labels: who makes, hands on and replaces them, and what a node may not write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta import labelkeys, trustcodec
from spinetta.access import MEMBERS, LabelGeneration, LabelKey, NodeAcl, NodeRole, Wrap
from spinetta.errors import CorruptRecord
from spinetta.labelkeys import Cleared, Create, Drop, HandOn, Replace, doer, key_id, plan


def node(name: str, *, live: bool = True, role: NodeRole = NodeRole.VOTER, machine: int = 0) -> Cleared:
    return Cleared(name, f"{name}-{machine}".encode().ljust(32, b"."), role, live)


def wrap(n: Cleared) -> Wrap:
    return Wrap(n.name, b"sealed", key_id(n.sealing_key))


def key(*generations: Sequence[Cleared], label: str = "phi") -> LabelKey:
    return LabelKey(
        label,
        tuple(
            LabelGeneration(i, bytes([i]) * 32, tuple(wrap(n) for n in nodes)) for i, nodes in enumerate(generations, 1)
        ),
    )


A, B, C = node("a"), node("b"), node("c")


@pytest.mark.parametrize(
    ("key_", "cleared", "unused", "step"),
    [
        (None, [], [], None),
        (None, [A, B], [], Create("phi", (A, B))),
        (key([A, B]), [A, B], [], None),
        (key([A]), [A, B], [], HandOn("phi", ((1, (B,)),))),
        (key([A], [A]), [A, B, C], [], HandOn("phi", ((1, (B, C)), (2, (B, C))))),
        (key([A, B]), [A], [], Replace("phi", 2, (A,), ("b",))),
        (key([A, B]), [A, C], [], Replace("phi", 2, (A, C), ("b",))),
        (key([A, B]), [], [], None),  # nobody is cleared: nobody could make a key
        (key([A]), [B], [], Replace("phi", 2, (B,), ("a",))),
        (key([A, B]), [A, node("b", machine=1)], [], Replace("phi", 2, (A, node("b", machine=1)), ("b",))),
        (key([A], [A]), [A], [], None),
        (key([A], [A]), [A], [1], Drop("phi", (1,))),
        (key([A], [A]), [A], [2], None),  # the latest is never dropped
        (key([A], [A, B]), [A, B], [1], HandOn("phi", ((1, (B,)),))),
        (key([C], [A]), [A, B], [], HandOn("phi", ((2, (B,)),))),  # generation 1 is lost: C's machine is gone
    ],
)
def test_plan(key_: LabelKey | None, cleared: list[Cleared], unused: list[int], step: object) -> None:
    assert plan("phi", key_, cleared, unused) == step


NAMES = st.sampled_from("abcdef")
SETS = st.sets(NAMES, min_size=1)


@given(history=st.lists(SETS, min_size=1, max_size=8), machines=st.dictionaries(NAMES, st.integers(0, 1)))
def test_following_the_plan_comes_to_rest_with_wraps_for_the_cleared_only(
    history: list[set[str]], machines: dict[str, int]
) -> None:
    record: LabelKey | None = None
    for turn, names in enumerate(history):
        cleared = [node(n, machine=machines.get(n, 0) if turn % 2 else 0) for n in sorted(names)]
        for _ in range(5):
            step = plan("phi", record, cleared)
            if step is None:
                break
            before = record
            who = doer(step, record, cleared)
            record = carry_out(step, record, cleared)
            assert who in names
            assert labelkeys.why_not_update(before, record, who, cleared) == ""
        assert plan("phi", record, cleared) is None
        assert record is not None
        assert sorted(w.node for w in record.latest.wraps) == sorted(names)
        assert all(labelkeys.has_wrap(record.latest, n) for n in cleared)


def carry_out(step: object, record: LabelKey | None, cleared: list[Cleared]) -> LabelKey:
    match step:
        case Create(label, nodes):
            return LabelKey(label, (LabelGeneration(1, b"1" * 32, tuple(wrap(n) for n in nodes)),))
        case Replace(_, number, nodes):
            assert record is not None
            made = LabelGeneration(number, bytes([number]) * 32, tuple(wrap(n) for n in nodes))
            return labelkeys.replaced(record, made, cleared)
        case HandOn(_, missing):
            assert record is not None
            return labelkeys.extended(record, {number: [wrap(n) for n in nodes] for number, nodes in missing})
    raise AssertionError(step)


def test_who_does_it() -> None:
    worker, dead = node("w", role=NodeRole.WORKER), node("d", live=False)
    create = Create("phi", ())
    assert doer(create, None, [worker, dead]) == "w"
    assert doer(create, None, [worker, A]) == "a"
    assert doer(create, None, [dead]) == ""
    hand_on = HandOn("phi", ((1, (A,)),))
    assert doer(hand_on, key([worker]), [worker, A]) == "w"  # the voter has nothing to hand on
    some = {doer(Create(label, ()), None, [A, B, C]) for label in "abcdefgh"}
    assert len(some) > 1, "the work is spread over the nodes"


def test_who_is_cleared() -> None:
    acls = [
        NodeAcl("b", NodeRole.WORKER, effective=("phi",), sealing_key=b"b" * 32),
        NodeAcl("a", NodeRole.VOTER, clearances=("phi",), sealing_key=b"a" * 32),
        NodeAcl("c", NodeRole.VOTER, effective=("phi",), sealing_key=b"c" * 32, revoked=True),
        NodeAcl("d", NodeRole.VOTER, effective=("phi",)),
    ]
    assert [(n.name, n.live) for n in labelkeys.cleared_for("phi", acls, {"a"})] == [("b", False)]
    assert [(n.name, n.live) for n in labelkeys.cleared_for(MEMBERS, acls, {"a"})] == [("a", True), ("b", False)]


def test_old_generations_go_past_the_limit() -> None:
    record = key([A])
    for number in range(2, 50):
        made = LabelGeneration(number, b"k" * 32, (wrap(A),))
        record = labelkeys.replaced(record, made, [A])
    assert [g.number for g in record.generations] == list(range(18, 50))
    many = [node(f"n{i}") for i in range(1500)]
    wide = key([*many])
    for number in range(2, 10):
        wide = labelkeys.replaced(wide, LabelGeneration(number, b"k" * 32, tuple(map(wrap, many))), many)
    assert [g.number for g in wide.generations] == [7, 8, 9]


def test_a_withdrawn_node_loses_its_wraps_of_older_generations() -> None:
    record = labelkeys.replaced(key([A, B]), LabelGeneration(2, b"2" * 32, (wrap(A),)), [A])
    assert [[w.node for w in g.wraps] for g in record.generations] == [["a"], ["a"]]


GOOD = key([A, B])
WITHDRAWN = key([A, B, C])
OTHER = replace(wrap(B), sealed=b"nonsense")


def with_first(**changes: Any) -> LabelKey:
    return replace(GOOD, generations=(replace(GOOD.latest, **changes),))


NEXT = LabelGeneration(2, b"2" * 32, (wrap(A), wrap(B)))

AFTER = labelkeys.replaced(WITHDRAWN, NEXT, [A, B])


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (None, GOOD, ""),
        (GOOD, GOOD, ""),
        (WITHDRAWN, AFTER, ""),
        (GOOD, replace(GOOD, generations=(*GOOD.generations, NEXT)), "needs no new key"),
        (WITHDRAWN, replace(AFTER, generations=AFTER.generations[1:]), "added to those that are there"),
        (AFTER, replace(AFTER, generations=AFTER.generations[1:]), "a generation is missing"),
        (key([A]), GOOD, ""),
        (GOOD, key([A]), "taken from b"),
        (GOOD, replace(GOOD, generations=(replace(GOOD.latest, wraps=(wrap(A), OTHER)),)), "taken from b"),
        (None, replace(GOOD, generations=()), "1 to 32"),
        (None, replace(GOOD, generations=(NEXT,)), "one by one"),
        (GOOD, replace(GOOD, generations=(replace(GOOD.latest, public_key=b"x" * 32),)), "another public key"),
        (GOOD, key([A, B, C]), "c is not cleared"),
        (GOOD, replace(GOOD, generations=(*GOOD.generations, replace(NEXT, number=3))), "one by one"),
        (GOOD, replace(GOOD, generations=(NEXT, *GOOD.generations)), "one by one"),
        (None, with_first(public_key=b"x"), "malformed"),
        (None, with_first(wraps=(wrap(A), wrap(A))), "malformed"),
        (None, with_first(wraps=(replace(wrap(A), sealed=b"x" * 999),)), "malformed"),
        (None, with_first(wraps=(replace(wrap(A), key_id=b""),)), "malformed"),
        (None, with_first(wraps=(wrap(B),)), "able to open"),
        (None, with_first(wraps=(wrap(A), wrap(node("b", machine=7)))), "b is not cleared"),
    ],
)
def test_what_a_node_may_write(old: LabelKey | None, new: LabelKey, why: str) -> None:
    said = labelkeys.why_not_update(old, new, "a", [A, B])
    assert (why in said) if why else said == ""


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        trustcodec.encode(key([A], label="other")),
        trustcodec.encode(key(label="phi")),
        trustcodec.encode(replace(GOOD, generations=GOOD.generations * 2)),
    ],
)
def test_a_record_that_is_none(value: bytes) -> None:
    with pytest.raises(CorruptRecord):
        labelkeys.stored("phi", value)
    assert labelkeys.stored("phi", trustcodec.encode(AFTER)) == AFTER


def test_only_who_sees_all_may_drop() -> None:
    less = replace(AFTER, generations=AFTER.generations[1:])
    assert labelkeys.why_not_update(AFTER, less, "a", [A, B], may_drop=True) == ""


def test_who_is_not_cleared_writes_nothing() -> None:
    assert "node c is not cleared" in labelkeys.why_not_update(None, GOOD, "c", [A, B])
