"""A thousand worlds, each from one seed. ``python -m tests.sim --seeds 100000 --jobs 2`` runs a hundred thousand."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from tests.sim.faults import KINDS
from tests.sim.more import MORE_FROM, MORE_KINDS, NAMED_KINDS, WILD, small
from tests.sim.runs import attempt, chunk, points, strikes, struck, swept, tally
from tests.sim.shim_model import ShimModel
from tests.sim.tally import percentile

CHUNK = 50
CHUNKS = 20


@pytest.mark.parametrize("first", [*range(0, CHUNK * CHUNKS, CHUNK), *range(MORE_FROM, MORE_FROM + CHUNK * 4, CHUNK)])
def test_seeds(first: int) -> None:
    wrong = chunk(first, CHUNK, ())
    assert not wrong, "\n".join(f"python -m tests.sim --seed {seed} -v: {why}" for seed, why in wrong)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS, *NAMED_KINDS])
def test_one_kind_of_fault_alone(kind: str) -> None:
    wrong = chunk(0, 10, (kind,))
    assert not wrong, "\n".join(f"python -m tests.sim --seed {s} --faults {kind} -v: {why}" for s, why in wrong)


def test_beyond_what_is_assumed_of_clocks_only_one_promise_is_broken() -> None:
    """Clocks at rates from 0.6 to 1.6 and shims that kill seconds late: all invariants hold but the ninth."""
    found = tally(0, 30, (WILD, "partition", "net"))
    assert not found.failures
    assert found.broken_by_clocks > 0, "then it is not far beyond"


@pytest.mark.parametrize("part", range(4))
def test_strikes_between_any_two_effects_or_answers(part: int) -> None:
    """A sample of a sweep. ``python -m tests.sim --sweep 0 --jobs 2`` strikes everywhere."""
    some = strikes(part)[part * 31 :: 499]
    assert len(some) > 10
    _, found = swept(part, some)
    assert not found, "\n".join(
        f"python -m tests.sim --sweep {part} --at {s.strike[0]}:{s.strike[1]} -v: {s.wrong}" for s in found
    )


def test_a_strike_comes_at_the_point_that_was_counted() -> None:
    world, wrong = struck(small(0), ("daemon", 100), trace=True)
    assert not wrong
    (line,) = [line for line in world.lines if " STRIKE " in line]
    assert f"daemon {points(0)[100][0]} " in line


def test_what_seeds_have_shown_is_added_up() -> None:
    both, one, two = tally(3, 2), tally(3, 1), tally(4, 1)
    one.add(two)
    assert one.as_dict() == both.as_dict()
    assert both.seeds == 2
    assert percentile(both.settled_s, 1.0) == both.as_dict()["settled_s"]["worst"] > 0


def test_a_seed_is_one_story() -> None:
    """The same seed runs the same way, or a failure could not be looked at."""
    one, _ = attempt(11, trace=True)
    two, _ = attempt(11, trace=True)
    assert one.lines == two.lines
    assert len(one.lines) > 100


STORIES = {
    204850: "a start that an earlier daemon had asked for came after the next one had listed what the shim holds",
    220266: "the same, and it was too late to start: nobody heard of that end",
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


def test_what_power_cuts_may_take_are_ends_and_removals_but_no_start() -> None:
    """See ADR 0040: without the record of a start, one that ran would be started again."""
    found = tally(0, 20, ("unsynced",))
    assert not found.failures
    assert found.faults["records unsynced"] > 10

    def loses_starts(shim: ShimModel, now: float, _chance: random.Random) -> int:
        late = [key for key, process in shim.held.items() if now - process.started_s < 1.0]
        return len([shim.held.pop(key) for key in late])

    with mock.patch.object(ShimModel, "lose_power", loses_starts):
        assert any("was started twice" in why for _, why in tally(0, 20, ("unsynced",)).failures)
