"""The exchange of an authority, by value."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta.access import Authorities, AuthorityEntry, AuthorityState, NodeRole, Wrap
from spinetta.errors import UserError
from spinetta.rotation import (
    PATIENCE_MS,
    NodeTrust,
    advance_rotation,
    begin,
    lagging,
    retire_now,
    under_way,
    without_node,
)

ACTIVE, NEXT, RETIRING = AuthorityState.ACTIVE, AuthorityState.NEXT, AuthorityState.RETIRING
OLD = AuthorityEntry(b"old\n", ACTIVE, (Wrap("n1", b"x"), Wrap("n2", b"y")), created_ms=1)
NEW = AuthorityEntry(b"new\n", NEXT, (Wrap("n1", b"z"),), cross_pem=b"cross\n")
AT_REST = Authorities("cluster", 1, (OLD,))
BEGUN = begin(AT_REST, NEW, now_ms=1000, overlap_s=10.0)


def nodes(*pairs: tuple[int, int]) -> list[NodeTrust]:
    return [NodeTrust(f"n{i}", believes, signed) for i, (believes, signed) in enumerate(pairs)]


def worker(believes: int, signed: int) -> NodeTrust:
    return NodeTrust("w1", believes, signed, NodeRole.WORKER)


def states(authorities: Authorities) -> list[tuple[bytes, AuthorityState]]:
    return [(e.certificate_pem, e.state) for e in authorities.entries]


def test_the_whole_way() -> None:
    assert BEGUN.generation == 2
    assert states(BEGUN) == [(b"old\n", ACTIVE), (b"new\n", NEXT)]
    assert BEGUN.bundle == b"old\nnew\n"  # the signing one first

    assert advance_rotation(BEGUN, nodes((2, 1), (1, 1)), 2000) is BEGUN  # one does not believe it yet
    moved = advance_rotation(BEGUN, nodes((2, 1), (2, 1)), 2000)
    assert moved.generation == 3
    assert states(moved) == [(b"old\n", RETIRING), (b"new\n", ACTIVE)]
    assert moved.bundle == b"new\nold\n"
    assert moved.entries[0].wraps == ()  # it signs no more
    assert moved.active.cross_pem == b"cross\n"

    assert advance_rotation(moved, nodes((3, 3), (3, 2)), 99_999) is moved  # one still has an old certificate
    assert advance_rotation(moved, nodes((3, 3), (2, 3)), 99_999) is moved
    assert advance_rotation(moved, nodes((3, 3), (3, 3)), 10_999) is moved  # the overlap is not over
    done = advance_rotation(moved, nodes((3, 3), (3, 3)), 11_000)
    assert done.generation == 4
    assert states(done) == [(b"new\n", ACTIVE)]
    assert done.active.cross_pem == b""
    assert not under_way(done)
    assert advance_rotation(done, nodes((4, 4)), 10**9) is done


def test_nothing_known_of_nodes_is_no_yes() -> None:
    assert advance_rotation(BEGUN, [], 10**9) is BEGUN


def test_ending_the_overlap_early_still_waits_for_every_node() -> None:
    moved = advance_rotation(BEGUN, nodes((2, 1)), 2000)
    early = retire_now(moved, nodes((2, 1)), now_ms=3000)
    assert early.generation == moved.generation
    assert advance_rotation(early, nodes((3, 2)), 3000) is early
    assert states(advance_rotation(early, nodes((3, 3)), 3000)) == [(b"new\n", ACTIVE)]


def test_a_worker_holds_it_up_until_the_overlap_is_over_and_a_voter_for_ever() -> None:
    ready, stuck = nodes((2, 2)), worker(1, 1)
    assert advance_rotation(BEGUN, [*ready, stuck], 10_999) is BEGUN
    assert lagging(BEGUN, [*ready, stuck]) == [stuck]
    moved = advance_rotation(BEGUN, [*ready, stuck], 11_500)
    assert states(moved) == [(b"old\n", RETIRING), (b"new\n", ACTIVE)]
    assert moved.entries[0].retire_at_ms == 11_500  # from now on the honest have time to renew
    ready = nodes((3, 3))
    assert advance_rotation(moved, [*ready, stuck], 11_500 + PATIENCE_MS - 1) is moved
    assert advance_rotation(moved, [*ready, worker(3, 2)], 11_500 + PATIENCE_MS - 1) is moved
    assert states(advance_rotation(moved, [*ready, stuck], 11_500 + PATIENCE_MS)) == [(b"new\n", ACTIVE)]
    for voter in nodes((1, 1)):
        assert advance_rotation(BEGUN, [*ready, voter], 10**12) is BEGUN
        assert advance_rotation(moved, [*ready, voter], 10**12) is moved
        assert lagging(moved, [*ready, voter]) == [voter]
    assert advance_rotation(BEGUN, [stuck], 10**12) is BEGUN  # of the voters nothing is known
    assert lagging(AT_REST, [stuck]) == []


def test_who_does_not_want_to_wait_for_workers_need_not() -> None:
    signs = retire_now(BEGUN, [*nodes((2, 1)), worker(1, 1)], now_ms=1500)
    assert states(signs) == [(b"old\n", RETIRING), (b"new\n", ACTIVE)]
    assert signs.generation == 3
    assert signs.entries[0].retire_at_ms == 11_000  # not dropped at once: nobody has a certificate of the new one yet
    early = retire_now(signs, [*nodes((3, 3)), worker(1, 1)], now_ms=2000)
    assert early.entries[0].retire_at_ms == 2000
    assert states(advance_rotation(early, [*nodes((3, 3)), worker(1, 1)], 2000 + PATIENCE_MS)) == [(b"new\n", ACTIVE)]
    for held_up in (nodes((2, 1), (1, 1)), [worker(2, 1)], []):
        with pytest.raises(UserError) as caught:
            retire_now(BEGUN, held_up, now_ms=1500)
        assert caught.value.reason == "not-signing-yet"


def test_one_at_a_time() -> None:
    for authorities in (BEGUN, advance_rotation(BEGUN, nodes((2, 1)), 2000)):
        with pytest.raises(UserError) as caught:
            begin(authorities, NEW, now_ms=1, overlap_s=1.0)
        assert caught.value.reason == "rotation-under-way"
    with pytest.raises(UserError):
        retire_now(AT_REST, nodes((1, 1)), now_ms=1)


def test_nothing_stays_sealed_to_a_node_that_is_out() -> None:
    assert [w.node for w in without_node(BEGUN, "n1").entries[0].wraps] == ["n2"]
    assert without_node(AT_REST, "n9") == AT_REST


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4),
    st.integers(0, 20_000),
    st.sampled_from([AT_REST, BEGUN, replace(advance_rotation(BEGUN, nodes((2, 2)), 0))]),
)
def test_there_is_always_one_that_signs_and_nobody_is_left_behind(
    said: list[tuple[int, int]], now_ms: int, authorities: Authorities
) -> None:
    new = advance_rotation(authorities, nodes(*said), now_ms)
    assert [e.state for e in new.entries].count(ACTIVE) == 1
    assert new == authorities or new.generation == authorities.generation + 1
    if new.active != authorities.active and new.active.certificate_pem != authorities.active.certificate_pem:
        assert all(believes >= authorities.generation for believes, _ in said)
    if len(new.entries) < len(authorities.entries):
        assert all(signed >= authorities.generation for _, signed in said)
