"""A thousand worlds, each from one seed. ``python -m tests.sim --seeds 100000 --jobs 2`` runs a hundred thousand."""

from __future__ import annotations

import pytest

from tests.sim.faults import KINDS
from tests.sim.runs import attempt, chunk

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


STORIES = {
    3: "a batch of claims shares one token; each of its tasks is an attempt of its own",
    17: "the watch told of a claim after its end had been recorded, and the task was started again",
    58: "a round of claims in doubt outlived its incarnation and claimed for the old life",
    89: "a claim in doubt that the watch had shown was counted twice, and what is free became negative",
    110: "the leader put back a task whose holder had just recorded its end",
    840: "a registration came after its node had given up on it, and the leader saw too many dead to bury it",
    13797: "a node that left while it stood for the office was made leader without a lease, and turned in a tight loop",
    101407: "an attempt given back by a daemon that died, committed after the next one had started it",
    200066: "a drain gave back what had been started, because nobody had answered the start",
    15234: "a listing of the runtime was under way while a start was answered, and its end was forgotten",
}


@pytest.mark.parametrize("seed", STORIES, ids=lambda s: f"{s}")
def test_seeds_that_found_something(seed: int) -> None:
    _, wrong = attempt(seed)
    assert not wrong, f"python -m tests.sim --seed {seed} -v (it once showed: {STORIES[seed]}): {wrong}"
