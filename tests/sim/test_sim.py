"""A thousand worlds, each from one seed. ``python -m tests.sim --seeds 100000 --jobs 2`` runs a hundred thousand."""

from __future__ import annotations

import pytest

from tests.sim.__main__ import attempt, chunk
from tests.sim.faults import KINDS

CHUNK = 50
CHUNKS = 20


@pytest.mark.parametrize("first", range(0, CHUNK * CHUNKS, CHUNK))
def test_seeds(first: int) -> None:
    wrong = chunk(first, CHUNK, ())
    assert not wrong, "\n".join(f"python -m tests.sim --seed {seed} -v: {why}" for seed, why in wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_fault_alone(kind: str) -> None:
    wrong = chunk(0, 10, (kind,))
    assert not wrong, "\n".join(f"python -m tests.sim --seed {s} --faults {kind} -v: {why}" for s, why in wrong)


def test_a_seed_is_one_story() -> None:
    """The same seed runs the same way, or a failure could not be looked at."""
    one, _ = attempt(11, trace=True)
    two, _ = attempt(11, trace=True)
    assert one.lines == two.lines
    assert len(one.lines) > 100
