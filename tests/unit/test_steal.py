from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from spinetta import steal
from spinetta.model import NodeId, NodeRecord, Resources
from spinetta.queue import Waiting
from spinetta.steal import CLAIMS_MAX, SLOT_S, STARVED_AFTER_S, WAIT_MAX_S, plan, rank, rivals, wait_s
from tests.builders import BIG, GIB, cpus, hint, node_id, node_record, task_id, waiting

ME = NodeId("n1")
demands = st.builds(
    lambda c, m, g: Resources.of(c, m * GIB, 0, {"gpu": g}), st.integers(0, 5000), st.integers(0, 9), st.integers(0, 2)
)
tasks = st.lists(st.tuples(demands, st.integers(-2, 2), st.floats(0, 100), st.floats(0, 5)), max_size=30).map(
    lambda rows: [waiting(n, r, priority=p, seen_at_s=s, delay_s=d) for n, (r, p, s, d) in enumerate(rows, 1)]
)
names = st.lists(st.integers(1, 30).map(node_id), min_size=1, max_size=8, unique=True)


def peers(*ns: int, **fields: object) -> list[NodeRecord]:
    return [node_record(f"n{n}", **fields) for n in ns]  # type: ignore[arg-type]


# --- ranks ---


@given(names, st.integers(1, 1000))
def test_ranks_are_a_permutation(nodes: list[NodeId], n: int) -> None:
    assert sorted(rank(me, task_id(n), nodes) for me in nodes) == list(range(len(nodes)))


@given(names, st.integers(1, 1000))
def test_a_node_that_goes_moves_no_other_past_another(nodes: list[NodeId], n: int) -> None:
    order = sorted(nodes, key=lambda me: rank(me, task_id(n), nodes))
    rest = order[1:]
    assert sorted(rest, key=lambda me: rank(me, task_id(n), rest)) == rest


def test_ranks_are_spread() -> None:
    nodes = [node_id(n) for n in range(1, 5)]
    first = Counter(min(nodes, key=lambda me: rank(me, task_id(n), nodes)) for n in range(1, 2001))
    assert set(first) == set(nodes)
    assert max(first.values()) < 2 * min(first.values())


def test_the_rank_is_the_same_for_ever() -> None:
    """All nodes, of all versions, must agree."""
    assert steal.weight(NodeId("n1"), task_id(1)) == 11002275438099568776


def test_rivals_are_those_that_could_take_it() -> None:
    assert rivals(hint(cpus(2)), peers(2, 3)) == ["n2", "n3"]
    assert rivals(hint(cpus(2)), peers(2, free=cpus(1))) == []
    assert rivals(hint(cpus(2)), peers(2, free=cpus(1)), with_room=False) == ["n2"]
    assert rivals(hint(cpus(2)), peers(2, draining=True), with_room=False) == []
    assert rivals(hint(cpus(2)), peers(2, leaving=True), with_room=False) == []
    assert rivals(hint(cpus(99)), peers(2), with_room=False) == []
    assert rivals(hint(tags_required=("fast",)), [*peers(2), *peers(3, tags=("fast",))]) == ["n3"]


# --- waits ---


@given(st.integers(1, 200), st.integers(0, 80), st.floats(0, 5))
def test_waits_are_bounded(n: int, count: int, delay_s: float) -> None:
    found = wait_s(ME, waiting(n, delay_s=delay_s), peers(*range(2, count + 2)))
    assert delay_s <= found <= WAIT_MAX_S + delay_s


def test_nobody_waits_alone() -> None:
    assert wait_s(ME, waiting(1), []) == 0.0
    assert wait_s(ME, waiting(1), peers(2, 3, free=Resources())) == 0.0


def test_waits_differ_between_nodes() -> None:
    all_ = peers(1, 2, 3)
    waits = [wait_s(p.name, waiting(1), [o for o in all_ if o is not p]) for p in all_]
    assert sorted(waits) == [0.0, SLOT_S, 2 * SLOT_S]


def test_a_task_without_a_hint_waits() -> None:
    unread = Waiting(task_id(1), waiting(1).revision, None, 0.0)
    assert wait_s(ME, unread, []) == WAIT_MAX_S
    assert plan(ME, [unread], [], BIG, 100.0).claims == ()


# --- packing ---


def ids(found: tuple[Waiting, ...]) -> list[int]:
    return [int(w.id[:8], 16) for w in found]


@given(tasks, demands, st.floats(0, 200), st.integers(0, 4), st.integers(1, 80))
def test_it_never_packs_more_than_there_is(
    queue: list[Waiting], free: Resources, now: float, others: int, slots: int
) -> None:
    found = plan(ME, queue, peers(*range(2, others + 2)), free, now, slots=slots)
    total = Resources()
    for w in found.claims:
        assert w.hint is not None
        assert w.wait_s is not None
        assert w.seen_at_s + w.wait_s <= now
        total = total + w.hint.resources
    assert total.fits_in(free)
    assert len(found.claims) <= min(slots, CLAIMS_MAX)
    assert len({w.id for w in found.claims}) == len(found.claims)


@given(tasks, demands, st.floats(0, 200), st.integers(0, 4))
def test_what_is_left_has_a_reason(queue: list[Waiting], free: Resources, now: float, others: int) -> None:
    """A task that is due and would still fit after all claims was left only for room kept for another."""
    found = plan(ME, queue, peers(*range(2, others + 2)), free, now)
    left = free
    for w in found.claims:
        assert w.hint is not None
        left = left - w.hint.resources
    starved = any(now >= w.seen_at_s + (w.wait_s or 0) + STARVED_AFTER_S for w in found.considered)
    for w in found.considered:
        assert w.hint is not None
        assert w.wait_s is not None
        if w not in found.claims and w.seen_at_s + w.wait_s <= now and w.hint.resources.fits_in(left):
            assert starved or len(found.claims) == CLAIMS_MAX


@given(tasks, st.floats(0, 200))
def test_highest_priority_first_then_the_oldest(queue: list[Waiting], now: float) -> None:
    found = plan(ME, queue, [], BIG, now).claims
    order = [(-w.hint.priority, w.id) for w in found if w.hint]
    assert order == sorted(order)


@given(tasks, demands, st.floats(0, 200), st.integers(0, 4))
def test_it_is_called_again_in_the_future(queue: list[Waiting], free: Resources, now: float, others: int) -> None:
    again = plan(ME, queue, peers(*range(2, others + 2)), free, now).look_again_at_s
    assert again is None or again > now


def test_a_task_that_is_not_due_is_looked_at_again() -> None:
    found = plan(ME, [waiting(1, wait_s=0.5), waiting(2, wait_s=0.2)], [], BIG, 0.1)
    assert found.claims == ()
    assert found.look_again_at_s == 0.2


def test_back_off_is_waited_for() -> None:
    retry = waiting(1, delay_s=10.0, seen_at_s=5.0)
    assert plan(ME, [retry], [], BIG, 14.9).claims == ()
    assert ids(plan(ME, [retry], [], BIG, 15.0).claims) == [1]


def test_small_tasks_go_past_a_large_one_for_a_while() -> None:
    queue = [waiting(1, cpus(4)), waiting(2, cpus(1)), waiting(3, cpus(1))]
    found = plan(ME, queue, [], cpus(2), 1.0)
    assert ids(found.claims) == [2, 3]
    assert found.look_again_at_s == STARVED_AFTER_S


def test_a_starved_large_task_gets_room() -> None:
    queue = [waiting(1, cpus(4)), waiting(2, cpus(1))]
    assert ids(plan(ME, queue, [], cpus(3), STARVED_AFTER_S).claims) == []
    assert ids(plan(ME, queue, [], cpus(4), STARVED_AFTER_S).claims) == [1]
    higher = [*queue, waiting(3, cpus(1), priority=1)]
    assert ids(plan(ME, higher, [], cpus(3), STARVED_AFTER_S).claims) == [3]


def test_only_the_node_ranked_first_keeps_room() -> None:
    queue = [waiting(1, cpus(4)), waiting(2, cpus(1))]
    everyone = peers(1, 2, 3)
    took = [
        p.name
        for p in everyone
        if plan(p.name, queue, [o for o in everyone if o is not p], cpus(3), STARVED_AFTER_S + WAIT_MAX_S).claims
    ]
    first = min(everyone, key=lambda p: rank(p.name, task_id(1), [o.name for o in everyone]))
    assert sorted([*took, first.name]) == ["n1", "n2", "n3"]


def test_a_starved_large_task_gets_its_node_in_the_end() -> None:
    """Small tasks arrive for ever, each lasting 3 s: the large one starts when the small ones of before have ended."""
    now, large = 0.0, waiting(1, cpus(4))
    running: list[tuple[float, Resources]] = []
    n = 2
    while now < 10 * STARVED_AFTER_S:
        running = [(end, r) for end, r in running if end > now]
        free = cpus(4)
        for _, r in running:
            free = free - r
        small = [waiting(n + i, cpus(1), seen_at_s=now) for i in range(4)]
        n += 4
        claims = plan(ME, [large, *small], [], free, now).claims
        if large.id in {w.id for w in claims}:
            break
        running += [(now + 3.0, w.hint.resources) for w in claims if w.hint]
        now += 1.0
    assert now <= STARVED_AFTER_S + 4.0


def test_a_batch_is_bounded() -> None:
    queue = [waiting(n, Resources()) for n in range(1, 200)]
    assert len(plan(ME, queue, [], BIG, math.inf).claims) == CLAIMS_MAX
    assert len(plan(ME, queue, [], BIG, math.inf, slots=3).claims) == 3
