"""Kinds of faults that were added after the first seeds had been told, each drawn from a chance of its own.

Seeds below `MORE_FROM` keep their stories: they meet these kinds only where they are asked for by name. From there on
they are mixed with the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace

from spinetta.model import NodeId
from tests.sim import faults
from tests.sim.contained import with_containers
from tests.sim.faults import HORIZON_S, Fault, Plan

MORE_FROM = 200_000
MORE_KINDS = (
    "point",  # a crash, a freeze or a cut between any two effects or answers of one machine
    "drift",  # the rates of clocks change all along, within rho
    "oneway",  # nothing gets out to the store, while what comes from there still does
    "lease",  # a lease that is kept alive is taken for run out; one that nobody keeps lives on
    "elect",  # the store changes its leader: requests that are under way are lost, or done and never answered
    "echo",  # a former leader of the store, frozen, answers keep-alives; nothing else goes through
    "replay",  # watches tell again what they have told
    "slowdisk",  # what is written to disk takes seconds, and the shim's answers with it
)
NAMED_KINDS = (  # met only where they are asked for by name
    "stop",  # a daemon ends in order, and the next one may take longer than a lease
    "unsynced",  # machines lose their power, and with it the ends of the last moment; what was forgotten is there again
)
WILD = "wild"  # clock rates and shims far beyond what is assumed: only what does not rest on time must hold
STRIKES = ("daemon", "shim", "machine", "freeze", "long-freeze", "cut", "mute", "lose", "late")
LEASE_MODES = ("node", "office", "kept")
WILD_RATES = (0.6, 1.6)
WILD_LAG_S = 4.0  # how long after a deadline a shim that is not run gets round to killing


def plan(seed: int, only: Collection[str] = ()) -> Plan:
    """The plan of a seed; with `only`, these kinds of faults and no others."""
    made = with_containers(faults.plan(seed, only))
    chance = random.Random(f"more {seed}")
    kinds = tuple(k for k in MORE_KINDS if k in only)
    if not only and seed >= MORE_FROM:
        chosen = chance.choices(MORE_KINDS, k=chance.choice((0, 1, 1, 2, 3, 4)))
        kinds = tuple(k for k in MORE_KINDS if k in chosen)
    for kind in kinds:
        made = _ADD[kind](made, random.Random(f"{kind} {seed}"))
    for kind in (k for k in NAMED_KINDS if k in only):
        made = _NAMED[kind](made, random.Random(f"{kind} {seed}"))
    if WILD in only:
        made = _wild(made, random.Random(f"wild {seed}"))
    kinds += tuple(k for k in NAMED_KINDS if k in only)
    added = set(kinds) - set(made.kinds)
    in_time = sorted((f for f in made.faults if f.at_s < made.horizon_s), key=lambda f: f.at_s)
    return replace(made, kinds=(*made.kinds, *sorted(added)), faults=tuple(in_time))


def small(seed: int) -> Plan:
    """A world to be struck at each of its points: few nodes and tasks, short times, and no other faults."""
    made = with_containers(faults.plan(seed, ("none",)))
    chance = random.Random(f"small {seed}")
    machines = made.machines[: 2 if chance.random() < 0.6 else 3]
    submits = tuple((min(at_s, 4.0), replace(spec, tags_required=(), tags_forbidden=())) for at_s, spec in made.submits)
    submits = submits[:4]
    known = {spec.id for _, spec in submits}
    return replace(
        made,
        machines=machines,
        submits=submits,
        cancels=tuple((min(at_s, 5.0), task) for at_s, task in made.cancels if task in known),
        lease_ttl_s=2,
        grace_s=3.0,
        horizon_s=8.0,
        reconcile_s=4.0,
    )


def _machines(p: Plan) -> list[NodeId]:
    return [m.name for m in p.machines]


def _spread(kind: str, most: int, longest_s: float, modes: Callable[[random.Random], str]) -> _Adder:
    def add(p: Plan, chance: random.Random) -> Plan:
        found = [
            Fault(
                chance.uniform(0.3, HORIZON_S * chance.choice((0.4, 1.0))),
                kind,
                chance.choice(_machines(p)),
                chance.choice((chance.uniform(0.1, longest_s / 3), chance.uniform(longest_s / 2, longest_s))),
                modes(chance),
            )
            for _ in range(chance.randint(1, most))
        ]
        return replace(p, faults=(*p.faults, *found))

    return add


def _store(p: Plan, chance: random.Random) -> Plan:
    found = [
        Fault(chance.uniform(0.3, HORIZON_S), "elect", for_s=chance.choice((0.2, 1.0, 3.0)))
        for _ in range(chance.randint(1, 3))
    ]
    again = [replace(f, at_s=f.at_s + f.for_s + 0.1) for f in found if chance.random() < 0.3]  # elections in a row
    return replace(p, faults=(*p.faults, *found, *again))


def _drift(p: Plan, chance: random.Random) -> Plan:
    found = []
    for name in _machines(p):
        at_s = 0.0
        while at_s < p.horizon_s:
            at_s += chance.uniform(0.2, 3.0)
            edge = chance.choice((-p.rho / 2, p.rho / 2.1, chance.uniform(-p.rho / 2, p.rho / 2.1)))
            found.append(Fault(at_s, "drift", name, mode=f"{1.0 + edge}"))
    return replace(p, faults=(*p.faults, *found))


def _wild(p: Plan, chance: random.Random) -> Plan:
    rates = (replace(m, clock_rate=chance.uniform(*WILD_RATES)) for m in p.machines)
    return replace(p, machines=tuple(rates), wild=True)


def _one_of(*modes: str) -> Callable[[random.Random], str]:
    return lambda chance: chance.choice(modes)


_Adder = Callable[[Plan, random.Random], Plan]
_power_cuts = _spread("machine", 6, 3.0, _one_of("", "claim", "finish", "finish"))
_ADD: dict[str, _Adder] = {
    "point": _spread("point", 5, 6.0, lambda c: f"{c.choice(STRIKES)}:{c.randint(0, 40)}"),
    "drift": _drift,
    "oneway": _spread("partition", 3, 12.0, _one_of("outward", "outward", "answers", "requests")),
    "lease": _spread("lease", 5, 1.0, _one_of(*LEASE_MODES)),
    "elect": _store,
    "echo": _spread("partition", 2, 9.0, _one_of("echo")),
    "replay": lambda p, c: replace(p, rates=replace(p.rates, replay=c.uniform(0.05, 0.4))),
    "slowdisk": lambda p, c: replace(p, rates=replace(p.rates, slow_disk=c.uniform(0.1, 0.5))),
}
_NAMED: dict[str, _Adder] = {
    "stop": _spread("stop", 4, 9.0, _one_of("", "0.1", "0.6")),
    "unsynced": lambda p, c: replace(_power_cuts(p, c), unsynced=True),
}
assert tuple(_ADD) == MORE_KINDS
assert tuple(_NAMED) == NAMED_KINDS
