"""Running many worlds: one seed, a chunk of seeds, a chunk of strikes; what is shared by the command and the tests."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from tests.sim.faults import Plan
from tests.sim.more import plan, small
from tests.sim.points import SWEPT, Sweep, applies
from tests.sim.tally import Tally
from tests.sim.world import World


def run(world: World) -> str:
    """Let a world run; what went wrong, empty when nothing did."""
    try:
        world.run()
    except Exception as e:  # noqa: BLE001 - a crash of the code under test is a finding like any other
        if world.trace:
            world.lines.append(traceback.format_exc())
        return f"{type(e).__name__}: {e}"
    return ""


def attempt(seed: int, only: tuple[str, ...] = (), *, trace: bool = False) -> tuple[World, str]:
    """One seed; what went wrong, empty when nothing did."""
    world = World(plan(seed, only), trace=trace)
    return world, run(world)


def tally(first: int, count: int, only: tuple[str, ...] = ()) -> Tally:
    """What some seeds in a row show."""
    total = Tally()
    for seed in range(first, first + count):
        total.take(*attempt(seed, only))
    return total


def chunk(first: int, count: int, only: tuple[str, ...]) -> list[tuple[int, str]]:
    """The seeds of a chunk that fail."""
    return tally(first, count, only).failures


# --- sweeps ------------------------------------------------------------------------------------------------------

Strike = tuple[str, int]  # what is done, and at which point of the run


@dataclass(frozen=True, slots=True)
class Struck:
    """A strike that did harm."""

    strike: Strike
    wrong: str


def points(seed: int) -> list[tuple[str, str]]:
    """The points of the small world of a seed, when nothing happens to it: machine, and what it is about to do."""
    world = World(small(seed))
    sweep = Sweep(world)
    world.striker = sweep
    run(world)
    return sweep.seen


def strikes(seed: int, hows: tuple[str, ...] = tuple(SWEPT)) -> list[Strike]:
    """All that a sweep of a seed does, in the order of its points."""
    return [(how, at) for at, (_, what) in enumerate(points(seed)) for how in hows if applies(how, what)]


def aimed(seed: int, aim: str) -> list[Strike]:
    """The strikes of a sweep that one like ``long-freeze at Start`` stands for: at each point of that sort."""
    how, _, what = aim.partition(" at ")
    return [(how, at) for at, (_, found) in enumerate(points(seed)) if found == what and applies(how, what)]


def struck(made: Plan, strike: Strike, *, trace: bool = False) -> tuple[World, str]:
    """One world with one strike."""
    world = World(made, trace=trace)
    world.striker = Sweep(world, *strike)
    return world, run(world)


def swept(seed: int, some: list[Strike]) -> tuple[Tally, list[Struck]]:
    """What some strikes show."""
    total, found, made = Tally(), [], small(seed)
    for strike in some:
        world, wrong = struck(made, strike)
        total.take(world, wrong)
        if wrong:
            found.append(Struck(strike, wrong))
    return total, found
