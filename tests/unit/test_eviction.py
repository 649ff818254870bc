"""Which images go: by age, by size, never those in use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spinetta.eviction import Stored, Why, choose
from spinetta.runtime.clocks import SteppedClock

A = Stored("a", 10, used_s=100.0)
B = Stored("b", 20, used_s=200.0)
C = Stored("c", 30, used_s=300.0)


def test_nothing_goes_without_limits() -> None:
    assert choose([A, B, C], now_s=1e9, keep_bytes=0, keep_s=0) == []


def test_the_old_go_then_the_longest_unused_until_the_rest_fits() -> None:
    assert choose([C, B, A], now_s=301, keep_bytes=0, keep_s=150) == [("a", Why.AGE)]
    assert choose([C, B, A], now_s=301, keep_bytes=50, keep_s=0) == [("a", Why.SIZE)]
    assert choose([C, B, A], now_s=301, keep_bytes=49, keep_s=150) == [("a", Why.AGE), ("b", Why.SIZE)]


def test_one_in_use_or_pinned_stays_and_counts() -> None:
    held = Stored("a", 10, 100.0, is_held=True)
    pinned = Stored("b", 20, 200.0, is_pinned=True)
    assert choose([held, pinned, C], now_s=1e9, keep_bytes=35, keep_s=1) == [("c", Why.AGE)]
    assert choose([held, pinned, C], now_s=301, keep_bytes=35, keep_s=0) == [("c", Why.SIZE)]
    assert choose([held, pinned, C], now_s=301, keep_bytes=60, keep_s=0) == []


def test_a_marked_one_goes_as_soon_as_nothing_uses_it_pinned_or_not() -> None:
    marked = Stored("a", 10, 100.0, is_held=True, is_marked=True)
    assert choose([marked], now_s=1, keep_bytes=0, keep_s=0) == []
    free = Stored("a", 10, 100.0, is_pinned=True, is_marked=True)
    assert choose([free], now_s=1, keep_bytes=0, keep_s=0) == [("a", Why.MARKED)]


def test_ages_count_from_when_the_clock_was_set() -> None:
    assert choose([A], now_s=1e9, keep_bytes=0, keep_s=150, since_s=1e9 - 100) == []


def test_a_clock_that_was_set_forward_makes_nothing_old() -> None:
    wall, steady = [300.0], [0.0]
    clock = SteppedClock(lambda: wall[0], lambda: steady[0])

    def gone(keep_s: float = 150, keep_bytes: int = 0) -> list[str]:
        now_s = clock.now_s()
        chosen = choose(
            [A, B, C],
            now_s=now_s,
            keep_bytes=keep_bytes,
            keep_s=keep_s,
            since_s=clock.set_at_s,
            known_s=clock.known_s,
        )
        return [digest for digest, _ in chosen]

    assert gone() == ["a"]
    year_s = 365 * 86400.0
    steady[0], wall[0] = 60.0, 360.0 + year_s
    assert gone() == []
    assert gone(keep_bytes=50) == ["a"], "the longest unused, whatever the clock says"
    steady[0], wall[0] = 220.0, 520.0 + year_s
    assert gone() == ["a", "b", "c"], "from then on time is time again"


def test_what_was_used_when_the_clock_was_ahead_is_not_kept_for_ever() -> None:
    wall, steady = [200.0], [0.0]
    ahead = Stored("d", 40, used_s=1e9)

    def gone(clock: SteppedClock) -> list[str]:
        now_s = clock.now_s()
        return [
            d
            for d, _ in choose(
                [ahead], now_s=now_s, keep_bytes=0, keep_s=150, since_s=clock.set_at_s, known_s=clock.known_s
            )
        ]

    clock = SteppedClock(lambda: wall[0], lambda: steady[0])  # it was set back before we were started
    assert gone(clock) == []
    steady[0], wall[0] = 160.0, 360.0
    assert gone(clock) == ["d"]
    wall[0] = 1e9
    clock = SteppedClock(lambda: wall[0], lambda: steady[0])
    wall[0] = 400.0  # set back while we look on
    assert gone(clock) == []
    steady[0], wall[0] = 320.0, 560.0
    assert gone(clock) == ["d"]


@given(
    st.lists(
        st.builds(
            Stored,
            st.uuids().map(str),
            st.integers(0, 100),
            st.floats(0, 1000),
            st.booleans(),
            st.booleans(),
            st.booleans(),
        )
    ),
    st.integers(0, 300),
    st.floats(0, 1000),
)
def test_what_stays_fits_unless_it_may_not_go(images: list[Stored], keep_bytes: int, keep_s: float) -> None:
    gone = {d for d, _ in choose(images, now_s=1000, keep_bytes=keep_bytes, keep_s=keep_s)}
    rest = [i for i in images if i.digest not in gone]
    assert not any(i.is_held for i in images if i.digest in gone)
    assert not any(i.is_pinned and not i.is_marked for i in images if i.digest in gone)
    free = [i for i in rest if not (i.is_held or i.is_pinned)]
    assert not keep_bytes or not free or sum(i.size_bytes for i in rest) <= keep_bytes
    assert not keep_s or all(1000 - i.used_s <= keep_s for i in free)
