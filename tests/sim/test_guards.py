"""A check on the checks: each fault made in the code on purpose is noticed by a seed of the simulator.

Each guard by itself, in the store in which it alone does not hold, is in ``tests/unit/test_txn.py``: many guards stand
behind one another, so that it takes two faults and much bad luck before a world goes wrong without one of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from spinetta.errors import InvariantViolation
from tests.sim import guards
from tests.sim.enumerated import Found
from tests.sim.enumerated import guards as all_guards
from tests.sim.hunt import notices, strikes_notice
from tests.sim.mutants import MUTANTS
from tests.sim.noticed import NOTICED, TOLD, UNNOTICED
from tests.sim.runs import attempt

SEARCH = 60  # a change of the code changes what a seed tells: then the next one that notices will do
PAGE = Path(__file__).resolve().parents[2] / "docs/guards.md"


@pytest.mark.parametrize("mutant", NOTICED)
def test_it_is_noticed(mutant: str) -> None:
    faults, seed = NOTICED[mutant]
    if " at " in faults:
        assert strikes_notice(mutant, faults, seed) is not None, "no such strike notices it any more"
        return
    kinds = tuple(k for k in faults.split(",") if k)
    assert not attempt(seed, kinds)[1], "the seed must hold without the fault in the code"
    assert any(notices(mutant, kinds, s) for s in (seed, *range(SEARCH))), "nothing notices it any more"


@pytest.mark.parametrize("mutant", TOLD)
def test_its_story_goes_wrong(mutant: str) -> None:
    TOLD[mutant]()
    with MUTANTS[mutant](), pytest.raises((AssertionError, InvariantViolation)):
        TOLD[mutant]()


def test_every_mutant_is_tried() -> None:
    """Or a guard that its own case in ``test_txn.py`` holds alone, or one of which it is told what stands behind it."""
    alone = {g.name for g in all_guards() if guards.case_of(g)[0]}
    assert set(MUTANTS) - set(NOTICED) - set(TOLD) - set(UNNOTICED) <= alone
    assert set(NOTICED) | set(TOLD) | set(UNNOTICED) <= set(MUTANTS)


@pytest.mark.parametrize("found", all_guards(), ids=lambda g: g.name)
def test_each_guard_is_told_of_and_noticed(found: Found) -> None:
    """A new guard has to be told of in ``tests/sim/guards.py``, and needs a case in ``tests/unit/test_txn.py``."""
    assert guards.why(found)
    assert list(guards.noticed_by(found)), f"add a case for {found.owner} to tests/unit/test_txn.py"


def test_the_page_tells_of_every_fault() -> None:
    assert guards.missing() == set()
    assert set(guards.TIMES) | set(guards.REASONING) <= set(NOTICED) | set(TOLD) | set(UNNOTICED)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == guards.document(), "run: python -m tests.sim --guards > docs/guards.md"
