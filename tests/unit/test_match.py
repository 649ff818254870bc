from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinetta.match import Obstacle, shortfall, why_never, why_not_now
from spinetta.model import Resources
from tests.builders import GIB, cpus, hint

TAGS = frozenset({"ssd", "zone=a"})
ROOM = Resources.of(4000, 8 * GIB, 100 * GIB, {"gpu": 2})

amounts = st.integers(0, 1 << 40)
resources = st.builds(
    Resources.of,
    amounts,
    amounts,
    amounts,
    st.dictionaries(st.sampled_from(["gpu", "fpga", "licence"]), st.integers(0, 9)),
)


NEVER = [
    (hint(), None, ""),
    (hint(tags_required=("ssd",)), None, ""),
    (hint(tags_required=("ssd", "big", "fast")), Obstacle.TAG_MISSING, "big, fast"),
    (hint(tags_forbidden=("zone=b",)), None, ""),
    (hint(tags_forbidden=("zone=a",)), Obstacle.TAG_FORBIDDEN, "zone=a"),
    (hint(tags_required=("big",), tags_forbidden=("zone=a",)), Obstacle.TAG_MISSING, "big"),
    (hint(ROOM), None, ""),
    (hint(cpus(4.001)), Obstacle.TOO_LARGE, "4.001 cores wanted, 4 there"),
    (
        hint(Resources.of(memory_bytes=8 * GIB + 1)),
        Obstacle.TOO_LARGE,
        f"{8 * GIB + 1} bytes of memory wanted, {8 * GIB} there",
    ),
    (hint(Resources.of(memory_bytes=1 << 40)), Obstacle.TOO_LARGE, "1TiB memory wanted, 8GiB there"),
    (hint(Resources.of(disk_bytes=100 * GIB + 1)), Obstacle.TOO_LARGE, "bytes of disk"),
    (hint(cpus(1, gpu=3)), Obstacle.TOO_LARGE, "3 gpu wanted, 2 there"),
    (hint(cpus(1, fpga=1)), Obstacle.TOO_LARGE, "1 fpga wanted, 0 there"),
]


@pytest.mark.parametrize(("wanted", "obstacle", "words"), NEVER)
def test_why_never(wanted: object, obstacle: Obstacle | None, words: str) -> None:
    reason = why_never(wanted, ROOM, TAGS)  # type: ignore[arg-type]
    if obstacle is None:
        assert reason is None
    else:
        assert reason is not None
        assert reason.obstacle is obstacle
        assert words in reason.detail


def test_why_not_now() -> None:
    assert why_not_now(hint(cpus(2)), cpus(2)) is None
    reason = why_not_now(hint(cpus(2)), cpus(1))
    assert reason is not None
    assert reason.obstacle is Obstacle.NO_ROOM


@given(resources, resources)
def test_a_shortfall_is_told_exactly_when_there_is_one(wanted: Resources, room: Resources) -> None:
    assert bool(shortfall(wanted, room)) == (not wanted.fits_in(room))


# --- the algebra of amounts ----------------------------------------------------------------------------------------


@given(resources, resources)
def test_sums_do_not_depend_on_order(a: Resources, b: Resources) -> None:
    assert a + b == b + a


@given(resources, resources, resources)
def test_sums_do_not_depend_on_grouping(a: Resources, b: Resources, c: Resources) -> None:
    assert (a + b) + c == a + (b + c)


@given(resources, resources)
def test_what_is_added_can_be_taken_away(a: Resources, b: Resources) -> None:
    assert (a + b) - b == a


@given(resources)
def test_nothing_changes_nothing(a: Resources) -> None:
    assert a + Resources() == a
    assert a - a == Resources()
    assert Resources().fits_in(a)
    assert a.fits_in(a)


@given(resources, resources, resources)
def test_fitting_is_an_order(a: Resources, b: Resources, c: Resources) -> None:
    assert a.fits_in(a + b)
    if a.fits_in(b) and b.fits_in(c):
        assert a.fits_in(c)
    if a.fits_in(b) and b.fits_in(a):
        assert a == b


@given(resources, resources)
def test_what_fits_leaves_no_debt(a: Resources, b: Resources) -> None:
    left = b - a
    assert a.fits_in(b) == (left == left.at_least_nothing())
    assert Resources().fits_in(left.at_least_nothing())


def test_normal_form() -> None:
    assert Resources.of(countables={"b": 1, "a": 2, "c": 0}).countables == (("a", 2), ("b", 1))
    assert (cpus(1, gpu=1) - cpus(1, gpu=1)) == Resources()
    assert (Resources() - cpus(1, gpu=1)).at_least_nothing() == Resources()
