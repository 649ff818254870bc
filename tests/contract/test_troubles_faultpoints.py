"""A shim that is killed at any of its calls leaves nothing that the next one does not make good."""

from __future__ import annotations

import pytest

from tests.contract import faultpoints

pytestmark = pytest.mark.contract

# Some of some 120 points; all of them by `python -m tests.contract.faultpoints`, in ten minutes.


@pytest.mark.parametrize("isolate", [True, False], ids=["namespace", "subreaper"])
def test_a_shim_that_is_killed_at_any_call(isolate: bool) -> None:
    points = faultpoints.points(isolate=isolate)
    # In its start, before and after it has written down who it is, while it serves, and at its end.
    reached = [faultpoints.once("shim", points * part // 10, isolate=isolate) for part in (1, 3, 5, 7, 9)]
    assert all(reached[:4]), "only the last of them depend on time"


@pytest.mark.parametrize(
    ("role", "number", "isolate"), [("writer", 3, False), ("writer", 9, True), ("child", 5, False)]
)
def test_a_helper_of_the_shim_that_is_killed(role: str, number: int, isolate: bool) -> None:
    assert faultpoints.once(role, number, isolate=isolate)
